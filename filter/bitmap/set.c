/* nbdkit-dirty-bitmap-filter
 * SPDX-License-Identifier: BSD-3-Clause
 * Copyright the nbdkit-dirty-bitmap-filter authors
 */

/* The set of an image's bitmaps: opened, asked, and closed.
 *
 * Opening goes in three steps.  The image's bitmaps are loaded; damage is
 * reported, but does no harm (load.c).  Then they are compared with the
 * options: if a bitmap is missing, opening may fail.  Last, unless this is
 * only a check, missing bitmaps that can be created are created (create.c).
 *
 * Afterwards only a change (change.h) replaces the lists of the set, and only
 * while no other thread uses them.  internal.h describes what else changes.
 */

#include <config.h>

#include <assert.h>
#include <errno.h>
#include <inttypes.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "bitmap/internal.h"
#include "common/bytes.h"
#include "common/cleanup.h"
#include "common/names.h"
#include "common/report.h"
#include "common/vector.h"
#include "container/container.h"

/* The most bits that a mark sets in one section. */
#define MARK_BITS (UINT64_C (1) << 20)

struct bitmap *
bitmap_new (const struct bitmap_directory_entry *e, uint64_t nr_bits)
{
  struct bitmap *b = calloc (1, sizeof *b);

  if (b == NULL)
    return NULL;
  atomic_init (&b->references, 1);
  b->shift = e->granularity_bits;
  b->flags = e->flags;
  b->inconsistent = e->flags & BITMAP_FLAG_IN_USE;
  b->table_offset = e->table_offset;
  b->table_entries = e->table_entries;
  b->name = strndup (e->name, e->name_bytes);
  if (b->name == NULL ||
      (nr_bits > 0 &&
       (bits_init (&b->bits, nr_bits) == -1 ||
        changes_init (&b->changes, b->bits.nr_pieces) == -1))) {
    bitmap_put (b);
    errno = ENOMEM;
    return NULL;
  }
  return b;
}

static void
bitmap_free (struct bitmap *b)
{
  bits_free (&b->bits);
  changes_free (&b->changes);
  bitmap_reserve_free (b);
  ahead_free (&b->ahead);
  free (b->pending);
  free (b->table);
  bitmap_put (b->since);
  free (b->name);
  free (b);
}

/* To count is not to change the bitmap: a reader may do it. */
static atomic_ulong *
references (const struct bitmap *b)
{
  return &((struct bitmap *) b)->references;
}

const struct bitmap *
bitmap_get (const struct bitmap *b)
{
  const unsigned long old =
    atomic_fetch_add_explicit (references (b), 1, memory_order_relaxed);

  assert (old > 0);
  (void) old;
  return b;
}

/* What each thread did with the bitmap comes before it is freed. */
void
bitmap_put (const struct bitmap *b)
{
  if (b == NULL)
    return;

  const unsigned long old =
    atomic_fetch_sub_explicit (references (b), 1, memory_order_acq_rel);

  assert (old > 0);
  if (old == 1)
    bitmap_free ((struct bitmap *) b);
}

int
bitmap_set_reserve (struct bitmap_set *set, size_t nr)
{
  if (vector_reserve (set->bitmaps, set->nr_bitmaps, set->max_bitmaps,
                      nr) == -1) {
    report_error ("realloc: %m");
    return -1;
  }
  return 0;
}

struct bitmap *
bitmap_set_find (const struct bitmap_set *set, const char *name)
{
  for (size_t i = 0; i < set->nr_bitmaps; ++i)
    if (strcmp (set->bitmaps[i]->name, name) == 0)
      return set->bitmaps[i];
  return NULL;
}

uint64_t
bitmap_set_nr_bits (const struct bitmap_set *set, unsigned granularity_bits)
{
  return div_round_up (set->geometry.disk_size_bytes,
                       UINT64_C (1) << granularity_bits);
}

static int
refuse_inconsistent (const char *name)
{
  report_error ("bitmap '%s' is inconsistent: it was in use when the image "
                "was last closed uncleanly; remove it with qemu-img bitmap "
                "--remove IMAGE '%s', then add it anew", name, name);
  errno = EINVAL;
  return -1;
}

static int
check_required (const struct bitmap_set *set,
                const struct bitmap_options *options)
{
  for (size_t i = 0; i < options->nr_require; ++i) {
    const char *name = options->require[i];
    const struct bitmap *b = bitmap_set_find (set, name);

    if (b == NULL)
      continue;
    if (b->inconsistent)
      return refuse_inconsistent (name);
    if (!(b->flags & BITMAP_FLAG_AUTO)) {
      report_error ("bitmap '%s' is disabled and does not record: enable it "
                    "with qemu-img bitmap --enable IMAGE '%s'", name, name);
      errno = EINVAL;
      return -1;
    }
  }
  return bitmap_create_check (set, options);
}

