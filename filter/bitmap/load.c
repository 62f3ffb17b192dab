/* nbdkit-dirty-bitmap-filter
 * SPDX-License-Identifier: BSD-3-Clause
 * Copyright the nbdkit-dirty-bitmap-filter authors
 */

/* From the image to RAM.
 *
 * Everything that is read here is untrusted and may be damaged, and the disk
 * is served in any case (I7).  So there is one outcome for all bitmaps
 * together: they are sound, or they are damaged as a whole, which is
 * reported in one message, and none is in the set.  A bitmap that cannot be
 * read, or does not fit into RAM, counts as damaged.
 *
 * If they are damaged and the image is writable, an `auto` bitmap that is
 * not in use would go stale with our first write and still look valid to the
 * next program that opens the image.  qcow2_distrust_bitmaps prevents that.
 * A directory that cannot be parsed is assumed to have such bitmaps.
 *
 * Every cluster of a sound store is registered, so that two structures that
 * overlap are found, and no write can hit one.  Bitmaps that were found in
 * use are registered last, and only as far as they are well formed: nothing
 * will ever be written to them, so their flaws are harmless, and must not
 * make the sound bitmaps unusable.
 */

#include <config.h>

#include <errno.h>
#include <inttypes.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "bitmap/internal.h"
#include "common/bytes.h"
#include "common/cleanup.h"
#include "common/report.h"

/* Memory that is counted besides bits: for each registered cluster
 * (registry.c), including outgrown tables; and for each piece of bits so
 * many bits: populated, full, and those of changes.h.
 */
#define REGISTERED_BYTES UINT64_C (86)
#define BITS_A_PIECE 5

/* The most bytes that one read of bits covers. */
#define MAX_READ_BYTES (UINT64_C (1) << 20)

/* What has been registered, so that it can be unregistered. */
struct registered {
  bool directory;
  size_t tables;                /* consistent bitmaps whose table is
                                   registered */
  size_t data_bitmaps;          /* bitmaps with all data clusters registered */
  uint32_t data_entries;        /* table entries of the next bitmap whose data
                                   clusters are */
};

/* The memory of the machine, or what a process can address of it if that is
 * less: the limits are parts of it.
 */
static uint64_t
usable_memory (void)
{
  return min_u64 ((uint64_t) sysconf (_SC_PHYS_PAGES) *
                  sysconf (_SC_PAGESIZE), SIZE_MAX);
}

static int
register_clusters (struct bitmap_set *set, enum qcow2_class class,
                   uint64_t offset, uint64_t bytes, const char *what,
                   const char *name, struct bitmap_damage *damage)
{
  if (qcow2_register (set->image, class, offset, bytes) == 0)
    return 0;
  return bitmap_damage (damage, "%s%s%s%s at %#" PRIx64 " %s", what,
                        name ? " of bitmap '" : "",
                        name ? bitmap_show_name (name, strlen (name)).text
                        : "",
                        name ? "'" : "", offset,
                        errno == EEXIST ? "overlaps other metadata"
                        : errno == ENOMEM ? "does not fit into memory"
                        : "is not inside the image");
}

/* Read the table and the offsets in it. */
static int
read_table (struct bitmap_set *set, struct bitmap *b,
            struct bitmap_damage *damage)
{
  struct bitmap_shown_name shown = bitmap_show_name (b->name,
                                                     strlen (b->name));

  b->table = malloc (bitmap_table_bytes (b));
  if (b->table == NULL)
    return bitmap_damage (damage, "the table of bitmap '%s' does not fit "
                          "into memory", shown.text);
  if (qcow2_read_metadata (set->image, b->table, bitmap_table_bytes (b),
                           b->table_offset) == -1)
    return bitmap_damage (damage, "the table of bitmap '%s' cannot be read",
                          shown.text);
  bitmap_table_get (b->table, b->table_entries);
  return 0;
}

/* Read the table of a consistent bitmap, and check each entry. */
static int
load_table (struct bitmap_set *set, struct bitmap *b,
            struct bitmap_damage *damage)
{
  if (read_table (set, b, damage) == -1)
    return -1;
  for (uint32_t i = 0; i < b->table_entries; ++i)
    if (!bitmap_table_entry_is_valid (b->table[i],
                                      set->geometry.cluster_size_bytes))
      return bitmap_damage (damage, "the table of bitmap '%s' has the "
                            "invalid entry %#" PRIx64,
                            bitmap_show_name (b->name,
                                              strlen (b->name)).text,
                            b->table[i]);
  return 0;
}

/* Register its table and its data clusters. */
static int
register_bitmap (struct bitmap_set *set, struct bitmap *b,
                 struct registered *registered, struct bitmap_damage *damage)
{
  if (register_clusters (set, QCOW2_BITMAP_TABLE, b->table_offset,
                         bitmap_table_bytes (b), "the table", b->name,
                         damage) == -1)
    return -1;
  registered->tables++;

