/* nbdkit-dirty-bitmap-filter
 * SPDX-License-Identifier: BSD-3-Clause
 * Copyright the nbdkit-dirty-bitmap-filter authors
 */

/* One connection, from its beginning to its end.
 *
 * The first worker exists from the beginning.  It negotiates with the
 * client, and becomes a worker like the others, which are added on demand.
 * When input has ended it joins them (each finishes the request it has, and
 * answers it), closes the socket, and puts the connection on the server's
 * list of finished ones.
 */

#include <config.h>

#include <assert.h>
#include <stdlib.h>
#include <string.h>

#include "common/clock.h"
#include "common/lock.h"
#include "common/threads.h"
#include "nbd/connection.h"
#include "nbd/contexts.h"
#include "nbd/handshake.h"
#include "nbd/output.h"
#include "nbd/request.h"
#include "nbd/roster.h"
#include "nbd/server.h"
#include "nbd/trace.h"

static void
work (struct worker *w)
{
  struct robbed robbed;

  while (role_acquire (w, &robbed)) {
    if (robbed.worker != NULL)
      output_flush_robbed (w, &robbed);
    while (w->has_role) {
      if (request_serve (w) == -1) {
        output_flush_gathered (w);
        role_end_input (w);
      }
    }
  }
}

static void *
worker_main (void *vp)
{
  trace_thread (vp);
  work (vp);
  return NULL;
}

void
connection_cut (struct connection *c)
{
  socket_cut (&c->stream.socket);
  budget_wake (c->account.budget);
}

static void
connection_free (struct connection *c)
{
  team_free (&c->team);
  stream_free (&c->stream);
  free (c);
}

static void *
connection_main (void *vp)
{
  struct worker *w = vp;
  struct connection *c = w->connection;

  trace_thread (w);
  if (handshake (w) == 0) {
    stream_begin_requests (&c->stream,
                           wire_request_size (c->session.extended));
    roster_handshake_done (c);
    trace_opened (c);
    work (w);
    team_join (&c->team);
  }
  contexts_release (&c->session);
  trace_closed (c);
  stream_linger (&c->stream);
  atomic_fetch_sub (&c->server->teams.nr_extra_threads,
                    c->team.nr_workers - 1);
  roster_finish (c);
  return NULL;
}

/* The connection's parts but for its team. */
static struct connection *
connection_new (struct nbd_server *server, int fd)
{
  struct connection *c = aligned_alloc (_Alignof (struct connection),
                                        sizeof *c);

  if (c == NULL)
    return NULL;
  memset (c, 0, sizeof *c);
  c->server = server;
  c->serial = server->nr_served + 1;
  c->started_ms = now_ms ();
  c->ended_fd = fd == server->client_fd ? server->ended_fd : -1;
  c->account.budget = &server->budget;
  c->account.dead = &c->stream.socket.dead;
  atomic_store (&c->handshaking, true);
  disk_client_begin (server->service.disk, &c->client);
  if (stream_init (&c->stream, fd, server->service.limits.idle_seconds,
                   &server->stopping) == -1) {
    free (c);
    return NULL;
  }
  return c;
}

static struct worker *
first_worker (struct connection *c)
{
  const struct worker like = {
    .connection = c,
    .service = &c->server->service,
    .session = &c->session,
    .stream = &c->stream,
    .team = &c->team,
    .account = &c->account,
  };

  return worker_new (&like);
}

struct connection *
connection_start (struct nbd_server *server, int fd)
{
  struct connection *c;
  struct worker *w;

  assert (lock_is_mine (&server->lock));
  c = connection_new (server, fd);
  if (c == NULL)
    return NULL;
  w = first_worker (c);
  if (w == NULL) {
    stream_free (&c->stream);
    free (c);
    return NULL;
  }
  team_init (&c->team, &server->teams, w, worker_main);
  if (thread_create (&w->thread, connection_main, w) != 0) {
    connection_free (c);
    return NULL;
  }
  if (fd == server->client_fd)
    server->client_fd = -1;
  return c;
}

void
connection_join (struct connection *c)
{
  pthread_join (c->team.workers[0]->thread, NULL);
  connection_free (c);
}
