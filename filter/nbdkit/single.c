/* nbdkit-dirty-bitmap-filter
 * SPDX-License-Identifier: BSD-3-Clause
 * Copyright the nbdkit-dirty-bitmap-filter authors
 */

/* The client of nbdkit -s, on standard input and output.
 *
 * How this works
 *
 * With -s, nbdkit moves standard input and output away after get_ready.
 * Later, on its main thread, it calls preconnect and then talks to the
 * client on them.  So in get_ready we take them first, and nbdkit moves away
 * an eventfd that is never written to.  nbdkit never talks on that:
 * preconnect lasts as long as our server serves the client, and then refuses
 * nbdkit's connection.  nbdkit then ends, as it does when its only client
 * has disconnected.
 *
 * If both are the same stream socket, it becomes a connection of our server
 * as if it had been accepted.  The server only handles sockets: for pipes
 * and anything else it gets one end of a socket pair, and two threads carry
 * the bytes between the other end and the client.  Then the client counts as
 * disconnected when everything for it was written, or cannot be.
 *
 * There is no lock: what the threads use is set before they start.
 */

#include <config.h>

#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <poll.h>
#include <pthread.h>
#include <stdint.h>
#include <string.h>
#include <sys/eventfd.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <unistd.h>

#include <nbdkit-filter.h>

#include "common/bytes.h"
#include "common/cleanup.h"
#include "common/report.h"
#include "common/threads.h"
#include "nbd/nbd.h"
#include "nbdkit/single.h"

/* How soon this notices that nbdkit must end for another reason. */
#define LOOK_MS 200

#define RELAY_SIZE (64 * 1024)

static struct {
  bool taken;
  int in, out;                  /* the client's, or -1 */
  int ended;                    /* an eventfd: the client has disconnected */
  int woken;                    /* an eventfd: nbdkit must end */

  /* The relay. */
  bool relays;
  int sock;                     /* its end of the pair */
  int stop;                     /* an eventfd: the threads must end */
  pthread_t to_server, to_client;
} s = { .in = -1, .out = -1, .ended = -1, .woken = -1, .sock = -1,
        .stop = -1 };

static void
close_fd (int *fd)
{
  if (*fd != -1)
    close (*fd);
  *fd = -1;
}

int
single_take (void)
{
  CLEANUP_CLOSE int silent = -1;

  s.in = fcntl (STDIN_FILENO, F_DUPFD_CLOEXEC, STDERR_FILENO + 1);
  s.out = fcntl (STDOUT_FILENO, F_DUPFD_CLOEXEC, STDERR_FILENO + 1);
  if (s.in == -1 || s.out == -1) {
    report_error ("standard input and output: %m");
    return -1;
  }
  silent = eventfd (0, EFD_CLOEXEC);
  s.ended = eventfd (0, EFD_CLOEXEC);
  s.woken = eventfd (0, EFD_CLOEXEC);
  if (silent == -1 || s.ended == -1 || s.woken == -1 ||
      dup2 (silent, STDIN_FILENO) == -1 ||
      dup2 (silent, STDOUT_FILENO) == -1) {
    report_error ("eventfd: %m");
    return -1;
  }
  s.taken = true;
  return 0;
}

bool
single_is_taken (void)
{
  return s.taken;
}

static bool
is_one_socket (void)
{
  struct stat in, out;
  int type = 0;
  socklen_t length = sizeof type;

  return fstat (s.in, &in) == 0 && fstat (s.out, &out) == 0 &&
    S_ISSOCK (in.st_mode) &&
    in.st_dev == out.st_dev && in.st_ino == out.st_ino &&
    getsockopt (s.in, SOL_SOCKET, SO_TYPE, &type, &length) == 0 &&
    type == SOCK_STREAM;
}

/* Our server expects its calls to block. */
static int
set_blocking (int fd)
{
  const int flags = fcntl (fd, F_GETFL);

  return flags == -1 ? -1 : fcntl (fd, F_SETFL, flags & ~O_NONBLOCK);
}

/* Wait until a descriptor is ready.  False if it is time to stop. */
static bool
wait_for (int fd, short events)
{
  struct pollfd fds[2] = {
    { .fd = fd, .events = events },
    { .fd = s.stop, .events = POLLIN },
  };

  while (poll (fds, 2, -1) == -1)
    if (errno != EINTR)
      return false;
  return fds[1].revents == 0;
}

