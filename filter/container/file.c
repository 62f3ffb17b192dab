/* nbdkit-dirty-bitmap-filter
 * SPDX-License-Identifier: BSD-3-Clause
 * Copyright the nbdkit-dirty-bitmap-filter authors
 */

/* A container over a file descriptor, of a file or a block device.
 *
 * How this works
 *
 * It serves backing files and data files.  Where the plugin would only do the
 * same (image/image-file.c), it also serves the image itself, or a disk beside
 * its bitmaps.  The descriptor stays that of the opened file, whatever happens
 * to the file's name.
 *
 * The size of a read-only container is the size at the time of opening; a
 * file that is cut later gives EIO.  The door refuses every change.
 *
 * The file system makes zeroes where it can; elsewhere they are written.  An
 * operation that it does not support is not tried again.  It also refuses
 * single ranges that it cannot zero, so a refusal alone does not mean that
 * it never can.  A block device zeroes only aligned ranges, so the unaligned
 * ends are written.
 *
 * A flush that failed may have thrown away what could not be written, and
 * the next one still reports success, as the plugin's does: the kernel
 * reports an error once.  The door counts the flushes that fail.
 */

#include <config.h>

#include <assert.h>
#include <errno.h>
#include <fcntl.h>
#include <linux/falloc.h>
#include <stdlib.h>
#include <sys/stat.h>
#include <sys/uio.h>
#include <unistd.h>

#include "common/bytes.h"
#include "common/cleanup.h"
#include "common/lock.h"
#include "container/container.h"
#include "container/fd.h"

#define ZEROES_BYTES 65536

struct file {
  struct container c;
  int fd;                       /* the caller's */
  int durable_fd;               /* another of the same file, or -1 */
  bool is_block_device;
  bool is_image;                /* grows in steps, and is cut at the end */
  bool is_disk;                 /* never grows */
  uint64_t original_size;       /* bytes, when it was opened */
  uint32_t zero_alignment;      /* bytes */
  atomic_bool cannot_punch, cannot_zero, cannot_allocate, cannot_dsync;
};

static int
file_pread (struct container *c, void *buf, size_t count, uint64_t offset)
{
  const ssize_t n = fd_pread (((struct file *) c)->fd, buf, count, offset);

  if (n == -1)
    return -1;
  if ((size_t) n < count) {
    errno = EIO;
    return -1;
  }
  return 0;
}

/* In one call: the kernel then makes nothing durable but these bytes, where
 * the file system can tell them from the others.  It reports an error of any
 * write to the file once for each open file.  So this has an open file of its
 * own, and a flush still sees the error.
 */
static int
file_pwrite_durable (struct container *c, const void *buf, size_t count,
                     uint64_t offset)
{
#ifdef RWF_DSYNC
  struct file *f = (struct file *) c;
  const struct iovec iov = { .iov_base = (void *) buf, .iov_len = count };
  ssize_t r;

  if (f->durable_fd == -1 ||
      atomic_load_explicit (&f->cannot_dsync, memory_order_relaxed))
    return 1;
  do
    r = pwritev2 (f->durable_fd, &iov, 1, offset, RWF_DSYNC);
  while (r == -1 && errno == EINTR);
  if (r == -1 && (errno == EOPNOTSUPP || errno == ENOSYS)) {
    atomic_store_explicit (&f->cannot_dsync, true, memory_order_relaxed);
    return 1;
  }
  if (r >= 0 && (size_t) r < count) {
    errno = EIO;
    r = -1;
  }
  return r == -1 ? -1 : 0;
#else
  (void) c;
  (void) buf;
  (void) count;
  (void) offset;
  return 1;
#endif
}

static int
file_pwrite (struct container *c, const void *buf, size_t count,
             uint64_t offset)
{
  return fd_pwrite (((struct file *) c)->fd, buf, count, offset);
}

