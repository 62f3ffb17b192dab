/* nbdkit-dirty-bitmap-filter
 * SPDX-License-Identifier: BSD-3-Clause
 * Copyright the nbdkit-dirty-bitmap-filter authors
 */

/* The steps of a flush of the image.
 *
 * disk/flush.c conducts them, with the steps of the bitmaps in between, and
 * says why they come in this order.  Where qcow2/ itself has to flush, to
 * make room in a cache or to free clusters, it leaves the bitmaps out:
 * flush_alone here.
 *
 *   begin              the clusters released up to now will be free after it
 *   redo               what failed barriers may have lost (below)
 *   copy               dirty L2 slices, the list of dirty L1 entries:
 *                      what they refer to has been written, and has its
 *                      refcounts raised in RAM.  Later changes are the
 *                      next flush's
 *   refcounts          refcount blocks and, after a barrier of its own if
 *                      there are new blocks, the entries of the refcount
 *                      table
 *   targets barrier    guest data, refcounts, new (zeroed) L2 tables are
 *                      durable, and all else that was written so far
 *   references         L2 slices, L1 entries
 *   end                released clusters that no entry on disk refers to any
 *                      more become free (release.c)
 *
 * L1 entries and the entries of the new L2 tables need no order between
 * them, see mapping.c.  Where there are more dirty slices than are copied at
 * a time, the steps from copy to the writing of L2 slices are repeated.  The
 * barrier of a round covers the L2 slices of the previous round.
 *
 * The L1 entries are taken after the slices are copied: so a slice that is
 * written has its L1 entry written by the same flush or an earlier one.
 *
 * A flush that fails leaves dirty everything that it has not made durable,
 * and the next flush starts over.
 *
 * After a barrier has failed (gate.c), here or elsewhere, this is done about
 * the writes before it:
 *
 *   metadata     the next flush writes again everything that RAM has and no
 *                barrier has covered: L2 slices and L1 entries, which are
 *                dirty until their flush succeeds; refcounts, which stay in
 *                RAM until a barrier has covered them; bitmaps
 *                (bitmap/sync.c); new L2 tables, which are zeroed again.  A
 *                barrier counts as failed if another one failed while a
 *                thread waited for it.  So I1 and I3 always hold
 *   guest data   are not in RAM.  Data written since the last flush that
 *                succeeded may be lost, with the rest of the clusters
 *                allocated for them.  Each client is told: its flush fails,
 *                or its next flush, if the barrier was issued for another
 *                client (disk_flush).  Then it has to write the data again
 */

#include <config.h>

#include <assert.h>
#include <errno.h>
#include <inttypes.h>
#include <stdlib.h>
#include <sys/types.h>

#include "common/clock.h"
#include "common/vector.h"
#include "qcow2/internal.h"
#include "qcow2/steps.h"

/* Dirty slices that are copied at a time. */
#define ROUND 2048

uint64_t
qcow2_flushes_begun (const struct qcow2 *q)
{
  return atomic_load (&q->flush.begun);
}

void
qcow2_flush_lock (struct qcow2 *q)
{
  pthread_mutex_lock (&q->flush.lock);
}

void
qcow2_flush_unlock (struct qcow2 *q)
{
  pthread_mutex_unlock (&q->flush.lock);
}

bool
qcow2_flushed_since (const struct qcow2 *q, uint64_t number,
                     bool with_bitmaps)
{
  assert (lock_is_mine (&q->flush.lock));
  return q->flush.succeeded[1] > number ||
    (!with_bitmaps && q->flush.succeeded[0] > number);
}

void
qcow2_flush_begin (struct qcow2 *q)
{
  assert (lock_is_mine (&q->flush.lock));
  q->flush.now = (struct flush) {
    .number = atomic_fetch_add (&q->flush.begun, 1) + 1,
    .began = meter_clock (),
    .lost = qcow2_lost (q),
  };
  release_flush_begins (q);
  if (!ORDER (REFERENCES_BEFORE_FREE)) {
    release_flush_ends (q, true);
    release_retire (q, true);
  }
}

int
qcow2_flush_redo (struct qcow2 *q)
{
  const unsigned long lost = q->flush.now.lost;

  assert (lock_is_mine (&q->flush.lock));
  if (lost == q->flush.lost_redone)
    return 0;
  refcounts_redo_lost (q);
  if (mapping_zero_again (q) == -1)
    return -1;
  q->flush.lost_redone = lost;
  return 0;
}

/* Copy the next slices to be written.  Returns their number, or -1. */
static ssize_t
copy_slices (struct qcow2 *q, struct flush *f)
{
  const size_t dirty = atomic_load (&q->l2.nr_dirty);
  size_t n;

  if (dirty == 0)
    return 0;
  if (f->data == NULL) {
    /* At least a whole set: so each round makes progress, however fast the
     * copied slices become dirty again.
     */
    f->round = min_u64 (ROUND, max_u64 (dirty, L2_WAYS));
    f->data = malloc (f->round * l2_slice_bytes (q));
    if (f->data == NULL) {
      report_error ("malloc: %m");
      return -1;
    }
  }
  if (vector_reserve (f->copies, f->nr_copies, f->max_copies,
                      f->round) == -1) {
    report_error ("realloc: %m");
    return -1;
  }
  n = l2_copy_dirty (q, &f->next_set, f->copies + f->nr_copies, f->data,
                     f->round);
  f->nr_copies += n;
  return n;
}

