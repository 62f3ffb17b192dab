/* nbdkit-dirty-bitmap-filter
 * SPDX-License-Identifier: BSD-3-Clause
 * Copyright the nbdkit-dirty-bitmap-filter authors
 */

#ifndef DIRTY_BITMAP_QCOW2_STEPS_H
#define DIRTY_BITMAP_QCOW2_STEPS_H

/* The steps of a flush, and of the clean stop, of an image.
 *
 * disk/flush.c conducts them and has their order.  Functions return 0, or -1
 * with errno set and the reason reported, unless said otherwise.
 */

#include <stdbool.h>
#include <stdint.h>

struct qcow2;

/* One flush at a time.  The lock is taken before all locks of bitmap/. */
extern void qcow2_flush_lock (struct qcow2 *);
extern void qcow2_flush_unlock (struct qcow2 *);

/* How many flushes have begun.  Without the lock. */
extern uint64_t qcow2_flushes_begun (const struct qcow2 *);

/* With the lock held, as all that follows: has a flush succeeded that began
 * after `number` flushes had begun?  with_bitmaps: one that the bitmaps took
 * part in, even if they failed.
 */
extern bool qcow2_flushed_since (const struct qcow2 *, uint64_t number,
                                 bool with_bitmaps);

extern void qcow2_flush_begin (struct qcow2 *);

/* Make dirty, or write, again what failed barriers may have lost. */
extern int qcow2_flush_redo (struct qcow2 *);

/* Copy what is dirty of the L2 tables, and note which L1 entries are. */
extern int qcow2_flush_copy (struct qcow2 *);

/* Write the refcounts. */
extern int qcow2_flush_refcounts (struct qcow2 *);

/* A barrier, of the external data file, too: what the references refer to is
 * durable.
 */
extern int qcow2_flush_targets_barrier (struct qcow2 *);

/* Write the references: L2 slices and L1 entries.  Sets *wrote if there were
 * any, and else leaves it alone.
 */
extern int qcow2_flush_references (struct qcow2 *, bool *wrote);

/* A barrier that also fails if any has failed since the flush began. */
extern int qcow2_flush_barrier (struct qcow2 *);

/* Call it whether the flush has succeeded or not.  Keeps errno. */
extern void qcow2_flush_end (struct qcow2 *, bool success,
                             bool with_bitmaps);

/* Without the lock: are there clusters that a flush may free? */
extern bool qcow2_can_reclaim (struct qcow2 *);

/* Without the lock, outside sections, and with no range lock held: flush the
 * image alone, and free these clusters.  A failure is not reported as an
 * error, since the caller that needs the space reports it.
 */
extern int qcow2_reclaim_quietly (struct qcow2 *);

/* Without the lock: would the next flush have nothing to free, and no
 * refcounts to write?
 */
extern bool qcow2_is_settled (struct qcow2 *);

/* The clean stop.  No request is under way.  Without the lock: returns 1 if
 * there is something to stop, and then a flush and qcow2_stop_ends must
 * follow, 0 if not.
 */
extern int qcow2_stop_begins (struct qcow2 *);

/* With the lock held: free all released clusters. */
extern void qcow2_retire_all (struct qcow2 *);

/* With the lock held: free the released clusters, flush that, and cut the
 * container to the used part.
 */
extern int qcow2_stop_ends (struct qcow2 *);

#endif /* DIRTY_BITMAP_QCOW2_STEPS_H */
