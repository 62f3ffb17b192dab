/* nbdkit-dirty-bitmap-filter
 * SPDX-License-Identifier: BSD-3-Clause
 * Copyright the nbdkit-dirty-bitmap-filter authors
 */

/* Bytes from the client.
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
 * while we answer these.  For one who is so brisk we look again and again
 * for a short while, and let others run in between, before we sleep: to
 * be woken takes longer, and the client that wakes us, too.  When nothing
 * comes he is brisk no more, until requests come together again.
 *
 * The descriptor has a receive time-out: when it fires between two
 * requests the worker that receives gives its buffers back, and a client
 * that is idle for too long may be told to leave.
 */

#include <config.h>

#include <errno.h>
#include <sched.h>
#include <string.h>
#include <sys/socket.h>

#include "common/bytes.h"
#include "common/cleanup.h"
#include "nbd/internal.h"

#define LARGE_PAYLOAD (32 * 1024)

/* How often to look for more from a brisk client before sleeping: for ten
 * or twenty microseconds.
 */
#define BRISK_TRIES 40

static size_t
buffered (const struct input *in)
{
  return in->end - in->start;
}

static ssize_t
receive_plain (struct connection *c, struct iovec iov[2])
{
  struct msghdr msg = { .msg_iov = iov, .msg_iovlen = 2 };
  struct input *in = &c->in;
  ssize_t r;

  for (unsigned i = 0; in->is_brisk && i < BRISK_TRIES; ++i) {
    if (connection_may_receive (c) == -1)
      return -1;
    r = recvmsg (c->fd, &msg, MSG_DONTWAIT);
    if (r != -1)
      return r;
    sched_yield ();
  }
  in->is_brisk = false;
  do {
    if (connection_may_receive (c) == -1)
      return -1;
    r = recvmsg (c->fd, &msg, 0);
  } while (r == -1 && errno == EINTR);
  return r;
}

/* Receive up to count bytes into buf and more into the empty input
 * buffer.  Returns how many went into buf.  -1 at the end, or with
 * EAGAIN if nothing came for IDLE_SECONDS.
 */
