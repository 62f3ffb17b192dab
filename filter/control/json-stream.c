/* nbdkit-dirty-bitmap-filter
 * SPDX-License-Identifier: BSD-3-Clause
 * Copyright the nbdkit-dirty-bitmap-filter authors
 */

/* From the bytes that a client of the control socket sends to JSON values.
 *
 * How this works
 *
 * The stream is scanned byte by byte for where a value ends: strings are
 * recognised, and brackets counted.  The text of a value is then jansson's to
 * parse, which knows all the rest.  So the memory and the time that a client
 * can use are bounded here, before there is a tree of values: the bytes of the
 * text, the depth, and the number of commas and brackets.
 *
 * QEMU's form of JSON also has strings in single quotes, which people type in
 * shells, and the escape \' in either.  They are turned into JSON's strings on
 * the way.  Spaces outside of strings are kept as one.
 *
 * A client that has lost its place sends a control character or a byte that
 * UTF-8 does not have: wherever it comes, that is an error, and the stream
 * begins anew.
 */

#include <config.h>

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "common/vector.h"
#include "control/json-stream.h"

void
json_stream_init (struct json_stream *s)
{
  memset (s, 0, sizeof *s);
}

void
json_stream_free (struct json_stream *s)
{
  free (s->text);
}

/* Begin anew.  Memory that only a large value needs is given back. */
static void
reset (struct json_stream *s)
{
  s->nr = 0;
  s->depth = s->nr_values = 0;
  s->quote = 0;
  s->escaped = s->in_word = s->discards = false;
  if (s->max > 65536) {
    free (s->text);
    s->text = NULL;
    s->max = 0;
  }
}

static void
set_error (struct json_stream *s, const char *error)
{
  snprintf (s->error, sizeof s->error, "%s", error);
}

static enum json_event
bad (struct json_stream *s, const char *error)
{
  const bool told = s->discards;

  set_error (s, error);
  reset (s);
  return told ? JSON_MORE : JSON_BAD;
}

static enum json_event
bad_byte (struct json_stream *s, unsigned char c)
{
  char error[sizeof s->error], shown[2] = { c, '\0' };

  snprintf (error, sizeof error, "JSON parse error, stray '%s'",
            c < 0x80 ? shown : "\xef\xbf\xbd");
  return bad (s, error);
}

/* The value exceeds a bound: what is left of it is skipped. */
static enum json_event
exceeds (struct json_stream *s, const char *error)
{
  if (s->discards)
    return JSON_MORE;
  set_error (s, error);
  s->discards = true;
  s->nr = 0;
  return JSON_BAD;
}

static enum json_event
keep (struct json_stream *s, char c)
{
  if (s->discards)
    return JSON_MORE;
  if (s->nr == JSON_STREAM_MAX_BYTES)
    return exceeds (s, "JSON token size limit exceeded");
  if (vector_reserve (s->text, s->nr, s->max, 1) == -1)
    return exceeds (s, "Out of memory");
  s->text[s->nr++] = c;
  return JSON_MORE;
}

static enum json_event
keep_two (struct json_stream *s, char a, char b)
{
  return keep (s, a) == JSON_BAD ? JSON_BAD : keep (s, b);
}

/* The value ends here. */
static enum json_event
complete (struct json_stream *s)
{
  if (!s->discards)
    return JSON_VALUE;
  reset (s);
  return JSON_MORE;
}

/* The value may end with this byte, whose event it is. */
static enum json_event
may_complete (struct json_stream *s, enum json_event event)
{
  if (s->depth > 0)
    return event;
  if (event == JSON_MORE)
    return complete (s);
  reset (s);
  return event;
}

static enum json_event
take_in_string (struct json_stream *s, char c)
{
  if (s->escaped) {
    s->escaped = false;
    return c == '\'' ? keep (s, c) : keep_two (s, '\\', c);
  }
  if (c == '\\') {
    s->escaped = true;
    return JSON_MORE;
  }
  if (c == s->quote) {
    s->quote = 0;
    return may_complete (s, keep (s, '"'));
  }
  return c == '"' ? keep_two (s, '\\', c) : keep (s, c);
}

