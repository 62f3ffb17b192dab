/* nbdkit-dirty-bitmap-filter
 * SPDX-License-Identifier: BSD-3-Clause
 * Copyright the nbdkit-dirty-bitmap-filter authors
 */

#ifndef DIRTY_BITMAP_BLOCKS_H
#define DIRTY_BITMAP_BLOCKS_H

/* Requests of any range, over an implementation that takes only whole blocks
 * (container->block_bytes).  Only container.c calls these.
 */

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

struct container;

extern void blocks_init (struct container *);
extern void blocks_free (struct container *);

/* As the operations of the same name. */
extern int blocks_pread (struct container *, void *buf, size_t count,
                         uint64_t offset);
extern int blocks_pwrite (struct container *, const void *buf, size_t count,
                          uint64_t offset);
extern int blocks_zero (struct container *, uint64_t count, uint64_t offset,
                        bool punch);

#endif /* DIRTY_BITMAP_BLOCKS_H */
