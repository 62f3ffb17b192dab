/* nbdkit-dirty-bitmap-filter
 * SPDX-License-Identifier: BSD-3-Clause
 * Copyright the nbdkit-dirty-bitmap-filter authors
 */

#ifndef DIRTY_BITMAP_DISK_DATA_H
#define DIRTY_BITMAP_DISK_DATA_H

/* The guest's data: in the image, or beside it (data.c).
 *
 * Functions return 0, or -1 with errno set and the reason reported.  Ranges
 * lie inside the disk.  Changes are made inside a section of the gate, after
 * the range was marked.
 */

#include <stdbool.h>
#include <stdint.h>

#include "disk/disk.h"

extern int data_read (struct disk *, void *buf, uint32_t count,
                      uint64_t offset);
extern int data_read_chunk (struct disk *, uint64_t offset,
                            struct qcow2_chunk *);

/* Before the first of all changes of the disk, whatever it changes. */
extern int data_begin_change (struct disk *);

/* If *durable is set, make the write durable where that can be done at once,
 * and clear *durable if a flush must follow.
 */
extern int data_write (struct disk *, const void *buf, uint32_t count,
                       uint64_t offset, bool *durable);

/* flags as of qcow2_zero. */
extern int data_zero (struct disk *, uint64_t count, uint64_t offset,
                      unsigned flags);

/* Can all of the range be zeroed fast?  0, or -1, with ENOTSUP if not.  This
 * only looks.  Of a disk beside the image it finds no more than whether that
 * ever zeroes fast; data_zero finds the rest.
 */
extern int data_zero_is_fast (struct disk *, uint64_t count, uint64_t offset,
                              unsigned flags);
extern int data_trim (struct disk *, uint64_t count, uint64_t offset);
extern int data_cache (struct disk *, uint64_t count, uint64_t offset);

/* As disk_extent and disk_extent_depth. */
extern int data_extent (struct disk *, uint64_t offset, uint64_t limit,
                        uint64_t *length, uint32_t *flags);
extern int data_extent_depth (struct disk *, uint64_t offset, uint64_t limit,
                              uint64_t *length, uint32_t *depth);

/* Make the data durable that are beside the image.  Data in the image are
 * flushed with it (flush.h).
 */
extern int data_flush (struct disk *);

/* How many barriers have failed that the data depend on, as qcow2_lost. */
extern unsigned long data_lost (const struct disk *);

#endif /* DIRTY_BITMAP_DISK_DATA_H */
