/* nbdkit-dirty-bitmap-filter
 * SPDX-License-Identifier: BSD-3-Clause
 * Copyright the nbdkit-dirty-bitmap-filter authors
 */

/* Where the guest's data are: in the image, or in a disk beside it.
 *
 * How this works
 *
 * Usually the image has both the guest's data and the bitmaps.  With a disk
 * beside the image, the image has the bitmaps alone.  The two are storages
 * of their own, and nothing orders what they make durable, but this:
 *
 * - A mark is durable in the image before the change that it is for begins
 *   (I3, I9).  So a crash may leave bits for changes that never came, and
 *   never a change without its bit.
 * - Bits are cleared only by a command (I11), after all changes that they
 *   stand for are durable.
 *
 * So it does not matter which of the two a flush makes durable first, and a
 * failure of the one is no failure of the other: the data are safe if the
 * disk's own flush succeeds, and bitmaps that could not be stored stay marked,
 * or have their bits ahead.
 *
 * The tables of the image say nothing about the data.  But its gate must be
 * open before the first change: bitmaps that do not record the change must be
 * marked first (I7).
 */

#include <config.h>

#include <errno.h>
#include <inttypes.h>

#include "common/bytes.h"
#include "common/report.h"
#include "container/container.h"
#include "disk/data.h"
#include "disk/internal.h"

/* -1, reported, if r is. */
static int
result (int r, const char *verb, uint64_t count, uint64_t offset)
{
  if (r == -1)
    report_error ("cannot %s %" PRIu64 " bytes of the disk at offset %" PRIu64
                  ": %m", verb, count, offset);
  return r;
}

int
data_read (struct disk *d, void *buf, uint32_t count, uint64_t offset)
{
  if (d->beside == NULL)
    return qcow2_read (d->qcow2, buf, count, offset);
  return result (container_pread (d->beside, buf, count, offset), "read",
                 count, offset);
}

/* All is data: to look for holes would cost more than it saves. */
int
data_read_chunk (struct disk *d, uint64_t offset, struct qcow2_chunk *c)
{
  if (d->beside == NULL)
    return qcow2_read_chunk (d->qcow2, offset, c);
  c->is_hole = false;
  c->length = 0;
  if (c->buf == NULL)
    return 0;
  c->length = c->count;
  return data_read (d, c->buf, c->count, offset);
}

int
data_begin_change (struct disk *d)
{
  return d->beside == NULL ? 0 : qcow2_begin_writing (d->qcow2);
}

int
data_write (struct disk *d, const void *buf, uint32_t count, uint64_t offset,
            bool *durable)
{
  int r;

  if (d->beside == NULL) {
    *durable = false;
    return qcow2_write (d->qcow2, buf, count, offset);
  }
  r = *durable ? container_pwrite_durable (d->beside, buf, count, offset)
    : container_pwrite (d->beside, buf, count, offset);
  *durable = *durable && r == 0;
  return result (r == 1 ? 0 : r, "write", count, offset);
}

int
data_zero (struct disk *d, uint64_t count, uint64_t offset, unsigned flags)
{
  const bool punch = !(flags & QCOW2_ZERO_KEEP);
  int r;

  if (d->beside == NULL)
    return qcow2_zero (d->qcow2, count, offset, flags);
  if (qcow2_goes_on (d->qcow2) == -1)
    return -1;
  if (!(flags & QCOW2_ZERO_FAST))
    return result (container_zero (d->beside, count, offset, punch), "zero",
                   count, offset);
  r = container_zero_fast (d->beside, count, offset, punch);
  if (r != 1)
    return result (r, "zero", count, offset);
  errno = ENOTSUP;
  return -1;
}

int
data_zero_is_fast (struct disk *d, uint64_t count, uint64_t offset,
                   unsigned flags)
{
  if (d->beside == NULL)
    return qcow2_zero_is_fast (d->qcow2, count, offset, flags);
  if (d->abilities.zero_fast)
    return 0;
  errno = ENOTSUP;
  return -1;
}

int
data_trim (struct disk *d, uint64_t count, uint64_t offset)
{
  if (d->beside == NULL)
    return qcow2_trim (d->qcow2, count, offset);
  if (qcow2_goes_on (d->qcow2) == -1)
    return -1;
  return result (container_trim (d->beside, count, offset), "trim", count,
                 offset);
}

int
data_cache (struct disk *d, uint64_t count, uint64_t offset)
{
  if (d->beside == NULL)
    return qcow2_cache (d->qcow2, count, offset);
  return result (container_cache (d->beside, count, offset), "cache", count,
                 offset);
}

int
data_extent (struct disk *d, uint64_t offset, uint64_t limit,
             uint64_t *length, uint32_t *flags)
{
  enum qcow2_extent_type type;
  unsigned n;

  if (d->beside != NULL) {
    n = 0;
    if (result (container_extent (d->beside, offset, limit - offset, length,
                                  &n), "find the extents of", limit - offset,
                offset) == -1)
      return -1;
    /* R6: a hole that may read as anything is data. */
    *flags = n & CONTAINER_ZERO ? n : 0;
    return 0;
  }
  if (qcow2_extent (d->qcow2, offset, limit, length, &type, &n) == -1)
    return -1;
  switch (type) {
  case QCOW2_EXTENT_ZERO:
    *flags = DISK_EXTENT_ZERO;
    break;
  case QCOW2_EXTENT_UNALLOCATED:
    *flags = DISK_EXTENT_HOLE | DISK_EXTENT_ZERO;
    break;
  default:
    *flags = 0;
  }
  return 0;
}

int
data_extent_depth (struct disk *d, uint64_t offset, uint64_t limit,
                   uint64_t *length, uint32_t *depth)
{
  unsigned n = 1;

  *length = limit - offset;
  if (d->beside == NULL &&
      qcow2_extent (d->qcow2, offset, limit, length, NULL, &n) == -1)
    return -1;
  *depth = n;
  return 0;
}

int
data_flush (struct disk *d)
{
  if (d->beside == NULL || container_flush (d->beside) == 0)
    return 0;
  report_error ("cannot flush the disk: %m");
  return -1;
}

unsigned long
data_lost (const struct disk *d)
{
  return d->beside != NULL ? container_failed_flushes (d->beside)
    : qcow2_lost (d->qcow2);
}
