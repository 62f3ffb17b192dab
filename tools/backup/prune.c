/* nbdkit-dirty-bitmap-filter
 * SPDX-License-Identifier: BSD-3-Clause
 * Copyright the nbdkit-dirty-bitmap-filter authors
 */

/* --prune: keep the last points, and remove the others.
 *
 * If the first point that is kept is an increment, it becomes full: a new
 * image with all of its disk is made beside it, and takes its place.  Points
 * above it refer to it by its name, and see the same disk.
 *
 * A kill may come between any two steps:
 *
 *   the new image is durable, under another name
 *   the list says that it will take the place, and has its checksum
 *   it takes the place
 *   the list has the point as full, without the points before
 *   the files of the points before are removed
 *
 * Before the third step the old image is there, after it the new one: the
 * checksum tells which.  prune_complete does the rest.
 */

#include <config.h>

#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <string.h>
#include <unistd.h>

#include "backup/commands.h"
#include "backup/progress.h"
#include "backup/prune.h"
#include "backup/repository.h"
#include "backup/restore.h"
#include "backup/stack.h"
#include "common/cleanup.h"
#include "common/report.h"

/* Remove the first nr points, from the list and then their files. */
static int
remove_points (struct repository *r, size_t nr)
{
  const unsigned end = r->points[nr].number;
  const unsigned first = r->points[0].number;

  repository_drop (r, nr);
  if (repository_save (r) == -1)
    return -1;
  for (unsigned number = first; number < end; ++number) {
    char file[POINT_FILE_CHARS];

    repository_name_point (file, number);
    if (unlinkat (r->fd, file, 0) == -1 && errno != ENOENT)
      report_warning ("%s/%s: %m", r->path, file);
  }
  return 0;
}

/* The point has a full image now: tell the list. */
static void
note_merged (struct repository *r, size_t i)
{
  r->points[i].is_full = true;
  r->points[i].sum = r->merged;
}

int
prune_complete (struct repository *r, bool change)
{
  struct checksum sum;
  size_t i;

  if (r->merging == 0)
    return 0;
  if (repository_find (r, r->merging, &i) == -1)
    return -1;
  CLEANUP_CLOSE int fd = openat (r->fd, r->points[i].file,
                                 O_RDONLY | O_CLOEXEC | O_NOFOLLOW |
                                 O_NONBLOCK);

  if (fd == -1) {
    report_error ("%s/%s: %m", r->path, r->points[i].file);
    return -1;
  }
  if (checksum_of (fd, r->points[i].file, &sum) == -1)
    return -1;
  r->merging = 0;
  if (strcmp (sum.text, r->merged.text) != 0)
    return change ? repository_save (r) : 0;
  note_merged (r, i);
  return change ? remove_points (r, i) : 0;
}

static int
fill_merged (const struct settings *settings, struct repository *r, size_t i,
             int fd)
{
  const struct point *p = &r->points[i];
  struct progress progress;
  struct stack s;
  int result;

  if (stack_open (&s, r, i) == -1)
    return -1;
  progress_begin (&progress, "merged", p->disk_bytes, settings->quiet);
  result = restore_to_qcow2 (&s, p->disk_bytes, fd, settings->compress,
                             &progress, &r->merged);
  progress_end (&progress, result == 0);
  stack_close (&s);
  return result;
}

/* Make a full point of points[i], and remove those before. */
static int
merge (const struct settings *settings, struct repository *r, size_t i)
{
  const struct point *p = &r->points[i];
  CLEANUP_CLOSE int fd = -1;

  if (stack_verify (r, i) == -1)
    return -1;
  fd = repository_new_file (r, p);
  if (fd == -1)
    return -1;
  if (fill_merged (settings, r, i, fd) == -1) {
    repository_remove_new (r, p);
    return -1;
  }
  r->merging = p->number;
  if (repository_save (r) == -1 || repository_name_file (r, p) == -1) {
    repository_remove_new (r, p);
    return -1;
  }
  r->merging = 0;
  note_merged (r, i);
  return remove_points (r, i);
}

int
command_prune (const struct settings *settings, const char *path)
{
  struct repository r;
  size_t nr;
  int result = 0;

  if (repository_open (&r, path, REPOSITORY_CHANGE) == -1)
    return -1;
  result = prune_complete (&r, true);
  nr = r.nr_points > settings->keep ? r.nr_points - settings->keep : 0;
  if (result == 0 && nr > 0)
    result = r.points[nr].is_full ? remove_points (&r, nr)
      : merge (settings, &r, nr);
  if (result == 0 && settings->json)
    printf ("{\"removed\": %zu, \"points\": %zu}\n", nr, r.nr_points);
  else if (result == 0 && !settings->quiet)
    fprintf (stderr, PROGRAM ": %zu point%s removed, %zu kept\n", nr,
             nr == 1 ? "" : "s", r.nr_points);
  repository_close (&r);
  return result;
}
