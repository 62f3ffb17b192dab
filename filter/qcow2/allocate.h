/* nbdkit-dirty-bitmap-filter
 * SPDX-License-Identifier: BSD-3-Clause
 * Copyright the nbdkit-dirty-bitmap-filter authors
 */

#ifndef DIRTY_BITMAP_QCOW2_ALLOCATE_H
#define DIRTY_BITMAP_QCOW2_ALLOCATE_H

/* Finding free clusters; new refcount blocks and tables (allocate.c). */

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "qcow2/qcow2.h"

struct qcow2;

/* Without rc.lock: allocate at least one and at most nr contiguous clusters,
 * *got of them.  *zeroed says whether they read as zeroes.
 */
extern int allocate_clusters (struct qcow2 *, enum qcow2_class, uint64_t nr,
                              uint64_t *host_offset, uint64_t *got,
                              bool *zeroed);

/* Undo an allocation.  Nothing ever referred to the clusters. */
extern void allocate_undo (struct qcow2 *, uint64_t host_offset, uint64_t nr);

/* With rc.lock held: make the refcount block block_index, in a cluster that
 * nothing uses.
 */
extern int allocate_block_at (struct qcow2 *, uint64_t block_index,
                              uint64_t cluster);

/* With rc.lock held: make the refcount table larger, so that it has an entry
 * for block_index.  Its new place is found from `cluster` on, where every
 * cluster with no refcount is free.
 */
extern int allocate_larger_table (struct qcow2 *, uint64_t block_index,
                                  uint64_t cluster);

/* Without rc.lock: give back the clusters of an abandoned table, if
 * possible.
 */
extern void allocate_forget_abandoned (struct qcow2 *);

/* Where the container may be cut, in bytes: the end of the last cluster in
 * use, or of anything else that must not be lost.
 */
extern int allocate_used_end (struct qcow2 *, uint64_t *end);

#endif /* DIRTY_BITMAP_QCOW2_ALLOCATE_H */
