/* nbdkit-dirty-bitmap-filter
 * SPDX-License-Identifier: BSD-3-Clause
 * Copyright the nbdkit-dirty-bitmap-filter authors
 */

/* The rules are those that qemu-img check judges by, with its errors
 * (but not its leaks) as errors here: walk everything that the header
 * leads to and count a reference for each cluster found; then hold the
 * counts against the refcounts.
 *
 *   - all that is referred to begins before the end of the file
 *   - no cluster is referred to twice, but by the disk and by snapshots,
 *     each once, as the same thing
 *   - no refcount is less than the references, and that of a refcount
 *     block is 1
 *   - an L1 or L2 entry has COPIED exactly if the refcount is 1
 *   - reserved bits are 0, offsets are aligned
 *   - no subcluster is allocated and zero at once, and none is allocated
 *     where there is no cluster
 *   - a guest cluster is in an external data file where it is in the disk
 *   - bitmaps, if the autoclear bit says that they are valid, are well
 *     formed, and no bit beyond the end of the disk is set
 *   - the name of the backing file is what it was, wherever it is
 *   - if the disk is beside the image, there is no L2 table: the image has
 *     nothing but its bitmaps
 */

#include <config.h>

#include <inttypes.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include <cmocka.h>

#include "common/bytes.h"
#include "crash-check.h"

#define COPIED (UINT64_C (1) << 63)
#define COMPRESSED (UINT64_C (1) << 62)
#define COMPRESSED_REFERENCE 0x80
#define OFFSET_MASK UINT64_C (0x00fffffffffffe00)
#define KIND_L2 1
#define KIND_DATA 2
#define BITMAPS_MAGIC 0x23852875U
#define INCOMPAT_DATA_FILE 4
#define INCOMPAT_EXTENDED_L2 16

static bool wrong (struct checked *k, const char *fmt, ...)
  __attribute__ ((format (printf, 2, 3)));

static bool
wrong (struct checked *k, const char *fmt, ...)
{
  va_list args;

  va_start (args, fmt);
  vsnprintf (k->error, sizeof k->error, fmt, args);
  va_end (args);
  return false;
}

/* Bytes of the image, or NULL if not all of them are there. */
static const uint8_t *
at (const struct checked *k, uint64_t offset, uint64_t count)
{
  return range_exceeds (offset, count, k->image->room)
    ? NULL : k->image->bytes + offset;
}

static bool
refer (struct checked *k, const char *what, uint64_t offset, uint64_t bytes)
{
  const uint64_t cluster_size = UINT64_C (1) << k->cluster_bits;

  if (offset == 0 || offset % cluster_size != 0)
    return wrong (k, "%s at %#" PRIx64 " is not aligned", what, offset);
  if (bytes > INT64_MAX || offset > INT64_MAX)
    return wrong (k, "%s at %#" PRIx64 ", %#" PRIx64 " bytes, is beyond the "
                  "end", what, offset, bytes);
  for (uint64_t c = offset; c < offset + bytes; c += cluster_size) {
    if (c >= k->image->size)
      return wrong (k, "%s at %#" PRIx64 " is beyond the end, %#" PRIx64,
                    what, c, k->image->size);
    if (k->references[c >> k->cluster_bits]++ != 0)
      return wrong (k, "%s at %#" PRIx64 " is used for something else, too",
                    what, c);
  }
  return true;
}

/* What the disk and snapshots may have in common.  Tree 0 is the disk. */
static bool
refer_in_tree (struct checked *k, const char *what, uint8_t kind,
               unsigned tree, uint64_t offset)
{
  const uint8_t mark = kind << 4 | (tree + 1);
  const uint64_t c = offset >> k->cluster_bits;

  if (offset == 0 || offset % (UINT64_C (1) << k->cluster_bits) != 0)
    return wrong (k, "%s at %#" PRIx64 " is not aligned", what, offset);
  if (offset >= k->image->size)
    return wrong (k, "%s at %#" PRIx64 " is beyond the end, %#" PRIx64,
                  what, offset, k->image->size);
  if (k->references[c] != 0 &&
      (k->marks[c] >> 4 != kind || k->marks[c] == mark))
    return wrong (k, "%s at %#" PRIx64 " is used for something else, too",
                  what, offset);
  k->references[c]++;
  k->marks[c] = mark;
  return true;
}

