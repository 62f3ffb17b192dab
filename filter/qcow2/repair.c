/* nbdkit-dirty-bitmap-filter
 * SPDX-License-Identifier: BSD-3-Clause
 * Copyright the nbdkit-dirty-bitmap-filter authors
 */

/* Images that are marked dirty (qcow2.rst, "Header", incompatible feature
 * bit 0): a program that updates refcounts lazily did not stop cleanly, so
 * no refcount can be relied on.  We never set the mark: our refcounts are
 * durable before the references to what they count.
 *
 * The references are counted (scan.c), and then, with a barrier after
 * each step:
 *
 *   raise     refcounts that are too low, in new refcount blocks where there
 *             is none, and in a larger table if necessary
 *   lower     those that are too high; a cluster that nothing uses is freed
 *             like any other (release.c)
 *   COPIED    flags of L1 and L2 entries are set where the refcount is
 *             1, and only there
 *   clean     the mark is removed
 *
 * Until the last step the image is marked, and the next program that opens
 * it starts over: of what is referred to, only COPIED flags were changed,
 * and new blocks and tables are put in unused places.
 *
 * If there may be references that we do not know (the scan is not complete),
 * nothing is lowered, and new blocks and tables go beyond the end of the
 * file.
 *
 * An image that is inconsistent in any way other than its refcounts is
 * refused before anything is written.
 */

#include <config.h>

#include <errno.h>
#include <inttypes.h>
#include <stdlib.h>

#include "qcow2/internal.h"

#define MIB (UINT64_C (1) << 20)

/* 256 MiB of counters, and the L2 tables of 8 TiB in clusters of 64 KiB. */
static const struct scan_limits limits = {
  .bytes = 1024 * MIB, .clusters = 64 * MIB,
};

struct repair {
  struct qcow2 *q;
  struct scan *scan;
  uint64_t place;               /* no cluster below it is unused */
  uint64_t nr_raised, nr_lowered, nr_flags;
};

static uint64_t
block_of (const struct qcow2 *q, uint64_t cluster)
{
  return cluster >> q->rc.block_entries_bits;
}

/* The first cluster from c on that nothing uses. */
static uint64_t
next_unused (const struct repair *r, uint64_t c)
{
  if (!r->scan->complete)
    c = max_u64 (c, r->scan->nr + 1);
  while (scan_count (r->scan, c) != 0)
    c++;
  return c;
}

static bool
is_referred_to (const struct repair *r, uint64_t block)
{
  const unsigned bits = r->q->rc.block_entries_bits;
  const uint64_t end = min_u64 ((block + 1) << bits, r->scan->end);

  for (uint64_t c = block << bits; c < end; ++c)
    if (scan_count (r->scan, c) != 0)
      return true;
  return false;
}

/* Make the missing block in an unused cluster that it counts itself, if
 * there is one.
 */
static int
make_block_inside (struct repair *r, uint64_t block)
{
  struct qcow2 *q = r->q;
  const uint64_t c = next_unused (r, block << q->rc.block_entries_bits);

  return block_of (q, c) == block ? allocate_block_at (q, block, c) : 0;
}

/* Find an unused cluster with refcount 0.  Its block exists, or is made. */
static int
find_place (struct repair *r)
{
  struct qcow2 *q = r->q;

  for (;; r->place++) {
    uint64_t count;

    r->place = next_unused (r, r->place);
    const uint64_t block = block_of (q, r->place);
    if (block >= q->rc.table_entries &&
        allocate_larger_table (q, block, r->scan->nr + 1) == -1)
      return -1;
    if (!refcount_block_exists (q, block)) {
      if (allocate_block_at (q, block, r->place) == -1)
        return -1;
    }
    else if (refcount_get (q, r->place, &count) == -1)
      return -1;
    else if (count == 0)
      return 0;
  }
}

/* Make the missing blocks, from first up to end, that count something. */
static int
make_blocks (struct repair *r, uint64_t first, uint64_t end)
{
  struct qcow2 *q = r->q;

  for (uint64_t i = first; i < end; ++i)
    if (!refcount_block_exists (q, i) && is_referred_to (r, i) &&
        make_block_inside (r, i) == -1)
      return -1;
  for (uint64_t i = first; i < end; ++i)
    if (!refcount_block_exists (q, i) && is_referred_to (r, i)) {
      if (find_place (r) == -1)
        return -1;
      /* The cluster found may have been used for its own block. */
      if (!refcount_block_exists (q, i) &&
          allocate_block_at (q, i, r->place) == -1)
        return -1;
    }
  return 0;
}

