/* nbdkit-dirty-bitmap-filter
 * SPDX-License-Identifier: BSD-3-Clause
 * Copyright the nbdkit-dirty-bitmap-filter authors
 */

/* The order of writes.
 *
 * A reference is on disk only after what it refers to.  write_in_order is
 * that order, a step a line; qcow2/order.h has each rule that it keeps.
 * What each barrier is for:
 *
 *   the first     guest data, bitmap data, refcounts and new, zeroed tables
 *                 are durable, and so are in_use flags that marks have set.
 *                 Only then is anything written that refers to them
 *   the second    the references are durable: L2 and L1 entries, and bitmap
 *                 table entries.  Nothing needs it if none was written
 *   the third     in_use is durably clear in the bitmaps that had new table
 *                 entries.  Nothing needs it if there are none
 *
 * So a flush that finds no references to write pays one barrier.  qcow2/
 * may add barriers of its own, where new refcount blocks are made, or more
 * slices are dirty than are copied at a time (qcow2/flush.c).
 *
 * If a step of the image fails, the flush fails.  What it has not made
 * durable stays dirty, and the next flush starts over.
 *
 * If a step of the bitmaps fails, the flush goes on without them, and does
 * not report that: guest data do not depend on what the bitmaps write, and
 * the bitmaps know what they could not do (bitmap/sync.c).  If they lacked
 * space, another flush with bitmaps follows, if clusters could be freed in
 * between.
 */

#include <config.h>

#include <errno.h>
#include <stdbool.h>
#include <stddef.h>

#include "bitmap/bitmap.h"
#include "common/report.h"
#include "disk/flush.h"
#include "qcow2/order.h"
#include "qcow2/qcow2.h"
#include "qcow2/steps.h"

/* Of an image and its bitmaps. */
struct joint_flush {
  struct qcow2 *image;
  struct bitmap_set *bitmaps;   /* NULL: none, or none any more */
  bool lack_space;              /* the bitmaps did */
};

/* A step of the bitmaps has returned r: did it write?  If it has failed, no
 * more steps of theirs follow.
 */
static bool
wrote (struct joint_flush *f, int r)
{
  if (r == -1) {
    f->lack_space |= errno == ENOSPC;
    bitmap_flush_failed (f->bitmaps);
    f->bitmaps = NULL;
  }
  return r == 1;
}

static void
write_bits (struct joint_flush *f)
{
  /* Here 1 means that something was left for the next flush. */
  if (f->bitmaps != NULL && wrote (f, bitmap_flush_data (f->bitmaps)))
    f->lack_space = true;
}

static bool
write_bitmap_tables (struct joint_flush *f)
{
  return f->bitmaps != NULL && wrote (f, bitmap_flush_references (f->bitmaps));
}

static bool
settle_bitmaps (struct joint_flush *f)
{
  return f->bitmaps != NULL && wrote (f, bitmap_flush_settle (f->bitmaps));
}

static void
end_bitmaps (struct joint_flush *f, bool success)
{
  if (f->bitmaps != NULL)
    (success ? bitmap_flush_done : bitmap_flush_failed) (f->bitmaps);
}

static int
write_in_order (struct joint_flush *f)
{
  struct qcow2 *q = f->image;
  bool any;

  if (qcow2_flush_redo (q) == -1)
    return -1;
  write_bits (f);
  if (qcow2_flush_copy (q) == -1 ||
      qcow2_flush_refcounts (q) == -1 ||
      qcow2_flush_targets_barrier (q) == -1)
    return -1;
  any = write_bitmap_tables (f);
  if (qcow2_flush_references (q, &any) == -1 ||
      (any && ORDER (REFERENCES_BEFORE_RETURN) &&
       qcow2_flush_barrier (q) == -1))
    return -1;
  return settle_bitmaps (f) && ORDER (SETTLED_BEFORE_RETURN)
    ? qcow2_flush_barrier (q) : 0;
}

/* With the flush lock held.  *lack_space says whether the bitmaps lacked
 * space.
 */
static int
flush (struct qcow2 *q, struct bitmap_set *bitmaps, bool *lack_space)
{
  struct joint_flush f = { .image = q, .bitmaps = bitmaps };
  int r, err;

  qcow2_flush_begin (q);
  r = write_in_order (&f);
  err = errno;
  end_bitmaps (&f, r == 0);
  qcow2_flush_end (q, r == 0, bitmaps != NULL);
  *lack_space = f.lack_space;
  errno = err;
  return r;
}

int
image_flush_locked (struct qcow2 *q, struct bitmap_set *bitmaps)
{
  struct report_hold hold;
  bool lack_space;

  report_hold_begin (&hold);
  return report_hold_result (&hold, flush (q, bitmaps, &lack_space));
}

static int
flush_since (struct qcow2 *q, struct bitmap_set *bitmaps,
             uint64_t number, bool *lack_space)
{
  int r = 0, err;

  *lack_space = false;
  qcow2_flush_lock (q);
  if (!qcow2_flushed_since (q, number, bitmaps != NULL))
    r = flush (q, bitmaps, lack_space);
  err = errno;
  qcow2_flush_unlock (q);
  errno = err;
  return r;
}

int
image_flush (struct qcow2 *q, struct bitmap_set *bitmaps)
{
  const uint64_t number = qcow2_flushes_begun (q);
  struct report_hold hold;
  bool lack_space;
  int r;

  if (qcow2_is_readonly (q))
    return 0;
  report_hold_begin (&hold);
  r = flush_since (q, bitmaps, number, &lack_space);
  if (r == 0 && lack_space && qcow2_can_reclaim (q) &&
      qcow2_reclaim_quietly (q) == 0)
    r = flush_since (q, bitmaps, qcow2_flushes_begun (q), &lack_space);
  return report_hold_result (&hold, r);
}

int
image_settle (struct qcow2 *q, struct bitmap_set *bitmaps)
{
  if (qcow2_is_readonly (q))
    return 0;
  /* Freeing clusters changes refcounts, which are flushed again.  While
   * other threads go on writing, this would never end.
   */
  for (unsigned rounds = 0; rounds < 3; ++rounds) {
    if (image_flush (q, bitmaps) == -1)
      return -1;
    if (qcow2_is_settled (q) || qcow2_reclaim_quietly (q) == -1)
      break;
  }
  return 0;
}

/* The same as image_flush, with the flush lock held.  No request is under
 * way, so the clusters need not wait for one.
 */
static int
flush_to_stop (struct qcow2 *q, struct bitmap_set *bitmaps)
{
  struct report_hold hold;
  bool lack_space, unused;
  int r;

  report_hold_begin (&hold);
  r = flush (q, bitmaps, &lack_space);
  if (r == 0 && lack_space && qcow2_can_reclaim (q) &&
      (r = flush (q, NULL, &unused)) == 0) {
    qcow2_retire_all (q);
    r = flush (q, bitmaps, &unused);
  }
  return report_hold_result (&hold, r);
}

int
image_stop (struct qcow2 *q, struct bitmap_set *bitmaps)
{
  int r = qcow2_stop_begins (q), err;

  if (r != 1)
    return r;
  qcow2_flush_lock (q);
  r = flush_to_stop (q, bitmaps) == -1 ? -1 : qcow2_stop_ends (q);
  err = errno;
  qcow2_flush_unlock (q);
  errno = err;
  return r;
}
