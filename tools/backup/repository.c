/* nbdkit-dirty-bitmap-filter
 * SPDX-License-Identifier: BSD-3-Clause
 * Copyright the nbdkit-dirty-bitmap-filter authors
 */

/* A repository as files.
 *
 * repository.json is the truth: a point is there when the list has it.  An
 * image is durable under its name before the list names it, and the list is
 * replaced as a whole, so a kill leaves the old list or the new one.  Files
 * that no list names are left over from a run that was interrupted, and the
 * next run that changes the repository removes them.
 *
 * The folder itself is locked, so no file is left behind by that.
 */

#include <config.h>

#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <inttypes.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/file.h>
#include <sys/random.h>
#include <sys/stat.h>
#include <time.h>
#include <unistd.h>

#include <jansson.h>

#include "backup/backup.h"
#include "backup/repository.h"
#include "common/cleanup.h"
#include "common/report.h"

#define LIST "repository.json"
#define NEW_LIST LIST ".new"
#define NEW_ENDING ".new"
#define LIST_VERSION 1
#define MAX_NUMBER 999999
#define BITMAP_CHARS 1024       /* QEMU's limit */

void
repository_name_point (char file[POINT_FILE_CHARS], unsigned number)
{
  snprintf (file, POINT_FILE_CHARS, "%04u.qcow2", number % (MAX_NUMBER + 1));
}

/* The number of a file that has the name of a point, or 0. */
static unsigned
number_of_name (const char *name)
{
  const unsigned number = strtoul (name, NULL, 10);
  char expected[POINT_FILE_CHARS];

  if (number == 0 || number > MAX_NUMBER)
    return 0;
  repository_name_point (expected, number);
  return strcmp (name, expected) == 0 ? number : 0;
}

static int
damaged (const struct repository *r, const char *why)
{
  report_error ("%s/" LIST ": %s", r->path, why);
  return -1;
}

static bool
has_control_characters (const char *s)
{
  for (; *s != '\0'; ++s)
    if ((unsigned char) *s < ' ' || *s == 0x7f)
      return true;
  return false;
}

/* A string of a limited length, without control characters.  False if it is
 * none.
 */
static bool
get_text (const json_t *object, const char *key, char *text, size_t size)
{
  const json_t *value = json_object_get (object, key);
  const char *s = json_string_value (value);

  if (s == NULL || json_string_length (value) != strlen (s) ||
      strlen (s) >= size || has_control_characters (s))
    return false;
  strcpy (text, s);
  return true;
}

static bool
get_number (const json_t *object, const char *key, uint64_t max, uint64_t *n)
{
  const json_t *value = json_object_get (object, key);

  if (!json_is_integer (value) || json_integer_value (value) < 0 ||
      (uint64_t) json_integer_value (value) > max)
    return false;
  *n = json_integer_value (value);
  return true;
}

static bool
get_checksum (const json_t *object, struct checksum *sum)
{
  return get_number (object, "bytes", INT64_MAX, &sum->bytes) &&
    get_text (object, "xxh128", sum->text, sizeof sum->text) &&
    strspn (sum->text, "0123456789abcdef") == CHECKSUM_CHARS;
}

/* A time as repository_time_now has it. */
static bool
get_time (const json_t *object, char time[POINT_TIME_CHARS])
{
  static const char form[] = "0000-00-00T00:00:00Z";

  if (!get_text (object, "time", time, POINT_TIME_CHARS) ||
      strlen (time) != strlen (form))
    return false;
  for (size_t i = 0; form[i] != '\0'; ++i)
    if (form[i] == '0' ? time[i] < '0' || time[i] > '9' : time[i] != form[i])
      return false;
  return true;
}

