/* nbdkit-dirty-bitmap-filter
 * SPDX-License-Identifier: BSD-3-Clause
 * Copyright the nbdkit-dirty-bitmap-filter authors
 */

/* How this works
 *
 * Each operation is done and logged at once, under the log's lock.  A
 * write is logged as the sectors (of 512 bytes) that it touches, as they
 * are when it has been done: a disk writes whole sectors, so a write of
 * a part of one carries with it what was written to the rest before.
 *
 * A barrier covers what was logged when it began, and is logged when it
 * ends, with a moment in between for other threads.
 *
 * After a crash at a point of the log the disk has all that the last
 * barrier before that point covers.  Of what was logged since any subset
 * of sectors may be there; in the order of the log, since a sector that
 * was written twice is old, or in between, or new.  Changes of the size
 * do not overtake each other, and what was written beyond an end that
 * was not made durable is not there.
 */

#include <config.h>

#include <errno.h>
#include <pthread.h>
#include <sched.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stdlib.h>
#include <string.h>

#include <cmocka.h>

#include "common/bytes.h"
#include "common/cleanup.h"
#include "container/container.h"
#include "crash-container.h"
#include "image.h"

#define SECTOR 512

enum entry_type { NOTE, WRITE, ZERO, RESIZE, BARRIER };

struct entry {
  enum entry_type type;
  uint64_t offset, count;       /* whole sectors */
  uint8_t *data;                /* of a WRITE */
  uint64_t size, old_size;      /* of a RESIZE */
  size_t covers;                /* of a BARRIER */
};

struct crash_log {
  pthread_mutex_t lock;         /* protects what follows */
  struct entry *entries;
  size_t nr, max;
  struct crash_image base, live;
  uint64_t limit, seed;
  unsigned one_in;
};

struct logged {
  struct container c;
  struct crash_log *log;
};

struct crash_image
crash_image_new (uint64_t room)
{
  struct crash_image image = { .bytes = calloc (1, room), .room = room };

  assert_non_null (image.bytes);
  return image;
}

void
crash_image_free (struct crash_image *image)
{
  free (image->bytes);
  image->bytes = NULL;
}

/* Change the size: what is beyond it is zero. */
static void
resize (struct crash_image *image, uint64_t size)
{
  if (size < image->size)
    memset (image->bytes + size, 0, image->size - size);
  image->size = size;
}

void
crash_image_copy (struct crash_image *to, const struct crash_image *from)
{
  resize (to, from->size);
  memcpy (to->bytes, from->bytes, from->size);
}

struct crash_log *
crash_log_new (const struct crash_image *base, uint64_t seed)
{
  struct crash_log *log = calloc (1, sizeof *log);

  assert_non_null (log);
  pthread_mutex_init (&log->lock, NULL);
  log->base = crash_image_new (base->room);
  log->live = crash_image_new (base->room);
  crash_image_copy (&log->base, base);
  crash_image_copy (&log->live, base);
  log->limit = base->room;
  log->seed = seed;
  return log;
}

void
crash_log_free (struct crash_log *log)
{
  for (size_t i = 0; i < log->nr; ++i)
    free (log->entries[i].data);
  free (log->entries);
  crash_image_free (&log->base);
  crash_image_free (&log->live);
  pthread_mutex_destroy (&log->lock);
  free (log);
}

/* With the lock held. */
static struct entry *
add_entry (struct crash_log *log, enum entry_type type)
{
  if (log->nr == log->max) {
    log->max = log->max * 2 + 1024;
    log->entries = realloc (log->entries, log->max * sizeof log->entries[0]);
    assert_non_null (log->entries);
  }
  struct entry *e = &log->entries[log->nr++];

  *e = (struct entry) { .type = type };
  return e;
}

size_t
crash_log_length (struct crash_log *log)
{
  ACQUIRE_LOCK_FOR_CURRENT_SCOPE (&log->lock);
  return log->nr;
}

size_t
crash_log_note (struct crash_log *log)
{
  ACQUIRE_LOCK_FOR_CURRENT_SCOPE (&log->lock);
  add_entry (log, NOTE);
  return log->nr - 1;
}

size_t
crash_log_next_barrier (struct crash_log *log, size_t point)
{
  ACQUIRE_LOCK_FOR_CURRENT_SCOPE (&log->lock);
  while (point < log->nr && log->entries[point].type != BARRIER)
    point++;
  return point;
}

void
crash_log_set_faults (struct crash_log *log, unsigned one_in)
{
  ACQUIRE_LOCK_FOR_CURRENT_SCOPE (&log->lock);
  log->one_in = one_in;
}

void
crash_log_set_limit (struct crash_log *log, uint64_t limit)
{
  ACQUIRE_LOCK_FOR_CURRENT_SCOPE (&log->lock);
  log->limit = min_u64 (limit, log->live.room);
}

const struct crash_image *
crash_log_live (const struct crash_log *log)
{
  return &log->live;
}

/* With the lock held: shall this operation fail? */
static bool
fails (struct crash_log *log)
{
  return log->one_in != 0 && random_next (&log->seed) % log->one_in == 0;
}

