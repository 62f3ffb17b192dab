/* nbdkit-dirty-bitmap-filter
 * SPDX-License-Identifier: BSD-3-Clause
 * Copyright the nbdkit-dirty-bitmap-filter authors
 */

/* New bitmaps.
 *
 * A directory is never extended in place.  The new one is written to fresh
 * clusters: the entries of the old one, byte for byte, then the new ones,
 * each with a table of its own in which all entries are zero.  When all of
 * this and its refcounts are durable, the header is pointed at it in one
 * step.  So after a crash the image has the old directory or the new one,
 * and at worst leaked clusters.  The directory is written once, however many
 * bitmaps are missing.
 *
 * An error before the header is touched gives the clusters back.  After an
 * error while it is written, it is unknown which directory the image has,
 * and both stay as they are.
 */

#include <config.h>

#include <errno.h>
#include <inttypes.h>
#include <stdlib.h>
#include <string.h>

#include "bitmap/internal.h"
#include "common/bytes.h"
#include "common/cleanup.h"
#include "common/report.h"
#include "qcow2/order.h"

/* What will be in the image. */
struct creation {
  struct bitmap_set *set;
  struct bitmap **bitmaps;
  size_t nr_bitmaps;
  size_t nr_tables;             /* of bitmaps that have a table_offset */
  uint8_t *directory;
  size_t directory_bytes;
  uint64_t directory_offset;    /* 0 if it has none yet */
};

static uint64_t
default_granularity (const struct bitmap_set *set)
{
  return min_u64 (max_u64 (set->geometry.cluster_size_bytes, 4096), 65536);
}

static uint64_t
granularity_of_new (const struct bitmap_set *set,
                    const struct bitmap_options *options)
{
  return options->granularity ? options->granularity
    : default_granularity (set);
}

/* Must the i-th required bitmap be created?  False for a repeated name. */
static bool
is_missing (const struct bitmap_set *set,
            const struct bitmap_options *options, size_t i)
{
  if (bitmap_set_find (set, options->require[i]) != NULL)
    return false;
  for (size_t j = 0; j < i; ++j)
    if (strcmp (options->require[i], options->require[j]) == 0)
      return false;
  return true;
}

/* The old directory is kept only if it is sound. */
static size_t
old_directory_bytes (const struct bitmap_set *set)
{
  return set->store == STORE_GOOD ? set->directory_bytes : 0;
}

int
bitmap_create_check (const struct bitmap_set *set,
                     const struct bitmap_options *options)
{
  uint64_t nr = set->nr_bitmaps, bytes = old_directory_bytes (set);
  struct bitmap_damage damage;
  bool any = false;

  for (size_t i = 0; i < options->nr_require; ++i) {
    const char *name = options->require[i];
    struct bitmap_shown_name shown = bitmap_show_name (name, strlen (name));
    int r = 0;

    if (!is_missing (set, options, i))
      continue;
    if (set->store == STORE_DAMAGED)
      r = bitmap_damage (&damage, "the bitmaps that the image has are "
                         "damaged: %.400s", set->damage.what);
    else if (qcow2_version (set->image) < 3)
      r = bitmap_damage (&damage, "a version 2 image cannot store bitmaps, "
                         "use qemu-img amend -o compat=1.1");
    else if (set->readonly)
      r = bitmap_damage (&damage, "the image is read-only");
    else
      r = bitmap_directory_check_new (name,
                                      granularity_of_new (set, options),
                                      &set->geometry, nr, bytes, &damage);
    if (r == -1) {
      report_error ("bitmap '%s' is not in the image and cannot be created: "
                    "%s", shown.text, damage.what);
      errno = EINVAL;
      return -1;
    }
    nr++;
    bytes += bitmap_directory_entry_bytes (strlen (name));
    any = true;
  }
  return any ? qcow2_check_bitmaps_extension (set->image) : 0;
}

static uint64_t
clusters_of (const struct bitmap_set *set, uint64_t bytes)
{
  return div_round_up (bytes, set->geometry.cluster_size_bytes);
}

/* Write bytes, and zeroes up to the end of their last cluster. */
static int
write_clusters (struct bitmap_set *set, enum qcow2_class class,
                const uint8_t *bytes, size_t count, uint64_t host_offset)
{
  size_t padded = clusters_of (set, count) * set->geometry.cluster_size_bytes;
  CLEANUP_FREE uint8_t *buf = calloc (1, padded);

  if (buf == NULL) {
    report_error ("calloc: %m");
    return -1;
  }
  if (bytes != NULL)
    memcpy (buf, bytes, count);
  return qcow2_write_metadata (set->image, class, buf, padded, host_offset);
}

/* Make one bitmap in RAM, and its table in the image. */
static struct bitmap *
create_bitmap (struct creation *c, const char *name, unsigned granularity_bits)
{
  struct bitmap_set *set = c->set;
  const struct bitmap_directory_entry entry = {
    .table_entries = bitmap_table_entries_needed (&set->geometry,
                                                  granularity_bits),
    .flags = BITMAP_FLAG_AUTO,
    .granularity_bits = granularity_bits,
    .name = name,
    .name_bytes = strlen (name),
  };
  struct bitmap *b = bitmap_new (&entry,
                                 bitmap_set_nr_bits (set, granularity_bits));

  if (b != NULL)
    b->table = calloc (b->table_entries, 8);
  if (b == NULL || b->table == NULL) {
    report_error ("bitmap '%s': calloc: %m", name);
    bitmap_free (b);
    return NULL;
  }
  return b;
}

