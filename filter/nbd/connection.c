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
 *
 * A worker keeps the buffers of small requests until it has been idle for
 * a while.  Those of large ones are taken out of the server's budget for
 * the time of the request.
 */

#include <config.h>

#include <errno.h>
#include <stdlib.h>
#include <sys/eventfd.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <time.h>
#include <unistd.h>

#include "common/buffer.h"
#include "common/bytes.h"
#include "common/cleanup.h"
#include "nbd/internal.h"

static uint8_t *
small_payload (struct worker *w)
{
  if (w->small == NULL) {
    void *p = mmap (NULL, SMALL_PAYLOAD, PROT_READ | PROT_WRITE,
                    MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);

    if (p != MAP_FAILED)
      w->small = p;
  }
  return w->small;
}

static void
free_large (struct worker *w)
{
  if (w->large != NULL)
    budget_give (w->connection, w->large, w->large_capacity);
  w->large = NULL;
  w->large_capacity = 0;
}

static void
free_extents (struct extents *e)
{
  free (e->wire);
  e->wire = NULL;
  e->capacity = 0;
  if (e->reserved > 0)
    budget_unreserve (e->connection, e->reserved);
  e->reserved = 0;
}

void
worker_give_extents (struct worker *w)
{
  if (w->extents.reserved > 0)
    free_extents (&w->extents);
}

void
worker_share (struct worker *w)
{
  if (budget_is_short (&w->connection->server->budget))
    worker_give_extents (w);
}

uint8_t *
worker_payload (struct worker *w, uint32_t length)
{
  if (length <= SMALL_PAYLOAD)
    w->payload = small_payload (w);
  else if (length <= w->large_capacity)
    w->payload = w->large;
  else {
    free_large (w);
    worker_give_extents (w);
    w->large = budget_take (w->connection, length, &w->large_capacity);
    if (w->large == NULL)
      w->large_capacity = 0;
    w->payload = w->large;
  }
  return w->payload;
}

/* How long to wait before less is told. */
#define EXTENTS_PATIENCE_MS (10 * 1000)

bool
worker_extents_room (struct extents *e, size_t size)
{
  if (size <= SMALL_EXTENTS || size <= e->reserved)
    return true;
  if (!budget_reserve (e->connection, size - e->reserved,
                       EXTENTS_PATIENCE_MS))
    return false;
  e->reserved = size;
  return true;
}

void
worker_end_request (struct worker *w)
{
  if (w->large != NULL)
    free_large (w);
  if (!w->has_role || w->extents.reserved > KEPT_EXTENTS ||
      budget_is_short (&w->connection->server->budget))
    worker_give_extents (w);
}

void
worker_trim (struct worker *w)
{
  free_large (w);
  free_extents (&w->extents);
  if (w->small != NULL)
    munmap (w->small, SMALL_PAYLOAD);
  w->small = NULL;
}

static void
worker_free (struct worker *w)
{
  if (w == NULL)
    return;
  worker_trim (w);
  buffer_free (w->output, OUTPUT_SIZE);
  free (w);
}

static struct worker *
worker_new (struct connection *c)
{
  struct worker *w = calloc (1, sizeof *w);

  if (w == NULL)
    return NULL;
  w->connection = c;
  w->extents.connection = c;
  w->output = buffer_new (OUTPUT_SIZE);
  if (w->output == NULL) {
    free (w);
    return NULL;
  }
  return w;
}

static void
work (struct worker *w)
{
  while (role_acquire (w)) {
    while (w->has_role) {
      if (request_serve (w) == -1)
        role_end_input (w);
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
connection_add_worker (struct connection *c)
{
  atomic_uint *count = &c->server->nr_extra_threads;
  struct worker *w = NULL;

  /* As with memory: no more of one connection than are left for others. */
  if (atomic_fetch_add (count, 1) + c->nr_workers <=
      c->server->max_extra_threads)
    w = worker_new (c);
  if (w == NULL || thread_create (&w->thread, worker_main, w) != 0) {
    worker_free (w);
    atomic_fetch_sub (count, 1);
    return;
  }
  c->workers[c->nr_workers++] = w;
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

/* Off the list of live ones, and on that of finished ones. */
static void
finish (struct connection *c)
{
  struct nbd_server *server = c->server;

  ACQUIRE_LOCK_FOR_CURRENT_SCOPE (&server->lock);
  stats_connection_closed (server->stats);
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

static void *
connection_main (void *vp)
{
  struct worker *w = vp;
  struct connection *c = w->connection;

  trace_thread (w);
  if (handshake (w) == 0) {
    stream_begin_requests (&c->stream, request_header_size (c));
    server_handshake_done (c);
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
  finish (c);
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
