/* nbdkit-dirty-bitmap-filter
 * SPDX-License-Identifier: BSD-3-Clause
 * Copyright the nbdkit-dirty-bitmap-filter authors
 */

/* The disk as seen through one bitmap: dirty bytes are the disk's data, and
 * clean bytes read as zeroes.
 *
 * The disk may be written meanwhile.  Bits are set before the data are
 * changed (disk.c), and they are not cleared: where a bitmap is, reads by
 * earlier offers fail (offers.h).  So:
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

#include <errno.h>
#include <string.h>

#include "common/bytes.h"
#include "disk/disk.h"

int
disk_delta_read (struct disk *d, const struct disk_offer *bitmap, void *buf,
                 uint32_t count, uint64_t offset)
{
  uint8_t *p = buf;
  uint64_t n;
  bool dirty;

  if (range_exceeds (offset, count, disk_size (d))) {
    errno = EINVAL;
    return -1;
  }
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

/* Add `length` clean bytes after `done` bytes of data: a hole that ends the
 * data or is a piece by itself, or zeroes among the data.  True if the piece
 * is complete.
 */
static bool
add_clean (struct qcow2_chunk *c, uint64_t length)
{
  const uint64_t done = c->length;

  if (length >= c->min_hole || (done == 0 && length == c->limit)) {
    if (done == 0) {
      c->is_hole = true;
      c->length = length;
    }
    return true;
  }
  if (c->buf == NULL)
    return true;
  length = min_u64 (length, c->count - done);
  memset ((uint8_t *) c->buf + done, 0, length);
  c->length += length;
  return false;
}

/* The same for dirty bytes, which are the disk's. */
static int
add_dirty (struct disk *d, uint64_t offset, struct qcow2_chunk *c,
           uint64_t length, bool *complete)
{
  const uint64_t done = c->length;
  struct qcow2_chunk piece = {
    .buf = c->buf == NULL ? NULL : (uint8_t *) c->buf + done,
    .count = min_u64 (length, c->count - done),
    .limit = done == 0 ? length : min_u64 (length, c->count - done),
    .min_hole = c->min_hole,
  };

  if (disk_read_chunk (d, offset + done, &piece) == -1)
    return -1;
  if (!piece.is_hole) {
    c->length += piece.length;
    *complete = c->buf == NULL;
  }
  else if (piece.length >= c->min_hole || piece.length == c->limit) {
    *complete = true;
    if (done == 0) {
      c->is_hole = true;
      c->length = piece.length;
    }
  }
  else
    *complete = add_clean (c, piece.length);
  return 0;
}

int
disk_delta_read_chunk (struct disk *d, const struct disk_offer *bitmap,
                       uint64_t offset, struct qcow2_chunk *c)
{
  bool complete = false;

  if (range_exceeds (offset, c->limit, disk_size (d))) {
    errno = EINVAL;
    return -1;
  }
  c->length = 0;
  c->is_hole = false;
  while (!complete && c->length < c->count) {
    const uint64_t at = offset + c->length;
    const uint64_t limit = c->length == 0 ? c->limit : c->count;
    bool dirty;
    const uint64_t n = disk_bitmap_run (bitmap, at, offset + limit, &dirty);

    if (n == 0)
      return -1;
    if (!dirty)
      complete = add_clean (c, n);
    else if (add_dirty (d, offset, c, n, &complete) == -1)
      return -1;
  }
  return 0;
}

int
disk_delta_extent (struct disk *d, const struct disk_offer *bitmap,
                   uint64_t offset, uint64_t limit, uint64_t *length,
                   uint32_t *flags)
{
  bool dirty;

  if (limit <= offset || limit > disk_size (d)) {
    errno = EINVAL;
    return -1;
  }
  *length = disk_bitmap_run (bitmap, offset, limit, &dirty);
  if (*length == 0)
    return -1;
  *flags = disk_delta_flags (dirty);
  return 0;
}