static void
hash_into (uint64_t *hash, const struct checked *k, uint64_t offset,
           uint64_t bytes)
{
  for (uint64_t i = 0; i + 8 <= bytes; i += 8) {
    *hash = (*hash ^ get_be64 (k->image->bytes + offset + i))
      * UINT64_C (0x9e3779b97f4a7c15);
    *hash ^= *hash >> 29;
  }
}

static void
hash_bytes (struct checked *k, uint64_t offset, uint64_t bytes)
{
  hash_into (&k->snapshots, k, offset, bytes);
}

static uint64_t
refcount (const struct checked *k, uint64_t cluster)
{
  const unsigned order = k->refcount_order;
  const unsigned block_bits = k->cluster_bits + 3 - order;
  const uint8_t *header = k->image->bytes;
  const uint64_t entries = get_be32 (header + 56) << (k->cluster_bits - 3);
  const uint64_t in_block = cluster & ((UINT64_C (1) << block_bits) - 1);
  uint64_t block;

  if (cluster >> block_bits >= entries)
    return 0;
  block = get_be64 (header + get_be64 (header + 48)
                    + 8 * (cluster >> block_bits)) & OFFSET_MASK;
  if (block == 0)
    return 0;
  switch (order) {
  case 4: return get_be16 (header + block + 2 * in_block);
  case 5: return get_be32 (header + block + 4 * in_block);
  case 6: return get_be64 (header + block + 8 * in_block);
  default:
    return header[block + (in_block << order) / 8]
      >> (in_block << order) % 8 & ((1U << (1U << order)) - 1);
  }
}

static bool
walk_refcounts (struct checked *k)
{
  const uint8_t *header = k->image->bytes;
  const uint64_t cluster_size = UINT64_C (1) << k->cluster_bits;
  const uint64_t table = get_be64 (header + 48);
  const uint64_t bytes = get_be32 (header + 56) * cluster_size;

  if (!refer (k, "the refcount table", table, bytes))
    return false;
  for (uint64_t i = 0; i < bytes; i += 8) {
    const uint64_t entry = get_be64 (header + table + i);

    if (entry != 0 && (entry & ~OFFSET_MASK) != 0)
      return wrong (k, "refcount table entry %#" PRIx64, entry);
    if (entry != 0 && !refer (k, "a refcount block", entry, cluster_size))
      return false;
  }
  return true;
}

static bool
check_copied (struct checked *k, const char *what, uint64_t entry)
{
  const uint64_t offset = entry & OFFSET_MASK;
  const bool alone = refcount (k, offset >> k->cluster_bits) == 1;

  if (alone != ((entry & COPIED) != 0))
    return wrong (k, "%s %#" PRIx64 " is wrong about being copied",
                  what, entry);
  return true;
}

/* Compressed clusters may share host clusters, with each other only. */
static bool
refer_compressed (struct checked *k, uint64_t entry)
{
  const unsigned x = 62 - (k->cluster_bits - 8);
  const uint64_t sectors = ((entry & ~(UINT64_C (3) << 62)) >> x) + 1;
  const uint64_t offset = entry & ((UINT64_C (1) << x) - 1);
  const uint64_t first = offset >> k->cluster_bits;
  const uint64_t last =
    (round_down (offset, 512) + 512 * sectors - 1) >> k->cluster_bits;

  for (uint64_t c = first; c <= last; ++c) {
    if (c << k->cluster_bits >= k->image->size)
      return wrong (k, "L2 entry %#" PRIx64 " leads beyond the end", entry);
    if (k->references[c] != 0 && !(k->references[c] & COMPRESSED_REFERENCE))
      return wrong (k, "L2 entry %#" PRIx64 " leads to something else", entry);
    k->references[c] = (k->references[c] + 1) | COMPRESSED_REFERENCE;
  }
  return true;
}

/* The subclusters of an L2 entry: allocated ones in the lower half of
 * their bits, zeroes in the upper.
 */
static bool
check_subclusters (struct checked *k, uint64_t entry, uint64_t bits)
{
  const bool without =
    (entry & OFFSET_MASK) == 0 || (entry & COMPRESSED) != 0;

  if ((bits & bits >> 32) != 0 || (without && (uint32_t) bits != 0) ||
      ((entry & COMPRESSED) != 0 && bits != 0) ||
      ((entry & COMPRESSED) == 0 && (entry & 1) != 0))
    return wrong (k, "L2 entry %#" PRIx64 " with subclusters %#" PRIx64,
                  entry, bits);
  return true;
}

