/* nbdkit-dirty-bitmap-filter
 * SPDX-License-Identifier: BSD-3-Clause
 * Copyright the nbdkit-dirty-bitmap-filter authors
 */

/* A client's socket.
 *
 * The descriptor has a receive time-out and a send time-out.  When the
 * first fires between two requests, the worker that receives gives its
 * buffers back, and a client that is idle for too long may be
 * disconnected.  The second makes sendmsg return what it has sent, and
 * notices a client that does not read.
 */

#include <config.h>

#include <errno.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <sys/time.h>

#include "common/clock.h"
#include "nbd/socket.h"

/* After how long receiving returns without anything. */
static unsigned
timeout_seconds (unsigned idle_seconds)
{
  return idle_seconds > 0 && idle_seconds < IDLE_SECONDS ? idle_seconds
                                                         : IDLE_SECONDS;
}

/* Those for TCP fail on others. */
void
socket_set_options (int fd, unsigned idle_seconds)
{
  const int on = 1;
  const struct timeval idle = { .tv_sec = timeout_seconds (idle_seconds) };
  const struct timeval send = { .tv_sec = SEND_SECONDS };

  setsockopt (fd, IPPROTO_TCP, TCP_NODELAY, &on, sizeof on);
  setsockopt (fd, SOL_SOCKET, SO_KEEPALIVE, &on, sizeof on);
  setsockopt (fd, SOL_SOCKET, SO_RCVTIMEO, &idle, sizeof idle);
  setsockopt (fd, SOL_SOCKET, SO_SNDTIMEO, &send, sizeof send);
}

/* Only one thread at a time counts. */
static void
count (atomic_uint_fast64_t *bytes, size_t n)
{
  atomic_store_explicit (bytes, n + atomic_load_explicit
                         (bytes, memory_order_relaxed),
                         memory_order_relaxed);
}

/* A call may take as long as the client likes, so before each the
 * connection's state is checked.
 */
ssize_t
socket_receive (struct socket *s, struct msghdr *msg, int flags)
{
  ssize_t r;

  do {
    if (socket_is_stopping (s) || socket_is_dead (s)) {
      errno = ESHUTDOWN;
      return -1;
    }
    r = recvmsg (s->fd, msg, flags);
  } while (r == -1 && errno == EINTR);
  if (r > 0)
    count (&s->received, r);
  return r;
}

/* Sending has failed: because nothing could be sent for SEND_SECONDS, and
 * may that be tried again?
 */
static bool
may_wait (const struct socket *s, int64_t *since)
{
  const int64_t limit = s->idle_seconds * INT64_C (1000);

  if (errno != EAGAIN || atomic_load (&s->dead))
    return false;
  if (*since == 0)
    *since = now_ms () - SEND_SECONDS * 1000;
  return limit == 0 || now_ms () - *since < limit;
}

ssize_t
socket_send (struct socket *s, const struct msghdr *msg, int flags,
             int64_t *since)
{
  for (;;) {
    ssize_t r;

    if (socket_is_dead (s)) {
      errno = ESHUTDOWN;
      return -1;
    }
    r = sendmsg (s->fd, msg, MSG_NOSIGNAL | flags);
    if (r != -1) {
      count (&s->sent, r);
      *since = 0;
      return r;
    }
    if (errno != EINTR &&
        ((flags & MSG_DONTWAIT) != 0 || !may_wait (s, since)))
      return -1;
  }
}

bool
socket_idle_too_long (struct socket *s, int64_t *since)
{
  const int64_t limit = s->idle_seconds * INT64_C (1000);
  const int64_t now = now_ms ();

  if (limit == 0)
    return false;
  if (*since == 0)
    *since = now - timeout_seconds (s->idle_seconds) * 1000;
  if (now - *since < limit)
    return false;
  socket_ending (s, "idle for too long", 0);
  return true;
}

void
socket_ending (struct socket *s, const char *why, int err)
{
  const char *nothing = NULL;

  if (atomic_load (s->stopping)) {
    why = "the server stops";
    err = 0;
  }
  if (atomic_compare_exchange_strong (&s->ending, &nothing, why))
    atomic_store (&s->ending_errno, err);
}

void
socket_cut (struct socket *s)
{
  atomic_store (&s->dead, true);
  shutdown (s->fd, SHUT_RDWR);
}
