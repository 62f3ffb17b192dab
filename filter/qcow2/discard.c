/* nbdkit-dirty-bitmap-filter
 * SPDX-License-Identifier: BSD-3-Clause
 * Copyright the nbdkit-dirty-bitmap-filter authors
 */

/* Write-zeroes and discard.
 *
 * Whole clusters only change their L2 entries, a slice at a time, under
 * a range lock.  Parts of clusters are zeroed in place, or written.  A
 * cluster is whole, too, if the disk ends inside of it.
 *
 * A request that looked an entry up before it was changed may still
 * write to the old cluster.  That harms nobody: the cluster is not used
 * for something else until the request is done (release.c), and the
 * two were under way at once, so either order of them is right.
 */

#include <config.h>

#include <errno.h>
#include <inttypes.h>
#include <stdlib.h>

#include "qcow2/internal.h"

static const uint8_t zeroes[65536];

/* The whole clusters inside of a range. */
static void
whole_clusters (const struct qcow2 *q, uint64_t count, uint64_t offset,
                uint64_t *first, uint64_t *end)
{
  *first = div_round_up (offset, q->cluster_size);
  *end = offset + count == q->size
    ? div_round_up (offset + count, q->cluster_size)
    : (offset + count) >> q->cluster_bits;
}

/* Set entries and release what the old ones referred to, with the range
 * lock held.
 */
static int
replace_entries (struct qcow2 *q, uint64_t guest_cluster, unsigned nr,
                 const uint64_t *old, const uint64_t *new)
{
  if (memcmp (old, new, nr * sizeof old[0]) == 0)
    return 0;
  for (unsigned i = 0; i < nr; ++i)
    if (release_check_entry (q, old[i]) == -1)
      return -1;
  if (mapping_set (q, guest_cluster, nr, new) == -1)
    return -1;
  for (unsigned i = 0; i < nr; ++i)
    if (old[i] != new[i] &&
        ((old[i] & OFLAG_COMPRESSED) != 0 ||
         (old[i] & ENTRY_OFFSET_MASK) != (new[i] & ENTRY_OFFSET_MASK)))
      release_entry (q, old[i]);
  return 0;
}

static int
trim_slice (struct qcow2 *q, uint64_t first, unsigned nr)
{
  uint64_t old[L2_MAX_SLICE_ENTRIES], new[L2_MAX_SLICE_ENTRIES] = { 0 };

  if ((atomic_load (&q->l1[first >> q->l2_bits]) & ENTRY_OFFSET_MASK) == 0)
    return 0;
  if (l2_get (q, first, nr, old) == -1)
    return -1;
  return replace_entries (q, first, nr, old, new);
}

/* Version 3: explicit zeroes, with no host clusters. */
static int
zero_slice (struct qcow2 *q, uint64_t first, unsigned nr)
{
  uint64_t old[L2_MAX_SLICE_ENTRIES], new[L2_MAX_SLICE_ENTRIES];

  if (mapping_need_l2 (q, first) == -1 || l2_get (q, first, nr, old) == -1)
    return -1;
  for (unsigned i = 0; i < nr; ++i)
    new[i] = OFLAG_ZERO;
  return replace_entries (q, first, nr, old, new);
}

/* Does an entry have a host cluster that is this image's alone? */
static bool
owns_cluster (const struct qcow2 *q, uint64_t entry)
{
  struct mapping m;

  mapping_decode (q, entry, &m);
  return m.copied &&
    (m.kind == MAPPING_DATA || m.kind == MAPPING_ZERO_ALLOCATED);
}

/* Set entries that keep their host clusters, up to the first which has
 * none of its own; then allocate for as many of those as can be had.
 */
static int
keep_some (struct qcow2 *q, uint64_t first, unsigned nr, const uint64_t *old,
           unsigned *done)
{
  uint64_t new[L2_MAX_SLICE_ENTRIES], host, got;
  unsigned own = 0, want = 0;
  bool zeroed;

  for (; own < nr && owns_cluster (q, old[own]); ++own)
    new[own] = old[own] | OFLAG_ZERO;
  *done = own;
  if (own > 0)
    return replace_entries (q, first, own, old, new);

  while (want < nr && !owns_cluster (q, old[want]))
    want++;
  if (allocate_clusters (q, QCOW2_DATA, want, &host, &got, &zeroed) == -1)
    return -1;
  for (unsigned i = 0; i < got; ++i)
    new[i] = (host + ((uint64_t) i << q->cluster_bits)) | OFLAG_COPIED
      | OFLAG_ZERO;
  *done = got;
  if (replace_entries (q, first, got, old, new) == -1) {
    const int err = errno;

    allocate_undo (q, host, got);
    errno = err;
    return -1;
  }
  return 0;
}

/* Version 3: explicit zeroes, with host clusters kept or allocated. */
static int
zero_keep_slice (struct qcow2 *q, uint64_t first, unsigned nr)
{
  uint64_t old[L2_MAX_SLICE_ENTRIES];

  if (mapping_need_l2 (q, first) == -1 || l2_get (q, first, nr, old) == -1)
    return -1;
  for (unsigned i = 0, done; i < nr; i += done)
    if (keep_some (q, first + i, nr - i, old + i, &done) == -1)
      return -1;
  return 0;
}

