/* nbdkit-dirty-bitmap-filter
 * SPDX-License-Identifier: BSD-3-Clause
 * Copyright the nbdkit-dirty-bitmap-filter authors
 */

/* One connection, from birth to end.
 *
 * The first worker is born with the connection.  It haggles with the
 * client, becomes a worker like the others that are added on demand,
 * and buries them: when input has ended it joins them (each finishes
 * the request it has, and answers it), closes the socket, and puts the
 * connection on the server's list of finished ones.
 *
 * Invariant: as long as a connection is on the list of live ones its
 * descriptor is open, so others may shut it down under server->lock.
 */

#include <config.h>

#include <errno.h>
#include <stdlib.h>
#include <sys/socket.h>
#include <time.h>
#include <unistd.h>

#include "common/buffer.h"
#include "common/bytes.h"
#include "common/cleanup.h"
#include "nbd/internal.h"

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
  budget_wake (&c->server->budget);
}

static void
connection_free (struct connection *c)
{
  for (unsigned i = 0; i < c->nr_workers; ++i)
    worker_free (c->workers[i]);
  pthread_mutex_destroy (&c->lock);
  pthread_cond_destroy (&c->role_freed);
  stream_free (&c->stream);
  free (c->contexts);
  free (c);
}

static void *
connection_main (void *vp)
{
  struct worker *w = vp;
  struct connection *c = w->connection;

  trace_thread (w);
  if (handshake (w) == 0) {
    stream_begin_requests (&c->stream, request_header_size (c));
    roster_handshake_done (c);
    trace_opened (c);
    work (w);
    /* Input has ended, so nobody adds a worker any more. */
    for (unsigned i = 1; i < c->nr_workers; ++i)
      pthread_join (c->workers[i]->thread, NULL);
  }
  contexts_release (c);
  trace_closed (c);
  stream_linger (&c->stream);
  atomic_fetch_sub (&c->server->nr_extra_threads, c->nr_workers - 1);
  roster_finish (c);
  return NULL;
}

static int
init_locks (struct connection *c)
{
  if (monotonic_cond_init (&c->role_freed) == -1)
    return -1;
  pthread_mutex_init (&c->lock, NULL);
  return 0;
}

struct connection *
connection_start (struct nbd_server *server, int fd)
{
  struct connection *c = calloc (1, sizeof *c);
  struct worker *w;

  if (c == NULL)
    return NULL;
  c->server = server;
  c->serial = server->nr_served + 1;
  c->started_ms = now_ms ();
  c->ended_fd = fd == server->client_fd ? server->ended_fd : -1;
  atomic_store (&c->handshaking, true);
  disk_client_begin (server->disk, &c->client);
  if (stream_init (&c->stream, fd, server->limits.idle_seconds,
                   &server->stopping) == -1) {
    free (c);
    return NULL;
  }
  w = worker_new (c);
  if (w == NULL || init_locks (c) == -1) {
    worker_free (w);
    stream_free (&c->stream);
    free (c);
    return NULL;
  }
  c->worker_main = worker_main;
  c->workers[c->nr_workers++] = w;

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
  pthread_join (c->workers[0]->thread, NULL);
  connection_free (c);
}