static bool
get_point (const json_t *object, struct point *p)
{
  char type[16];
  uint64_t number;

  if (!get_number (object, "number", MAX_NUMBER, &number) || number == 0 ||
      !get_text (object, "file", p->file, sizeof p->file) ||
      number_of_name (p->file) != number ||
      !get_text (object, "type", type, sizeof type) ||
      !get_time (object, p->time) ||
      !get_number (object, "disk-bytes", INT64_MAX, &p->disk_bytes) ||
      !get_number (object, "copied-bytes", INT64_MAX, &p->copied_bytes) ||
      !get_checksum (object, &p->sum))
    return false;
  p->number = number;
  p->is_full = strcmp (type, "full") == 0;
  return p->is_full || strcmp (type, "increment") == 0;
}

static bool
is_listed (const struct repository *r, unsigned number)
{
  for (size_t i = 0; i < r->nr_points; ++i)
    if (r->points[i].number == number)
      return true;
  return false;
}

static int
parse_points (struct repository *r, const json_t *points)
{
  const size_t nr = json_array_size (points);

  r->points = calloc (nr + 1, sizeof *r->points);
  if (r->points == NULL) {
    report_error ("calloc: %m");
    return -1;
  }
  for (size_t i = 0; i < nr; ++i) {
    struct point *p = &r->points[i];

    if (!get_point (json_array_get (points, i), p) ||
        (i > 0 && p->number <= r->points[i - 1].number))
      return damaged (r, "a point in the list is damaged");
    if (i == 0 ? !p->is_full
        : !p->is_full && p->disk_bytes != r->points[i - 1].disk_bytes)
      return damaged (r, "an increment in the list has no base");
  }
  r->nr_points = nr;
  return 0;
}

bool
repository_takes_name (const char *bitmap)
{
  json_t *text = json_string (bitmap); /* NULL if it is not UTF-8 */
  const bool good = text != NULL && bitmap[0] != '\0' &&
    strlen (bitmap) < BITMAP_CHARS && !has_control_characters (bitmap);

  json_decref (text);
  return good;
}

static int
parse_merging (struct repository *r, const json_t *merging)
{
  uint64_t number;

  if (!get_number (merging, "number", MAX_NUMBER, &number) ||
      !is_listed (r, number) || !get_checksum (merging, &r->merged))
    return damaged (r, "the list is damaged");
  r->merging = number;
  return 0;
}

static int
parse_list (struct repository *r, const json_t *list)
{
  const json_t *bitmap = json_object_get (list, "bitmap");
  const json_t *merging = json_object_get (list, "merging");
  uint64_t version;

  if (!get_number (list, PROGRAM, UINT32_MAX, &version))
    return damaged (r, "it is not the list of a repository");
  if (version != LIST_VERSION)
    return damaged (r, "it was written by a newer version of " PROGRAM);
  if (!get_text (list, "id", r->id, sizeof r->id) ||
      strspn (r->id, "0123456789abcdef") != REPOSITORY_ID_CHARS ||
      !json_is_array (json_object_get (list, "points")) ||
      (bitmap != NULL && (!json_is_string (bitmap) ||
                          !repository_takes_name (json_string_value (bitmap)))))
    return damaged (r, "the list is damaged");
  if (bitmap != NULL &&
      repository_set_bitmap (r, json_string_value (bitmap)) == -1)
    return -1;
  if (parse_points (r, json_object_get (list, "points")) == -1)
    return -1;
  return merging == NULL ? 0 : parse_merging (r, merging);
}

/* 1 if there is no list. */
static int
load_list (struct repository *r)
{
  const int fd = openat (r->fd, LIST, O_RDONLY | O_CLOEXEC | O_NOCTTY |
                         O_NONBLOCK);
  FILE *file;
  json_error_t error;
  json_t *list;
  int result;

  if (fd == -1 && errno == ENOENT)
    return 1;
  file = fd != -1 ? fdopen (fd, "r") : NULL;
  if (file == NULL) {
    report_error ("%s/" LIST ": %m", r->path);
    if (fd != -1)
      close (fd);
    return -1;
  }
  /* json_loadfd would read byte by byte. */
  list = json_loadf (file, JSON_REJECT_DUPLICATES, &error);
  fclose (file);
  if (list == NULL) {
    report_error ("%s/" LIST ": line %d: %s", r->path, error.line, error.text);
    return -1;
  }
  result = parse_list (r, list);
  json_decref (list);
  return result;
}

