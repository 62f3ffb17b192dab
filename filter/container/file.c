/* nbdkit-dirty-bitmap-filter
 * SPDX-License-Identifier: BSD-3-Clause
 * Copyright the nbdkit-dirty-bitmap-filter authors
 */

/* How this works
 *
 * A container over a file descriptor, of a file or a block device: what
 * get_ready looks at the image with, before nbdkit lets the plugin be
 * opened, and what backing files are read and data files written with.
 *
 * The size of a read-only one is that at the time of opening; a file
 * that is cut later gives EIO.  The door refuses every change of it.
 *
 * Zeroes are left to the file system where it can make them, else
 * written.  What it turned out not to be able to do is not tried again.
 * It also refuses single ranges that it cannot make zero (a block device
 * those that are not aligned), so that alone does not mean that it never
 * can.
 *
 * A flush that failed may have thrown away what could not be written,
 * and the next one would report success all the same: the kernel tells
 * an error once.  So once a flush has failed, all that follow fail with
 * the same error.
 *
 * The descriptor's position is used by nobody, so lseek may move it in
 * any thread.
 */

#include <config.h>

#include <errno.h>
#include <fcntl.h>
#include <linux/falloc.h>
#include <stdlib.h>
#include <sys/stat.h>
#include <unistd.h>

#include "common/bytes.h"
#include "common/cleanup.h"
#include "container/container.h"

#define ZEROES_BYTES 65536

struct file {
  struct container c;
  int fd;                       /* the caller's */
  bool is_block_device;
  atomic_bool cannot_punch, cannot_zero, cannot_seek;
  int flush_error;              /* of the first flush that failed, or 0 */
};

static int
file_pread (struct container *c, void *buf, size_t count, uint64_t offset)
{
  struct file *f = (struct file *) c;
  char *p = buf;
  ssize_t r;

  while (count > 0) {
    r = pread (f->fd, p, count, offset);
    if (r == -1 && errno == EINTR)
      continue;
    if (r == -1)
      return -1;
    if (r == 0) {
      errno = EIO;
      return -1;
    }
    p += r;
    offset += r;
    count -= r;
  }
  return 0;
}

static int
file_pwrite (struct container *c, const void *buf, size_t count,
             uint64_t offset)
{
  struct file *f = (struct file *) c;
  const char *p = buf;
  ssize_t r;

  while (count > 0) {
    r = pwrite (f->fd, p, count, offset);
    if (r == -1 && errno == EINTR)
      continue;
    if (r == -1)
      return -1;
    if (r == 0) {
      errno = EIO;
      return -1;
    }
    p += r;
    offset += r;
    count -= r;
  }
  return 0;
}

static int
write_zeroes (struct container *c, uint64_t count, uint64_t offset)
{
  CLEANUP_FREE char *zeroes = calloc (1, min_u64 (count, ZEROES_BYTES));

  if (zeroes == NULL)
    return -1;
  while (count > 0) {
    const size_t n = min_u64 (count, ZEROES_BYTES);

    if (file_pwrite (c, zeroes, n, offset) == -1)
      return -1;
    offset += n;
    count -= n;
  }
  return 0;
}

/* 1 if the file system cannot do it, at all or with this range. */
static int
try_fallocate (struct file *f, int mode, uint64_t count, uint64_t offset,
               atomic_bool *cannot)
{
  int r;

  if (atomic_load_explicit (cannot, memory_order_relaxed))
    return 1;
  do
    r = fallocate (f->fd, mode | FALLOC_FL_KEEP_SIZE, offset, count);
  while (r == -1 && errno == EINTR);
  if (r == 0)
    return 0;
  switch (errno) {
  case EOPNOTSUPP:
  case ENOSYS:
  case ENODEV:
    atomic_store_explicit (cannot, true, memory_order_relaxed);
    return 1;
  case EINVAL:
    return 1;
  default:
    return -1;
  }
}