static int
make_missing_blocks (struct repair *r)
{
  struct qcow2 *q = r->q;
  const uint64_t end = block_of (q, r->scan->end - 1) + 1;
  const uint64_t old_entries = q->rc.table_entries;

  ACQUIRE_LOCK_FOR_CURRENT_SCOPE (&q->rc.lock);
  if (make_blocks (r, 0, min_u64 (end, old_entries)) == -1)
    return -1;
  if (end <= old_entries)
    return 0;
  /* Nothing beyond the file is in use, even without a refcount. */
  if (end > q->rc.table_entries &&
      allocate_larger_table (q, end - 1, r->scan->nr + 1) == -1)
    return -1;
  return make_blocks (r, old_entries, end);
}

static int
set_count (struct qcow2 *q, uint64_t cluster, uint64_t count)
{
  ACQUIRE_LOCK_FOR_CURRENT_SCOPE (&q->rc.lock);
  return refcount_set (q, cluster, count);
}

static int
raise_count (void *opaque, uint64_t cluster, uint64_t stored,
             uint64_t counted)
{
  struct repair *r = opaque;

  if (stored >= counted)
    return 0;
  r->nr_raised++;
  return set_count (r->q, cluster, counted);
}

/* Write refcounts, and free the released clusters. */
static int
settle (struct qcow2 *q)
{
  const unsigned long lost = qcow2_lost (q);
  uint64_t epoch;

  ACQUIRE_LOCK_FOR_CURRENT_SCOPE (&q->flush.lock);
  release_flush_begins (q);
  if (refcounts_flush (q, lost) == -1) {
    release_flush_ends (q, false);
    return -1;
  }
  epoch = refcounts_barrier_begins (q);
  if (qcow2_barrier_since (q, lost) == -1) {
    release_flush_ends (q, false);
    return -1;
  }
  refcounts_barrier_done (q, epoch);
  release_flush_ends (q, true);
  release_retire (q, true);
  return refcounts_flush (q, lost);
}

static int
lower_count (void *opaque, uint64_t cluster, uint64_t stored,
             uint64_t counted)
{
  struct repair *r = opaque;
  struct qcow2 *q = r->q;

  /* Clusters that we have allocated are registered. */
  if (stored <= counted ||
      (counted == 0 && registry_class (q, cluster) != QCOW2_DATA))
    return 0;
  r->nr_lowered++;
  if (stored != max_u64 (counted, 1) &&
      set_count (q, cluster, max_u64 (counted, 1)) == -1)
    return -1;
  if (counted == 0)
    release_clusters (q, cluster, 1);
  return release_wants_reclaim (q) ? settle (q) : 0;
}

/* Is the refcount 1?  If leaks were left, it may be higher than the number
 * of references.
 */
static int
is_copied (struct repair *r, uint64_t cluster, bool *copied)
{
  uint64_t count = scan_count (r->scan, cluster);

  if (!r->scan->complete) {
    ACQUIRE_LOCK_FOR_CURRENT_SCOPE (&r->q->rc.lock);
    if (refcount_get (r->q, cluster, &count) == -1)
      return -1;
  }
  *copied = count == 1;
  return 0;
}

/* Set or clear the flag of an entry.  Returns 1 if it was changed. */
static int
mend_flag (struct repair *r, uint64_t *entry, bool data)
{
  const uint64_t host = *entry & ENTRY_OFFSET_MASK;
  bool copied;

  if (data && (*entry & OFLAG_COMPRESSED))
    copied = false;
  else if (host == 0)
    return 0;
  else if (data && r->q->has_data_file)
    copied = true;
  else if (is_copied (r, host >> r->q->cluster_bits, &copied) == -1)
    return -1;
  if (copied == ((*entry & OFLAG_COPIED) != 0))
    return 0;
  *entry ^= OFLAG_COPIED;
  r->nr_flags++;
  return 1;
}

