/* nbdkit-dirty-bitmap-filter
 * SPDX-License-Identifier: BSD-3-Clause
 * Copyright the nbdkit-dirty-bitmap-filter authors
 */

/* transaction: commands as one change, all of them or none. */

#include <config.h>

#include <string.h>

#include "control/internal.h"

/* The arguments of an action, which is a command that changes a bitmap, or
 * abort.  False if there is no such action.
 */
static bool
find_action (const json_t *type, const struct argument **arguments)
{
  const char *name = json_string_value (type);
  const struct command *command;

  *arguments = NULL;
  if (name == NULL)
    return false;
  if (strcmp (name, "abort") == 0)
    return true;
  command = command_find (name, json_string_length (type));
  if (command == NULL || (command->run != command_change_bitmap &&
                          command->run != command_backup_begin))
    return false;
  *arguments = command->arguments;
  return true;
}

/* In these two texts QEMU does not say where. */
static int
check_type (struct call *call, const json_t *type, const char *where)
{
  const struct argument *arguments;

  (void) where;
  if (find_action (type, &arguments))
    return 0;
  call_fail (call, GENERIC_ERROR, "Parameter 'type' does not accept value "
             "'%s'", json_string_value (type));
  return -1;
}

static int
check_mode (struct call *call, const json_t *value, const char *where)
{
  const char *mode = json_string_value (value);

  (void) where;
  if (strcmp (mode, "individual") == 0 || strcmp (mode, "grouped") == 0)
    return 0;
  call_fail (call, GENERIC_ERROR, "Parameter 'completion-mode' does not "
             "accept value '%s'", mode);
  return -1;
}

static int
check_action (struct call *call, const json_t *action, const char *where)
{
  struct argument members[] = {
    { "type", ARGUMENT_STRING, .check = check_type },
    { "data", .type = ARGUMENT_OBJECT },
    { .name = NULL },
  };

  find_action (json_object_get (action, "type"), &members[1].members);
  return arguments_check_object (call, members, action, where);
}

static const struct argument properties[] = {
  { "completion-mode", ARGUMENT_STRING, .is_optional = true,
    .check = check_mode },
  { .name = NULL },
};

const struct argument transaction_arguments[] = {
  { "actions", ARGUMENT_ARRAY, .check = check_action },
  { "properties", ARGUMENT_OBJECT, .is_optional = true,
    .members = properties },
  { .name = NULL },
};

/* Of QEMU's actions, only jobs can be grouped. */
static bool
is_grouped (const json_t *arguments)
{
  const json_t *given = json_object_get (arguments, "properties");
  const char *mode =
    json_string_value (json_object_get (given, "completion-mode"));

  return mode != NULL && strcmp (mode, "grouped") == 0;
}

static int
append_action (struct call *call, struct change *change,
               const json_t *action)
{
  const char *type = json_string_value (json_object_get (action, "type"));

  if (strcmp (type, "abort") == 0)
    call_fail (call, GENERIC_ERROR, "Transaction aborted using Abort action");
  else if (is_grouped (call->arguments))
    call_fail (call, GENERIC_ERROR, "Action '%s' does not support "
               "Transaction property completion-mode = grouped", type);
  else
    return change_append (call, change, type,
                          json_object_get (action, "data"));
  return -1;
}

json_t *
command_transaction (struct call *call)
{
  const json_t *actions = json_object_get (call->arguments, "actions");
  struct change change;
  const json_t *action;
  size_t i;

  if (change_begin (&change, json_array_size (actions)) == -1)
    return NULL;
  json_array_foreach (actions, i, action)
    if (append_action (call, &change, action) == -1)
      break;
  return change_end (call, &change);
}
