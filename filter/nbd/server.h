/* nbdkit-dirty-bitmap-filter
 * SPDX-License-Identifier: BSD-3-Clause
 * Copyright the nbdkit-dirty-bitmap-filter authors
 */

#ifndef DIRTY_BITMAP_NBD_SERVER_H
#define DIRTY_BITMAP_NBD_SERVER_H

/* The server: what it serves, its sockets and threads, the connections, and
 * what they share.
 *
 * Locks of this room, in the order in which they may be taken: server->lock,
 * then team->lock.  stream->send_lock and teams->monitor_lock are taken
 * with no other lock held.  Inside send_lock only the lock of struct tls is
 * taken, which the receiver takes too, and inside which none is.  The locks
 * of struct budget and struct limit are taken inside any other, and none
 * inside them.
 */

#include <pthread.h>
#include <stdatomic.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <sys/eventfd.h>

#include "common/limit.h"
#include "nbd/budget.h"
#include "nbd/service.h"
#include "nbd/team.h"

struct nbd_server {
  struct service service;
  struct budget budget;
  struct teams teams;
  struct limit errors;          /* of messages about clients */
  void (*last_left) (void);     /* as in struct nbd_options */

  /* nbd_server_add_client's, or -1; -1 again when there is a connection
   * of this fd.  ended_fd is an eventfd.
   */
  int client_fd, ended_fd;

  /* Fixed once nbd_server_start has returned, and closed by the thread
   * that accepts when it ends.
   */
  int *sockets;
  size_t nr_sockets;
  struct pollfd *pollfds;       /* wake_fd, then the sockets */
  bool started;
  int wake_fd;                  /* an eventfd that wakes accept_thread */
  pthread_t accept_thread;
  pthread_t monitor_thread;

  atomic_bool stopping;         /* receive nothing more */
  int64_t cut_at_ms;            /* set before that: when to disconnect the
                                   clients that are left */

  /* Protects the lists and counts below, and that the fd of a listed
   * connection is open.
   */
  pthread_mutex_t lock;
  pthread_cond_t changed;       /* nr_live has fallen */
  struct connection *live;
  atomic_uint nr_live;          /* may be read without it */
  unsigned nr_handshaking;      /* of these */
  unsigned nr_cut;              /* of these, to make room */
  bool crowded;                 /* a client waits for want of room */
  struct connection *finished;  /* to be joined and freed */
  uint64_t nr_served;           /* the serial number of the last one */

  /* The accepting thread's own. */
  bool was_short;               /* of memory */
  int64_t next_trim;            /* see bounds.c */
};

/* Let the accepting thread look at what there is to do. */
static inline void
server_wake (struct nbd_server *server)
{
  eventfd_write (server->wake_fd, 1);
}

#endif /* DIRTY_BITMAP_NBD_SERVER_H */
