/* nbdkit-dirty-bitmap-filter
 * SPDX-License-Identifier: BSD-3-Clause
 * Copyright the nbdkit-dirty-bitmap-filter authors
 */

/* A client's bytes.
 *
 * One recv takes as many pipelined requests as fit into the input
 * buffer.  What a caller asks for beyond the buffered bytes is received
 * straight to where it belongs, and what lies behind it in the socket
 * into the buffer, by the same call.  After a large payload no more
 * than one header is received ahead, because what follows is likely to
 * be a large payload too, and would have to be copied.
 *
 * A client that has several requests in flight on each of several
 * connections sends the next ones one by one while it takes our replies.
 * If we ran as soon as the first comes, we would receive, answer and sleep
 * for each, and the threads of all connections would take turns.  So where
 * requests have come together we let others run before we receive again,
 * and find several.
 *
 * A client that has sent requests together is likely to send the next
 * while we answer these.  For such a brisk client we look again and again
 * for a short while, and let others run in between, before we sleep: to
 * be woken takes longer, and the client that wakes us, too.  When nothing
 * comes the client is brisk no more, until requests come together again.
 *
 * Neither is done for the next request while requests sleep in the disk: then
 * threads execute several of them, here or in the server below, and the CPU is
 * for those.  The rest of a payload is on its way, and is worth it.
 */

#include <config.h>

#include <assert.h>
#include <errno.h>
#include <sched.h>
#include <string.h>

#include "common/buffer.h"
#include "common/bytes.h"
#include "common/lock.h"
#include "nbd/protocol.h"
#include "nbd/stream.h"
#include "nbd/tls.h"

#define LARGE_PAYLOAD (32 * 1024)

/* How often to look for more from a brisk client before sleeping: for ten
 * or twenty microseconds.
 */
#define BRISK_TRIES 40

/* Send so many bytes at most by one call: only when it returns is it seen
 * that the client takes them.  A Unix socket's sendmsg may last as long as
 * the client likes, if the client takes a few now and then.  1 MiB and what
 * is gathered before it leave by one call.
 */
#define SEND_SIZE (1024 * 1024 + 64 * 1024)

int
stream_init (struct stream *s, int fd, unsigned idle_seconds,
             const atomic_bool *stopping)
{
  s->socket.fd = fd;
  s->socket.idle_seconds = idle_seconds;
  s->socket.stopping = stopping;
  s->in.data = buffer_new (INPUT_SIZE);
  if (s->in.data == NULL)
    return -1;
  pthread_mutex_init (&s->send_lock, NULL);
  return 0;
}

void
stream_free (struct stream *s)
{
  tls_free (s->tls);
  buffer_free (s->in.data, INPUT_SIZE);
  pthread_mutex_destroy (&s->send_lock);
}

int
stream_start_tls (struct stream *s, const struct nbd_tls *tls,
                  struct limit *errors)
{
  s->tls = tls_start (&s->socket, tls, errors);
  return s->tls != NULL ? 0 : -1;
}

void
stream_begin_requests (struct stream *s, size_t header_size)
{
  s->in.header_size = header_size;
}

static size_t
buffered (const struct input *in)
{
  return in->end - in->start;
}

static bool
is_encrypted_by_us (const struct stream *s)
{
  return s->tls != NULL && tls_is_ours (s->tls);
}

/* A brisk client has sent nothing in time. */
static bool
is_late (struct stream *s, struct msghdr *msg, ssize_t *r)
{
  for (unsigned i = 0; i < BRISK_TRIES; ++i) {
    *r = socket_receive (&s->socket, msg, MSG_DONTWAIT);
    if (*r != -1 || errno != EAGAIN)
      return false;
    sched_yield ();
  }
  s->in.is_brisk = false;
  return true;
}

