/* nbdkit-dirty-bitmap-filter
 * SPDX-License-Identifier: BSD-3-Clause
 * Copyright the nbdkit-dirty-bitmap-filter authors
 */

/* Writing guest data.
 *
 * A run of allocated clusters that only this image uses is written in place:
 * no lock, one call to the container.
 *
 * Everything else goes to new clusters, under a range lock.  The parts of
 * the first and last cluster (or subcluster) that the request does not cover
 * are copied from the old data, here or in the backing file.  The new
 * clusters are written, and only then do the L2 entries in RAM point to
 * them.  The L2 entries reach the disk with the next flush, after a barrier
 * (flush.c).  New clusters that read as zeroes need not be filled with
 * zeroes.
 *
 * "New" includes clusters that the entry already has, but that it does not
 * call data: explicit zeroes, or subclusters that are not allocated; and any
 * cluster of an external data file, where the place of guest data is always
 * the same.  These are filled only when no request that takes them for data
 * is under way any more (reuse.c).
 */

#include <config.h>

#include <assert.h>
#include <errno.h>
#include <inttypes.h>
#include <stdlib.h>

#include "qcow2/internal.h"
#include "qcow2/steps.h"

static int
write_host (struct qcow2 *q, const void *buf, uint64_t count, uint64_t host)
{
  if (change_check_host (q, host, count) == -1)
    return -1;
  if (container_pwrite (q->data, buf, count, host) == -1) {
    report_error ("cannot write %" PRIu64 " bytes at host offset %#" PRIx64
                  ": %m", count, host);
    return -1;
  }
  return 0;
}

/* New clusters on their way into the mapping. */
struct new_clusters {
  uint64_t guest_cluster, nr;   /* the guest clusters that they are for */
  uint64_t host;
  bool zeroed;                  /* they read as zeroes */
  bool reused;                  /* they already belong to the guest clusters */
  bool whole;                   /* all old data move with them */
  struct l2_entry old[L2_MAX_SLICE_ENTRIES];     /* the current entries */
};

/* The host offset of a guest offset in them. */
static uint64_t
new_host (const struct qcow2 *q, const struct new_clusters *new,
          uint64_t offset)
{
  return new->host + offset - (new->guest_cluster << q->cluster_bits);
}

/* The new clusters are filled up to multiples of this. */
static uint64_t
fill_size (const struct qcow2 *q, const struct new_clusters *new)
{
  return new->whole ? q->cluster_size : UINT64_C (1) << q->unit_bits;
}

/* Write a part of a cluster or subcluster, and the old data around it. */
static int
write_part (struct qcow2 *q, const struct new_clusters *new,
            const void *buf, uint64_t count, uint64_t offset)
{
  const uint64_t size = fill_size (q, new);
  const uint64_t start = round_down (offset, size);
  CLEANUP_FREE uint8_t *whole = malloc (size);

  if (whole == NULL) {
    report_error ("malloc: %m");
    return -1;
  }
  if (read_range (q, whole, size, start) == -1)
    return -1;
  memcpy (whole + (offset - start), buf, count);
  return write_host (q, whole, size, new_host (q, new, start));
}

/* Write the request into the new clusters, and the old data around it. */
static int
write_new (struct qcow2 *q, const struct new_clusters *new,
           enum mapping_kind kind, const uint8_t *buf, uint64_t count,
           uint64_t offset)
{
  const uint64_t size = fill_size (q, new);
  uint64_t length = count;

  if (new->zeroed && !new->whole &&
      reads_as_zeroes (q, kind, round_down (offset, size), &length))
    return write_host (q, buf, count, new_host (q, new, offset));

  while (count > 0) {
    const uint64_t in_unit = offset & (size - 1);
    uint64_t n = round_down (count, size);

    if (in_unit == 0 && n > 0) {
      if (write_host (q, buf, n, new_host (q, new, offset)) == -1)
        return -1;
    }
    else {
      n = min_u64 (count, size - in_unit);
      if (write_part (q, new, buf, n, offset) == -1)
        return -1;
    }
    offset += n;
    buf += n;
    count -= n;
  }
  return 0;
}

/* Does an entry have a host cluster, shared or not, or is it compressed? */
static bool
has_host (uint64_t descriptor)
{
  return (descriptor & (OFLAG_COMPRESSED | OFLAG_COPIED)) != 0 ||
    (descriptor & ENTRY_OFFSET_MASK) != 0;
}

/* Find host clusters for guest clusters that all begin as a run of one kind.
 * Their entries are new->old.
 */
static int
get_clusters (struct qcow2 *q, struct new_clusters *new)
{
  const uint64_t first = new->old[0].descriptor;

  new->reused = q->has_data_file;
  new->zeroed = false;
  if (q->has_data_file) {
    new->host = new->guest_cluster << q->cluster_bits;
    return 0;
  }
  if (mapping_owns_cluster (q, first)) {
    new->host = first & ENTRY_OFFSET_MASK;
    new->nr = 1;
    new->reused = true;
    return change_check_host (q, new->host, q->cluster_size);
  }
  if (q->extended_l2) {
    /* Subclusters that the request does not touch move, too. */
    new->whole = has_host (first);
    for (uint64_t i = 1; i < new->nr; ++i)
      if (new->whole || has_host (new->old[i].descriptor))
        new->nr = i;
  }
  return allocate_clusters (q, QCOW2_DATA, new->nr, &new->host, &new->nr,
                            &new->zeroed);
}

/* The subclusters of a new cluster that the request [offset, end) covers,
 * as bits.
 */
