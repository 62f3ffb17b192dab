/* nbdkit-dirty-bitmap-filter
 * SPDX-License-Identifier: BSD-3-Clause
 * Copyright the nbdkit-dirty-bitmap-filter authors
 */

/* Write-zeroes and discard.
 *
 * Whole clusters (or subclusters, in an image that has them) only change
 * their L2 entries, a slice at a time, under a range lock.  Parts of them
 * are zeroed in place, or written.  A unit that the disk ends in counts as
 * whole, too.
 *
 * A request that looked an entry up before it was changed may still write to
 * the old cluster.  That is harmless: until the request is done, the cluster
 * is not used for anything else (release.c), nor for the same part of the
 * disk again (reuse.c).  The two requests were under way at once, so either
 * order of them is right.
 *
 * If there is a backing file, a discarded cluster becomes explicit zeroes,
 * so that the backing file does not show through.  Version 2 has no explicit
 * zeroes: there a discarded cluster is left alone, and zeroes are written as
 * data.
 *
 * A raw external data file must read as the guest's disk does, so the data
 * file itself is zeroed, and the entries stay.
 */

#include <config.h>

#include <assert.h>
#include <errno.h>
#include <inttypes.h>
#include <stdlib.h>

#include "qcow2/internal.h"
#include "qcow2/steps.h"

static const uint8_t zeroes[65536];

/* The units of one kind of request, from first up to end: clusters or
 * subclusters.
 */
struct units {
  unsigned bits;                /* log2 of their size */
  uint64_t first, end;
};

/* The whole units inside a range.  The last unit of the disk includes the
 * rest of its cluster.
 */
static struct units
whole_units (const struct qcow2 *q, unsigned bits, uint64_t count,
             uint64_t offset)
{
  const uint64_t size = UINT64_C (1) << bits, end = offset + count;
  struct units u = {
    .bits = bits,
    .first = div_round_up (offset, size),
    .end = end >> bits,
  };

  if (end == q->size && u.first << bits < end)
    u.end = div_round_up (end, q->cluster_size) << (q->cluster_bits - bits);
  return u;
}

/* The subclusters of a cluster that are among the units, as bits. */
static uint32_t
units_in (const struct qcow2 *q, const struct units *u, uint64_t guest_cluster)
{
  const unsigned sub_bits = q->cluster_bits - u->bits;
  const uint64_t start = guest_cluster << sub_bits;
  uint64_t from = 0, to = L2_SUBCLUSTERS;

  if (sub_bits == 0)
    return UINT32_MAX;
  if (u->first > start)
    from = u->first - start;
  if (u->end < start + L2_SUBCLUSTERS)
    to = u->end - start;
  return (UINT32_MAX << from) & (UINT32_MAX >> (L2_SUBCLUSTERS - to));
}

/* Does the new L2 entry give up the cluster of the old one? */
static bool
loses_cluster (const struct l2_entry *old, const struct l2_entry *new)
{
  const uint64_t differ = old->descriptor ^ new->descriptor;

  return (old->descriptor & OFLAG_COMPRESSED)
    ? differ != 0 : (differ & ENTRY_OFFSET_MASK) != 0;
}

/* Give back the storage of guest data that nothing refers to any more, in a
 * data file where every guest cluster has its own place.
 */
static void
punch_data_file (struct qcow2 *q, uint64_t guest_cluster, unsigned nr,
                 const struct l2_entry *old, const struct l2_entry *new)
{
  unsigned n;

  for (unsigned i = 0; i < nr; i += n) {
    for (n = 0; i + n < nr && mapping_owns_cluster (q, old[i + n].descriptor)
           && new[i + n].descriptor != old[i + n].descriptor; ++n)
      ;
    if (n == 0)
      n = 1;
    else
      container_zero (q->data, (uint64_t) n << q->cluster_bits,
                      (guest_cluster + i) << q->cluster_bits, true);
  }
}

/* Set entries and release what the old ones referred to, with the range lock
 * held.  If nothing changes, an L2 table that is shared with snapshots stays
 * shared.
 */
