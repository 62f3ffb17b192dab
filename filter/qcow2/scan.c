/* nbdkit-dirty-bitmap-filter
 * SPDX-License-Identifier: BSD-3-Clause
 * Copyright the nbdkit-dirty-bitmap-filter authors
 */

/* Counting, in RAM, what refers to each host cluster.
 *
 * Everything that the format defines is walked: the header, the refcount
 * table and its blocks, the L1 tables of the disk and of the snapshots with
 * their L2 tables and guest data, compressed clusters (each host cluster
 * that their sectors touch), the snapshot table, and the bitmaps extension.
 * The scan reads from disk, past all caches, so it is only for an image that
 * is being opened.
 *
 * A counter has 32 bits: what kind of structure uses the cluster, whether
 * the disk itself does (not only a snapshot), and how often.  The array has
 * one counter for each cluster of the container, and costs memory only where
 * there is something to count.
 *
 * What a scan finds:
 *
 *   SCAN_DONE           the counts are true; if the scan is complete,
 *                       nothing else can refer to a cluster
 *   SCAN_TOO_MUCH       the limits were reached: nothing is known
 *   SCAN_INCONSISTENT   no refcounts can make this image sound
 *   SCAN_FAILED         reading failed, or memory ran out
 *
 * A scan is not complete if there may be references that we do not know:
 * unknown header extensions and feature bits, and bitmaps that are damaged
 * or untrusted.  A cluster that only these use counts as unused, so only a
 * complete scan proves that a cluster is a leak.
 *
 * Two users of one cluster are inconsistent, with two exceptions.
 * Compressed clusters share the cluster where one ends and the next begins.
 * Every L1 table may use each L2 table and each data cluster of snapshots
 * once.
 */

#include <config.h>

#include <errno.h>
#include <inttypes.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>

#include "common/clock.h"
#include "qcow2/bitmap-directory.h"
#include "qcow2/internal.h"

#define COUNT_MASK ((UINT32_C (1) << 28) - 1)
#define ACTIVE (UINT32_C (1) << 28)
#define KIND_SHIFT 29

enum kind {
  KIND_METADATA = 1,            /* used once */
  KIND_L2_TABLE,
  KIND_DATA,
  KIND_COMPRESSED,
};

/* The most bytes that one read covers, where tables are adjacent; and the
 * number of reads before the clock is read for the first time.
 */
#define MAX_READ (UINT64_C (1) << 20)
#define FREE_READS 16

/* End the scan here, and say why. */
static enum scan_result end (struct scan *s, enum scan_result result,
                             const char *fmt, ...)
  __attribute__ ((format (printf, 3, 4)));

static enum scan_result
end (struct scan *s, enum scan_result result, const char *fmt, ...)
{
  va_list args;

  va_start (args, fmt);
  vsnprintf (s->why, sizeof s->why, fmt, args);
  va_end (args);
  return result;
}

/* Note that there may be unknown references. */
static void
incomplete (struct scan *s, const char *why)
{
  if (s->complete)
    end (s, SCAN_DONE, "%s", why);
  s->complete = false;
}

/* Called before so many bytes are read. */
static enum scan_result
spend (struct scan *s, uint64_t bytes)
{
  if (bytes > s->limits.bytes - min_u64 (s->spent, s->limits.bytes))
    return end (s, SCAN_TOO_MUCH, "it has more than %" PRIu64 " bytes of "
                "metadata", s->limits.bytes);
  s->spent += bytes;
  return SCAN_DONE;
}

static enum scan_result
read_bytes (struct qcow2 *q, struct scan *s, void *buf, size_t count,
            uint64_t offset)
{
  if (s->limits.ms != 0 && s->reads++ >= FREE_READS &&
      now_ms () - s->began > s->limits.ms)
    return end (s, SCAN_TOO_MUCH, "its metadata takes more than %u ms to read",
                s->limits.ms);
  if (container_pread (q->container, buf, count, offset) == -1)
    return end (s, SCAN_FAILED, "cannot read %zu bytes at host offset %#"
                PRIx64 ": %s", count, offset, strerror (errno));
  return SCAN_DONE;
}

static enum scan_result
allocate (struct scan *s, void **p, uint64_t bytes)
{
  *p = malloc (bytes + 1);
  return *p == NULL ? end (s, SCAN_FAILED, "malloc: %s", strerror (errno))
    : SCAN_DONE;
}

