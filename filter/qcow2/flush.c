/* nbdkit-dirty-bitmap-filter
 * SPDX-License-Identifier: BSD-3-Clause
 * Copyright the nbdkit-dirty-bitmap-filter authors
 */

/* The order of writes.
 *
 * A reference is on disk only after what it refers to.  Step by step,
 * with what each barrier is for:
 *
 *   hooks: data        bitmaps' data and new tables
 *   copy               dirty L2 slices, the list of dirty L1 entries:
 *                      what they refer to has been written, and has its
 *                      refcounts raised in RAM.  Later changes are the
 *                      next flush's
 *   refcount blocks    and, after a barrier of its own if there are new
 *                      blocks, the entries of the refcount table
 *   - barrier -        guest data, bitmap data, refcounts, new (zeroed)
 *                      L2 tables are durable
 *   hooks: references  bitmap tables and directory
 *   L2 slices, L1 entries
 *   - barrier -        only if any of these was written
 *   hooks: settle      - barrier, if it wrote -
 *   hooks: done
 *   released clusters  that no entry on disk refers to any more become
 *                      free (release.c)
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
 * A failed hook does not make the flush fail: it goes on without the hooks.
 * Guest data do not depend on what the hooks write.  If a hook lacked space,
 * another flush with hooks follows, if clusters could be freed in between.
 *
 * When a barrier fails, in a flush or elsewhere, it is unknown which of the
 * writes before it are on disk, and no later barrier will tell: Linux drops
 * a page that it could not write, and reports it once.  So failed barriers
 * are counted (qcow2_lost), and are handled as follows:
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

#include <errno.h>
#include <inttypes.h>
#include <stdlib.h>
#include <sys/types.h>
#include <time.h>

#include "common/clock.h"
#include "common/vector.h"
#include "qcow2/internal.h"

/* Dirty slices that are copied at a time. */
#define ROUND 2048

struct flush {
  const struct qcow2_flush_hooks *hooks; /* NULL: none, or none any more */
  bool lacks_space;             /* a hook did */
  struct l1_copies l1;
  struct l2_copy *copies;       /* of all rounds: pinned until the end */
  size_t nr_copies, max_copies;
  uint8_t *data;                /* of this round's copies */
  size_t round;                 /* how many fit into data */
  size_t next_set;
  bool references;              /* some were written */
  unsigned long lost;           /* failed barriers, before this flush began */
};

enum hook { HOOK_DATA, HOOK_REFERENCES, HOOK_SETTLE };

/* Call a hook, if there are any.  If it fails, this returns 0 and no more
 * hooks are called.
 */