/* Is this what an interrupted run may have left? */
static bool
is_left_over (const struct repository *r, const char *name)
{
  const size_t length = strlen (name), ending = strlen (NEW_ENDING);
  char without[64];
  unsigned number;

  if (strcmp (name, NEW_LIST) == 0)
    return true;
  number = number_of_name (name);
  if (number != 0)
    return !is_listed (r, number);
  if (length <= ending || length >= sizeof without ||
      strcmp (name + length - ending, NEW_ENDING) != 0)
    return false;
  memcpy (without, name, length - ending);
  without[length - ending] = '\0';
  return number_of_name (without) != 0;
}

/* Remove what is left over, or see whether there is anything else. */
static int
look_around (const struct repository *r, bool remove, bool *is_empty)
{
  const int fd = openat (r->fd, ".", O_RDONLY | O_DIRECTORY | O_CLOEXEC);
  DIR *dir = fd == -1 ? NULL : fdopendir (fd);
  struct dirent *e;

  if (dir == NULL) {
    report_error ("%s: %m", r->path);
    if (fd != -1)
      close (fd);
    return -1;
  }
  *is_empty = true;
  while ((e = readdir (dir)) != NULL) {
    if (strcmp (e->d_name, ".") == 0 || strcmp (e->d_name, "..") == 0)
      continue;
    if (!is_left_over (r, e->d_name))
      *is_empty = false;
    else if (remove)
      unlinkat (r->fd, e->d_name, 0);
  }
  closedir (dir);
  return 0;
}

void
repository_remove_unlisted (const struct repository *r)
{
  struct repository listed = { .path = r->path, .fd = r->fd };
  struct report_hold hold;
  bool is_empty;

  report_hold_begin (&hold);
  if (load_list (&listed) != -1)
    look_around (&listed, true, &is_empty);
  report_hold_end (&hold);
  listed.fd = -1;
  repository_close (&listed);
}

static int
new_id (struct repository *r)
{
  uint32_t random;

  if (getrandom (&random, sizeof random, 0) != sizeof random) {
    report_error ("getrandom: %m");
    return -1;
  }
  snprintf (r->id, sizeof r->id, "%08" PRIx32, random);
  return 0;
}

static int
load_or_create (struct repository *r, enum repository_mode mode)
{
  const int found = load_list (r);
  bool is_empty;

  if (found == -1)
    return -1;
  if (found == 1) {
    if (mode != REPOSITORY_CREATE) {
      report_error ("%s: is not a repository: it has no " LIST, r->path);
      return -1;
    }
    if (look_around (r, false, &is_empty) == -1)
      return -1;
    if (!is_empty) {
      report_error ("%s: is neither a repository nor an empty folder",
                    r->path);
      return -1;
    }
    if (new_id (r) == -1)
      return -1;
  }
  return mode < REPOSITORY_CHANGE ? 0 : look_around (r, true, &is_empty);
}

static int
lock (const struct repository *r, enum repository_mode mode)
{
  const int how = mode == REPOSITORY_READ ? LOCK_SH : LOCK_EX;

  if (mode == REPOSITORY_LIST || flock (r->fd, how | LOCK_NB) == 0)
    return 0;
  if (errno == EWOULDBLOCK)
    report_error ("%s: the repository is in use by another " PROGRAM, r->path);
  else
    report_error ("%s: cannot lock: %m", r->path);
  return -1;
}

