/* nbdkit-dirty-bitmap-filter
 * SPDX-License-Identifier: BSD-3-Clause
 * Copyright the nbdkit-dirty-bitmap-filter authors
 */

/* The disk as one bitmap has it: what is dirty in the bitmap is the
 * disk's data, and what is clean reads as zeroes.
 *
 * While the disk is written.  Bits are set before the data are changed
 * (disk.c), and as long as the disk is open they are not cleared, so:
 *
 * - A write that was acknowledged before a read of the delta began has
 *   its bits set, and the read returns it.
 * - Of a write that goes on meanwhile the read finds each granule clean,
 *   and returns zeroes, as if it had come first; or dirty, and returns
 *   the old data or the new.
 * - What was told as dirty never reads as a clean hole later.
 *
 * Each run is looked at once, and only what was dirty then is read from
 * the disk.
 */

#include <config.h>

#include <errno.h>
#include <string.h>

#include "common/bytes.h"
#include "disk/disk.h"

int
disk_delta_read (struct disk *d, size_t bitmap, void *buf, uint32_t count,
                 uint64_t offset)
{
  uint8_t *p = buf;
  uint64_t n;
  bool dirty;

  if (range_exceeds (offset, count, disk_size (d))) {
    errno = EINVAL;
    return -1;
  }
  for (; count > 0; p += n, offset += n, count -= n) {
    n = disk_bitmap_run (d, bitmap, offset, offset + count, &dirty);
    if (!dirty)
      memset (p, 0, n);
    else if (disk_read (d, p, n, offset) == -1)
      return -1;
  }
  return 0;
}

int
disk_delta_extent (struct disk *d, size_t bitmap, uint64_t offset,
                   uint64_t limit, uint64_t *length, uint32_t *flags)
{
  bool dirty;

  if (limit <= offset || limit > disk_size (d)) {
    errno = EINVAL;
    return -1;
  }
  *length = disk_bitmap_run (d, bitmap, offset, limit, &dirty);
  *flags = disk_delta_flags (dirty);
  return 0;
}