/* What is done of an operation that fails: whole sectors. */
static uint64_t
part_of (struct crash_log *log, uint64_t count, uint64_t offset)
{
  uint64_t end;

  switch (random_next (&log->seed) % 3) {
  case 0: return 0;
  case 1: return count;
  default:
    end = round_down (offset + random_next (&log->seed) % (count + 1), SECTOR);
    return end < offset ? 0 : end - offset;
  }
}

static int
logged_pread (struct container *c, void *buf, size_t count, uint64_t offset)
{
  struct crash_log *log = ((struct logged *) c)->log;

  ACQUIRE_LOCK_FOR_CURRENT_SCOPE (&log->lock);
  memcpy (buf, log->live.bytes + offset, count);
  return 0;
}

/* Log the sectors of a range that has been changed. */
static void
log_sectors (struct crash_log *log, uint64_t offset, uint64_t count)
{
  struct entry *e = add_entry (log, WRITE);

  e->offset = round_down (offset, SECTOR);
  e->count = min_u64 (round_up (offset + count, SECTOR), log->live.room)
    - e->offset;
  e->data = malloc (e->count);
  assert_non_null (e->data);
  memcpy (e->data, log->live.bytes + e->offset, e->count);
}

static int
logged_pwrite (struct container *c, const void *buf, size_t count,
               uint64_t offset)
{
  struct crash_log *log = ((struct logged *) c)->log;

  ACQUIRE_LOCK_FOR_CURRENT_SCOPE (&log->lock);
  const bool fail = fails (log);

  if (fail)
    count = part_of (log, count, offset);
  if (count > 0) {
    memcpy (log->live.bytes + offset, buf, count);
    log_sectors (log, offset, count);
  }
  errno = EIO;
  return fail ? -1 : 0;
}

static int
logged_zero (struct container *c, uint64_t count, uint64_t offset, bool punch)
{
  struct crash_log *log = ((struct logged *) c)->log;

  (void) punch;
  ACQUIRE_LOCK_FOR_CURRENT_SCOPE (&log->lock);
  const bool fail = fails (log);

  if (fail)
    count = part_of (log, count, offset);
  memset (log->live.bytes + offset, 0, count);
  if (count > 0 && (offset | count) % SECTOR == 0) {
    struct entry *e = add_entry (log, ZERO);

    e->offset = offset;
    e->count = count;
  }
  else if (count > 0)
    log_sectors (log, offset, count);
  errno = EIO;
  return fail ? -1 : 0;
}

static int
logged_flush (struct container *c)
{
  struct crash_log *log = ((struct logged *) c)->log;
  const size_t covers = crash_log_length (log);

  sched_yield ();
  ACQUIRE_LOCK_FOR_CURRENT_SCOPE (&log->lock);
  if (fails (log)) {
    errno = EIO;
    return -1;
  }
  add_entry (log, BARRIER)->covers = covers;
  return 0;
}

/* With the lock held. */
static void
log_resize (struct crash_log *log, struct container *c, uint64_t size)
{
  struct entry *e = add_entry (log, RESIZE);

  e->size = size;
  e->old_size = log->live.size;
  resize (&log->live, size);
  atomic_store_explicit (&c->size, size, memory_order_release);
}

static int
logged_grow (struct container *c, uint64_t size)
{
  struct crash_log *log = ((struct logged *) c)->log;

  ACQUIRE_LOCK_FOR_CURRENT_SCOPE (&log->lock);
  if (size > log->limit || fails (log)) {
    errno = ENOSPC;
    return -1;
  }
  /* Sometimes by more than was asked for. */
  if (random_next (&log->seed) % 2 == 0)
    size = min_u64 (log->limit,
                    size + random_next (&log->seed) % (size / 4 + 1));
  log_resize (log, c, size);
  return 0;
}

static int
logged_truncate (struct container *c, uint64_t size)
{
  struct crash_log *log = ((struct logged *) c)->log;

  ACQUIRE_LOCK_FOR_CURRENT_SCOPE (&log->lock);
  if (fails (log)) {
    errno = EIO;
    return -1;
  }
  log_resize (log, c, size);
  return 0;
}

static void
logged_close (struct container *c)
{
  free (c);
}

struct container *
crash_container_open (struct crash_log *log)
{
  static const struct container_ops ops = {
    .pread = logged_pread, .pwrite = logged_pwrite, .zero = logged_zero,
    .flush = logged_flush, .grow = logged_grow, .truncate = logged_truncate,
    .close = logged_close,
  };
  struct logged *l = calloc (1, sizeof *l);

  assert_non_null (l);
  container_init (&l->c, &ops, log->live.size, false);
  l->log = log;
  return &l->c;
}

struct crash_replay {
  struct crash_log *log;
  size_t point;                 /* where the crash is */
  size_t covered;               /* entries that are durable by then */
  struct crash_image durable;
};

