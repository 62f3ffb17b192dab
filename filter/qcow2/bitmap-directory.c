/* nbdkit-dirty-bitmap-filter
 * SPDX-License-Identifier: BSD-3-Clause
 * Copyright the nbdkit-dirty-bitmap-filter authors
 */

/* The bitmaps extension on disk.
 *
 * All numbers are big-endian.  A directory entry is 24 bytes of fields,
 * extra data (which no known program writes and QEMU refuses), the name, and
 * padding to 8 bytes.  The entries follow one another.  Their sizes must add
 * up to the directory's size, and their number must be the header's.
 *
 * Everything here is untrusted.  A field is checked before it is used to
 * reach another: no entry is read beyond the directory, and numbers of at
 * most 32 bits are added in 64 bits.
 */

#include <config.h>

#include <errno.h>
#include <inttypes.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "common/bytes.h"
#include "common/cleanup.h"
#include "qcow2/bitmap-directory.h"
#include "qcow2/qcow2.h"

/* The fields of a directory entry, all of them big-endian.  The name
 * follows.
 */
struct entry_on_disk {
  uint8_t table_offset[8], table_entries[4];
  uint8_t flags[4];
  uint8_t type, granularity_bits;
  uint8_t name_bytes[2];
  uint8_t extra_data_bytes[4];
};

#define ENTRY_FIXED_BYTES sizeof (struct entry_on_disk)

_Static_assert (ENTRY_FIXED_BYTES == 24, "a directory entry");
_Static_assert (offsetof (struct entry_on_disk, flags) ==
                BITMAP_ENTRY_FLAGS_OFFSET, "the flags of a directory entry");

#define ENTRY_TYPE_DIRTY_TRACKING 1

#define TABLE_RESERVED_MASK UINT64_C (0xff000000000001fe)
#define TABLE_OFFSET_MASK   UINT64_C (0x00fffffffffffe00)

int
bitmap_damage (struct bitmap_damage *damage, const char *fmt, ...)
{
  va_list args;

  va_start (args, fmt);
  vsnprintf (damage->what, sizeof damage->what, fmt, args);
  va_end (args);
  return -1;
}

struct bitmap_shown_name
bitmap_show_name (const char *name, size_t name_bytes)
{
  struct bitmap_shown_name shown;
  size_t used = 0;

  for (size_t i = 0; i < name_bytes; ++i) {
    unsigned char c = name[i];

    /* Room for one escape, the dots and the end. */
    if (used + 8 > sizeof shown.text) {
      memcpy (&shown.text[used], "...", 3);
      used += 3;
      break;
    }
    if (c < 0x20 || c == 0x7f)
      used += sprintf (&shown.text[used], "\\x%02x", c);
    else
      shown.text[used++] = c;
  }
  shown.text[used] = '\0';
  return shown;
}

uint64_t
bitmap_table_entries_needed (const struct bitmap_geometry *geometry,
                             unsigned granularity_bits)
{
  uint64_t nr_bits = div_round_up (geometry->disk_size_bytes,
                                   UINT64_C (1) << granularity_bits);

  return div_round_up (div_round_up (nr_bits, 8),
                       geometry->cluster_size_bytes);
}

int
bitmap_extension_check (const struct qcow2_bitmaps_extension *ext,
                        const struct bitmap_geometry *geometry,
                        struct bitmap_damage *damage)
{
  if (ext->count != 1)
    return bitmap_damage (damage, "the header has %u bitmaps extensions",
                          ext->count);
  if (ext->length != 24)
    return bitmap_damage (damage,
                          "the bitmaps extension is %" PRIu32 " bytes long, "
                          "not 24", ext->length);
  if (ext->reserved != 0)
    return bitmap_damage (damage, "the bitmaps extension's reserved field "
                          "is not zero");
  if (ext->nr_bitmaps == 0)
    return bitmap_damage (damage, "the bitmaps extension has no bitmaps");
  if (ext->nr_bitmaps > BITMAP_MAX_BITMAPS)
    return bitmap_damage (damage, "the image has %" PRIu32 " bitmaps, more "
                          "than the maximum of %d",
                          ext->nr_bitmaps, BITMAP_MAX_BITMAPS);
  if (ext->directory_size_bytes == 0)
    return bitmap_damage (damage, "the bitmap directory's size is zero");
  if (ext->directory_size_bytes > BITMAP_MAX_DIRECTORY_BYTES)
    return bitmap_damage (damage, "the bitmap directory's size is %" PRIu64
                          ", more than the maximum of %d",
                          ext->directory_size_bytes,
                          BITMAP_MAX_DIRECTORY_BYTES);
  if (ext->directory_offset == 0 ||
      ext->directory_offset % geometry->cluster_size_bytes != 0)
    return bitmap_damage (damage, "the bitmap directory's offset %#" PRIx64
                          " is not that of a cluster", ext->directory_offset);
  if (range_exceeds (ext->directory_offset, ext->directory_size_bytes,
                     geometry->container_size_bytes))
    return bitmap_damage (damage, "the bitmap directory at %#" PRIx64
                          " lies beyond the end of the image",
                          ext->directory_offset);
  return 0;
}

