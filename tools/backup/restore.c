/* nbdkit-dirty-bitmap-filter
 * SPDX-License-Identifier: BSD-3-Clause
 * Copyright the nbdkit-dirty-bitmap-filter authors
 */

/* --restore: the disk of a point, to a new file, to a block device, or to an
 * NBD export.
 *
 * The checksums of all files that are needed are compared first.  A file gets
 * its name when it is whole; with --force it takes the place of another.
 */

#include <config.h>

#include <fcntl.h>
#include <inttypes.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

#include <libnbd.h>

#include "backup/commands.h"
#include "backup/copy.h"
#include "backup/image.h"
#include "backup/new-file.h"
#include "backup/progress.h"
#include "backup/prune.h"
#include "backup/repository.h"
#include "backup/restore.h"
#include "backup/stack.h"
#include "common/bytes.h"
#include "common/cleanup.h"
#include "common/report.h"
#include "container/container.h"
#include "container/fd.h"
#include "qcow2/qcow2.h"

#define PIECE_BYTES ((uint64_t) 2 << 20)
#define UNIT_BYTES (UINT32_C (1) << 16)

/* Give all of the disk to a sink, from its beginning to its end. */
static int
restore_disk (const struct stack *s, uint64_t size,
              const struct copy_sink *sink, struct progress *progress)
{
  CLEANUP_FREE uint8_t *buf = malloc (PIECE_BYTES);
  int r = buf == NULL ? -1 : 0;

  if (buf == NULL)
    report_error ("malloc: %m");
  for (uint64_t at = 0; at < size && r == 0; ) {
    const uint64_t count = min_u64 (PIECE_BYTES, size - at);
    uint64_t length = 0;
    enum qcow2_extent_type type;
    unsigned depth;

    if (is_interrupted)
      return -1;
    /* Holes and zeroes are not read. */
    r = qcow2_extent (s->top, at, at + count, &length, &type, &depth);
    if (r == 0 && type != QCOW2_EXTENT_DATA && length == count)
      r = sink->zero (sink->opaque, count, at);
    else if (r == 0 && qcow2_read (s->top, buf, count, at) == -1)
      r = -1;
    else if (r == 0)
      r = copy_to_sink (sink, buf, count, at);
    at += count;
    progress->done = at;
    progress_tell (progress);
  }
  return r;
}

/* A raw file: it is new, and reads as zeroes. */
static int
raw_data (void *opaque, const void *buf, uint64_t count, uint64_t offset)
{
  if (fd_pwrite (*(const int *) opaque, buf, count, offset) == 0)
    return 0;
  report_error ("cannot write: %m");
  return -1;
}

static int
no_zero (void *opaque, uint64_t count, uint64_t offset)
{
  (void) opaque;
  (void) count;
  (void) offset;
  return 0;
}

static int
restore_to_raw (const struct stack *s, uint64_t size, int fd,
                struct progress *progress)
{
  const struct copy_sink sink = {
    .opaque = &fd, .unit = UNIT_BYTES, .data = raw_data, .zero = no_zero,
  };

  if (ftruncate (fd, size) == -1) {
    report_error ("ftruncate: %m");
    return -1;
  }
  if (restore_disk (s, size, &sink, progress) == -1)
    return -1;
  if (fsync (fd) == 0)
    return 0;
  report_error ("fsync: %m");
  return -1;
}

/* A disk, as an image is filled from it. */
struct content {
  const struct stack *stack;
  uint64_t size;
  struct progress *progress;
};

static int
fill_image (void *opaque, const struct copy_sink *sink)
{
  const struct content *content = opaque;

  return restore_disk (content->stack, content->size, sink,
                       content->progress);
}

int
restore_to_qcow2 (const struct stack *s, uint64_t size, int fd, bool compress,
                  struct progress *progress, struct checksum *sum)
{
  const struct qcow2_writer_options o = {
    .size = size, .cluster_bits = 16, .compress = compress,
  };
  struct content content = { s, size, progress };

