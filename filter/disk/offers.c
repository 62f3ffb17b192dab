/* nbdkit-dirty-bitmap-filter
 * SPDX-License-Identifier: BSD-3-Clause
 * Copyright the nbdkit-dirty-bitmap-filter authors
 */

/* The bitmaps that clients are offered, as counted lists.
 *
 * A client that lists or looks for bitmaps takes one reference to the whole
 * list, however long it is, and may use it for as long as it likes.  A list
 * has its index by name from the beginning, so that looking a name up in
 * 65535 costs 16 comparisons.
 *
 * A list that is prepared has new offers only.  Those that are to be kept
 * take the places of new ones in offers_switch, since until then they may be
 * cut.  That only moves references, so it cannot fail.
 */

#include <config.h>

#include <assert.h>
#include <errno.h>
#include <stdlib.h>
#include <string.h>

#include "bitmap/bitmap.h"
#include "common/bytes.h"
#include "common/cleanup.h"
#include "common/report.h"
#include "disk/internal.h"

struct indexed_name {
  const char *name;             /* the bitmap's */
  size_t i;                     /* in the array of offers */
};

struct disk_offers {
  atomic_ulong references;
  size_t nr;
  struct disk_offer **offers;   /* a reference to each */
  struct indexed_name *by_name; /* sorted */
};

static void
count_up (atomic_ulong *references)
{
  const unsigned long old =
    atomic_fetch_add_explicit (references, 1, memory_order_relaxed);

  assert (old > 0);
  (void) old;
}

/* True for the last reference.  What each thread did with the object comes
 * before it is freed.
 */
static bool
count_down (atomic_ulong *references)
{
  const unsigned long old =
    atomic_fetch_sub_explicit (references, 1, memory_order_acq_rel);

  assert (old > 0);
  return old == 1;
}

static struct disk_offer *
offer_new (const struct bitmap *b, uint64_t size)
{
  struct disk_offer *o = calloc (1, sizeof *o);

  if (o == NULL)
    return NULL;
  atomic_init (&o->references, 1);
  o->bitmap = bitmap_get (b);
  o->size = size;
  return o;
}

struct disk_offer *
disk_offer_get (struct disk_offer *o)
{
  count_up (&o->references);
  return o;
}

void
disk_offer_put (struct disk_offer *o)
{
  if (o == NULL || !count_down (&o->references))
    return;
  assert (atomic_load (&o->holders) == 0);
  bitmap_put (o->bitmap);
  free (o);
}

void
disk_offers_put (struct disk_offers *list)
{
  if (list == NULL || !count_down (&list->references))
    return;
  for (size_t i = 0; i < list->nr; ++i)
    disk_offer_put (list->offers[i]);
  free (list->offers);
  free (list->by_name);
  free (list);
}

/* Names are compared as bytes, as strcmp does.  One that is looked for may
 * have NULs in it, and then there is no such bitmap.
 */
static int
compare_name (const char *name, size_t length, const char *with)
{
  const size_t with_length = strlen (with);
  const int r = memcmp (name, with, min_u64 (length, with_length));

  return r != 0 ? r : (length > with_length) - (length < with_length);
}

static int
compare_indexed (const void *a, const void *b)
{
  const struct indexed_name *x = a, *y = b;
  const int r = strcmp (x->name, y->name);

  return r != 0 ? r : (x->i > y->i) - (x->i < y->i);
}

size_t
disk_offers_nr (const struct disk_offers *list)
{
  return list->nr;
}

struct disk_offer *
disk_offers_at (const struct disk_offers *list, size_t i)
{
  assert (i < list->nr);
  return list->offers[i];
}

bool
disk_offers_find (const struct disk_offers *list, const char *name,
                  size_t length, size_t *i)
{
  size_t low = 0, high = list->nr;

  while (low < high) {
    const size_t middle = low + (high - low) / 2;
    const int r = compare_name (name, length, list->by_name[middle].name);

    if (r == 0) {
      *i = list->by_name[middle].i;
      return true;
    }
    if (r < 0)
      high = middle;
    else
      low = middle + 1;
  }
  return false;
}

struct disk_offer *
offers_of (const struct disk_offers *list, const struct bitmap *b)
{
  const char *name = bitmap_name (b);
  size_t i;

  return disk_offers_find (list, name, strlen (name), &i) &&
    list->offers[i]->bitmap == b ? list->offers[i] : NULL;
}