int
repository_open (struct repository *r, const char *path,
                 enum repository_mode mode)
{
  memset (r, 0, sizeof *r);
  r->path = path;
  r->fd = -1;
  if (mode == REPOSITORY_CREATE) {
    r->is_new = mkdir (path, 0777) == 0;
    if (!r->is_new && errno != EEXIST) {
      report_error ("%s: %m", path);
      return -1;
    }
  }
  r->fd = open (path, O_RDONLY | O_DIRECTORY | O_CLOEXEC);
  if (r->fd == -1) {
    report_error ("%s: %m", path);
    return -1;
  }
  if (lock (r, mode) == 0 && load_or_create (r, mode) == 0)
    return 0;
  repository_close (r);
  return -1;
}

void
repository_close (struct repository *r)
{
  /* The folder has no list: nothing of a backup that failed is to stay. */
  if (r->is_new)
    rmdir (r->path);
  if (r->fd != -1)
    close (r->fd);
  r->is_new = false;
  r->fd = -1;
  free (r->bitmap);
  free (r->points);
  r->bitmap = NULL;
  r->points = NULL;
}

static json_t *
checksum_to_json (const struct checksum *sum, json_t *object)
{
  if (object != NULL &&
      (json_object_set_new (object, "bytes",
                            json_integer (sum->bytes)) == -1 ||
       json_object_set_new (object, "xxh128", json_string (sum->text)) == -1)) {
    json_decref (object);
    object = NULL;
  }
  return object;
}

json_t *
repository_point_to_json (const struct point *p)
{
  return checksum_to_json (&p->sum, json_pack (
    "{s:i,s:s,s:s,s:s,s:I,s:I}", "number", (int) p->number, "file", p->file,
    "type", p->is_full ? "full" : "increment", "time", p->time,
    "disk-bytes", (json_int_t) p->disk_bytes,
    "copied-bytes", (json_int_t) p->copied_bytes));
}

static json_t *
list_to_json (const struct repository *r)
{
  json_t *points = json_array ();
  json_t *list = json_pack ("{s:i,s:s,s:s*,s:o}", PROGRAM, LIST_VERSION,
                            "id", r->id, "bitmap", r->bitmap,
                            "points", points);

  for (size_t i = 0; list != NULL && i < r->nr_points; ++i)
    if (json_array_append_new (
          points, repository_point_to_json (&r->points[i])) == -1) {
      json_decref (list);
      list = NULL;
    }
  if (list != NULL && r->merging != 0 &&
      json_object_set_new (list, "merging", checksum_to_json (
                             &r->merged, json_pack ("{s:i}", "number",
                                                    (int) r->merging))) == -1) {
    json_decref (list);
    list = NULL;
  }
  return list;
}

static int
sync_folder (const struct repository *r)
{
  if (fsync (r->fd) == 0)
    return 0;
  report_error ("%s: fsync: %m", r->path);
  return -1;
}

static int
write_list (const struct repository *r, json_t *list)
{
  const int fd = openat (r->fd, NEW_LIST, O_WRONLY | O_CREAT | O_TRUNC |
                         O_CLOEXEC, 0666);
  FILE *f = fd == -1 ? NULL : fdopen (fd, "w");
  bool good = f != NULL &&
    json_dumpf (list, f, JSON_INDENT (2) | JSON_ENSURE_ASCII) == 0 &&
    putc ('\n', f) != EOF && fflush (f) == 0 && fsync (fd) == 0;
  const int err = errno;

  if (f != NULL)
    good = fclose (f) == 0 && good;
  else if (fd != -1)
    close (fd);
  if (good && renameat (r->fd, NEW_LIST, r->fd, LIST) == 0)
    return 0;
  if (!good)
    errno = err;
  report_error ("%s/" LIST ": cannot write: %m", r->path);
  unlinkat (r->fd, NEW_LIST, 0);
  return -1;
}