static int
mend_l2_table (struct repair *r, uint64_t table, uint8_t *buf)
{
  struct qcow2 *q = r->q;
  uint64_t first = UINT64_MAX, end = 0;

  if (qcow2_read_metadata (q, buf, q->cluster_size, table) == -1)
    return -1;
  for (uint64_t at = 0; at < q->cluster_size; at += scan_entry_bytes (q)) {
    uint64_t entry = get_be64 (buf + at);
    const int changed = entry == 0 ? 0 : mend_flag (r, &entry, true);

    if (changed == -1)
      return -1;
    if (changed) {
      put_be64 (buf + at, entry);
      first = min_u64 (first, at);
      end = at + 8;
    }
  }
  return end == 0 ? 0 : gate_write (q, QCOW2_L2_TABLE, buf + first,
                                    end - first, table + first);
}

/* One entry of the L1 table, and the L2 table that it refers to. */
static int
mend_l1_entry (struct repair *r, uint32_t i, uint64_t entry, uint8_t *buf)
{
  struct qcow2 *q = r->q;
  uint64_t be;
  int changed;

  if ((entry & ENTRY_OFFSET_MASK) == 0)
    return 0;
  if ((changed = mend_flag (r, &entry, false)) == -1 ||
      mend_l2_table (r, entry & ENTRY_OFFSET_MASK, buf) == -1)
    return -1;
  if (!changed)
    return 0;
  put_be64 (&be, entry);
  if (gate_write (q, QCOW2_L1_TABLE, &be, sizeof be,
                  q->header.l1_offset + i * UINT64_C (8)) == -1)
    return -1;
  atomic_store (&q->l1.entries[i], entry);
  return 0;
}

static int
mend_flags (struct repair *r)
{
  struct qcow2 *q = r->q;
  const uint64_t l1_bytes = q->header.l1_entries * UINT64_C (8);
  CLEANUP_FREE uint8_t *buf = malloc (q->cluster_size);
  CLEANUP_FREE uint64_t *l1 = malloc (l1_bytes + 1);

  if (buf == NULL || l1 == NULL) {
    report_error ("malloc: %m");
    return -1;
  }
  if (qcow2_read_metadata (q, l1, l1_bytes, q->header.l1_offset) == -1)
    return -1;
  for (uint32_t i = 0; i < q->header.l1_entries; ++i)
    if (mend_l1_entry (r, i, be64toh (l1[i]), buf) == -1)
      return -1;
  return 0;
}

static int
compare (struct repair *r, scan_differs differs)
{
  if (scan_compare (r->q, r->scan, differs, r) == SCAN_DONE)
    return 0;
  report_error ("cannot compare the refcounts of the image with what refers "
                "to its clusters: %s", r->scan->why);
  errno = EIO;
  return -1;
}

static int
repair (struct repair *r)
{
  struct qcow2 *q = r->q;

  if (gate_begin_repair (q) == -1 || make_missing_blocks (r) == -1 ||
      compare (r, raise_count) == -1 || settle (q) == -1)
    return -1;
  if (r->scan->complete &&
      (compare (r, lower_count) == -1 || settle (q) == -1))
    return -1;
  if (mend_flags (r) == -1 || qcow2_barrier (q) == -1 ||
      gate_end_repair (q) == -1)
    return -1;
  q->rc.cursor = 0;
  return 0;
}

/* Report why not, and what to do. */
static int
refuse (const struct scan *s, enum scan_result result)
{
  if (result == SCAN_FAILED) {
    report_error ("the image is marked dirty, and cannot be repaired: %s",
                  s->why);
    errno = EIO;
    return -1;
  }
  report_error ("the image is marked dirty (its refcounts may be wrong), and "
                "is not repaired here, since %s; repair it with "
                "qemu-img check -r all, or serve it read-only (-r)", s->why);
  errno = result == SCAN_TOO_MUCH ? EFBIG : EIO;
  return -1;
}

int
repair_dirty (struct qcow2 *q, bool check_only)
{
  struct scan s;
  struct repair r = { .q = q, .scan = &s };
  enum scan_result result = scan_begin (q, &s, limits);
  int status;

  if (result == SCAN_DONE)
    result = scan_finish (q, &s);
  if (result != SCAN_DONE)
    status = refuse (&s, result);
  else
    status = check_only ? 0 : repair (&r);
  scan_free (&s);
  if (status == -1 || check_only)
    return status;

  report_warning ("the image was marked dirty and has been repaired: %" PRIu64
                  " refcounts were too low, %" PRIu64 " too high, %" PRIu64
                  " flags wrong", r.nr_raised, r.nr_lowered, r.nr_flags);
  if (!s.complete)
    report_warning ("its leaked clusters, if any, were not freed: %s",
                    s.why);
  return 0;
}