int
qcow2_flush_copy (struct qcow2 *q)
{
  struct flush *f = &q->flush.now;
  ssize_t n;

  assert (lock_is_mine (&q->flush.lock));
  n = copy_slices (q, f);
  if (n == -1)
    return -1;
  f->nr_unwritten = n;
  return mapping_take_dirty_l1 (q, &f->l1);
}

int
qcow2_flush_refcounts (struct qcow2 *q)
{
  assert (lock_is_mine (&q->flush.lock));
  return ORDER (REFCOUNTS_BEFORE_REFERENCES)
    ? refcounts_flush (q, q->flush.now.lost) : 0;
}

/* Make guest data durable that are not in the container. */
static int
data_barrier (struct qcow2 *q)
{
  if (q->has_data_file && container_flush (q->data) == -1) {
    report_error ("cannot flush the external data file: %m");
    return -1;
  }
  return 0;
}

int
qcow2_flush_targets_barrier (struct qcow2 *q)
{
  uint64_t epoch;

  assert (lock_is_mine (&q->flush.lock));
  if (ORDER (DATA_BEFORE_REFERENCES) && data_barrier (q) == -1)
    return -1;
  epoch = refcounts_barrier_begins (q);
  if (ORDER (DATA_BEFORE_REFERENCES) && qcow2_flush_barrier (q) == -1)
    return -1;
  refcounts_barrier_done (q, epoch);
  return 0;
}

/* Write the slices of this round. */
static int
write_slices (struct qcow2 *q, struct flush *f, bool *wrote)
{
  const size_t n = f->nr_unwritten;
  const struct l2_copy *copies;

  if (n == 0)
    return 0;
  copies = f->copies + f->nr_copies - n;
  for (size_t i = 0; i < n; ++i)
    if (l2_write_copy (q, &copies[i], f->data + i * l2_slice_bytes (q)) == -1)
      return -1;
  *wrote = true;
  return 0;
}

/* Write the copied slices; then round by round the dirty slices that did not
 * fit.
 */
static int
write_all_slices (struct qcow2 *q, struct flush *f, bool *wrote)
{
  if (write_slices (q, f, wrote) == -1)
    return -1;
  while (f->nr_unwritten > 0 && f->next_set < q->l2.nr_sets)
    if (qcow2_flush_copy (q) == -1 || qcow2_flush_refcounts (q) == -1 ||
        qcow2_flush_targets_barrier (q) == -1 ||
        write_slices (q, f, wrote) == -1)
      return -1;
  return 0;
}

int
qcow2_flush_references (struct qcow2 *q, bool *wrote)
{
  struct flush *f = &q->flush.now;

  assert (lock_is_mine (&q->flush.lock));
  if (write_all_slices (q, f, wrote) == -1 ||
      (!ORDER (REFCOUNTS_BEFORE_REFERENCES) &&
       refcounts_flush (q, f->lost) == -1) ||
      mapping_write_l1 (q, &f->l1) == -1)
    return -1;
  *wrote |= f->l1.nr != 0;
  return 0;
}

int
qcow2_flush_barrier (struct qcow2 *q)
{
  assert (lock_is_mine (&q->flush.lock));
  return qcow2_barrier_since (q, q->flush.now.lost);
}

void
qcow2_flush_end (struct qcow2 *q, bool success, bool with_bitmaps)
{
  const int err = errno;
  struct flush *f = &q->flush.now;

  assert (lock_is_mine (&q->flush.lock));
  mapping_l1_done (q, &f->l1, success);
  l2_copies_done (q, f->copies, f->nr_copies, success);
  release_flush_ends (q, success);
  tally_add (&q->flush.flushes[success], 1);
  tally_add (&q->flush.ns[success], meter_clock () - f->began);
  free (f->copies);
  free (f->data);
  if (success) {
    q->flush.succeeded[with_bitmaps] = f->number;
    release_retire (q, false);
  }
  errno = err;
}

int
flush_alone (struct qcow2 *q)
{
  bool wrote = false;
  int r = 0;

  assert (lock_is_mine (&q->flush.lock));
  qcow2_flush_begin (q);
  if (qcow2_flush_redo (q) == -1 ||
      qcow2_flush_copy (q) == -1 ||
      qcow2_flush_refcounts (q) == -1 ||
      qcow2_flush_targets_barrier (q) == -1 ||
      qcow2_flush_references (q, &wrote) == -1 ||
      (wrote && ORDER (REFERENCES_BEFORE_RETURN) &&
       qcow2_flush_barrier (q) == -1))
    r = -1;
  qcow2_flush_end (q, r == 0, false);
  return r;
}

int
qcow2_flush (struct qcow2 *q)
{
  const uint64_t number = qcow2_flushes_begun (q);
  struct report_hold hold;
  int r = 0, err;

  if (q->readonly)
    return 0;
  report_hold_begin (&hold);
  qcow2_flush_lock (q);
  if (!qcow2_flushed_since (q, number, false))
    r = flush_alone (q);
  err = errno;
  qcow2_flush_unlock (q);
  errno = err;
  return report_hold_result (&hold, r);
}