static int
replace_entries (struct qcow2 *q, uint64_t guest_cluster, unsigned nr,
                 const struct l2_entry *old, const struct l2_entry *new)
{
  if (memcmp (old, new, nr * sizeof old[0]) == 0)
    return 0;
  if (mapping_need_l2 (q, guest_cluster) == -1)
    return -1;
  for (unsigned i = 0; i < nr; ++i)
    if (release_check_entry (q, old[i].descriptor) == -1)
      return -1;
  if (change_entries (q, guest_cluster, nr, new) == -1)
    return -1;
  reuse_entries_changed (q, nr, old, new);
  if (q->has_data_file)
    punch_data_file (q, guest_cluster, nr, old, new);
  else
    for (unsigned i = 0; i < nr; ++i)
      if (loses_cluster (&old[i], &new[i]))
        release_entry (q, old[i].descriptor);
  return 0;
}

static bool
l2_table_exists (struct qcow2 *q, uint64_t guest_cluster)
{
  return (atomic_load (&q->l1.entries[guest_cluster >> q->l2_bits])
          & ENTRY_OFFSET_MASK) != 0;
}

/* Subclusters become zeroes or unallocated.  A cluster whose subclusters all
 * have no data any more is given up.
 */
static struct l2_entry
without_subclusters (const struct l2_entry *old, uint32_t bits, bool zero)
{
  struct l2_entry new = *old;

  if (bits == UINT32_MAX)
    return (struct l2_entry) { .bitmap = zero ? UINT64_MAX << 32 : 0 };
  if (old->descriptor & OFLAG_COMPRESSED)
    return new;                 /* the caller handles it */
  new.bitmap &= ~((uint64_t) bits << 32 | bits);
  if (zero)
    new.bitmap |= (uint64_t) bits << 32;
  if ((uint32_t) new.bitmap == 0)
    new.descriptor = 0;
  return new;
}

/* Clusters, or subclusters, lose their data. */
static int
clear_slice (struct qcow2 *q, const struct units *u, uint64_t first,
             unsigned nr, bool zero)
{
  struct l2_entry old[L2_MAX_SLICE_ENTRIES], new[L2_MAX_SLICE_ENTRIES];

  if (l2_get (q, first, nr, old) == -1)
    return -1;
  for (unsigned i = 0; i < nr; ++i)
    if (q->extended_l2)
      new[i] = without_subclusters (&old[i], units_in (q, u, first + i),
                                    zero);
    else
      new[i] = (struct l2_entry) { .descriptor = zero ? OFLAG_ZERO : 0 };
  return replace_entries (q, first, nr, old, new);
}

/* Make units unallocated, where no backing file shows through then. */
static int
trim_slice (struct qcow2 *q, const struct units *u, uint64_t first,
            unsigned nr)
{
  const bool zero = first << q->cluster_bits < q->backing_size;

  if (!zero && !l2_table_exists (q, first))
    return 0;
  return clear_slice (q, u, first, nr, zero);
}

/* Version 3: explicit zeroes, with no host clusters. */
static int
zero_slice (struct qcow2 *q, const struct units *u, uint64_t first,
            unsigned nr)
{
  return clear_slice (q, u, first, nr, true);
}

/* An entry that reads as zeroes and has a host cluster. */
static struct l2_entry
zero_with_host (const struct qcow2 *q, uint64_t host)
{
  return q->extended_l2
    ? (struct l2_entry) { host | OFLAG_COPIED, UINT64_MAX << 32 }
    : (struct l2_entry) { host | OFLAG_COPIED | OFLAG_ZERO, 0 };
}

/* Set entries that keep their host clusters, up to the first that has no
 * cluster of its own; then allocate for as many of those as possible.
 */
