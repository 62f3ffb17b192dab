/* nbdkit-dirty-bitmap-filter
 * SPDX-License-Identifier: BSD-3-Clause
 * Copyright the nbdkit-dirty-bitmap-filter authors
 */

/* Requests: receive, validate, execute, reply.
 *
 * validate is the one place that judges what a client asks; behind it
 * ranges lie inside the disk and sizes within bounds.
 *
 * A worker comes here with the receive role, and leaves with it or
 * without (role.c says when).  The reply to a request is made in the
 * worker's output buffer, or in its payload buffer if it is large, so
 * neither receiving nor replying allocates memory, and a payload is
 * copied at most once, out of or into a socket buffer.
 *
 * With extended headers a request says by a flag whether its length is
 * that of a payload behind it.  A WRITE always has one: the protocol wants
 * the flag there, but QEMU's client, from 8.2 on, does not set it, and
 * QEMU's server does not ask for it.  BLOCK_STATUS may have a payload; that
 * of any other command is thrown away, and the command is refused.
 *
 * Where nothing is lost by it this is as lenient as qemu-nbd and nbdkit:
 * what clients really send counts, and not the protocol document alone.
 */

#include <config.h>

#include <errno.h>
#include <stdlib.h>
#include <string.h>

#include "common/bytes.h"
#include "common/clock.h"
#include "disk/disk.h"
#include "nbd/connection.h"
#include "nbd/contents.h"
#include "nbd/contexts.h"
#include "nbd/extents.h"
#include "nbd/output.h"
#include "nbd/parts.h"
#include "nbd/reply.h"
#include "nbd/request.h"
#include "nbd/server.h"
#include "nbd/trace.h"
#include "stats/stats.h"

/* Requests above these take long enough that it pays to let another
 * worker receive.
 */
#define LARGE_DATA (256 * 1024)
#define LARGE_RANGE (1024 * 1024)

/* What is longer than this is executed in pieces that end at multiples
 * of it.
 */
#define PIECE (UINT64_C (1) << 32)

static bool
is_change (uint16_t type)
{
  return type == NBD_CMD_WRITE || type == NBD_CMD_TRIM ||
    type == NBD_CMD_WRITE_ZEROES;
}

/* Which flags a command may have.  Of FUA the protocol wants that all
 * take it.  False for an unknown command.
 */
static bool
valid_flags (const struct connection *c, const struct request *r,
             uint16_t *flags)
{
  *flags = NBD_CMD_FLAG_FUA;
  switch (r->type) {
  case NBD_CMD_READ:
    if (c->session.structured)
      *flags |= NBD_CMD_FLAG_DF;
    return true;
  case NBD_CMD_WRITE_ZEROES:
    *flags |= NBD_CMD_FLAG_NO_HOLE | NBD_CMD_FLAG_FAST_ZERO;
    return true;
  case NBD_CMD_BLOCK_STATUS:
    *flags |= NBD_CMD_FLAG_REQ_ONE;
    if (c->session.extended)
      *flags |= NBD_CMD_FLAG_PAYLOAD_LEN;
    return true;
  case NBD_CMD_WRITE:
    if (c->session.extended)
      *flags |= NBD_CMD_FLAG_PAYLOAD_LEN;
    return true;
  case NBD_CMD_FLUSH:
  case NBD_CMD_TRIM:
  case NBD_CMD_CACHE:
    return true;
  default:
    return false;
  }
}

/* Judge a request.  Returns 0, or an errno and the reason.  A zero
 * length is fine, and does nothing, except for BLOCK_STATUS, which could
 * not be answered.  A FLUSH is always about the whole disk: its offset and
 * length are reserved, and as in qemu-nbd they do not matter.
 */
