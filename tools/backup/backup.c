/* nbdkit-dirty-bitmap-filter
 * SPDX-License-Identifier: BSD-3-Clause
 * Copyright the nbdkit-dirty-bitmap-filter authors
 */

/* How a backup is made.
 *
 * With a control socket: begin, copy from the view, store the point, and only
 * then end as a success.  So at any kill the bitmap has all that the last
 * point in the list lacks, and perhaps some that it has.  The bitmap is the
 * repository's own, so that no other program ends a backup of it.
 *
 * Without one, the bitmap is read where the disk is, and the user has to make
 * it begin anew.  If the user does not, the next point has more than it needs.
 *
 * An increment is made only if there is a point that it can lie over: of the
 * same disk as far as can be known, and of the same bitmap.  Otherwise all is
 * copied, and the reason is told.
 *
 * The view of an increment shows only what is dirty, so the server has to keep
 * the old bytes of no other writes.  Whether that will be enough is known
 * before the backup begins.
 */

#include <config.h>

#include <errno.h>
#include <inttypes.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include <jansson.h>

#include "backup/commands.h"
#include "backup/control.h"
#include "backup/copy.h"
#include "backup/image.h"
#include "backup/progress.h"
#include "backup/prune.h"
#include "backup/repository.h"
#include "backup/source.h"
#include "common/bytes.h"
#include "common/cleanup.h"
#include "common/report.h"

#define MIN_CLUSTER_BITS 12
#define MAX_CLUSTER_BITS 16

struct backup {
  const struct settings *settings;
  const char *uri;
  struct repository repository;

  struct control control;
  bool sees_dirty_only;         /* in the view */

  struct source source;
  bool is_open;
  char *bitmap;                 /* its name, or NULL: there is none */
  char reason[1280];            /* why all is copied; "" if that is no news */
  bool is_full;
};

/* Tell the user, unless that is not wanted. */
__attribute__ ((format (printf, 2, 3)))
static void
tell (const struct backup *b, const char *fmt, ...)
{
  va_list args;

  if (b->settings->quiet)
    return;
  fprintf (stderr, PROGRAM ": ");
  va_start (args, fmt);
  vfprintf (stderr, fmt, args);
  va_end (args);
  fputc ('\n', stderr);
}

/* The last point, or NULL. */
static const struct point *
last_point (const struct backup *b)
{
  const struct repository *r = &b->repository;

  return r->nr_points == 0 ? NULL : &r->points[r->nr_points - 1];
}

__attribute__ ((format (printf, 2, 3)))
static void
copy_all_since (struct backup *b, const char *fmt, ...)
{
  va_list args;

  b->is_full = true;
  va_start (args, fmt);
  vsnprintf (b->reason, sizeof b->reason, fmt, args);
  va_end (args);
}

/* Was the last point made with the same bitmap? */
static bool
continues_bitmap (const struct backup *b)
{
  const char *bitmap = b->repository.bitmap;

  return bitmap != NULL && strcmp (bitmap, b->bitmap) == 0;
}

/* Can an increment by this bitmap lie over the last point?  The size of the
 * disk is known.
 */
static void
decide (struct backup *b)
{
  const struct point *last = last_point (b);
  const char *bitmap = b->repository.bitmap;

  if (last == NULL) {
    b->is_full = true;
    b->reason[0] = '\0';
  }
  else if (b->is_full)
    return;
  else if (last->disk_bytes != b->source.size)
    copy_all_since (b, "the disk had %" PRIu64 " bytes at the last point, and "
                    "has %" PRIu64 " now", last->disk_bytes, b->source.size);
  else if (bitmap == NULL)
    copy_all_since (b, "the last point was made with no bitmap");
  else if (!continues_bitmap (b))
    copy_all_since (b, "the last point was made with the bitmap %s", bitmap);
}

/* Each has a thread of its own, so more than there are CPUs are of no use. */
static unsigned
max_connections (void)
{
  const long cpus = sysconf (_SC_NPROCESSORS_ONLN);

  return cpus > 2 ? cpus : 2;
}

static int
open_source (struct backup *b)
{
  CLEANUP_FREE char *context =
    b->bitmap != NULL ? source_context (b->bitmap) : NULL;
  const struct source_options o = {
    .uri = b->uri, .export = b->control.export,
    .contexts = (const char *const *) &context,
    .nr_contexts = b->bitmap != NULL,
    .max_connections = max_connections (),
  };

  if (b->bitmap != NULL && context == NULL)
    return -1;
  b->is_open = source_open (&b->source, &o) == 0;
  return b->is_open ? 0 : -1;
}