/* A cluster of the data file: it is where the guest has it. */
static bool
check_data_file (struct checked *k, uint64_t entry, uint64_t guest_offset)
{
  if ((entry & OFFSET_MASK) == 0 && (entry & COPIED) == 0)
    return true;
  if ((entry & OFFSET_MASK) != guest_offset || (entry & COPIED) == 0)
    return wrong (k, "L2 entry %#" PRIx64 " of guest offset %#" PRIx64
                  " of a data file", entry, guest_offset);
  return true;
}

/* The L2 table whose first entry is that of a guest offset. */
static bool
walk_l2 (struct checked *k, uint64_t table, uint64_t guest_offset,
         unsigned tree)
{
  const uint64_t cluster_size = UINT64_C (1) << k->cluster_bits;
  const unsigned entry_bytes = 1U << k->entry_bits;

  for (uint64_t i = 0; i < cluster_size; i += entry_bytes,
         guest_offset += cluster_size) {
    const uint8_t *p = k->image->bytes + table + i;
    const uint64_t entry = get_be64 (p);

    if (entry_bytes == 16 &&
        !check_subclusters (k, entry, get_be64 (p + 8)))
      return false;

    if ((entry & COMPRESSED) != 0) {
      if (!refer_compressed (k, entry))
        return false;
      continue;
    }
    if ((entry & UINT64_C (0x7f000000000001fe)) != 0 ||
        (k->version == 2 && (entry & 1) != 0))
      return wrong (k, "L2 entry %#" PRIx64, entry);
    if (k->image->data != NULL) {
      if (!check_data_file (k, entry, guest_offset))
        return false;
      continue;
    }
    if ((entry & OFFSET_MASK) == 0)
      continue;
    if (!refer_in_tree (k, "a data cluster", KIND_DATA, tree,
                        entry & OFFSET_MASK) ||
        (tree == 0 && !check_copied (k, "L2 entry", entry)))
      return false;
    if (tree != 0)
      hash_bytes (k, entry & OFFSET_MASK, cluster_size);
  }
  return true;
}

static bool
walk_l1 (struct checked *k, uint64_t l1_offset, uint64_t l1_entries,
         unsigned tree)
{
  if (!refer (k, "the L1 table", l1_offset, 8 * l1_entries))
    return false;
  for (uint64_t i = 0; i < l1_entries; ++i) {
    const uint64_t entry = get_be64 (k->image->bytes + l1_offset + 8 * i);
    const uint64_t table = entry & OFFSET_MASK;

    if ((entry & ~(COPIED | OFFSET_MASK)) != 0)
      return wrong (k, "L1 entry %#" PRIx64, entry);
    if (entry == 0)
      continue;
    if (k->image->beside)
      return wrong (k, "there is an L2 table, though the disk is beside");
    if (!refer_in_tree (k, "an L2 table", KIND_L2, tree, table) ||
        (tree == 0 && !check_copied (k, "L1 entry", entry)))
      return false;
    if (tree != 0)
      hash_bytes (k, table, UINT64_C (1) << k->cluster_bits);
    if (!walk_l2 (k, table, i << (2 * k->cluster_bits - k->entry_bits),
                  tree))
      return false;
  }
  return true;
}

/* All of it is in k->snapshots. */
static bool
walk_snapshots (struct checked *k)
{
  const uint8_t *p = k->image->bytes;
  const uint32_t nr = get_be32 (p + 60);
  const uint64_t table = get_be64 (p + 64);
  uint64_t end = table;

  if (nr > CHECKED_MAX_SNAPSHOTS)
    return wrong (k, "there are %" PRIu32 " snapshots", nr);
  k->snapshots = nr;
  for (uint32_t i = 0; i < nr; ++i) {
    const uint8_t *entry = p + round_up (end, 8);

    if (at (k, round_up (end, 8), 40) == NULL)
      return wrong (k, "the snapshot table leads nowhere");
    end = round_up (end, 8) + 40 + get_be16 (entry + 12)
      + get_be16 (entry + 14) + get_be32 (entry + 36);
    if (at (k, get_be64 (entry), 8 * get_be32 (entry + 8)) == NULL)
      return wrong (k, "the L1 table of a snapshot is nowhere");
    hash_bytes (k, get_be64 (entry), 8 * get_be32 (entry + 8));
    if (!walk_l1 (k, get_be64 (entry), get_be32 (entry + 8), i + 1))
      return false;
  }
  hash_bytes (k, table, round_up (end, 8) - table);
  return nr == 0 || refer (k, "the snapshot table", table, end - table);
}

