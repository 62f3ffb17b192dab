/* nbdkit-dirty-bitmap-filter
 * SPDX-License-Identifier: BSD-3-Clause
 * Copyright the nbdkit-dirty-bitmap-filter authors
 */

/* Locking an image as QEMU does.
 *
 * How this works
 *
 * QEMU's programs agree on which processes may use an image by open file
 * description locks on single bytes of the file (which need not exist).
 * There are permissions with numbers p.  A process that uses p holds a
 * shared lock on byte 100 + p.  A process that does not allow others to use
 * p holds one on byte 200 + p.  The locks never exclude each other by
 * themselves: a process first takes all its locks, then checks whether
 * another process holds the opposite ones, and gives up if so.  If two
 * processes do this at the same time, at least one sees the other.
 *
 * Like QEMU's qcow2 driver, a writer uses "consistent read", "write" and
 * "resize", a reader "consistent read", and neither allows others to use
 * "write" or "resize".
 *
 * The lock belongs to the open file description, and so it survives
 * nbdkit's forks and ends with the last process that has it.
 */

#include <config.h>

#include <errno.h>
#include <fcntl.h>
#include <string.h>
#include <unistd.h>

#include "common/report.h"
#include "image/image-lock.h"

enum {
  CONSISTENT_READ = 0,
  WRITE = 1,
  RESIZE = 3,
};

#define USED_BYTE 100
#define UNSHARED_BYTE 200

static const char *
permission_name (int permission)
{
  switch (permission) {
  case CONSISTENT_READ: return "consistent read";
  case WRITE: return "write";
  case RESIZE: return "resize";
  default: return "unknown";
  }
}

static int
lock_byte (int fd, off_t byte)
{
  struct flock fl = {
    .l_type = F_RDLCK,
    .l_whence = SEEK_SET,
    .l_start = byte,
    .l_len = 1,
  };

  return fcntl (fd, F_OFD_SETLK, &fl);
}

/* Does another process hold the byte?  -1 on error. */
static int
is_held (int fd, off_t byte)
{
  struct flock fl = {
    .l_type = F_WRLCK,
    .l_whence = SEEK_SET,
    .l_start = byte,
    .l_len = 1,
  };

  if (fcntl (fd, F_OFD_GETLK, &fl) == -1)
    return -1;
  return fl.l_type != F_UNLCK;
}

static int
take (int fd, const char *path, off_t first, const int *permissions, size_t n)
{
  size_t i;

  for (i = 0; i < n; ++i)
    if (lock_byte (fd, first + permissions[i]) == -1) {
      if (errno == EINVAL || errno == EOPNOTSUPP) {
        report_warning ("%s: the file system has no locks: make sure that no "
                        "other process uses the image", path);
        return 1;
      }
      report_error ("%s: cannot lock the image: %m", path);
      return -1;
    }
  return 0;
}

static int
probe (int fd, const char *path, off_t first, const int *permissions,
       size_t n)
{
  size_t i;
  int r;

  for (i = 0; i < n; ++i) {
    r = is_held (fd, first + permissions[i]);
    if (r == -1) {
      report_error ("%s: cannot look at the image's locks: %m", path);
      return -1;
    }
    if (r) {
      report_error ("failed to get %s\"%s\" lock on '%s': "
                    "is another process using the image?",
                    first == USED_BYTE ? "shared " : "",
                    permission_name (permissions[i]), path);
      return -1;
    }
  }
  return 0;
}

int
image_lock (int fd, const char *path, bool readonly)
{
  static const int writer[] = { CONSISTENT_READ, WRITE, RESIZE };
  static const int reader[] = { CONSISTENT_READ };
  static const int unshared[] = { WRITE, RESIZE };
  const int *used = readonly ? reader : writer;
  const size_t nr_used = readonly ? 1 : 3;
  int r;

  r = take (fd, path, USED_BYTE, used, nr_used);
  if (r == 0)
    r = take (fd, path, UNSHARED_BYTE, unshared, 2);
  if (r != 0)
    return r == -1 ? -1 : 0;

  if (probe (fd, path, UNSHARED_BYTE, used, nr_used) == -1 ||
      probe (fd, path, USED_BYTE, unshared, 2) == -1)
    return -1;
  return 0;
}
