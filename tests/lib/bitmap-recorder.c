/* nbdkit-dirty-bitmap-filter
 * SPDX-License-Identifier: BSD-3-Clause
 * Copyright the nbdkit-dirty-bitmap-filter authors
 */

/* A container that records every write, zeroing and flush, and notes of
 * the test between them, so that the test can make each image that a
 * crash could have left.
 */

#include <config.h>

#include <errno.h>
#include <inttypes.h>
#include <sched.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdlib.h>
#include <string.h>

#include <cmocka.h>

#include "common/bytes.h"
#include "common/cleanup.h"
#include "image.h"
#include "bitmap-image.h"

enum event_type {
  EVENT_WRITE, EVENT_BARRIER, EVENT_SIZE, EVENT_NOTE, EVENT_STAGE,
};

struct event {
  enum event_type type;
  uint64_t offset, count;       /* of a write; first and last of a note; the
                                   number of a stage */
  uint8_t *data;                /* of a write; NULL: zeroes */
  char *name;                   /* of a note */
};

struct recorder {
  struct container c;
  size_t limit;
  pthread_mutex_t lock;         /* protects what follows */
  uint8_t *start, *now;         /* of limit bytes */
  size_t start_size;
  struct event *events;
  size_t nr_events, max_events;
  unsigned nr_writes, nr_flushes, nr_failures, until_failure;
  bool failing, fail_for_ever, applied, yield;
  recorder_watch_fn watch;      /* fixed while threads run */
  void *watch_opaque;
  recorder_judge_fn judge;
  void *judge_opaque;
};

static struct recorder *
recorder (struct container *c)
{
  return (struct recorder *) c;
}

static void
add_event (struct recorder *r, struct event event)
{
  if (r->nr_events == r->max_events) {
    r->max_events = 2 * r->max_events + 64;
    r->events = realloc (r->events, r->max_events * sizeof *r->events);
  }
  r->events[r->nr_events++] = event;
}

/* Is this operation to fail? */
static bool
fails (struct recorder *r)
{
  if (!r->failing)
    return false;
  if (r->until_failure > 0) {
    r->until_failure--;
    return false;
  }
  r->failing = r->fail_for_ever;
  r->nr_failures++;
  errno = EIO;
  return true;
}

static void
let_others_in (struct recorder *r)
{
  if (r->yield)
    sched_yield ();
}

static int
recorder_pread (struct container *c, void *buf, size_t count, uint64_t offset)
{
  struct recorder *r = recorder (c);

  ACQUIRE_LOCK_FOR_CURRENT_SCOPE (&r->lock);
  memcpy (buf, r->now + offset, count);
  return 0;
}

static int
change (struct container *c, const void *buf, size_t count, uint64_t offset)
{
  struct recorder *r = recorder (c);
  struct event event = {
    .type = EVENT_WRITE, .offset = offset, .count = count,
  };
  bool failed;

  let_others_in (r);
  if (r->watch != NULL)
    r->watch (r->watch_opaque, buf, count, offset);
  ACQUIRE_LOCK_FOR_CURRENT_SCOPE (&r->lock);
  r->nr_writes++;
  failed = fails (r);
  if (failed && !r->applied)
    return -1;
  if (buf != NULL) {
    event.data = malloc (count);
    memcpy (event.data, buf, count);
    memcpy (r->now + offset, buf, count);
  }
  else
    memset (r->now + offset, 0, count);
  add_event (r, event);
  return failed ? -1 : 0;
}

static int
recorder_pwrite (struct container *c, const void *buf, size_t count,
                 uint64_t offset)
{
  return change (c, buf, count, offset);
}

static int
recorder_zero (struct container *c, uint64_t count, uint64_t offset,
               bool punch)
{
  (void) punch;
  return change (c, NULL, count, offset);
}

static int
recorder_flush (struct container *c)
{
  struct recorder *r = recorder (c);

  let_others_in (r);
  ACQUIRE_LOCK_FOR_CURRENT_SCOPE (&r->lock);
  r->nr_flushes++;
  if (fails (r))
    return -1;
  add_event (r, (struct event) { .type = EVENT_BARRIER });
  return 0;
}

static int
set_size (struct container *c, uint64_t size)
{
  struct recorder *r = recorder (c);

  if (size > r->limit) {
    errno = ENOSPC;
    return -1;
  }
  ACQUIRE_LOCK_FOR_CURRENT_SCOPE (&r->lock);
  add_event (r, (struct event) { .type = EVENT_SIZE, .count = size });
  atomic_store (&c->size, size);
  return 0;
}

