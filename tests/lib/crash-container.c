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
 *
 * An external data file, or a disk beside the image, has its entries in the
 * same log, for the sake of the order between the two, but barriers of its
 * own, and its size.  The disk's never changes.
 */

#include <config.h>

#include <assert.h>
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

enum file { IMAGE, DATA_FILE, NR_FILES };

struct entry {
  enum entry_type type;
  enum file file;               /* IMAGE of a NOTE */
  uint64_t offset, count;       /* whole sectors */
  uint8_t *data;                /* of a WRITE */
  size_t durable_at;            /* of a WRITE: it is durable once the log is
                                   longer than this; else SIZE_MAX */
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
  enum file file;
  struct crash_image *live;     /* in the log */
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
  if (image->data != NULL)
    crash_image_free (image->data);
  free (image->data);
  image->data = NULL;
}

static struct crash_image *
file_of (struct crash_image *image, enum file file)
{
  return file == IMAGE ? image : image->data;
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
  to->backing = from->backing;
  to->beside = from->beside;
  to->damaged = from->damaged;
  if (from->data == NULL)
    return;
  if (to->data == NULL) {
    to->data = malloc (sizeof *to->data);
    assert_non_null (to->data);
    *to->data = crash_image_new (from->data->room);
  }
  crash_image_copy (to->data, from->data);
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
add_entry (struct crash_log *log, enum file file, enum entry_type type)
{
  if (log->nr == log->max) {
    log->max = log->max * 2 + 1024;
    log->entries = realloc (log->entries, log->max * sizeof log->entries[0]);
    assert_non_null (log->entries);
  }
  struct entry *e = &log->entries[log->nr++];

  *e = (struct entry) { .type = type, .file = file,
                        .durable_at = SIZE_MAX };
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
  add_entry (log, IMAGE, NOTE);
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
  const struct logged *l = (struct logged *) c;

  ACQUIRE_LOCK_FOR_CURRENT_SCOPE (&l->log->lock);
  memcpy (buf, l->live->bytes + offset, count);
  return 0;
}

/* Log the sectors of a range that has been changed. */
static void
log_sectors (const struct logged *l, uint64_t offset, uint64_t count)
{
  struct entry *e = add_entry (l->log, l->file, WRITE);

  e->offset = round_down (offset, SECTOR);
  e->count = min_u64 (round_up (offset + count, SECTOR), l->live->room)
    - e->offset;
  e->data = malloc (e->count);
  assert_non_null (e->data);
  memcpy (e->data, l->live->bytes + e->offset, e->count);
}

static int
logged_pwrite (struct container *c, const void *buf, size_t count,
               uint64_t offset)
{
  const struct logged *l = (struct logged *) c;
  struct crash_log *log = l->log;

  ACQUIRE_LOCK_FOR_CURRENT_SCOPE (&log->lock);
  const bool fail = fails (log);

  if (fail)
    count = part_of (log, count, offset);
  if (count > 0) {
    memcpy (l->live->bytes + offset, buf, count);
    log_sectors (l, offset, count);
  }
  errno = EIO;
  return fail ? -1 : 0;
}

/* Half of them are left to a write and a flush. */
static int
logged_pwrite_durable (struct container *c, const void *buf, size_t count,
                       uint64_t offset)
{
  const struct logged *l = (struct logged *) c;
  struct crash_log *log = l->log;
  size_t written;

  {
    ACQUIRE_LOCK_FOR_CURRENT_SCOPE (&log->lock);
    if (random_next (&log->seed) % 2 == 0)
      return 1;
    if (fails (log)) {
      errno = EIO;
      return -1;
    }
    memcpy (l->live->bytes + offset, buf, count);
    written = log->nr;
    log_sectors (l, offset, count);
  }
  sched_yield ();
  ACQUIRE_LOCK_FOR_CURRENT_SCOPE (&log->lock);
  if (fails (log)) {
    errno = EIO;
    return -1;
  }
  log->entries[written].durable_at = log->nr;
  return 0;
}

static int
logged_zero (struct container *c, uint64_t count, uint64_t offset, bool punch)
{
  const struct logged *l = (struct logged *) c;
  struct crash_log *log = l->log;

  (void) punch;
  ACQUIRE_LOCK_FOR_CURRENT_SCOPE (&log->lock);
  const bool fail = fails (log);

  if (fail)
    count = part_of (log, count, offset);
  memset (l->live->bytes + offset, 0, count);
  if (count > 0 && (offset | count) % SECTOR == 0) {
    struct entry *e = add_entry (log, l->file, ZERO);

    e->offset = offset;
    e->count = count;
  }
  else if (count > 0)
    log_sectors (l, offset, count);
  errno = EIO;
  return fail ? -1 : 0;
}

/* Half of them would be no faster than to write. */
static int
logged_zero_fast (struct container *c, uint64_t count, uint64_t offset,
                  bool punch)
{
  struct crash_log *log = ((struct logged *) c)->log;

  {
    ACQUIRE_LOCK_FOR_CURRENT_SCOPE (&log->lock);
    if (random_next (&log->seed) % 2 == 0)
      return 1;
  }
  return logged_zero (c, count, offset, punch);
}

static int
logged_flush (struct container *c)
{
  const struct logged *l = (struct logged *) c;
  struct crash_log *log = l->log;
  const size_t covers = crash_log_length (log);

  sched_yield ();
  ACQUIRE_LOCK_FOR_CURRENT_SCOPE (&log->lock);
  if (fails (log)) {
    errno = EIO;
    return -1;
  }
  add_entry (log, l->file, BARRIER)->covers = covers;
  return 0;
}

/* With the lock held. */
static void
log_resize (struct logged *l, uint64_t size)
{
  struct entry *e = add_entry (l->log, l->file, RESIZE);

  assert (l->file == IMAGE || !l->log->live.beside);
  e->size = size;
  e->old_size = l->live->size;
  resize (l->live, size);
  atomic_store_explicit (&l->c.size, size, memory_order_release);
}

static int
logged_grow (struct container *c, uint64_t size)
{
  struct logged *l = (struct logged *) c;
  struct crash_log *log = l->log;

  ACQUIRE_LOCK_FOR_CURRENT_SCOPE (&log->lock);
  const uint64_t limit = l->file == IMAGE ? log->limit : l->live->room;

  if (size > limit || fails (log)) {
    errno = ENOSPC;
    return -1;
  }
  /* Sometimes by more than was asked for. */
  if (random_next (&log->seed) % 2 == 0)
    size = min_u64 (limit,
                    size + random_next (&log->seed) % (size / 4 + 1));
  log_resize (l, size);
  return 0;
}

static int
logged_truncate (struct container *c, uint64_t size)
{
  struct logged *l = (struct logged *) c;
  struct crash_log *log = l->log;

  ACQUIRE_LOCK_FOR_CURRENT_SCOPE (&log->lock);
  if (fails (log)) {
    errno = EIO;
    return -1;
  }
  log_resize (l, size);
  return 0;
}

static void
logged_close (struct container *c)
{
  free (c);
}

static struct container *
open_logged (struct crash_log *log, enum file file)
{
  static const struct container_ops ops = {
    .pread = logged_pread, .pwrite = logged_pwrite,
    .pwrite_durable = logged_pwrite_durable, .zero = logged_zero,
    .zero_fast = logged_zero_fast, .flush = logged_flush,
    .grow = logged_grow, .truncate = logged_truncate, .close = logged_close,
  };
  struct logged *l = calloc (1, sizeof *l);

  assert_non_null (l);
  l->log = log;
  l->file = file;
  l->live = file_of (&log->live, file);
  container_init (&l->c, &ops, l->live->size, false);
  return &l->c;
}

struct container *
crash_container_open (struct crash_log *log)
{
  return open_logged (log, IMAGE);
}

struct container *
crash_data_open (struct crash_log *log)
{
  return log->live.data == NULL ? NULL : open_logged (log, DATA_FILE);
}

struct crash_replay {
  struct crash_log *log;
  size_t point;                 /* where the crash is */
  size_t covered[NR_FILES];     /* entries of each file before this are
                                   durable by then; SIZE_MAX without it */
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
  if (log->base.data == NULL)
    r->covered[DATA_FILE] = SIZE_MAX;
  return r;
}

/* No entry before this is pending. */
static size_t
first_pending (const struct crash_replay *r)
{
  const size_t first = min_u64 (r->covered[IMAGE], r->covered[DATA_FILE]);

  return min_u64 (first, r->point);
}

static bool
is_pending (const struct crash_replay *r, size_t i)
{
  return i >= r->covered[r->log->entries[i].file];
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
  image = file_of (image, e->file);
  if (e->type == WRITE || e->type == ZERO)
    apply (image, e, 0, e->count);
  else if (e->type == RESIZE)
    resize (image, e->size);
}

void
crash_replay_advance (struct crash_replay *r, size_t point)
{
  size_t covered[NR_FILES];

  assert_true (point >= r->point && point <= r->log->nr);
  memcpy (covered, r->covered, sizeof covered);
  for (size_t i = r->point; i < point; ++i) {
    const struct entry *e = &r->log->entries[i];

    if (e->type == BARRIER && e->covers > covered[e->file])
      covered[e->file] = e->covers;
  }
  for (unsigned file = 0; file < NR_FILES; ++file)
    for (; r->covered[file] < covered[file]; ++r->covered[file])
      if (r->log->entries[r->covered[file]].file == file)
        apply_whole (&r->durable, &r->log->entries[r->covered[file]]);
  r->point = point;
}

void
crash_replay_kill (const struct crash_replay *r, struct crash_image *image)
{
  crash_image_copy (image, &r->durable);
  for (size_t i = first_pending (r); i < r->point; ++i)
    if (is_pending (r, i))
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
  ONLY_ONE_FILE,                /* of two: the last */
  NR_LOTTERIES,
};

struct draw {
  enum lottery lottery;
  unsigned eighths;             /* the probability */
  size_t entry;                 /* the one in question */
  enum file file;               /* which it is in */
  bool torn;
  uint64_t from, to;            /* the place in question */
};

static bool
entry_has_luck (const struct draw *d, size_t i, const struct entry *e,
                uint64_t *seed)
{
  const bool in_place = e->file == d->file &&
    e->offset < d->to && d->from < e->offset + e->count;

  switch (d->lottery) {
  case EACH_ENTRY: return random_next (seed) % 8 < d->eighths;
  case ALL_BUT_ONE: return i != d->entry;
  case ONLY_ONE: return i == d->entry;
  case ONLY_LATE: return i >= d->entry;
  case ALL_BUT_SOME_PLACE: return !in_place;
  case ONLY_SOME_PLACE: return in_place;
  case ONLY_ONE_FILE: return e->file == d->file;
  default: return true;
  }
}

static void
apply_by_chance (const struct crash_replay *r, struct crash_image *image,
                 const struct draw *d, size_t i, const struct entry *e,
                 uint64_t floor, uint64_t *seed)
{
  const uint64_t count =
    e->offset >= floor ? 0 : min_u64 (e->count, floor - e->offset);

  if (r->point > e->durable_at) {
    apply (image, e, 0, count);
    return;
  }
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
  const size_t first = first_pending (r), pending = r->point - first;
  const size_t chosen = first
    + (pending == 0 ? 0 : random_next (seed) % pending);
  const unsigned nr_lotteries =
    r->durable.data != NULL ? NR_LOTTERIES : ONLY_ONE_FILE;
  struct draw d = {
    .lottery = random_next (seed) % nr_lotteries,
    .eighths = random_next (seed) % 9,
    .entry = chosen,
    .torn = random_next (seed) % 4 == 0,
  };
  /* Sizes are durable so far; nothing was written from here on. */
  bool sizes[NR_FILES] = { true, true };
  uint64_t floor[NR_FILES] = { UINT64_MAX, UINT64_MAX };

  if (pending > 0) {
    d.file = r->log->entries[chosen].file;
    d.from = r->log->entries[chosen].offset;
    d.to = d.from + r->log->entries[chosen].count
      + (random_next (seed) % 4 << 12);
  }
  crash_image_copy (image, &r->durable);
  for (size_t i = first; i < r->point; ++i) {
    const struct entry *e = &r->log->entries[i];
    const enum file f = e->file;

    if (!is_pending (r, i))
      continue;
    if (e->type == WRITE || e->type == ZERO)
      apply_by_chance (r, file_of (image, f), &d, i, e, floor[f], seed);
    else if (e->type == RESIZE) {
      sizes[f] = sizes[f] && random_next (seed) % 4 != 0;
      if (sizes[f])
        resize (file_of (image, f), e->size);
      else
        floor[f] = min_u64 (floor[f], min_u64 (e->size, e->old_size));
    }
  }
}
