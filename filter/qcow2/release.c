/* nbdkit-dirty-bitmap-filter
 * SPDX-License-Identifier: BSD-3-Clause
 * Copyright the nbdkit-dirty-bitmap-filter authors
 */

/* Clusters on their way from used to free.
 *
 * When the last entry that refers to a cluster changes in RAM, the cluster
 * is released, but it is not free:
 *
 *   released   an entry on disk may still refer to it.  If it were reused
 *              and the power failed, that entry would show what was written
 *              there since
 *   flushing   the flush under way began after the entry was changed
 *   durable    no entry on disk refers to it.  But a request that looked
 *              the entry up before may still read or write the cluster
 *   waiting    a grace period for such requests is under way
 *
 * After that the storage is given back, the refcount is lowered, and the
 * cluster may be reused.  A crash on the way leaks the cluster.  If the
 * refcount cannot be read or written, the cluster keeps waiting.
 */

#include <config.h>

#include <assert.h>
#include <errno.h>
#include <inttypes.h>
#include <stdlib.h>
#include <time.h>

#include "common/vector.h"
#include "qcow2/internal.h"

/* No more ranges than this are kept back, nor more bytes than this or an
 * eighth of the container.
 */
#define MAX_PENDING_RANGES 65536
#define MAX_PENDING_BYTES (UINT64_C (64) << 20)

/* Clusters processed while rc.lock is held. */
#define CHUNK 1024

static int
list_add (struct qcow2 *q, struct release_list *list,
          uint64_t cluster, uint64_t nr)
{
  list->nr_clusters += nr;
  if (list->nr > 0) {
    struct release_range *last = &list->ranges[list->nr - 1];

    if (last->cluster + last->nr == cluster) {
      last->nr += nr;
      return 0;
    }
  }
  if (vector_reserve (list->ranges, list->nr, list->max, 1) == -1) {
    list->nr_clusters -= nr;
    return -1;
  }
  list->ranges[list->nr].cluster = cluster;
  list->ranges[list->nr++].nr = nr;
  atomic_fetch_add (&q->release.pending_ranges, 1);
  return 0;
}

/* Move all of one list to the end of another. */
static void
list_move (struct release_list *to, struct release_list *from)
{
  if (from->nr == 0)
    return;
  if (to->nr == 0) {
    const struct release_list empty = *to;

    *to = *from;
    *from = empty;
    return;
  }

  if (vector_reserve (to->ranges, to->nr, to->max, from->nr) == -1)
    return;                     /* they stay in the earlier list */
  memcpy (to->ranges + to->nr, from->ranges,
          from->nr * sizeof from->ranges[0]);
  to->nr += from->nr;
  to->nr_clusters += from->nr_clusters;
  from->nr = from->nr_clusters = 0;
}

void
release_clusters (struct qcow2 *q, uint64_t cluster, uint64_t nr)
{
  struct release_list *list =
    ORDER (RELEASED_BEFORE_FLUSH) ? &q->release.released
    : &q->release.flushing;

  ACQUIRE_LOCK_FOR_CURRENT_SCOPE (&q->release.lock);
  if (list_add (q, list, cluster, nr) == -1) {
    report_warning ("out of memory: %" PRIu64 " clusters are leaked at host "
                    "offset %#" PRIx64, nr, cluster << q->cluster_bits);
    return;
  }
  atomic_fetch_add (&q->release.pending_clusters, nr);
}

/* Released clusters are punched, so this must be guest data. */
int
release_check_entry (struct qcow2 *q, uint64_t entry)
{
  uint64_t host = entry & ENTRY_OFFSET_MASK, bytes = q->cluster_size;

  if (q->has_data_file)
    return 0;                   /* its clusters have no refcount */
  if (entry & OFLAG_COMPRESSED)
    compressed_location (q, entry, &host, &bytes);
  else if (host == 0)
    return 0;
  else if (host % q->cluster_size != 0) {
    report_error ("the L2 entry %#" PRIx64 " is invalid: the image is corrupt "
                  "and takes no more writes", entry);
    gate_set_corrupt (q);
    errno = EIO;
    return -1;
  }
  return gate_check (q, QCOW2_DATA, host, bytes);
}