static int
validate (const struct connection *c, const struct request *r,
          const char **reason)
{
  uint16_t flags;

#define REFUSE_IF(condition, err, text)         \
  do {                                          \
    if (condition) {                            \
      *reason = (text);                         \
      return (err);                             \
    }                                           \
  } while (0)

  REFUSE_IF (!valid_flags (c, r, &flags), EINVAL, "unknown command");
  REFUSE_IF ((r->flags & ~flags) != 0,
             EINVAL, "flags that this command does not have");
  REFUSE_IF ((c->server->service.readonly ||
              !export_is_disk (&c->session.export)) && is_change (r->type),
             EPERM, "the export is read-only");
  REFUSE_IF (r->type == NBD_CMD_READ && r->length > NBD_MAX_PAYLOAD &&
             (r->flags & NBD_CMD_FLAG_DF) != 0,
             EOVERFLOW, "too long not to be fragmented");
  REFUSE_IF ((r->type == NBD_CMD_READ || r->type == NBD_CMD_WRITE) &&
             r->length > NBD_MAX_PAYLOAD,
             EINVAL, "more than 32 MiB");
  REFUSE_IF (r->type != NBD_CMD_FLUSH &&
             range_exceeds (r->offset, r->length, c->server->service.size),
             r->type == NBD_CMD_WRITE || r->type == NBD_CMD_WRITE_ZEROES
             ? ENOSPC : EINVAL, "past the end of the export");
  REFUSE_IF (r->type == NBD_CMD_BLOCK_STATUS && c->session.nr_contexts == 0,
             EINVAL, "no metadata context was negotiated");
  REFUSE_IF (r->type == NBD_CMD_BLOCK_STATUS && r->length == 0,
             EINVAL, "need non-zero length");
#undef REFUSE_IF
  return 0;
}

/* Slow whatever the disk: to be moved out of the way of others. */
static bool
is_slow_by_nature (const struct request *r)
{
  switch (r->type) {
  case NBD_CMD_FLUSH:
    return true;
  case NBD_CMD_WRITE:
    return (r->flags & NBD_CMD_FLAG_FUA) != 0;
  case NBD_CMD_TRIM:
  case NBD_CMD_WRITE_ZEROES:
    return (r->flags & NBD_CMD_FLAG_FUA) != 0 || r->length > LARGE_RANGE;
  default:
    return false;
  }
}

static bool
is_large (const struct worker *w)
{
  const struct request *r = &w->request;

  return (r->type == NBD_CMD_READ && r->length >= LARGE_DATA) ||
    (r->type == NBD_CMD_WRITE && w->part.length >= LARGE_DATA);
}

/* The monitor does not see that these take long: each part is short. */
static bool
has_many_parts (const struct worker *w)
{
  return w->request.type == NBD_CMD_READ && !w->part.is_last &&
    w->request.length > LARGE_RANGE;
}

/* If a context fails, the chunks of those before it stand before the error,
 * which is the last chunk and the whole request's result.
 */
static int
execute_block_status (struct worker *w)
{
  const struct request *r = &w->request;

  for (size_t i = 0; i < w->nr_contexts; ++i) {
    const uint32_t id = w->contexts[i];
    int err = extents_build (w, id, contexts_bitmap (w->session, id),
                             r->offset, r->length,
                             (r->flags & NBD_CMD_FLAG_REQ_ONE) != 0);

    if (err != 0) {
      errno = err;
      return -1;
    }
    reply_block_status (w, id, i + 1 == w->nr_contexts);
  }
  return 0;
}

/* A piece of a request that may be about any length. */
static int
execute_piece (struct worker *w, uint64_t count, uint64_t offset)
{
  struct disk *disk = w->service->disk;
  const struct request *r = &w->request;
  const bool fua = (r->flags & NBD_CMD_FLAG_FUA) != 0;

  switch (r->type) {
  case NBD_CMD_TRIM:
    return disk_trim (disk, count, offset, fua);
  case NBD_CMD_CACHE:
    return contents_cache (disk, &w->session->export, count, offset);
  default:
    return disk_zero (disk, count, offset,
                      (r->flags & NBD_CMD_FLAG_NO_HOLE) != 0,
                      (r->flags & NBD_CMD_FLAG_FAST_ZERO) != 0, fua);
  }
}

