/* nbdkit-dirty-bitmap-filter
 * SPDX-License-Identifier: BSD-3-Clause
 * Copyright the nbdkit-dirty-bitmap-filter authors
 */

/* The guest's disk.
 *
 * Every change goes through mark, and only then to the image.  That is
 * the whole of it: a flush that begins after a request was answered
 * finds its granules set, whether the request succeeded or not.
 */

#include <config.h>

#include <errno.h>
#include <inttypes.h>
#include <stdlib.h>

#include "bitmap/bitmap.h"
#include "common/bytes.h"
#include "common/report.h"
#include "container/container.h"
#include "disk/disk.h"
#include "qcow2/qcow2.h"

struct disk {
  struct container *container;
  struct qcow2 *qcow2;
  struct bitmap_set *bitmaps;
  uint64_t size;
};

static int
open_parts (struct disk *d, struct container *c,
            const struct disk_options *options, bool check_only)
{
  const struct qcow2_options image = {
    .readonly = options->readonly,
    .cache_size = options->cache_size,
    .snapshot = options->snapshot,
  };
  const struct bitmap_options bitmaps = {
    .granularity = options->granularity,
    .require = options->require, .nr_require = options->nr_require,
    .expose = options->expose, .nr_expose = options->nr_expose,
    .check_only = check_only,
  };

  d->qcow2 = qcow2_open (c, &image);
  if (d->qcow2 == NULL)
    return -1;
  d->size = qcow2_size (d->qcow2);
  d->bitmaps = bitmap_set_open (d->qcow2, &bitmaps);
  return d->bitmaps == NULL ? -1 : 0;
}

static void
close_parts (struct disk *d)
{
  const int err = errno;

  if (d->bitmaps != NULL)
    bitmap_set_close (d->bitmaps);
  qcow2_close (d->qcow2);
  errno = err;
}

int
disk_check (struct container *c, const struct disk_options *options)
{
  struct disk d = { 0 };
  const int r = open_parts (&d, c, options, true);

  close_parts (&d);
  return r;
}

struct disk *
disk_open (struct container *c, const struct disk_options *options)
{
  struct disk *d = calloc (1, sizeof *d);

  if (d == NULL) {
    report_error ("calloc: %m");
    return NULL;
  }
  if (open_parts (d, c, options, false) == -1) {
    close_parts (d);
    free (d);
    return NULL;
  }
  d->container = c;
  return d;
}

int
disk_stop (struct disk *d)
{
  if (qcow2_is_readonly (d->qcow2))
    return 0;
  if (qcow2_stop (d->qcow2, bitmap_set_hooks (d->bitmaps)) == -1) {
    /* This says which bitmaps are the worse for it. */
    bitmap_set_all_stored (d->bitmaps);
    return -1;
  }
  return bitmap_set_all_stored (d->bitmaps) ? 0 : -1;
}

void
disk_close (struct disk *d)
{
  if (d == NULL)
    return;
  close_parts (d);
  container_close (d->container);
  free (d);
}

uint64_t
disk_size (const struct disk *d)
{
  return d->size;
}

bool
disk_is_readonly (const struct disk *d)
{
  return qcow2_is_readonly (d->qcow2);
}

uint32_t
disk_preferred_block_size (const struct disk *d)
{
  return qcow2_cluster_size (d->qcow2);
}

static int
check_range (const struct disk *d, uint64_t count, uint64_t offset)
{
  if (range_exceeds (offset, count, d->size)) {
    report_error ("a request for %" PRIu64 " bytes at offset %" PRIu64
                  " exceeds the disk", count, offset);
    errno = EINVAL;
    return -1;
  }
  return 0;
}

int
disk_read (struct disk *d, void *buf, uint32_t count, uint64_t offset)
{
  if (check_range (d, count, offset) == -1)
    return -1;
  return qcow2_read (d->qcow2, buf, count, offset);
}

/* What comes before every change. */
static int
begin_change (struct disk *d, uint64_t count, uint64_t offset)
{
  if (qcow2_is_readonly (d->qcow2)) {
    report_error ("the disk is read-only");
    errno = EROFS;
    return -1;
  }
  if (check_range (d, count, offset) == -1)
    return -1;
  return count == 0 ? 0 : bitmap_set_mark (d->bitmaps, offset, count);
}

static int
end_change (struct disk *d, int r, bool fua)
{
  return r == -1 || !fua ? r : disk_flush (d);
}

int
disk_write (struct disk *d, const void *buf, uint32_t count, uint64_t offset,
            bool fua)
{
  if (begin_change (d, count, offset) == -1)
    return -1;
  return end_change (d, qcow2_write (d->qcow2, buf, count, offset), fua);
}

int
disk_zero (struct disk *d, uint64_t count, uint64_t offset,
           bool no_hole, bool fast, bool fua)
{
  const unsigned flags =
    (no_hole ? QCOW2_ZERO_KEEP : 0) | (fast ? QCOW2_ZERO_FAST : 0);

  if (begin_change (d, count, offset) == -1)
    return -1;
  return end_change (d, qcow2_zero (d->qcow2, count, offset, flags), fua);
}

int
disk_trim (struct disk *d, uint64_t count, uint64_t offset, bool fua)
{
  if (begin_change (d, count, offset) == -1)
    return -1;
  return end_change (d, qcow2_trim (d->qcow2, count, offset), fua);
}

int
disk_flush (struct disk *d)
{
  return qcow2_flush (d->qcow2, bitmap_set_hooks (d->bitmaps));
}

int
disk_cache (struct disk *d, uint64_t count, uint64_t offset)
{
  if (check_range (d, count, offset) == -1)
    return -1;
  return qcow2_cache (d->qcow2, count, offset);
}

int
disk_extent (struct disk *d, uint64_t offset, uint64_t limit,
             uint64_t *length, uint32_t *flags)
{
  enum qcow2_extent_type type;
  unsigned depth;

  if (limit <= offset || check_range (d, limit - offset, offset) == -1) {
    errno = EINVAL;
    return -1;
  }
  if (qcow2_extent (d->qcow2, offset, limit, length, &type, &depth) == -1)
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

size_t
disk_nr_bitmaps (const struct disk *d)
{
  return bitmap_set_nr_exposed (d->bitmaps);
}

const char *
disk_bitmap_name (const struct disk *d, size_t i)
{
  return bitmap_name (bitmap_set_exposed (d->bitmaps, i));
}

uint64_t
disk_bitmap_granularity (const struct disk *d, size_t i)
{
  return bitmap_granularity (bitmap_set_exposed (d->bitmaps, i));
}

size_t
disk_bitmap_runs (const struct disk *d, size_t i, uint64_t offset,
                  uint64_t limit, uint64_t *ends, size_t max, bool *dirty)
{
  return bitmap_runs (bitmap_set_exposed (d->bitmaps, i), offset, limit,
                      ends, max, dirty);
}