void
offers_init (struct offers *o)
{
  pthread_mutex_init (&o->lock, NULL);
  o->current = NULL;
}

void
offers_free (struct offers *o)
{
  disk_offers_put (o->current);
  o->current = NULL;
  pthread_mutex_destroy (&o->lock);
}

struct disk_offers *
offers_ref (struct disk_offers *list)
{
  count_up (&list->references);
  return list;
}

struct disk_offers *
offers_get (const struct offers *o)
{
  ACQUIRE_LOCK_FOR_CURRENT_SCOPE ((pthread_mutex_t *) &o->lock);
  return offers_ref (o->current);
}

/* An empty list with room for nr offers. */
static struct disk_offers *
list_new (size_t nr)
{
  struct disk_offers *list = calloc (1, sizeof *list);

  if (list == NULL)
    return NULL;
  atomic_init (&list->references, 1);
  list->offers = calloc (nr + 1, sizeof list->offers[0]);
  list->by_name = calloc (nr + 1, sizeof list->by_name[0]);
  if (list->offers != NULL && list->by_name != NULL)
    return list;
  disk_offers_put (list);
  return NULL;
}

static int
list_add (struct disk_offers *list, const struct offer_source *source)
{
  struct disk_offer *o = offer_new (source->bitmap, source->size);

  if (o == NULL)
    return -1;
  o->is_fresh = !source->goes_on;
  list->offers[list->nr++] = o;
  return 0;
}

static void
make_index (struct disk_offers *list)
{
  for (size_t i = 0; i < list->nr; ++i)
    list->by_name[i] = (struct indexed_name) {
      .name = bitmap_name (list->offers[i]->bitmap), .i = i,
    };
  qsort (list->by_name, list->nr, sizeof list->by_name[0], compare_indexed);
}

/* Drop offers that have the name of one before them: a bitmap of a backing
 * file, if the image has got one of that name.
 */
static void
drop_hidden (struct disk_offers *list)
{
  size_t nr = 0;

  for (size_t k = 1; k < list->nr; ++k)
    if (strcmp (list->by_name[k - 1].name, list->by_name[k].name) == 0) {
      disk_offer_put (list->offers[list->by_name[k].i]);
      list->offers[list->by_name[k].i] = NULL;
    }
  for (size_t i = 0; i < list->nr; ++i)
    if (list->offers[i] != NULL)
      list->offers[nr++] = list->offers[i];
  if (nr == list->nr)
    return;
  list->nr = nr;
  make_index (list);
}

struct disk_offers *
offers_prepare_from (const struct offer_source *sources, size_t nr)
{
  struct disk_offers *list = list_new (nr);

  for (size_t i = 0; list != NULL && i < nr; ++i)
    if (list_add (list, &sources[i]) == -1) {
      disk_offers_put (list);
      list = NULL;
    }
  if (list == NULL) {
    report_error ("calloc: %m");
    errno = ENOMEM;
    return NULL;
  }
  make_index (list);
  drop_hidden (list);
  return list;
}

size_t
offer_sources_add (struct offer_source *sources, size_t nr,
                   const struct bitmap_set *set, uint64_t size)
{
  for (size_t i = 0; i < bitmap_set_nr_exposed (set); ++i)
    sources[nr++] = (struct offer_source) {
      .bitmap = bitmap_set_exposed (set, i), .size = size, .goes_on = true,
    };
  return nr;
}

struct disk_offers *
offers_prepare (struct bitmap_set *const *sets, const uint64_t *sizes,
                size_t nr_sets)
{
  struct offer_source *sources;
  struct disk_offers *list;
  size_t nr = 0;

  for (size_t i = 0; i < nr_sets; ++i)
    nr += bitmap_set_nr_exposed (sets[i]);
  sources = calloc (nr + 1, sizeof *sources);
  if (sources == NULL) {
    report_error ("calloc: %m");
    return NULL;
  }
  nr = 0;
  for (size_t i = 0; i < nr_sets; ++i)
    nr = offer_sources_add (sources, nr, sets[i], sizes[i]);
  list = offers_prepare_from (sources, nr);
  free (sources);
  return list;
}

void
offers_abandon (struct disk_offers *prepared)
{
  disk_offers_put (prepared);
}

static bool
is_cut (const struct disk_offer *o)
{
  return atomic_load_explicit (&o->cut, memory_order_acquire);
}

