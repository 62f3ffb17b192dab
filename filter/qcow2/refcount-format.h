/* nbdkit-dirty-bitmap-filter
 * SPDX-License-Identifier: BSD-3-Clause
 * Copyright the nbdkit-dirty-bitmap-filter authors
 */

#ifndef DIRTY_BITMAP_QCOW2_REFCOUNT_FORMAT_H
#define DIRTY_BITMAP_QCOW2_REFCOUNT_FORMAT_H

/* The refcount table and refcount blocks as they are on disk (qcow2.rst,
 * "Host cluster management").  An entry of a block has 2^order bits, and
 * order is 0 to 6.  Entries of less than a byte begin with the lowest bits.
 */

#include <stdint.h>

#define REFTABLE_RESERVED_MASK UINT64_C (0x1ff)

/* Entry i of a block, or of a part of it that begins at a byte. */
extern uint64_t refcount_format_get (const uint8_t *block, unsigned order,
                                     uint64_t i);
extern void refcount_format_set (uint8_t *block, unsigned order, uint64_t i,
                                 uint64_t count);

/* The highest possible refcount. */
extern uint64_t refcount_format_max (unsigned order);

#endif /* DIRTY_BITMAP_QCOW2_REFCOUNT_FORMAT_H */
