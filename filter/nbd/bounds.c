/* nbdkit-dirty-bitmap-filter
 * SPDX-License-Identifier: BSD-3-Clause
 * Copyright the nbdkit-dirty-bitmap-filter authors
 */

/* What clients may use at most: which are let in, and which are cut.
 *
 * All of it is done by the thread that accepts, between two clients, or
 * when there is something to be looked at.  It looks at the list of
 * connections and never waits for one: cutting is shutting down.
 *
 * The handshake.  All of it, TLS included, has one deadline, however the
 * client spends its time.  Connections in the handshake may be half of
 * all.  If there are no more places, the oldest one in the handshake has
 * to go, but each may keep its place for a second (place_ms), or for a
 * quarter of that if its client has not said a word, and meanwhile
 * newcomers wait in the backlog: so a crowd that comes at once is let in,
 * and clients that come to occupy places occupy them for a second each.  A
 * connection that is through the handshake is never cut for a newcomer.
 *
 * Memory (budget.c).  A connection holds memory on account of its client
 * while it receives a payload or sends replies.  It is cut if a worker of
 * another one waits for memory, and its own client has not moved
 * STALL_BYTES for stall_ms.  What is sent is counted when a call returns,
 * so on a Unix socket it is SEND_SIZE (stream.c) that the client must take
 * in that time.  A connection that waits for memory and stalls does not
 * count as waiting.
 */

#include <config.h>

#include <assert.h>
#include <errno.h>
#include <sys/resource.h>

#include "common/bytes.h"
#include "common/cleanup.h"
#include "common/clock.h"
#include "common/lock.h"
#include "disk/disk.h"
#include "nbd/bounds.h"
#include "nbd/client-errors.h"
#include "nbd/connection.h"
#include "nbd/debug.h"
#include "nbd/server.h"

unsigned place_ms = 1000;
unsigned stall_ms = 5000;
unsigned trim_ms = IDLE_SECONDS * 1000;

#define STALL_BYTES (64 * 1024)

/* How often to look at connections while memory is short. */
#define LOOK_MS 250

/* Descriptors that are not for clients. */
#define SPARE_DESCRIPTORS 64

void
bounds_for_descriptors (struct nbd_limits *limits)
{
  struct rlimit limit;
  rlim_t most;

  if (getrlimit (RLIMIT_NOFILE, &limit) == -1 ||
      limit.rlim_cur == RLIM_INFINITY)
    return;
  most = limit.rlim_cur > 2 * SPARE_DESCRIPTORS
    ? limit.rlim_cur - SPARE_DESCRIPTORS : limit.rlim_cur / 2;
  limits->connections = max_u64 (1, min_u64 (limits->connections, most));
}

/* What TLS costs a connection. */
#define TLS_COST (320 * 1024)

/* What threads have touched of their stacks; more than was measured. */
#define STACK_COST (64 * 1024)

/* Names, selected contexts, the structs themselves. */
#define HANDSHAKE_COST (48 * 1024)

#define WORKER_COST                                             \
  (STACK_COST + OUTPUT_SIZE + SMALL_PAYLOAD + SMALL_EXTENTS)

/* A context that is selected: its id, and its bitmap (session.h). */
#define CONTEXT_COST (sizeof (uint32_t) + sizeof (struct disk_offer *))

/* Of a client that selects all bitmaps that there are at the start.  Those
 * that are added later are few, and HANDSHAKE_COST has room for some
 * thousands.
 */
static size_t
contexts_cost (const struct disk *disk)
{
  struct disk_offers *offers = disk_offers_get (disk);
  const size_t nr = disk_offers_nr (offers);

  disk_offers_put (offers);
  return nr * CONTEXT_COST;
}

static size_t
connection_cost (const struct nbd_server *server)
{
  return WORKER_COST + INPUT_SIZE + HANDSHAKE_COST +
    contexts_cost (server->service.disk) +
    (server->service.tls != NULL ? TLS_COST : 0);
}

/* Connections get up to a half.  Threads besides one a connection get
 * what is left of five eighths.
 */
int
bounds_divide (struct nbd_server *server)
{
  struct nbd_limits *limits = &server->service.limits;
  const size_t cost = connection_cost (server);
  const uint64_t fixed = limits->memory / 8 * 5;

  if (limits->memory / 2 / cost == 0) {
    errno = EINVAL;
    return -1;
  }
  limits->connections = min_u64 (limits->connections,
                                 limits->memory / 2 / cost);
  server->teams.max_extra_threads =
    min_u64 ((fixed - limits->connections * cost) / WORKER_COST,
             (uint64_t) limits->connections * (limits->requests - 1));
  server->teams.max_workers = limits->requests;
  return budget_init (&server->budget, limits->memory - fixed,
                      server->wake_fd);
}

/* The one in the handshake that came first, and is not cut already.
 * Called with server->lock.  The list begins with the one that came last.
 */
static struct connection *
oldest_handshake (struct nbd_server *server)
{
  struct connection *oldest = NULL;

  assert (lock_is_mine (&server->lock));
  for (struct connection *c = server->live; c != NULL; c = c->next)
    if (atomic_load (&c->handshaking) && !atomic_load (&c->stream.socket.dead))
      oldest = c;
  return oldest;
}

