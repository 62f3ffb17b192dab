/* nbdkit-dirty-bitmap-filter
 * SPDX-License-Identifier: BSD-3-Clause
 * Copyright the nbdkit-dirty-bitmap-filter authors
 */

/* Writing guest data.
 *
 * A run of clusters that are allocated, and this image's alone, is
 * written where it is: no lock, one call to the container.
 *
 * Everything else goes to new clusters, under a range lock: what the
 * request does not cover of its first and last cluster is copied from
 * what was there, the new clusters are written, and only then do the L2
 * entries in RAM point to them.  The L2 entries reach the disk with the
 * next flush, after a barrier (flush.c).  New clusters that read as
 * zeroes need not be filled with any.
 */

#include <config.h>

#include <errno.h>
#include <inttypes.h>
#include <stdlib.h>

#include "qcow2/internal.h"

int
write_check_host (struct qcow2 *q, uint64_t host, uint64_t count)
{
  const uint64_t end = round_up (container_size (q->container),
                                 q->cluster_size);

  if (range_exceeds (host, count, end)) {
    report_error ("the image is corrupt: an L2 entry points to %#" PRIx64
                  ", beyond the end of the file; see qemu-img check", host);
    errno = EIO;
    return -1;
  }
  return registry_check (q, QCOW2_DATA, host, count);
}

static int
write_host (struct qcow2 *q, const void *buf, uint64_t count, uint64_t host)
{
  if (write_check_host (q, host, count) == -1)
    return -1;
  if (container_pwrite (q->container, buf, count, host) == -1) {
    report_error ("cannot write %" PRIu64 " bytes at host offset %#" PRIx64
                  ": %m", count, host);
    return -1;
  }
  return 0;
}

/* New clusters on their way into the mapping. */
struct new_clusters {
  uint64_t guest_cluster, nr;   /* what they are for */
  uint64_t host;
  bool zeroed;                  /* they read as zeroes */
  bool reused;                  /* they were allocated before */
  uint64_t old[L2_MAX_SLICE_ENTRIES];    /* the entries as they are */
};

/* Write one new cluster which the request covers in part. */
static int
write_part (struct qcow2 *q, const struct new_clusters *new, uint64_t i,
            const void *buf, uint64_t count, uint64_t in_cluster)
{
  CLEANUP_FREE uint8_t *cluster = malloc (q->cluster_size);
  struct mapping old;

  if (cluster == NULL) {
    report_error ("malloc: %m");
    return -1;
  }
  mapping_decode (q, new->old[i], &old);
  if (read_cluster (q, &old, cluster) == -1)
    return -1;
  memcpy (cluster + in_cluster, buf, count);
  return write_host (q, cluster, q->cluster_size,
                     new->host + (i << q->cluster_bits));
}

static bool
reads_as_zeroes (enum mapping_kind kind)
{
  return kind == MAPPING_UNALLOCATED || kind == MAPPING_ZERO ||
    kind == MAPPING_ZERO_ALLOCATED;
}

/* Write the request into the new clusters, and around it what was there.
 * Everything in the run was of one kind.
 */
static int
write_new (struct qcow2 *q, const struct new_clusters *new,
           enum mapping_kind kind, const uint8_t *buf, uint64_t count,
           uint64_t offset)
{
  uint64_t in_cluster = offset & (q->cluster_size - 1), i = 0;

  if (new->zeroed && reads_as_zeroes (kind))
    return write_host (q, buf, count, new->host + in_cluster);

  while (count > 0) {
    uint64_t n = round_down (count, q->cluster_size);

    if (in_cluster == 0 && n > 0) {
      if (write_host (q, buf, n, new->host + (i << q->cluster_bits)) == -1)
        return -1;
    }
    else {
      n = min_u64 (count, q->cluster_size - in_cluster);
      if (write_part (q, new, i, buf, n, in_cluster) == -1)
        return -1;
    }
    i += (in_cluster + n) >> q->cluster_bits;
    in_cluster = 0;
    buf += n;
    count -= n;
  }
  return 0;
}

