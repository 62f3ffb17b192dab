/* nbdkit-dirty-bitmap-filter
 * SPDX-License-Identifier: BSD-3-Clause
 * Copyright the nbdkit-dirty-bitmap-filter authors
 */

/* The file of dirty-bitmap-image: an image that has only the bitmaps.
 *
 * How this works
 *
 * The user names the file, so it may be anywhere.  It is opened once, and
 * locked as QEMU locks an image.
 *
 * A file that does not exist is made without a name, filled, made durable, and
 * then gets its name.  So a crash leaves either no file or a whole one, and
 * a file that another program has made meanwhile is not replaced.  Some file
 * systems have no files without names: there the file is made under its name,
 * and removed if it cannot be filled.
 *
 * The filter does not see what other programs write to the disk while it is
 * not served.  But where the disk is a file, its time of change tells of most
 * of that.  While it is served, the disk may well be changed after the bitmaps
 * were: so the time of the bitmaps' file is set once all is stored.
 */

#include <config.h>

#include <errno.h>
#include <fcntl.h>
#include <inttypes.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

#include "common/cleanup.h"
#include "common/folder.h"
#include "common/report.h"
#include "container/container.h"
#include "image/bitmaps-file.h"
#include "image/image-file.h"
#include "image/image-lock.h"
#include "qcow2/qcow2.h"

#define OPEN_FLAGS (O_CLOEXEC | O_NOCTTY | O_NONBLOCK)

static int
check_type (const struct bitmaps_file *f)
{
  struct stat statbuf;

  if (fstat (f->fd, &statbuf) == -1) {
    report_error ("%s: %m", f->path);
    return -1;
  }
  if (S_ISREG (statbuf.st_mode) || S_ISBLK (statbuf.st_mode))
    return 0;
  report_error ("dirty-bitmap-image: %s: is neither a file nor a block device",
                f->path);
  return -1;
}

int
bitmaps_file_open (struct bitmaps_file *f, bool readonly)
{
  f->readonly = readonly;
  f->fd = open (f->path, (readonly ? O_RDONLY : O_RDWR) | OPEN_FLAGS);
  if (f->fd == -1 && errno == ENOENT && !readonly)
    return 0;
  if (f->fd == -1) {
    report_error ("dirty-bitmap-image: %s: %m%s", f->path,
                  readonly || errno == ENOENT ? ""
                  : " (the disk can only be served read-only, with -r, if no "
                  "changes can be recorded)");
    return -1;
  }
  return check_type (f) == -1 ? -1 : image_lock (f->fd, f->path, readonly);
}

/* A new file, without a name where that is possible: then *named is false. */
static int
new_file (const char *path, const char *folder, bool *named)
{
  int fd = -1;

  *named = false;
#ifdef O_TMPFILE
  fd = open (folder, O_TMPFILE | O_RDWR | O_CLOEXEC, 0666);
  if (fd != -1 || (errno != EOPNOTSUPP && errno != EISDIR && errno != EINVAL &&
                   errno != ENOENT))
    return fd;
#else
  (void) folder;
#endif
  *named = true;
  return open (path, O_CREAT | O_EXCL | O_RDWR | O_CLOEXEC, 0666);
}

static int
give_name (int fd, const char *path)
{
  char link[64];

  snprintf (link, sizeof link, "/proc/self/fd/%d", fd);
  return linkat (AT_FDCWD, link, AT_FDCWD, path, AT_SYMLINK_FOLLOW);
}

static int
sync_folder (const char *folder)
{
  CLEANUP_CLOSE int fd = open (folder, O_RDONLY | O_DIRECTORY | O_CLOEXEC);

  return fd == -1 ? -1 : fsync (fd);
}

static int
fill (const struct bitmaps_file *f, uint64_t size)
{
  struct container *c = container_open_file_writable (f->fd);
  struct report_hold hold;
  int r;

  if (c == NULL) {
    report_error ("dirty-bitmap-image: %s: %m", f->path);
    return -1;
  }
  report_hold_begin (&hold);
  r = qcow2_create (c, size);
  report_hold_end (&hold);
  container_close (c);
  if (r == -1)
    report_error ("dirty-bitmap-image: %s: %s", f->path,
                  hold.any ? hold.text : "cannot create");
  return r;
}

/* Fill the new file, and make it and its name durable.  *named says, on
 * error, too, whether it has its name.
 */
static int
complete (struct bitmaps_file *f, const char *folder, bool *named,
          uint64_t size)
{
  if (image_lock (f->fd, f->path, false) == -1 || fill (f, size) == -1)
    return -1;
  if (*named || give_name (f->fd, f->path) == 0) {
    *named = true;
    if (fsync (f->fd) == 0 && sync_folder (folder) == 0)
      return 0;
  }
  report_error ("dirty-bitmap-image: %s: cannot create: %m", f->path);
  return -1;
}

int
bitmaps_file_create (struct bitmaps_file *f, uint64_t size)
{
  CLEANUP_FREE char *folder = folder_of (f->path);
  bool named;

  if (folder == NULL) {
    report_error ("strndup: %m");
    return -1;
  }
  f->fd = new_file (f->path, folder, &named);
  if (f->fd == -1) {
    report_error ("dirty-bitmap-image: %s: cannot create: %m", f->path);
    return -1;
  }
  if (complete (f, folder, &named, size) == -1) {
    if (named)
      unlink (f->path);
    bitmaps_file_close (f);
    return -1;
  }
  report_debug ("%s: created, for a disk of %" PRIu64 " bytes", f->path, size);
  return 0;
}

struct container *
bitmaps_file_container (const struct bitmaps_file *f, bool readonly)
{
  struct container *c = readonly ? container_open_file (f->fd)
    : container_open_file_image (f->fd);

  if (c == NULL)
    report_error ("%s: %m", f->path);
  return c;
}

static int
compare_times (const struct timespec *a, const struct timespec *b)
{
  if (a->tv_sec != b->tv_sec)
    return a->tv_sec < b->tv_sec ? -1 : 1;
  return (a->tv_nsec > b->tv_nsec) - (a->tv_nsec < b->tv_nsec);
}

void
bitmaps_file_compare_times (struct bitmaps_file *f,
                            const struct image_file *disk)
{
  struct stat of_disk, of_bitmaps;

  if (f->fd == -1 || disk->fd == -1 || disk->is_block_device ||
      fstat (disk->fd, &of_disk) == -1 || fstat (f->fd, &of_bitmaps) == -1)
    return;
  f->has_time = true;
  f->disk_time = of_disk.st_mtim;
  if (compare_times (&of_disk.st_mtim, &of_bitmaps.st_mtim) > 0)
    report_warning ("%s was changed after %s was last stored: if another "
                    "program changed it, the bitmaps lack that, and the next "
                    "backup has to be a full one", disk->path, f->path);
}

void
bitmaps_file_set_time (const struct bitmaps_file *f,
                       const struct image_file *disk)
{
  static const struct timespec times[2] = {
    { .tv_nsec = UTIME_OMIT }, { .tv_nsec = UTIME_NOW }
  };
  struct stat of_disk;

  if (f->has_time && !f->readonly && fstat (disk->fd, &of_disk) == 0 &&
      compare_times (&of_disk.st_mtim, &f->disk_time) != 0 &&
      futimens (f->fd, times) == -1)
    report_debug ("%s: futimens: %m", f->path);
}

void
bitmaps_file_close (struct bitmaps_file *f)
{
  if (f->fd != -1)
    close (f->fd);
  f->fd = -1;
}
