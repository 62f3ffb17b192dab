/* nbdkit-dirty-bitmap-filter
 * SPDX-License-Identifier: BSD-3-Clause
 * Copyright the nbdkit-dirty-bitmap-filter authors
 */

#ifndef DIRTY_BITMAP_NBD_CONNECTION_H
#define DIRTY_BITMAP_NBD_CONNECTION_H

/* One connection: a client's stream, what was negotiated on it, the
 * workers that serve it, and its account of the memory.
 */

#include <stdatomic.h>
#include <stdbool.h>
#include <stdint.h>

#include "disk/disk.h"
#include "nbd/budget.h"
#include "nbd/session.h"
#include "nbd/stream.h"
#include "nbd/team.h"

struct nbd_server;

struct connection {
  /* Constant. */
  struct nbd_server *server;
  uint64_t serial;              /* from 1 on */
  int ended_fd;                 /* an eventfd to write to at the end, or -1 */
  int64_t started_ms;           /* of now_ms */

  struct stream stream;
  struct session session;
  struct account account;
  struct disk_client client;

  /* The roster's: server->lock. */
  struct connection *prev, *next;
  bool cut_for_room;
  atomic_bool handshaking;      /* may be read without it */

  /* The accepting thread's (bounds.c). */
  int64_t stalled_since;
  uint64_t moved;
  bool holds_memory;

  /* Changed by the holder of the role alone.  bytes has the sum of the lengths
   * of the valid requests NBD_CMD_READ and NBD_CMD_WRITE.  They count whether
   * they succeed or not, but for a WRITE that fails while it is received.
   */
  uint64_t nr_requests;
  uint64_t bytes[2];
  bool out_of_step;             /* it is not known where the next request
                                   begins, so none is received */

  struct team team;
};

/* Serve a client in threads of its own.  The descriptor becomes the
 * connection's, unless this returns NULL.  Called with server->lock.
 */
extern struct connection *connection_start (struct nbd_server *, int fd);

/* Join the last thread and free.  Not on a list any more. */
extern void connection_join (struct connection *);

/* No more replies can be sent, no more requests are wanted. */
extern void connection_cut (struct connection *);

#endif /* DIRTY_BITMAP_NBD_CONNECTION_H */