/* Find host clusters for a run of guest clusters. */
static int
get_clusters (struct qcow2 *q, const struct mapping *m,
              struct new_clusters *new)
{
  if (m->kind == MAPPING_ZERO_ALLOCATED && m->copied) {
    new->host = m->host;
    new->nr = 1;
    new->zeroed = false;
    new->reused = true;
    return write_check_host (q, m->host, q->cluster_size);
  }
  new->reused = false;
  return allocate_clusters (q, QCOW2_DATA, new->nr, &new->host, &new->nr,
                            &new->zeroed);
}

static int
publish (struct qcow2 *q, const struct new_clusters *new)
{
  uint64_t entries[L2_MAX_SLICE_ENTRIES];

  for (uint64_t i = 0; i < new->nr; ++i)
    if (release_check_entry (q, new->old[i]) == -1)
      return -1;
  for (uint64_t i = 0; i < new->nr; ++i)
    entries[i] = (new->host + (i << q->cluster_bits)) | OFLAG_COPIED;
  if (mapping_set (q, new->guest_cluster, new->nr, entries) == -1)
    return -1;
  if (!new->reused)
    for (uint64_t i = 0; i < new->nr; ++i)
      release_entry (q, new->old[i]);
  return 0;
}

/* With the range lock held: write the beginning of a run that cannot be
 * written in place.  *done says how much.
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
  if (mapping_need_l2 (q, new.guest_cluster) == -1 ||
      l2_get (q, new.guest_cluster, new.nr, new.old) == -1 ||
      get_clusters (q, m, &new) == -1)
    return -1;

  *done = min_u64 (m->length, (new.nr << q->cluster_bits) - in_cluster);
  if (write_new (q, &new, m->kind, buf, *done, offset) == -1 ||
      publish (q, &new) == -1) {
    const int err = errno;

    if (!new.reused)
      allocate_undo (q, new.host, new.nr);
    errno = err;
    return -1;
  }
  return 0;
}

/* Write the beginning of a request. */
static int
write_some (struct qcow2 *q, const void *buf, uint64_t count, uint64_t offset,
            uint64_t *done)
{
  struct mapping m;
  struct range_lock range;
  int r = 0;

  if (mapping_lookup (q, offset, count, &m) == -1)
    return -1;
  if (m.kind != MAPPING_DATA || !m.copied) {
    range_lock_take (q, &range, guest_cluster_of (q, offset),
                     guest_cluster_of (q, offset + m.length - 1));
    /* Someone may have allocated it meanwhile. */
    r = mapping_lookup (q, offset, m.length, &m);
    if (r == 0 && (m.kind != MAPPING_DATA || !m.copied)) {
      r = write_allocate (q, &m, buf, offset, done);
      range_lock_drop (q, &range);
      return r;
    }
    range_lock_drop (q, &range);
    if (r == -1)
      return -1;
  }
  *done = m.length;
  return write_host (q, buf, m.length, m.host);
}

/* After a failure: was it for want of space that freed clusters, which
 * are kept back for the next flush, can give?
 */
bool
write_may_retry (struct qcow2 *q, bool *retried)
{
  const int err = errno;

  if (err == ENOSPC && !*retried && !release_is_empty (q)) {
    *retried = true;
    if (qcow2_reclaim (q) == 0)
      return true;
  }
  if (err == ENOSPC)
    report_error ("no space is left for new clusters in the image: "
                  "the container cannot grow");
  errno = err;
  return false;
}

int
qcow2_write (struct qcow2 *q, const void *buf, uint64_t count, uint64_t offset)
{
  const uint8_t *p = buf;
  bool retried = false;

  if (header_begin_writing (q) == -1)
    return -1;
  while (count > 0) {
    uint64_t done;
    int r;

    if (release_wants_reclaim (q))
      qcow2_reclaim (q);
    const grace_ticket ticket = grace_enter (&q->requests);
    r = write_some (q, p, count, offset, &done);
    grace_leave (&q->requests, ticket);
    if (r == -1) {
      if (write_may_retry (q, &retried))
        continue;
      return -1;
    }
    p += done;
    offset += done;
    count -= done;
  }
  return 0;
}