/* With a control socket. */

/* Use this bitmap, or that of the repository if it is NULL. */
static int
use_bitmap (struct backup *b, const char *name)
{
  if ((name != NULL ? asprintf (&b->bitmap, "%s", name)
       : asprintf (&b->bitmap, "backup-%s", b->repository.id)) == -1) {
    b->bitmap = NULL;
    report_error ("asprintf: %m");
    return -1;
  }
  if (repository_takes_name (b->bitmap))
    return 0;
  report_error ("a bitmap with this name cannot be used: it is empty, too "
                "long, or has control characters");
  return -1;
}

/* The clusters of the image have to be so large that its L1 table is of at most
 * 32 MiB.
 */
static unsigned
min_cluster_bits (uint64_t disk_bytes)
{
  unsigned bits = MIN_CLUSTER_BITS;

  while (bits < MAX_CLUSTER_BITS &&
         disk_bytes >> (2 * bits - 3) >= UINT64_C (1) << 22)
    bits++;
  return bits;
}

/* Will an increment need no more of the disk than what is dirty? */
static int
needs_dirty_only (struct backup *b, bool *only)
{
  const struct point *last = last_point (b);
  uint64_t granularity, disk_bytes;

  *only = false;
  if (last == NULL || !continues_bitmap (b))
    return 0;
  if (control_granularity (&b->control, &granularity, &disk_bytes) == -1)
    return -1;
  *only = disk_bytes == last->disk_bytes &&
    granularity >= UINT64_C (1) << min_cluster_bits (disk_bytes);
  return 0;
}

static int
begin_with_control (struct backup *b)
{
  bool ended;

  if (use_bitmap (b, b->settings->bitmap != NULL ? b->settings->bitmap
                  : b->repository.bitmap) == -1 ||
      control_open (&b->control, b->settings->control, b->bitmap) == -1 ||
      control_end_earlier (&b->control, &ended) == -1)
    return -1;
  if (ended)
    tell (b, "an earlier backup was not ended: it is ended as failed");
  if (needs_dirty_only (b, &b->sees_dirty_only) == -1 ||
      control_begin (&b->control, b->sees_dirty_only) == -1)
    return -1;
  if (b->control.is_created)
    copy_all_since (b, "the disk did not have the bitmap %s", b->bitmap);
  else if (b->control.is_recreated)
    copy_all_since (b, "the bitmap %s was inconsistent", b->bitmap);
  return 0;
}

/* Without one. */

static int
choose_bitmap (struct backup *b, const struct source_names *names)
{
  const char *wanted = b->settings->bitmap != NULL ? b->settings->bitmap
    : b->repository.bitmap;
  const char *name = NULL;

  for (size_t i = 0; i < names->nr; ++i)
    if (wanted == NULL ? names->nr == 1 : strcmp (names->name[i], wanted) == 0)
      name = names->name[i];
  if (name == NULL && wanted == NULL && names->nr > 1) {
    report_error ("the server offers several bitmaps: choose one with "
                  "--bitmap=NAME");
    return -1;
  }
  if (name == NULL && b->settings->bitmap != NULL &&
      b->repository.nr_points == 0) {
    report_error ("the server does not offer the bitmap %s", wanted);
    return -1;
  }
  if (name != NULL)
    return use_bitmap (b, name);
  if (wanted != NULL)
    copy_all_since (b, "the server does not offer the bitmap %s: it is "
                    "missing, or inconsistent", wanted);
  else
    copy_all_since (b, "the server offers no bitmap");
  return 0;
}

static int
begin_without_control (struct backup *b)
{
  struct source_names names;
  int r;

  if (source_list_bitmaps (b->uri, &names) == -1)
    return -1;
  r = choose_bitmap (b, &names);
  source_free_names (&names);
  if (r == 0)
    tell (b, "warning: the disk must not be written while it is copied: without "
          "--control there is no view of one moment");
  return r;
}

/* A word for a shell, for free(), or NULL. */
static char *
quote (const char *name)
{
  char *quoted = malloc (4 * strlen (name) + 3), *p = quoted;

  if (quoted == NULL)
    return NULL;
  *p++ = '\'';
  for (; *name != '\0'; ++name)
    if (*name == '\'')
      p = stpcpy (p, "'\\''");
    else
      *p++ = *name;
  strcpy (p, "'");
  return quoted;
}