static int
create_table (struct creation *c, struct bitmap *b)
{
  size_t bytes = 8 * (size_t) b->table_entries;

  if (qcow2_alloc (c->set->image, QCOW2_BITMAP_TABLE,
                   clusters_of (c->set, bytes), &b->table_offset, NULL) == -1)
    return -1;
  c->nr_tables++;
  return write_clusters (c->set, QCOW2_BITMAP_TABLE, NULL, bytes,
                         b->table_offset);
}

/* Make the missing bitmaps, their tables and the new directory's bytes. */
static int
prepare (struct creation *c, const struct bitmap_options *options)
{
  struct bitmap_set *set = c->set;
  unsigned bits = __builtin_ctzll (granularity_of_new (set, options));
  size_t old_bytes = old_directory_bytes (set), max_bytes = old_bytes;

  for (size_t i = 0; i < options->nr_require; ++i)
    max_bytes += bitmap_directory_entry_bytes (strlen (options->require[i]));
  c->bitmaps = calloc (options->nr_require, sizeof *c->bitmaps);
  c->directory = malloc (max_bytes);
  if (c->bitmaps == NULL || c->directory == NULL) {
    report_error ("malloc: %m");
    return -1;
  }
  if (old_bytes > 0)
    memcpy (c->directory, set->directory, old_bytes);
  c->directory_bytes = old_bytes;

  for (size_t i = 0; i < options->nr_require; ++i) {
    struct bitmap *b;

    if (!is_missing (set, options, i))
      continue;
    b = create_bitmap (c, options->require[i], bits);
    if (b == NULL)
      return -1;
    c->bitmaps[c->nr_bitmaps++] = b;
    if (create_table (c, b) == -1)
      return -1;
    b->entry_offset = c->directory_bytes; /* not yet in the image */
    c->directory_bytes +=
      bitmap_directory_put (c->directory + c->directory_bytes,
                            &(const struct bitmap_directory_entry) {
                              .table_offset = b->table_offset,
                              .table_entries = b->table_entries,
                              .flags = b->flags,
                              .granularity_bits = b->shift,
                              .name_bytes = strlen (b->name),
                              .name = b->name,
                            });
  }
  return 0;
}

/* Make tables and directory durable, with their refcounts. */
static int
store (struct creation *c)
{
  struct bitmap_set *set = c->set;
  uint64_t offset;

  if (qcow2_alloc (set->image, QCOW2_BITMAP_DIRECTORY,
                   clusters_of (set, c->directory_bytes), &offset, NULL) == -1)
    return -1;
  c->directory_offset = offset;
  if (write_clusters (set, QCOW2_BITMAP_DIRECTORY, c->directory,
                      c->directory_bytes, offset) == -1)
    return -1;
  return ORDER (DIRECTORY_BEFORE_HEADER) ? qcow2_flush (set->image) : 0;
}

static void
give_back (struct creation *c)
{
  struct bitmap_set *set = c->set;

  for (size_t i = 0; i < c->nr_tables; ++i)
    qcow2_release (set->image, c->bitmaps[i]->table_offset,
                   clusters_of (set, 8 * (uint64_t)
                                c->bitmaps[i]->table_entries));
  if (c->directory_offset != 0)
    qcow2_release (set->image, c->directory_offset,
                   clusters_of (set, c->directory_bytes));
}

/* The header points to the new directory: the set takes it over. */
static void
adopt (struct creation *c)
{
  struct bitmap_set *set = c->set;

  for (size_t i = 0; i < set->nr_bitmaps; ++i)
    set->bitmaps[i]->entry_offset +=
      c->directory_offset - set->directory_offset;
  for (size_t i = 0; i < c->nr_bitmaps; ++i) {
    struct bitmap *b = c->bitmaps[i];

    b->entry_offset += c->directory_offset;
    set->bitmaps[set->nr_bitmaps++] = b;
  }
  if (set->store == STORE_GOOD)
    qcow2_release (set->image, set->directory_offset,
                   clusters_of (set, set->directory_bytes));
  free (set->directory);
  set->directory = c->directory;
  set->directory_bytes = c->directory_bytes;
  set->directory_offset = c->directory_offset;
  set->store = STORE_GOOD;
}

static void
abandon (struct creation *c)
{
  for (size_t i = 0; i < c->nr_bitmaps; ++i)
    bitmap_free (c->bitmaps[i]);
  free (c->directory);
}

static int
create (struct creation *c, const struct bitmap_options *options)
{
  struct bitmap_set *set = c->set;

  if (prepare (c, options) == -1 ||
      bitmap_set_reserve (set, c->nr_bitmaps) == -1 || store (c) == -1) {
    give_back (c);
    return -1;
  }
  return qcow2_set_bitmaps_extension (set->image,
                                      set->nr_bitmaps + c->nr_bitmaps,
                                      c->directory_bytes,
                                      c->directory_offset);
}

int
bitmap_create_missing (struct bitmap_set *set,
                       const struct bitmap_options *options)
{
  struct creation c = { .set = set };
  bool any = false;
  int r;

  for (size_t i = 0; i < options->nr_require; ++i)
    any |= is_missing (set, options, i);
  if (!any)
    return 0;

  r = create (&c, options);
  if (r == 0)
    adopt (&c);
  else
    abandon (&c);
  free (c.bitmaps);
  return r;
}