  registered->data_entries = 0;
  for (uint32_t i = 0; i < b->table_entries; ++i) {
    if (bitmap_table_entry_is_data (b->table[i]) &&
        register_clusters (set, QCOW2_BITMAP_DATA, b->table[i],
                           set->geometry.cluster_size_bytes,
                           "a data cluster", b->name, damage) == -1)
      return -1;
    registered->data_entries = i + 1;
  }
  registered->data_bitmaps++;
  registered->data_entries = 0;
  return 0;
}

static uint32_t
nr_data_clusters (const struct bitmap *b)
{
  uint32_t n = 0;

  for (uint32_t i = 0; i < b->table_entries; ++i)
    n += bitmap_table_entry_is_data (b->table[i]);
  return n;
}

/* Register what is possible of a bitmap that was found in use.  Its table has
 * these clusters then, in case that it is removed; or it has no table.
 */
static void
register_inconsistent (struct bitmap_set *set, struct bitmap *b)
{
  uint32_t cluster_size = set->geometry.cluster_size_bytes;
  struct bitmap_damage ignored;

  if (qcow2_register (set->image, QCOW2_BITMAP_TABLE, b->table_offset,
                      bitmap_table_bytes (b)) == -1)
    return;
  if (read_table (set, b, &ignored) == -1) {
    free (b->table);
    b->table = NULL;
    return;
  }
  set->memory_bytes += nr_data_clusters (b) * REGISTERED_BYTES;
  for (uint32_t i = 0; i < b->table_entries; ++i)
    if (set->memory_bytes > usable_memory () / 2 ||
        !bitmap_table_entry_is_valid (b->table[i], cluster_size) ||
        !bitmap_table_entry_is_data (b->table[i]) ||
        qcow2_register (set->image, QCOW2_BITMAP_DATA, b->table[i],
                        cluster_size) == -1)
      b->table[i] = BITMAP_TABLE_ALL_ZEROES;
}

static void
unregister_all (struct bitmap_set *set, const struct registered *registered)
{
  uint32_t cluster_size = set->geometry.cluster_size_bytes;
  size_t nr_consistent = 0;

  if (registered->directory)
    qcow2_unregister (set->image, set->directory_offset,
                      set->directory_bytes);

  for (size_t i = 0; i < set->nr_bitmaps; ++i) {
    struct bitmap *b = set->bitmaps[i];
    size_t nth = nr_consistent;
    uint32_t entries = 0;

    if (b->inconsistent)
      continue;
    nr_consistent++;
    if (nth < registered->tables)
      qcow2_unregister (set->image, b->table_offset, bitmap_table_bytes (b));
    if (nth < registered->data_bitmaps)
      entries = b->table_entries;
    else if (nth == registered->data_bitmaps)
      entries = registered->data_entries;
    for (uint32_t j = 0; j < entries; ++j)
      if (bitmap_table_entry_is_data (b->table[j]))
        qcow2_unregister (set->image, b->table[j], cluster_size);
  }
}

/* Are the bits of a bitmap needed? */
static bool
has_bits (const struct bitmap_set *set, const struct bitmap_options *options,
          const char *name, uint32_t flags)
{
  return !(flags & BITMAP_FLAG_IN_USE) &&
    (!set->readonly || options->load_all || bitmap_is_wanted (options, name));
}

/* What is kept for each piece (bits.h, changes.h). */
static uint64_t
piece_memory (const struct bitmap_set *set, unsigned granularity_bits)
{
  const uint64_t pieces =
    div_round_up (bitmap_set_nr_bits (set, granularity_bits), PIECE_BITS);

  return BITS_A_PIECE * div_round_up (pieces, 8);
}

uint64_t
bitmap_fixed_memory (const struct bitmap_set *set, unsigned granularity_bits,
                     size_t name_bytes)
{
  return sizeof (struct bitmap) + name_bytes +
    8 * bitmap_table_entries_needed (&set->geometry, granularity_bits) +
    piece_memory (set, granularity_bits);
}

uint64_t
bitmap_fixed_memory_limit (void)
{
  return usable_memory () / 8;
}

/* Check the memory that the bitmaps of a directory take whatever their
 * tables say: for the tables, which cost nothing in a sparse file, and for
 * each piece.  At most an eighth of the memory.
 */