static int
call_hook (struct flush *f, enum hook which)
{
  const struct qcow2_flush_hooks *h = f->hooks;
  int r;

  if (h == NULL)
    return 0;
  r = (which == HOOK_DATA ? h->data
       : which == HOOK_REFERENCES ? h->references : h->settle) (h->opaque);
  if (r == -1 ? errno == ENOSPC : r == 1 && which == HOOK_DATA)
    f->lacks_space = true;
  if (r != -1)
    return r;
  h->failed (h->opaque);
  f->hooks = NULL;
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

static int
write_slices (struct qcow2 *q, struct flush *f, size_t n)
{
  const struct l2_copy *copies;

  if (n == 0)
    return 0;
  copies = f->copies + f->nr_copies - n;
  for (size_t i = 0; i < n; ++i)
    if (l2_write_copy (q, &copies[i], f->data + i * l2_slice_bytes (q)) == -1)
      return -1;
  f->references = true;
  return 0;
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

static int
run_rounds (struct qcow2 *q, struct flush *f)
{
  bool first = true;
  unsigned long epoch;
  ssize_t n;

  do {
    n = copy_slices (q, f);
    if (n == -1 || mapping_take_dirty_l1 (q, &f->l1) == -1 ||
        (ORDER (REFCOUNTS_BEFORE_REFERENCES) &&
         refcounts_flush (q, f->lost) == -1) ||
        (ORDER (DATA_BEFORE_REFERENCES) && data_barrier (q) == -1))
      return -1;
    epoch = refcounts_barrier_begins (q);
    if (ORDER (DATA_BEFORE_REFERENCES) &&
        qcow2_barrier_since (q, f->lost) == -1)
      return -1;
    refcounts_barrier_done (q, epoch);
    if (first)
      f->references |= call_hook (f, HOOK_REFERENCES) == 1;
    first = false;
    if (write_slices (q, f, n) == -1)
      return -1;
  } while (n > 0 && f->next_set < q->l2.nr_sets);
  return ORDER (REFCOUNTS_BEFORE_REFERENCES)
    ? 0 : refcounts_flush (q, f->lost);
}

static int
run_steps (struct qcow2 *q, struct flush *f)
{
  if (f->lost != q->flush.lost_redone) {
    refcounts_redo_lost (q);
    if (mapping_zero_again (q) == -1)
      return -1;
    q->flush.lost_redone = f->lost;
  }
  call_hook (f, HOOK_DATA);
  if (run_rounds (q, f) == -1 || mapping_write_l1 (q, &f->l1) == -1)
    return -1;
  f->references |= f->l1.nr != 0;
  if (f->references && ORDER (REFERENCES_BEFORE_RETURN) &&
      qcow2_barrier_since (q, f->lost) == -1)
    return -1;
  return call_hook (f, HOOK_SETTLE) == 1 && ORDER (SETTLED_BEFORE_RETURN)
    ? qcow2_barrier_since (q, f->lost) : 0;
}

/* With flush.lock held.  *lacks_space, if it is not NULL, says whether a
 * hook lacked space.
 */
static int
flush (struct qcow2 *q, const struct qcow2_flush_hooks *hooks,
       bool *lacks_space)
{
  const unsigned long number = atomic_fetch_add (&q->flush.begun, 1) + 1;
  const uint64_t began = meter_clock ();
  struct flush f = { .hooks = hooks, .lost = qcow2_lost (q) };
  int r, err;

  release_flush_begins (q);
  if (!ORDER (REFERENCES_BEFORE_FREE)) {
    release_flush_ends (q, true);
    release_retire (q, true);
  }
  r = run_steps (q, &f);
  err = errno;
  mapping_l1_done (q, &f.l1, r == 0);
  l2_copies_done (q, f.copies, f.nr_copies, r == 0);
  release_flush_ends (q, r == 0);
  if (f.hooks != NULL)
    (r == 0 ? hooks->done : hooks->failed) (hooks->opaque);
  if (lacks_space != NULL)
    *lacks_space = f.lacks_space;
  tally_add (&q->flush.flushes[r == 0], 1);
  tally_add (&q->flush.ns[r == 0], meter_clock () - began);
  free (f.copies);
  free (f.data);
  if (r == 0) {
    q->flush.succeeded[hooks != NULL] = number;
    release_retire (q, false);
  }
  errno = err;
  return r;
}

/* Has a flush succeeded that began after `number` flushes had begun? */
static bool
flushed_since (const struct qcow2 *q, unsigned long number, bool with_hooks)
{
  return q->flush.succeeded[1] > number ||
    (!with_hooks && q->flush.succeeded[0] > number);
}

static int
flush_since (struct qcow2 *q, const struct qcow2_flush_hooks *hooks,
             unsigned long number, bool *lacks_space)
{
  ACQUIRE_LOCK_FOR_CURRENT_SCOPE (&q->flush.lock);
  *lacks_space = false;
  if (flushed_since (q, number, hooks != NULL))
    return 0;
  return flush (q, hooks, lacks_space);
}

int
qcow2_flush (struct qcow2 *q, const struct qcow2_flush_hooks *hooks)
{
  const unsigned long number = atomic_load (&q->flush.begun);
  struct report_hold hold;
  bool lacks_space;
  int r, err;

  if (q->readonly)
    return 0;
  report_hold_begin (&hold);
  r = flush_since (q, hooks, number, &lacks_space);
  /* A hook needs space, which only a flush can free. */
  if (r == 0 && lacks_space && !release_is_empty (q) &&
      reclaim_quietly (q) == 0)
    r = flush_since (q, hooks, atomic_load (&q->flush.begun),
                     &lacks_space);
  err = errno;
  report_hold_end (&hold);
  errno = err;
  if (r == -1)
    report_held (&hold);
  return r;
}

int
flush_metadata (struct qcow2 *q)
{
  return qcow2_flush (q, NULL);
}

/* The wait for requests under way holds no lock: they may be waiting for a
 * range whose holder waits for flush.lock.  A long request is not waited for
 * without limit; its clusters become free later.
 */
int
qcow2_reclaim (struct qcow2 *q)
{
  const struct timespec ts = { .tv_nsec = 100000 };
  bool done;

  pthread_mutex_lock (&q->flush.lock);
  const int r = flush (q, NULL, NULL);
  pthread_mutex_unlock (&q->flush.lock);
  if (r == -1)
    return -1;

  for (unsigned tries = 0; tries < 10000; ++tries) {
    pthread_mutex_lock (&q->flush.lock);
    const bool failed = release_retire (q, false) == -1;
    done = failed ||
      (!q->release.grace_under_way && q->release.durable.nr == 0);
    pthread_mutex_unlock (&q->flush.lock);
    if (done)
      break;
    nanosleep (&ts, NULL);
  }
  return 0;
}

int
reclaim_quietly (struct qcow2 *q)
{
  const int err = errno;
  struct report_hold hold;
  int r;

  report_hold_begin (&hold);
  r = qcow2_reclaim (q);
  report_hold_end (&hold);
  if (r == -1) {
    report_debug ("no clusters could be reclaimed: %s",
                  hold.any ? hold.text : "no reason");
    errno = err;
  }
  return r;
}

int
qcow2_settle (struct qcow2 *q, const struct qcow2_flush_hooks *hooks)
{
  if (q->readonly)
    return 0;
  /* Freeing clusters changes refcounts, which are flushed again.  While
   * other threads go on writing, this would never end.
   */
  for (unsigned rounds = 0; rounds < 3; ++rounds) {
    if (qcow2_flush (q, hooks) == -1)
      return -1;
    if (release_is_empty (q) && atomic_load (&q->rc.nr_dirty) == 0)
      break;
    if (reclaim_quietly (q) == -1)
      break;
  }
  return 0;
}

static bool
all_clean (struct qcow2 *q)
{
  return release_is_empty (q) && atomic_load (&q->rc.nr_dirty) == 0 &&
    atomic_load (&q->l2.nr_dirty) == 0 && q->l1.nr_dirty == 0;
}

/* Free all released clusters.  No request is under way. */
static void
retire_all (struct qcow2 *q)
{
  if (release_retire (q, true) == -1 && release_retire (q, true) == -1)
    release_forget (q);
}

/* Flush.  If a hook needs space that only a flush frees, flush again. */
static int
flush_to_stop (struct qcow2 *q, const struct qcow2_flush_hooks *hooks)
{
  struct report_hold hold;
  bool lacks_space;
  int r;

  report_hold_begin (&hold);
  r = flush (q, hooks, &lacks_space);
  if (r == 0 && lacks_space && !release_is_empty (q) &&
      (r = flush (q, NULL, NULL)) == 0) {
    retire_all (q);
    r = flush (q, hooks, NULL);
  }
  report_hold_end (&hold);
  if (r == -1)
    report_held (&hold);
  return r;
}

int
qcow2_stop (struct qcow2 *q, const struct qcow2_flush_hooks *hooks)
{
  uint64_t end;

  if (!atomic_load (&q->gate.writing) &&
      !atomic_load (&q->gate.reftable_unknown))
    return 0;
  if (atomic_load (&q->gate.reftable_unknown) && qcow2_begin_writing (q) == -1)
    return -1;
  allocate_forget_abandoned (q);
  ACQUIRE_LOCK_FOR_CURRENT_SCOPE (&q->flush.lock);
  /* Freeing clusters changes refcounts, which are flushed again, without
   * the hooks: what they could not do, they could not do then either.
   */
  do {
    if (flush_to_stop (q, hooks) == -1)
      return -1;
    hooks = NULL;
    retire_all (q);
  } while (!all_clean (q));

  /* Nothing that is known about a corrupt image can be relied on. */
  if (atomic_load (&q->gate.corrupt))
    return 0;
  if (allocate_used_end (q, &end) == -1)
    return -1;
  if (end < container_size (q->container) &&
      container_truncate (q->container, end) == -1) {
    report_error ("cannot cut the image to its end: %m");
    return -1;
  }
  return 0;
}
