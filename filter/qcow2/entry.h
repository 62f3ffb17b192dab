/* nbdkit-dirty-bitmap-filter
 * SPDX-License-Identifier: BSD-3-Clause
 * Copyright the nbdkit-dirty-bitmap-filter authors
 */

#ifndef DIRTY_BITMAP_QCOW2_ENTRY_H
#define DIRTY_BITMAP_QCOW2_ENTRY_H

/* L1 and L2 entries as bits (qcow2.rst, "Cluster mapping"). */

#include <stdint.h>

/* Bits of L1 and L2 entries. */
#define OFLAG_COPIED UINT64_C (0x8000000000000000)
#define OFLAG_COMPRESSED UINT64_C (0x4000000000000000)
#define OFLAG_ZERO UINT64_C (1)
#define ENTRY_OFFSET_MASK UINT64_C (0x00fffffffffffe00)
#define L1_RESERVED_MASK UINT64_C (0x7f000000000001ff)
#define L2_RESERVED_MASK UINT64_C (0x3f000000000001fe)
#define L2_SUBCLUSTERS 32

/* QEMU's limits.  They bound what a header can make us allocate. */
#define MAX_L1_BYTES (UINT64_C (32) << 20)
#define MAX_REFTABLE_BYTES (UINT64_C (8) << 20)

/* An L2 entry: the descriptor of the host cluster and, if the image has
 * extended entries, the bitmap of its subclusters, else 0.  The lower half
 * of the bitmap says which subclusters are allocated, the upper half which
 * read as zeroes.
 */
struct l2_entry {
  uint64_t descriptor;
  uint64_t bitmap;
};

#endif /* DIRTY_BITMAP_QCOW2_ENTRY_H */
