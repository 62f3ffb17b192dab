/* nbdkit-dirty-bitmap-filter
 * SPDX-License-Identifier: BSD-3-Clause
 * Copyright the nbdkit-dirty-bitmap-filter authors
 */

#ifndef DIRTY_BITMAP_QMP_CLIENT_H
#define DIRTY_BITMAP_QMP_CLIENT_H

/* A client of a control socket (dirty-bitmap-control). */

#include <stdio.h>

#include <jansson.h>

struct qmp_client {
  FILE *in, *out;
  char *line;                   /* the last that was received */
  size_t line_bytes;
  char *error;                  /* why the last call failed */
};

/* Connect and negotiate.  -1 with client->error on failure.  In any case it
 * has to be closed.
 */
extern int qmp_client_open (struct qmp_client *, const char *path);
extern void qmp_client_close (struct qmp_client *);

/* Execute a command with a copy of the arguments, and return the result, for
 * json_decref.  Events are skipped.  NULL with client->error on failure,
 * which is the server's own text if the server refused.
 */
extern json_t *qmp_client_call (struct qmp_client *, const char *command,
                                json_t *arguments);

#endif /* DIRTY_BITMAP_QMP_CLIENT_H */
