/* nbdkit-dirty-bitmap-filter
 * SPDX-License-Identifier: BSD-3-Clause
 * Copyright the nbdkit-dirty-bitmap-filter authors
 */

/* Freeing the clusters that nothing refers to any more, and the clean stop. */

#include <config.h>

#include <assert.h>
#include <errno.h>
#include <time.h>

#include "qcow2/internal.h"
#include "qcow2/steps.h"

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
  const int r = flush_alone (q);
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
qcow2_reclaim_quietly (struct qcow2 *q)
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

bool
qcow2_can_reclaim (struct qcow2 *q)
{
  return !release_is_empty (q);
}

bool
qcow2_is_settled (struct qcow2 *q)
{
  return release_is_empty (q) && atomic_load (&q->rc.nr_dirty) == 0;
}

static bool
all_clean (struct qcow2 *q)
{
  return qcow2_is_settled (q) &&
    atomic_load (&q->l2.nr_dirty) == 0 && q->l1.nr_dirty == 0;
}

/* No request is under way. */
void
qcow2_retire_all (struct qcow2 *q)
{
  assert (lock_is_mine (&q->flush.lock));
  if (release_retire (q, true) == -1 && release_retire (q, true) == -1)
    release_forget (q);
}

int
qcow2_stop_begins (struct qcow2 *q)
{
  if (!atomic_load (&q->gate.writing) &&
      !atomic_load (&q->gate.reftable_unknown))
    return 0;
  if (atomic_load (&q->gate.reftable_unknown) &&
      qcow2_begin_writing (q) == -1)
    return -1;
  allocate_forget_abandoned (q);
  return 1;
}

/* The same as flush_alone.  Of a flush that succeeds nothing is reported. */
static int
flush_to_stop (struct qcow2 *q)
{
  struct report_hold hold;

  report_hold_begin (&hold);
  return report_hold_result (&hold, flush_alone (q));
}

/* Cut the container to the used part. */
static int
cut (struct qcow2 *q)
{
  uint64_t end;

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

/* Freeing clusters changes refcounts, which are flushed again, without the
 * bitmaps: what they could not do, they could not do then either.
 */
int
qcow2_stop_ends (struct qcow2 *q)
{
  assert (lock_is_mine (&q->flush.lock));
  for (;;) {
    qcow2_retire_all (q);
    if (all_clean (q))
      return cut (q);
    if (flush_to_stop (q) == -1)
      return -1;
  }
}

int
qcow2_stop (struct qcow2 *q)
{
  int r = qcow2_stop_begins (q);

  if (r != 1)
    return r;
  ACQUIRE_LOCK_FOR_CURRENT_SCOPE (&q->flush.lock);
  return flush_to_stop (q) == -1 ? -1 : qcow2_stop_ends (q);
}