struct crash_replay *
crash_replay_new (struct crash_log *log)
{
  struct crash_replay *r = calloc (1, sizeof *r);

  assert_non_null (r);
  r->log = log;
  r->durable = crash_image_new (log->base.room);
  crash_image_copy (&r->durable, &log->base);
  return r;
}

void
crash_replay_free (struct crash_replay *r)
{
  crash_image_free (&r->durable);
  free (r);
}

/* Do [from, from + count) of an entry that writes. */
static void
apply (struct crash_image *image, const struct entry *e, uint64_t from,
       uint64_t count)
{
  const uint64_t offset = e->offset + from;

  if (offset >= image->size)
    return;
  count = min_u64 (count, image->size - offset);
  if (e->type == WRITE)
    memcpy (image->bytes + offset, e->data + from, count);
  else
    memset (image->bytes + offset, 0, count);
}

static void
apply_whole (struct crash_image *image, const struct entry *e)
{
  if (e->type == WRITE || e->type == ZERO)
    apply (image, e, 0, e->count);
  else if (e->type == RESIZE)
    resize (image, e->size);
}

void
crash_replay_advance (struct crash_replay *r, size_t point)
{
  size_t covered = r->covered;

  assert_true (point >= r->point && point <= r->log->nr);
  for (size_t i = r->point; i < point; ++i)
    if (r->log->entries[i].type == BARRIER &&
        r->log->entries[i].covers > covered)
      covered = r->log->entries[i].covers;
  for (; r->covered < covered; ++r->covered)
    apply_whole (&r->durable, &r->log->entries[r->covered]);
  r->point = point;
}

void
crash_replay_kill (const struct crash_replay *r, struct crash_image *image)
{
  crash_image_copy (image, &r->durable);
  for (size_t i = r->covered; i < r->point; ++i)
    apply_whole (image, &r->log->entries[i]);
}

/* The ways in which chance may choose. */
enum lottery {
  EACH_ENTRY,                   /* with some probability */
  EACH_SECTOR,
  ALL_BUT_ONE,
  ONLY_ONE,
  ONLY_LATE,                    /* from some entry on */
  ALL_BUT_SOME_PLACE,           /* a place of the disk */
  ONLY_SOME_PLACE,
  NR_LOTTERIES,
};

struct draw {
  enum lottery lottery;
  unsigned eighths;             /* the probability */
  size_t entry;                 /* the one in question */
  bool torn;
  uint64_t from, to;            /* the place in question */
};

static bool
entry_has_luck (const struct draw *d, size_t i, const struct entry *e,
                uint64_t *seed)
{
  const bool in_place = e->offset < d->to && d->from < e->offset + e->count;

  switch (d->lottery) {
  case EACH_ENTRY: return random_next (seed) % 8 < d->eighths;
  case ALL_BUT_ONE: return i != d->entry;
  case ONLY_ONE: return i == d->entry;
  case ONLY_LATE: return i >= d->entry;
  case ALL_BUT_SOME_PLACE: return !in_place;
  case ONLY_SOME_PLACE: return in_place;
  default: return true;
  }
}

static void
apply_by_chance (struct crash_image *image, const struct draw *d, size_t i,
                 const struct entry *e, uint64_t floor, uint64_t *seed)
{
  const uint64_t count =
    e->offset >= floor ? 0 : min_u64 (e->count, floor - e->offset);

  /* The one in question may be torn in any case. */
  if (d->lottery != EACH_SECTOR && (i != d->entry || !d->torn)) {
    if (entry_has_luck (d, i, e, seed))
      apply (image, e, 0, count);
    return;
  }
  for (uint64_t at = 0; at < count; at += SECTOR)
    if (random_next (seed) % 8 < d->eighths)
      apply (image, e, at, min_u64 (SECTOR, count - at));
}

void
crash_replay_state (const struct crash_replay *r, struct crash_image *image,
                    uint64_t *seed)
{
  const size_t pending = r->point - r->covered;
  const size_t chosen = r->covered
    + (pending == 0 ? 0 : random_next (seed) % pending);
  struct draw d = {
    .lottery = random_next (seed) % NR_LOTTERIES,
    .eighths = random_next (seed) % 9,
    .entry = chosen,
    .torn = random_next (seed) % 4 == 0,
  };
  bool sizes = true;            /* are durable so far */
  uint64_t floor = UINT64_MAX;  /* nothing was written from here on */

  if (pending > 0) {
    d.from = r->log->entries[chosen].offset;
    d.to = d.from + r->log->entries[chosen].count
      + (random_next (seed) % 4 << 12);
  }
  crash_image_copy (image, &r->durable);
  for (size_t i = r->covered; i < r->point; ++i) {
    const struct entry *e = &r->log->entries[i];

    if (e->type == WRITE || e->type == ZERO)
      apply_by_chance (image, &d, i, e, floor, seed);
    else if (e->type == RESIZE) {
      sizes = sizes && random_next (seed) % 4 != 0;
      if (sizes)
        resize (image, e->size);
      else
        floor = min_u64 (floor, min_u64 (e->size, e->old_size));
    }
  }
}
