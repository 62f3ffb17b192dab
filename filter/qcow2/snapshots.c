/* nbdkit-dirty-bitmap-filter
 * SPDX-License-Identifier: BSD-3-Clause
 * Copyright the nbdkit-dirty-bitmap-filter authors
 */

/* Internal snapshots (qcow2.rst, "Snapshots").
 *
 * A snapshot is an L1 table of its own, named by an entry of the snapshot
 * table.  The L2 tables and clusters that it shares with the disk are
 * counted once for each of them.  We neither make nor delete snapshots.
 *
 * Serving a snapshot is serving another L1 table, read-only.
 *
 * Writing to the disk of an image that has snapshots must not touch what
 * belongs to them:
 *
 *   - the snapshot table and the snapshots' L1 tables are registered and
 *     have a refcount, or the image is not opened for writing.  So no write
 *     hits them, they are never allocated, and the file is not cut before
 *     their end.
 *   - a shared L2 table is copied before an entry of it is changed
 *     (mapping.c).  The disk stops using it and its refcount falls, but not
 *     to 0.  It stays registered: the snapshots still use it.
 *   - a shared cluster has no COPIED flag, so it is not written in place
 *     (write.c, discard.c), and it is free only when its refcount is 0
 *     (release.c).
 *   - an L2 table that only snapshots use has a refcount, which is enough if
 *     the image is sound.  It is registered, too, as a protection against
 *     wrong entries, if the snapshots' L1 tables are small enough to be read
 *     without delaying the start.
 *
 * The table is read entry by entry, so it takes no memory, however large
 * it claims to be.
 */

#include <config.h>

#include <errno.h>
#include <inttypes.h>
#include <stdio.h>
#include <stdlib.h>

#include "qcow2/internal.h"

/* QEMU's limits. */
#define MAX_SNAPSHOTS 65536
#define MAX_TABLE_BYTES (UINT64_C (64) << 20)
#define MAX_EXTRA_BYTES 1024

/* The most that is registered for all snapshots together: as many clusters
 * as one L1 table can have L2 tables; and L2 tables from this many bytes of
 * L1 tables.
 */
#define MAX_L1_CLUSTERS (MAX_L1_BYTES / 8)
#define MAX_SEARCHED_BYTES (UINT64_C (4) << 20)

struct snapshot {
  struct snapshot_entry entry;
  uint64_t id_offset, name_offset, end; /* in the container */
};

static int damaged (const struct qcow2 *q, const char *fmt, ...)
  __attribute__ ((format (printf, 2, 3)));

static int
damaged (const struct qcow2 *q, const char *fmt, ...)
{
  char what[160];
  va_list args;

  va_start (args, fmt);
  vsnprintf (what, sizeof what, fmt, args);
  va_end (args);
  report_error ("the internal snapshots of the image are damaged: %s%s", what,
                q->readonly ? "" : "; it can only be served read-only (-r)");
  errno = EINVAL;
  return -1;
}

static int
check_table (const struct qcow2 *q)
{
  const struct header *h = &q->header;

  if (h->nr_snapshots > MAX_SNAPSHOTS)
    return damaged (q, "there are %" PRIu32 ", more than the maximum of %u",
                    h->nr_snapshots, MAX_SNAPSHOTS);
  if (h->snapshots_offset == 0 || h->snapshots_offset % q->cluster_size != 0)
    return damaged (q, "the offset of the snapshot table, %#" PRIx64
                    ", is invalid", h->snapshots_offset);
  return 0;
}

/* Read the entry at *offset, and move *offset on to the next. */
static int
read_entry (struct qcow2 *q, uint32_t i, uint64_t *offset,
            struct snapshot *s)
{
  const uint64_t table = q->header.snapshots_offset;
  const uint64_t at = round_up (*offset, 8);
  uint8_t p[SNAPSHOT_KNOWN_BYTES];
  uint64_t bytes;

  if (range_exceeds (at, SNAPSHOT_FIXED_BYTES, container_size (q->container)))
    return damaged (q, "entry %" PRIu32 " of the snapshot table lies beyond "
                    "the end of the file", i);
  if (qcow2_read_metadata (q, p, sizeof p, at) == -1)
    return -1;
  snapshot_entry_parse (&s->entry, p);
  if (s->entry.extra_bytes > MAX_EXTRA_BYTES)
    return damaged (q, "entry %" PRIu32 " of the snapshot table has %" PRIu32
                    " bytes of extra data", i, s->entry.extra_bytes);

