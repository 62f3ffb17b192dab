/* nbdkit-dirty-bitmap-filter
 * SPDX-License-Identifier: BSD-3-Clause
 * Copyright the nbdkit-dirty-bitmap-filter authors
 */

#include <config.h>

#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <time.h>

#include "common/bytes.h"
#include "common/cleanup.h"
#include "fake-disk.h"

/* The data of a disk that is larger than this cannot be read or written
 * behind it: the tools that watch programs do not map as much as the
 * kernel would, and a pointer of 32 bits does not reach as far.
 */
#define MOST_MAPPED min_u64 (UINT64_C (16) << 30, SIZE_MAX / 8 + 1)

static size_t
mapped (const struct disk *d)
{
  return min_u64 (d->size, MOST_MAPPED);
}

struct disk *
fake_disk_new (uint64_t size)
{
  struct disk *d = calloc (1, sizeof *d);

  if (d == NULL)
    abort ();
  d->size = size;
  d->block_size = 65536;
  d->data = mmap (NULL, mapped (d), PROT_READ | PROT_WRITE,
                  MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (d->data == MAP_FAILED)
    abort ();
  d->bitmaps = calloc (FAKE_MAX_BITMAPS, sizeof d->bitmaps[0]);
  if (d->bitmaps == NULL)
    abort ();
  pthread_mutex_init (&d->lock, NULL);
  return d;
}

static void
view_free (struct disk_view *v)
{
  if (v->references > 0 || v->holders > 0 ||
      v->bitmap.references > 0 || v->bitmap.holders > 0)
    abort ();
  free (v->bitmap.dirty);
  fake_disk_free (v->copy);
  free (v);
}

void
fake_disk_free (struct disk *d)
{
  for (size_t i = 0; i < d->nr_views; ++i)
    view_free (d->views[i]);
  for (size_t i = 0; i < d->nr_bitmaps; ++i) {
    if (d->bitmaps[i].references > 0 || d->bitmaps[i].holders > 0)
      abort ();
    free (d->bitmaps[i].dirty);
  }
  free (d->bitmaps);
  free (d->flags);
  free (d->depths);
  munmap (d->data, mapped (d));
  pthread_mutex_destroy (&d->lock);
  free (d);
}

void
fake_disk_add_bitmap (struct disk *d, const char *name, uint64_t granularity)
{
  ACQUIRE_LOCK_FOR_CURRENT_SCOPE (&d->lock);
  struct disk_offer *b = &d->bitmaps[d->nr_bitmaps];

  if (d->nr_bitmaps++ == FAKE_MAX_BITMAPS)
    abort ();
  b->name = name;
  b->granularity = granularity;
  b->dirty = calloc (div_round_up (d->size, granularity), 1);
  if (b->dirty == NULL)
    abort ();
}

static struct disk_offer *
offered (struct disk *d, const char *name)
{
  for (size_t i = 0; i < d->nr_bitmaps; ++i)
    if (!d->bitmaps[i].removed && strcmp (d->bitmaps[i].name, name) == 0)
      return &d->bitmaps[i];
  abort ();
}

void
fake_disk_remove_bitmap (struct disk *d, const char *name)
{
  ACQUIRE_LOCK_FOR_CURRENT_SCOPE (&d->lock);
  struct disk_offer *b = offered (d, name);

  b->removed = true;
  b->cut = true;
}

static void *
copy_of (const void *p, size_t size)
{
  void *copy = malloc (size);

  if (copy == NULL)
    abort ();
  return memcpy (copy, p, size);
}

struct disk_view *
fake_disk_begin_view (struct disk *d, const char *bitmap)
{
  ACQUIRE_LOCK_FOR_CURRENT_SCOPE (&d->lock);
  const struct disk_offer *b = offered (d, bitmap);
  struct disk_view *v = calloc (1, sizeof *v);

  if (v == NULL || d->nr_views == FAKE_MAX_VIEWS)
    abort ();
  snprintf (v->name, sizeof v->name, "%s", bitmap);
  v->copy = fake_disk_new (d->size);
  v->copy->block_size = d->block_size;
  memcpy (v->copy->data, d->data, mapped (d));
  if (d->flags != NULL)
    v->copy->flags = copy_of (d->flags, div_round_up (d->size, d->block_size));
  v->bitmap.name = v->name;
  v->bitmap.granularity = b->granularity;
  v->bitmap.dirty = copy_of (b->dirty, div_round_up (d->size, b->granularity));
  d->views[d->nr_views++] = v;
  return v;
}

void
fake_disk_end_view (struct disk *d, struct disk_view *v)
{
  ACQUIRE_LOCK_FOR_CURRENT_SCOPE (&d->lock);
  v->ended = true;
  v->broken = true;
  v->bitmap.cut = true;
}

void
fake_disk_break_view (struct disk_view *v)
{
  v->broken = true;
}

uint64_t
disk_size (const struct disk *d)
{
  return d->size;
}

bool
disk_is_readonly (const struct disk *d)
{
  return d->readonly;
}

uint32_t
disk_preferred_block_size (const struct disk *d)
{
  return d->block_size;
}

bool
disk_is_beside (const struct disk *d)
{
  (void) d;
  return false;
}

struct disk_abilities
disk_can (const struct disk *d)
{
  (void) d;
  return (struct disk_abilities) {
    .zero = true, .zero_fast = true, .trim = true, .cache = true,
    .flush = true,
  };
}

/* For delta.c. */
int
disk_check_range (const struct disk *d, uint64_t count, uint64_t offset)
{
  if (!range_exceeds (offset, count, d->size))
    return 0;
  errno = EINVAL;
  return -1;
}

int
disk_check_extent (const struct disk *d, uint64_t offset, uint64_t limit)
{
  if (limit > offset)
    return disk_check_range (d, limit - offset, offset);
  errno = EINVAL;
  return -1;
}

/* What every operation begins and ends with. */
static int
begin (struct disk *d, enum fake_op op, uint64_t offset, uint64_t count)
{
  int err = 0;

  {
    ACQUIRE_LOCK_FOR_CURRENT_SCOPE (&d->lock);
    d->calls[op]++;
    if (++d->under_way > d->most_under_way)
      d->most_under_way = d->under_way;
  }
  if (range_exceeds (offset, count, d->size))
    err = EINVAL;
  else if (d->hook != NULL)
    err = d->hook (d, op, offset, count);
  pthread_mutex_lock (&d->lock);
  d->under_way--;
  if (err == 0)
    return 0;
  pthread_mutex_unlock (&d->lock);
  errno = err;
  return -1;
}

static int
end (struct disk *d)
{
  pthread_mutex_unlock (&d->lock);
  return 0;
}

int
disk_read (struct disk *d, void *buf, uint32_t count, uint64_t offset)
{
  if (begin (d, FAKE_READ, offset, count) == -1)
    return -1;
  memcpy (buf, d->data + offset, count);
  return end (d);
}

/* How many bytes of [at, end) from at on are zero, or are not. */
static uint64_t
run_of (const struct disk *d, uint64_t at, uint64_t end, bool zero)
{
  const uint64_t begin = at;

  while (at < end) {
    const uint64_t block = at / d->block_size;

    if ((d->flags != NULL &&
         (d->flags[block] & DISK_EXTENT_ZERO) != 0) != zero)
      break;
    at = min_u64 ((block + 1) * d->block_size, end);
  }
  return at - begin;
}

/* The data of a piece end where a hole begins. */
static uint64_t
data_length (const struct disk *d, uint64_t offset,
             const struct qcow2_chunk *c)
{
  const uint64_t end = offset + c->count;
  uint64_t at = offset;

  while (at < end) {
    const uint64_t zeroes = run_of (d, at, end, true);

    if (at > offset && zeroes >= c->min_hole)
      break;
    at += zeroes;
    at += run_of (d, at, end, false);
  }
  return at - offset;
}

int
disk_read_chunk (struct disk *d, uint64_t offset, struct qcow2_chunk *c)
{
  const uint64_t zeroes = run_of (d, offset, offset + c->limit, true);

  if (c->count == 0 || c->count > c->limit ||
      range_exceeds (offset, c->limit, d->size))
    abort ();
  c->is_hole = zeroes >= c->min_hole || zeroes == c->limit;
  c->length = c->is_hole ? zeroes : 0;
  if (c->is_hole || c->buf == NULL)
    return 0;
  c->length = data_length (d, offset, c);
  if (begin (d, FAKE_READ, offset, c->length) == -1)
    return -1;
  for (uint64_t n, at = 0; at < c->length; at += n) {
    const bool zero = run_of (d, offset + at, offset + c->length, true) > 0;

    n = run_of (d, offset + at, offset + c->length, zero);
    if (zero)
      memset ((uint8_t *) c->buf + at, 0, n);
    else
      memcpy ((uint8_t *) c->buf + at, d->data + offset + at, n);
  }
  return end (d);
}

int
disk_write (struct disk *d, const void *buf, uint32_t count,
            uint64_t offset, bool fua)
{
  if (begin (d, FAKE_WRITE, offset, count) == -1)
    return -1;
  memcpy (d->data + offset, buf, count);
  d->last_fua = fua;
  return end (d);
}

/* Pages are given back, so that a large disk may be cleared. */
static void
clear (struct disk *d, uint64_t count, uint64_t offset)
{
  const uint64_t page = 4096, end = min_u64 (offset + count, mapped (d));
  const uint64_t from = round_up (offset, page), to = round_down (end, page);

  if (from >= to) {
    if (offset < end)
      memset (d->data + offset, 0, end - offset);
    return;
  }
  memset (d->data + offset, 0, from - offset);
  memset (d->data + to, 0, end - to);
  if (madvise (d->data + from, to - from, MADV_DONTNEED) == -1)
    memset (d->data + from, 0, to - from);
}

int
disk_zero (struct disk *d, uint64_t count, uint64_t offset,
           bool no_hole, bool fast, bool fua)
{
  if (begin (d, FAKE_ZERO, offset, count) == -1)
    return -1;
  clear (d, count, offset);
  d->last_fua = fua;
  d->last_no_hole = no_hole;
  d->last_fast = fast;
  return end (d);
}

int
disk_trim (struct disk *d, uint64_t count, uint64_t offset, bool fua)
{
  if (begin (d, FAKE_TRIM, offset, count) == -1)
    return -1;
  clear (d, count, offset);
  d->last_fua = fua;
  return end (d);
}

void
disk_client_begin (struct disk *d, struct disk_client *client)
{
  ACQUIRE_LOCK_FOR_CURRENT_SCOPE (&d->lock);
  atomic_store (&client->told, d->told);
}

int
disk_flush (struct disk *d, struct disk_client *client)
{
  if (begin (d, FAKE_FLUSH, 0, 0) == -1)
    return -1;
  const bool is_told = atomic_exchange (&client->told, d->lost) == d->lost;

  end (d);
  errno = EIO;
  return is_told ? 0 : -1;
}

int
disk_cache (struct disk *d, uint64_t count, uint64_t offset)
{
  return begin (d, FAKE_CACHE, offset, count) == -1 ? -1 : end (d);
}

/* Ends at each block, so as to show that callers merge. */
int
disk_extent (struct disk *d, uint64_t offset, uint64_t limit,
             uint64_t *length, uint32_t *flags)
{
  if (begin (d, FAKE_EXTENT, offset, 0) == -1)
    return -1;
  *length = min_u64 (d->block_size - offset % d->block_size, limit - offset);
  *flags = d->flags == NULL ? 0 : d->flags[offset / d->block_size];
  return end (d);
}

int
disk_extent_depth (struct disk *d, uint64_t offset, uint64_t limit,
                   uint64_t *length, uint32_t *depth)
{
  if (begin (d, FAKE_DEPTH, offset, 0) == -1)
    return -1;
  *length = min_u64 (d->block_size - offset % d->block_size, limit - offset);
  *depth = d->depths == NULL ? 1 : d->depths[offset / d->block_size];
  return end (d);
}

void
disk_hurry (struct disk *d, unsigned grace_ms)
{
  ACQUIRE_LOCK_FOR_CURRENT_SCOPE (&d->lock);
  d->hurried = true;
  d->hurry_ms = grace_ms;
}

struct disk_offers {
  atomic_ulong references;
  size_t nr;
  struct disk_offer *offers[];
};

struct disk_offer *
disk_offer_get (struct disk_offer *o)
{
  atomic_fetch_add (&o->references, 1);
  return o;
}

void
disk_offer_put (struct disk_offer *o)
{
  if (o != NULL && atomic_fetch_sub (&o->references, 1) == 0)
    abort ();
}

/* A list of its own for each caller. */
struct disk_offers *
disk_offers_get (const struct disk *d)
{
  ACQUIRE_LOCK_FOR_CURRENT_SCOPE ((pthread_mutex_t *) &d->lock);
  struct disk_offers *list =
    malloc (sizeof *list + d->nr_bitmaps * sizeof list->offers[0]);

  if (list == NULL)
    abort ();
  list->references = 1;
  list->nr = 0;
  for (size_t i = 0; i < d->nr_bitmaps; ++i)
    if (!d->bitmaps[i].removed)
      list->offers[list->nr++] = disk_offer_get (&d->bitmaps[i]);
  return list;
}

void
disk_offers_put (struct disk_offers *list)
{
  if (list == NULL || atomic_fetch_sub (&list->references, 1) > 1)
    return;
  for (size_t i = 0; i < list->nr; ++i)
    disk_offer_put (list->offers[i]);
  free (list);
}

size_t
disk_offers_nr (const struct disk_offers *list)
{
  return list->nr;
}

struct disk_offer *
disk_offers_at (const struct disk_offers *list, size_t i)
{
  return list->offers[i];
}

bool
disk_offers_find (const struct disk_offers *list, const char *name,
                  size_t length, size_t *i)
{
  for (*i = 0; *i < list->nr; ++*i)
    if (strlen (list->offers[*i]->name) == length &&
        memcmp (list->offers[*i]->name, name, length) == 0)
      return true;
  return false;
}

/* What a read of a view has come to. */
static int
unless_broken (const struct disk_view *v, int r)
{
  if (!v->broken)
    return r;
  errno = EIO;
  return -1;
}

struct disk_view *
disk_find_view (const struct disk *d, const char *name, size_t length)
{
  ACQUIRE_LOCK_FOR_CURRENT_SCOPE ((pthread_mutex_t *) &d->lock);
  for (size_t i = 0; i < d->nr_views; ++i)
    if (!d->views[i]->ended && strlen (d->views[i]->name) == length &&
        memcmp (d->views[i]->name, name, length) == 0)
      return disk_view_get (d->views[i]);
  return NULL;
}

struct disk_view *
disk_view_get (struct disk_view *v)
{
  atomic_fetch_add (&v->references, 1);
  return v;
}

void
disk_view_put (struct disk_view *v)
{
  if (v != NULL && atomic_fetch_sub (&v->references, 1) == 0)
    abort ();
}

bool
disk_view_is_dirty_only (const struct disk_view *v)
{
  (void) v;
  return false;
}

const char *
disk_view_name (const struct disk_view *v)
{
  return v->name;
}

struct disk_offers *
disk_view_offers (const struct disk_view *v)
{
  struct disk_offers *list =
    malloc (sizeof *list + sizeof list->offers[0]);

  if (list == NULL)
    abort ();
  list->references = 1;
  list->nr = 1;
  list->offers[0] = disk_offer_get ((struct disk_offer *) &v->bitmap);
  return list;
}

void
disk_view_hold (struct disk_view *v)
{
  if (v->references == 0)
    abort ();
  atomic_fetch_add (&v->holders, 1);
}

void
disk_view_release (struct disk_view *v)
{
  if (v->references == 0 || atomic_fetch_sub (&v->holders, 1) == 0)
    abort ();
}

int
disk_view_read (struct disk_view *v, void *buf, uint32_t count,
                uint64_t offset)
{
  return unless_broken (v, disk_read (v->copy, buf, count, offset));
}

int
disk_view_read_chunk (struct disk_view *v, uint64_t offset,
                      struct qcow2_chunk *c)
{
  return unless_broken (v, disk_read_chunk (v->copy, offset, c));
}

int
disk_view_extent (struct disk_view *v, uint64_t offset, uint64_t limit,
                  uint64_t *length, uint32_t *flags)
{
  return unless_broken (v, disk_extent (v->copy, offset, limit, length,
                                        flags));
}

/* A caller that waits for a client in fn, or keeps the string, fails. */
void
disk_list_views (const struct disk *d,
                 void (*fn) (const struct disk_view_state *, void *opaque),
                 void *opaque)
{
  ACQUIRE_LOCK_FOR_CURRENT_SCOPE ((pthread_mutex_t *) &d->lock);
  for (size_t i = 0; i < d->nr_views; ++i) {
    const struct disk_view *v = d->views[i];
    char name[sizeof v->name];

    if (v->ended)
      continue;
    strcpy (name, v->name);
    fn (&(const struct disk_view_state) {
          .name = name,
          .clients = v->holders,
          .broken = v->broken ? "it was broken" : NULL,
        }, opaque);
    memset (name, 'x', sizeof name - 1);
  }
}

struct disk_offer *
disk_find_offer (const struct disk *d, const char *name, size_t length)
{
  struct disk_offers *list = disk_offers_get (d);
  size_t i;
  struct disk_offer *o = disk_offers_find (list, name, length, &i)
    ? disk_offer_get (list->offers[i]) : NULL;

  disk_offers_put (list);
  return o;
}

const char *
disk_bitmap_name (const struct disk_offer *o)
{
  return o->name;
}

void
disk_bitmap_hold (struct disk_offer *o)
{
  if (o->references == 0)
    abort ();
  atomic_fetch_add (&o->holders, 1);
}

void
disk_bitmap_release (struct disk_offer *o)
{
  if (o->references == 0 || atomic_fetch_sub (&o->holders, 1) == 0)
    abort ();
}

uint64_t
disk_bitmap_granularity (const struct disk_offer *o)
{
  return o->granularity;
}

size_t
disk_bitmap_runs (const struct disk_offer *b, uint64_t offset,
                  uint64_t limit, uint64_t *ends, size_t max, bool *dirty)
{
  uint64_t granule = offset / b->granularity;
  size_t n = 0;

  if (b->cut) {
    errno = EIO;
    return 0;
  }
  *dirty = b->dirty[granule];
  do {
    uint64_t next = granule + 1;

    while (next * b->granularity < limit &&
           b->dirty[next] == b->dirty[granule])
      next++;
    ends[n++] = min_u64 (next * b->granularity, limit);
    granule = next;
  } while (n < max && granule * b->granularity < limit);
  return n;
}

/* Protects what follows. */
static pthread_mutex_t gate_lock = PTHREAD_MUTEX_INITIALIZER;
static pthread_cond_t gate_changed = PTHREAD_COND_INITIALIZER;
static bool gate_is_open;
static unsigned gate_waiting;
static uint64_t gate_offset;
static enum fake_op gate_op;

static int
wait_at_gate (struct disk *d, enum fake_op op,
              uint64_t offset, uint64_t count)
{
  (void) d;
  (void) count;
  ACQUIRE_LOCK_FOR_CURRENT_SCOPE (&gate_lock);
  if (op != gate_op || offset != gate_offset)
    return 0;
  gate_waiting++;
  pthread_cond_broadcast (&gate_changed);
  while (!gate_is_open)
    pthread_cond_wait (&gate_changed, &gate_lock);
  return 0;
}

void
gate_close (struct disk *d, enum fake_op op, uint64_t offset)
{
  ACQUIRE_LOCK_FOR_CURRENT_SCOPE (&gate_lock);
  gate_op = op;
  gate_offset = offset;
  gate_is_open = false;
  gate_waiting = 0;
  d->hook = wait_at_gate;
}

void
gate_open (void)
{
  ACQUIRE_LOCK_FOR_CURRENT_SCOPE (&gate_lock);
  gate_is_open = true;
  pthread_cond_broadcast (&gate_changed);
}

void
gate_wait (void)
{
  ACQUIRE_LOCK_FOR_CURRENT_SCOPE (&gate_lock);
  while (gate_waiting == 0)
    pthread_cond_wait (&gate_changed, &gate_lock);
}

void
sleep_ms (unsigned ms)
{
  const struct timespec ts = {
    .tv_sec = ms / 1000,
    .tv_nsec = (ms % 1000) * 1000000L,
  };

  nanosleep (&ts, NULL);
}

int
hook_sleep (struct disk *d, enum fake_op op, uint64_t offset, uint64_t count)
{
  (void) op;
  (void) offset;
  (void) count;
  sleep_ms (*(unsigned *) d->opaque);
  return 0;
}
