/* nbdkit-dirty-bitmap-filter
 * SPDX-License-Identifier: BSD-3-Clause
 * Copyright the nbdkit-dirty-bitmap-filter authors
 */

/* From what a client sends to a command, and from its result to a reply.
 *
 * The members of a command are checked in QEMU's order and with its texts, so
 * that scripts that look at them work with both.  The capability oob is not
 * offered, so exec-oob is a member that is not expected.
 */

#include <config.h>

#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

#include "common/cleanup.h"
#include "common/utf8.h"
#include "control/internal.h"

json_t *
qmp_string_of (const char *prefix, const char *name)
{
  CLEANUP_FREE char *text = NULL;

  if (asprintf (&text, "%s%s", prefix, name) == -1) {
    text = NULL;
    return NULL;
  }
  return qmp_string (text);
}

json_t *
qmp_string (const char *text)
{
  const unsigned char *p = (const unsigned char *) text;
  CLEANUP_FREE char *copy = malloc (3 * strlen (text) + 1);
  char *q = copy;

  if (copy == NULL)
    return NULL;
  while (*p != '\0') {
    const unsigned n = utf8_length (p);

    memcpy (q, n == 0 ? "\xef\xbf\xbd" : (const char *) p, n == 0 ? 3 : n);
    q += n == 0 ? 3 : n;
    p += n == 0 ? 1 : n;
  }
  return json_stringn (copy, q - copy);
}

json_t *
call_fail (struct call *call, const char *class, const char *fmt, ...)
{
  va_list args;

  free (call->error);
  call->class = class;
  va_start (args, fmt);
  if (vasprintf (&call->error, fmt, args) == -1)
    call->error = NULL;
  va_end (args);
  return NULL;
}

json_t *
qmp_error (const char *class, const char *text)
{
  return json_pack ("{s:{s:s,s:o}}", "error", "class", class,
                    "desc", qmp_string (text));
}

json_t *
qmp_greeting (void)
{
  return json_pack ("{s:{s:o,s:[]}}", "QMP", "version", command_version (),
                    "capabilities");
}

json_t *
qmp_event (const char *name, json_t *data)
{
  struct timespec now;

  clock_gettime (CLOCK_REALTIME, &now);
  return json_pack ("{s:{s:I,s:I},s:s,s:o}", "timestamp",
                    "seconds", (json_int_t) now.tv_sec,
                    "microseconds", (json_int_t) (now.tv_nsec / 1000),
                    "event", name, "data", data);
}

/* What a client asks for. */
struct request {
  const json_t *execute;        /* a string */
  json_t *arguments;            /* an object, or NULL */
};

static int
check_member (struct call *call, const char *name, json_t *value,
              struct request *r)
{
  if (strcmp (name, "id") == 0)
    return 0;
  if (strcmp (name, "execute") == 0) {
    r->execute = value;
    if (json_is_string (value))
      return 0;
    call_fail (call, GENERIC_ERROR, "QMP input member '%s' must be a string",
               name);
  }
  else if (strcmp (name, "arguments") == 0) {
    r->arguments = value;
    if (json_is_object (value))
      return 0;
    call_fail (call, GENERIC_ERROR, "QMP input member '%s' must be an object",
               name);
  }
  else
    call_fail (call, GENERIC_ERROR, "QMP input member '%s' is unexpected",
               name);
  return -1;
}

static int
read_request (struct call *call, const json_t *request, struct request *r)
{
  const char *name;
  json_t *value;

  *r = (struct request) { .execute = NULL };
  if (!json_is_object (request)) {
    call_fail (call, GENERIC_ERROR, "QMP input must be a JSON object");
    return -1;
  }
  json_object_foreach ((json_t *) request, name, value)
    if (check_member (call, name, value, r) == -1)
      return -1;
  if (r->execute != NULL)
    return 0;
  call_fail (call, GENERIC_ERROR, "QMP input lacks member 'execute'");
  return -1;
}

/* Find the command, as far as the client may have it now. */
static const struct command *
look_up (struct call *call, const json_t *execute)
{
  const struct command *command =
    command_find (json_string_value (execute), json_string_length (execute));

  if (!call->client->is_negotiated &&
      (command == NULL || command->run != command_capabilities))
    call_fail (call, COMMAND_NOT_FOUND, "Expecting capabilities negotiation "
               "with 'qmp_capabilities'");
  else if (command == NULL)
    call_fail (call, COMMAND_NOT_FOUND, "The command %s has not been found",
               json_string_value (execute));
  else
    return command;
  return NULL;
}

static json_t *
execute (struct call *call, const json_t *request)
{
  const struct command *command;
  json_t *result = NULL;
  struct request r;

  if (read_request (call, request, &r) == -1)
    return NULL;
  command = look_up (call, r.execute);
  if (command == NULL)
    return NULL;
  call->command = command;
  call->arguments = r.arguments != NULL ? json_incref (r.arguments)
                                        : json_object ();
  if (call->arguments != NULL &&
      arguments_check (call, command->arguments, call->arguments, "") == 0)
    result = command->run (call);
  json_decref (call->arguments);
  return result;
}

json_t *
qmp_answer (struct control *control, struct client *client,
            const json_t *request)
{
  struct call call = { .control = control, .client = client };
  json_t *result = execute (&call, request), *reply;
  json_t *id = json_object_get (request, "id");

  if (result != NULL)
    reply = json_pack ("{s:o}", "return", result);
  else
    reply = qmp_error (call.class != NULL ? call.class : GENERIC_ERROR,
                       call.error != NULL ? call.error : "Out of memory");
  free (call.error);
  if (reply != NULL && id != NULL && json_object_set (reply, "id", id) == -1) {
    json_decref (reply);
    return NULL;
  }
  return reply;
}