static bool
is_unusable (const struct bitmap_set *set)
{
  return set->store == STORE_DAMAGED || set->store == STORE_STALE;
}

/* Is a bitmap of a backing file hidden by an image above it?  A client that
 * asks for the name means the bitmap that was kept last, even if that bitmap
 * can no longer be used.
 */
static bool
is_hidden (const struct bitmap_options *options, const char *name)
{
  for (size_t i = 0; i < options->nr_above; ++i)
    if (is_unusable (options->above[i]) ||
        bitmap_set_find (options->above[i], name) != NULL)
      return true;
  return false;
}

bool
bitmap_is_wanted (const struct bitmap_options *options, const char *name)
{
  return !is_hidden (options, name) &&
    (options->nr_expose == 0 ||
     names_include (options->expose, options->nr_expose, name));
}

static int
check_exposed (const struct bitmap_set *set,
               const struct bitmap_options *options)
{
  for (size_t i = 0; i < options->nr_expose; ++i) {
    const char *name = options->expose[i];
    const struct bitmap *b = bitmap_set_find (set, name);

    if (is_hidden (options, name))
      continue;
    if (b != NULL && b->inconsistent)
      return refuse_inconsistent (name);
    if (b != NULL ||
        names_include (options->require, options->nr_require, name))
      continue;
    if ((set->is_backing || options->has_backing) && !is_unusable (set))
      continue;
    if (set->store == STORE_DAMAGED || set->store == STORE_STALE)
      report_error ("bitmap '%s' cannot be offered: the image's bitmaps "
                    "cannot be used: %s", name, set->damage.what);
    else
      report_error ("bitmap '%s' cannot be offered: the image has no bitmap "
                    "of this name", name);
    errno = ENOENT;
    return -1;
  }
  return 0;
}

static void
warn_of_inconsistent (const struct bitmap_set *set,
                      const struct bitmap_options *options)
{
  for (size_t i = 0; i < set->nr_bitmaps; ++i) {
    const char *name = set->bitmaps[i]->name;
    struct bitmap_shown_name shown = bitmap_show_name (name, strlen (name));

    if (set->bitmaps[i]->inconsistent && !is_hidden (options, name))
      report_warning ("%sbitmap '%s' is inconsistent and not offered: it was "
                      "in use when the image was last closed uncleanly; "
                      "qemu-img bitmap --remove removes it",
                      set->prefix, shown.text);
  }
}

int
bitmap_lists_init (struct bitmap_lists *l, size_t max)
{
  *l = (struct bitmap_lists) {
    .bitmaps = calloc (max + 1, sizeof *l->bitmaps),
    .recording = calloc (max + 1, sizeof *l->recording),
    .recording_in_ram = calloc (2 * max + 1, sizeof *l->recording_in_ram),
    .exposed = calloc (max + 1, sizeof *l->exposed),
    .min_shift = BITMAP_MAX_GRANULARITY_BITS,
  };
  if (l->bitmaps != NULL && l->recording != NULL &&
      l->recording_in_ram != NULL && l->exposed != NULL)
    return 0;
  bitmap_lists_free (l);
  errno = ENOMEM;
  report_error ("calloc: %m");
  return -1;
}

void
bitmap_lists_free (struct bitmap_lists *l)
{
  free (l->bitmaps);
  free (l->recording);
  free (l->recording_in_ram);
  free (l->exposed);
  *l = (struct bitmap_lists) { 0 };
}

void
bitmap_lists_add (struct bitmap_lists *l, struct bitmap *b, bool records,
                  bool exposed)
{
  l->bitmaps[l->nr_bitmaps++] = b;
  if (records && b->in_ram)
    l->recording_in_ram[l->nr_recording_in_ram++] = b;
  else if (records)
    l->recording[l->nr_recording++] = b;
  if (records && b->shift < l->min_shift)
    l->min_shift = b->shift;
  if (exposed)
    l->exposed[l->nr_exposed++] = b;
}

void
bitmap_lists_add_since (struct bitmap_lists *l, struct bitmap *since)
{
  l->recording_in_ram[l->nr_recording_in_ram++] = since;
  if (since->shift < l->min_shift)
    l->min_shift = since->shift;
}

