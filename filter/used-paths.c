/* nbdkit-dirty-bitmap-filter
 * SPDX-License-Identifier: BSD-3-Clause
 * Copyright the nbdkit-dirty-bitmap-filter authors
 */

/* Does a file have two uses?
 *
 * How this works
 *
 * nbdkit overwrites the file that -P names with its process ID, and that
 * file may be the image.  Two paths name one file if they are equal after
 * links are followed, or, if both exist, if device and inode are equal.
 * Devices like /dev/null, and pipes, can have many uses.
 *
 * The files that an image refers to, backing files and data files, are not
 * named on the command line.  But they are locked once they are open.
 */

#include <config.h>

#include <errno.h>
#include <fcntl.h>
#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

#include "common/cleanup.h"
#include "common/folder.h"
#include "common/report.h"
#include "used-paths.h"

char *
used_paths_absolute (const char *path)
{
  const char *slash = strrchr (path, '/');
  CLEANUP_FREE char *folder = NULL, *absolute_folder = NULL;
  char *absolute = realpath (path, NULL);

  if (absolute != NULL || errno != ENOENT)
    return absolute;
  folder = folder_of (path);
  if (folder == NULL)
    return NULL;
  absolute_folder = realpath (folder, NULL);
  if (absolute_folder == NULL)
    return NULL;
  if (asprintf (&absolute, "%s/%s", absolute_folder,
                slash == NULL ? path : slash + 1) == -1)
    return NULL;
  return absolute;
}

static bool
is_same_file (const char *a, const char *b)
{
  CLEANUP_FREE char *absolute_a = NULL, *absolute_b = NULL;
  struct stat stat_a, stat_b;

  if (stat (a, &stat_a) == 0 && stat (b, &stat_b) == 0)
    return stat_a.st_dev == stat_b.st_dev && stat_a.st_ino == stat_b.st_ino &&
      !S_ISCHR (stat_a.st_mode) && !S_ISFIFO (stat_a.st_mode);

  absolute_a = used_paths_absolute (a);
  absolute_b = used_paths_absolute (b);
  return absolute_a != NULL && absolute_b != NULL &&
    strcmp (absolute_a, absolute_b) == 0;
}

int
used_paths_check (const struct used_path *paths, size_t nr)
{
  size_t i, j;

  for (i = 0; i < nr; ++i)
    for (j = i + 1; j < nr; ++j)
      if (paths[i].path != NULL && paths[j].path != NULL &&
          is_same_file (paths[i].path, paths[j].path)) {
        report_error ("%s and %s name the same file: %s",
                      paths[i].use, paths[j].use, paths[j].path);
        return -1;
      }
  return 0;
}

int
used_paths_check_unlocked (const struct used_path *p)
{
  struct flock lock = { .l_type = F_WRLCK, .l_whence = SEEK_SET };
  CLEANUP_CLOSE int fd = -1;

  if (p->path == NULL)
    return 0;
  fd = open (p->path, O_RDONLY | O_CLOEXEC | O_NOCTTY | O_NONBLOCK);
  if (fd == -1 || fcntl (fd, F_OFD_GETLK, &lock) == -1 ||
      lock.l_type == F_UNLCK)
    return 0;
  report_error ("%s: the file is in use, perhaps as an image: %s",
                p->use, p->path);
  return -1;
}
