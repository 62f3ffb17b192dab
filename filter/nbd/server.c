/* nbdkit-dirty-bitmap-filter
 * SPDX-License-Identifier: BSD-3-Clause
 * Copyright the nbdkit-dirty-bitmap-filter authors
 */

/* Listening sockets, the list of connections, start and stop.
 *
 * One thread waits for clients on all sockets, and joins the threads of
 * connections that have ended; an eventfd wakes it.  Nothing that a
 * client does makes it wait: a connection's handshake is done by the
 * connection's own thread.
 *
 * Stopping is begun by any thread and goes on in the one that accepts, so
 * that nothing the caller does in between delays it, nor a client:
 *
 * - No more clients are accepted.  Every connection takes nothing more
 *   from its socket, executes what it has received whole, and answers.
 * - After the grace time the connections are cut.  No thread is left in
 *   sendmsg, or waits for memory.  From then on nothing is begun for these
 *   clients: no queued request, and no further part of one (request.c).
 *   What is inside the disk then, and long, ends early (disk_hurry).
 *
 * nbd_server_stop then waits for the last calls of the disk, and joins.
 */

#include <config.h>

#include <assert.h>
#include <errno.h>
#include <fcntl.h>
#include <poll.h>
#include <stdlib.h>
#include <string.h>
#include <sys/eventfd.h>
#include <sys/socket.h>
#include <time.h>
#include <unistd.h>

#include "common/cleanup.h"
#include "common/clock.h"
#include "common/lock.h"
#include "common/report.h"
#include "common/threads.h"
#include "disk/disk.h"
#include "nbd/bounds.h"
#include "nbd/client-errors.h"
#include "nbd/contexts.h"
#include "nbd/debug.h"
#include "nbd/monitor.h"
#include "nbd/roster.h"
#include "nbd/server.h"
#include "stats/stats.h"

/* How long to wait when there are no descriptors or memory for another
 * client.
 */
#define ACCEPT_PAUSE_MS 100

static uint32_t
preferred_block_size (struct disk *disk)
{
  uint32_t size = disk_preferred_block_size (disk), p = 4096;

  while (p < size && p < NBD_MAX_PAYLOAD)
    p *= 2;
  return p;
}

/* Where there can be one client alone, none is invited to connect twice. */
static uint16_t
transmission_flags (const struct disk *disk, bool readonly,
                    unsigned max_connections)
{
  const struct disk_abilities can = disk_can (disk);
  uint16_t flags = NBD_FLAG_HAS_FLAGS |
    (max_connections != 1 ? NBD_FLAG_CAN_MULTI_CONN : 0) |
    (can.flush ? NBD_FLAG_SEND_FLUSH | NBD_FLAG_SEND_FUA : 0) |
    (can.cache ? NBD_FLAG_SEND_CACHE : 0) |
    (can.is_rotational ? NBD_FLAG_ROTATIONAL : 0);

  if (readonly)
    return flags | NBD_FLAG_READ_ONLY;
  return flags |
    (can.trim ? NBD_FLAG_SEND_TRIM : 0) |
    (can.zero ? NBD_FLAG_SEND_WRITE_ZEROES : 0) |
    (can.zero_fast ? NBD_FLAG_SEND_FAST_ZERO : 0);
}

static int
init_locks (struct nbd_server *server)
{
  if (monotonic_cond_init (&server->changed) == -1)
    return -1;
  pthread_cond_init (&server->teams.monitor_wake, NULL);
  pthread_mutex_init (&server->lock, NULL);
  pthread_mutex_init (&server->teams.monitor_lock, NULL);
  limit_init (&server->errors);
  return 0;
}

static void
complete_limits (struct nbd_limits *limits)
{
  if (limits->connections == 0)
    limits->connections = NBD_DEFAULT_CONNECTIONS;
  if (limits->handshake_seconds == 0)
    limits->handshake_seconds = NBD_DEFAULT_HANDSHAKE_SECONDS;
  if (limits->requests == 0)
    limits->requests = NBD_MAX_REQUESTS;
  if (limits->memory == 0)
    limits->memory = NBD_DEFAULT_MEMORY;
  bounds_for_descriptors (limits);
}

static void
fill_service (struct service *s, struct disk *disk,
              const struct nbd_options *options)
{
  s->disk = disk;
  s->size = disk_size (disk);
  s->preferred_block_size = preferred_block_size (disk);
  s->readonly = options->readonly || disk_is_readonly (disk);
  s->eflags = transmission_flags (disk, s->readonly,
                                  options->limits.connections);
  s->tls = options->tls;
  s->limits = options->limits;
  complete_limits (&s->limits);
  s->export = options->export;
  s->stats = options->stats;
}