/* Count one more user of a cluster. */
static enum scan_result
refer (struct qcow2 *q, struct scan *s, uint64_t cluster, enum kind kind,
       bool active)
{
  const uint64_t host = cluster << q->cluster_bits;
  uint32_t *r;

  /* The sectors of the last compressed cluster may end in the next. */
  if (cluster >= s->nr + (kind == KIND_COMPRESSED))
    return end (s, SCAN_INCONSISTENT, "host offset %#" PRIx64 " is referred "
                "to, beyond the end of the file", host);
  r = &s->references[cluster];
  if (*r != 0 &&
      (*r >> KIND_SHIFT != kind || kind == KIND_METADATA ||
       (kind != KIND_COMPRESSED && (*r & COUNT_MASK) >= s->nr_trees)))
    return end (s, SCAN_INCONSISTENT, "the cluster at host offset %#" PRIx64
                " is used for two things", host);
  if ((*r & COUNT_MASK) >= s->max_count)
    return end (s, SCAN_INCONSISTENT, "the cluster at host offset %#" PRIx64
                " is used more often than its refcount can say", host);
  *r = (*r + 1) | (uint32_t) kind << KIND_SHIFT | (active ? ACTIVE : 0);
  s->end = max_u64 (s->end, cluster + 1);
  return SCAN_DONE;
}

static enum scan_result
refer_metadata (struct qcow2 *q, struct scan *s, const char *what,
                uint64_t offset, uint64_t bytes)
{
  const uint64_t first = offset >> q->cluster_bits;
  const uint64_t nr = div_round_up (bytes, q->cluster_size);
  enum scan_result r = SCAN_DONE;

  if (bytes == 0)
    return SCAN_DONE;
  if (offset == 0 || offset % q->cluster_size != 0 || nr > s->nr)
    return end (s, SCAN_INCONSISTENT, "%s at host offset %#" PRIx64
                " has an invalid offset or size", what, offset);
  for (uint64_t i = 0; i < nr && r == SCAN_DONE; ++i)
    r = refer (q, s, first + i, KIND_METADATA, false);
  return r;
}

/* The header, the refcount table and blocks. */
static enum scan_result
walk_fixed (struct qcow2 *q, struct scan *s)
{
  const struct refcounts *rc = &q->rc;
  enum scan_result r = refer (q, s, 0, KIND_METADATA, false);

  if (r == SCAN_DONE)
    r = refer_metadata (q, s, "the refcount table", rc->table_offset,
                        rc->table_entries * 8);
  for (uint64_t i = 0; i < rc->table_entries && r == SCAN_DONE; ++i)
    if (rc->table[i] != 0) {
      r = refer_metadata (q, s, "a refcount block", rc->table[i],
                          q->cluster_size);
      s->nr_blocks++;
    }
  return r;
}

/* Read the table of a bitmap and count its clusters. */
static enum scan_result
walk_bitmap_table (struct qcow2 *q, struct scan *s,
                   const struct bitmap_directory_entry *e)
{
  const uint64_t bytes = e->table_entries * UINT64_C (8);
  CLEANUP_FREE void *p = NULL;
  uint64_t *table;
  enum scan_result r;

  if ((r = refer_metadata (q, s, "a bitmap table", e->table_offset,
                           bytes)) != SCAN_DONE ||
      (r = spend (s, bytes)) != SCAN_DONE ||
      (r = allocate (s, &p, bytes)) != SCAN_DONE ||
      (r = read_bytes (q, s, p, bytes, e->table_offset)) != SCAN_DONE)
    return r;
  table = p;
  bitmap_table_get (table, e->table_entries);
  for (uint32_t i = 0; i < e->table_entries && r == SCAN_DONE; ++i) {
    if (!bitmap_table_entry_is_valid (table[i], q->cluster_size))
      incomplete (s, "the table of a bitmap is damaged");
    else if (bitmap_table_entry_is_data (table[i]))
      r = refer_metadata (q, s, "a bitmap's data", table[i], q->cluster_size);
  }
  return r;
}