/* Write some of buf, and do not sleep: a pipe that is ready for writing has
 * room for PIPE_BUF bytes.
 */
static ssize_t
write_some (int fd, const uint8_t *buf, size_t count)
{
  const ssize_t r = send (fd, buf, count, MSG_DONTWAIT | MSG_NOSIGNAL);

  if (r == -1 && errno == ENOTSOCK)
    return write (fd, buf, min_u64 (count, PIPE_BUF));
  return r;
}

static bool
write_all (int fd, const uint8_t *buf, size_t count)
{
  while (count > 0) {
    ssize_t r;

    if (!wait_for (fd, POLLOUT))
      return false;
    r = write_some (fd, buf, count);
    if (r == -1) {
      if (errno == EAGAIN || errno == EINTR)
        continue;
      return false;
    }
    buf += r;
    count -= r;
  }
  return true;
}

/* Carry bytes until there are no more.  False if they cannot be written, or
 * it is time to stop.
 */
static bool
carry (int from, int to)
{
  uint8_t buf[RELAY_SIZE];
  ssize_t n;

  while (wait_for (from, POLLIN)) {
    n = read (from, buf, sizeof buf);
    if (n == -1 && (errno == EAGAIN || errno == EINTR))
      continue;
    if (n <= 0)
      return true;
    if (!write_all (to, buf, n))
      return false;
  }
  return false;
}

static void *
carry_to_server (void *unused)
{
  (void) unused;
  carry (s.in, s.sock);
  shutdown (s.sock, SHUT_WR);
  return NULL;
}

/* If the client does not receive its replies, the server need not make more. */
static void *
carry_to_client (void *unused)
{
  (void) unused;
  if (!carry (s.sock, s.out))
    shutdown (s.sock, SHUT_RDWR);
  close_fd (&s.out);
  eventfd_write (s.ended, 1);
  return NULL;
}

static int
start_relay (void)
{
  int err = thread_create (&s.to_server, carry_to_server, NULL);

  if (err == 0) {
    err = thread_create (&s.to_client, carry_to_client, NULL);
    if (err == 0) {
      s.relays = true;
      return 0;
    }
    eventfd_write (s.stop, 1);
    pthread_join (s.to_server, NULL);
  }
  errno = err;
  report_error ("pthread_create: %m");
  return -1;
}

static int
serve_by_relay (struct nbd_server *server)
{
  int pair[2];

  s.stop = eventfd (0, EFD_CLOEXEC);
  if (s.stop == -1) {
    report_error ("eventfd: %m");
    return -1;
  }
  if (socketpair (AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0, pair) == -1) {
    report_error ("socketpair: %m");
    return -1;
  }
  nbd_server_add_client (server, pair[0], -1);
  s.sock = pair[1];
  return start_relay ();
}

int
single_serve (struct nbd_server *server)
{
  if (!is_one_socket ())
    return serve_by_relay (server);
  if (set_blocking (s.in) == -1) {
    report_error ("standard input: %m");
    return -1;
  }
  nbd_server_add_client (server, s.in, s.ended);
  s.in = -1;
  close_fd (&s.out);
  return 0;
}

void
single_wait (void)
{
  struct pollfd fds[2] = {
    { .fd = s.ended, .events = POLLIN },
    { .fd = s.woken, .events = POLLIN },
  };

  /* This fails when nbdkit must end, and reports that on stderr. */
  while (nbdkit_nanosleep (0, 1) == 0)
    if (poll (fds, 2, LOOK_MS) > 0)
      break;
}

void
single_wake (void)
{
  if (s.taken)
    eventfd_write (s.woken, 1);
}

void
single_stop (unsigned grace_ms)
{
  struct pollfd ended = { .fd = s.ended, .events = POLLIN };

  if (s.relays) {
    poll (&ended, 1, grace_ms);
    eventfd_write (s.stop, 1);
    pthread_join (s.to_server, NULL);
    pthread_join (s.to_client, NULL);
    s.relays = false;
  }
  close_fd (&s.in);
  close_fd (&s.out);
  close_fd (&s.sock);
  close_fd (&s.stop);
  close_fd (&s.ended);
  close_fd (&s.woken);
}