  return image_write (fd, &o, fill_image, &content, sum);
}

/* An NBD export. */

#define NBD_DEPTH 16
#define POLL_MS 200

struct nbd_target {
  struct nbd_handle *nbd;
  uint64_t max_request;
  bool can_zero;
  int err;                      /* of a request that has failed, or 0 */
};

static int
nbd_failed (void)
{
  report_error ("%s", nbd_get_error ());
  return -1;
}

/* A request in flight.  None is waited for in libnbd, where a signal would not
 * be seen.
 */
struct write {
  struct nbd_target *target;
  void *data;                   /* or NULL */
};

static int
end_write (void *opaque, int *error)
{
  const struct write *w = opaque;

  if (*error != 0)
    w->target->err = *error;
  return 1;
}

static void
free_write (void *opaque)
{
  struct write *w = opaque;

  free (w->data);
  free (w);
}

/* Wait until fewer than max requests are in flight. */
static int
wait_for_writes (struct nbd_target *t, int max)
{
  while (nbd_aio_in_flight (t->nbd) >= max && t->err == 0) {
    if (is_interrupted)
      return -1;
    if (nbd_poll (t->nbd, POLL_MS) == -1)
      return nbd_failed ();
  }
  if (t->err == 0)
    return 0;
  report_error ("cannot write: %s", strerror (t->err));
  return -1;
}

/* With data if there are any.  libnbd calls free_write when it needs the data
 * no more, also if a request cannot begin.
 */
static struct write *
new_write (struct nbd_target *t, const void *data, uint64_t count,
           nbd_completion_callback *callback)
{
  struct write *w = malloc (sizeof *w);
  void *copy = data != NULL ? malloc (count) : NULL;

  if (w == NULL || (data != NULL && copy == NULL)) {
    report_error ("malloc: %m");
    free (w);
    free (copy);
    return NULL;
  }
  if (data != NULL)
    memcpy (copy, data, count);
  *w = (struct write) { t, copy };
  *callback = (nbd_completion_callback) {
    .callback = end_write, .user_data = w, .free = free_write,
  };
  return w;
}

static int
begin_write (struct nbd_target *t, const void *buf, uint64_t count,
             uint64_t offset)
{
  nbd_completion_callback callback;
  struct write *w = new_write (t, buf, count, &callback);

  if (w == NULL)
    return -1;
  return nbd_aio_pwrite (t->nbd, w->data, count, offset, callback, 0) != -1
    ? 0 : nbd_failed ();
}

static int
begin_zero (struct nbd_target *t, uint64_t count, uint64_t offset)
{
  nbd_completion_callback callback;

  if (wait_for_writes (t, NBD_DEPTH) == -1 ||
      new_write (t, NULL, 0, &callback) == NULL)
    return -1;
  return nbd_aio_zero (t->nbd, count, offset, callback, 0) != -1
    ? 0 : nbd_failed ();
}

/* All that was written is durable, if the server can tell. */
static int
end_writes (struct nbd_target *t)
{
  nbd_completion_callback callback;

  if (wait_for_writes (t, 1) == -1)
    return -1;
  if (nbd_can_flush (t->nbd) != 1)
    return 0;
  if (new_write (t, NULL, 0, &callback) == NULL)
    return -1;
  if (nbd_aio_flush (t->nbd, callback, 0) == -1)
    return nbd_failed ();
  return wait_for_writes (t, 1);
}

static int
nbd_data (void *opaque, const void *buf, uint64_t count, uint64_t offset)
{
  struct nbd_target *t = opaque;
  const uint8_t *p = buf;

  while (count > 0) {
    const uint64_t n = min_u64 (count, t->max_request);

    if (wait_for_writes (t, NBD_DEPTH) == -1 ||
        begin_write (t, p, n, offset) == -1)
      return -1;
    p += n;
    offset += n;
    count -= n;
  }
  return 0;
}