static int
write_zeroes (struct container *c, uint64_t count, uint64_t offset)
{
  CLEANUP_FREE char *zeroes = NULL;

  if (count == 0)
    return 0;
  zeroes = calloc (1, min_u64 (count, ZEROES_BYTES));
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

/* 1 if the file system cannot do it, either at all or for this range. */
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

/* Zeroes that have storage, on a file system that can only punch holes:
 * punch the range, then allocate it again.
 */
static int
punch_and_allocate (struct file *f, uint64_t count, uint64_t offset)
{
  int r;

  if (atomic_load_explicit (&f->cannot_allocate, memory_order_relaxed))
    return 1;
  r = try_fallocate (f, FALLOC_FL_PUNCH_HOLE, count, offset,
                     &f->cannot_punch);
  return r != 0 ? r
    : try_fallocate (f, 0, count, offset, &f->cannot_allocate);
}

/* The range is aligned.  1 if only zeroes can be written. */
static int
zero_without_writing (struct file *f, uint64_t count, uint64_t offset,
                      bool punch)
{
  int r = 1;

  if (punch)
    r = try_fallocate (f, FALLOC_FL_PUNCH_HOLE, count, offset,
                       &f->cannot_punch);
  if (r == 1)
    r = try_fallocate (f, FALLOC_FL_ZERO_RANGE, count, offset,
                       &f->cannot_zero);
  if (r == 1 && !f->is_block_device)
    r = punch_and_allocate (f, count, offset);
  return r;
}

static int
zero_aligned (struct file *f, uint64_t count, uint64_t offset, bool punch)
{
  const int r = zero_without_writing (f, count, offset, punch);

  return r == 1 ? write_zeroes (&f->c, count, offset) : r;
}

static int
file_zero (struct container *c, uint64_t count, uint64_t offset, bool punch)
{
  struct file *f = (struct file *) c;
  const uint64_t first = round_up (offset, f->zero_alignment);
  const uint64_t end = round_down (offset + count, f->zero_alignment);

  if (first >= end)
    return write_zeroes (c, count, offset);
  if (write_zeroes (c, first - offset, offset) == -1 ||
      write_zeroes (c, offset + count - end, end) == -1)
    return -1;
  return zero_aligned (f, end - first, first, punch);
}

static int
file_zero_fast (struct container *c, uint64_t count, uint64_t offset,
                bool punch)
{
  struct file *f = (struct file *) c;

  if (offset % f->zero_alignment != 0 || count % f->zero_alignment != 0)
    return 1;
  if (!f->is_block_device)
    return zero_without_writing (f, count, offset, punch);
  /* The kernel writes zeroes if the device cannot make them, unless it is
   * asked to punch a hole.
   */
  return !punch ? 1 : try_fallocate (f, FALLOC_FL_PUNCH_HOLE, count, offset,
                                     &f->cannot_punch);
}

/* Only if the storage can do it: to write zeroes in its place would take space
 * and time for nothing.
 */
static int
file_trim (struct container *c, uint64_t count, uint64_t offset)
{
  struct file *f = (struct file *) c;
  const uint64_t first = round_up (offset, f->zero_alignment);
  const uint64_t end = round_down (offset + count, f->zero_alignment);

  if (first >= end)
    return 0;
  return try_fallocate (f, FALLOC_FL_PUNCH_HOLE, end - first, first,
                        &f->cannot_punch) == -1 ? -1 : 0;
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

  assert (lock_is_mine (&c->flush_lock));
  return fdatasync (f->fd);
}

static int
file_extent (struct container *c, uint64_t offset, uint64_t count,
             uint64_t *length, unsigned *flags)
{
  fd_extent (((struct file *) c)->fd, offset, count, length, flags);
  return 0;
}

static int
file_allocated (struct container *c, uint64_t *bytes)
{
  return fd_allocated (((struct file *) c)->fd, bytes);
}

/* Extend the file to exactly that size, but never shrink it, even if another
 * process has made it larger.
 */
static int
extend_exactly (int fd, uint64_t size)
{
  struct stat statbuf;
  int r = 0;

  if (fstat (fd, &statbuf) == -1)
    return -1;
  if ((uint64_t) statbuf.st_size < size)
    do
      r = ftruncate (fd, size);
    while (r == -1 && errno == EINTR);
  return r;
}

/* Other programs know the size of a data file, so it grows by no more than
 * is needed.
 */
static int
file_grow (struct container *c, uint64_t size)
{
  struct file *f = (struct file *) c;
  struct stat statbuf;

  assert (lock_is_mine (&c->grow_lock));
  if (f->is_block_device || f->is_disk) {
    errno = ENOSPC;
    return -1;
  }
  if ((f->is_image ? fd_extend (f->fd, size)
       : extend_exactly (f->fd, size)) == -1)
    return -1;
  if (f->is_image && fstat (f->fd, &statbuf) == 0)
    size = max_u64 (size, statbuf.st_size);
  atomic_store_explicit (&c->size, size, memory_order_release);
  return 0;
}

static int
file_truncate (struct container *c, uint64_t size)
{
  struct file *f = (struct file *) c;

  /* Do not cut what was there before us. */
  size = max_u64 (size, f->original_size);
  if (!f->is_image || f->is_block_device || size >= container_size (c))
    return 0;
  if (ftruncate (f->fd, size) == -1)
    return -1;
  atomic_store_explicit (&c->size, size, memory_order_release);
  return 0;
}

static void
file_close (struct container *c)
{
  struct file *f = (struct file *) c;

  if (f->durable_fd != -1)
    close (f->durable_fd);
  free (f);
}

static const struct container_ops file_ops = {
  .pread = file_pread,
  .pwrite = file_pwrite,
  .pwrite_durable = file_pwrite_durable,
  .zero = file_zero,
  .zero_fast = file_zero_fast,
  .trim = file_trim,
  .cache = file_cache,
  .flush = file_flush,
  .extent = file_extent,
  .allocated = file_allocated,
  .grow = file_grow,
  .truncate = file_truncate,
  .close = file_close,
};

static struct container *
open_file (int fd, bool readonly, bool is_image, bool is_disk)
{
  struct file *f;
  struct stat statbuf;
  off_t size;

  /* SEEK_END gives the size of files and block devices alike. */
  size = lseek (fd, 0, SEEK_END);
  if (size == -1 || fstat (fd, &statbuf) == -1)
    return NULL;

  f = calloc (1, sizeof *f);
  if (f == NULL)
    return NULL;
  container_init (&f->c, &file_ops, size, readonly);
  f->fd = fd;
  f->durable_fd = is_image || is_disk ? fd_reopen (fd) : -1;
  f->is_block_device = S_ISBLK (statbuf.st_mode);
  f->is_image = is_image;
  f->is_disk = is_disk;
  f->original_size = size;
  f->zero_alignment = f->is_block_device ? fd_zero_alignment (fd) : 1;
  return &f->c;
}

struct container *
container_open_file (int fd)
{
  return open_file (fd, true, false, false);
}

struct container *
container_open_file_writable (int fd)
{
  return open_file (fd, false, false, false);
}

struct container *
container_open_file_image (int fd)
{
  return open_file (fd, false, true, false);
}

struct container *
container_open_file_disk (int fd)
{
  return open_file (fd, false, false, true);
}
