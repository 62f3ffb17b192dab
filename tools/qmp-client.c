/* nbdkit-dirty-bitmap-filter
 * SPDX-License-Identifier: BSD-3-Clause
 * Copyright the nbdkit-dirty-bitmap-filter authors
 */

/* A client of a control socket: QEMU's protocol QMP, one command at a time. */

#include <config.h>

#include <errno.h>
#include <stdarg.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/un.h>
#include <unistd.h>

#include "qmp-client.h"

#define NOT_QMP "the server does not speak QMP"

__attribute__ ((format (printf, 2, 3)))
static int
failed (struct qmp_client *c, const char *fmt, ...)
{
  va_list args;

  free (c->error);
  va_start (args, fmt);
  if (vasprintf (&c->error, fmt, args) == -1)
    c->error = NULL;
  va_end (args);
  return -1;
}

static int
connect_to (struct qmp_client *c, const char *path)
{
  struct sockaddr_un sun = { .sun_family = AF_UNIX };
  const int fd = socket (AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0);
  int copy;

  if (strlen (path) >= sizeof sun.sun_path) {
    if (fd != -1)
      close (fd);
    return failed (c, "%s: the path is too long", path);
  }
  strcpy (sun.sun_path, path);
  if (fd == -1 ||
      connect (fd, (const struct sockaddr *) &sun, sizeof sun) == -1) {
    failed (c, "%s: %s", path, strerror (errno));
    if (fd != -1)
      close (fd);
    return -1;
  }
  c->in = fdopen (fd, "r");
  if (c->in == NULL)
    close (fd);
  else if ((copy = dup (fd)) != -1 && (c->out = fdopen (copy, "w")) == NULL)
    close (copy);
  return c->out != NULL ? 0 : failed (c, "%s", strerror (errno));
}

/* The next message that is not an event.  The server sends one a line. */
static json_t *
receive (struct qmp_client *c)
{
  for (;;) {
    const ssize_t n = getline (&c->line, &c->line_bytes, c->in);
    json_t *message;

    if (n == -1) {
      failed (c, "the server closed the connection");
      return NULL;
    }
    message = json_loadb (c->line, n, JSON_ALLOW_NUL, NULL);
    if (!json_is_object (message)) {
      json_decref (message);
      failed (c, NOT_QMP);
      return NULL;
    }
    if (json_object_get (message, "event") == NULL)
      return message;
    json_decref (message);
  }
}

static int
check_reply (struct qmp_client *c, const json_t *reply)
{
  const json_t *error = json_object_get (reply, "error");
  const char *text = json_string_value (json_object_get (error, "desc"));

  return error == NULL ? 0
    : failed (c, "%s", text != NULL ? text : "unknown error");
}

json_t *
qmp_client_call (struct qmp_client *c, const char *command,
                 json_t *arguments)
{
  json_t *request = json_pack ("{s:s,s:O}", "execute", command,
                               "arguments", arguments);
  json_t *reply, *result = NULL;
  int r;

  if (request == NULL) {
    failed (c, "cannot use the command '%s'", command);
    return NULL;
  }
  r = json_dumpf (request, c->out, JSON_ENSURE_ASCII);
  if (r == -1 || putc ('\n', c->out) == EOF || fflush (c->out) == EOF)
    r = failed (c, "sending: %s", strerror (errno));
  json_decref (request);
  if (r == -1 || (reply = receive (c)) == NULL)
    return NULL;
  if (check_reply (c, reply) == 0) {
    result = json_incref (json_object_get (reply, "return"));
    if (result == NULL)
      failed (c, NOT_QMP);
  }
  json_decref (reply);
  return result;
}

static int
negotiate (struct qmp_client *c)
{
  json_t *greeting = receive (c), *none, *reply;
  int r = -1;

  if (greeting == NULL)
    return -1;
  if (check_reply (c, greeting) == 0) /* too many clients */
    r = json_object_get (greeting, "QMP") != NULL ? 0 : failed (c, NOT_QMP);
  json_decref (greeting);
  if (r == -1)
    return -1;
  none = json_object ();
  reply = qmp_client_call (c, "qmp_capabilities", none);
  json_decref (none);
  if (reply == NULL)
    return -1;
  json_decref (reply);
  return 0;
}

int
qmp_client_open (struct qmp_client *c, const char *path)
{
  memset (c, 0, sizeof *c);
  return connect_to (c, path) == -1 ? -1 : negotiate (c);
}

void
qmp_client_close (struct qmp_client *c)
{
  if (c->out != NULL)
    fclose (c->out);
  if (c->in != NULL)
    fclose (c->in);
  free (c->line);
  free (c->error);
  memset (c, 0, sizeof *c);
}