/* Do something to whole clusters, a slice at a time. */
static int
for_each_slice (struct qcow2 *q, uint64_t first, uint64_t end,
                int (*fn) (struct qcow2 *, uint64_t first, unsigned nr))
{
  bool retried = false;

  while (first < end) {
    const unsigned nr = min_u64 (end - first, mapping_slice_left (q, first));
    struct range_lock range;
    int r;

    if (release_wants_reclaim (q))
      qcow2_reclaim (q);
    range_lock_take (q, &range, first, first + nr - 1);
    r = fn (q, first, nr);
    range_lock_drop (q, &range);
    if (r == -1) {
      if (write_may_retry (q, &retried))
        continue;
      return -1;
    }
    first += nr;
  }
  return 0;
}

static int
write_zeroes (struct qcow2 *q, uint64_t count, uint64_t offset)
{
  while (count > 0) {
    const uint64_t n = min_u64 (count, sizeof zeroes);

    if (qcow2_write (q, zeroes, n, offset) == -1)
      return -1;
    offset += n;
    count -= n;
  }
  return 0;
}

/* Zero a run in place, if it is one that can be. */
static int
zero_in_place (struct qcow2 *q, uint64_t count, uint64_t offset, bool keep,
               uint64_t *done)
{
  struct mapping m;

  if (mapping_lookup (q, offset, count, &m) == -1)
    return -1;
  *done = 0;
  if (m.kind == MAPPING_DATA && m.copied) {
    if (write_check_host (q, m.host, m.length) == -1)
      return -1;
    if (container_zero (q->container, m.length, m.host, false) == -1) {
      report_error ("cannot zero %" PRIu64 " bytes at host offset %#" PRIx64
                    ": %m", m.length, m.host);
      return -1;
    }
    *done = m.length;
  }
  else if (m.kind == MAPPING_ZERO_ALLOCATED ||
           (!keep && (m.kind == MAPPING_UNALLOCATED ||
                      m.kind == MAPPING_ZERO)))
    *done = m.length;
  return 0;
}

/* Zero by bytes: parts of clusters, or what has no zero flag to set. */
static int
zero_bytes (struct qcow2 *q, uint64_t count, uint64_t offset, bool keep)
{
  while (count > 0) {
    uint64_t done;
    int r;

    const grace_ticket ticket = grace_enter (&q->requests);
    r = zero_in_place (q, count, offset, keep, &done);
    grace_leave (&q->requests, ticket);
    if (r == -1)
      return -1;
    if (done == 0) {
      done = min_u64 (count, q->cluster_size - (offset & (q->cluster_size - 1)));
      if (write_zeroes (q, done, offset) == -1)
        return -1;
    }
    offset += done;
    count -= done;
  }
  return 0;
}

/* Is there no data to overwrite in this part of a cluster? */
static int
part_is_fast (struct qcow2 *q, uint64_t count, uint64_t offset, bool keep)
{
  struct mapping m;

  if (count == 0)
    return 0;
  if (mapping_lookup (q, offset, count, &m) == -1)
    return -1;
  if (m.kind == MAPPING_ZERO_ALLOCATED ||
      (!keep && (m.kind == MAPPING_ZERO || m.kind == MAPPING_UNALLOCATED)))
    return 0;
  errno = ENOTSUP;
  return -1;
}

int
qcow2_zero (struct qcow2 *q, uint64_t count, uint64_t offset, unsigned flags)
{
  const bool keep = flags & QCOW2_ZERO_KEEP;
  const bool v2 = q->header.version < 3;
  uint64_t first, end, head, tail;

  if (header_begin_writing (q) == -1)
    return -1;
  whole_clusters (q, count, offset, &first, &end);
  if (first >= end || (v2 && keep)) {
    /* No whole cluster, or none that could be flagged. */
    if (flags & QCOW2_ZERO_FAST) {
      const uint64_t in_first =
        min_u64 (count, q->cluster_size - (offset & (q->cluster_size - 1)));

      if (first < end) {
        errno = ENOTSUP;
        return -1;
      }
      if (part_is_fast (q, in_first, offset, keep) == -1 ||
          part_is_fast (q, count - in_first, offset + in_first, keep) == -1)
        return -1;
    }
    return zero_bytes (q, count, offset, keep);
  }

  head = (first << q->cluster_bits) - offset;
  tail = end << q->cluster_bits >= offset + count
    ? 0 : offset + count - (end << q->cluster_bits);
  if ((flags & QCOW2_ZERO_FAST) != 0 &&
      (part_is_fast (q, head, offset, keep) == -1 ||
       part_is_fast (q, tail, end << q->cluster_bits, keep) == -1))
    return -1;
  if (zero_bytes (q, head, offset, keep) == -1 ||
      for_each_slice (q, first, end, v2 ? trim_slice
                      : keep ? zero_keep_slice : zero_slice) == -1)
    return -1;
  return zero_bytes (q, tail, end << q->cluster_bits, keep);
}

int
qcow2_trim (struct qcow2 *q, uint64_t count, uint64_t offset)
{
  uint64_t first, end;

  if (header_begin_writing (q) == -1)
    return -1;
  whole_clusters (q, count, offset, &first, &end);
  return first < end ? for_each_slice (q, first, end, trim_slice) : 0;
}