  bytes = SNAPSHOT_FIXED_BYTES + s->entry.extra_bytes + s->entry.id_bytes
    + s->entry.name_bytes;
  if (range_exceeds (at, bytes, container_size (q->container)))
    return damaged (q, "entry %" PRIu32 " of the snapshot table reaches "
                    "beyond the end of the file", i);
  s->id_offset = at + SNAPSHOT_FIXED_BYTES + s->entry.extra_bytes;
  s->name_offset = s->id_offset + s->entry.id_bytes;
  s->end = at + bytes;
  if (s->end - table > MAX_TABLE_BYTES)
    return damaged (q, "the snapshot table is larger than %" PRIu64 " bytes",
                    MAX_TABLE_BYTES);
  *offset = s->end;
  return 0;
}

static int
check_l1 (const struct qcow2 *q, uint32_t i, const struct snapshot *s)
{
  const uint64_t bytes = s->entry.l1_entries * UINT64_C (8);

  if (bytes > MAX_L1_BYTES)
    return damaged (q, "the L1 table of snapshot %" PRIu32 ", %" PRIu64
                    " bytes, is too large", i, bytes);
  if (bytes != 0 &&
      (s->entry.l1_offset == 0 || s->entry.l1_offset % q->cluster_size != 0 ||
       range_exceeds (s->entry.l1_offset, bytes,
                      container_size (q->container))))
    return damaged (q, "the L1 table of snapshot %" PRIu32 ", at %#" PRIx64
                    ", is not inside the file", i, s->entry.l1_offset);
  return 0;
}

int
snapshots_next (struct qcow2 *q, uint32_t i, uint64_t *offset,
                uint64_t *l1_offset, uint32_t *l1_entries)
{
  struct snapshot s;

  if (read_entry (q, i, offset, &s) == -1 || check_l1 (q, i, &s) == -1)
    return -1;
  *l1_offset = s.entry.l1_offset;
  *l1_entries = s.entry.l1_entries;
  return 0;
}

/* Is this the text at offset?  1, 0, or -1. */
static int
text_is (struct qcow2 *q, uint64_t offset, uint16_t bytes, const char *text)
{
  char buf[512];
  size_t n;

  if (strlen (text) != bytes)
    return 0;
  for (size_t done = 0; done < bytes; done += n) {
    n = min_u64 (bytes - done, sizeof buf);
    if (qcow2_read_metadata (q, buf, n, offset + done) == -1)
      return -1;
    if (memcmp (buf, text + done, n) != 0)
      return 0;
  }
  return 1;
}

/* Find a snapshot by its ID, or else by its name.  If several have the name,
 * take the first, as QEMU does.  *number is nr_snapshots if there is none.
 */
static int
find (struct qcow2 *q, const char *which, struct snapshot *found,
      uint32_t *number)
{
  const uint32_t none = q->header.nr_snapshots;
  uint64_t offset = q->header.snapshots_offset;

  *number = none;
  for (uint32_t i = 0; i < none; ++i) {
    struct snapshot s;
    int r;

    if (read_entry (q, i, &offset, &s) == -1)
      return -1;
    r = text_is (q, s.id_offset, s.entry.id_bytes, which);
    if (r == 1) {
      *found = s;
      *number = i;
      return 0;
    }
    if (r == 0 && *number == none)
      r = text_is (q, s.name_offset, s.entry.name_bytes, which);
    if (r == -1)
      return -1;
    if (r == 1) {
      *found = s;
      *number = i;
    }
  }
  if (*number != none)
    return 0;
  report_error ("the image has no snapshot with the ID or name '%s'", which);
  errno = ENOENT;
  return -1;
}

int
snapshots_select (struct qcow2 *q, const char *which)
{
  struct snapshot s;
  uint32_t i;
  uint64_t size;

  if ((q->header.nr_snapshots != 0 && check_table (q) == -1) ||
      find (q, which, &s, &i) == -1 || check_l1 (q, i, &s) == -1)
    return -1;
  size = s.entry.has_disk_size ? s.entry.disk_size : q->header.size;
  if (size > INT64_MAX)
    return damaged (q, "the disk size of snapshot %" PRIu32 ", %" PRIu64
                    " bytes, is too large", i, size);
  if (div_round_up (size, q->cluster_size << q->l2_bits) > s.entry.l1_entries)
    return damaged (q, "the L1 table of snapshot %" PRIu32 ", %" PRIu32
                    " entries, is too small for a disk of %" PRIu64 " bytes",
                    i, s.entry.l1_entries, size);

  q->header.l1_offset = s.entry.l1_offset;
  q->header.l1_entries = s.entry.l1_entries;
  q->header.size = size;
  q->size = round_down (size, 512);
  if (q->hs.ext.bitmaps.count != 0)
    report_debug ("the bitmaps of the image are those of its disk, and not "
                  "offered with a snapshot");
  memset (&q->hs.ext.bitmaps, 0, sizeof q->hs.ext.bitmaps);
  return 0;
}

