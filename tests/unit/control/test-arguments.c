/* nbdkit-dirty-bitmap-filter
 * SPDX-License-Identifier: BSD-3-Clause
 * Copyright the nbdkit-dirty-bitmap-filter authors
 */

/* The arguments of a command: each type, what is missing, what is not
 * expected, in QEMU's order and with its texts.
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

/* As block-dirty-bitmap-add has them, and two more. */
static const struct argument arguments[] = {
  { "node", ARGUMENT_STRING, false },
  { "name", ARGUMENT_STRING, false },
  { "granularity", ARGUMENT_UINT32, true },
  { "persistent", ARGUMENT_BOOL, true },
  { "list", ARGUMENT_STRINGS, true },
  { "any", ARGUMENT_ARRAY, true },
  { .name = NULL },
};

/* error is NULL if they are right. */
static void
check (const struct argument *list, const char *text, const char *where,
       const char *error)
{
  struct call call = { .class = NULL };
  json_t *object = json_loads (text, 0, NULL);
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
         "\"persistent\":false,\"list\":[],\"any\":[1,{}]}", "", NULL);
  check (arguments, "{\"name\":\"a\",\"node\":\"b\",\"granularity\":4294967295,"
         "\"persistent\":true,\"list\":[\"x\",\"\"]}", "", NULL);
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
  check (arguments, GIVEN "\"any\":\"\"}", "",
         "Invalid parameter type for 'any', expected: array");
  check (NULL, "{\"a\":1}", "actions[0].data.",
         "Parameter 'actions[0].data.a' is unexpected");
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
    cmocka_unit_test (test_node_names),
  };

  return cmocka_run_group_tests (tests, NULL, NULL);
}