void
bitmap_set_install (struct bitmap_set *set, struct bitmap_lists *l)
{
  free (set->bitmaps);
  free (set->recording);
  free (set->recording_in_ram);
  free (set->exposed);
  set->bitmaps = l->bitmaps;
  set->nr_bitmaps = set->max_bitmaps = l->nr_bitmaps;
  set->recording = l->recording;
  set->nr_recording = l->nr_recording;
  set->recording_in_ram = l->recording_in_ram;
  set->nr_recording_in_ram = l->nr_recording_in_ram;
  set->exposed = l->exposed;
  set->nr_exposed = l->nr_exposed;
  set->mark_bytes = MARK_BITS << l->min_shift;
  for (size_t i = 0; i < l->nr_bitmaps; ++i)
    l->bitmaps[i]->is_recording = false;
  for (size_t i = 0; i < l->nr_recording; ++i)
    l->recording[i]->is_recording = true;
  for (size_t i = 0; i < l->nr_recording_in_ram; ++i)
    l->recording_in_ram[i]->is_recording = true;
  *l = (struct bitmap_lists) { 0 };
}

/* Determine which bitmaps record, and which are offered. */
static int
make_lists (struct bitmap_set *set, const struct bitmap_options *options)
{
  struct bitmap_lists lists;

  if (bitmap_lists_init (&lists, set->nr_bitmaps) == -1)
    return -1;
  for (size_t i = 0; i < set->nr_bitmaps; ++i) {
    struct bitmap *b = set->bitmaps[i];
    const bool records =
      !b->inconsistent && bitmap_is_enabled (b) && !set->readonly;

    if (records && b->reserved == NULL && bitmap_reserve_init (b) == -1) {
      bitmap_lists_free (&lists);
      return -1;
    }
    bitmap_lists_add (&lists, b, records,
                      !b->inconsistent && bitmap_is_wanted (options, b->name));
  }
  bitmap_set_install (set, &lists);
  return 0;
}

/* Bitmaps that are added later are offered by the same rule. */
static int
copy_expose (struct bitmap_set *set, const struct bitmap_options *options)
{
  set->expose = calloc (options->nr_expose + 1, sizeof *set->expose);
  for (size_t i = 0; set->expose != NULL && i < options->nr_expose; ++i) {
    set->expose[i] = strdup (options->expose[i]);
    if (set->expose[i] == NULL)
      break;
    set->nr_expose++;
  }
  if (set->expose != NULL && set->nr_expose == options->nr_expose)
    return 0;
  report_error ("strdup: %m");
  return -1;
}

bool
bitmap_set_wants (const struct bitmap_set *set, const char *name)
{
  return set->nr_expose == 0 ||
    names_include ((const char *const *) set->expose, set->nr_expose, name);
}

static int
set_init (struct bitmap_set *set, struct qcow2 *image,
          const char *backing_path)
{
  memset (set, 0, sizeof *set);
  grace_init (&set->grace);
  pthread_mutex_init (&set->state_lock, NULL);
  pthread_mutex_init (&set->reserve_lock, NULL);
  pthread_mutex_init (&set->keep_lock, NULL);
  pthread_cond_init (&set->keep_changed, NULL);
  set->image = image;
  set->readonly = qcow2_is_readonly (image);
  set->geometry.disk_size_bytes = qcow2_size (image);
  set->geometry.container_size_bytes =
    container_size (qcow2_container (image));
  set->geometry.cluster_size_bytes = qcow2_cluster_size (image);
  set->is_backing = backing_path != NULL;
  if (!set->is_backing)
    set->prefix = strdup ("");
  else if (asprintf (&set->prefix, "backing file '%s': ", backing_path) == -1)
    set->prefix = NULL;
  set->buffer = malloc (SYNC_BUFFER_BYTES);
  if (set->prefix == NULL || set->buffer == NULL) {
    report_error ("malloc: %m");
    return -1;
  }
  return 0;
}

static int
set_fill (struct bitmap_set *set, const struct bitmap_options *options)
{
  bitmap_load (set, options);
  if (!options->check_only)
    warn_of_inconsistent (set, options);
  if (check_required (set, options) == -1 ||
      check_exposed (set, options) == -1)
    return -1;
  if (!set->is_backing && copy_expose (set, options) == -1)
    return -1;
  if (!options->check_only && bitmap_create_missing (set, options) == -1)
    return -1;
  if (make_lists (set, options) == -1)
    return -1;
  /* A disk of no bytes has no units. */
  return options->keep && !options->check_only && !set->readonly &&
    set->geometry.disk_size_bytes > 0 ? keep_init (set, options->flush) : 0;
}

