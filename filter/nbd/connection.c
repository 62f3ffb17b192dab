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
 * Payload buffers grow to what a request needs, and are given back when
 * the worker has been idle for a while.  They are mapped, not malloc'ed,
 * so that giving back is certain.
 */

#include <config.h>

#include <errno.h>
#include <stdlib.h>
#include <sys/eventfd.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <time.h>
#include <unistd.h>

#include "common/bytes.h"
#include "common/cleanup.h"
#include "nbd/internal.h"

#define MIN_PAYLOAD_CAPACITY (64 * 1024)

static void
free_payload (struct worker *w)
{
  if (w->payload != NULL)
    munmap (w->payload, w->payload_capacity);
  w->payload = NULL;
  w->payload_capacity = 0;
}

uint8_t *
worker_payload (struct worker *w, uint32_t length)
{
  size_t capacity = MIN_PAYLOAD_CAPACITY;
  void *p;

  if (length <= w->payload_capacity)
    return w->payload;

  while (capacity < length)
    capacity *= 2;
  free_payload (w);
  p = mmap (NULL, capacity, PROT_READ | PROT_WRITE,
            MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (p == MAP_FAILED)
    return NULL;
  w->payload = p;
  w->payload_capacity = capacity;
  return p;
}

void
worker_trim (struct worker *w)
{
  free_payload (w);
  free (w->extents.wire);
  w->extents.wire = NULL;
  w->extents.capacity = 0;
}

static void
worker_free (struct worker *w)
{
  if (w == NULL)
    return;
  worker_trim (w);
  free (w->output);
  free (w);
}

static struct worker *
worker_new (struct connection *c)
{
  struct worker *w = calloc (1, sizeof *w);

  if (w == NULL)
    return NULL;
  w->connection = c;
  w->output = malloc (OUTPUT_SIZE);
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
  work (vp);
  return NULL;
}

void
connection_add_worker (struct connection *c)
{
  atomic_uint *count = &c->server->nr_extra_threads;
  struct worker *w = NULL;

  if (atomic_fetch_add (count, 1) < MAX_EXTRA_THREADS)
    w = worker_new (c);
  if (w == NULL || server_create_thread (&w->thread, worker_main, w) != 0) {
    worker_free (w);
    atomic_fetch_sub (count, 1);
    return;
  }
  c->workers[c->nr_workers++] = w;
}

void
connection_cut (struct connection *c)
{
  atomic_store (&c->dead, true);
  shutdown (c->fd, SHUT_RDWR);
}

/* Closing a TCP socket with bytes unread resets the connection, and
 * replies on their way may be lost.  So when it is we who end, say so,
 * and throw away what has come.
 */
static void
linger (struct connection *c)
{
  if (c->tls != NULL)
    tls_bye (c);
  shutdown (c->fd, SHUT_WR);
  for (unsigned i = 0; i < 64; ++i)
    if (recv (c->fd, c->in.data, INPUT_SIZE, MSG_DONTWAIT) <= 0)
      break;
}

static void
connection_free (struct connection *c)
{
  for (unsigned i = 0; i < c->nr_workers; ++i)
    worker_free (c->workers[i]);
  pthread_mutex_destroy (&c->lock);
  pthread_mutex_destroy (&c->send_lock);
  pthread_cond_destroy (&c->role_freed);
  tls_free (c->tls);
  free (c->contexts);
  free (c->in.data);
  free (c);
}

/* Off the list of live ones, and on that of finished ones. */
static void
finish (struct connection *c)
{
  struct nbd_server *server = c->server;

  ACQUIRE_LOCK_FOR_CURRENT_SCOPE (&server->lock);
  if (c->prev != NULL)
    c->prev->next = c->next;
  else
    server->live = c->next;
  if (c->next != NULL)
    c->next->prev = c->prev;
  close (c->fd);
  c->fd = -1;
  c->next = server->finished;
  server->finished = c;
  server->nr_live--;
  pthread_cond_broadcast (&server->changed);
  eventfd_write (server->wake_fd, 1);
}

static void *
connection_main (void *vp)
{
  struct worker *w = vp;
  struct connection *c = w->connection;

  if (handshake (w) == 0) {
    atomic_store (&c->handshaking, false);
    work (w);
    /* Input has ended, so nobody adds a worker any more. */
    for (unsigned i = 1; i < c->nr_workers; ++i)
      pthread_join (c->workers[i]->thread, NULL);
  }
  linger (c);
  atomic_fetch_sub (&c->server->nr_extra_threads, c->nr_workers - 1);
  finish (c);
  return NULL;
}

static int
init_locks (struct connection *c)
{
  pthread_condattr_t attr;

  if (pthread_condattr_init (&attr) != 0)
    return -1;
  pthread_condattr_setclock (&attr, CLOCK_MONOTONIC);
  pthread_cond_init (&c->role_freed, &attr);
  pthread_condattr_destroy (&attr);
  pthread_mutex_init (&c->lock, NULL);
  pthread_mutex_init (&c->send_lock, NULL);
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
  c->fd = fd;
  atomic_store (&c->handshaking, true);
  disk_client_begin (server->disk, &c->client);
  c->in.data = malloc (INPUT_SIZE);
  w = worker_new (c);
  if (c->in.data == NULL || w == NULL || init_locks (c) == -1) {
    worker_free (w);
    free (c->in.data);
    free (c);
    return NULL;
  }
  c->workers[c->nr_workers++] = w;

  if (server_create_thread (&w->thread, connection_main, w) != 0) {
    connection_free (c);
    return NULL;
  }
  return c;
}

void
connection_join (struct connection *c)
{
  pthread_join (c->workers[0]->thread, NULL);
  connection_free (c);
}
