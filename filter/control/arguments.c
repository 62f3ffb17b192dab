/* nbdkit-dirty-bitmap-filter
 * SPDX-License-Identifier: BSD-3-Clause
 * Copyright the nbdkit-dirty-bitmap-filter authors
 */

/* Checking the arguments of a command, with the order of the checks and the
 * texts of QEMU: what is missing or of the wrong type first, in the order of
 * the list, and then what is unexpected.
 */

#include <config.h>

#include <stdio.h>
#include <string.h>

#include "control/internal.h"

static const char *const expected[] = {
  [ARGUMENT_STRING] = "string",
  [ARGUMENT_BOOL] = "boolean",
  [ARGUMENT_STRINGS] = "array",
  [ARGUMENT_ARRAY] = "array",
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
  case ARGUMENT_UINT32:
    break;
  }
  return false;
}

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
    call_fail (call, GENERIC_ERROR, "Parameter '%s%s' expects uint32_t",
               where, name);
    return -1;
  }
  return 0;
}

static int
check_strings (struct call *call, const char *where, const char *name,
               const json_t *array)
{
  const json_t *value;
  size_t i;

  json_array_foreach (array, i, value)
    if (!json_is_string (value)) {
      call_fail (call, GENERIC_ERROR, "Invalid parameter type for "
                 "'%s%s[%zu]', expected: string", where, name, i);
      return -1;
    }
  return 0;
}

static int
check_one (struct call *call, const char *where, const struct argument *a,
           const json_t *value)
{
  if (value == NULL) {
    if (a->is_optional)
      return 0;
    call_fail (call, GENERIC_ERROR, "Parameter '%s%s' is missing",
               where, a->name);
    return -1;
  }
  if (a->type == ARGUMENT_UINT32)
    return check_number (call, where, a->name, value);
  if (!has_type (value, a->type)) {
    call_fail (call, GENERIC_ERROR, "Invalid parameter type for '%s%s', "
               "expected: %s", where, a->name, expected[a->type]);
    return -1;
  }
  return a->type == ARGUMENT_STRINGS
    ? check_strings (call, where, a->name, value) : 0;
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
