/* nbdkit-dirty-bitmap-filter
 * SPDX-License-Identifier: BSD-3-Clause
 * Copyright the nbdkit-dirty-bitmap-filter authors
 */

/* How this works
 *
 * A read-only container over a file descriptor: what get_ready looks at
 * the image with, before nbdkit lets the plugin be opened.  The size is
 * that at the time of opening; a file that is cut later gives EIO.  The
 * door refuses every change, so there are no operations for them.
 */

#include <config.h>

#include <errno.h>
#include <stdlib.h>
#include <unistd.h>

#include "container/container.h"

struct file {
  struct container c;
  int fd;                       /* the caller's */
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

static void
file_close (struct container *c)
{
  free (c);
}

static const struct container_ops file_ops = {
  .pread = file_pread,
  .close = file_close,
};

struct container *
container_open_file (int fd)
{
  struct file *f;
  off_t size;

  /* SEEK_END knows the size of files and block devices alike.  The
   * position is not used by anyone.
   */
  size = lseek (fd, 0, SEEK_END);
  if (size == -1)
    return NULL;

  f = malloc (sizeof *f);
  if (f == NULL)
    return NULL;
  container_init (&f->c, &file_ops, size, true);
  f->fd = fd;
  return &f->c;
}