static bool
needs_quotes (const char *name)
{
  return name[0] == '-' ||
    name[strspn (name, "0123456789ABCDEFGHIJKLMNOPQRSTUVWXYZ_"
                 "abcdefghijklmnopqrstuvwxyz-.:")] != '\0';
}

/* What the user has to do for the next increment. */
static void
tell_next (const struct backup *b)
{
  CLEANUP_FREE char *quoted = NULL;

  if (b->settings->control != NULL)
    return;
  if (b->bitmap == NULL)
    tell (b, "there is no bitmap; the first point that is made with one is "
          "full, and those after it are increments.  To add one, when the "
          "image is not in use:\n"
          "    qemu-img bitmap --add IMAGE backup-%s", b->repository.id);
  else {
    quoted = needs_quotes (b->bitmap) ? quote (b->bitmap) : NULL;
    tell (b, "let the bitmap begin anew before the disk is written again, "
          "when the image is not in use:\n"
          "    qemu-img bitmap --clear IMAGE %s",
          quoted != NULL ? quoted : b->bitmap);
  }
}

/* The clusters of an increment are as small as the bitmap's granules seem to
 * be, within limits, so that little is copied besides.
 */
static unsigned
choose_cluster_bits (const struct backup *b, const struct runs *dirty)
{
  uint64_t edges = UINT64_C (1) << MAX_CLUSTER_BITS;
  const unsigned min_bits = min_cluster_bits (b->source.size);
  unsigned bits = MAX_CLUSTER_BITS;

  for (size_t i = 0; dirty != NULL && i < dirty->nr; ++i)
    if (dirty->run[i].end != b->source.size)
      edges |= dirty->run[i].end;
  while (bits > min_bits && edges % (UINT64_C (1) << bits) != 0 &&
         UINT64_C (1) << (bits - 1) >= b->source.min_request)
    bits--;
  return bits;
}

/* Ask the server what there is in the disk and, for an increment, what of that
 * is dirty.  Each of its answers has both.
 */
static int
ask_contexts (struct backup *b, struct runs *allocation, struct runs *dirty)
{
  CLEANUP_FREE char *bitmap = b->is_full ? NULL : source_context (b->bitmap);
  const char *contexts[2];
  struct runs *runs[2];
  size_t nr = 0;

  if (b->source.has_allocation) {
    contexts[nr] = SOURCE_ALLOCATION;
    runs[nr++] = allocation;
  }
  else if (runs_of_all (allocation, b->source.size, 0) == -1)
    return -1;
  if (!b->is_full) {
    if (bitmap == NULL)
      return -1;
    contexts[nr] = bitmap;
    runs[nr++] = dirty;
  }
  return source_runs (&b->source, contexts, nr, runs);
}

static int
ask_and_plan (struct backup *b, struct plan *plan, unsigned *cluster_bits)
{
  struct runs allocation = { 0 }, dirty = { 0 };
  int r = ask_contexts (b, &allocation, &dirty);

  if (r == 0) {
    *cluster_bits = choose_cluster_bits (b, b->is_full ? NULL : &dirty);
    r = plan_make (plan, b->source.size, 1U << *cluster_bits, &allocation,
                   b->is_full ? NULL : &dirty);
  }
  runs_free (&allocation);
  runs_free (&dirty);
  return r;
}

/* Does the view show all that the plan has?  It knows dirty bytes by whole
 * granules.  So an increment has more of them if, and only if, it has a granule
 * that is clean.
 */
static bool
is_shown (const struct backup *b, const struct plan *plan)
{
  return !b->sees_dirty_only ||
    b->control.dirty_bytes >= b->source.size ||
    (!b->is_full && plan->all_bytes <= b->control.dirty_bytes);
}

static int
make_plan (struct backup *b, struct plan *plan, unsigned *cluster_bits)
{
  if (ask_and_plan (b, plan, cluster_bits) == -1)
    return -1;
  if (is_shown (b, plan))
    return 0;
  plan_free (plan);
  report_error ("the disk or its bitmap has changed while the backup began: "
                "make it again");
  return -1;
}

/* What the new point's image is filled from. */
struct content {
  struct source *source;
  const struct plan *plan;
  struct progress progress;
};

static int
fill_image (void *opaque, const struct copy_sink *sink)
{
  struct content *content = opaque;

  return copy_plan (content->source, content->plan, sink, &content->progress);
}