/* One request may be about the whole of a large disk, and take long.  So
 * between two pieces it is seen that the connection was cut: stopping
 * waits for no more than a request without extended headers can ask for.
 * Each piece has FUA by itself, since a flush that fails between two of
 * them is told to one that follows it, not to one that came before.
 */
static int
execute_in_pieces (struct worker *w)
{
  const struct request *r = &w->request;
  uint64_t offset = r->offset, left = r->length;

  while (left > 0) {
    const uint64_t n = left <= PIECE ? left : PIECE - offset % PIECE;

    if (socket_is_dead (&w->stream->socket)) {
      errno = ESHUTDOWN;
      return -1;
    }
    if (execute_piece (w, n, offset) == -1)
      return -1;
    offset += n;
    left -= n;
  }
  return 0;
}

/* The connection was cut: the client would learn nothing of it.  A change
 * that has come whole is still made where the client was the one that went,
 * since there are clients that do not wait for the last replies.
 */
static bool
is_in_vain (const struct worker *w)
{
  struct connection *c = w->connection;

  return socket_is_dead (&c->stream.socket) &&
    (socket_is_stopping (&c->stream.socket) ||
     !(is_change (w->request.type) || w->request.type == NBD_CMD_FLUSH));
}

/* Do what a valid request asks.  -1 with errno. */
static int
execute (struct worker *w)
{
  struct disk *disk = w->service->disk;
  const struct request *r = &w->request;

  if (is_in_vain (w)) {
    errno = ESHUTDOWN;
    return -1;
  }
  if (r->type == NBD_CMD_FLUSH)
    return disk_flush (disk, &w->connection->client);
  if (r->length == 0)
    return 0;

  switch (r->type) {
  case NBD_CMD_READ:
    return part_read (w);
  case NBD_CMD_WRITE:
    return disk_write (disk, w->payload, w->part.length, w->part.offset,
                       (r->flags & NBD_CMD_FLAG_FUA) != 0);
  case NBD_CMD_BLOCK_STATUS:
    return execute_block_status (w);
  default:
    return execute_in_pieces (w);
  }
}

/* Give the role up, or keep it while the request is executed. */
static void
begin_executing (struct worker *w, bool slow)
{
  struct connection *c = w->connection;
  const bool more = stream_has (&c->stream, 1);

  pace_begin (w, slow);
  if ((more && (slow || is_large (w))) || has_many_parts (w) ||
      atomic_load_explicit (&c->team.eager, memory_order_relaxed)) {
    output_release_role (w);
    w->reply_at = 0;
  }
  else if (slow && w->gathered > 0) {
    /* What takes long by nature must not delay what is answered. */
    output_flush_keeping_role (w);
    w->reply_at = 0;
  }
}

/* Execute a request or a part of it, with the role or without, and make
 * the reply.  -1 if that is an error.
 */
static int
execute_and_reply (struct worker *w, bool slow)
{
  const struct request *r = &w->request;
  const struct part *p = &w->part;
  int result, err;

  if (w->has_role)
    role_begin_executing (w, slow);
  result = execute (w);
  err = errno;
  if (w->has_role)
    role_end_executing (w);
  pace_end (w);

  if (result == -1)
    reply_error_at (w, err, "request failed",
                    r->type == NBD_CMD_READ && !p->is_whole ? &p->offset
                                                            : NULL);
  else if (r->type == NBD_CMD_READ)
    reply_read (w);
  else if (r->type != NBD_CMD_BLOCK_STATUS)
    reply_done (w);
  return result;
}

/* Do what a valid request asks, and make the reply, of which large data are
 * sent part by part.  What has none waits for what comes behind it.
 */
