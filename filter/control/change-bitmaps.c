/* nbdkit-dirty-bitmap-filter
 * SPDX-License-Identifier: BSD-3-Clause
 * Copyright the nbdkit-dirty-bitmap-filter authors
 */

/* The commands that change bitmaps, most also an action of a transaction: from
 * their arguments to what disk_change_bitmaps does.
 *
 * The disk knows the bitmaps, and finds what is wrong with them.  Here it is
 * found that there is no such node, or that an action always fails.  The error
 * of a transaction is that of the first action that fails, as in QEMU.  So if
 * an action is wrong here, the disk is asked for those before it, with one
 * behind them that fails: it does nothing, and says which is the first.
 */

#include <config.h>

#include <errno.h>
#include <stdlib.h>
#include <string.h>

#include "common/report.h"
#include "control/internal.h"

/* The name of a bitmap that cannot be added, and QEMU's reason. */
static const char no_name[] = "";
static const char no_name_error[] = "Bitmap name cannot be empty";

const struct argument add_arguments[] = {
  { "node", .type = ARGUMENT_STRING },
  { "name", .type = ARGUMENT_STRING },
  { "granularity", ARGUMENT_UINT32, .is_optional = true },
  { "persistent", ARGUMENT_BOOL, .is_optional = true },
  { "disabled", ARGUMENT_BOOL, .is_optional = true },
  { .name = NULL },
};

/* QEMU does not know force. */
const struct argument change_arguments[] = {
  { "node", .type = ARGUMENT_STRING },
  { "name", .type = ARGUMENT_STRING },
  { "force", ARGUMENT_BOOL, .is_optional = true },
  { .name = NULL },
};

/* A source of a merge: a name, or an object.  The text is QEMU's. */
static int
check_source (struct call *call, const json_t *value, const char *where)
{
  static const struct argument members[] = {
    { "node", .type = ARGUMENT_STRING },
    { "name", .type = ARGUMENT_STRING },
    { .name = NULL },
  };

  if (json_is_string (value))
    return arguments_check_string (call, value, where);
  if (json_is_object (value))
    return arguments_check_object (call, members, value, where);
  call_fail (call, GENERIC_ERROR, "Invalid parameter type for 'null', "
             "expected: BlockDirtyBitmapOrStr");
  return -1;
}

const struct argument merge_arguments[] = {
  { "node", .type = ARGUMENT_STRING },
  { "target", .type = ARGUMENT_STRING },
  { "bitmaps", ARGUMENT_ARRAY, .check = check_source },
  { "force", ARGUMENT_BOOL, .is_optional = true },
  { .name = NULL },
};

int
change_begin (struct change *change, size_t max)
{
  /* One more is for the action that fails. */
  change->actions = calloc (max + 1, sizeof *change->actions);
  change->nr = 0;
  change->views = NULL;
  return change->actions == NULL ? -1 : 0;
}

static const char *
get_string (const json_t *arguments, const char *name)
{
  return json_string_value (json_object_get (arguments, name));
}

static bool
get_bool (const json_t *arguments, const char *name)
{
  return json_is_true (json_object_get (arguments, name));
}

static bool
is_node (const struct call *call, const char *node)
{
  return strcmp (node, call->control->options.node) == 0;
}

static int
check_node (struct call *call, const json_t *arguments)
{
  const char *node = get_string (arguments, "node");

  if (is_node (call, node))
    return 0;
  call_fail (call, GENERIC_ERROR, "Node '%s' not found", node);
  return -1;
}

/* QEMU's order: the name before the node, and its own text for the latter. */
static int
read_add (struct call *call, const json_t *arguments, struct disk_action *a)
{
  const json_t *granularity = json_object_get (arguments, "granularity");
  const char *node = get_string (arguments, "node");

  a->name = get_string (arguments, "name");
  a->has_granularity = granularity != NULL;
  a->granularity = json_integer_value (granularity);
  a->persistent = get_bool (arguments, "persistent");
  a->disabled = get_bool (arguments, "disabled");
  if (*a->name == '\0')
    call_fail (call, GENERIC_ERROR, "%s", no_name_error);
  else if (!is_node (call, node))
    call_fail (call, GENERIC_ERROR,
               "Cannot find device='%s' nor node-name='%s'", node, node);
  else
    return 0;
  return -1;
}

