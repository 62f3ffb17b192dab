/* nbdkit-dirty-bitmap-filter
 * SPDX-License-Identifier: BSD-3-Clause
 * Copyright the nbdkit-dirty-bitmap-filter authors
 */

#ifndef DIRTY_BITMAP_NBD_CONTENTS_H
#define DIRTY_BITMAP_NBD_CONTENTS_H

/* What an export shows: the disk, a view, or a delta.
 *
 * These do for an export what disk_read, disk_read_chunk, disk_extent and
 * disk_cache do for the disk (disk.h), and fail as those do.
 *
 * nbd/ uses this, and so do the callbacks of nbdkit's own server.
 */

#include <stdint.h>

struct disk;
struct export;
struct qcow2_chunk;

extern int contents_read (struct disk *, const struct export *, void *buf,
                          uint32_t count, uint64_t offset);
extern int contents_read_chunk (struct disk *, const struct export *,
                                uint64_t offset, struct qcow2_chunk *);
extern int contents_extent (struct disk *, const struct export *,
                            uint64_t offset, uint64_t limit,
                            uint64_t *length, uint32_t *flags);

/* A view has no cache that could be filled: nothing is done. */
extern int contents_cache (struct disk *, const struct export *,
                           uint64_t count, uint64_t offset);

#endif /* DIRTY_BITMAP_NBD_CONTENTS_H */