static int
file_zero (struct container *c, uint64_t count, uint64_t offset, bool punch)
{
  struct file *f = (struct file *) c;
  int r = 1;

  if (punch)
    r = try_fallocate (f, FALLOC_FL_PUNCH_HOLE, count, offset,
                       &f->cannot_punch);
  if (r == 1)
    r = try_fallocate (f, FALLOC_FL_ZERO_RANGE, count, offset,
                       &f->cannot_zero);
  return r == 1 ? write_zeroes (c, count, offset) : r;
}

static int
file_cache (struct container *c, uint64_t count, uint64_t offset)
{
  struct file *f = (struct file *) c;
  const int err = posix_fadvise (f->fd, offset, count, POSIX_FADV_WILLNEED);

  if (err == 0)
    return 0;
  errno = err;
  return -1;
}

static int
file_flush (struct container *c)
{
  struct file *f = (struct file *) c;

  if (f->flush_error == 0 && fdatasync (f->fd) == -1)
    f->flush_error = errno;
  if (f->flush_error == 0)
    return 0;
  errno = f->flush_error;
  return -1;
}

/* What cannot be found out is data. */
static int
file_extent (struct container *c, uint64_t offset, uint64_t count,
             uint64_t *length, bool *hole)
{
  struct file *f = (struct file *) c;
  off_t data, end;

  *hole = false;
  *length = count;
  if (atomic_load_explicit (&f->cannot_seek, memory_order_relaxed))
    return 0;

  data = lseek (f->fd, offset, SEEK_DATA);
  if (data == -1) {
    if (errno == ENXIO) {
      /* No data up to the end, unless somebody has cut the file. */
      end = lseek (f->fd, 0, SEEK_END);
      *hole = end != -1 && (uint64_t) end >= offset + count;
    }
    else
      atomic_store_explicit (&f->cannot_seek, true, memory_order_relaxed);
    return 0;
  }
  if ((uint64_t) data > offset) {
    *hole = true;
    *length = min_u64 (count, data - offset);
    return 0;
  }
  end = lseek (f->fd, offset, SEEK_HOLE);
  if (end != -1 && (uint64_t) end > offset)
    *length = min_u64 (count, end - offset);
  return 0;
}

/* Others know the size of the file, so it grows by no more than is
 * needed, and never shrinks, not even if somebody else made it larger.
 */
static int
file_grow (struct container *c, uint64_t size)
{
  struct file *f = (struct file *) c;
  struct stat statbuf;
  int r;

  if (f->is_block_device) {
    errno = ENOSPC;
    return -1;
  }
  if (fstat (f->fd, &statbuf) == -1)
    return -1;
  if ((uint64_t) statbuf.st_size < size) {
    do
      r = ftruncate (f->fd, size);
    while (r == -1 && errno == EINTR);
    if (r == -1)
      return -1;
  }
  atomic_store_explicit (&c->size, size, memory_order_release);
  return 0;
}

static int
file_truncate (struct container *c, uint64_t size)
{
  (void) c; (void) size;
  return 0;
}

static void
file_close (struct container *c)
{
  free (c);
}

static const struct container_ops file_ops = {
  .pread = file_pread,
  .pwrite = file_pwrite,
  .zero = file_zero,
  .cache = file_cache,
  .flush = file_flush,
  .extent = file_extent,
  .grow = file_grow,
  .truncate = file_truncate,
  .close = file_close,
};

static struct container *
open_file (int fd, bool readonly)
{
  struct file *f;
  struct stat statbuf;
  off_t size;

  /* SEEK_END knows the size of files and block devices alike. */
  size = lseek (fd, 0, SEEK_END);
  if (size == -1 || fstat (fd, &statbuf) == -1)
    return NULL;

  f = calloc (1, sizeof *f);
  if (f == NULL)
    return NULL;
  container_init (&f->c, &file_ops, size, readonly);
  f->fd = fd;
  f->is_block_device = S_ISBLK (statbuf.st_mode);
  return &f->c;
}

struct container *
container_open_file (int fd)
{
  return open_file (fd, true);
}

struct container *
container_open_file_writable (int fd)
{
  return open_file (fd, false);
}