/* Check the fields of an entry whose name is known to be inside the
 * directory.
 */
static int
check_fields (const struct bitmap_directory_entry *e, unsigned type,
              const struct bitmap_geometry *geometry,
              struct bitmap_damage *damage)
{
  struct bitmap_shown_name shown = bitmap_show_name (e->name, e->name_bytes);
  uint32_t cluster_size = geometry->cluster_size_bytes;

  if (memchr (e->name, 0, e->name_bytes) != NULL)
    return bitmap_damage (damage, "the name of bitmap '%s' has a NUL inside",
                          shown.text);
  if (e->flags & ~(BITMAP_FLAG_IN_USE | BITMAP_FLAG_AUTO))
    return bitmap_damage (damage, "bitmap '%s' has unknown flags %#" PRIx32,
                          shown.text, e->flags);
  if (type != ENTRY_TYPE_DIRTY_TRACKING)
    return bitmap_damage (damage, "bitmap '%s' has the unknown type %u",
                          shown.text, type);
  if (e->granularity_bits < BITMAP_MIN_GRANULARITY_BITS ||
      e->granularity_bits > BITMAP_MAX_GRANULARITY_BITS)
    return bitmap_damage (damage, "bitmap '%s' has a granularity of 2^%u "
                          "bytes", shown.text, e->granularity_bits);
  if (e->table_offset == 0 || e->table_offset % cluster_size != 0)
    return bitmap_damage (damage, "the table of bitmap '%s' is at %#" PRIx64
                          ", which is not the offset of a cluster",
                          shown.text, e->table_offset);
  if (e->table_entries == 0 || e->table_entries > BITMAP_MAX_TABLE_ENTRIES ||
      (uint64_t) e->table_entries * cluster_size > BITMAP_MAX_STORED_BYTES)
    return bitmap_damage (damage, "the table of bitmap '%s' has %" PRIu32
                          " entries", shown.text, e->table_entries);

  /* A program that resized the disk may not have updated a bitmap in use. */
  if (!(e->flags & BITMAP_FLAG_IN_USE) &&
      e->table_entries != bitmap_table_entries_needed (geometry,
                                                       e->granularity_bits))
    return bitmap_damage (damage, "the table of bitmap '%s' has %" PRIu32
                          " entries, but the disk's size asks for %" PRIu64,
                          shown.text, e->table_entries,
                          bitmap_table_entries_needed (geometry,
                                                       e->granularity_bits));
  return 0;
}

/* Parse the entry at p, of which at most max bytes are in the
 * directory.  Returns the entry's size, or 0 on damage.
 */
static size_t
parse_entry (const uint8_t *p, size_t max,
             const struct bitmap_geometry *geometry,
             struct bitmap_directory_entry *e, struct bitmap_damage *damage)
{
  if (max < ENTRY_FIXED_BYTES) {
    bitmap_damage (damage, "the bitmap directory ends inside of an entry");
    return 0;
  }

  const struct entry_on_disk *d = (const struct entry_on_disk *) p;
  uint32_t extra_data_bytes = get_be32 (d->extra_data_bytes);

  e->table_offset = get_be64 (d->table_offset);
  e->table_entries = get_be32 (d->table_entries);
  e->flags = get_be32 (d->flags);
  e->granularity_bits = d->granularity_bits;
  e->name_bytes = get_be16 (d->name_bytes);
  e->name = (const char *) p + ENTRY_FIXED_BYTES;

  if (extra_data_bytes != 0) {
    bitmap_damage (damage, "a bitmap has extra data, which is not supported");
    return 0;
  }
  if (e->name_bytes == 0 || e->name_bytes > BITMAP_MAX_NAME_BYTES) {
    bitmap_damage (damage, "the name of a bitmap is %u bytes long, not 1 to "
                   "%d", e->name_bytes, BITMAP_MAX_NAME_BYTES);
    return 0;
  }

  size_t bytes = bitmap_directory_entry_bytes (e->name_bytes);

  if (bytes > max) {
    bitmap_damage (damage, "the bitmap directory ends inside of an entry");
    return 0;
  }
  return check_fields (e, d->type, geometry, damage) == 0 ? bytes : 0;
}

static int
compare_names (const void *ap, const void *bp)
{
  const struct bitmap_directory_entry *a =
    *(const struct bitmap_directory_entry *const *) ap;
  const struct bitmap_directory_entry *b =
    *(const struct bitmap_directory_entry *const *) bp;

  if (a->name_bytes != b->name_bytes)
    return a->name_bytes < b->name_bytes ? -1 : 1;
  return memcmp (a->name, b->name, a->name_bytes);
}

/* Sort rather than hash: the author of the image may have chosen names that
 * collide.
 */
