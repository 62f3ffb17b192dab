/* nbdkit-dirty-bitmap-filter
 * SPDX-License-Identifier: BSD-3-Clause
 * Copyright the nbdkit-dirty-bitmap-filter authors
 */

#ifndef DIRTY_BITMAP_NBD_TRACE_H
#define DIRTY_BITMAP_NBD_TRACE_H

/* Messages about connections, and the counts of requests. */

#include <stddef.h>
#include <stdint.h>

#include "nbd/connection.h"
#include "nbd/debug.h"
#include "nbd/worker.h"
#include "stats/stats.h"

/* This thread is the worker's. */
extern void trace_thread (struct worker *);

/* The client has chosen the export of this name. */
extern void trace_export (struct session *,
                          const char *name, uint32_t length);

/* The handshake has succeeded, and transmission begins. */
extern void trace_opened (struct connection *);

/* The connection has ended, in the handshake or later. */
extern void trace_closed (struct connection *);

/* Show the header of a request, as a debug message. */
extern void trace_show_header (struct worker *);

/* The header of a request was received.  The request gets the next number. */
static inline void
trace_header (struct worker *w)
{
  w->id.request = ++w->connection->nr_requests;
  w->id.cookie = w->request.cookie;
  if (__builtin_expect (dirty_bitmap_debug_request, 0))
    trace_show_header (w);
}

/* The request was received whole.  err is 0 if it is to be carried out, or the
 * errno with which it is answered at once: it was refused, or it is a WRITE of
 * which a part has failed.  The holder of the role calls this function and
 * trace_header.
 */
static inline void
trace_begin (struct worker *w, int err)
{
  struct connection *c = w->connection;

  if (err == 0 && w->request.type <= NBD_CMD_WRITE)
    c->bytes[w->request.type] += w->request.length;
  w->error = 0;
  w->began = stats_begin (w->service->stats);
}

/* Count the request in the statistics. */
extern void trace_count (struct worker *);

/* The request is done, except for sending the reply. */
static inline void
trace_end (struct worker *w)
{
  if (__builtin_expect (w->service->stats != NULL, 0))
    trace_count (w);
  w->id.request = 0;
}

/* The request is NBD_CMD_DISC: the client sends no more requests.  It is not
 * counted as one itself.
 */
extern void trace_disconnect (struct worker *);

#endif /* DIRTY_BITMAP_NBD_TRACE_H */