/* Read the bits of one bitmap. */
static bool
walk_table (struct checked *k, struct checked_bitmap *b, uint64_t table,
            uint32_t entries)
{
  const uint64_t cluster_size = UINT64_C (1) << k->cluster_bits;
  const uint64_t bytes = div_round_up (b->nr_bits, 8);

  if (entries != div_round_up (bytes, cluster_size))
    return wrong (k, "bitmap %s has %" PRIu32 " entries", b->name, entries);
  if (!refer (k, "a bitmap table", table, 8 * (uint64_t) entries))
    return false;
  b->bits = calloc (entries, cluster_size);
  assert_non_null (b->bits);
  for (uint64_t i = 0; i < entries; ++i) {
    const uint64_t entry = get_be64 (k->image->bytes + table + 8 * i);

    if (entry == 1)
      memset (b->bits + i * cluster_size, 0xff, cluster_size);
    else if (entry != 0) {
      if (!refer (k, "a cluster of bits", entry, cluster_size))
        return false;
      memcpy (b->bits + i * cluster_size, k->image->bytes + entry,
              cluster_size);
    }
  }
  if (b->nr_bits % 8 != 0 && b->bits[bytes - 1] >> b->nr_bits % 8 != 0)
    return wrong (k, "bitmap %s: a bit beyond the end is set", b->name);
  for (uint64_t i = bytes; i < entries * cluster_size; ++i)
    if (b->bits[i] != 0)
      return wrong (k, "bitmap %s: a byte beyond the end is set", b->name);
  return true;
}

static bool
walk_entry (struct checked *k, const uint8_t *p, size_t *entry_bytes)
{
  struct checked_bitmap *b = &k->bitmaps[k->nr_bitmaps];
  const uint16_t name_bytes = get_be16 (p + 18);

  if (k->nr_bitmaps == CHECKED_MAX_BITMAPS || p[16] != 1 ||
      get_be32 (p + 20) != 0 || name_bytes == 0 ||
      name_bytes >= sizeof b->name || p[17] < 9 || p[17] > 31)
    return wrong (k, "directory entry %zu is invalid", k->nr_bitmaps);
  k->nr_bitmaps++;
  memset (b, 0, sizeof *b);
  memcpy (b->name, p + 24, name_bytes);
  b->flags = get_be32 (p + 12);
  b->granularity_bits = p[17];
  b->nr_bits = div_round_up (k->disk_size,
                             UINT64_C (1) << b->granularity_bits);
  if ((b->flags & ~3U) != 0)
    return wrong (k, "bitmap %s has flags %#" PRIx32, b->name, b->flags);
  *entry_bytes = round_up (24 + name_bytes, 8);
  return walk_table (k, b, get_be64 (p), get_be32 (p + 8));
}

static bool
walk_directory (struct checked *k, const uint8_t *extension)
{
  const uint32_t nr = get_be32 (extension);
  const uint64_t bytes = get_be64 (extension + 8);
  const uint64_t offset = get_be64 (extension + 16);
  uint64_t done = 0;

  if (nr == 0 || get_be32 (extension + 4) != 0)
    return wrong (k, "the bitmaps extension is invalid");
  if (!refer (k, "the bitmap directory", offset, bytes))
    return false;
  while (done < bytes) {
    size_t entry_bytes = 0;

    if (!walk_entry (k, k->image->bytes + offset + done, &entry_bytes))
      return false;
    done += entry_bytes;
  }
  if (done != bytes || k->nr_bitmaps != nr)
    return wrong (k, "the bitmap directory does not add up");
  return true;
}

