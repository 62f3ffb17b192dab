/* nbdkit-dirty-bitmap-filter
 * SPDX-License-Identifier: BSD-3-Clause
 * Copyright the nbdkit-dirty-bitmap-filter authors
 */

/* What writing (write.c) and discarding (discard.c) share. */

#include <config.h>

#include <errno.h>
#include <inttypes.h>

#include "qcow2/internal.h"
#include "qcow2/steps.h"

int
change_entries (struct qcow2 *q, uint64_t guest_cluster, unsigned nr,
                const struct l2_entry *entries)
{
  while (l2_set (q, guest_cluster, nr, entries) == -1)
    if (errno != EAGAIN || qcow2_flush (q) == -1)
      return -1;
  return 0;
}

int
change_check_host (struct qcow2 *q, uint64_t host, uint64_t count)
{
  const uint64_t end = round_up (container_size (q->container),
                                 q->cluster_size);

  if (q->has_data_file)
    return 0;                   /* a data file has no metadata */
  if (range_exceeds (host, count, end)) {
    report_error ("the image is corrupt: an L2 entry points to %#" PRIx64
                  ", beyond the end of the file; see qemu-img check", host);
    errno = EIO;
    return -1;
  }
  return gate_check (q, QCOW2_DATA, host, count);
}

bool
reads_as_zeroes (const struct qcow2 *q, enum mapping_kind kind,
                 uint64_t offset, uint64_t *length)
{
  if (kind == MAPPING_UNALLOCATED)
    return layer_is_zero (q, offset, length);
  return kind == MAPPING_ZERO || kind == MAPPING_ZERO_ALLOCATED;
}

/* After a failure: was the cause a lack of space, which clusters that are
 * kept back for the next flush can relieve?  If so, the failure need not be
 * reported.
 */
bool
change_may_retry (struct qcow2 *q, const struct report_hold *failure,
                  bool *retried)
{
  const int err = errno;

  if (err == ENOSPC && !*retried && !release_is_empty (q)) {
    *retried = true;
    if (qcow2_reclaim_quietly (q) == 0)
      return true;
  }
  errno = err;
  report_held (failure);
  return false;
}
