/* nbdkit-dirty-bitmap-filter
 * SPDX-License-Identifier: BSD-3-Clause
 * Copyright the nbdkit-dirty-bitmap-filter authors
 */

/* The table of commands.  To add one is to add its line here, and the function
 * that executes it.
 */

#include <config.h>

#include <ctype.h>
#include <stdio.h>
#include <string.h>

#include "control/internal.h"
#include "nbd/exports.h"

bool
control_is_node_name (const char *name)
{
  const size_t length = strlen (name);

  if (length == 0 || length > 31 || !isalpha ((unsigned char) name[0]))
    return false;
  for (size_t i = 0; i < length; ++i)
    if (!isalnum ((unsigned char) name[i]) && strchr ("-._", name[i]) == NULL)
      return false;
  return true;
}

json_t *
command_version (void)
{
  int major = 0, minor = 0, micro = 0;

  sscanf (PACKAGE_VERSION, "%d.%d.%d", &major, &minor, &micro);
  return json_pack ("{s:{s:i,s:i,s:i},s:s}", "qemu", "micro", micro,
                    "minor", minor, "major", major,
                    "package", PACKAGE_STRING);
}

/* There is no capability to be enabled. */
json_t *
command_capabilities (struct call *call)
{
  const json_t *enable = json_object_get (call->arguments, "enable");
  const json_t *capability;
  size_t i;

  if (call->client->is_negotiated)
    return call_fail (call, COMMAND_NOT_FOUND, "Capabilities negotiation is "
                      "already complete, command ignored");
  json_array_foreach (enable, i, capability) {
    const char *name = json_string_value (capability);

    if (strcmp (name, "oob") != 0)
      return call_fail (call, GENERIC_ERROR, "Parameter 'enable[%zu]' does "
                        "not accept value '%s'", i, name);
  }
  if (json_array_size (enable) > 0)
    return call_fail (call, GENERIC_ERROR, "Capability oob not available");
  call->client->is_negotiated = true;
  return json_object ();
}

static json_t *
query_version (struct call *call)
{
  (void) call;
  return command_version ();
}

static json_t *
query_commands (struct call *call)
{
  json_t *list = json_array ();

  (void) call;
  for (const struct command *c = control_commands; c->name != NULL; ++c)
    if (json_array_append_new (list, json_pack ("{s:s}", "name",
                                                c->name)) == -1) {
      json_decref (list);
      return NULL;
    }
  return list;
}

/* As of a guest that runs: the disk is served. */
static json_t *
query_status (struct call *call)
{
  (void) call;
  return json_pack ("{s:b,s:b,s:s}", "running", 1, "singlestep", 0,
                    "status", "running");
}

static json_t *
query_name (struct call *call)
{
  const char *name = call->control->options.exports.name;

  return name == NULL || *name == '\0' ? json_object ()
    : json_pack ("{s:o}", "name", qmp_string (name));
}

struct export_list {
  const struct control_options *options;
  json_t *list;
};

static int
add_export (void *opaque, const char *name, const char *description)
{
  const struct export_list *l = opaque;

  (void) description;
  return json_array_append_new (l->list, json_pack (
    "{s:o,s:s,s:s,s:b}", "id", qmp_string (name), "type", "nbd",
    "node-name", l->options->node, "shutting-down", 0));
}

static json_t *
query_block_exports (struct call *call)
{
  const struct control_options *o = &call->control->options;
  struct export_list l = { .options = o, .list = json_array () };

  if (exports_list (o->disk, &o->exports, add_export, &l) == 0)
    return l.list;
  json_decref (l.list);
  return NULL;
}

/* The reply goes out before the stop begins (socket.c). */
static json_t *
quit (struct call *call)
{
  call->control->quit_asked = true;
  return json_object ();
}

static const struct argument capabilities_arguments[] = {
  { "enable", ARGUMENT_STRINGS, .is_optional = true },
  { .name = NULL },
};

static const struct argument nodes_arguments[] = {
  { "flat", ARGUMENT_BOOL, .is_optional = true },
  { .name = NULL },
};

const struct command control_commands[] = {
  { "backup-begin", backup_begin_arguments, command_backup_begin },
  { "backup-end", backup_end_arguments, command_backup_end },
  { "backup-list", NULL, command_backup_list },
  { "block-dirty-bitmap-add", add_arguments, command_change_bitmap },
  { "block-dirty-bitmap-clear", change_arguments, command_change_bitmap },
  { "block-dirty-bitmap-disable", change_arguments, command_change_bitmap },
  { "block-dirty-bitmap-enable", change_arguments, command_change_bitmap },
  { "block-dirty-bitmap-merge", merge_arguments, command_change_bitmap },
  { "block-dirty-bitmap-remove", change_arguments, command_change_bitmap },
  { "gate-close", gate_close_arguments, command_gate_close },
  { "gate-open", NULL, command_gate_open },
  { "qmp_capabilities", capabilities_arguments, command_capabilities },
  { "query-block", NULL, command_query_block },
  { "query-block-exports", NULL, query_block_exports },
  { "query-commands", NULL, query_commands },
  { "query-name", NULL, query_name },
  { "query-named-block-nodes", nodes_arguments,
    command_query_named_block_nodes },
  { "query-stats", NULL, command_query_stats },
  { "query-status", NULL, query_status },
  { "query-version", NULL, query_version },
  { "quit", NULL, quit },
  { "transaction", transaction_arguments, command_transaction },
  { .name = NULL },
};

const struct command *
command_find (const char *name, size_t length)
{
  for (const struct command *c = control_commands; c->name != NULL; ++c)
    if (strlen (c->name) == length && memcmp (c->name, name, length) == 0)
      return c;
  return NULL;
}