static bool
walk_extensions (struct checked *k)
{
  const uint8_t *header = k->image->bytes, *bitmaps = NULL;
  const uint64_t limit = k->image->backing != NULL
    ? get_be64 (header + 8) : UINT64_C (1) << k->cluster_bits;
  uint64_t pos = k->version == 2 ? 72 : get_be32 (header + 100);

  if (k->version >= 3) {
    k->trusted = get_be64 (header + 88) & 1;
    k->stale = header[88] & UNKNOWN_AUTOCLEAR;
  }
  while (pos + 8 <= limit) {
    const uint32_t magic = get_be32 (header + pos);
    const uint32_t bytes = get_be32 (header + pos + 4);

    if (magic == 0)
      break;
    if (bytes > limit - pos - 8)
      return wrong (k, "a header extension of %" PRIu32 " bytes", bytes);
    k->has_extension |= magic == BITMAPS_MAGIC;
    if (magic == BITMAPS_MAGIC) {
      if (bytes != 24)
        return wrong (k, "the bitmaps extension has %" PRIu32 " bytes", bytes);
      bitmaps = header + pos + 8;
    }
    pos += 8 + round_up (bytes, 8);
  }
  if (!k->trusted)
    return true;
  k->trusts_damaged = k->image->damaged;
  return k->trusts_damaged ? true : bitmaps == NULL
    ? wrong (k, "the autoclear bit is set but there are no bitmaps")
    : walk_directory (k, bitmaps);
}

static bool
check_backing_name (struct checked *k)
{
  const struct crash_backing *backing = k->image->backing;
  const uint8_t *p = k->image->bytes;
  const uint64_t offset = get_be64 (p + 8);
  const uint32_t bytes = get_be32 (p + 16);

  if (backing == NULL)
    return offset == 0 || wrong (k, "there is a backing file");
  if (range_exceeds (offset, bytes, UINT64_C (1) << k->cluster_bits) ||
      bytes != strlen (backing->name) ||
      memcmp (p + offset, backing->name, bytes) != 0)
    return wrong (k, "the backing file's name at %#" PRIx64
                  " is not what it was", offset);
  return true;
}

/* All but the places of the backing file's name and of the refcount table,
 * and the bits of features.
 */
static void
hash_header (struct checked *k)
{
  hash_into (&k->header, k, 0, 8);
  hash_into (&k->header, k, 16, 32);
  hash_into (&k->header, k, 60, 8);
  hash_into (&k->header, k, 64, 8);
  if (k->version == 2)
    return;
  hash_into (&k->header, k, 80, 8);
  hash_into (&k->header, k, 96, 8);
}

/* The disk is not in the image, but has its size. */
static bool
use_disk_beside (struct checked *k)
{
  const uint64_t size = k->image->data->size;

  if (round_up (size, 512) != k->disk_size)
    return wrong (k, "the disk beside the image has another size");
  k->disk_size = size;
  k->unit_bits = 9;
  k->trim_bits = 0;
  return true;
}

static bool
read_header (struct checked *k)
{
  const uint8_t *p = k->image->bytes;
  uint64_t tables, incompatible;

  k->version = get_be32 (p + 4);
  incompatible = k->version == 2 ? 0 : get_be64 (p + 72);
  if (get_be32 (p) != 0x514649fb || k->version < 2 || k->version > 3 ||
      (incompatible & ~(uint64_t) INCOMPAT_EXTENDED_L2) !=
      (k->image->data != NULL && !k->image->beside ? INCOMPAT_DATA_FILE : 0))
    return wrong (k, "the header is not what it was");
  k->cluster_bits = get_be32 (p + 20);
  k->entry_bits = incompatible & INCOMPAT_EXTENDED_L2 ? 4 : 3;
  k->unit_bits = k->cluster_bits - (k->entry_bits == 4 ? 5 : 0);
  k->trim_bits = k->unit_bits;
  k->disk_size = get_be64 (p + 24);
  k->l1_entries = get_be32 (p + 36);
  k->l1_offset = get_be64 (p + 40);
  k->refcount_order = k->version == 2 ? 4 : get_be32 (p + 96);
  tables = get_be32 (p + 56) * (UINT64_C (1) << k->cluster_bits);
  if (at (k, k->l1_offset, 8 * k->l1_entries) == NULL ||
      at (k, get_be64 (p + 48), tables) == NULL)
    return wrong (k, "the header leads nowhere");
  hash_header (k);
  return check_backing_name (k) &&
    (!k->image->beside || use_disk_beside (k));
}