static int
check_fixed_memory (struct bitmap_set *set,
                    const struct bitmap_directory_entry *entries,
                    uint32_t nr_entries, struct bitmap_damage *damage)
{
  uint64_t bytes = 0;

  for (uint32_t i = 0; i < nr_entries; ++i) {
    bytes += sizeof (struct bitmap) + entries[i].name_bytes +
      8 * (uint64_t) entries[i].table_entries;
    if (!(entries[i].flags & BITMAP_FLAG_IN_USE))
      bytes += piece_memory (set, entries[i].granularity_bits);
  }
  set->memory_bytes = bytes;
  if (bytes > bitmap_fixed_memory_limit ())
    return bitmap_damage (damage, "their tables would take more than an "
                          "eighth of the memory that nbdkit can use");
  return 0;
}

/* The bits of all data clusters of all bitmaps, plus the memory checked
 * above, plus both for the images above this one, may take half of the
 * memory.  Clusters that are all zeroes or all ones take nothing.
 */
static int
check_memory (struct bitmap_set *set, const struct bitmap_options *options,
              struct bitmap_damage *damage)
{
  const uint64_t limit = usable_memory () / 2;
  uint64_t others = 0;

  for (size_t i = 0; i < options->nr_above; ++i)
    others += options->above[i]->memory_bytes;

  for (size_t i = 0; i < set->nr_bitmaps; ++i) {
    const struct bitmap *b = set->bitmaps[i];
    uint64_t a_cluster = REGISTERED_BYTES;

    if (b->inconsistent)
      continue;
    if (has_bits (set, options, b->name, b->flags))
      a_cluster += set->geometry.cluster_size_bytes;
    set->memory_bytes += nr_data_clusters (b) * a_cluster;
  }
  if (set->memory_bytes + others > limit)
    return bitmap_damage (damage, "their bits would take more than half of "
                          "the memory that nbdkit can use");
  return 0;
}

/* Tell bits.c where the image has data for a stretch of the bits. */
static void
expect_data (struct bitmap *b, uint64_t cluster_size)
{
  const uint64_t array_bytes = b->bits.nr_pieces * PIECE_BYTES;

  for (uint32_t i = 0, n; i < b->table_entries; i += n) {
    const uint64_t offset = i * cluster_size;

    for (n = 0; i + n < b->table_entries; ++n)
      if (!bitmap_table_entry_is_data (b->table[i + n]))
        break;
    if (n > 0)
      bits_expect (&b->bits, offset,
                   min_u64 (n * cluster_size, array_bytes - offset));
    else
      n = 1;
  }
}

/* Read the bits of a bitmap.  Contiguous data clusters are read together. */
static int
load_bits (struct bitmap_set *set, struct bitmap *b,
           struct bitmap_damage *damage)
{
  const uint64_t cluster_size = set->geometry.cluster_size_bytes;
  const uint64_t array_bytes = b->bits.nr_pieces * PIECE_BYTES;
  uint32_t i = 0, n;

  expect_data (b, cluster_size);
  for (; i < b->table_entries; i += n) {
    uint64_t entry = b->table[i], offset = i * cluster_size, bytes;

    n = 1;
    if (entry == BITMAP_TABLE_ALL_ZEROES)
      continue;
    if (bitmap_table_entry_is_data (entry))
      while (i + n < b->table_entries && n * cluster_size < MAX_READ_BYTES &&
             b->table[i + n] == entry + n * cluster_size)
        n++;
    else
      while (i + n < b->table_entries && b->table[i + n] == entry)
        n++;

    bytes = min_u64 (n * cluster_size, array_bytes - offset);
    if (entry == BITMAP_TABLE_ALL_ONES) {
      if (bits_fill (&b->bits, offset, bytes) == -1)
        return bitmap_damage (damage, "they do not fit into memory");
      continue;
    }
    if (qcow2_read_metadata (set->image, bits_bytes (&b->bits, offset),
                             bytes, entry) == -1)
      return bitmap_damage (damage, "the bits of bitmap '%s' cannot be read",
                            bitmap_show_name (b->name,
                                              strlen (b->name)).text);
    bits_loaded (&b->bits, offset, bytes);
  }
  return 0;
}

/* Read the directory and parse it.  The entries' names are inside *directory.
 */
static int
load_directory (struct bitmap_set *set,
                const struct qcow2_bitmaps_extension *ext,
                uint8_t **directory, struct bitmap_directory_entry **entries,
                struct registered *registered, struct bitmap_damage *damage)
{
  if (bitmap_extension_check (ext, &set->geometry, damage) == -1)
    return -1;
  set->directory_offset = ext->directory_offset;
  set->directory_bytes = ext->directory_size_bytes;
  if (register_clusters (set, QCOW2_BITMAP_DIRECTORY, set->directory_offset,
                         set->directory_bytes, "the bitmap directory", NULL,
                         damage) == -1)
    return -1;
  registered->directory = true;