static uint32_t
covered (const struct qcow2 *q, const struct new_clusters *new,
         uint64_t guest_cluster, uint64_t offset, uint64_t end)
{
  const uint64_t start = guest_cluster << q->cluster_bits;
  const uint64_t from = offset > start ? (offset - start) >> q->unit_bits : 0;
  const uint64_t to =
    div_round_up (min_u64 (end - start, q->cluster_size),
                  UINT64_C (1) << q->unit_bits);

  return new->whole ? UINT32_MAX
    : (UINT32_MAX << from) & (UINT32_MAX >> (L2_SUBCLUSTERS - to));
}

/* Point the L2 entries at the new clusters, after [offset, end) was written. */
static int
publish (struct qcow2 *q, const struct new_clusters *new, uint64_t offset,
         uint64_t end)
{
  struct l2_entry entries[L2_MAX_SLICE_ENTRIES];

  for (uint64_t i = 0; i < new->nr; ++i) {
    if (!new->reused && release_check_entry (q, new->old[i].descriptor) == -1)
      return -1;
    entries[i].descriptor =
      (new->host + (i << q->cluster_bits)) | OFLAG_COPIED;
    entries[i].bitmap = 0;
    if (q->extended_l2) {
      const uint32_t bits =
        covered (q, new, new->guest_cluster + i, offset, end);

      entries[i].bitmap = (new->old[i].bitmap & ~((uint64_t) bits << 32))
        | bits;
    }
  }
  if (change_entries (q, new->guest_cluster, new->nr, entries) == -1)
    return -1;
  if (!new->reused)
    for (uint64_t i = 0; i < new->nr; ++i)
      release_entry (q, new->old[i].descriptor);
  return 0;
}

/* With the range lock held: write the beginning of a run that cannot be
 * written in place.  *done is how much was written.
 */
static int
write_allocate (struct qcow2 *q, const struct mapping *m, const void *buf,
                uint64_t offset, uint64_t *done)
{
  const uint64_t in_cluster = offset & (q->cluster_size - 1);
  struct new_clusters new;

  new.guest_cluster = guest_cluster_of (q, offset);
  new.nr = min_u64 (mapping_slice_left (q, new.guest_cluster),
                    div_round_up (in_cluster + m->length, q->cluster_size));
  new.whole = false;
  if (mapping_need_l2 (q, new.guest_cluster) == -1 ||
      l2_get (q, new.guest_cluster, new.nr, new.old) == -1 ||
      get_clusters (q, &new) == -1)
    return -1;

  *done = min_u64 (m->length, (new.nr << q->cluster_bits) - in_cluster);
  if (write_new (q, &new, m->kind, buf, *done, offset) == -1 ||
      publish (q, &new, offset, offset + *done) == -1) {
    const int err = errno;

    if (!new.reused)
      allocate_undo (q, new.host, new.nr);
    errno = err;
    return -1;
  }
  return 0;
}

static bool
can_be_written (const struct mapping *m)
{
  return m->kind == MAPPING_DATA && m->copied;
}

/* Write the beginning of a request that could not be written in place when m
 * was looked up.  m may have changed since.
 */
static int
write_locked (struct qcow2 *q, struct mapping *m, const void *buf,
              uint64_t offset, uint64_t *done)
{
  struct range_lock range;
  grace_ticket ticket;
  int r;

  range_lock_take (q, &range, guest_cluster_of (q, offset),
                   guest_cluster_of (q, offset + m->length - 1));
  if (mapping_lookup (q, offset, m->length, m) == -1) {
    range_lock_drop (q, &range);
    return -1;
  }
  if (!can_be_written (m) && reuse_must_wait (q, m))
    reuse_wait (q);
  ticket = grace_enter (&q->requests);
  if (can_be_written (m)) {
    /* Another request has allocated it.  Once this one is in a section, the
     * cluster is not reused (release.c).
     */
    range_lock_drop (q, &range);
    *done = m->length;
    r = write_host (q, buf, m->length, m->host);
  }
  else {
    r = write_allocate (q, m, buf, offset, done);
    range_lock_drop (q, &range);
  }
  grace_leave (&q->requests, ticket);
  return r;
}

/* Write the beginning of a request. */
static int
write_some (struct qcow2 *q, const void *buf, uint64_t count, uint64_t offset,
            uint64_t *done)
{
  const grace_ticket ticket = grace_enter (&q->requests);
  struct mapping m;
  int r = mapping_lookup (q, offset, count, &m);
  const bool in_place = r == 0 && can_be_written (&m);

  if (in_place) {
    *done = m.length;
    r = write_host (q, buf, m.length, m.host);
  }
  grace_leave (&q->requests, ticket);
  return r == -1 || in_place ? r : write_locked (q, &m, buf, offset, done);
}

int
qcow2_write (struct qcow2 *q, const void *buf, uint64_t count, uint64_t offset)
{
  const uint8_t *p = buf;
  bool retried = false;

  assert (!range_exceeds (offset, count, q->size));
  if (qcow2_begin_writing (q) == -1)
    return -1;
  while (count > 0) {
    struct report_hold hold;
    uint64_t done;
    int r;

    if (request_goes_on (q) == -1)
      return -1;
    if (release_wants_reclaim (q))
      qcow2_reclaim_quietly (q);
    report_hold_begin (&hold);
    r = write_some (q, p, piece_of (count, offset, DATA_PIECE), offset,
                    &done);
    report_hold_end (&hold);
    if (r == -1) {
      if (change_may_retry (q, &hold, &retried))
        continue;
      return -1;
    }
    p += done;
    offset += done;
    count -= done;
  }
  return 0;
}