static int
nbd_zeroes (void *opaque, uint64_t count, uint64_t offset)
{
  struct nbd_target *t = opaque;
  CLEANUP_FREE uint8_t *zeroes = NULL;

  if (t->can_zero)
    return begin_zero (t, count, offset);
  zeroes = calloc (1, count);
  if (zeroes == NULL) {
    report_error ("calloc: %m");
    return -1;
  }
  return nbd_data (t, zeroes, count, offset);
}

static int
open_nbd (struct nbd_target *t, const char *uri, uint64_t size)
{
  int64_t max;

  nbd_set_uri_allow_local_file (t->nbd, true);
  if (nbd_connect_uri (t->nbd, uri) == -1) {
    report_error ("%s: %s", uri, nbd_get_error ());
    return -1;
  }
  if (nbd_is_read_only (t->nbd) == 1) {
    report_error ("%s: the export is read-only", uri);
    return -1;
  }
  if (nbd_get_size (t->nbd) != (int64_t) size) {
    report_error ("%s: the export has %" PRIi64 " bytes, and the disk %"
                  PRIu64, uri, nbd_get_size (t->nbd), size);
    return -1;
  }
  max = nbd_get_block_size (t->nbd, LIBNBD_SIZE_MAXIMUM);
  t->max_request = max > 0 ? min_u64 (max, PIECE_BYTES) : PIECE_BYTES;
  t->can_zero = nbd_can_zero (t->nbd) == 1;
  return 0;
}

static int
restore_to_nbd (const struct stack *s, uint64_t size, const char *uri,
                struct progress *progress)
{
  struct nbd_target t = { .nbd = nbd_create () };
  const struct copy_sink sink = {
    .opaque = &t, .unit = UNIT_BYTES, .data = nbd_data, .zero = nbd_zeroes,
  };
  int r;

  if (t.nbd == NULL)
    return nbd_failed ();
  r = open_nbd (&t, uri, size);
  if (r == 0)
    r = restore_disk (s, size, &sink, progress);
  if (r == 0)
    r = end_writes (&t);
  if (r == 0)
    nbd_shutdown (t.nbd, 0);
  nbd_close (t.nbd);
  return r;
}

/* A block device, as raw data.  It is not new, so zeroes are written. */

static int
device_data (void *opaque, const void *buf, uint64_t count, uint64_t offset)
{
  if (container_pwrite (opaque, buf, count, offset) == 0)
    return 0;
  report_error ("cannot write: %m");
  return -1;
}

static int
device_zeroes (void *opaque, uint64_t count, uint64_t offset)
{
  if (container_zero (opaque, count, offset, true) == 0)
    return 0;
  report_error ("cannot write zeroes: %m");
  return -1;
}

static int
fill_device (const struct stack *s, uint64_t size, struct container *c,
             const char *target, struct progress *progress)
{
  const struct copy_sink sink = {
    .opaque = c, .unit = UNIT_BYTES, .data = device_data,
    .zero = device_zeroes,
  };

  if (container_size (c) < size) {
    report_error ("%s: the device has %" PRIu64 " bytes, and the disk %"
                  PRIu64, target, container_size (c), size);
    return -1;
  }
  if (restore_disk (s, size, &sink, progress) == -1)
    return -1;
  if (container_flush (c) == 0)
    return 0;
  report_error ("%s: cannot flush: %m", target);
  return -1;
}

/* O_EXCL fails if it is mounted. */
static int
restore_to_device (const struct settings *settings, const struct stack *s,
                   uint64_t size, const char *target,
                   struct progress *progress)
{
  CLEANUP_CLOSE int fd = -1;
  struct container *c;
  int r;

  if (settings->format != NULL && strcmp (settings->format, "raw") != 0) {
    report_error ("%s: the format on a device must be raw", target);
    return -1;
  }
  fd = open (target, O_RDWR | O_EXCL | O_CLOEXEC);
  c = fd == -1 ? NULL : container_open_file_writable (fd);
  if (c == NULL) {
    report_error ("%s: %m", target);
    return -1;
  }
  r = fill_device (s, size, c, target, progress);
  container_close (c);
  return r;
}