/* The sources, up to the first that is of another node. */
static int
read_sources (struct call *call, const json_t *list, struct disk_action *a)
{
  const char **sources = calloc (json_array_size (list) + 1, sizeof *sources);
  const json_t *source;
  size_t i;

  if (sources == NULL) {
    call_fail (call, GENERIC_ERROR, "Out of memory");
    return -1;
  }
  a->sources = sources;
  json_array_foreach (list, i, source) {
    if (json_is_object (source) && check_node (call, source) == -1)
      return -1;
    sources[a->nr_sources++] = json_is_object (source)
      ? get_string (source, "name") : json_string_value (source);
  }
  return 0;
}

static const struct {
  const char *name;
  enum disk_action_type type;
} types[] = {
  { "backup-begin", DISK_BACKUP_BEGIN },
  { "backup-end", DISK_BACKUP_END },
  { "block-dirty-bitmap-add", DISK_BITMAP_ADD },
  { "block-dirty-bitmap-clear", DISK_BITMAP_CLEAR },
  { "block-dirty-bitmap-disable", DISK_BITMAP_DISABLE },
  { "block-dirty-bitmap-enable", DISK_BITMAP_ENABLE },
  { "block-dirty-bitmap-merge", DISK_BITMAP_MERGE },
  { "block-dirty-bitmap-remove", DISK_BITMAP_REMOVE },
};

static enum disk_action_type
find_type (const char *name)
{
  for (size_t i = 0; i < sizeof types / sizeof types[0]; ++i)
    if (strcmp (types[i].name, name) == 0)
      return types[i].type;
  abort ();
}

int
change_append (struct call *call, struct change *change, const char *name,
               const json_t *arguments)
{
  struct disk_action *a = &change->actions[change->nr];
  const enum disk_action_type type = find_type (name);

  *a = (struct disk_action) { .type = type };
  if (type == DISK_BACKUP_END)
    backup_read_end (arguments, a);
  else if ((type == DISK_BITMAP_ADD &&
            read_add (call, arguments, a) == -1) ||
           (type == DISK_BACKUP_BEGIN &&
            backup_read_begin (call, arguments, a, &change->views) == -1))
    return -1;
  if (type == DISK_BITMAP_ADD || type == DISK_BACKUP_BEGIN ||
      type == DISK_BACKUP_END) {
    change->nr++;
    return 0;
  }
  if (check_node (call, arguments) == -1)
    return -1;
  a->force = get_bool (arguments, "force");
  change->nr++;
  if (type == DISK_BITMAP_MERGE) {
    a->name = get_string (arguments, "target");
    return read_sources (call, json_object_get (arguments, "bitmaps"), a);
  }
  a->name = get_string (arguments, "name");
  return 0;
}

static int
ask_disk (struct call *call, const struct change *change,
          struct report_hold *hold)
{
  const struct control_options *o = &call->control->options;
  int r;

  report_hold_begin (hold);
  r = disk_change_bitmaps (o->disk, o->node, change->actions, change->nr);
  report_hold_end (hold);
  return r;
}

/* The events about views that a change begins or ends come before the reply,
 * as QEMU's do.
 */
static json_t *
carry_out (struct call *call, struct change *change)
{
  struct report_hold hold;

  if (change->nr == 0)
    return json_object ();
  views_look (call->control);
  if (ask_disk (call, change, &hold) == 0) {
    views_watch (call->control, &change->views);
    views_look (call->control);
    return json_object ();
  }
  return call_fail (call, GENERIC_ERROR, "%s",
                    hold.any ? hold.text : strerror (errno));
}

/* Append an action that fails, and see whether one before it does, too. */
static void
find_first_error (struct call *call, struct change *change)
{
  struct report_hold hold;

  if (change->nr == 0)
    return;
  change->actions[change->nr++] =
    (struct disk_action) { .type = DISK_BITMAP_ADD, .name = no_name };
  if (ask_disk (call, change, &hold) == -1 && hold.any &&
      strcmp (hold.text, no_name_error) != 0)
    call_fail (call, GENERIC_ERROR, "%s", hold.text);
}

json_t *
change_end (struct call *call, struct change *change)
{
  json_t *result = NULL;

  if (call->class == NULL)
    result = carry_out (call, change);
  else
    find_first_error (call, change);
  views_forget (&change->views);
  change->done = change->actions[0].done;
  change->dirty_bytes = change->actions[0].dirty_bytes;
  for (size_t i = 0; i < change->nr; ++i)
    free ((void *) change->actions[i].sources);
  free (change->actions);
  return result;
}

json_t *
change_run (struct call *call, struct change *change)
{
  if (change_begin (change, 1) == -1)
    return NULL;
  change_append (call, change, call->command->name, call->arguments);
  return change_end (call, change);
}

json_t *
command_change_bitmap (struct call *call)
{
  struct change change;

  return change_run (call, &change);
}