static int
keep_some (struct qcow2 *q, uint64_t first, unsigned nr,
           const struct l2_entry *old, unsigned *done)
{
  struct l2_entry new[L2_MAX_SLICE_ENTRIES];
  uint64_t host, got;
  unsigned own = 0, want = 0;
  bool zeroed;

  for (; own < nr && mapping_owns_cluster (q, old[own].descriptor); ++own)
    new[own] = zero_with_host (q, old[own].descriptor & ENTRY_OFFSET_MASK);
  *done = own;
  if (own > 0)
    return replace_entries (q, first, own, old, new);

  while (want < nr && !mapping_owns_cluster (q, old[want].descriptor))
    want++;
  if (allocate_clusters (q, QCOW2_DATA, want, &host, &got, &zeroed) == -1)
    return -1;
  for (unsigned i = 0; i < got; ++i)
    new[i] = zero_with_host (q, host + ((uint64_t) i << q->cluster_bits));
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
zero_keep_slice (struct qcow2 *q, const struct units *u, uint64_t first,
                 unsigned nr)
{
  struct l2_entry old[L2_MAX_SLICE_ENTRIES];

  (void) u;                     /* the units are clusters */
  if (l2_get (q, first, nr, old) == -1)
    return -1;
  for (unsigned i = 0, done; i < nr; i += done)
    if (keep_some (q, first + i, nr - i, old + i, &done) == -1)
      return -1;
  return 0;
}

typedef int slice_function (struct qcow2 *, const struct units *,
                            uint64_t first, unsigned nr);

/* Call fn for whole units, a slice at a time. */
static int
for_each_slice (struct qcow2 *q, const struct units *u, slice_function *fn)
{
  const unsigned sub_bits = q->cluster_bits - u->bits;
  const uint64_t end = div_round_up (u->end, UINT64_C (1) << sub_bits);
  uint64_t first = u->first >> sub_bits;
  bool retried = false;

  while (first < end) {
    const unsigned nr = min_u64 (end - first, mapping_slice_left (q, first));
    struct report_hold hold;
    struct range_lock range;
    int r;

    if (request_goes_on (q) == -1)
      return -1;
    if (release_wants_reclaim (q))
      qcow2_reclaim_quietly (q);
    report_hold_begin (&hold);
    range_lock_take (q, &range, first, first + nr - 1);
    r = fn (q, u, first, nr);
    range_lock_drop (q, &range);
    report_hold_end (&hold);
    if (r == -1) {
      if (change_may_retry (q, &hold, &retried))
        continue;
      return -1;
    }
    first += nr;
  }
  return 0;
}

/* A compressed cluster has no subclusters: leave it out if it is not wholly
 * among the units.  (No cluster ever becomes compressed, so this stays
 * true.)
 */
static int
leave_out_compressed (struct qcow2 *q, struct units *u)
{
  const uint64_t mask = (UINT64_C (1) << (q->cluster_bits - u->bits)) - 1;
  struct mapping m;

  if (u->first < u->end && (u->first & mask) != 0) {
    if (mapping_lookup (q, u->first << u->bits, 1, &m) == -1)
      return -1;
    if (m.kind == MAPPING_COMPRESSED)
      u->first = min_u64 (u->end, (u->first | mask) + 1);
  }
  if (u->first < u->end && (u->end & mask) != 0) {
    if (mapping_lookup (q, (u->end - 1) << u->bits, 1, &m) == -1)
      return -1;
    if (m.kind == MAPPING_COMPRESSED)
      u->end = max_u64 (u->first, u->end & ~mask);
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

/* Zero a run in place, if possible. */
static int
zero_in_place (struct qcow2 *q, uint64_t count, uint64_t offset, bool keep,
               uint64_t *done)
{
  struct mapping m;

  if (mapping_lookup (q, offset, count, &m) == -1)
    return -1;
  *done = 0;
  if (m.kind == MAPPING_DATA && m.copied) {
    if (change_check_host (q, m.host, m.length) == -1)
      return -1;
    if (container_zero (q->data, m.length, m.host,
                        q->data_file_raw && !keep) == -1) {
      report_error ("cannot zero %" PRIu64 " bytes at host offset %#" PRIx64
                    ": %m", m.length, m.host);
      return -1;
    }
    *done = m.length;
  }
  else if (reads_as_zeroes (q, m.kind, offset, &m.length) &&
           (!keep || m.kind == MAPPING_ZERO_ALLOCATED))
    *done = m.length;
  return 0;
}

/* Zero by bytes: parts of clusters, or units that have no zero flag. */
static int
zero_bytes (struct qcow2 *q, uint64_t count, uint64_t offset, bool keep)
{
  while (count > 0) {
    uint64_t done;
    int r;

    if (request_goes_on (q) == -1)
      return -1;
    const grace_ticket ticket = grace_enter (&q->requests);
    r = zero_in_place (q, piece_of (count, offset, ZERO_PIECE), offset, keep,
                       &done);
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

/* Does a range have no data to overwrite? */
static int
range_is_fast (struct qcow2 *q, uint64_t count, uint64_t offset, bool keep)
{
  while (count > 0) {
    struct mapping m;

    if (request_goes_on (q) == -1 ||
        mapping_lookup (q, offset, count, &m) == -1)
      return -1;
    if (!reads_as_zeroes (q, m.kind, offset, &m.length) ||
        (keep && m.kind != MAPPING_ZERO_ALLOCATED)) {
      errno = ENOTSUP;
      return -1;
    }
    offset += m.length;
    count -= m.length;
  }
  return 0;
}

/* The method that makes the units of a write-zeroes request zero, or NULL if
 * all of it is zeroed by bytes.
 */
static slice_function *
zero_method (const struct qcow2 *q, bool keep, uint64_t offset)
{
  if (q->data_file_raw || (keep && q->has_data_file))
    return NULL;
  if (q->header.version >= 3)
    return keep ? zero_keep_slice : zero_slice;
  return keep || offset < q->backing_size ? NULL : trim_slice;
}

/* A write-zeroes request: units that the method makes zero, and the bytes
 * before and after them.
 */
struct zero_plan {
  slice_function *method;
  struct units u;               /* if there are none, all is the head */
  uint64_t head, tail;          /* bytes */
};

static int
plan_zero (struct qcow2 *q, uint64_t count, uint64_t offset, bool keep,
           struct zero_plan *p)
{
  struct units u =
    whole_units (q, keep ? q->cluster_bits : q->unit_bits, count, offset);

  if (leave_out_compressed (q, &u) == -1)
    return -1;
  *p = (struct zero_plan) {
    .method = zero_method (q, keep, offset), .u = u, .head = count,
  };
  if (p->method != NULL && u.first < u.end) {
    p->head = (u.first << u.bits) - offset;
    if (u.end << u.bits < offset + count)
      p->tail = offset + count - (u.end << u.bits);
  }
  else
    p->u.end = u.first;
  return 0;
}

static int
plan_is_fast (struct qcow2 *q, uint64_t offset, bool keep,
              const struct zero_plan *p)
{
  if (range_is_fast (q, p->head, offset, keep) == -1)
    return -1;
  return range_is_fast (q, p->tail, p->u.end << p->u.bits, keep);
}

int
qcow2_zero_is_fast (struct qcow2 *q, uint64_t count, uint64_t offset,
                    unsigned flags)
{
  const bool keep = flags & QCOW2_ZERO_KEEP;
  struct zero_plan p;

  assert (!range_exceeds (offset, count, q->size));
  return plan_zero (q, count, offset, keep, &p) == -1 ? -1
    : plan_is_fast (q, offset, keep, &p);
}

int
qcow2_zero (struct qcow2 *q, uint64_t count, uint64_t offset, unsigned flags)
{
  const bool keep = flags & QCOW2_ZERO_KEEP;
  struct zero_plan p;

  assert (!range_exceeds (offset, count, q->size));
  if (qcow2_begin_writing (q) == -1 ||
      plan_zero (q, count, offset, keep, &p) == -1)
    return -1;
  if ((flags & QCOW2_ZERO_FAST) != 0 &&
      plan_is_fast (q, offset, keep, &p) == -1)
    return -1;
  if (zero_bytes (q, p.head, offset, keep) == -1 ||
      (p.u.first < p.u.end && for_each_slice (q, &p.u, p.method) == -1))
    return -1;
  return zero_bytes (q, p.tail, p.u.end << p.u.bits, keep);
}

int
qcow2_trim (struct qcow2 *q, uint64_t count, uint64_t offset)
{
  struct units u = whole_units (q, q->unit_bits, count, offset);

  assert (!range_exceeds (offset, count, q->size));
  if (qcow2_begin_writing (q) == -1)
    return -1;
  if (q->data_file_raw)
    return zero_bytes (q, count, offset, false);
  if (q->header.version < 3)
    /* The backing file would show through. */
    u.first = max_u64 (u.first, div_round_up (q->backing_size,
                                              q->cluster_size));
  if (leave_out_compressed (q, &u) == -1)
    return -1;
  return u.first < u.end ? for_each_slice (q, &u, trim_slice) : 0;
}
