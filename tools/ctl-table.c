/* nbdkit-dirty-bitmap-filter
 * SPDX-License-Identifier: BSD-3-Clause
 * Copyright the nbdkit-dirty-bitmap-filter authors
 */

/* Printing results of query commands as tables: an array of objects is a line
 * for each object, with the names of the members on top; an object is a line
 * for each member.  Two results are turned into such arrays first: that of
 * query-block into one of bitmaps, and that of query-stats into one of
 * samples.
 */

#include <config.h>

#include <string.h>

#include "ctl.h"

/* Print, unless f is NULL, and return how many columns that takes: a character
 * of UTF-8 is taken for one.
 */
static size_t
put_text (FILE *f, const char *text)
{
  size_t columns = 0;

  for (const unsigned char *p = (const unsigned char *) text; *p; ++p) {
    /* C0 and C1, and the byte that begins the latter. */
    const bool is_c1 = *p == 0xc2 && p[1] >= 0x80 && p[1] < 0xa0;
    const unsigned code = is_c1 ? p[1] : *p;

    if (*p < ' ' || *p == 0x7f || is_c1) {
      if (f != NULL)
        fprintf (f, "\\x%02x", code);
      columns += 4;
      p += is_c1;
      continue;
    }
    if (f != NULL)
      putc (*p, f);
    columns += (*p & 0xc0) != 0x80;
  }
  return columns;
}

void
print_text (FILE *f, const char *text)
{
  put_text (f, text);
}

/* A value in a table. */
static size_t
put_value (FILE *f, const json_t *value)
{
  char text[64];

  switch (value == NULL ? JSON_NULL : json_typeof (value)) {
  case JSON_STRING:
    return put_text (f, json_string_value (value));
  case JSON_INTEGER:
    snprintf (text, sizeof text, "%" JSON_INTEGER_FORMAT,
              json_integer_value (value));
    break;
  case JSON_REAL:
    snprintf (text, sizeof text, "%.12g", json_real_value (value));
    break;
  case JSON_TRUE:
    strcpy (text, "yes");
    break;
  case JSON_FALSE:
    strcpy (text, "no");
    break;
  default:
    strcpy (text, "-");
  }
  return put_text (f, text);
}

#define MAX_COLUMNS 8

struct table {
  const char *name[MAX_COLUMNS];
  size_t width[MAX_COLUMNS];
  size_t nr;
};

static void
widen (size_t *width, size_t to)
{
  if (to > *width)
    *width = to;
}

/* The column of this name, which is added if there is none and there is room.
 */
static void
measure (struct table *t, const char *name, const json_t *value)
{
  size_t i = 0;

  while (i < t->nr && strcmp (t->name[i], name) != 0)
    ++i;
  if (i == MAX_COLUMNS)
    return;
  if (i == t->nr) {
    t->name[t->nr++] = name;
    t->width[i] = strlen (name);
  }
  widen (&t->width[i], put_value (NULL, value));
}

static void
put_spaces (size_t nr)
{
  while (nr-- > 0)
    putchar (' ');
}

static void
print_row (const struct table *t, const json_t *row)
{
  size_t gap = 0;

  for (size_t i = 0; i < t->nr; ++i) {
    const json_t *value = row == NULL ? NULL
      : json_object_get (row, t->name[i]);

    put_spaces (gap);
    gap = 2 + t->width[i] -
      (row == NULL ? put_text (stdout, t->name[i]) : put_value (stdout, value));
  }
  putchar ('\n');
}

/* Are all elements objects, with nothing nested in them? */
static bool
is_flat (const json_t *rows)
{
  const json_t *row;
  const char *name;
  json_t *value;
  size_t i;

  json_array_foreach (rows, i, row) {
    if (!json_is_object (row))
      return false;
    json_object_foreach ((json_t *) row, name, value)
      if (json_is_object (value) || json_is_array (value))
        return false;
  }
  return true;
}

static bool
print_rows (const json_t *rows)
{
  struct table t = { .nr = 0 };
  const json_t *row;
  const char *name;
  json_t *value;
  size_t i;

  if (!is_flat (rows))
    return false;
  json_array_foreach (rows, i, row)
    json_object_foreach ((json_t *) row, name, value)
      measure (&t, name, value);
  if (t.nr == 0)
    return true;                /* nothing to be listed */
  print_row (&t, NULL);
  json_array_foreach (rows, i, row)
    print_row (&t, row);
  return true;
}

static bool
print_members (const json_t *object)
{
  const char *name;
  json_t *value;

  json_object_foreach ((json_t *) object, name, value)
    if (json_is_object (value) || json_is_array (value))
      return false;
  json_object_foreach ((json_t *) object, name, value) {
    print_text (stdout, name);
    fputs (": ", stdout);
    put_value (stdout, value);
    putchar ('\n');
  }
  return true;
}

/* The bitmaps of a node, as rows. */
static bool
print_bitmaps (const json_t *node)
{
  const json_t *bitmaps = json_object_get (node, "dirty-bitmaps");
  const json_t *image = json_object_get (node, "image");

  fputs ("node ", stdout);
  put_value (stdout, json_object_get (node, "node-name"));
  fputs (", ", stdout);
  put_value (stdout, json_object_get (image, "virtual-size"));
  fputs (" bytes, ", stdout);
  fputs (json_is_true (json_object_get (node, "ro")) ? "read-only"
         : "read-write", stdout);
  fputs (", ", stdout);
  put_value (stdout, json_object_get (image, "filename"));
  putchar ('\n');
  if (bitmaps == NULL) {
    puts ("no bitmaps");
    return true;
  }
  return print_rows (bitmaps);
}

static bool
print_nodes (const json_t *result, bool are_devices)
{
  const json_t *element;
  size_t i;

  json_array_foreach (result, i, element) {
    if (are_devices)
      element = json_object_get (element, "inserted");
    if (!print_bitmaps (element))
      return false;
  }
  return true;
}

/* A sample with its labels: name{label=value,...} */
static void
print_sample (const char *name, const json_t *sample)
{
  const char *label;
  json_t *text;
  char next = '{';

  print_text (stdout, name);
  json_object_foreach ((json_t *) sample, label, text) {
    if (strcmp (label, "value") == 0)
      continue;
    putchar (next);
    print_text (stdout, label);
    putchar ('=');
    put_value (stdout, text);
    next = ',';
  }
  fputs ("} ", stdout);
  put_value (stdout, json_object_get (sample, "value"));
  putchar ('\n');
}

static bool
print_stats (const json_t *result)
{
  const json_t *sample;
  const char *name;
  json_t *value;
  size_t i;

  json_object_foreach ((json_t *) result, name, value) {
    if (json_is_array (value)) {
      json_array_foreach (value, i, sample)
        print_sample (name, sample);
      continue;
    }
    print_text (stdout, name);
    putchar (' ');
    put_value (stdout, value);
    putchar ('\n');
  }
  return true;
}

bool
print_table (const char *command, const json_t *result)
{
  if (strncmp (command, "query-", 6) != 0)
    return false;
  if (strcmp (command, "query-block") == 0)
    return print_nodes (result, true);
  if (strcmp (command, "query-named-block-nodes") == 0)
    return print_nodes (result, false);
  if (strcmp (command, "query-stats") == 0)
    return print_stats (result);
  if (strcmp (command, "query-version") == 0)
    result = json_object_get (result, "package");
  if (json_is_array (result))
    return print_rows (result);
  if (json_is_string (result)) {
    put_value (stdout, result);
    putchar ('\n');
    return true;
  }
  return json_is_object (result) && print_members (result);
}
