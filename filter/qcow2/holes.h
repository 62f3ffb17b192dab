/* nbdkit-dirty-bitmap-filter
 * SPDX-License-Identifier: BSD-3-Clause
 * Copyright the nbdkit-dirty-bitmap-filter authors
 */

#ifndef DIRTY_BITMAP_QCOW2_HOLES_H
#define DIRTY_BITMAP_QCOW2_HOLES_H

/* Space for metadata that is written later (holes.c says why).
 *
 * Metadata is divided into chunks of at most 4096 bytes, each of which has a
 * byte of flags: bit i is set while sector i of the chunk, of 512 bytes,
 * reads as zeroes in the container and may have no storage there.  A table
 * has an array of these bytes.  The lock that protects the metadata protects
 * its flags, too.
 */

#include <stddef.h>
#include <stdint.h>

#include "qcow2/qcow2.h"

#define HOLES_CHUNK_BYTES 4096
#define HOLES_SECTOR_BYTES 512

/* All sectors of a chunk. */
#define HOLES_ALL 0xff

/* The flags of a chunk whose bytes were just read from the container, or
 * will be zero there from now on.  count is a multiple of 8.
 */
extern uint8_t holes_in (const void *bytes, size_t count);

/* The same for a table, allocated.  NULL, with an error, if out of memory. */
extern uint8_t *holes_in_table (const void *bytes, size_t count);

/* Call this before a byte of a chunk, at byte offset `at` in it, becomes
 * nonzero in RAM: it makes sure that the byte's sector has storage.  The
 * chunk, of count bytes, is at host_offset.  -1, with an error, if there is
 * no space: then the change must not be made.
 *
 * It writes zeroes where the container has zeroes, so it needs no order with
 * other writes.  The caller has called gate_pass.
 */
extern int holes_fill (struct qcow2 *, enum qcow2_class, uint8_t *holes,
                       uint64_t host_offset, size_t count, size_t at);

/* The same for a byte of a table of count bytes. */
extern int holes_fill_table (struct qcow2 *, enum qcow2_class,
                             uint8_t *holes, uint64_t table_offset,
                             size_t count, size_t at);

/* Write a chunk except its holes, which are zero in RAM, too. */
extern int holes_write_around (struct qcow2 *, enum qcow2_class,
                               const void *bytes, size_t count,
                               uint8_t holes, uint64_t host_offset);

#endif /* DIRTY_BITMAP_QCOW2_HOLES_H */