static void
serve_valid (struct worker *w)
{
  const bool slow = is_slow_by_nature (&w->request);

  if (w->request.type == NBD_CMD_READ)
    part_first_read (w);
  begin_executing (w, slow);
  while (execute_and_reply (w, slow) == 0 &&
         w->request.type == NBD_CMD_READ && !w->part.is_last) {
    if (w->reply_payload_length > 0) {
      output_reply (w);
      w->reply_at = w->gathered;
    }
    w->measured = false;        /* the first part speaks for all */
    part_next_read (w);
  }
}

static enum stream_wait
how_to_wait (const struct connection *c)
{
  if (atomic_load_explicit (&c->team.eager, memory_order_relaxed))
    return STREAM_SLEEP;
  return atomic_load_explicit (&c->server->nr_live,
                               memory_order_relaxed) > 1
    ? STREAM_YIELD : STREAM_LOOK;
}

/* Nothing came for a while: give all buffers back.  -1 if the client is
 * idle for too long.
 */
static int
be_idle (struct worker *w, int64_t *since)
{
  struct connection *c = w->connection;

  worker_trim (w);
  if (!team_is_busy (w->team))
    return socket_idle_too_long (&c->stream.socket, since) ? -1 : 0;
  *since = now_ms ();
  return 0;
}

/* Take a header.  Where that takes long, the worker keeps no memory that
 * others wait for.
 */
static int
take_header (struct worker *w, void *header)
{
  struct connection *c = w->connection;
  const enum stream_wait wait = how_to_wait (c);
  enum stream_found found;
  int64_t since = 0;
  size_t done = 0;

  if (!stream_has (&c->stream, wire_request_size (c->session.extended)))
    worker_share (w);
  while ((found = stream_header (&c->stream, header, &done, wait)) !=
         STREAM_DONE) {
    if (found == STREAM_END ||
        (found == STREAM_IDLE && be_idle (w, &since) == -1))
      return -1;
    if (found == STREAM_MORE)
      since = 0;
    worker_share (w);
  }
  return 0;
}

/* Take a payload, or throw it away.  The client may take its time, and
 * others may need the memory meanwhile.
 */
static int
take_payload (struct worker *w, uint32_t length)
{
  struct stream *s = w->stream;

  if (!stream_has (s, length))
    worker_give_extents (w);
  return stream_read (s, w->payload, length);
}

static int
skip_payload (struct worker *w, uint64_t length)
{
  struct stream *s = w->stream;

  if (!stream_has (s, length))
    worker_give_extents (w);
  return stream_skip (s, length);
}

/* A request's header, in the form that was negotiated.  They differ
 * behind the offset only.  -1 if there are no more.
 */
static int
receive_header (struct worker *w)
{
  struct connection *c = w->connection;
  struct request *r = &w->request;
  union wire_request wire;

  if (c->out_of_step ||
      socket_is_dead (&c->stream.socket) ||
      take_header (w, &wire) == -1)
    return -1;
  if (!wire_get_request (c->session.extended, &wire, r)) {
    socket_ending (&c->stream.socket, "a request with bad magic", 0);
    return -1;
  }
  trace_header (w);
  if (r->type != NBD_CMD_DISC)
    return 0;
  trace_disconnect (w);
  return -1;
}

static bool
has_payload (const struct connection *c, const struct request *r)
{
  return wire_has_payload (c->session.extended, r->type, r->flags);
}

/* Is the payload worth receiving, to find the next request behind it?
 * That of a WRITE is thrown away up to what one without extended headers
 * can be, as nbdkit does up to a point.  Of the others, with which it is
 * likely that no payload was meant, only what could be one: to wait for the
 * rest would be to wait for ever.
 */
static bool
is_in_step (const struct connection *c, const struct request *r)
{
  return !has_payload (c, r) ||
    r->length <= (r->type == NBD_CMD_WRITE ? UINT32_MAX : NBD_MAX_PAYLOAD);
}

static int
compare_ids (const void *a, const void *b)
{
  const uint32_t x = *(const uint32_t *) a, y = *(const uint32_t *) b;

  return x < y ? -1 : x > y;
}

/* Ids in the order of the wire, sorted in place: is each one of those
 * that were negotiated, and there but once?
 */