enum admission
bounds_admit (struct nbd_server *server, int *wait_ms)
{
  const struct nbd_limits *limits = &server->service.limits;
  struct connection *oldest;
  int64_t age, place;

  ACQUIRE_LOCK_FOR_CURRENT_SCOPE (&server->lock);
  server->crowded = false;
  if (server->nr_live < limits->connections &&
      server->nr_handshaking < (limits->connections + 1) / 2)
    return ADMIT;
  if (server->nr_handshaking == 0 && !limits->others_wait)
    return REFUSE;

  /* Each that ends, or is through the handshake, wakes us. */
  server->crowded = true;
  *wait_ms = -1;
  if (server->nr_cut > 0)
    return WAIT;
  oldest = oldest_handshake (server);
  if (oldest == NULL)
    return WAIT;
  place = atomic_load_explicit (&oldest->stream.socket.received,
                                memory_order_relaxed) > 0
    ? place_ms : place_ms / 4;
  age = now_ms () - oldest->started_ms;
  if (age < place) {
    *wait_ms = place - age;
    return WAIT;
  }
  debug_request ("nbd: a client that is slow in its handshake is cut off "
                 "to make room");
  server->nr_cut++;
  oldest->cut_for_room = true;
  socket_ending (&oldest->stream.socket,
                 "slow, and others wait for its place", 0);
  connection_cut (oldest);
  return WAIT;
}

static void
sooner (int *wait_ms, int64_t ms)
{
  if (ms < 0)
    ms = 0;
  if (*wait_ms == -1 || *wait_ms > ms)
    *wait_ms = ms;
}

/* Called with server->lock. */
static void
look_at_handshakes (struct nbd_server *server, int64_t now, int *wait_ms)
{
  const int64_t limit =
    server->service.limits.handshake_seconds * INT64_C (1000);

  assert (lock_is_mine (&server->lock));
  if (server->nr_handshaking == 0)
    return;
  for (struct connection *c = server->live; c != NULL; c = c->next) {
    if (!atomic_load (&c->handshaking) || atomic_load (&c->stream.socket.dead))
      continue;
    if (now - c->started_ms < limit)
      sooner (wait_ms, c->started_ms + limit - now);
    else {
      client_error (server->service.errors,
                    "nbd: a client has not finished its handshake "
                    "in %u seconds: its connection is closed",
                    server->service.limits.handshake_seconds);
      socket_ending (&c->stream.socket, "too slow", 0);
      connection_cut (c);
    }
  }
}

static bool
stalls (struct connection *c, int64_t now)
{
  const struct socket *s = &c->stream.socket;
  const uint64_t moved =
    atomic_load_explicit (&s->received, memory_order_relaxed) +
    atomic_load_explicit (&s->sent, memory_order_relaxed);

  if (!(atomic_load_explicit (&s->is_receiving, memory_order_relaxed) ||
        atomic_load_explicit (&s->is_sending, memory_order_relaxed)) ||
      c->stalled_since == 0 || moved - c->moved >= STALL_BYTES) {
    c->moved = moved;
    c->stalled_since = now;
  }
  return now - c->stalled_since >= stall_ms;
}

/* Called with server->lock. */
static void
look_for_stalls (struct nbd_server *server, int64_t now)
{
  bool one_waits = false;

  assert (lock_is_mine (&server->lock));
  for (struct connection *c = server->live; c != NULL; c = c->next) {
    ACQUIRE_LOCK_FOR_CURRENT_SCOPE (&server->budget.lock);

    if (!stalls (c, now) && c->account.waiting > 0)
      one_waits = true;
    c->holds_memory = c->account.held > 0;
  }
  if (!one_waits)
    return;
  for (struct connection *c = server->live; c != NULL; c = c->next)
    if (c->holds_memory && now - c->stalled_since >= stall_ms &&
        !atomic_load (&c->stream.socket.dead)) {
      client_error (server->service.errors,
                    "nbd: a client that holds memory others wait for "
                    "takes or sends almost nothing: its connection is "
                    "closed");
      socket_ending (&c->stream.socket,
                     "it stalls, and holds memory others wait for", 0);
      connection_cut (c);
    }
}

/* None was looked at for a while: begin anew. */
static void
forget_stalls (struct nbd_server *server)
{
  for (struct connection *c = server->live; c != NULL; c = c->next)
    c->stalled_since = 0;
}

int
bounds_look (struct nbd_server *server)
{
  const int64_t now = now_ms ();
  int wait_ms = -1;

  {
    ACQUIRE_LOCK_FOR_CURRENT_SCOPE (&server->lock);

    look_at_handshakes (server, now, &wait_ms);
    if (budget_is_short (&server->budget)) {
      look_for_stalls (server, now);
      sooner (&wait_ms, LOOK_MS);
      server->was_short = true;
    }
    else if (server->was_short) {
      forget_stalls (server);
      server->was_short = false;
    }
  }
  if (now >= server->next_trim && budget_trim (&server->budget))
    server->next_trim = now + trim_ms;
  if (server->next_trim > now)
    sooner (&wait_ms, server->next_trim - now);
  return wait_ms;
}
