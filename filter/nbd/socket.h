/* nbdkit-dirty-bitmap-filter
 * SPDX-License-Identifier: BSD-3-Clause
 * Copyright the nbdkit-dirty-bitmap-filter authors
 */

#ifndef DIRTY_BITMAP_NBD_SOCKET_H
#define DIRTY_BITMAP_NBD_SOCKET_H

/* A client's socket: bytes as the kernel has them, how long a client may
 * be idle, and whether the connection has ended and why.
 *
 * No locks.  One thread at a time receives, and one sends.
 */

#include <stdatomic.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <sys/socket.h>
#include <sys/types.h>

/* A receive call that finds nothing returns after so many seconds, and a
 * send call to a client that does not read after so many.
 */
#define IDLE_SECONDS 5
#define SEND_SECONDS 2

struct socket {
  /* Constant while threads use it. */
  int fd;
  unsigned idle_seconds;        /* a limit, or 0: there is none */
  const atomic_bool *stopping;  /* the server's: receive nothing more */

  atomic_bool dead;             /* sending failed, or the server cut it */
  _Atomic (const char *) ending;        /* why it ends, or NULL */
  atomic_int ending_errno;      /* or 0 */

  /* The receiver's.  Others may read them. */
  atomic_uint_fast64_t received; /* bytes */
  atomic_bool is_receiving;     /* a payload */

  /* The sender's.  Others may read them. */
  atomic_uint_fast64_t sent;    /* bytes */
  atomic_bool is_sending;
};

/* Set the options of a client's socket. */
extern void socket_set_options (int fd, unsigned idle_seconds);

/* Receive as recvmsg does.  -1 with ESHUTDOWN if that is of no use any
 * more, with EAGAIN if nothing came for IDLE_SECONDS.
 */
extern ssize_t socket_receive (struct socket *, struct msghdr *, int flags);

/* Send as sendmsg does, some of it at least; wait for the client to read,
 * unless flags have MSG_DONTWAIT.  *since is 0 before the first call.  -1
 * with errno if the connection is of no use any more.
 */
extern ssize_t socket_send (struct socket *, const struct msghdr *,
                            int flags, int64_t *since);

/* A receive call has found nothing.  Has the client been idle for so long
 * now that the connection is to end?  *since is 0 after anything was
 * received.
 */
extern bool socket_idle_too_long (struct socket *, int64_t *since);

/* The connection ends, with an errno, or 0.  The first reason counts. */
extern void socket_ending (struct socket *, const char *why, int err);

/* End it now: wake the threads that wait for the client, and let none
 * wait for it again.
 */
extern void socket_cut (struct socket *);

static inline bool
socket_is_dead (const struct socket *s)
{
  return atomic_load_explicit (&s->dead, memory_order_relaxed);
}

static inline bool
socket_is_stopping (const struct socket *s)
{
  return atomic_load_explicit (s->stopping, memory_order_relaxed);
}

#endif /* DIRTY_BITMAP_NBD_SOCKET_H */