static ssize_t
receive_plain (struct stream *s, struct iovec iov[2], bool look)
{
  struct msghdr msg = { .msg_iov = iov, .msg_iovlen = 2 };
  ssize_t r;

  if (!look || !s->in.is_brisk)
    return socket_receive (&s->socket, &msg, 0);
  if (!is_late (s, &msg, &r))
    return r;
  errno = EINTR;
  return -1;
}

/* Receive up to count bytes into buf and more into the empty input
 * buffer.  look: again and again, if the client is brisk.  Returns how many
 * went into buf.  -1 at the end, or with EAGAIN if nothing came for
 * IDLE_SECONDS, or with EINTR if there is nothing yet, and the next call
 * sleeps: a client is brisk no more, or has sent a part of a TLS record.
 */
static ssize_t
receive (struct stream *s, void *buf, size_t count, size_t ahead, bool look)
{
  struct input *in = &s->in;
  struct iovec iov[2] = {
    { .iov_base = buf, .iov_len = count },
    { .iov_base = in->data, .iov_len = ahead },
  };
  ssize_t r = is_encrypted_by_us (s) ? tls_receive (s->tls, iov)
                                     : receive_plain (s, iov, look);

  if (r == 0) {
    socket_ending (&s->socket, "the client closed it", 0);
    errno = ECONNRESET;
    return -1;
  }
  if (r == -1) {
    if (errno != EAGAIN && errno != EINTR)
      socket_ending (&s->socket, "receiving failed", errno);
    return -1;
  }
  in->start = in->end = 0;
  if ((size_t) r > count) {
    in->end = r - count;
    r = count;
  }
  return r;
}

static size_t
take (struct input *in, void *buf, size_t count)
{
  count = min_u64 (count, buffered (in));
  memcpy (buf, &in->data[in->start], count);
  in->start += count;
  return count;
}

static void
set_receiving (struct stream *s, bool on)
{
  atomic_store_explicit (&s->socket.is_receiving, on, memory_order_relaxed);
}

/* Receiving has failed with errno: for good, or for too long? */
static bool
ends (struct stream *s, int64_t *since)
{
  if (errno == EINTR)
    return false;
  return errno != EAGAIN || socket_idle_too_long (&s->socket, since);
}

static int
read_rest (struct stream *s, uint8_t *p, size_t done, size_t count)
{
  const struct input *in = &s->in;
  int64_t since = 0;

  while (done < count) {
    ssize_t r = receive (s, p + done, count - done,
                         in->header_only ? in->header_size : INPUT_SIZE,
                         true);

    if (r == -1) {
      if (ends (s, &since))
        return -1;
      continue;
    }
    since = 0;
    done += r;
  }
  return 0;
}

int
stream_read (struct stream *s, void *buf, size_t count)
{
  struct input *in = &s->in;
  size_t done;
  int r;

  in->header_only = count >= LARGE_PAYLOAD;
  done = take (in, buf, count);
  if (done == count)
    return 0;
  set_receiving (s, true);
  r = read_rest (s, buf, done, count);
  set_receiving (s, false);
  return r;
}

static int
skip_rest (struct stream *s, uint64_t count)
{
  struct input *in = &s->in;
  int64_t since = 0;

  while (count > 0) {
    uint64_t n;

    if (receive (s, NULL, 0, min_u64 (count, INPUT_SIZE), true) == -1) {
      if (ends (s, &since))
        return -1;
      continue;
    }
    since = 0;
    n = min_u64 (count, buffered (in));
    in->start += n;
    count -= n;
  }
  return 0;
}

int
stream_skip (struct stream *s, uint64_t count)
{
  struct input *in = &s->in;
  const uint64_t n = min_u64 (count, buffered (in));
  int r;

  in->start += n;
  if (n == count)
    return 0;
  set_receiving (s, true);
  r = skip_rest (s, count - n);
  set_receiving (s, false);
  return r;
}