struct nbd_server *
nbd_server_new (struct disk *disk, const struct nbd_options *options)
{
  struct nbd_server *server = calloc (1, sizeof *server);

  if (server == NULL)
    return NULL;
  fill_service (&server->service, disk, options);
  server->service.errors = &server->errors;
  server->last_left = options->last_left;
  server->client_fd = server->ended_fd = -1;
  server->wake_fd = eventfd (0, EFD_CLOEXEC | EFD_NONBLOCK);
  if (server->wake_fd == -1 ||
      bounds_divide (server) == -1 || init_locks (server) == -1) {
    int saved_errno = errno;

    if (server->wake_fd != -1)
      close (server->wake_fd);
    free (server);
    errno = saved_errno;
    return NULL;
  }
  if (server->service.limits.connections < options->limits.connections)
    report_warning ("nbd: %u connections at most, not %u: memory, or the "
                    "limit of open files, does not allow for more",
                    server->service.limits.connections,
                    options->limits.connections);
  return server;
}

int
nbd_server_add_socket (struct nbd_server *server, int fd)
{
  CLEANUP_CLOSE int owned = fd;
  int flags = fcntl (fd, F_GETFL);
  int *sockets;

  /* A client that is gone again before accept must not hold us up. */
  if (flags == -1 || fcntl (fd, F_SETFL, flags | O_NONBLOCK) == -1)
    return -1;
  sockets = reallocarray (server->sockets, server->nr_sockets + 1,
                          sizeof sockets[0]);
  if (sockets == NULL)
    return -1;
  sockets[server->nr_sockets++] = fd;
  server->sockets = sockets;
  owned = -1;
  return 0;
}

static void
add_connection (struct nbd_server *server, int fd)
{
  struct connection *c;

  ACQUIRE_LOCK_FOR_CURRENT_SCOPE (&server->lock);
  c = server->nr_live < server->service.limits.connections
    ? connection_start (server, fd) : NULL;
  if (c == NULL) {
    debug_request ("nbd: client refused, %u are connected", server->nr_live);
    stats_connection_refused (server->service.stats);
    close (fd);
    return;
  }
  stats_connection_opened (server->service.stats);
  roster_add (c);
}

void
nbd_server_add_client (struct nbd_server *server, int fd, int ended)
{
  server->client_fd = fd;
  server->ended_fd = ended;
}

/* Called when the threads run. */
static void
start_client (struct nbd_server *server)
{
  if (server->client_fd == -1)
    return;
  socket_set_options (server->client_fd, server->service.limits.idle_seconds);
  add_connection (server, server->client_fd);

  /* The time of its handshake is to be looked at. */
  server_wake (server);

  ACQUIRE_LOCK_FOR_CURRENT_SCOPE (&server->lock);
  if (server->client_fd == -1)
    return;
  /* There is no connection, and the descriptor is closed. */
  server->client_fd = -1;
  if (server->ended_fd != -1)
    eventfd_write (server->ended_fd, 1);
}

/* Take one client.  False if that had better be tried again later. */
static bool
accept_one (struct nbd_server *server, int sock)
{
  int fd = accept4 (sock, NULL, NULL, SOCK_CLOEXEC);

  if (fd == -1)
    return errno == EAGAIN || errno == ECONNABORTED || errno == EINTR;
  socket_set_options (fd, server->service.limits.idle_seconds);
  add_connection (server, fd);
  return true;
}

static void
join_finished (struct nbd_server *server)
{
  struct connection *c = roster_take_finished (server);

  while (c != NULL) {
    struct connection *next = c->next;

    connection_join (c);
    c = next;
  }
}

static int
shorter (int a, int b)
{
  return a == -1 || (b != -1 && b < a) ? b : a;
}

/* Sleep until there is something to do: a client on one of the sockets,
 * if pause_ms is 0, or else on none of them for so long; or what
 * bounds_look waits for.  Returns as poll does.
 */
static int
wait_for_clients (struct nbd_server *server, int pause_ms, nfds_t *nr)
{
  const int look_ms = bounds_look (server);
  int wait_ms = 0;

  if (pause_ms == 0 && bounds_admit (server, &wait_ms) == WAIT)
    pause_ms = wait_ms;
  *nr = pause_ms == 0 ? server->nr_sockets + 1 : 1;
  return poll (server->pollfds, *nr,
               shorter (look_ms, pause_ms == 0 ? -1 : pause_ms));
}

/* Take clients from the sockets that have one, and for which there is
 * room.  False if there is no room in the process.
 */
static bool
accept_some (struct nbd_server *server, nfds_t nr)
{
  bool can = true;
  int ignored;

  for (nfds_t i = 1; i < nr; ++i)
    if (server->pollfds[i].revents != 0 &&
        bounds_admit (server, &ignored) != WAIT &&
        !accept_one (server, server->pollfds[i].fd))
      can = false;
  return can;
}

static void
close_sockets (struct nbd_server *server)
{
  for (size_t i = 0; i < server->nr_sockets; ++i)
    close (server->sockets[i]);
  free (server->sockets);
  free (server->pollfds);
  server->sockets = NULL;
  server->pollfds = NULL;
  server->nr_sockets = 0;
}