  *directory = malloc (set->directory_bytes);
  *entries = calloc (ext->nr_bitmaps, sizeof **entries);
  if (*directory == NULL || *entries == NULL)
    return bitmap_damage (damage, "the bitmap directory does not fit into "
                          "memory");
  if (qcow2_read_metadata (set->image, *directory, set->directory_bytes,
                           set->directory_offset) == -1)
    return bitmap_damage (damage, "the bitmap directory cannot be read");
  return bitmap_directory_parse (*directory, set->directory_bytes,
                                 &set->geometry, *entries, ext->nr_bitmaps,
                                 damage);
}

/* Load the bitmaps of a sound directory. */
static int
load_bitmaps (struct bitmap_set *set,
              const struct bitmap_directory_entry *entries,
              uint32_t nr_entries, const struct bitmap_options *options,
              struct registered *registered, struct bitmap_damage *damage)
{
  if (check_fixed_memory (set, entries, nr_entries, damage) == -1)
    return -1;
  if (bitmap_set_reserve (set, nr_entries) == -1)
    return bitmap_damage (damage, "they do not fit into memory");

  for (uint32_t i = 0; i < nr_entries; ++i) {
    const struct bitmap_directory_entry *e = &entries[i];
    CLEANUP_FREE char *name = strndup (e->name, e->name_bytes);
    struct bitmap *b = NULL;

    if (name != NULL)
      b = bitmap_new (e, !options->check_only &&
                      has_bits (set, options, name, e->flags)
                      ? bitmap_set_nr_bits (set, e->granularity_bits) : 0);
    if (b == NULL)
      return bitmap_damage (damage, "they do not fit into memory");
    set->bitmaps[set->nr_bitmaps++] = b;
    b->entry_offset = set->directory_offset + e->offset;
  }

  for (size_t i = 0; i < set->nr_bitmaps; ++i)
    if (!set->bitmaps[i]->inconsistent &&
        load_table (set, set->bitmaps[i], damage) == -1)
      return -1;
  if (check_memory (set, options, damage) == -1)
    return -1;
  for (size_t i = 0; i < set->nr_bitmaps; ++i)
    if (!set->bitmaps[i]->inconsistent &&
        register_bitmap (set, set->bitmaps[i], registered, damage) == -1)
      return -1;
  for (size_t i = 0; !options->check_only && i < set->nr_bitmaps; ++i)
    if (has_bits (set, options, set->bitmaps[i]->name,
                  set->bitmaps[i]->flags) &&
        load_bits (set, set->bitmaps[i], damage) == -1)
      return -1;

  for (size_t i = 0; i < set->nr_bitmaps; ++i)
    if (set->bitmaps[i]->inconsistent)
      register_inconsistent (set, set->bitmaps[i]);
  return 0;
}

static void
load_stale (struct bitmap_set *set, bool check_only)
{
  set->store = STORE_STALE;
  bitmap_damage (&set->damage, qcow2_version (set->image) < 3
                 ? "a version 2 image cannot say whether they are valid"
                 : "the image was changed by a program that does not know "
                 "them");
  if (!check_only)
    report_warning ("%sthe image's bitmaps are not offered: %s; their "
                    "clusters may be leaked, qemu-img check -r leaks frees "
                    "them", set->prefix, set->damage.what);
}

void
bitmap_load (struct bitmap_set *set, const struct bitmap_options *options)
{
  const bool check_only = options->check_only;
  CLEANUP_FREE struct bitmap_directory_entry *entries = NULL;
  CLEANUP_FREE uint8_t *directory = NULL;
  struct registered registered = { 0 };
  struct qcow2_bitmaps_extension ext;
  bool parsed, may_be_auto = false;

  qcow2_get_bitmaps_extension (set->image, &ext);
  if (ext.count == 0)
    return;
  if (qcow2_version (set->image) < 3 || !ext.autoclear) {
    load_stale (set, check_only);
    return;
  }

  parsed = load_directory (set, &ext, &directory, &entries, &registered,
                           &set->damage) == 0;
  if (parsed && load_bitmaps (set, entries, ext.nr_bitmaps, options,
                              &registered, &set->damage) == 0) {
    set->store = STORE_GOOD;
    return;
  }

  set->store = STORE_DAMAGED;
  set->memory_bytes = 0;
  unregister_all (set, &registered);
  while (set->nr_bitmaps > 0)
    bitmap_put (set->bitmaps[--set->nr_bitmaps]);

  for (uint32_t i = 0; parsed && i < ext.nr_bitmaps; ++i)
    may_be_auto |= entries[i].flags == BITMAP_FLAG_AUTO;
  if (check_only)
    return;
  report_warning ("%sthe image's bitmaps cannot be used and none is offered: "
                  "%s", set->prefix, set->damage.what);
  if (!set->readonly && (!parsed || may_be_auto))
    qcow2_distrust_bitmaps (set->image);
}
