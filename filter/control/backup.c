/* nbdkit-dirty-bitmap-filter
 * SPDX-License-Identifier: BSD-3-Clause
 * Copyright the nbdkit-dirty-bitmap-filter authors
 */

/* The commands about backups, which QEMU does not have: backup-begin,
 * backup-end, backup-list, gate-close and gate-open.
 *
 * The gate is closed for a time only.  If it is over before gate-open, or the
 * client that closed the gate is gone, the gate opens by itself.  Then the
 * moment that several disks were to share is lost, so backup-begin and
 * gate-close fail until gate-open, which says so, too.
 */

#include <config.h>

#include <stdint.h>
#include <string.h>

#include "common/clock.h"
#include "common/report.h"
#include "control/internal.h"
#include "disk/change.h"
#include "disk/disk.h"

#define GATE_DEFAULT_MS 2000
#define GATE_MAX_MS 10000

/* A week, in seconds. */
#define FAIL_AFTER_MAX 604800

const struct argument backup_begin_arguments[] = {
  { "bitmap", .type = ARGUMENT_STRING },
  { "create", ARGUMENT_BOOL, .is_optional = true },
  { "granularity", ARGUMENT_UINT32, .is_optional = true },
  { "view", ARGUMENT_BOOL, .is_optional = true },
  { "fail-after", ARGUMENT_UINT32, .is_optional = true },
  { "scope", ARGUMENT_STRING, .is_optional = true },
  { .name = NULL },
};

const struct argument backup_end_arguments[] = {
  { "bitmap", .type = ARGUMENT_STRING },
  { "success", .type = ARGUMENT_BOOL },
  { "clear", ARGUMENT_BOOL, .is_optional = true },
  { .name = NULL },
};

const struct argument gate_close_arguments[] = {
  { "timeout", ARGUMENT_UINT32, .is_optional = true },
  { .name = NULL },
};

static json_t *
qmp_context (const char *name)
{
  return qmp_string_of ("qemu:dirty-bitmap:", name);
}

static bool
has_view (const json_t *arguments)
{
  return !json_is_false (json_object_get (arguments, "view"));
}

/* With a view, "export" comes first. */
static json_t *
begun (const struct call *call, const char *name, const char *action,
       uint64_t dirty_bytes)
{
  json_t *result = json_object ();
  json_t *more =
    json_pack ("{s:o,s:s,s:I,s:I}", "context", qmp_context (name),
               "action", action, "dirty", (json_int_t) dirty_bytes, "size",
               (json_int_t) disk_size (call->control->options.disk));

  if (more == NULL ||
      (has_view (call->arguments) &&
       json_object_set_new (result, "export", views_export (name)) == -1) ||
      json_object_update (result, more) == -1) {
    json_decref (result);
    result = NULL;
  }
  json_decref (more);
  return result;
}

/* The name of the bitmap, once the command's change was made, or NULL. */
static const char *
run_for_bitmap (struct call *call, struct change *change)
{
  json_t *result = change_run (call, change);

  if (result == NULL)
    return NULL;
  json_decref (result);
  return json_string_value (json_object_get (call->arguments, "bitmap"));
}

json_t *
command_backup_begin (struct call *call)
{
  static const char *const actions[] = {
    [BITMAP_BACKUP_USED] = "used",
    [BITMAP_BACKUP_CREATED] = "created",
    [BITMAP_BACKUP_RECREATED] = "recreated",
  };
  struct change change;
  const char *name = run_for_bitmap (call, &change);

  return name == NULL ? NULL : begun (call, name, actions[change.done],
                                      change.dirty_bytes);
}

json_t *
command_backup_end (struct call *call)
{
  struct change change;
  const char *name = run_for_bitmap (call, &change);

  return name == NULL ? NULL
    : json_pack ("{s:I}", "dirty", (json_int_t) change.dirty_bytes);
}

/* The moment of several disks is lost: nothing may begin as if it were not. */
static int
check_gate (struct call *call)
{
  if (call->control->gate != GATE_EXPIRED)
    return 0;
  call_fail (call, GENERIC_ERROR, "The gate has opened by itself: gate-open "
             "ends this group of disks");
  return -1;
}

static int
check_fail_after (struct call *call, const json_t *fail_after, bool view)
{
  const json_int_t seconds = json_integer_value (fail_after);

  if (fail_after == NULL)
    return 0;
  if (!view)
    call_fail (call, GENERIC_ERROR, "Parameter 'fail-after' is about the "
               "clients of a view, and there is none with \"view\": false");
  else if (seconds < 1 || seconds > FAIL_AFTER_MAX)
    call_fail (call, GENERIC_ERROR, "Parameter 'fail-after' expects a number "
               "of seconds from 1 to %d", FAIL_AFTER_MAX);
  else
    return 0;
  return -1;
}