static bool
sort_ids (const struct connection *c, uint32_t *ids, size_t nr)
{
  size_t i = 0;

  for (size_t j = 0; j < nr; ++j)
    ids[j] = be32toh (ids[j]);
  qsort (ids, nr, sizeof ids[0], compare_ids);
  for (size_t j = 0; j < c->session.nr_contexts && i < nr; ++j)
    i += ids[i] == c->session.contexts[j];
  return i == nr;
}

/* The payload of a BLOCK_STATUS: its effect length, and the contexts
 * that it is about.  They stay in the payload buffer.
 */
static int
receive_block_status_payload (struct worker *w, int *err, const char **reason)
{
  const struct connection *c = w->connection;
  struct request *r = &w->request;
  const size_t head = sizeof (struct nbd_block_status_payload);
  const uint32_t length = r->length;
  const size_t nr = length < head ? 0 : (length - head) / sizeof (uint32_t);
  uint32_t *ids;

  *err = EINVAL;
  *reason = "not a list of metadata contexts that were negotiated";
  if (nr == 0 || nr > c->session.nr_contexts ||
      length != head + nr * sizeof (uint32_t))
    return skip_payload (w, length);
  if (worker_payload (w, length) == NULL) {
    *err = ENOMEM;
    *reason = "no memory";
    return skip_payload (w, length);
  }
  if (take_payload (w, length) == -1)
    return -1;
  ids = (uint32_t *) (w->payload + head);
  if (!sort_ids (c, ids, nr))
    return 0;
  r->length = get_be64 (w->payload);
  w->contexts = ids;
  w->nr_contexts = nr;
  *err = validate (c, r, reason);
  return 0;
}

/* Receive the payload of a valid WRITE.  Returns 0, with an errno in *err if
 * it had to be thrown away, or -1 if there are no more requests.
 */
static int
receive_write (struct worker *w, int *err)
{
  part_whole (w);
  if (w->part.length == 0)
    return 0;
  if (worker_payload (w, w->part.length) == NULL) {
    *err = ENOMEM;
    return skip_payload (w, w->part.length);
  }
  return take_payload (w, w->part.length);
}

/* Receive a request: its header, and a payload, but for that of a valid
 * WRITE, which is still to come.  Returns 0 with the verdict on it in *err
 * and *reason, or -1 if there are no more.
 */
static int
receive_request (struct worker *w, int *err, const char **reason)
{
  struct connection *c = w->connection;
  struct request *r = &w->request;

  if (receive_header (w) == -1)
    return -1;
  if (!is_in_step (c, r)) {
    /* The client is told, and then there are no more. */
    socket_ending (&c->stream.socket, "a payload of unusable length", 0);
    c->out_of_step = true;
    *err = EINVAL;
    *reason = "the payload is too long";
    return 0;
  }
  if (r->type == NBD_CMD_BLOCK_STATUS) {
    if (has_payload (c, r))
      return receive_block_status_payload (w, err, reason);
    w->contexts = c->session.contexts;
    w->nr_contexts = c->session.nr_contexts;
  }
  *err = validate (c, r, reason);
  if (has_payload (c, r) && *err != 0)
    return skip_payload (w, r->length);
  if (r->type == NBD_CMD_FLUSH)
    r->length = 0;              /* not to be counted */
  return 0;
}

int
request_serve (struct worker *w)
{
  const char *reason = NULL;
  int err;

  if (receive_request (w, &err, &reason) == -1)
    return -1;
  if (err == 0 && w->request.type == NBD_CMD_WRITE) {
    reason = "request failed";
    if (receive_write (w, &err) == -1)
      return -1;
  }

  trace_begin (w, err);
  w->reply_at = w->gathered;
  w->reply_length = 0;
  if (err != 0)
    reply_error (w, err, reason);
  else
    serve_valid (w);
  trace_end (w);
  output_reply (w);
  worker_end_request (w);
  return 0;
}