/* Idle connections end at once, the others as soon as they have
 * answered.  One that is still in its handshake has nothing to answer.
 */
static void
end_input_of_all (struct nbd_server *server)
{
  for (struct connection *c = server->live; c != NULL; c = c->next) {
    if (atomic_load (&c->handshaking))
      connection_cut (c);
    else
      shutdown (c->stream.socket.fd, SHUT_RD);
  }
}

/* Wait until no connection lives, but not beyond a time of now_ms.
 * Called with server->lock.
 */
static void
wait_for_connections (struct nbd_server *server, int64_t until_ms)
{
  const struct timespec ts = {
    .tv_sec = until_ms / 1000,
    .tv_nsec = until_ms % 1000 * 1000000,
  };
  int r = 0;

  assert (lock_is_mine (&server->lock));
  while (server->nr_live > 0 && r == 0)
    r = pthread_cond_timedwait (&server->changed, &server->lock, &ts);
}

/* The end of the thread that accepts: no connection is added any more. */
static void
wind_down (struct nbd_server *server)
{
  close_sockets (server);

  ACQUIRE_LOCK_FOR_CURRENT_SCOPE (&server->lock);
  end_input_of_all (server);
  wait_for_connections (server, server->cut_at_ms);
  for (struct connection *c = server->live; c != NULL; c = c->next)
    connection_cut (c);
}

/* Listen to wake_fd only while we cannot take clients, so as not to
 * spin.
 */
static void *
accept_main (void *vp)
{
  struct nbd_server *server = vp;
  struct pollfd *fds = server->pollfds;
  bool can_accept = true;

  while (!atomic_load (&server->stopping)) {
    nfds_t nr;
    int r = wait_for_clients (server, can_accept ? 0 : ACCEPT_PAUSE_MS, &nr);

    can_accept = r != -1;
    if (r <= 0)
      continue;
    if (fds[0].revents != 0) {
      eventfd_t ignored;

      eventfd_read (server->wake_fd, &ignored);
      join_finished (server);
    }
    can_accept = accept_some (server, nr);
  }
  wind_down (server);
  return NULL;
}

static int
make_pollfds (struct nbd_server *server)
{
  struct pollfd *fds = calloc (server->nr_sockets + 1, sizeof *fds);

  if (fds == NULL)
    return -1;
  fds[0].fd = server->wake_fd;
  fds[0].events = POLLIN;
  for (size_t i = 0; i < server->nr_sockets; ++i) {
    fds[i + 1].fd = server->sockets[i];
    fds[i + 1].events = POLLIN;
  }
  server->pollfds = fds;
  return 0;
}

int
nbd_server_start (struct nbd_server *server)
{
  int err;

  if (make_pollfds (server) == -1) {
    report_error ("nbd: %m");
    return -1;
  }
  err = monitor_start (server);
  if (err == 0) {
    err = thread_create (&server->accept_thread, accept_main, server);
    if (err == 0) {
      server->started = true;
      start_client (server);
      return 0;
    }
    monitor_quit (server);
  }
  errno = err;
  report_error ("nbd: cannot create a thread: %m");
  return -1;
}

void
nbd_server_begin_stop (struct nbd_server *server, unsigned grace_ms)
{
  if (!server->started || atomic_load (&server->stopping))
    return;
  server->cut_at_ms = now_ms () + grace_ms;
  disk_hurry (server->service.disk, grace_ms);
  atomic_store (&server->stopping, true);
  server_wake (server);
}

bool
nbd_server_wait (struct nbd_server *server, unsigned patience_ms)
{
  if (!server->started)
    return true;

  ACQUIRE_LOCK_FOR_CURRENT_SCOPE (&server->lock);
  wait_for_connections (server, now_ms () + patience_ms);
  return server->nr_live == 0;
}

void
nbd_server_stop (struct nbd_server *server, unsigned grace_ms)
{
  if (!server->started)
    return;
  nbd_server_begin_stop (server, grace_ms);
  pthread_join (server->accept_thread, NULL);
  {
    ACQUIRE_LOCK_FOR_CURRENT_SCOPE (&server->lock);

    while (server->nr_live > 0)
      pthread_cond_wait (&server->changed, &server->lock);
  }
  server->started = false;
  join_finished (server);
  monitor_quit (server);
  client_errors_end (&server->errors);
}

void
nbd_server_free (struct nbd_server *server)
{
  if (server == NULL)
    return;
  close_sockets (server);
  if (server->client_fd != -1)
    close (server->client_fd);
  close (server->wake_fd);
  pthread_mutex_destroy (&server->lock);
  pthread_mutex_destroy (&server->teams.monitor_lock);
  limit_destroy (&server->errors);
  budget_free (&server->budget);
  pthread_cond_destroy (&server->changed);
  pthread_cond_destroy (&server->teams.monitor_wake);
  free (server);
}