static int
write_image (struct backup *b, const struct plan *plan, unsigned cluster_bits,
             int fd, struct point *p)
{
  const struct qcow2_writer_options o = {
    .size = b->source.size, .cluster_bits = cluster_bits,
    .backing_name = b->is_full ? NULL : p[-1].file,
    .backing_format = b->is_full ? NULL : "qcow2",
    .compress = b->settings->compress,
  };
  struct content content = { .source = &b->source, .plan = plan };
  int r;

  progress_begin (&content.progress, "copied", plan->data_bytes,
                  b->settings->quiet);
  r = image_write (fd, &o, fill_image, &content, &p->sum);
  progress_end (&content.progress, r == 0);
  return r;
}

/* Fill the file of the new point, which is the last one in the list. */
static int
fill_point (struct backup *b, struct point *p, int fd)
{
  struct plan plan;
  unsigned cluster_bits = MAX_CLUSTER_BITS;
  int r;

  if (make_plan (b, &plan, &cluster_bits) == -1)
    return -1;
  p->copied_bytes = plan.data_bytes;
  r = write_image (b, &plan, cluster_bits, fd, p);
  plan_free (&plan);
  return r;
}

/* Make the file of the new point, and put it into the list. */
static int
store_point (struct backup *b, struct point *p)
{
  struct repository *r = &b->repository;
  CLEANUP_CLOSE int fd = repository_new_file (r, p);

  if (fd == -1)
    return -1;
  if (fill_point (b, p, fd) == -1) {
    repository_remove_new (r, p);
    return -1;
  }
  if (repository_set_bitmap (r, b->bitmap) == -1 ||
      repository_name_file (r, p) == -1) {
    repository_remove_new (r, p);
    return -1;
  }
  if (repository_save (r) == -1) {
    repository_remove_unlisted (r);
    return -1;
  }
  return 0;
}

static int
add_point (struct backup *b)
{
  struct repository *r = &b->repository;
  struct point *p;

  decide (b);
  if (b->is_full && b->reason[0] != '\0')
    report_warning ("all of the disk is copied: %s", b->reason);
  p = repository_add (r);
  if (p == NULL)
    return -1;
  p->is_full = b->is_full;
  p->disk_bytes = b->source.size;
  repository_time_now (p->time);
  return store_point (b, p);
}

static void
print_result (const struct backup *b)
{
  const struct point *p = last_point (b);
  char copied[PROGRESS_SIZE_CHARS], stored[PROGRESS_SIZE_CHARS];
  json_t *result;

  if (!b->settings->json) {
    tell (b, "point %u, %s: %s of the disk, stored in %s", p->number,
          p->is_full ? "full" : "an increment",
          progress_size (copied, p->copied_bytes),
          progress_size (stored, p->sum.bytes));
    return;
  }
  result = json_pack ("{s:i,s:s,s:s,s:I,s:I,s:I,s:s*,s:s*}", "number",
                      (int) p->number, "file", p->file, "type",
                      p->is_full ? "full" : "increment",
                      "disk-bytes", (json_int_t) p->disk_bytes,
                      "copied-bytes", (json_int_t) p->copied_bytes,
                      "bytes", (json_int_t) p->sum.bytes, "bitmap", b->bitmap,
                      "reason", b->reason[0] != '\0' ? b->reason : NULL);
  json_dumpf (result, stdout, JSON_INDENT (2) | JSON_ENSURE_ASCII);
  putchar ('\n');
  json_decref (result);
}

static int
make_backup (struct backup *b)
{
  if (prune_complete (&b->repository, true) == -1 ||
      (b->settings->control != NULL ? begin_with_control (b)
       : begin_without_control (b)) == -1 ||
      open_source (b) == -1 || add_point (b) == -1)
    return -1;
  return b->control.has_begun ? control_end_as_success (&b->control) : 0;
}

int
command_backup (const struct settings *settings, const char *uri,
                const char *path)
{
  struct backup b = { .settings = settings, .uri = uri };
  int r;

  if (repository_open (&b.repository, path, REPOSITORY_CREATE) == -1)
    return -1;
  r = make_backup (&b);
  if (b.is_open)
    source_close (&b.source);
  control_end_as_failure (&b.control);
  if (r == 0) {
    print_result (&b);
    tell_next (&b);
  }
  control_close (&b.control);
  repository_close (&b.repository);
  free (b.bitmap);
  return r;
}
