/* nbdkit-dirty-bitmap-filter
 * SPDX-License-Identifier: BSD-3-Clause
 * Copyright the nbdkit-dirty-bitmap-filter authors
 */

/* The disk as seen through one bitmap: dirty bytes are the disk's data, and
 * clean bytes read as zeroes.
 *
 * The disk may be written meanwhile.  A bit is set before the data are changed
 * (disk.c).  No bit is cleared while a client reads: a command that clears
 * bits cuts the offer of the bitmap, and reads by that offer fail (offers.h).
 * So:
 *
 * - A write that was acknowledged before a read of the delta began has
 *   its bits set, and the read returns it.
 * - If a write is under way during the read, the read finds each granule
 *   either clean, and returns zeroes, as if the read had come first; or
 *   dirty, and returns the old data or the new.
 * - Bytes that were reported dirty never read as a clean hole later.
 *
 * Each run is looked up once, and only runs that were dirty then are read
 * from the disk.
 */

#include <config.h>

#include <string.h>

#include "disk/chunk.h"
#include "disk/internal.h"

int
disk_delta_read (struct disk *d, const struct disk_offer *bitmap, void *buf,
                 uint32_t count, uint64_t offset)
{
  uint8_t *p = buf;
  uint64_t n;
  bool dirty;

  if (disk_check_range (d, count, offset) == -1)
    return -1;
  for (; count > 0; p += n, offset += n, count -= n) {
    n = disk_bitmap_run (bitmap, offset, offset + count, &dirty);
    if (n == 0)
      return -1;
    if (!dirty)
      memset (p, 0, n);
    else if (disk_read (d, p, n, offset) == -1)
      return -1;
  }
  return 0;
}

int
disk_delta_read_chunk (struct disk *d, const struct disk_offer *bitmap,
                       uint64_t offset, struct qcow2_chunk *c)
{
  int complete = 0;

  if (disk_check_range (d, c->limit, offset) == -1)
    return -1;
  chunk_begin (c);
  while (complete == 0 && c->length < c->count) {
    const uint64_t at = offset + c->length;
    bool dirty;
    const uint64_t n = disk_bitmap_run (bitmap, at, at + chunk_limit (c),
                                        &dirty);

    if (n == 0)
      return -1;
    complete = dirty ? chunk_add_read (c, n, chunk_read_disk, d, at)
      : chunk_add_zeroes (c, n);
  }
  return complete == -1 ? -1 : 0;
}

int
disk_delta_extent (struct disk *d, const struct disk_offer *bitmap,
                   uint64_t offset, uint64_t limit, uint64_t *length,
                   uint32_t *flags)
{
  bool dirty;

  if (disk_check_extent (d, offset, limit) == -1)
    return -1;
  *length = disk_bitmap_run (bitmap, offset, limit, &dirty);
  if (*length == 0)
    return -1;
  *flags = disk_delta_flags (dirty);
  return 0;
}