static void
recorder_close (struct container *c)
{
  struct recorder *r = recorder (c);

  for (size_t i = 0; i < r->nr_events; ++i) {
    free (r->events[i].data);
    free (r->events[i].name);
  }
  free (r->events);
  free (r->start);
  free (r->now);
  pthread_mutex_destroy (&r->lock);
  free (r);
}

static const struct container_ops recorder_ops = {
  .pread = recorder_pread,
  .pwrite = recorder_pwrite,
  .zero = recorder_zero,
  .flush = recorder_flush,
  .grow = set_size,
  .truncate = set_size,
  .close = recorder_close,
};

struct container *
recorder_open (const struct bytes *bytes, size_t limit)
{
  struct recorder *r = calloc (1, sizeof *r);

  assert_non_null (r);
  assert_true (bytes->n <= limit);
  r->limit = limit;
  r->start = calloc (1, limit);
  r->now = calloc (1, limit);
  assert_non_null (r->start);
  assert_non_null (r->now);
  memcpy (r->start, bytes->p, bytes->n);
  memcpy (r->now, bytes->p, bytes->n);
  r->start_size = bytes->n;
  pthread_mutex_init (&r->lock, NULL);
  container_init (&r->c, &recorder_ops, bytes->n, false);
  return &r->c;
}

void
recorder_fail (struct container *c, unsigned nth, bool for_ever, bool applied)
{
  struct recorder *r = recorder (c);

  ACQUIRE_LOCK_FOR_CURRENT_SCOPE (&r->lock);
  r->failing = true;
  r->until_failure = nth;
  r->fail_for_ever = for_ever;
  r->applied = applied;
}

void
recorder_stop_failing (struct container *c)
{
  struct recorder *r = recorder (c);

  ACQUIRE_LOCK_FOR_CURRENT_SCOPE (&r->lock);
  r->failing = false;
}

unsigned
recorder_writes (struct container *c)
{
  struct recorder *r = recorder (c);

  ACQUIRE_LOCK_FOR_CURRENT_SCOPE (&r->lock);
  return r->nr_writes;
}

unsigned
recorder_flushes (struct container *c)
{
  struct recorder *r = recorder (c);

  ACQUIRE_LOCK_FOR_CURRENT_SCOPE (&r->lock);
  return r->nr_flushes;
}

unsigned
recorder_failures (struct container *c)
{
  struct recorder *r = recorder (c);

  ACQUIRE_LOCK_FOR_CURRENT_SCOPE (&r->lock);
  return r->nr_failures;
}

void
recorder_yield (struct container *c, bool yield)
{
  recorder (c)->yield = yield;
}

void
recorder_watch (struct container *c, recorder_watch_fn watch, void *opaque)
{
  recorder (c)->watch = watch;
  recorder (c)->watch_opaque = opaque;
}

void
recorder_note (struct container *c, const char *name,
               uint64_t first, uint64_t last)
{
  struct recorder *r = recorder (c);

  ACQUIRE_LOCK_FOR_CURRENT_SCOPE (&r->lock);
  add_event (r, (struct event) {
      .type = EVENT_NOTE, .offset = first, .count = last,
      .name = strdup (name),
    });
}

void
recorder_stage (struct container *c, unsigned number)
{
  struct recorder *r = recorder (c);

  ACQUIRE_LOCK_FOR_CURRENT_SCOPE (&r->lock);
  add_event (r, (struct event) { .type = EVENT_STAGE, .offset = number });
}

void
recorder_judge (struct container *c, recorder_judge_fn judge, void *opaque)
{
  recorder (c)->judge = judge;
  recorder (c)->judge_opaque = opaque;
}

struct bytes
recorder_image (struct container *c)
{
  struct recorder *r = recorder (c);

  return (struct bytes) { .p = r->now, .n = container_size (c) };
}

struct bytes
recorder_copy (struct container *c)
{
  struct recorder *r = recorder (c);

  ACQUIRE_LOCK_FOR_CURRENT_SCOPE (&r->lock);
  const struct bytes copy = {
    .p = malloc (container_size (c)), .n = container_size (c),
  };

  memcpy (copy.p, r->now, copy.n);
  return copy;
}

static void
apply (uint8_t *image, const struct event *e, size_t from, size_t count)
{
  if (e->data != NULL)
    memcpy (image + e->offset + from, e->data + from, count);
  else
    memset (image + e->offset + from, 0, count);
}

/* Apply the parts of a write for which the next bits of random say so,
 * cut at multiples of 512.
 */
static void
apply_torn (uint8_t *image, const struct event *e, uint64_t *seed)
{
  for (size_t at = 0; at < e->count;) {
    size_t n = min_u64 (512 - (e->offset + at) % 512, e->count - at);

    if (random_next (seed) & 1)
      apply (image, e, at, n);
    at += n;
  }
}