/* The client's next requests may be on their way: see above. */
static void
before_receiving (struct input *in, enum stream_wait wait)
{
  if (in->pipelined && wait == STREAM_YIELD)
    sched_yield ();
  in->is_brisk = in->is_brisk || in->pipelined;
  in->pipelined = false;
}

/* Usually one request in flight is answered before the next comes, or
 * many are received at once; either way this is one receive call at
 * most.
 */
enum stream_found
stream_header (struct stream *s, void *header, size_t *done,
               enum stream_wait wait)
{
  struct input *in = &s->in;
  const size_t size = in->header_size;
  uint8_t *p = header;
  ssize_t r;

  if (*done == 0) {
    *done = take (in, p, size);
    if (*done == size) {
      in->pipelined = true;
      in->header_only = false;
      return STREAM_DONE;
    }
    before_receiving (in, wait);
  }
  r = receive (s, p + *done, size - *done,
               in->header_only ? 0 : INPUT_SIZE, wait != STREAM_SLEEP);
  if (r == -1)
    return errno == EINTR ? STREAM_MORE
      : errno == EAGAIN ? STREAM_IDLE : STREAM_END;
  *done += r;
  if (*done < size)
    return STREAM_MORE;
  in->header_only = false;
  return STREAM_DONE;
}

/* Take n bytes off the beginning. */
static void
advance (struct msghdr *msg, size_t n)
{
  while (msg->msg_iovlen > 0 && n >= msg->msg_iov->iov_len) {
    n -= msg->msg_iov->iov_len;
    msg->msg_iov++;
    msg->msg_iovlen--;
  }
  if (n > 0) {
    msg->msg_iov->iov_base = (uint8_t *) msg->msg_iov->iov_base + n;
    msg->msg_iov->iov_len -= n;
  }
}

/* Send SEND_SIZE bytes at most. */
static ssize_t
send_some (struct stream *s, struct msghdr msg, int64_t *since)
{
  const size_t all = msg.msg_iovlen; /* whose type is not size_t in musl */
  size_t nr = 0, left = SEND_SIZE, whole;
  ssize_t r;

  while (nr < all && msg.msg_iov[nr].iov_len < left)
    left -= msg.msg_iov[nr++].iov_len;
  if (nr == all)
    return socket_send (&s->socket, &msg, 0, since);

  whole = msg.msg_iov[nr].iov_len;
  msg.msg_iov[nr].iov_len = left;
  msg.msg_iovlen = nr + 1;
  r = socket_send (&s->socket, &msg, 0, since);
  msg.msg_iov[nr].iov_len = whole;
  return r;
}

static int
send_plain (struct stream *s, struct iovec *iov, size_t nr)
{
  struct msghdr msg = { .msg_iov = iov, .msg_iovlen = nr };
  int64_t since = 0;
  ssize_t r = 0;

  for (;;) {
    advance (&msg, r);
    if (msg.msg_iovlen == 0)
      return 0;
    r = send_some (s, msg, &since);
    if (r == -1)
      return -1;
  }
}

int
stream_send (struct stream *s, struct iovec *iov, size_t nr)
{
  int r;

  assert (lock_is_mine (&s->send_lock));
  atomic_store_explicit (&s->socket.is_sending, true, memory_order_relaxed);
  r = is_encrypted_by_us (s) ? tls_send (s->tls, iov, nr)
                             : send_plain (s, iov, nr);
  if (r == -1)
    socket_ending (&s->socket, "sending failed", errno);
  atomic_store_explicit (&s->socket.is_sending, false, memory_order_relaxed);
  return r;
}

/* Closing a TCP socket with bytes unread resets the connection, and
 * replies on their way may be lost.
 */
void
stream_linger (struct stream *s)
{
  if (s->tls != NULL)
    tls_bye (s->tls);
  shutdown (s->socket.fd, SHUT_WR);
  for (unsigned i = 0; i < 64; ++i)
    if (recv (s->socket.fd, s->in.data, INPUT_SIZE, MSG_DONTWAIT) <= 0)
      break;
}