static bool
compare_refcounts (struct checked *k)
{
  const uint64_t nr = k->image->room >> k->cluster_bits;
  const uint8_t *header = k->image->bytes;
  const uint64_t table = get_be64 (header + 48);
  const uint64_t entries = get_be32 (header + 56) << (k->cluster_bits - 3);

  for (uint64_t c = 0; c < nr; ++c) {
    const uint64_t count = refcount (k, c);

    const unsigned references = k->references[c] & ~COMPRESSED_REFERENCE;

    if (count < references)
      return wrong (k, "cluster %#" PRIx64 " has the refcount %" PRIu64
                    " and is used", c << k->cluster_bits, count);
    k->nr_leaked += count > references;
  }
  for (uint64_t i = 0; i < entries; ++i) {
    const uint64_t block = get_be64 (header + table + 8 * i);

    if (block != 0 && refcount (k, block >> k->cluster_bits) != 1)
      return wrong (k, "a refcount block counts itself %" PRIu64 " times",
                    refcount (k, block >> k->cluster_bits));
  }
  return true;
}

bool
check_image (struct checked *k, const struct crash_image *image)
{
  memset (k, 0, sizeof *k);
  k->image = image;
  if (!read_header (k))
    return false;
  k->references = calloc ((image->room >> k->cluster_bits) + 1, 1);
  assert_non_null (k->references);
  k->marks = calloc ((image->room >> k->cluster_bits) + 1, 1);
  assert_non_null (k->marks);
  k->references[0] = 1;
  return walk_refcounts (k) &&
    walk_l1 (k, k->l1_offset, k->l1_entries, 0) && walk_snapshots (k) &&
    walk_extensions (k) &&
    compare_refcounts (k);
}

void
checked_free (struct checked *k)
{
  for (size_t i = 0; i < CHECKED_MAX_BITMAPS; ++i)
    free (k->bitmaps[i].bits);
  free (k->references);
  free (k->marks);
}

struct checked_bitmap *
checked_find (struct checked *k, const char *name)
{
  for (size_t i = 0; i < k->nr_bitmaps; ++i)
    if (strcmp (k->bitmaps[i].name, name) == 0)
      return &k->bitmaps[i];
  return NULL;
}

/* What shines through from below. */
static const uint8_t *
backing_unit (const struct checked *k, uint64_t unit)
{
  const struct crash_backing *backing = k->image->backing;
  const uint64_t offset = unit << k->unit_bits;

  if (backing == NULL || offset >= backing->size)
    return NULL;
  assert_true (offset + (UINT64_C (1) << k->unit_bits) <= backing->room);
  return backing->bytes + offset;
}

/* The L2 entry of a guest cluster, or NULL if there is no L2 table. */
static const uint8_t *
entry_of (const struct checked *k, uint64_t guest_cluster)
{
  const unsigned l2_bits = k->cluster_bits - k->entry_bits;
  const uint64_t in_l2 = guest_cluster & ((UINT64_C (1) << l2_bits) - 1);
  const uint8_t *p = k->image->bytes;
  const uint64_t table =
    get_be64 (p + k->l1_offset + 8 * (guest_cluster >> l2_bits))
    & OFFSET_MASK;

  return table == 0 ? NULL : p + table + (in_l2 << k->entry_bits);
}

const uint8_t *
checked_unit (const struct checked *k, uint64_t unit)
{
  if (k->served != NULL)
    return k->served + (unit << k->unit_bits);
  if (k->image->beside)
    return k->image->data->bytes + (unit << k->unit_bits);

  const unsigned sub_bits = k->cluster_bits - k->unit_bits;
  const unsigned sub = unit & ((1U << sub_bits) - 1);
  const uint8_t *const at = entry_of (k, unit >> sub_bits);
  uint64_t entry, bits;

  if (at == NULL)
    return backing_unit (k, unit);
  entry = get_be64 (at);
  if (sub_bits != 0) {
    bits = get_be64 (at + 8);
    if ((bits >> 32 >> sub & 1) != 0)
      return NULL;
    if ((bits >> sub & 1) == 0)
      return backing_unit (k, unit);
  }
  else if ((entry & 1) != 0)
    return NULL;
  if (k->image->data != NULL)
    return (entry & COPIED) == 0 ? backing_unit (k, unit)
      : k->image->data->bytes + (entry & OFFSET_MASK)
      + ((uint64_t) sub << k->unit_bits);
  if ((entry & OFFSET_MASK) == 0)
    return backing_unit (k, unit);
  return k->image->bytes + (entry & OFFSET_MASK)
    + ((uint64_t) sub << k->unit_bits);
}

bool
checked_is_compressed (const struct checked *k, uint64_t guest_cluster)
{
  const uint8_t *const at = entry_of (k, guest_cluster);

  return at != NULL && get_be64 (at) >> 62 & 1;
}
