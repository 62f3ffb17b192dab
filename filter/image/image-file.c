/* nbdkit-dirty-bitmap-filter
 * SPDX-License-Identifier: BSD-3-Clause
 * Copyright the nbdkit-dirty-bitmap-filter authors
 */

/* The file that the plugin serves, if we can know it.
 *
 * How this works
 *
 * Only the file plugin's file= is taken to be the image.  We open it once,
 * at the start, and lock it as QEMU does.  What happens to its name later
 * does not affect this descriptor.  But the plugin opens the file by name,
 * and again for each context (container/next.c).
 *
 * So if there is no filter between, and the plugin has no options that would
 * be ignored, the plugin is not used at all: it would do with its own
 * descriptor what container/file.c does with ours.
 *
 * Otherwise we do everything through the plugin, except three things that it
 * cannot do for us: locking the image, checking it while the user can still
 * see errors, and extending it.  The file is locked whichever filters are
 * between, since writes still reach it (unless a filter keeps the writes:
 * then it is locked as for a reader).  It can be checked and extended only
 * if all filters between pass bytes and size through.  Before anything is
 * served, both ways are checked to lead to the same file and the same bytes.
 *
 * A filter that may reopen the plugin at any time could make us write to
 * another file, since we cannot see which file it opens.
 */

#include <config.h>

#include <errno.h>
#include <fcntl.h>
#include <inttypes.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

#include <nbdkit-filter.h>

#include "common/bytes.h"
#include "common/cleanup.h"
#include "common/report.h"
#include "container/container.h"
#include "container/next.h"
#include "image/image-file.h"
#include "image/image-lock.h"
#include "nbdkit/command-line.h"
#include "nbdkit/filter-stack.h"

#define COMPARED_BYTES 65536

int
image_file_remember (struct image_file *f, const char *key, const char *value)
{
  if (strcmp (key, "file") != 0) {
    f->has_options = true;
    return 0;
  }
  free (f->path);
  free (f->true_path);
  f->path = nbdkit_absolute_path (value);
  if (f->path == NULL)
    return -1;
  /* If there is no such file, the plugin reports it. */
  f->true_path = realpath (f->path, NULL);
  return 0;
}

/* Open the file that the plugin will open.  A file that we may not write is
 * served read-only, as with the file plugin.
 */
static int
open_file (struct image_file *f)
{
  const int flags = O_CLOEXEC | O_NOCTTY | O_NONBLOCK;
  struct stat statbuf;

  if (f->true_path == NULL) {
    report_error ("%s: it does not exist", f->path);
    return -1;
  }
  if (stat (f->path, &statbuf) == -1) {
    report_error ("%s: %m", f->path);
    return -1;
  }
  if (!S_ISREG (statbuf.st_mode) && !S_ISBLK (statbuf.st_mode)) {
    f->differs = "it is neither a file nor a block device";
    return 0;
  }
  f->is_block_device = S_ISBLK (statbuf.st_mode);

  if (!f->readonly) {
    f->fd = open (f->path, O_RDWR | flags);
    if (f->fd == -1 && errno != EACCES && errno != EPERM && errno != EROFS) {
      report_error ("open: %s: %m", f->path);
      return -1;
    }
    f->readonly = f->is_unwritable = f->fd == -1;
  }
  if (f->fd == -1) {
    f->fd = open (f->path, O_RDONLY | flags);
    if (f->fd == -1) {
      report_error ("open: %s: %m", f->path);
      return -1;
    }
  }
  return 0;
}

int
image_file_open (struct image_file *f, const struct command_line *cl,
                 bool readonly)
{
  f->readonly = readonly;
  if (f->path != NULL && !filter_stack_is_file (cl)) {
    free (f->path);
    f->path = NULL;
  }
  if (f->path == NULL) {
    f->differs = "the plugin does not serve a local file";
    return 0;
  }
  if (open_file (f) == -1)
    return -1;
  if (f->fd == -1)
    return 0;
  if (!f->readonly && filter_stack_retries (cl)) {
    report_error ("%s: --filter=retry reopens the image by its name, which may "
                  "lead to another file by then, and overwrite that: leave "
                  "it out, or serve the image read-only (-r)", f->path);
    return -1;
  }
  if (image_lock (f->fd, f->path,
                  f->readonly || filter_stack_holds_writes (cl)) == -1)
    return -1;

  if (filter_stack_changes_bytes (cl) != NULL) {
    f->differs = "a filter between may change its bytes or its size";
    report_debug ("%s: --filter=%s may change its bytes or its size",
                  f->path, filter_stack_changes_bytes (cl));
  }
  f->is_direct = filter_stack_is_plugin_alone (cl) && !f->has_options;
  return 0;
}

struct container *
image_file_container (struct image_file *f)
{
  struct container *c = f->readonly ? container_open_file (f->fd)
    : f->is_disk ? container_open_file_disk (f->fd)
    : container_open_file_image (f->fd);

  if (c == NULL) {
    report_error ("%s: %m", f->path);
    return NULL;
  }
  report_debug ("%s: the file is used without the plugin", f->path);
  if (f->is_unwritable)
    report_warning ("the storage below is read-only, "
                    "so the disk is served read-only");
  return c;
}

/* Do both ways lead to the same bytes?  If not, the file that we checked is
 * not what is served.
 */
static int
compare (struct image_file *f, struct container *c)
{
  CLEANUP_FREE char *buf = malloc (2 * COMPARED_BYTES);
  struct container *file = container_open_file (f->fd);
  const uint64_t size = container_size (c);
  uint64_t file_size;
  int r;

  if (buf == NULL || file == NULL) {
    report_error ("%s: %m", f->path);
    container_close (file);
    return -1;
  }
  file_size = container_size (file);
  r = container_pread (file, buf, COMPARED_BYTES, 0);
  if (r == 0)
    r = container_pread (c, buf + COMPARED_BYTES, COMPARED_BYTES, 0);
  if (r == -1)
    report_error ("%s: %m", f->path);
  container_close (file);
  if (r == -1)
    return -1;

  if (size != file_size) {
    report_error ("%s: the file has %" PRIu64 " bytes, but the plugin and "
                  "the filters below serve %" PRIu64,
                  f->path, file_size, size);
    return -1;
  }
  if (memcmp (buf, buf + COMPARED_BYTES, COMPARED_BYTES) != 0) {
    report_error ("%s: the plugin and the filters below serve other bytes "
                  "than the file's", f->path);
    return -1;
  }
  return 0;
}

int
image_file_attach (struct image_file *f, struct container *c)
{
  const char *why_not = f->differs;

  if (f->is_disk)
    return 0;
  if (why_not == NULL) {
    if (compare (f, c) == -1)
      return -1;
    if (f->is_block_device)
      why_not = "it is a block device";
    else if (f->readonly)
      why_not = "it is read-only";
  }
  container_next_set_growth (c, why_not);
  return 0;
}

void
image_file_close (struct image_file *f)
{
  if (f->fd >= 0)
    close (f->fd);
  f->fd = -1;
  free (f->path);
  free (f->true_path);
  f->path = f->true_path = NULL;
}
