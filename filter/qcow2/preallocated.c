/* nbdkit-dirty-bitmap-filter
 * SPDX-License-Identifier: BSD-3-Clause
 * Copyright the nbdkit-dirty-bitmap-filter authors
 */

/* Was the image preallocated without its data?
 *
 * Then all of the disk has clusters (preallocation=metadata), and most of
 * them were never written.  What the entries say is true, they
 * are data; but the storage knows that they are zeroes, and a backup need
 * not read them.  To ask the storage costs two system calls a run, so
 * that is not done for an image that is as full as it says.
 *
 * As QEMU does it, the image is taken for preallocated if many more of its
 * clusters have refcounts than there is storage for: a tenth more, and
 * more than two.  The refcounts on disk are counted, once, when the first
 * client asks, and only as far as it takes; and only if the file has holes
 * at all.  It is a guess, and all that hangs on it is that the question is
 * asked.
 *
 * A raw data file says by itself how full it is: all of it is referred to
 * from the beginning.
 */

#include <config.h>

#include <stdlib.h>

#include "qcow2/internal.h"

/* Refcount blocks that are read at most. */
#define MAX_READ_BYTES (UINT64_C (64) << 20)

enum { UNKNOWN, NO, YES };

/* How many clusters make an image that has storage for so many bytes a
 * preallocated one.
 */
static uint64_t
threshold (const struct qcow2 *q, uint64_t allocated)
{
  const uint64_t real = allocated >> q->cluster_bits;

  return real + max_u64 (real / 9, 2);
}

/* Count the clusters of a refcount block that are used, up to max. */
static uint64_t
count_block (const struct qcow2 *q, const uint8_t *block, uint64_t entries,
             uint64_t max)
{
  uint64_t count = 0;

  for (uint64_t i = 0; i < entries && count < max; ++i)
    count += refcount_entry (q, block, i) != 0;
  return count;
}

/* Does the image use so many clusters?  If that cannot be found out it
 * does not.
 */
static bool
uses_clusters (struct qcow2 *q, uint64_t nr)
{
  const unsigned block_bits = q->cluster_bits + 3 - q->header.refcount_order;
  const uint64_t clusters = container_size (q->container) >> q->cluster_bits;
  const uint64_t blocks =
    min_u64 (div_round_up (clusters, UINT64_C (1) << block_bits),
             (uint64_t) q->header.reftable_clusters << (q->cluster_bits - 3));
  CLEANUP_FREE uint8_t *block = malloc (q->cluster_size);
  uint64_t count = 0, bytes = 0, entry;

  for (uint64_t i = 0; block != NULL && i < blocks && count < nr; ++i) {
    if (container_pread (q->container, &entry, 8,
                         q->header.reftable_offset + i * 8) == -1)
      return false;
    entry = be64toh (entry);
    if (entry == 0 || (entry & REFTABLE_RESERVED_MASK) != 0)
      continue;
    bytes += q->cluster_size;
    if (bytes > MAX_READ_BYTES ||
        container_pread (q->container, block, q->cluster_size, entry) == -1)
      return false;
    count += count_block (q, block,
                          min_u64 (UINT64_C (1) << block_bits,
                                   clusters - (i << block_bits)),
                          nr - count);
  }
  return count >= nr;
}

static bool
find_out (struct qcow2 *q)
{
  struct container *c = q->data;
  uint64_t allocated, nr;

  if ((q->has_data_file && !q->data_file_raw) ||
      container_allocated (c, &allocated) == -1)
    return false;
  nr = threshold (q, allocated);
  if (container_size (c) >> q->cluster_bits < nr)
    return false;
  return q->has_data_file || uses_clusters (q, nr);
}

bool
is_preallocated (struct qcow2 *q)
{
  int is = atomic_load_explicit (&q->preallocated, memory_order_relaxed);

  if (is != UNKNOWN)
    return is == YES;

  ACQUIRE_LOCK_FOR_CURRENT_SCOPE (&q->preallocated_lock);
  if (atomic_load (&q->preallocated) == UNKNOWN) {
    atomic_store (&q->preallocated, find_out (q) ? YES : NO);
    report_debug ("the image %s preallocated without its data",
                  atomic_load (&q->preallocated) == YES ? "was" : "was not");
  }
  return atomic_load (&q->preallocated) == YES;
}