struct bitmap_set *
bitmap_set_open (struct qcow2 *image, const struct bitmap_options *options)
{
  /* The alignment puts the grace's counters on cache lines of their own. */
  struct bitmap_set *set = aligned_alloc (_Alignof (struct bitmap_set),
                                          sizeof *set);

  if (set == NULL) {
    report_error ("aligned_alloc: %m");
    return NULL;
  }
  if (set_init (set, image, options->backing_path) == -1 ||
      set_fill (set, options) == -1) {
    int saved_errno = errno;

    bitmap_set_close (set);
    errno = saved_errno;
    return NULL;
  }
  return set;
}

void
bitmap_set_close (struct bitmap_set *set)
{
  if (set == NULL)
    return;
  if (set->is_backing)
    qcow2_unregister_bitmaps (set->image);
  for (size_t i = 0; i < set->nr_bitmaps; ++i)
    bitmap_put (set->bitmaps[i]);
  free (set->bitmaps);
  free (set->recording);
  free (set->recording_in_ram);
  free (set->exposed);
  for (size_t i = 0; i < set->nr_expose; ++i)
    free (set->expose[i]);
  free (set->expose);
  free (set->buffer);
  free (set->prefix);
  pthread_mutex_destroy (&set->state_lock);
  grace_free (&set->grace);
  pthread_mutex_destroy (&set->reserve_lock);
  pthread_mutex_destroy (&set->keep_lock);
  pthread_cond_destroy (&set->keep_changed);
  keep_free (set);
  free (set);
}

size_t
bitmap_set_nr_recording (const struct bitmap_set *set)
{
  return set->nr_recording;
}

const struct bitmap *
bitmap_set_recording (const struct bitmap_set *set, size_t i)
{
  return set->recording[i];
}

size_t
bitmap_set_nr_all (const struct bitmap_set *set)
{
  return set->nr_bitmaps;
}

const struct bitmap *
bitmap_set_get (const struct bitmap_set *set, size_t i)
{
  return set->bitmaps[i];
}

bool
bitmap_is_inconsistent (const struct bitmap *b)
{
  return b->inconsistent;
}

bool
bitmap_is_in_ram (const struct bitmap *b)
{
  return b->in_ram;
}

bool
bitmap_is_recording (const struct bitmap *b)
{
  return b->is_recording;
}

bool
bitmap_is_enabled (const struct bitmap *b)
{
  return (b->flags & BITMAP_FLAG_AUTO) != 0;
}

/* The last granule may be shorter than the others. */
uint64_t
bitmap_dirty_bytes (const struct bitmap *b, uint64_t size,
                    uint64_t *memory_bytes)
{
  const uint64_t dirty = bits_count (&b->bits, memory_bytes) << b->shift;
  const uint64_t n = b->bits.nr_bits, end = n << b->shift;

  if (n == 0 || size >= end || (end - size) >> b->shift != 0 ||
      !bits_all_set (&b->bits, n - 1, n - 1))
    return dirty;
  return dirty - min_u64 (dirty, end - size);
}

size_t
bitmap_set_nr_exposed (const struct bitmap_set *set)
{
  return set->nr_exposed;
}

const struct bitmap *
bitmap_set_exposed (const struct bitmap_set *set, size_t i)
{
  return set->exposed[i];
}

bool
bitmap_set_offers (const struct bitmap_set *set, const char *name)
{
  for (size_t i = 0; i < set->nr_exposed; ++i)
    if (strcmp (set->exposed[i]->name, name) == 0)
      return true;
  return false;
}

const char *
bitmap_name (const struct bitmap *b)
{
  return b->name;
}

bool
bitmap_has_backup (const struct bitmap *b)
{
  return b->since != NULL;
}

uint64_t
bitmap_since_bytes (const struct bitmap *b, uint64_t size)
{
  uint64_t ignored;

  return b->since == NULL ? 0 : bitmap_dirty_bytes (b->since, size, &ignored);
}

uint64_t
bitmap_granularity (const struct bitmap *b)
{
  return UINT64_C (1) << b->shift;
}

size_t
bitmap_runs (const struct bitmap *b, uint64_t offset, uint64_t limit,
             uint64_t *ends, size_t max, bool *dirty)
{
  const size_t nr =
    bits_runs (&b->bits, bitmap_first_bit (b, offset),
               bitmap_last_bit (b, offset, limit - offset) + 1,
               b->shift, ends, max, dirty);

  ends[nr - 1] = min_u64 (ends[nr - 1], limit);
  return nr;
}