static int
read_scope (struct call *call, const json_t *scope, struct disk_action *a)
{
  const char *text = json_string_value (scope);

  if (scope == NULL)
    return 0;
  a->dirty_only = strcmp (text, "dirty") == 0;
  if (!a->view)
    call_fail (call, GENERIC_ERROR, "Parameter 'scope' is about a view, and "
               "there is none with \"view\": false");
  else if (!a->dirty_only && strcmp (text, "disk") != 0)
    call_fail (call, GENERIC_ERROR, "Parameter 'scope' expects 'disk' or "
               "'dirty'");
  else
    return 0;
  return -1;
}

int
backup_read_begin (struct call *call, const json_t *arguments,
                   struct disk_action *a, struct watch **views)
{
  const json_t *create = json_object_get (arguments, "create");
  const json_t *granularity = json_object_get (arguments, "granularity");
  const json_t *fail_after = json_object_get (arguments, "fail-after");

  a->view = has_view (arguments);
  if (check_fail_after (call, fail_after, a->view) == -1 ||
      read_scope (call, json_object_get (arguments, "scope"), a) == -1 ||
      check_gate (call) == -1)
    return -1;
  a->name = json_string_value (json_object_get (arguments, "bitmap"));
  a->create = !json_is_false (create);
  a->has_granularity = granularity != NULL;
  a->granularity = json_integer_value (granularity);
  if (!a->view ||
      views_note (views, a->name, json_integer_value (fail_after)) == 0)
    return 0;
  call_fail (call, GENERIC_ERROR, "Out of memory");
  return -1;
}

void
backup_read_end (const json_t *arguments, struct disk_action *a)
{
  a->name = json_string_value (json_object_get (arguments, "bitmap"));
  a->success = json_is_true (json_object_get (arguments, "success"));
  a->clear = a->success &&
    !json_is_false (json_object_get (arguments, "clear"));
}

static void
add_backup (const struct disk_bitmap_state *b, void *opaque)
{
  if (b->has_backup)
    json_array_append_new (opaque, json_pack (
      "{s:o,s:o,s:I,s:I}", "bitmap", qmp_string (b->name),
      "context", qmp_context (b->name),
      "dirty", (json_int_t) b->dirty_bytes,
      "since", (json_int_t) b->since_bytes));
}

json_t *
command_backup_list (struct call *call)
{
  json_t *list = json_array ();

  if (list == NULL)
    return NULL;
  disk_list_bitmaps (call->control->options.disk, add_backup, list);
  if (views_add_to_backups (call->control, list) == 0)
    return list;
  json_decref (list);
  return NULL;
}

json_t *
command_gate_close (struct call *call)
{
  const json_t *timeout = json_object_get (call->arguments, "timeout");
  const json_int_t ms =
    timeout == NULL ? GATE_DEFAULT_MS : json_integer_value (timeout);
  struct control *control = call->control;
  struct report_hold hold;
  int r;

  if (ms < 1 || ms > GATE_MAX_MS)
    return call_fail (call, GENERIC_ERROR, "Parameter 'timeout' expects a "
                      "number of milliseconds from 1 to %d", GATE_MAX_MS);
  if (control->gate == GATE_CLOSED)
    return call_fail (call, GENERIC_ERROR, "The gate was closed already");
  if (check_gate (call) == -1)
    return NULL;
  report_hold_begin (&hold);
  r = disk_close_gate (control->options.disk);
  report_hold_end (&hold);
  if (r == -1)
    return call_fail (call, GENERIC_ERROR, "%s", hold.text);
  control->gate = GATE_CLOSED;
  control->gate_client = call->client;
  control->gate_until_ms = now_ms () + ms;
  return json_object ();
}

json_t *
command_gate_open (struct call *call)
{
  struct control *control = call->control;
  const enum control_gate gate = control->gate;

  disk_open_gate (control->options.disk);
  control->gate = GATE_OPEN;
  if (gate == GATE_CLOSED)
    return json_object ();
  return call_fail (call, GENERIC_ERROR, gate == GATE_OPEN ?
                    "The gate is open" :
                    "The gate has opened by itself");
}

int
backup_gate_turn (struct control *control)
{
  const int64_t left = control->gate_until_ms - now_ms ();

  if (control->gate != GATE_CLOSED)
    return -1;
  if (left > 0 && control->gate_client->fd != -1)
    return left;
  backup_gate_expire (control);
  return -1;
}

void
backup_gate_expire (struct control *control)
{
  if (control->gate != GATE_CLOSED)
    return;
  disk_open_gate (control->options.disk);
  control->gate = GATE_EXPIRED;
  report_debug ("control: the gate has opened by itself");
}