static enum json_event
count_value (struct json_stream *s)
{
  return s->nr_values++ < JSON_STREAM_MAX_VALUES ? JSON_MORE
    : exceeds (s, "JSON token count limit exceeded");
}

static enum json_event
open_bracket (struct json_stream *s, char c)
{
  if (s->depth < JSON_STREAM_MAX_DEPTH)
    s->closing[s->depth] = c == '{' ? '}' : ']';
  s->depth++;
  if (s->depth > JSON_STREAM_MAX_DEPTH)
    return exceeds (s, "JSON nesting depth limit exceeded");
  return count_value (s) == JSON_BAD ? JSON_BAD : keep (s, c);
}

static enum json_event
close_bracket (struct json_stream *s, char c)
{
  enum json_event event;

  if (s->depth == 0 || (s->depth <= JSON_STREAM_MAX_DEPTH &&
                        s->closing[s->depth - 1] != c))
    return bad (s, "JSON parse error, expecting value");
  event = keep (s, c);
  s->depth--;
  return may_complete (s, event);
}

static enum json_event
take_outside (struct json_stream *s, char c)
{
  switch (c) {
  case ' ': case '\t': case '\r': case '\n':
    if (s->depth == 0 || (s->nr > 0 && s->text[s->nr - 1] == ' '))
      return JSON_MORE;
    return keep (s, ' ');
  case '{': case '[':
    return open_bracket (s, c);
  case '}': case ']':
    return close_bracket (s, c);
  case ',': case ':':
    if (s->depth == 0)
      return bad (s, "JSON parse error, expecting value");
    return count_value (s) == JSON_BAD ? JSON_BAD : keep (s, c);
  case '"': case '\'':
    s->quote = c;
    return keep (s, '"');
  default:
    if ((unsigned char) c >= 0x7f)
      return bad_byte (s, c);
    s->in_word = s->depth == 0;
    return keep (s, c);
  }
}

static bool
is_in_word (char c)
{
  return strchr (" \t\r\n{}[],:\"'", c) == NULL;
}

size_t
json_stream_take (struct json_stream *s, const char *bytes, size_t nr,
                  enum json_event *event)
{
  for (size_t i = 0; i < nr; ++i) {
    const unsigned char c = bytes[i];
    const bool is_space = c == ' ' || c == '\t' || c == '\r' || c == '\n';

    if ((c < ' ' && (s->quote != 0 || !is_space)) || c >= 0xfe)
      *event = bad_byte (s, c);
    else if (s->quote != 0)
      *event = take_in_string (s, c);
    else if (s->in_word && !is_in_word (c)) {
      /* The byte belongs to what follows. */
      s->in_word = false;
      *event = complete (s);
      if (*event != JSON_MORE)
        return i;
      *event = take_outside (s, c);
    }
    else
      *event = take_outside (s, c);
    if (*event != JSON_MORE)
      return i + 1;
  }
  *event = JSON_MORE;
  return nr;
}

enum json_event
json_stream_end (struct json_stream *s)
{
  if (s->in_word && !s->discards)
    return JSON_VALUE;
  reset (s);
  return JSON_MORE;
}

json_t *
json_stream_value (struct json_stream *s)
{
  json_error_t error;
  json_t *value = json_loadb (s->text, s->nr, JSON_REJECT_DUPLICATES |
                              JSON_DECODE_ANY | JSON_ALLOW_NUL, &error);

  if (value == NULL) {
    switch (json_error_code (&error)) {
    case json_error_duplicate_key:
      set_error (s, "JSON parse error, duplicate key");
      break;
    case json_error_invalid_utf8:
      set_error (s, "JSON parse error, invalid UTF-8 sequence in string");
      break;
    case json_error_numeric_overflow:
      set_error (s, "JSON parse error, a number is too large");
      break;
    case json_error_out_of_memory:
      set_error (s, "Out of memory");
      break;
    default:
      set_error (s, "JSON parse error, expecting value");
    }
  }
  reset (s);
  return value;
}

const char *
json_stream_error (const struct json_stream *s)
{
  return s->error;
}