/* What the notes so far ask of one bitmap. */
struct required {
  const char *name;
  uint8_t *bits;                /* MAX_NOTED_BITS of them */
};

#define MAX_NOTED_BITS (UINT64_C (1) << 18)

static void
add_note (struct required required[MAX_SPECS], const struct event *e)
{
  unsigned i = 0;

  while (required[i].name && strcmp (required[i].name, e->name) != 0)
    i++;
  assert_true (i < MAX_SPECS && e->count < MAX_NOTED_BITS);
  required[i].name = e->name;
  if (required[i].bits == NULL)
    required[i].bits = calloc (1, MAX_NOTED_BITS / 8);
  for (uint64_t bit = e->offset; bit <= e->count; ++bit)
    required[i].bits[bit / 8] |= 1 << bit % 8;
}

/* I3: all notes so far hold in the image. */
static void
check_notes (const struct required required[MAX_SPECS], size_t point,
             const struct bytes *image)
{
  for (unsigned i = 0; i < MAX_SPECS && required[i].name; ++i) {
    struct disk_bitmap d = disk_bitmap_read (image, required[i].name);

    if (d.state == DISK_ABSENT)
      fail_msg ("crash at event %zu: bitmap %s is gone", point,
                required[i].name);
    for (uint64_t j = 0; d.state == DISK_CLEAN && j < d.nr_bits / 8; ++j)
      if (required[i].bits[j] & ~d.bits[j])
        fail_msg ("crash at event %zu: bitmap %s is unmarked and lacks one "
                  "of the granules from %" PRIu64, point, required[i].name,
                  8 * j);
    free (d.bits);
  }
}

/* One crash at point: durable has everything up to the last barrier,
 * which is event barrier.  Of the writes after it those whose bits are
 * set in subset are applied, bit n for write n, and bit 62 for all
 * writes from there on; torn if it is UINT64_MAX.
 */
static void
crash_once (struct recorder *r, const struct required *required,
            unsigned stage, uint8_t *image, const uint8_t *durable,
            size_t size, size_t barrier, size_t point, uint64_t subset,
            uint64_t *seed)
{
  const struct bytes bytes = { .p = image, .n = size };
  unsigned n = 0;

  memcpy (image, durable, size);
  for (size_t i = barrier; i < point; ++i) {
    const struct event *e = &r->events[i];

    if (e->type != EVENT_WRITE)
      continue;
    if (subset == UINT64_MAX)
      apply_torn (image, e, seed);
    else if (subset >> min_u64 (n, 62) & 1)
      apply (image, e, 0, e->count);
    n++;
  }
  check_notes (required, point, &bytes);
  if (r->judge != NULL)
    r->judge (r->judge_opaque, stage, &bytes);
}

unsigned long
recorder_crash (struct container *c, unsigned max_subsets, uint64_t seed)
{
  struct recorder *r = recorder (c);
  struct required required[MAX_SPECS] = { 0 };
  CLEANUP_FREE uint8_t *durable = malloc (r->limit);
  CLEANUP_FREE uint8_t *image = malloc (r->limit);
  size_t barrier = 0, size = r->start_size, nr_open = 0;
  unsigned long checked = 0;
  unsigned stage = 0;

  memcpy (durable, r->start, r->limit);
  for (size_t point = 0; point <= r->nr_events; ++point) {
    bool exhaustive = nr_open < 16 && UINT64_C (1) << nr_open <= max_subsets;
    uint64_t nr = exhaustive ? UINT64_C (1) << nr_open : max_subsets;

    for (uint64_t i = 0; i < nr; ++i, ++checked)
      crash_once (r, required, stage, image, durable, size, barrier, point,
                  exhaustive ? i
                  : i == 0 ? UINT64_MAX >> 1 : UINT64_MAX, &seed);
    if (point == r->nr_events)
      break;

    const struct event *e = &r->events[point];

    /* The size is taken to be durable at once: what is in doubt here
     * are the bytes.
     */
    if (e->type == EVENT_SIZE)
      size = max_u64 (size, e->count);
    if (e->type == EVENT_NOTE)
      add_note (required, e);
    if (e->type == EVENT_STAGE)
      stage = e->offset;
    if (e->type == EVENT_WRITE)
      nr_open++;
    if (e->type == EVENT_BARRIER) {
      for (; barrier < point; ++barrier)
        if (r->events[barrier].type == EVENT_WRITE)
          apply (durable, &r->events[barrier], 0,
                 r->events[barrier].count);
      nr_open = 0;
    }
  }
  for (unsigned i = 0; i < MAX_SPECS; ++i)
    free (required[i].bits);
  return checked;
}