void
release_entry (struct qcow2 *q, uint64_t entry)
{
  if (entry & OFLAG_COMPRESSED) {
    uint64_t host, bytes;

    compressed_location (q, entry, &host, &bytes);
    const uint64_t first = host >> q->cluster_bits;
    release_clusters (q, first,
                      ((host + bytes - 1) >> q->cluster_bits) - first + 1);
  }
  else if ((entry & ENTRY_OFFSET_MASK) != 0)
    release_clusters (q, (entry & ENTRY_OFFSET_MASK) >> q->cluster_bits, 1);
}

void
qcow2_release (struct qcow2 *q, uint64_t host_offset, uint64_t nr_clusters)
{
  qcow2_unregister (q, host_offset, nr_clusters << q->cluster_bits);
  release_clusters (q, host_offset >> q->cluster_bits, nr_clusters);
}

void
release_flush_begins (struct qcow2 *q)
{
  ACQUIRE_LOCK_FOR_CURRENT_SCOPE (&q->release.lock);
  list_move (&q->release.flushing, &q->release.released);
}

void
release_flush_ends (struct qcow2 *q, bool success)
{
  ACQUIRE_LOCK_FOR_CURRENT_SCOPE (&q->release.lock);
  list_move (success ? &q->release.durable : &q->release.released,
             &q->release.flushing);
}

/* Read the counts of up to nr clusters.  Returns how many were read. */
static unsigned
read_counts (struct qcow2 *q, uint64_t cluster, unsigned nr,
             uint64_t counts[CHUNK])
{
  ACQUIRE_LOCK_FOR_CURRENT_SCOPE (&q->rc.lock);
  for (unsigned i = 0; i < nr; ++i)
    if (refcount_get (q, cluster + i, &counts[i]) == -1)
      return i;
  return nr;
}

/* Give up a reference that is not the last. */
static bool
lower_count (struct qcow2 *q, uint64_t cluster, uint64_t count)
{
  if (count == 0) {
    report_warning ("the cluster at host offset %#" PRIx64 " was in use "
                    "with refcount 0; see qemu-img check",
                    cluster << q->cluster_bits);
    return true;
  }
  ACQUIRE_LOCK_FOR_CURRENT_SCOPE (&q->rc.lock);
  return refcount_set (q, cluster, count - 1) == 0;
}

/* Give back the storage of a run, then free the clusters.  In this order,
 * since another thread may take them the moment their count is 0.  Returns
 * how many were freed.
 */
static uint64_t
free_run (struct qcow2 *q, uint64_t cluster, uint64_t nr)
{
  uint64_t c = cluster;

  container_zero (q->container, nr << q->cluster_bits,
                  cluster << q->cluster_bits, true);

  ACQUIRE_LOCK_FOR_CURRENT_SCOPE (&q->rc.lock);
  while (c < cluster + nr && refcount_set (q, c, 0) == 0)
    c++;
  q->rc.cursor = min_u64 (q->rc.cursor, cluster);
  tally_add (&q->rc.freed, c - cluster);
  return c - cluster;
}

/* Free the clusters of a range, and remove them from it. */
static int
free_range (struct qcow2 *q, struct release_range *r)
{
  uint64_t counts[CHUNK];

  while (r->nr > 0) {
    const unsigned want = min_u64 (r->nr, CHUNK);
    const unsigned n = read_counts (q, r->cluster, want, counts);
    unsigned i = 0, run, done;

    for (; i < n; i += done) {
      for (run = 0; i + run < n && counts[i + run] == 1; ++run)
        ;
      if (run > 0)
        done = free_run (q, r->cluster, run);
      else {
        run = 1;
        done = lower_count (q, r->cluster, counts[i]);
      }
      r->cluster += done;
      r->nr -= done;
      if (done < run)
        return -1;
    }
    if (n < want)
      return -1;
  }
  return 0;
}