/* The folder is in its own folder, durably. */
static int
sync_name (const struct repository *r)
{
  CLEANUP_CLOSE int fd = openat (r->fd, "..",
                                 O_RDONLY | O_DIRECTORY | O_CLOEXEC);

  if (fd != -1 && fsync (fd) == 0)
    return 0;
  report_error ("%s/..: fsync: %m", r->path);
  return -1;
}

int
repository_save (struct repository *r)
{
  json_t *list = list_to_json (r);
  int result;

  if (list == NULL) {
    report_error ("%s: cannot make the list of points", r->path);
    return -1;
  }
  if (r->is_new && sync_name (r) == -1) {
    json_decref (list);
    return -1;
  }
  result = write_list (r, list);
  json_decref (list);
  if (result == -1)
    return -1;
  r->is_new = false;
  return sync_folder (r);
}

int
repository_set_bitmap (struct repository *r, const char *name)
{
  char *copy = name != NULL ? strdup (name) : NULL;

  if (name != NULL && copy == NULL) {
    report_error ("strdup: %m");
    return -1;
  }
  free (r->bitmap);
  r->bitmap = copy;
  return 0;
}

struct point *
repository_add (struct repository *r)
{
  const unsigned number =
    r->nr_points == 0 ? 1 : r->points[r->nr_points - 1].number + 1;
  struct point *larger, *p;

  if (number > MAX_NUMBER) {
    report_error ("%s: there can be no more points", r->path);
    return NULL;
  }
  larger = reallocarray (r->points, r->nr_points + 1, sizeof *larger);
  if (larger == NULL) {
    report_error ("realloc: %m");
    return NULL;
  }
  r->points = larger;
  p = &larger[r->nr_points++];
  memset (p, 0, sizeof *p);
  p->number = number;
  repository_name_point (p->file, number);
  return p;
}

void
repository_drop (struct repository *r, size_t nr)
{
  r->nr_points -= nr;
  memmove (r->points, r->points + nr, r->nr_points * sizeof *r->points);
}

int
repository_find (const struct repository *r, unsigned number, size_t *i)
{
  if (r->nr_points == 0) {
    report_error ("%s: the repository has no points", r->path);
    return -1;
  }
  if (number == 0) {
    *i = r->nr_points - 1;
    return 0;
  }
  for (*i = 0; *i < r->nr_points; ++*i)
    if (r->points[*i].number == number)
      return 0;
  report_error ("%s: the repository has no point %u", r->path, number);
  return -1;
}

static void
name_of_new (char name[POINT_FILE_CHARS + sizeof NEW_ENDING],
             const struct point *p)
{
  sprintf (name, "%s" NEW_ENDING, p->file);
}

int
repository_new_file (const struct repository *r, const struct point *p)
{
  char name[POINT_FILE_CHARS + sizeof NEW_ENDING];
  int fd;

  name_of_new (name, p);
  fd = openat (r->fd, name, O_RDWR | O_CREAT | O_TRUNC | O_CLOEXEC, 0666);
  if (fd == -1)
    report_error ("%s/%s: %m", r->path, name);
  return fd;
}

int
repository_name_file (const struct repository *r, const struct point *p)
{
  char name[POINT_FILE_CHARS + sizeof NEW_ENDING];

  name_of_new (name, p);
  if (renameat (r->fd, name, r->fd, p->file) == -1) {
    report_error ("%s/%s: %m", r->path, p->file);
    return -1;
  }
  return sync_folder (r);
}

void
repository_remove_new (const struct repository *r, const struct point *p)
{
  char name[POINT_FILE_CHARS + sizeof NEW_ENDING];

  name_of_new (name, p);
  unlinkat (r->fd, name, 0);
}

void
repository_time_now (char text[POINT_TIME_CHARS])
{
  const time_t now = time (NULL);
  struct tm tm;

  gmtime_r (&now, &tm);
  strftime (text, POINT_TIME_CHARS, "%Y-%m-%dT%H:%M:%SZ", &tm);
}
