/* nbdkit-dirty-bitmap-filter
 * SPDX-License-Identifier: BSD-3-Clause
 * Copyright the nbdkit-dirty-bitmap-filter authors
 */

/* The roster: a server's lists of connections, those that live and those
 * that have ended and wait to be joined.
 *
 * Invariant: as long as a connection is on the list of live ones its
 * descriptor is open, so others may shut it down under server->lock.
 */

#include <config.h>

#include <assert.h>
#include <unistd.h>

#include "common/cleanup.h"
#include "common/lock.h"
#include "nbd/roster.h"
#include "nbd/server.h"
#include "stats/stats.h"

void
roster_add (struct connection *c)
{
  struct nbd_server *server = c->server;

  assert (lock_is_mine (&server->lock));
  server->nr_served++;
  c->next = server->live;
  if (c->next != NULL)
    c->next->prev = c;
  server->live = c;
  server->nr_live++;
  server->nr_handshaking++;
}

void
roster_handshake_done (struct connection *c)
{
  struct nbd_server *server = c->server;

  ACQUIRE_LOCK_FOR_CURRENT_SCOPE (&server->lock);
  atomic_store (&c->handshaking, false);
  server->nr_handshaking--;
  if (server->crowded)
    server_wake (server);
}

static void
finish (struct connection *c)
{
  struct nbd_server *server = c->server;

  ACQUIRE_LOCK_FOR_CURRENT_SCOPE (&server->lock);
  stats_connection_closed (server->service.stats);
  if (c->prev != NULL)
    c->prev->next = c->next;
  else
    server->live = c->next;
  if (c->next != NULL)
    c->next->prev = c->prev;
  close (c->stream.socket.fd);
  c->stream.socket.fd = -1;
  c->next = server->finished;
  server->finished = c;
  server->nr_live--;
  if (atomic_load (&c->handshaking))
    server->nr_handshaking--;
  if (c->cut_for_room)
    server->nr_cut--;
  pthread_cond_broadcast (&server->changed);
  if (c->ended_fd != -1)
    eventfd_write (c->ended_fd, 1);
  server_wake (server);
}

/* The server outlives this call: it waits for the connection's thread. */
void
roster_finish (struct connection *c)
{
  struct nbd_server *server = c->server;
  const bool had_opened = !atomic_load (&c->handshaking);

  finish (c);
  if (had_opened && server->last_left != NULL &&
      atomic_load (&server->nr_live) == 0)
    server->last_left ();
}

struct connection *
roster_take_finished (struct nbd_server *server)
{
  struct connection *c;

  ACQUIRE_LOCK_FOR_CURRENT_SCOPE (&server->lock);
  c = server->finished;
  server->finished = NULL;
  return c;
}