static int
check_names_unique (const struct bitmap_directory_entry *entries,
                    uint32_t nr_entries, struct bitmap_damage *damage)
{
  CLEANUP_FREE const struct bitmap_directory_entry **sorted =
    calloc (nr_entries, sizeof *sorted);

  if (sorted == NULL)
    return bitmap_damage (damage, "out of memory");
  for (uint32_t i = 0; i < nr_entries; ++i)
    sorted[i] = &entries[i];
  qsort (sorted, nr_entries, sizeof *sorted, compare_names);

  for (uint32_t i = 1; i < nr_entries; ++i)
    if (compare_names (&sorted[i - 1], &sorted[i]) == 0)
      return bitmap_damage (damage, "two bitmaps have the name '%s'",
                            bitmap_show_name (sorted[i]->name,
                                              sorted[i]->name_bytes).text);
  return 0;
}

int
bitmap_directory_parse (const uint8_t *directory, size_t directory_bytes,
                        const struct bitmap_geometry *geometry,
                        struct bitmap_directory_entry *entries,
                        uint32_t nr_entries, struct bitmap_damage *damage)
{
  size_t offset = 0;

  for (uint32_t i = 0; i < nr_entries; ++i) {
    size_t bytes;

    if (offset == directory_bytes)
      return bitmap_damage (damage, "the bitmap directory has %" PRIu32
                            " bitmaps, the header says %" PRIu32,
                            i, nr_entries);
    entries[i].offset = offset;
    bytes = parse_entry (directory + offset, directory_bytes - offset,
                         geometry, &entries[i], damage);
    if (bytes == 0)
      return -1;
    offset += bytes;
  }
  if (offset != directory_bytes)
    return bitmap_damage (damage, "the bitmap directory has more than the %"
                          PRIu32 " bitmaps that the header says", nr_entries);
  return check_names_unique (entries, nr_entries, damage);
}

int
bitmap_directory_check_new (const char *name, uint64_t granularity,
                            const struct bitmap_geometry *geometry,
                            uint64_t nr_entries, uint64_t directory_bytes,
                            struct bitmap_damage *damage)
{
  size_t name_bytes = strlen (name);

  if (name_bytes == 0)
    return bitmap_damage (damage, "bitmap name cannot be empty");
  if (name_bytes > BITMAP_MAX_NAME_BYTES)
    return bitmap_damage (damage, "name length exceeds maximum (%d "
                          "characters)", BITMAP_MAX_NAME_BYTES);
  if (!is_power_of_2 (granularity) ||
      granularity < UINT64_C (1) << BITMAP_MIN_GRANULARITY_BITS)
    return bitmap_damage (damage, "granularity must be power of 2 and at "
                          "least 512");
  if (granularity > UINT64_C (1) << BITMAP_MAX_GRANULARITY_BITS)
    return bitmap_damage (damage, "granularity exceeds maximum (2147483648 "
                          "bytes)");
  if (geometry->disk_size_bytes == 0)
    return bitmap_damage (damage, "the disk's size is zero");
  if (nr_entries >= BITMAP_MAX_BITMAPS)
    return bitmap_damage (damage, "maximum number of persistent bitmaps is "
                          "already reached");
  if (directory_bytes + bitmap_directory_entry_bytes (name_bytes) >
      BITMAP_MAX_DIRECTORY_BYTES)
    return bitmap_damage (damage, "not enough space in the bitmap directory");

  uint64_t nr_bits = div_round_up (geometry->disk_size_bytes, granularity);

  /* Since every cluster size divides this limit, it is the one that
   * check_fields applies to the table, too.
   */
  if (div_round_up (nr_bits, 8) > BITMAP_MAX_STORED_BYTES)
    return bitmap_damage (damage, "too much space will be occupied by the "
                          "bitmap, use larger granularity");
  return 0;
}

size_t
bitmap_directory_entry_bytes (size_t name_bytes)
{
  return round_up (ENTRY_FIXED_BYTES + name_bytes, 8);
}

size_t
bitmap_directory_put (uint8_t *p, const struct bitmap_directory_entry *e)
{
  size_t bytes = bitmap_directory_entry_bytes (e->name_bytes);

  struct entry_on_disk *d = (struct entry_on_disk *) p;

  memset (p, 0, bytes);
  put_be64 (d->table_offset, e->table_offset);
  put_be32 (d->table_entries, e->table_entries);
  put_be32 (d->flags, e->flags);
  d->type = ENTRY_TYPE_DIRTY_TRACKING;
  d->granularity_bits = e->granularity_bits;
  put_be16 (d->name_bytes, e->name_bytes);
  memcpy (p + ENTRY_FIXED_BYTES, e->name, e->name_bytes);
  return bytes;
}

bool
bitmap_table_entry_is_valid (uint64_t entry, uint32_t cluster_size_bytes)
{
  uint64_t offset = entry & TABLE_OFFSET_MASK;

  if (entry & TABLE_RESERVED_MASK)
    return false;
  if (offset == 0)
    return true;
  return !(entry & BITMAP_TABLE_ALL_ONES) && offset % cluster_size_bytes == 0;
}

void
bitmap_table_get (uint64_t *table, uint32_t nr_entries)
{
  for (uint32_t i = 0; i < nr_entries; ++i)
    table[i] = get_be64 (&table[i]);
}

void
bitmap_table_put (void *p, const uint64_t *table, uint32_t nr_entries)
{
  for (uint32_t i = 0; i < nr_entries; ++i)
    put_be64 ((uint8_t *) p + 8 * (size_t) i, table[i]);
}
