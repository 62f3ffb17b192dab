/* nbdkit-dirty-bitmap-filter
 * SPDX-License-Identifier: BSD-3-Clause
 * Copyright the nbdkit-dirty-bitmap-filter authors
 */

/* Places that lost their data and stay the guest's.
 *
 * When a cluster or subcluster becomes zero or unallocated, it may keep its
 * host cluster: for write-zeroes that keeps clusters, where other
 * subclusters have data, and in an external data file.  The next write fills
 * the place, and then points the L2 entry at it again.
 *
 * In between, a request that looked the old entry up may still be under way.
 * If it wrote into the place after the new write filled it, its data would
 * read as zeroes until the entry points at them, even if it was answered
 * meanwhile, and would come back then (I8).  If it read the place, it would
 * have seen data before the next read sees zeroes.  So a write that fills a
 * place first waits until all requests have ended that were under way when
 * the place lost its data.
 *
 * All places share one grace period to wait for, the last one.  A request
 * that need not wait for it, because its place was never data, or was
 * emptied long ago, waits a little longer than necessary.  In exchange
 * nothing has to be remembered for each place.
 */

#include <config.h>

#include "qcow2/internal.h"

/* Did data go, while the guest keeps their place?  The new entry has no data
 * that the old one did not have.
 */
static bool
empties_place (const struct qcow2 *q, const struct l2_entry *old,
               const struct l2_entry *new)
{
  const uint64_t differ = old->descriptor ^ new->descriptor;

  if (!q->has_data_file && (old->descriptor & OFLAG_COMPRESSED) != 0)
    return false;
  if (!q->has_data_file && (differ & ENTRY_OFFSET_MASK) != 0)
    return false;
  if (q->extended_l2)
    return (uint32_t) (old->bitmap & ~new->bitmap) != 0;
  return differ != 0 && (old->descriptor & OFLAG_ZERO) == 0 &&
    (old->descriptor & (ENTRY_OFFSET_MASK | OFLAG_COPIED)) != 0;
}

void
reuse_entries_changed (struct qcow2 *q, unsigned nr,
                       const struct l2_entry *old, const struct l2_entry *new)
{
  grace_period period, before;
  unsigned i = 0;

  while (i < nr && !empties_place (q, &old[i], &new[i]))
    i++;
  if (i == nr)
    return;
  period = grace_begin (&q->requests);
  before = atomic_load (&q->emptied);
  while (before < period &&
         !atomic_compare_exchange_weak (&q->emptied, &before, period))
    ;
}

bool
reuse_must_wait (struct qcow2 *q, const struct mapping *m)
{
  grace_period period = atomic_load (&q->emptied);

  if (period == 0 ||
      !(q->has_data_file || mapping_owns_cluster (q, m->descriptor)))
    return false;
  if (!grace_ended (&q->requests, period))
    return true;
  /* Unless there is a later period. */
  atomic_compare_exchange_strong (&q->emptied, &period, 0);
  return false;
}

void
reuse_wait (struct qcow2 *q)
{
  grace_wait (&q->requests, atomic_load (&q->emptied));
}
