/* nbdkit-dirty-bitmap-filter
 * SPDX-License-Identifier: BSD-3-Clause
 * Copyright the nbdkit-dirty-bitmap-filter authors
 */

/* --map: a picture of the disk and its bitmaps.
 *
 * All contexts are asked for in one connection, side by side, and each extent
 * is added to the cells where it is: how many there are does not matter.
 */

#include <config.h>

#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>
#include <unistd.h>

#include <jansson.h>
#include <libnbd.h>

#include "backup/commands.h"
#include "backup/new-file.h"
#include "backup/picture.h"
#include "backup/progress.h"
#include "backup/source.h"
#include "common/bytes.h"
#include "common/cleanup.h"
#include "common/report.h"
#include "common/utf8.h"

#define DIRTY 1

/* The contexts that are asked for, and where their extents go. */
struct survey {
  size_t nr;
  const char *context[MAP_MAX_BITMAPS + 1];
  struct cells *cells[MAP_MAX_BITMAPS + 1];
  bool is_bitmap[MAP_MAX_BITMAPS + 1];
  struct progress progress;
};

static enum cells_kind
kind_of (bool is_bitmap, uint32_t flags)
{
  if (is_bitmap)
    return flags & DIRTY ? CELLS_MARKED : CELLS_REST;
  return flags & LIBNBD_STATE_HOLE ? CELLS_REST
    : flags & LIBNBD_STATE_ZERO ? CELLS_ZERO : CELLS_MARKED;
}

static int
take_extent (void *opaque, size_t context, uint64_t begin, uint64_t end,
             uint32_t flags)
{
  struct survey *s = opaque;

  cells_add (s->cells[context], begin, end,
             kind_of (s->is_bitmap[context], flags));
  s->progress.done = end;
  progress_tell (&s->progress);
  return 0;
}

static void
add_context (struct survey *s, const char *context, struct cells *cells,
             bool is_bitmap)
{
  s->context[s->nr] = context;
  s->cells[s->nr] = cells;
  s->is_bitmap[s->nr++] = is_bitmap;
}

static int
init_cells (struct map *m)
{
  if (cells_init (&m->allocation, m->size) == -1)
    return -1;
  for (size_t i = 0; i < m->nr_bitmaps; ++i)
    if (cells_init (&m->bitmap[i].cells, m->size) == -1)
      return -1;
  return 0;
}

static int
ask (struct map *m, struct source *source, char **contexts, bool quiet)
{
  struct survey s = { 0 };
  int r;

  if (source->has_allocation)
    add_context (&s, SOURCE_ALLOCATION, &m->allocation, false);
  for (size_t i = 0; i < m->nr_bitmaps; ++i)
    add_context (&s, contexts[i], &m->bitmap[i].cells, true);
  if (s.nr == 0)
    return 0;
  progress_begin (&s.progress, "mapped", m->size, quiet);
  r = source_walk (source, s.context, s.nr, take_extent, &s);
  /* How many bytes a second that was means nothing. */
  progress_end (&s.progress, false);
  return r;
}

static int
survey_source (struct map *m, struct source *source, char **contexts,
               bool quiet)
{
  m->export = nbd_get_export_name (source->nbd[0]);
  if (m->export == NULL) {
    report_error ("%s", nbd_get_error ());
    return -1;
  }
  m->size = source->size;
  m->has_allocation = source->has_allocation;
  if (init_cells (m) == -1)
    return -1;
  return ask (m, source, contexts, quiet);
}

static int
survey (struct map *m, const char *uri, const struct source_names *names,
        bool quiet)
{
  char *contexts[MAP_MAX_BITMAPS] = { NULL };
  const struct source_options options = {
    .uri = uri, .contexts = (const char *const *) contexts,
    .nr_contexts = m->nr_bitmaps, .max_connections = 1,
  };
  struct source source;
  int r = 0;

  for (size_t i = 0; i < m->nr_bitmaps && r == 0; ++i) {
    m->bitmap[i].name = names->name[i];
    contexts[i] = source_context (names->name[i]);
    if (contexts[i] == NULL)
      r = -1;
  }
  if (r == 0)
    r = source_open (&source, &options);
  if (r == 0) {
    r = survey_source (m, &source, contexts, quiet);
    source_close (&source);
  }
  for (size_t i = 0; i < m->nr_bitmaps; ++i)
    free (contexts[i]);
  return r;
}

