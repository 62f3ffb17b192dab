/* nbdkit-dirty-bitmap-filter
 * SPDX-License-Identifier: BSD-3-Clause
 * Copyright the nbdkit-dirty-bitmap-filter authors
 */

/* What an export shows: each function asks the view, the bitmap of the delta,
 * or the disk itself.
 */

#include <config.h>

#include "disk/disk.h"
#include "nbd/contents.h"
#include "nbd/exports.h"

int
contents_read (struct disk *disk, const struct export *e, void *buf,
               uint32_t count, uint64_t offset)
{
  if (e->view != NULL)
    return disk_view_read (e->view, buf, count, offset);
  if (e->delta != NULL)
    return disk_delta_read (disk, e->delta, buf, count, offset);
  return disk_read (disk, buf, count, offset);
}

int
contents_read_chunk (struct disk *disk, const struct export *e,
                     uint64_t offset, struct qcow2_chunk *chunk)
{
  if (e->view != NULL)
    return disk_view_read_chunk (e->view, offset, chunk);
  if (e->delta != NULL)
    return disk_delta_read_chunk (disk, e->delta, offset, chunk);
  return disk_read_chunk (disk, offset, chunk);
}

int
contents_extent (struct disk *disk, const struct export *e, uint64_t offset,
                 uint64_t limit, uint64_t *length, uint32_t *flags)
{
  if (e->view != NULL)
    return disk_view_extent (e->view, offset, limit, length, flags);
  if (e->delta != NULL)
    return disk_delta_extent (disk, e->delta, offset, limit, length, flags);
  return disk_extent (disk, offset, limit, length, flags);
}

int
contents_cache (struct disk *disk, const struct export *e, uint64_t count,
                uint64_t offset)
{
  return e->view != NULL ? 0 : disk_cache (disk, count, offset);
}
