/* nbdkit-dirty-bitmap-filter
 * SPDX-License-Identifier: BSD-3-Clause
 * Copyright the nbdkit-dirty-bitmap-filter authors
 */

/* --list and --verify. */

#include <config.h>

#include <inttypes.h>
#include <stdio.h>
#include <stdlib.h>

#include <jansson.h>

#include "backup/commands.h"
#include "backup/progress.h"
#include "backup/prune.h"
#include "backup/repository.h"
#include "backup/stack.h"
#include "common/bytes.h"
#include "common/cleanup.h"
#include "common/report.h"
#include "qcow2/qcow2.h"

static int
list_as_json (const struct repository *r)
{
  json_t *points = json_array ();

  for (size_t i = 0; i < r->nr_points; ++i)
    json_array_append_new (points, repository_point_to_json (&r->points[i]));
  json_dumpf (points, stdout, JSON_INDENT (2) | JSON_ENSURE_ASCII);
  putchar ('\n');
  json_decref (points);
  return 0;
}

int
command_list (const struct settings *settings, const char *path)
{
  struct repository r;

  if (repository_open (&r, path, REPOSITORY_LIST) == -1)
    return -1;
  if (settings->json)
    list_as_json (&r);
  else {
    printf ("point  time                  type       disk      copied    "
            "stored    file\n");
    for (size_t i = 0; i < r.nr_points; ++i) {
      const struct point *p = &r.points[i];
      char disk[PROGRESS_SIZE_CHARS], copied[PROGRESS_SIZE_CHARS];
      char stored[PROGRESS_SIZE_CHARS];

      printf ("%-5u  %-20s  %-9s  %-8s  %-8s  %-8s  %s\n", p->number, p->time,
              p->is_full ? "full" : "increment",
              progress_size (disk, p->disk_bytes),
              progress_size (copied, p->copied_bytes),
              progress_size (stored, p->sum.bytes), p->file);
    }
  }
  repository_close (&r);
  return 0;
}

#define READ_BYTES ((uint32_t) 1 << 20)

/* Read all that the point's own image has. */
static int
read_own (const struct stack *s, uint64_t size)
{
  CLEANUP_FREE uint8_t *buf = malloc (READ_BYTES);
  uint64_t length;

  if (buf == NULL) {
    report_error ("malloc: %m");
    return -1;
  }
  for (uint64_t at = 0; at < size; at += length) {
    unsigned depth;

    if (is_interrupted ||
        qcow2_extent (s->top, at, min_u64 (size, at + READ_BYTES), &length,
                      NULL, &depth) == -1 ||
        (depth == 1 && qcow2_read (s->top, buf, length, at) == -1))
      return -1;
  }
  return 0;
}

static int
verify_point (const struct repository *r, size_t i)
{
  const struct point *p = &r->points[i];
  struct report_hold hold;
  struct stack s;
  int result;

  if (stack_verify_file (r, p) == -1 || stack_open (&s, r, i) == -1)
    return -1;
  report_hold_begin (&hold);
  result = read_own (&s, p->disk_bytes);
  report_hold_end (&hold);
  stack_close (&s);
  if (hold.any)
    report_error ("%s/%s: cannot be read: %s", r->path, p->file, hold.text);
  return result;
}

/* All points are verified, even if one is damaged, but each is reported as it
 * is found.
 */
int
command_verify (const struct settings *settings, const char *path)
{
  struct repository r;
  struct progress progress;
  uint64_t bytes = 0;
  size_t nr_bad = 0;

  if (repository_open (&r, path, REPOSITORY_READ) == -1)
    return -1;
  if (prune_complete (&r, false) == -1) {
    repository_close (&r);
    return -1;
  }
  for (size_t i = 0; i < r.nr_points; ++i)
    bytes += r.points[i].sum.bytes;
  progress_begin (&progress, "verified", bytes, settings->quiet);
  for (size_t i = 0; i < r.nr_points && !is_interrupted; ++i) {
    nr_bad += verify_point (&r, i) == -1;
    progress.done += r.points[i].sum.bytes;
    progress_tell (&progress);
  }
  progress_end (&progress, nr_bad == 0);
  if (nr_bad > 0 && !is_interrupted)
    report_error ("%s: %zu of %zu points %s damaged", path, nr_bad,
                  r.nr_points, nr_bad == 1 ? "is" : "are");
  else if (settings->json)
    printf ("{\"points\": %zu, \"damaged\": 0}\n", r.nr_points);
  repository_close (&r);
  return nr_bad == 0 && !is_interrupted ? 0 : -1;
}
