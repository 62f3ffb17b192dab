/* nbdkit-dirty-bitmap-filter
 * SPDX-License-Identifier: BSD-3-Clause
 * Copyright the nbdkit-dirty-bitmap-filter authors
 */

/* One option of the handshake: taking it piece by piece, and replying.
 *
 * When the final reply has been sent the option has been taken to its last
 * byte, however malformed it was: the stream stays in step.
 */

#include <config.h>

#include <string.h>

#include "common/bytes.h"
#include "nbd/debug.h"
#include "nbd/option.h"
#include "nbd/output.h"

int
option_read (struct option *o, void *buf, size_t count)
{
  if (count > o->remaining)
    return 1;
  o->remaining -= count;
  return stream_read (o->worker->stream, buf, count);
}

int
option_skip (struct option *o, size_t count)
{
  if (count > o->remaining)
    return 1;
  o->remaining -= count;
  return stream_skip (o->worker->stream, count);
}

int
option_reply2 (struct option *o, uint32_t reply,
               const void *data, size_t length,
               const void *more, size_t more_length)
{
  struct nbd_option_reply header = {
    .magic = htobe64 (NBD_OPTION_REPLY_MAGIC),
    .option = htobe32 (o->option),
    .reply = htobe32 (reply),
    .length = htobe32 (length + more_length),
  };

  if (output_append (o->worker, &header, sizeof header) == -1 ||
      (length > 0 && output_append (o->worker, data, length) == -1) ||
      (more_length > 0 && output_append (o->worker, more, more_length) == -1))
    return -1;
  return 0;
}

int
option_reply (struct option *o, uint32_t reply,
              const void *data, size_t length)
{
  return option_reply2 (o, reply, data, length, NULL, 0);
}

int
option_error (struct option *o, uint32_t reply, const char *message)
{
  debug_request ("nbd: option %u: %s", o->option, message);
  if (option_skip (o, o->remaining) == -1)
    return -1;
  return option_reply (o, reply, message, strlen (message));
}

int
option_export_name (struct option *o, char *name, uint32_t *length)
{
  uint32_t n;
  int r = option_read (o, &n, sizeof n);

  if (r == -1)
    return -1;
  if (r == 0) {
    n = be32toh (n);
    if (n <= NBD_MAX_STRING)
      r = option_read (o, name, n);
    else
      r = 1;
    if (r == -1)
      return -1;
  }
  if (r == 1 || memchr (name, '\0', n) != NULL) {
    if (option_error (o, NBD_REP_ERR_INVALID, "invalid export name") == -1)
      return -1;
    return 1;
  }
  *length = n;
  return 0;
}

int
option_find_export (struct option *o, const char *name, uint32_t length,
                    struct export *export)
{
  const struct service *service = o->worker->service;

  if (export_find (service->disk, &service->export, name, length, export))
    return 0;
  return option_error (o, NBD_REP_ERR_UNKNOWN,
                       "there is no export of this name") == -1 ? -1 : 1;
}
