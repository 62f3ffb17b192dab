/* nbdkit-dirty-bitmap-filter
 * SPDX-License-Identifier: BSD-3-Clause
 * Copyright the nbdkit-dirty-bitmap-filter authors
 */

#ifndef DIRTY_BITMAP_DISK_CHUNK_H
#define DIRTY_BITMAP_DISK_CHUNK_H

/* Putting a chunk (struct qcow2_chunk) together from several pieces.
 *
 * chunk_begin empties it.  Then pieces are added in the order of their
 * offsets, until one of them completes it or chunk.length is chunk.count.  A
 * piece begins at chunk.length, and may reach up to chunk_limit from there.
 */

#include <stdbool.h>
#include <stdint.h>

struct qcow2_chunk;

extern void chunk_begin (struct qcow2_chunk *);
extern uint64_t chunk_limit (const struct qcow2_chunk *);

/* Add `length` zero bytes: a hole that ends the data or is a piece by itself,
 * or zeroes among the data.  True if the chunk is complete.
 */
extern bool chunk_add_zeroes (struct qcow2_chunk *, uint64_t length);

/* It reads a chunk as disk_read_chunk does. */
typedef int (*chunk_read_fn) (void *opaque, uint64_t offset,
                              struct qcow2_chunk *);

/* disk_read_chunk of a struct disk. */
extern int chunk_read_disk (void *disk, uint64_t offset,
                            struct qcow2_chunk *);

/* Add `length` bytes, or what read_fn returns of them, which may be any
 * shorter.  1 if the chunk is complete, 0 if not, -1 if read_fn fails.
 */
extern int chunk_add_read (struct qcow2_chunk *, uint64_t length,
                           chunk_read_fn read_fn, void *opaque,
                           uint64_t offset);

#endif /* DIRTY_BITMAP_DISK_CHUNK_H */
