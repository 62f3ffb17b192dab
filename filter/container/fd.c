/* nbdkit-dirty-bitmap-filter
 * SPDX-License-Identifier: BSD-3-Clause
 * Copyright the nbdkit-dirty-bitmap-filter authors
 */

/* Operations on the descriptor of a file or a block device. */

#include <config.h>

#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <linux/fs.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/ioctl.h>
#include <unistd.h>

#include "common/bytes.h"
#include "container/container.h"
#include "container/fd.h"

#define GROW_ALIGN ((uint64_t) 64 << 10)
#define GROW_MIN_STEP ((uint64_t) 16 << 20)
#define GROW_MAX_STEP ((uint64_t) 1 << 30)

ssize_t
fd_pread (int fd, void *buf, size_t count, uint64_t offset)
{
  size_t done = 0;

  while (done < count) {
    const ssize_t n = pread (fd, (char *) buf + done, count - done,
                             offset + done);

    if (n == -1 && errno == EINTR)
      continue;
    if (n == -1)
      return -1;
    if (n == 0)
      break;
    done += n;
  }
  return done;
}

int
fd_pwrite (int fd, const void *buf, size_t count, uint64_t offset)
{
  const char *p = buf;

  while (count > 0) {
    const ssize_t n = pwrite (fd, p, count, offset);

    if (n == -1 && errno == EINTR)
      continue;
    if (n == -1)
      return -1;
    if (n == 0) {
      errno = EIO;
      return -1;
    }
    p += n;
    offset += n;
    count -= n;
  }
  return 0;
}

/* The descriptor's file offset is not used, so lseek may move it in any
 * thread.
 */
void
fd_extent (int fd, uint64_t offset, uint64_t count, uint64_t *length,
           unsigned *flags)
{
  const unsigned hole = CONTAINER_HOLE | CONTAINER_ZERO;
  const off_t data = lseek (fd, offset, SEEK_DATA);
  off_t end;

  *flags = 0;
  *length = count;
  if (data == -1) {
    /* No data up to the end, unless the file was cut. */
    if (errno == ENXIO) {
      end = lseek (fd, 0, SEEK_END);
      *flags = end != -1 && (uint64_t) end >= offset + count ? hole : 0;
    }
    return;
  }
  if ((uint64_t) data > offset) {
    *flags = hole;
    *length = min_u64 (count, data - offset);
    return;
  }
  end = lseek (fd, offset, SEEK_HOLE);
  if (end != -1 && (uint64_t) end > offset)
    *length = min_u64 (count, end - offset);
}

int
fd_allocated (int fd, uint64_t *bytes)
{
  struct stat statbuf;

  if (fstat (fd, &statbuf) == -1)
    return -1;
  if (!S_ISREG (statbuf.st_mode)) {
    errno = ENOTSUP;
    return -1;
  }
  *bytes = (uint64_t) statbuf.st_blocks * 512;
  return 0;
}

static int
resize (int fd, uint64_t size)
{
  int r;

  do
    r = ftruncate (fd, size);
  while (r == -1 && errno == EINTR);
  return r;
}

/* Extend far beyond size if the file system allows it, so that growing is
 * rare: the new part is a hole, and a clean stop cuts off the unused part.
 */
int
fd_extend (int fd, uint64_t size)
{
  const uint64_t max = round_down (INT64_MAX, GROW_ALIGN);
  struct stat statbuf;
  uint64_t step;

  if (fstat (fd, &statbuf) == -1)
    return -1;
  if (size <= (uint64_t) statbuf.st_size)
    return 0;                   /* Never cut what is there already. */

  step = min_u64 (max_u64 (statbuf.st_size / 8, GROW_MIN_STEP),
                  GROW_MAX_STEP);
  if (size < max - step - GROW_ALIGN &&
      resize (fd, round_up (max_u64 (size, statbuf.st_size + step),
                            GROW_ALIGN)) == 0)
    return 0;
  if (size < max && resize (fd, round_up (size, GROW_ALIGN)) == 0)
    return 0;
  return resize (fd, size);
}

/* The kernel zeroes logical blocks, and its cache holds pages, which are
 * larger.  It is not asked to discard part of a page.
 */
uint32_t
fd_zero_alignment (int fd)
{
  int logical = 0;

  if (ioctl (fd, BLKSSZGET, &logical) == -1 || logical <= 0 ||
      !is_power_of_2 (logical))
    logical = 0;
  return max_u64 (logical, 4096);
}

int
fd_count_open (const struct stat *of, unsigned *count)
{
  DIR *dir = opendir ("/proc/self/fd");
  struct dirent *entry;
  struct stat statbuf;

  if (dir == NULL)
    return -1;
  *count = 0;
  while ((errno = 0, entry = readdir (dir)) != NULL)
    if (entry->d_name[0] != '.' &&
        fstat (atoi (entry->d_name), &statbuf) == 0 &&
        statbuf.st_dev == of->st_dev && statbuf.st_ino == of->st_ino)
      ++*count;

  const int err = errno;

  closedir (dir);
  errno = err;
  return err == 0 ? 0 : -1;
}

int
fd_reopen (int fd)
{
  char path[32];

  snprintf (path, sizeof path, "/proc/self/fd/%d", fd);
  return open (path, O_WRONLY | O_CLOEXEC | O_NOCTTY);
}
