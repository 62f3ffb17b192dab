/* nbdkit-dirty-bitmap-filter
 * SPDX-License-Identifier: BSD-3-Clause
 * Copyright the nbdkit-dirty-bitmap-filter authors
 */

/* Checking the arguments of a command, with the order of the checks and the
 * texts of QEMU: what is missing or of the wrong type first, in the order of
 * the list, and then what is unexpected.  Objects inside are checked in the
 * same way, where they come in that order.
 */

#include <config.h>

#include <stdio.h>
#include <string.h>

#include "common/cleanup.h"
#include "control/internal.h"

static const char *const expected[] = {
  [ARGUMENT_STRING] = "string",
  [ARGUMENT_BOOL] = "boolean",
  [ARGUMENT_STRINGS] = "array",
  [ARGUMENT_ARRAY] = "array",
  [ARGUMENT_OBJECT] = "object",
};

static bool
has_type (const json_t *value, enum argument_type type)
{
  switch (type) {
  case ARGUMENT_STRING:
    return json_is_string (value);
  case ARGUMENT_BOOL:
    return json_is_boolean (value);
  case ARGUMENT_STRINGS:
  case ARGUMENT_ARRAY:
    return json_is_array (value);
  case ARGUMENT_OBJECT:
    return json_is_object (value);
  case ARGUMENT_UINT32:
    break;
  }
  return false;
}

/* In the second text QEMU does not say where. */
static int
check_number (struct call *call, const char *where, const char *name,
              const json_t *value)
{
  const json_int_t n = json_integer_value (value);

  if (!json_is_integer (value)) {
    call_fail (call, GENERIC_ERROR, "Parameter '%s%s' expects uint64",
               where, name);
    return -1;
  }
  if (n < 0 || n > UINT32_MAX) {
    call_fail (call, GENERIC_ERROR, "Parameter '%s' expects uint32_t", name);
    return -1;
  }
  return 0;
}

static int
fail_type (struct call *call, const char *where, enum argument_type type)
{
  call_fail (call, GENERIC_ERROR, "Invalid parameter type for '%s', "
             "expected: %s", where, expected[type]);
  return -1;
}

/* Names are C strings from here on. */
int
arguments_check_string (struct call *call, const json_t *value,
                        const char *where)
{
  if (!json_is_string (value))
    return fail_type (call, where, ARGUMENT_STRING);
  if (strlen (json_string_value (value)) == json_string_length (value))
    return 0;
  call_fail (call, GENERIC_ERROR, "Parameter '%s' must not contain the "
             "character NUL", where);
  return -1;
}

static int
check_elements (struct call *call, const struct argument *a,
                const json_t *array, const char *where)
{
  const json_t *value;
  size_t i;

  json_array_foreach (array, i, value) {
    CLEANUP_FREE char *name = NULL;

    if (asprintf (&name, "%s[%zu]", where, i) == -1) {
      name = NULL;
      return -1;
    }
    if (a->check (call, value, name) == -1)
      return -1;
  }
  return 0;
}

static int
check_value (struct call *call, const struct argument *a,
             const json_t *value, const char *where)
{
  static const struct argument strings = { .check = arguments_check_string };

  if (!has_type (value, a->type))
    return fail_type (call, where, a->type);
  switch (a->type) {
  case ARGUMENT_STRING:
    if (arguments_check_string (call, value, where) == -1)
      return -1;
    return a->check != NULL ? a->check (call, value, where) : 0;
  case ARGUMENT_STRINGS:
    return check_elements (call, &strings, value, where);
  case ARGUMENT_ARRAY:
    return check_elements (call, a, value, where);
  case ARGUMENT_OBJECT:
    return arguments_check_object (call, a->members, value, where);
  case ARGUMENT_BOOL:
  case ARGUMENT_UINT32:
    break;
  }
  return 0;
}

static int
check_one (struct call *call, const char *where, const struct argument *a,
           const json_t *value)
{
  CLEANUP_FREE char *name = NULL;

  if (value == NULL) {
    if (a->is_optional)
      return 0;
    call_fail (call, GENERIC_ERROR, "Parameter '%s%s' is missing",
               where, a->name);
    return -1;
  }
  if (a->type == ARGUMENT_UINT32)
    return check_number (call, where, a->name, value);
  if (asprintf (&name, "%s%s", where, a->name) == -1) {
    name = NULL;
    return -1;
  }
  return check_value (call, a, value, name);
}

static bool
is_in (const struct argument *arguments, const char *name)
{
  for (const struct argument *a = arguments; a->name != NULL; ++a)
    if (strcmp (a->name, name) == 0)
      return true;
  return false;
}

int
arguments_check (struct call *call, const struct argument *arguments,
                 const json_t *object, const char *where)
{
  static const struct argument none[] = { { .name = NULL } };
  const char *name;
  json_t *value;

  if (arguments == NULL)
    arguments = none;
  for (const struct argument *a = arguments; a->name != NULL; ++a)
    if (check_one (call, where, a, json_object_get (object, a->name)) == -1)
      return -1;
  json_object_foreach ((json_t *) object, name, value)
    if (!is_in (arguments, name)) {
      call_fail (call, GENERIC_ERROR, "Parameter '%s%s' is unexpected",
                 where, name);
      return -1;
    }
  return 0;
}

int
arguments_check_object (struct call *call, const struct argument *arguments,
                        const json_t *value, const char *where)
{
  CLEANUP_FREE char *inside = NULL;

  if (!json_is_object (value))
    return fail_type (call, where, ARGUMENT_OBJECT);
  if (asprintf (&inside, "%s.", where) == -1) {
    inside = NULL;
    return -1;
  }
  return arguments_check (call, arguments, value, inside);
}