static enum scan_result
walk_directory (struct qcow2 *q, struct scan *s,
                const struct qcow2_bitmaps_extension *ext,
                const struct bitmap_geometry *geometry)
{
  CLEANUP_FREE void *directory = NULL;
  CLEANUP_FREE struct bitmap_directory_entry *entries = NULL;
  struct bitmap_damage damage;
  enum scan_result r;

  if ((r = refer_metadata (q, s, "the bitmap directory",
                           ext->directory_offset,
                           ext->directory_size_bytes)) != SCAN_DONE ||
      (r = spend (s, ext->directory_size_bytes)) != SCAN_DONE ||
      (r = allocate (s, &directory, ext->directory_size_bytes)) != SCAN_DONE ||
      (r = read_bytes (q, s, directory, ext->directory_size_bytes,
                       ext->directory_offset)) != SCAN_DONE)
    return r;
  entries = calloc (ext->nr_bitmaps, sizeof *entries);
  if (entries == NULL)
    return end (s, SCAN_FAILED, "calloc: %s", strerror (errno));
  if (bitmap_directory_parse (directory, ext->directory_size_bytes, geometry,
                              entries, ext->nr_bitmaps, &damage) == -1) {
    incomplete (s, damage.what);
    return SCAN_DONE;
  }
  for (uint32_t i = 0; i < ext->nr_bitmaps; ++i)
    s->crashed |= (entries[i].flags & BITMAP_FLAG_IN_USE) != 0;
  for (uint32_t i = 0; i < ext->nr_bitmaps && r == SCAN_DONE; ++i)
    r = walk_bitmap_table (q, s, &entries[i]);
  return r;
}

static enum scan_result
walk_bitmaps (struct qcow2 *q, struct scan *s)
{
  const struct bitmap_geometry geometry = {
    .disk_size_bytes = q->size,
    .container_size_bytes = container_size (q->container),
    .cluster_size_bytes = q->cluster_size,
  };
  struct qcow2_bitmaps_extension ext;
  struct bitmap_damage damage;

  qcow2_get_bitmaps_extension (q, &ext);
  if (ext.count == 0 && !ext.autoclear)
    return SCAN_DONE;
  if (q->header.version < 3 || !ext.autoclear) {
    incomplete (s, "it has bitmaps that are not marked valid");
    return SCAN_DONE;
  }
  if (bitmap_extension_check (&ext, &geometry, &damage) == -1) {
    incomplete (s, damage.what);
    return SCAN_DONE;
  }
  return walk_directory (q, s, &ext, &geometry);
}

static int
compare_offsets (const void *ap, const void *bp)
{
  const uint64_t a = *(const uint64_t *) ap, b = *(const uint64_t *) bp;

  return (a > b) - (a < b);
}

static enum scan_result
walk_compressed (struct qcow2 *q, struct scan *s, uint64_t entry, bool active)
{
  enum scan_result r = SCAN_DONE;
  uint64_t host, bytes;

  compressed_location (q, entry, &host, &bytes);
  for (uint64_t c = host >> q->cluster_bits;
       c <= (host + bytes - 1) >> q->cluster_bits && r == SCAN_DONE; ++c)
    r = refer (q, s, c, KIND_COMPRESSED, active);
  return r;
}

/* One L2 entry, which is not 0. */
static enum scan_result
walk_entry (struct qcow2 *q, struct scan *s, uint64_t entry, bool active)
{
  const uint64_t host = entry & ENTRY_OFFSET_MASK;
  const bool zero_flag = q->header.version >= 3 && !q->extended_l2;

  if ((entry & OFLAG_COMPRESSED) && !q->has_data_file)
    return walk_compressed (q, s, entry, active);
  if ((entry & (L2_RESERVED_MASK | OFLAG_COMPRESSED)) != 0 ||
      ((entry & OFLAG_ZERO) && !zero_flag) || host % q->cluster_size != 0)
    return end (s, SCAN_INCONSISTENT, "the L2 entry %#" PRIx64 " is invalid",
                entry);
  if (host == 0 || q->has_data_file)
    return SCAN_DONE;
  return refer (q, s, host >> q->cluster_bits, KIND_DATA, active);
}

unsigned
scan_entry_bytes (const struct qcow2 *q)
{
  return q->extended_l2 ? 16 : 8;
}