/* Files. */

static bool
has_ending (const char *name, const char *ending)
{
  const size_t length = strlen (name), n = strlen (ending);

  return length > n && strcmp (name + length - n, ending) == 0;
}

static int
choose_format (const struct settings *settings, const char *target,
               bool *is_qcow2)
{
  const char *format = settings->format;

  if (format == NULL)
    format = has_ending (target, ".qcow2") ? "qcow2" : "raw";
  *is_qcow2 = strcmp (format, "qcow2") == 0;
  if (*is_qcow2 || strcmp (format, "raw") == 0)
    return 0;
  report_error ("--format must be qcow2 or raw: %s", format);
  return -1;
}

static int
restore_to_file (const struct settings *settings, const struct stack *s,
                 uint64_t size, const char *target, struct progress *progress)
{
  struct new_file f;
  bool is_qcow2;
  int r;

  if (choose_format (settings, target, &is_qcow2) == -1 ||
      new_file_create (&f, target) == -1)
    return -1;
  r = is_qcow2
    ? restore_to_qcow2 (s, size, f.fd, settings->compress, progress, NULL)
    : restore_to_raw (s, size, f.fd, progress);
  return new_file_end (&f, r == 0, settings->force);
}

static bool
is_uri (const char *target)
{
  return strncmp (target, "nbd", 3) == 0 && strstr (target, "://") != NULL;
}

static bool
is_device (const char *target)
{
  struct stat statbuf;

  return stat (target, &statbuf) == 0 && S_ISBLK (statbuf.st_mode);
}

/* With --force, a block device may be there, too. */
static int
check_target (const struct settings *settings, const char *target)
{
  if (is_uri (target) || (settings->force && is_device (target)))
    return 0;
  return new_file_check (target, settings->force);
}

static int
restore_point (const struct settings *settings, const struct repository *r,
               size_t i, const char *target)
{
  const uint64_t size = r->points[i].disk_bytes;
  struct progress progress;
  struct stack s;
  int result;

  if (stack_verify (r, i) == -1 || stack_open (&s, r, i) == -1)
    return -1;
  progress_begin (&progress, "restored", size, settings->quiet);
  result = is_uri (target) ? restore_to_nbd (&s, size, target, &progress)
    : is_device (target)
    ? restore_to_device (settings, &s, size, target, &progress)
    : restore_to_file (settings, &s, size, target, &progress);
  progress_end (&progress, result == 0);
  stack_close (&s);
  return result;
}

/* REPOSITORY@N, unless there is a folder of that name. */
static int
split_place (const char *place, char **path, unsigned *number)
{
  struct stat statbuf;
  char *at;

  *number = 0;
  *path = strdup (place);
  if (*path == NULL) {
    report_error ("strdup: %m");
    return -1;
  }
  at = strrchr (*path, '@');
  if (at == NULL || stat (place, &statbuf) == 0)
    return 0;
  if (at[1] == '\0' || strspn (at + 1, "0123456789") != strlen (at + 1) ||
      strlen (at + 1) > 6) {
    report_error ("not the number of a point: %s", at + 1);
    free (*path);
    return -1;
  }
  *number = strtoul (at + 1, NULL, 10);
  *at = '\0';
  return 0;
}

int
command_restore (const struct settings *settings, const char *place,
                 const char *target)
{
  CLEANUP_FREE char *path = NULL;
  struct repository r;
  unsigned number;
  size_t i;
  int result;

  if (split_place (place, &path, &number) == -1) {
    path = NULL;
    return -1;
  }
  if (check_target (settings, target) == -1 ||
      repository_open (&r, path, REPOSITORY_READ) == -1)
    return -1;
  result = prune_complete (&r, false) == -1 ||
    repository_find (&r, number, &i) == -1 ? -1
    : restore_point (settings, &r, i, target);
  repository_close (&r);
  return result;
}
