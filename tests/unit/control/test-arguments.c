/* nbdkit-dirty-bitmap-filter
 * SPDX-License-Identifier: BSD-3-Clause
 * Copyright the nbdkit-dirty-bitmap-filter authors
 */

/* The arguments of a command: each type, what is missing, what is not
 * expected, objects inside, in QEMU's order and with its texts.
 */

#include <config.h>

#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#include <cmocka.h>

#include "control/internal.h"

/* A string that is not "bad". */
static int
check_word (struct call *call, const json_t *value, const char *where)
{
  if (json_is_string (value) && strcmp (json_string_value (value), "bad") != 0)
    return 0;
  call_fail (call, GENERIC_ERROR, "no word: %s", where);
  return -1;
}

static const struct argument inside[] = {
  { "word", ARGUMENT_STRING, .check = check_word },
  { "flag", ARGUMENT_BOOL, .is_optional = true },
  { .name = NULL },
};

/* As block-dirty-bitmap-add has them, and some more. */
static const struct argument arguments[] = {
  { "node", .type = ARGUMENT_STRING },
  { "name", .type = ARGUMENT_STRING },
  { "granularity", ARGUMENT_UINT32, .is_optional = true },
  { "persistent", ARGUMENT_BOOL, .is_optional = true },
  { "list", ARGUMENT_STRINGS, .is_optional = true },
  { "words", ARGUMENT_ARRAY, .is_optional = true, .check = check_word },
  { "object", ARGUMENT_OBJECT, .is_optional = true, .members = inside },
  { "empty", ARGUMENT_OBJECT, .is_optional = true },
  { .name = NULL },
};

/* error is NULL if they are right. */
static void
check (const struct argument *list, const char *text, const char *where,
       const char *error)
{
  struct call call = { .class = NULL };
  json_t *object = json_loads (text, JSON_ALLOW_NUL, NULL);
  const int r = arguments_check (&call, list, object, where);

  assert_non_null (object);
  if (error == NULL)
    assert_int_equal (r, 0);
  else {
    assert_int_equal (r, -1);
    assert_string_equal (call.class, "GenericError");
    assert_string_equal (call.error, error);
  }
  free (call.error);
  json_decref (object);
}

static void
test_right (void **state)
{
  (void) state;
  check (NULL, "{}", "", NULL);
  check (arguments, "{\"node\":\"\",\"name\":\"\\u00e9\"}", "", NULL);
  check (arguments, "{\"name\":\"a\",\"node\":\"b\",\"granularity\":0,"
         "\"persistent\":false,\"list\":[],\"words\":[],\"empty\":{}}", "",
         NULL);
  check (arguments, "{\"name\":\"a\",\"node\":\"b\",\"granularity\":4294967295,"
         "\"persistent\":true,\"list\":[\"x\",\"\"]}", "", NULL);
  check (arguments, "{\"name\":\"a\",\"node\":\"b\",\"words\":[\"c\",\"d\"],"
         "\"object\":{\"flag\":true,\"word\":\"e\"}}", "", NULL);
}

/* These texts are qemu-storage-daemon's. */
static void
test_wrong (void **state)
{
  (void) state;
  check (NULL, "{\"a\":1}", "", "Parameter 'a' is unexpected");
  check (arguments, "{\"node\":\"b\"}", "", "Parameter 'name' is missing");
  check (arguments, "{\"x\":1}", "", "Parameter 'node' is missing");
  check (arguments, "{\"node\":1,\"x\":1}", "",
         "Invalid parameter type for 'node', expected: string");
  check (arguments, "{\"name\":null,\"node\":\"a\"}", "",
         "Invalid parameter type for 'name', expected: string");

#define GIVEN "{\"node\":\"a\",\"name\":\"b\","
  check (arguments, GIVEN "\"x\":1}", "", "Parameter 'x' is unexpected");
  check (arguments, GIVEN "\"granularity\":\"5\",\"x\":1}", "",
         "Parameter 'granularity' expects uint64");
  check (arguments, GIVEN "\"granularity\":5.5}", "",
         "Parameter 'granularity' expects uint64");
  check (arguments, GIVEN "\"granularity\":-1}", "",
         "Parameter 'granularity' expects uint32_t");
  check (arguments, GIVEN "\"granularity\":4294967296}", "",
         "Parameter 'granularity' expects uint32_t");
  check (arguments, GIVEN "\"persistent\":1}", "",
         "Invalid parameter type for 'persistent', expected: boolean");
  check (arguments, GIVEN "\"list\":{}}", "",
         "Invalid parameter type for 'list', expected: array");
  check (arguments, GIVEN "\"list\":[\"a\",1]}", "",
         "Invalid parameter type for 'list[1]', expected: string");
  check (arguments, GIVEN "\"words\":\"\"}", "",
         "Invalid parameter type for 'words', expected: array");
  check (arguments, "{\"node\":\"a\\u0000\",\"name\":\"b\"}", "",
         "Parameter 'node' must not contain the character NUL");
  check (arguments, GIVEN "\"list\":[\"\\u0000\"]}", "",
         "Parameter 'list[0]' must not contain the character NUL");
  check (NULL, "{\"a\":1}", "actions[0].data.",
         "Parameter 'actions[0].data.a' is unexpected");
}

/* Members of objects are checked before what follows the object, and before
 * what is unexpected beside it.
 */
static void
test_inside (void **state)
{
  (void) state;
  check (arguments, GIVEN "\"words\":[\"a\",\"bad\"],\"x\":1}", "",
         "no word: words[1]");
  check (arguments, GIVEN "\"words\":[1]}", "actions[0].data.",
         "no word: actions[0].data.words[0]");
  check (arguments, GIVEN "\"object\":[]}", "",
         "Invalid parameter type for 'object', expected: object");
  check (arguments, GIVEN "\"object\":{},\"x\":1}", "",
         "Parameter 'object.word' is missing");
  check (arguments, GIVEN "\"object\":{\"word\":1}}", "",
         "Invalid parameter type for 'object.word', expected: string");
  check (arguments, GIVEN "\"object\":{\"word\":\"bad\"}}", "a[7].",
         "no word: a[7].object.word");
  check (arguments, GIVEN "\"x\":1,\"object\":{\"word\":\"\",\"y\":1}}", "",
         "Parameter 'object.y' is unexpected");
  check (arguments, GIVEN "\"empty\":{\"y\":1},\"object\":{\"word\":\"\"}}",
         "", "Parameter 'empty.y' is unexpected");
}

static void
test_node_names (void **state)
{
  (void) state;
  assert_true (control_is_node_name ("disk"));
  assert_true (control_is_node_name ("a-b.c_9"));
  assert_true (control_is_node_name ("abcdefghijklmnopqrstuvwxyzabcde"));
  assert_false (control_is_node_name ("abcdefghijklmnopqrstuvwxyzabcdef"));
  assert_false (control_is_node_name (""));
  assert_false (control_is_node_name ("9a"));
  assert_false (control_is_node_name ("#block123"));
  assert_false (control_is_node_name ("a b"));
  assert_false (control_is_node_name ("\xc3\xa9"));
}

int
main (void)
{
  const struct CMUnitTest tests[] = {
    cmocka_unit_test (test_right),
    cmocka_unit_test (test_wrong),
    cmocka_unit_test (test_inside),
    cmocka_unit_test (test_node_names),
  };

  return cmocka_run_group_tests (tests, NULL, NULL);
}
