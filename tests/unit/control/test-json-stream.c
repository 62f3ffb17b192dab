/* nbdkit-dirty-bitmap-filter
 * SPDX-License-Identifier: BSD-3-Clause
 * Copyright the nbdkit-dirty-bitmap-filter authors
 */

/* Finding JSON values in a stream: however the bytes are cut, the same values
 * and the same errors come out; and the bounds hold exactly.
 */

#include <config.h>

#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include <cmocka.h>

#include "control/json-stream.h"

/* All that comes out of the bytes, a line each: the value, or "!" and the
 * error.
 */
static void
put_event (struct json_stream *s, enum json_event event, FILE *f)
{
  json_t *value = event == JSON_VALUE ? json_stream_value (s) : NULL;

  if (event == JSON_MORE)
    return;
  if (value != NULL)
    json_dumpf (value, f, JSON_ENCODE_ANY | JSON_COMPACT | JSON_ENSURE_ASCII);
  else
    fprintf (f, "!%s", json_stream_error (s));
  putc ('\n', f);
  json_decref (value);
}

static char *
read_all (const char *bytes, size_t nr, size_t part)
{
  struct json_stream s;
  char *text = NULL;
  size_t size, at = 0;
  FILE *f = open_memstream (&text, &size);

  json_stream_init (&s);
  while (at < nr) {
    const size_t n = nr - at < part ? nr - at : part;
    enum json_event event;
    const size_t taken = json_stream_take (&s, bytes + at, n, &event);

    /* It takes all that it is given, unless it says something. */
    assert_true (taken <= n && (taken == n || event != JSON_MORE));
    at += taken;
    put_event (&s, event, f);
  }
  put_event (&s, json_stream_end (&s), f);
  json_stream_free (&s);
  fclose (f);
  return text;
}

static void
check_bytes (const char *bytes, size_t nr, const char *expected)
{
  for (size_t part = 1; part <= nr; part = part < 40 ? part + 1 : part * 2) {
    char *text = read_all (bytes, nr, part);

    assert_string_equal (text, expected);
    free (text);
  }
}

#define CHECK(bytes, expected)                          \
  check_bytes (bytes, sizeof bytes - 1, expected)

#define VALUE "!JSON parse error, expecting value\n"
#define STRAY(c) "!JSON parse error, stray '" c "'\n"

static void
test_values (void **state)
{
  (void) state;
  CHECK ("{}", "{}\n");
  CHECK ("{}{}[]\n\n[ ] ", "{}\n{}\n[]\n[]\n");
  CHECK ("{\"a\":[1,\"}]\\\"{\",null]} 1", "{\"a\":[1,\"}]\\\"{\",null]}\n1\n");
  CHECK ("1 2\"a\"true[]x", "1\n2\n\"a\"\ntrue\n[]\n" VALUE);
  CHECK ("{'a':'it\\'s \"b\"','c':\"\\'\"}",
         "{\"a\":\"it's \\\"b\\\"\",\"c\":\"'\"}\n");
  CHECK ("\"\\u00e9\xc3\xa9\\\\\"", "\"\\u00E9\\u00E9\\\\\"\n");
  CHECK ("[1 , \t\r\n 2]", "[1,2]\n");
  CHECK ("[1 2]", VALUE);
  CHECK ("", "");
  CHECK (" \n", "");
  CHECK ("{\"a\":", "");
  CHECK ("\"abc", "");
}

static void
test_errors (void **state)
{
  (void) state;
  CHECK ("}", VALUE);
  CHECK ("[}{}", VALUE "{}\n");
  CHECK (",:1", VALUE VALUE "1\n");
  CHECK ("{\"a\":1,\"a\":2}[]", "!JSON parse error, duplicate key\n[]\n");
  CHECK ("\"\xc3(\"[]",
         "!JSON parse error, invalid UTF-8 sequence in string\n[]\n");
  CHECK ("\x01", STRAY ("\x01"));
  CHECK ("\0{}", STRAY ("") "{}\n");
  CHECK ("{\"a\":\"\x1b{}", STRAY ("\x1b") "{}\n");
  CHECK ("[\"\\\xff{}", STRAY ("\xef\xbf\xbd") "{}\n");
  CHECK ("[\xc3{}", STRAY ("\xef\xbf\xbd") "{}\n");
  CHECK ("12\x7f{}", STRAY ("\x7f") "{}\n");
  CHECK ("99999999999999999999 []",
         "!JSON parse error, a number is too large\n[]\n");
}

/* A value of some length or depth, with another behind it. */
static void
check_made (const char *head, char fill, size_t nr, const char *tail,
            const char *error)
{
  const size_t total = strlen (head) + nr + strlen (tail) + 2;
  char *bytes = malloc (total + 1), *text, *end;

  sprintf (bytes, "%s", head);
  memset (bytes + strlen (head), fill, nr);
  sprintf (bytes + strlen (head) + nr, "%s[]", tail);
  text = read_all (bytes, total, 4099);
  if (error != NULL) {
    assert_int_equal (text[0], '!');
    assert_non_null (strstr (text, error));
  }
  else
    assert_int_not_equal (text[0], '!');
  /* One line for it, one for what is behind. */
  end = strchr (text, '\n');
  assert_string_equal (end, "\n[]\n");
  free (text);
  free (bytes);
}

static void
test_bounds (void **state)
{
  char close[128];
  const size_t max = JSON_STREAM_MAX_BYTES;

  (void) state;
  check_made ("\"", 'x', max - 2, "\"", NULL);
  check_made ("\"", 'x', max - 1, "\"", "size limit");
  check_made ("\"", 'x', max, "\"", "size limit");
  check_made ("\"", 'x', 3 * max, "\"", "size limit");
  check_made ("[", '1', max, "]", "size limit");
  check_made ("[\"", 'x', max - 4, "\"]", NULL);
  check_made ("[\"", 'x', max - 3, "\"]", "size limit");
  check_made ("[\"", 'x', max - 2, "\"]", "size limit");
  check_made ("", '7', max + 1, " ", "size limit");
  /* As JSON's string it has two bytes for each. */
  check_made ("'", '"', max / 2, "'", "size limit");

  memset (close, ']', sizeof close);
  close[JSON_STREAM_MAX_DEPTH] = '\0';
  check_made ("", '[', JSON_STREAM_MAX_DEPTH, close, NULL);
  close[JSON_STREAM_MAX_DEPTH] = ']';
  close[JSON_STREAM_MAX_DEPTH + 1] = '\0';
  check_made ("", '[', JSON_STREAM_MAX_DEPTH + 1, close, "depth limit");
  close[JSON_STREAM_MAX_DEPTH + 1] = ']';
  close[100] = '\0';
  check_made ("", '[', 100, close, "depth limit");
}

int
main (void)
{
  const struct CMUnitTest tests[] = {
    cmocka_unit_test (test_values),
    cmocka_unit_test (test_errors),
    cmocka_unit_test (test_bounds),
  };

  return cmocka_run_group_tests (tests, NULL, NULL);
}