static void
free_map (struct map *m)
{
  free (m->export);
  cells_free (&m->allocation);
  for (size_t i = 0; i < m->nr_bitmaps; ++i)
    cells_free (&m->bitmap[i].cells);
}

/* What goes where. */

static int
draw_to_file (const struct map *m, const struct new_file *file)
{
  const int fd = fcntl (file->fd, F_DUPFD_CLOEXEC, 0);
  FILE *f = fd == -1 ? NULL : fdopen (fd, "w");
  int r;

  if (f == NULL) {
    report_error ("%s: %m", file->target);
    if (fd != -1)
      close (fd);
    return -1;
  }
  r = picture_draw (f, m);
  if (r == 0 && (fflush (f) == EOF || ferror (f))) {
    report_error ("%s: %m", file->target);
    r = -1;
  }
  fclose (f);
  return r;
}

static int
draw (const struct settings *settings, const struct map *m,
      const char *target)
{
  struct new_file file;
  int r;

  if (strcmp (target, "-") == 0)
    return picture_draw (stdout, m);    /* main looks for errors */
  if (new_file_create (&file, target) == -1)
    return -1;
  r = draw_to_file (m, &file);
  return new_file_end (&file, r == 0, settings->force);
}

/* Bytes that are not UTF-8 become question marks: JSON has no others. */
static json_t *
json_of_text (const char *text)
{
  CLEANUP_FREE char *copy = strdup (text);
  unsigned char *p = (unsigned char *) copy;
  unsigned length;

  if (copy == NULL)
    return NULL;
  for (; *p != '\0'; p += length) {
    length = utf8_length (p);
    if (length == 0) {
      *p = '?';
      length = 1;
    }
  }
  return json_string (copy);
}

static json_t *
json_of_allocation (const struct map *m)
{
  const uint64_t *total = m->allocation.total;

  if (!m->has_allocation)
    return json_null ();
  return json_pack ("{s:I,s:I,s:I}",
                    "data-bytes", (json_int_t) total[CELLS_MARKED],
                    "zero-bytes", (json_int_t) total[CELLS_ZERO],
                    "hole-bytes", (json_int_t) total[CELLS_REST]);
}

static int
print_json (const struct map *m)
{
  json_t *bitmaps = json_array (), *result;
  char when[32];
  int r;

  strftime (when, sizeof when, "%Y-%m-%dT%H:%M:%SZ", &m->when);
  for (size_t i = 0; i < m->nr_bitmaps; ++i)
    json_array_append_new (bitmaps, json_pack (
      "{s:o,s:I}", "name", json_of_text (m->bitmap[i].name), "dirty-bytes",
      (json_int_t) m->bitmap[i].cells.total[CELLS_MARKED]));
  result = json_pack (
    "{s:o,s:s,s:I,s:o,s:o,s:I}", "export", json_of_text (m->export),
    "time", when, "disk-bytes", (json_int_t) m->size,
    "allocation", json_of_allocation (m), "bitmaps", bitmaps,
    "bitmaps-left-out", (json_int_t) m->nr_left_out);
  r = result == NULL ? -1
    : json_dumpf (result, stdout, JSON_INDENT (2) | JSON_ENSURE_ASCII);
  putchar ('\n');
  json_decref (result);
  if (r == -1)
    report_error ("the figures cannot be printed as JSON");
  return r;
}

int
command_map (const struct settings *settings, const char *uri,
             const char *target)
{
  const time_t now = time (NULL);
  struct map m = { 0 };
  struct source_names names;
  int r;

  if ((strcmp (target, "-") != 0 &&
       new_file_check (target, settings->force) == -1) ||
      source_list_bitmaps (uri, &names) == -1)
    return -1;
  gmtime_r (&now, &m.when);
  m.nr_bitmaps = min_u64 (names.nr, MAP_MAX_BITMAPS);
  m.nr_left_out = names.nr - m.nr_bitmaps;
  r = survey (&m, uri, &names, settings->quiet);
  if (r == 0)
    r = draw (settings, &m, target);
  if (r == 0 && settings->json)
    r = print_json (&m);
  free_map (&m);
  source_free_names (&names);
  return r;
}