/* Read L2 tables, sorted by their place, and count their references. */
static enum scan_result
walk_tables (struct qcow2 *q, struct scan *s, const uint64_t *tables,
             uint64_t nr, bool active)
{
  const unsigned entry_bytes = scan_entry_bytes (q);
  CLEANUP_FREE void *buf = NULL;
  enum scan_result r = allocate (s, &buf, max_u64 (MAX_READ, q->cluster_size));
  uint64_t i = 0, n;

  for (; i < nr && r == SCAN_DONE; i += n) {
    n = 1;
    while (i + n < nr && (n + 1) * q->cluster_size <= MAX_READ &&
           tables[i + n] == tables[i] + n * q->cluster_size)
      n++;
    r = read_bytes (q, s, buf, n * q->cluster_size, tables[i]);
    for (uint64_t at = 0; at < n * q->cluster_size && r == SCAN_DONE;
         at += entry_bytes) {
      const uint64_t entry = get_be64 ((uint8_t *) buf + at);

      if (entry != 0)
        r = walk_entry (q, s, entry, active);
    }
  }
  return r;
}

/* Count what an L1 table, in host byte order, leads to. */
static enum scan_result
walk_l1 (struct qcow2 *q, struct scan *s, uint64_t *l1, uint64_t nr_entries,
         bool active)
{
  enum scan_result r = SCAN_DONE;
  uint64_t nr = 0;

  for (uint64_t i = 0; i < nr_entries && r == SCAN_DONE; ++i) {
    const uint64_t table = l1[i] & ENTRY_OFFSET_MASK;

    if ((l1[i] & L1_RESERVED_MASK) != 0 || table % q->cluster_size != 0)
      return end (s, SCAN_INCONSISTENT, "the L1 entry %#" PRIx64
                  " is invalid", l1[i]);
    if (table == 0)
      continue;
    l1[nr++] = table;
    r = refer (q, s, table >> q->cluster_bits, KIND_L2_TABLE, active);
  }
  if (r == SCAN_DONE)
    r = spend (s, nr * q->cluster_size);
  if (r != SCAN_DONE)
    return r;
  qsort (l1, nr, sizeof l1[0], compare_offsets);
  return walk_tables (q, s, l1, nr, active);
}

/* The L1 table of the disk, or of a snapshot. */
static enum scan_result
walk_tree (struct qcow2 *q, struct scan *s, uint64_t l1_offset,
           uint32_t l1_entries, bool active)
{
  const uint64_t bytes = l1_entries * UINT64_C (8);
  CLEANUP_FREE void *p = NULL;
  uint64_t *l1;
  enum scan_result r;

  if ((r = refer_metadata (q, s, "an L1 table", l1_offset, bytes))
      != SCAN_DONE ||
      (r = spend (s, bytes)) != SCAN_DONE ||
      (r = allocate (s, &p, bytes)) != SCAN_DONE ||
      (r = read_bytes (q, s, p, bytes, l1_offset)) != SCAN_DONE)
    return r;
  l1 = p;
  for (uint32_t i = 0; i < l1_entries; ++i)
    l1[i] = be64toh (l1[i]);
  return walk_l1 (q, s, l1, l1_entries, active);
}

static enum scan_result
walk_snapshots (struct qcow2 *q, struct scan *s)
{
  uint64_t offset = q->header.snapshots_offset;
  enum scan_result r = SCAN_DONE;

  for (uint32_t i = 0; i < q->header.nr_snapshots && r == SCAN_DONE; ++i) {
    uint64_t l1_offset;
    uint32_t l1_entries;

    if (snapshots_next (q, i, &offset, &l1_offset, &l1_entries) == -1)
      return end (s, SCAN_INCONSISTENT, "the snapshot table is damaged");
    r = walk_tree (q, s, l1_offset, l1_entries, false);
  }
  return r == SCAN_DONE
    ? refer_metadata (q, s, "the snapshot table", q->header.snapshots_offset,
                      offset - q->header.snapshots_offset) : r;
}

/* Features whose clusters we would not know. */
static void
look_for_unknown (struct qcow2 *q, struct scan *s)
{
  if (q->hs.ext.unknown)
    incomplete (s, "its header has an extension that is unknown");
  if (q->header.autoclear & ~(AUTOCLEAR_BITMAPS | AUTOCLEAR_RAW_EXTERNAL))
    incomplete (s, "it has autoclear features that are unknown");
  if (q->header.compatible & ~COMPAT_LAZY_REFCOUNTS)
    incomplete (s, "it has compatible features that are unknown");
}

