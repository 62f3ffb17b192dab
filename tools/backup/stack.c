/* nbdkit-dirty-bitmap-filter
 * SPDX-License-Identifier: BSD-3-Clause
 * Copyright the nbdkit-dirty-bitmap-filter authors
 */

/* Reading the disk of a point.
 *
 * The list says which image lies over which.  The headers say so, too, for
 * other programs; here they are only compared.
 */

#include <config.h>

#include <errno.h>
#include <fcntl.h>
#include <inttypes.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

#include "backup/backup.h"
#include "backup/stack.h"
#include "common/bytes.h"
#include "common/cleanup.h"
#include "common/report.h"
#include "container/container.h"
#include "qcow2/qcow2.h"

#define SECTOR 512

/* For L2 tables, of each image. */
#define CACHE_BYTES ((uint64_t) 8 << 20)

struct stack_image {
  int fd;
  struct container *container;
  struct qcow2 *qcow2;
};

/* The index of the full point below points[i]. */
static size_t
base_of (const struct repository *r, size_t i)
{
  while (!r->points[i].is_full)
    i--;
  return i;
}

/* Open a point's file for reading. */
static int
open_point (const struct repository *r, const struct point *p)
{
  const int fd = openat (r->fd, p->file, O_RDONLY | O_CLOEXEC | O_NOCTTY |
                         O_NONBLOCK | O_NOFOLLOW);
  struct stat statbuf;

  if (fd != -1 && fstat (fd, &statbuf) == 0 && S_ISREG (statbuf.st_mode))
    return fd;
  if (fd != -1) {
    close (fd);
    errno = EINVAL;
  }
  report_error ("%s/%s: %m", r->path, p->file);
  return -1;
}

int
stack_verify_file (const struct repository *r, const struct point *p)
{
  CLEANUP_CLOSE int fd = open_point (r, p);
  struct checksum sum;

  if (fd == -1 || checksum_of (fd, p->file, &sum) == -1)
    return -1;
  if (sum.bytes == p->sum.bytes && strcmp (sum.text, p->sum.text) == 0)
    return 0;
  report_error ("%s/%s: is damaged: its checksum differs", r->path, p->file);
  return -1;
}

int
stack_verify (const struct repository *r, size_t i)
{
  for (size_t n = base_of (r, i); n <= i; ++n)
    if (stack_verify_file (r, &r->points[n]) == -1)
      return -1;
  return 0;
}

static bool
has_backing (const struct qcow2_references *f, const struct point *below)
{
  if (f->has_data_file)
    return false;
  if (below == NULL)
    return f->backing_name == NULL;
  return f->backing_name != NULL && f->backing_format != NULL &&
    strcmp (f->backing_name, below->file) == 0 &&
    strcmp (f->backing_format, "qcow2") == 0;
}

static int
check_backing (const struct repository *r, const struct point *p,
               const struct point *below, struct container *c)
{
  struct qcow2_references references;
  struct report_hold hold;
  bool good;
  int result;

  report_hold_begin (&hold);
  result = qcow2_read_references (c, &references);
  report_hold_end (&hold);
  if (result == -1) {
    report_error ("%s/%s: %s", r->path, p->file, hold.text);
    return -1;
  }
  good = has_backing (&references, below);
  qcow2_free_references (&references);
  if (good)
    return 0;
  report_error ("%s/%s: its backing file is not %s", r->path, p->file,
                below != NULL ? below->file : "none");
  return -1;
}

static int
open_image (struct stack_image *image, const struct repository *r,
            const struct point *p, const struct point *below,
            struct qcow2 *backing)
{
  const struct qcow2_options options = {
    .readonly = true, .cache_size = CACHE_BYTES, .backing.image = backing,
  };
  struct report_hold hold;

  image->fd = open_point (r, p);
  if (image->fd == -1)
    return -1;
  image->container = container_open_file (image->fd);
  if (image->container == NULL) {
    report_error ("%s/%s: %m", r->path, p->file);
    return -1;
  }
  if (check_backing (r, p, below, image->container) == -1)
    return -1;
  report_hold_begin (&hold);
  image->qcow2 = qcow2_open (image->container, &options);
  report_hold_end (&hold);
  if (image->qcow2 == NULL) {
    report_error ("%s/%s: %s", r->path, p->file, hold.text);
    return -1;
  }
  if (p->disk_bytes <= INT64_MAX - SECTOR &&
      qcow2_size (image->qcow2) == round_up (p->disk_bytes, SECTOR))
    return 0;
  report_error ("%s/%s: the disk in it is not of %" PRIu64 " bytes", r->path,
                p->file, p->disk_bytes);
  return -1;
}

int
stack_open (struct stack *s, const struct repository *r, size_t i)
{
  const size_t base = base_of (r, i);

  memset (s, 0, sizeof *s);
  s->images = calloc (i - base + 1, sizeof *s->images);
  if (s->images == NULL) {
    report_error ("calloc: %m");
    return -1;
  }
  for (size_t n = base; n <= i; ++n) {
    struct stack_image *image = &s->images[s->nr++];

    image->fd = -1;
    if (open_image (image, r, &r->points[n],
                    n == base ? NULL : &r->points[n - 1], s->top) == -1) {
      stack_close (s);
      return -1;
    }
    s->top = image->qcow2;
  }
  return 0;
}

void
stack_close (struct stack *s)
{
  while (s->nr > 0) {
    struct stack_image *image = &s->images[--s->nr];

    qcow2_close (image->qcow2);
    container_close (image->container);
    if (image->fd != -1)
      close (image->fd);
  }
  free (s->images);
  s->images = NULL;
  s->top = NULL;
}