static ssize_t
receive (struct connection *c, void *buf, size_t count, size_t ahead)
{
  struct input *in = &c->in;
  struct iovec iov[2] = {
    { .iov_base = buf, .iov_len = count },
    { .iov_base = in->data, .iov_len = ahead },
  };
  ssize_t r = c->tls != NULL && tls_is_ours (c->tls)
    ? tls_receive (c, iov) : receive_plain (c, iov);

  if (r == 0) {
    trace_ending (c, "the client closed it", 0);
    errno = ECONNRESET;
    return -1;
  }
  if (r == -1) {
    if (errno != EAGAIN)
      trace_ending (c, "receiving failed", errno);
    return -1;
  }

  connection_moved (&c->received, r);
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

/* Nothing came for as long as recvmsg waits.  Has the connection been
 * idle for so long now that it is to end?  *since is 0 after anything was
 * received.
 */
static bool
idle_too_long (struct connection *c, int64_t *since)
{
  const int64_t limit = c->server->limits.idle_seconds * INT64_C (1000);
  const int64_t now = now_ms ();

  if (limit == 0)
    return false;
  if (*since == 0)
    *since = now - input_timeout_seconds (c->server) * 1000;
  if (now - *since < limit)
    return false;
  trace_ending (c, "idle for too long", 0);
  return true;
}

/* Has another worker a request in flight? */
static bool
others_work (struct connection *c)
{
  ACQUIRE_LOCK_FOR_CURRENT_SCOPE (&c->lock);
  return c->waiting + 1 < c->nr_workers;
}

unsigned
input_timeout_seconds (const struct nbd_server *server)
{
  const unsigned idle = server->limits.idle_seconds;

  return idle > 0 && idle < IDLE_SECONDS ? idle : IDLE_SECONDS;
}

static int
read_rest (struct connection *c, uint8_t *p, size_t done, size_t count)
{
  struct input *in = &c->in;
  int64_t since = 0;

  while (done < count) {
    ssize_t r = receive (c, p + done, count - done,
                         in->header_only ? request_header_size (c)
                                         : INPUT_SIZE);

    if (r == -1) {
      if (errno != EAGAIN || idle_too_long (c, &since))
        return -1;
      continue;
    }
    since = 0;
    done += r;
  }
  return 0;
}

int
input_read (struct connection *c, void *buf, size_t count)
{
  struct input *in = &c->in;
  size_t done;
  int r;

  in->header_only = count >= LARGE_PAYLOAD;
  done = take (in, buf, count);
  if (done == count)
    return 0;
  atomic_store_explicit (&c->is_receiving, true, memory_order_relaxed);
  r = read_rest (c, buf, done, count);
  atomic_store_explicit (&c->is_receiving, false, memory_order_relaxed);
  return r;
}

static int
skip_rest (struct connection *c, uint64_t count)
{
  struct input *in = &c->in;
  int64_t since = 0;

  while (count > 0) {
    uint64_t n;

    if (receive (c, NULL, 0, min_u64 (count, INPUT_SIZE)) == -1) {
      if (errno != EAGAIN || idle_too_long (c, &since))
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
input_skip (struct connection *c, uint64_t count)
{
  struct input *in = &c->in;
  const uint64_t n = min_u64 (count, buffered (in));
  int r;

  in->start += n;
  if (n == count)
    return 0;
  atomic_store_explicit (&c->is_receiving, true, memory_order_relaxed);
  r = skip_rest (c, count - n);
  atomic_store_explicit (&c->is_receiving, false, memory_order_relaxed);
  return r;
}

static bool
has_neighbours (const struct connection *c)
{
  return atomic_load_explicit (&c->server->nr_live,
                               memory_order_relaxed) > 1;
}

/* Usually one request in flight is answered before the next comes, or
 * many are received at once; either way this is one receive call at
 * most.
 */
int
input_header (struct connection *c, void *header, struct worker *idle)
{
  struct input *in = &c->in;
  const size_t size = request_header_size (c);
  uint8_t *p = header;
  size_t done = take (in, p, size);
  int64_t since = 0;

  if (done == size)
    in->pipelined = true;
  else {
    if (in->pipelined && has_neighbours (c))
      sched_yield ();
    in->is_brisk = in->is_brisk || in->pipelined;
    in->pipelined = false;
  }
  while (done < size) {
    ssize_t r = receive (c, p + done, size - done,
                         in->header_only ? 0 : INPUT_SIZE);

    if (r == -1) {
      if (errno != EAGAIN)
        return -1;
      worker_trim (idle);
      if (others_work (c))
        since = now_ms ();
      else if (idle_too_long (c, &since))
        return -1;
      continue;
    }
    since = 0;
    done += r;
  }
  in->header_only = false;
  return 0;
}

/* The bytes behind a header. */
static uint64_t
request_payload_length (const struct connection *c, const void *header)
{
  struct nbd_extended_request extended;
  struct nbd_request compact;   /* the other begins as this does */

  memcpy (&compact, header, sizeof compact);
  if (!request_has_payload (c, be16toh (compact.type),
                            be16toh (compact.flags)))
    return 0;
  if (!c->extended)
    return be32toh (compact.length);
  memcpy (&extended, header, sizeof extended);
  return be64toh (extended.length);
}

bool
input_is_empty (const struct connection *c)
{
  return buffered (&c->in) == 0;
}

bool
input_has_request (const struct connection *c)
{
  const struct input *in = &c->in;
  const uint8_t *p = &in->data[in->start];

  if (buffered (in) < request_header_size (c))
    return false;
  return request_payload_length (c, p) <=
    buffered (in) - request_header_size (c);
}
