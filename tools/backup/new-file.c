/* nbdkit-dirty-bitmap-filter
 * SPDX-License-Identifier: BSD-3-Clause
 * Copyright the nbdkit-dirty-bitmap-filter authors
 */

/* A file that gets its name when it is whole.
 *
 * It is written beside its place under another name, and renamed.
 */

#include <config.h>

#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/stat.h>
#include <unistd.h>

#include "backup/new-file.h"
#include "common/report.h"

int
new_file_check (const char *target, bool force)
{
  struct stat statbuf;

  if (lstat (target, &statbuf) == -1)
    return 0;
  if (!force) {
    report_error ("%s: exists already; --force overwrites it", target);
    return -1;
  }
  if (stat (target, &statbuf) == -1 || S_ISREG (statbuf.st_mode))
    return 0;
  report_error ("%s: is not a regular file", target);
  return -1;
}

/* As for any new file: mkostemp allows it to the owner alone. */
static int
allow_others (int fd)
{
  const mode_t mask = umask (0);

  umask (mask);
  return fchmod (fd, 0666 & ~mask);
}

static void
discard (struct new_file *f)
{
  unlink (f->name);
  close (f->fd);
  free (f->name);
}

int
new_file_create (struct new_file *f, const char *target)
{
  *f = (struct new_file) { .target = target, .fd = -1 };
  if (asprintf (&f->name, "%s.new-XXXXXX", target) == -1) {
    report_error ("asprintf: %m");
    return -1;
  }
  f->fd = mkostemp (f->name, O_CLOEXEC);
  if (f->fd == -1) {
    report_error ("%s: %m", target);
    free (f->name);
    return -1;
  }
  if (allow_others (f->fd) == 0)
    return 0;
  report_error ("%s: fchmod: %m", target);
  discard (f);
  return -1;
}

/* Give a file its name if there is none of that name. */
static int
rename_to_new (const char *name, const char *target)
{
  if (renameat2 (AT_FDCWD, name, AT_FDCWD, target, RENAME_NOREPLACE) == 0)
    return 0;
  if (errno != EINVAL && errno != ENOSYS)
    return -1;
  /* The file system does not know that. */
  if (link (name, target) == -1)
    return -1;
  unlink (name);
  return 0;
}

int
new_file_end (struct new_file *f, bool success, bool force)
{
  if (!success) {
    discard (f);
    return -1;
  }
  if ((force ? rename (f->name, f->target)
       : rename_to_new (f->name, f->target)) == -1) {
    report_error ("%s: %m", f->target);
    discard (f);
    return -1;
  }
  close (f->fd);
  free (f->name);
  return 0;
}