/* Free the waiting clusters.  A cluster whose refcount cannot be read or
 * written stays.
 */
static int
free_waiting (struct qcow2 *q)
{
  struct release_list *list = &q->release.waiting;
  const size_t nr = list->nr;
  const uint64_t nr_clusters = list->nr_clusters;
  struct report_hold hold;
  size_t kept = 0;

  list->nr_clusters = 0;
  report_hold_begin (&hold);
  for (size_t i = 0; i < nr; ++i)
    if (free_range (q, &list->ranges[i]) == -1) {
      list->nr_clusters += list->ranges[i].nr;
      list->ranges[kept++] = list->ranges[i];
    }
  report_hold_end (&hold);
  list->nr = kept;
  atomic_fetch_sub (&q->release.pending_ranges, nr - kept);
  atomic_fetch_sub (&q->release.pending_clusters,
                    nr_clusters - list->nr_clusters);
  if (kept == 0)
    return 0;
  report_warning ("%" PRIu64 " clusters could not be freed: %s",
                  list->nr_clusters, hold.any ? hold.text : "no reason");
  return -1;
}

void
release_forget (struct qcow2 *q)
{
  report_warning ("%" PRIu64 " clusters are leaked; qemu-img check -r leaks "
                  "frees them", q->release.waiting.nr_clusters);
  atomic_fetch_sub (&q->release.pending_ranges, q->release.waiting.nr);
  atomic_fetch_sub (&q->release.pending_clusters,
                    q->release.waiting.nr_clusters);
  q->release.waiting.nr = q->release.waiting.nr_clusters = 0;
  q->release.grace_under_way = false;
}

/* Has the grace period of the waiting list ended? */
static bool
grace_is_over (struct qcow2 *q, bool wait)
{
  for (unsigned tries = 0; !grace_ended (&q->requests, q->release.retiring);
       ++tries) {
    const struct timespec ts = { .tv_nsec = 100000 };

    if (!wait)
      return false;
    if (tries > 100)
      nanosleep (&ts, NULL);
  }
  return true;
}

/* End the grace period under way, if it can end, and free the clusters that
 * wait for it.
 */
static int
end_grace (struct qcow2 *q, bool wait)
{
  if (!q->release.grace_under_way || !grace_is_over (q, wait))
    return 0;
  if (free_waiting (q) == -1)
    return -1;
  q->release.grace_under_way = false;
  return 0;
}

int
release_retire (struct qcow2 *q, bool wait)
{
  assert (lock_is_mine (&q->flush.lock));
  /* Only the flush, of which there is one, uses these two lists. */
  if (end_grace (q, wait) == -1)
    return -1;
  if (q->release.grace_under_way)
    return 0;
  pthread_mutex_lock (&q->release.lock);
  if (q->release.durable.nr != 0) {
    list_move (&q->release.waiting, &q->release.durable);
    q->release.grace_under_way = true;
    q->release.retiring = grace_begin (&q->requests);
  }
  pthread_mutex_unlock (&q->release.lock);
  return end_grace (q, wait);
}

bool
release_wants_reclaim (struct qcow2 *q)
{
  const uint64_t bytes =
    atomic_load_explicit (&q->release.pending_clusters, memory_order_relaxed)
    << q->cluster_bits;

  return bytes > max_u64 (MAX_PENDING_BYTES,
                          container_size (q->container) / 8) ||
    atomic_load_explicit (&q->release.pending_ranges, memory_order_relaxed)
    > MAX_PENDING_RANGES;
}

bool
release_is_empty (struct qcow2 *q)
{
  return atomic_load (&q->release.pending_clusters) == 0;
}

void
release_free (struct qcow2 *q)
{
  free (q->release.released.ranges);
  free (q->release.flushing.ranges);
  free (q->release.durable.ranges);
  free (q->release.waiting.ranges);
}