/* Clients that read it, and those that are about to, get errors from now on.
 */
static void
cut (struct disk_offer *o)
{
  atomic_store (&o->cut, true);
}

/* Put the offers of the list before into the places of new ones, if they are
 * of the same bitmaps, and cut those that have no place.
 */
static void
keep_offers (struct disk_offers *before, struct disk_offers *list)
{
  for (size_t i = 0; i < list->nr; ++i) {
    struct disk_offer *o = offers_of (before, list->offers[i]->bitmap);

    if (o == NULL || list->offers[i]->is_fresh)
      continue;
    assert (!is_cut (o) && o->size == list->offers[i]->size);
    disk_offer_put (list->offers[i]);
    list->offers[i] = disk_offer_get (o);
  }
  for (size_t i = 0; i < before->nr; ++i)
    if (offers_of (list, before->offers[i]->bitmap) != before->offers[i])
      cut (before->offers[i]);
}

void
offers_switch (struct offers *o, struct disk_offers *prepared)
{
  struct disk_offers *before = o->current;

  if (before != NULL)
    keep_offers (before, prepared);
  {
    ACQUIRE_LOCK_FOR_CURRENT_SCOPE (&o->lock);
    o->current = prepared;
  }
  disk_offers_put (before);
}

int
offers_replace (struct offers *o, struct bitmap_set *const *sets,
                const uint64_t *sizes, size_t nr_sets)
{
  struct disk_offers *prepared = offers_prepare (sets, sizes, nr_sets);

  if (prepared == NULL)
    return -1;
  offers_switch (o, prepared);
  return 0;
}

bool
offers_is_held_on (const struct disk_offers *list, const struct bitmap *b)
{
  const struct disk_offer *o = offers_of (list, b);

  return o != NULL && atomic_load (&o->holders) > 0;
}

bool
offers_is_held (const struct offers *o, const struct bitmap *b)
{
  struct disk_offers *list = offers_get (o);
  const bool held = offers_is_held_on (list, b);

  disk_offers_put (list);
  return held;
}

struct disk_offers *
disk_offers_get (const struct disk *d)
{
  return offers_get (&d->offers);
}

struct disk_offer *
disk_find_offer (const struct disk *d, const char *name, size_t length)
{
  struct disk_offers *list = disk_offers_get (d);
  struct disk_offer *o = NULL;
  size_t i;

  if (disk_offers_find (list, name, length, &i))
    o = disk_offer_get (disk_offers_at (list, i));
  disk_offers_put (list);
  return o;
}

void
disk_bitmap_hold (struct disk_offer *o)
{
  atomic_fetch_add (&o->holders, 1);
}

void
disk_bitmap_release (struct disk_offer *o)
{
  const unsigned long old = atomic_fetch_sub (&o->holders, 1);

  assert (old > 0);
  (void) old;
}

const char *
disk_bitmap_name (const struct disk_offer *o)
{
  return bitmap_name (o->bitmap);
}

uint64_t
disk_bitmap_granularity (const struct disk_offer *o)
{
  return bitmap_granularity (o->bitmap);
}

/* As disk_bitmap_runs, of an offer that may be cut meanwhile. */
static size_t
get_runs (const struct disk_offer *o, uint64_t offset, uint64_t limit,
          uint64_t *ends, size_t max, bool *dirty)
{
  size_t nr;

  if (offset >= o->size) {
    *dirty = true;
    ends[0] = limit;
    return 1;
  }
  nr = bitmap_runs (o->bitmap, offset, min_u64 (limit, o->size), ends, max,
                    dirty);
  if (limit <= o->size || ends[nr - 1] < o->size)
    return nr;

  /* The last run is dirty too, or is followed by one that is. */
  if (*dirty == (nr % 2 == 1))
    ends[nr - 1] = limit;
  else if (nr < max)
    ends[nr++] = limit;
  return nr;
}

size_t
disk_bitmap_runs (const struct disk_offer *o, uint64_t offset,
                  uint64_t limit, uint64_t *ends, size_t max, bool *dirty)
{
  const size_t nr = get_runs (o, offset, limit, ends, max, dirty);

  /* Only now: what was read may be from after the cut. */
  if (!is_cut (o))
    return nr;
  report_error ("bitmap '%s' was changed or removed while clients read it",
                disk_bitmap_name (o));
  errno = EIO;
  return 0;
}