enum scan_result
scan_begin (struct qcow2 *q, struct scan *s, struct scan_limits limits)
{
  enum scan_result r;

  memset (s, 0, sizeof *s);
  s->limits = limits;
  s->began = now_ms ();
  s->complete = true;
  s->nr = div_round_up (container_size (q->container), q->cluster_size);
  s->nr_trees = 1 + (uint64_t) q->header.nr_snapshots;
  s->max_count = min_u64 (refcount_format_max (q->header.refcount_order),
                          COUNT_MASK);
  if (s->nr > limits.clusters)
    return end (s, SCAN_TOO_MUCH, "it has more than %" PRIu64 " clusters",
                limits.clusters);
  /* calloc, so that unused counters cost no memory. */
  s->references = calloc (s->nr + 1, sizeof s->references[0]);
  if (s->references == NULL)
    return end (s, SCAN_FAILED, "calloc: %s", strerror (errno));

  look_for_unknown (q, s);
  r = walk_fixed (q, s);
  return r == SCAN_DONE ? walk_bitmaps (q, s) : r;
}

enum scan_result
scan_finish (struct qcow2 *q, struct scan *s)
{
  /* For scan_compare. */
  enum scan_result r = spend (s, s->nr_blocks * q->cluster_size);

  if (r == SCAN_DONE)
    r = walk_tree (q, s, q->header.l1_offset, q->header.l1_entries, true);
  return r == SCAN_DONE ? walk_snapshots (q, s) : r;
}

void
scan_free (struct scan *s)
{
  free (s->references);
  s->references = NULL;
}

uint64_t
scan_count (const struct scan *s, uint64_t cluster)
{
  return cluster < s->end ? s->references[cluster] & COUNT_MASK : 0;
}

bool
scan_wants_copied (const struct scan *s, uint64_t cluster)
{
  const uint32_t r = cluster < s->end ? s->references[cluster] : 0;

  return (r & ACTIVE) &&
    (r >> KIND_SHIFT == KIND_DATA || r >> KIND_SHIFT == KIND_L2_TABLE);
}

/* Compare the counts of [first, first + nr) with those of a block. */
static int
compare_counts (struct qcow2 *q, const struct scan *s, const uint8_t *block,
                uint64_t first, uint64_t nr, scan_differs differs,
                void *opaque)
{
  const unsigned in_word = 64 >> q->header.refcount_order;
  int r = 0;

  for (uint64_t i = 0; i < nr && r == 0; i += in_word) {
    const uint64_t at = i / in_word * 8;

    /* The most common case beyond the end of the file. */
    if (first + i >= s->end && get_be64 (block + at) == 0)
      continue;
    for (uint64_t j = i; j < i + in_word && r == 0; ++j) {
      const uint64_t stored =
        refcount_format_get (block, q->header.refcount_order, j);
      const uint64_t counted = scan_count (s, first + j);

      if (stored != counted)
        r = differs (opaque, first + j, stored, counted);
    }
  }
  return r;
}

static int
compare_missing_block (const struct scan *s, uint64_t first, uint64_t nr,
                       scan_differs differs, void *opaque)
{
  int r = 0;

  for (uint64_t c = first; c < min_u64 (first + nr, s->end) && r == 0; ++c)
    if (scan_count (s, c) != 0)
      r = differs (opaque, c, 0, scan_count (s, c));
  return r;
}

enum scan_result
scan_compare (struct qcow2 *q, struct scan *s, scan_differs differs,
              void *opaque)
{
  const struct refcounts *rc = &q->rc;
  const uint64_t nr = UINT64_C (1) << rc->block_entries_bits;
  const uint64_t blocks =
    max_u64 (rc->table_entries, div_round_up (s->end, nr));
  CLEANUP_FREE void *block = NULL;
  enum scan_result result = allocate (s, &block, q->cluster_size);

  for (uint64_t i = 0; i < blocks && result == SCAN_DONE; ++i) {
    int r;

    if (!refcount_block_exists (q, i))
      r = compare_missing_block (s, i * nr, nr, differs, opaque);
    else {
      result = read_bytes (q, s, block, q->cluster_size, rc->table[i]);
      if (result != SCAN_DONE)
        break;
      r = compare_counts (q, s, block, i * nr, nr, differs, opaque);
    }
    if (r == -1)
      return end (s, SCAN_FAILED, "%s", strerror (errno));
  }
  return result;
}
