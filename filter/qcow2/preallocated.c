/* nbdkit-dirty-bitmap-filter
 * SPDX-License-Identifier: BSD-3-Clause
 * Copyright the nbdkit-dirty-bitmap-filter authors
 */

/* Was the image preallocated without its data?
 *
 * Then all of the disk has clusters (preallocation=metadata), and most of
 * them were never written.  The entries are right to call them data; but the
 * storage knows that they are zeroes, and a backup need not read them.
 * Asking the storage costs two system calls a run, so it is not asked for an
 * image that is as full as its tables say.
 *
 * As in QEMU, the image is taken for preallocated if many more of its
 * clusters have refcounts than there is storage for: a tenth more, and more
 * than two.  The refcounts on disk are counted once, when the first client
 * asks, only if the file has holes at all, and only until the answer is
 * known.  It is a guess, which only decides whether the storage is asked.
 *
 * For a raw data file no refcounts are counted: the image refers to all of
 * it from the beginning.
 */

#include <config.h>

#include <stdlib.h>

#include "qcow2/internal.h"

/* The most bytes of refcount blocks that are read. */
#define MAX_READ_BYTES (UINT64_C (64) << 20)

enum { UNKNOWN, NO, YES };

/* How many clusters make an image with this much storage a preallocated one. */
static uint64_t
threshold (const struct qcow2 *q, uint64_t allocated)
{
  const uint64_t real = allocated >> q->cluster_bits;

  return real + max_u64 (real / 9, 2);
}

/* Count the used clusters of a refcount block, up to max. */
static uint64_t
count_block (const struct qcow2 *q, const uint8_t *block, uint64_t entries,
             uint64_t max)
{
  uint64_t count = 0;

  for (uint64_t i = 0; i < entries && count < max; ++i)
    count += refcount_format_get (block, q->header.refcount_order, i) != 0;
  return count;
}

/* Does the image use at least nr clusters?  False if that cannot be found
 * out.
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
  int is = atomic_load_explicit (&q->preallocated.known, memory_order_relaxed);

  if (is != UNKNOWN)
    return is == YES;

  ACQUIRE_LOCK_FOR_CURRENT_SCOPE (&q->preallocated.lock);
  if (atomic_load (&q->preallocated.known) == UNKNOWN) {
    atomic_store (&q->preallocated.known, find_out (q) ? YES : NO);
    report_debug ("the image %s preallocated without its data",
                  atomic_load (&q->preallocated.known) == YES
                  ? "was" : "was not");
  }
  return atomic_load (&q->preallocated.known) == YES;
}
