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

/* The export that the client has chosen; its transmission phase begins;
 * it has ended.
 */
extern void trace_export (struct session *,
                          const char *name, uint32_t length);
extern void trace_opened (struct connection *);
extern void trace_closed (struct connection *);

/* A request: its header is here, and it has the next number. */
extern void trace_show_header (struct worker *);

static inline void
trace_header (struct worker *w)
{
  w->id.request = ++w->connection->nr_requests;
  w->id.cookie = w->request.cookie;
  if (__builtin_expect (dirty_bitmap_debug_request, 0))
    trace_show_header (w);
}

/* It is here whole, and was refused with an errno, or 0 if not.  This and
 * the one above are for the holder of the role.
 */
static inline void
trace_begin (struct worker *w, int err)
{
  struct connection *c = w->connection;

  if (err == 0 && w->request.type <= NBD_CMD_WRITE)
    c->bytes[w->request.type] += w->request.length;
  w->error = 0;
  w->began = stats_begin (w->service->stats) - w->spent;
  w->spent = 0;
}

/* It is done, except for sending the reply. */
extern void trace_count (struct worker *);

static inline void
trace_end (struct worker *w)
{
  if (__builtin_expect (w->service->stats != NULL, 0))
    trace_count (w);
  w->id.request = 0;
}

/* It says that there will be no others, and is none itself. */
extern void trace_disconnect (struct worker *);

#endif /* DIRTY_BITMAP_NBD_TRACE_H */