/* Register clusters that must never be freed or allocated. */
static int
register_clusters (struct qcow2 *q, enum qcow2_class class,
                   const char *what, uint32_t i, uint64_t offset,
                   uint64_t bytes)
{
  const uint64_t first = offset >> q->cluster_bits;
  const uint64_t nr = div_round_up (bytes, q->cluster_size);

  if (qcow2_register (q, class, offset, bytes) == -1)
    return errno == ENOMEM ? -1
      : damaged (q, "%s (of snapshot %" PRIu32 "), at %#" PRIx64 ", overlaps "
                 "other metadata", what, i, offset);

  ACQUIRE_LOCK_FOR_CURRENT_SCOPE (&q->rc.lock);
  for (uint64_t c = first; c < first + nr; ++c) {
    uint64_t count;

    if (refcount_get (q, c, &count) == -1)
      return -1;
    /* In a dirty image the refcount may be wrong, and is repaired later
     * (repair.c).
     */
    if (count == 0 && !(q->header.incompatible & INCOMPAT_DIRTY))
      return damaged (q, "%s (of snapshot %" PRIu32 "), at %#" PRIx64
                      ", has the refcount 0", what, i, offset);
  }
  return 0;
}

/* Register L2 tables.  Other snapshots often share them. */
static int
register_l2_tables (struct qcow2 *q, uint32_t i, const uint64_t *entries,
                    uint32_t nr)
{
  for (uint32_t j = 0; j < nr; ++j) {
    const uint64_t entry = be64toh (entries[j]);
    const uint64_t table = entry & ENTRY_OFFSET_MASK;

    if ((entry & L1_RESERVED_MASK) != 0)
      return damaged (q, "L1 entry %#" PRIx64 " of snapshot %" PRIu32
                      " is invalid", entry, i);
    if (table == 0 ||
        (table % q->cluster_size == 0 &&
         registry_class (q, table >> q->cluster_bits) == QCOW2_L2_TABLE))
      continue;
    if (register_clusters (q, QCOW2_L2_TABLE, "an L2 table", i, table,
                           q->cluster_size) == -1)
      return -1;
  }
  return 0;
}

static int
search_l1 (struct qcow2 *q, uint32_t i, const struct snapshot *s)
{
  uint64_t buf[512];
  uint32_t n;

  for (uint32_t done = 0; done < s->entry.l1_entries; done += n) {
    n = min_u64 (s->entry.l1_entries - done, sizeof buf / sizeof buf[0]);
    if (qcow2_read_metadata (q, buf, n * sizeof buf[0], s->entry.l1_offset
                             + done * UINT64_C (8)) == -1 ||
        register_l2_tables (q, i, buf, n) == -1)
      return -1;
  }
  return 0;
}

/* All L1 tables are registered before the first L2 table: if two tables
 * overlap, the message names the L1 table, which is never shared.
 */
static int
register_l1_tables (struct qcow2 *q, uint64_t *end)
{
  uint64_t nr_clusters = 0;

  for (uint32_t i = 0; i < q->header.nr_snapshots; ++i) {
    struct snapshot s;

    if (read_entry (q, i, end, &s) == -1 || check_l1 (q, i, &s) == -1)
      return -1;
    nr_clusters += div_round_up (s.entry.l1_entries * UINT64_C (8),
                                 q->cluster_size);
    if (nr_clusters > MAX_L1_CLUSTERS) {
      report_error ("the L1 tables of the image's internal snapshots have more "
                    "than %" PRIu64 " clusters together, so it can only be "
                    "served read-only (-r)", MAX_L1_CLUSTERS);
      errno = EFBIG;
      return -1;
    }
    if (s.entry.l1_entries != 0 &&
        register_clusters (q, QCOW2_L1_TABLE, "an L1 table", i,
                           s.entry.l1_offset,
                           s.entry.l1_entries * UINT64_C (8)) == -1)
      return -1;
  }
  return 0;
}

static int
search_l1_tables (struct qcow2 *q)
{
  uint64_t offset = q->header.snapshots_offset, bytes = 0;

  for (uint32_t i = 0; i < q->header.nr_snapshots; ++i) {
    struct snapshot s;

    if (read_entry (q, i, &offset, &s) == -1 || check_l1 (q, i, &s) == -1)
      return -1;
    bytes += s.entry.l1_entries * UINT64_C (8);
    if (bytes > MAX_SEARCHED_BYTES)
      return 0;
    if (search_l1 (q, i, &s) == -1)
      return -1;
  }
  return 0;
}

int
snapshots_register (struct qcow2 *q)
{
  const uint64_t table = q->header.snapshots_offset;
  uint64_t end = table;

  if (q->header.nr_snapshots == 0)
    return 0;
  if (check_table (q) == -1 || register_l1_tables (q, &end) == -1 ||
      register_clusters (q, QCOW2_SNAPSHOT_TABLE, "the snapshot table", 0,
                         table, end - table) == -1)
    return -1;
  return search_l1_tables (q);
}
