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
 * Replies to READ and BLOCK_STATUS are structured where that was
 * negotiated, all others are simple, which the protocol allows and which
 * is shorter.
 */

#include <config.h>

#include <errno.h>
#include <inttypes.h>
#include <string.h>

#include "common/bytes.h"
#include "nbd/internal.h"

/* Requests above these take long enough that it pays to let another
 * worker receive.
 */
#define LARGE_DATA (256 * 1024)
#define LARGE_RANGE (1024 * 1024)

/* The protocol's error value. */
static uint32_t
nbd_errno (int err)
{
  switch (err) {
  case EPERM:
  case EROFS:
    return NBD_EPERM;
  case EIO:
    return NBD_EIO;
  case ENOMEM:
    return NBD_ENOMEM;
  case ENOSPC:
  case EFBIG:
  case EDQUOT:
    return NBD_ENOSPC;
  case EOVERFLOW:
    return NBD_EOVERFLOW;
  case ENOTSUP:
#if EOPNOTSUPP != ENOTSUP
  case EOPNOTSUPP:
#endif
    return NBD_ENOTSUP;
  case ESHUTDOWN:
    return NBD_ESHUTDOWN;
  default:
    return NBD_EINVAL;
  }
}

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
    if (c->structured)
      *flags |= NBD_CMD_FLAG_DF;
    return true;
  case NBD_CMD_WRITE_ZEROES:
    *flags |= NBD_CMD_FLAG_NO_HOLE | NBD_CMD_FLAG_FAST_ZERO;
    return true;
  case NBD_CMD_BLOCK_STATUS:
    *flags |= NBD_CMD_FLAG_REQ_ONE;
    return true;
  case NBD_CMD_WRITE:
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
 * not be answered.
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
  REFUSE_IF (c->server->readonly && is_change (r->type),
             EPERM, "the export is read-only");
  REFUSE_IF ((r->flags & ~flags) != 0,
             EINVAL, "flags that this command does not have");
  REFUSE_IF (r->type == NBD_CMD_FLUSH && (r->offset != 0 || r->length != 0),
             EINVAL, "flush needs offset and length 0");
  REFUSE_IF (r->type == NBD_CMD_READ && r->length > NBD_MAX_PAYLOAD &&
             (r->flags & NBD_CMD_FLAG_DF) != 0,
             EOVERFLOW, "too long not to be fragmented");
  REFUSE_IF ((r->type == NBD_CMD_READ || r->type == NBD_CMD_WRITE) &&
             r->length > NBD_MAX_PAYLOAD,
             EINVAL, "more than 32 MiB");
  REFUSE_IF (range_exceeds (r->offset, r->length, c->server->size),
             r->type == NBD_CMD_WRITE || r->type == NBD_CMD_WRITE_ZEROES
             ? ENOSPC : EINVAL, "past the end of the export");
  REFUSE_IF (r->type == NBD_CMD_BLOCK_STATUS && c->nr_contexts == 0,
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
is_large (const struct request *r)
{
  return (r->type == NBD_CMD_READ || r->type == NBD_CMD_WRITE) &&
    r->length >= LARGE_DATA;
}

/* Replies: one function each.  They put it behind w->reply_at. */

static void *
reply_space (struct worker *w, size_t length)
{
  void *p = w->output + w->reply_at + w->reply_length;

  w->reply_length += length;
  return p;
}

static void
put_chunk (const struct worker *w, struct nbd_structured_reply *chunk,
           uint16_t type, uint16_t flags, uint32_t length)
{
  chunk->magic = htobe32 (NBD_STRUCTURED_REPLY_MAGIC);
  chunk->flags = htobe16 (flags);
  chunk->type = htobe16 (type);
  chunk->cookie = w->request.cookie;
  chunk->length = htobe32 (length);
}

static void
reply_simple (struct worker *w, uint32_t error)
{
  struct nbd_simple_reply *reply = reply_space (w, sizeof *reply);

  reply->magic = htobe32 (NBD_SIMPLE_REPLY_MAGIC);
  reply->error = htobe32 (error);
  reply->cookie = w->request.cookie;
}

static void
reply_error (struct worker *w, int err, const char *message)
{
  const struct request *r = &w->request;
  uint32_t error = nbd_errno (err);
  struct nbd_error_chunk *reply;
  size_t n;

  debug_request ("nbd: command %u, offset %" PRIu64 ", length %u: %s",
                 r->type, r->offset, r->length, message);
  if (!w->connection->structured ||
      (r->type != NBD_CMD_READ && r->type != NBD_CMD_BLOCK_STATUS)) {
    reply_simple (w, error);
    return;
  }
  n = strlen (message);
  reply = reply_space (w, sizeof *reply + n);
  put_chunk (w, &reply->chunk, NBD_REPLY_TYPE_ERROR, NBD_REPLY_FLAG_DONE,
             sizeof *reply - sizeof reply->chunk + n);
  reply->error = htobe32 (error);
  reply->message_length = htobe16 (n);
  memcpy (reply + 1, message, n);
}

static size_t
read_header_size (const struct worker *w)
{
  if (!w->connection->structured)
    return sizeof (struct nbd_simple_reply);
  if (w->request.length == 0)
    return sizeof (struct nbd_structured_reply);
  return sizeof (struct nbd_offset_data);
}

/* A successful READ: the data are in the payload, or already behind the
 * header that is made here.  No data needs another kind of chunk.
 */
static void
reply_read (struct worker *w)
{
  uint32_t length = w->request.length;
  struct nbd_offset_data *reply;

  if (!w->connection->structured)
    reply_simple (w, NBD_SUCCESS);
  else if (length == 0)
    put_chunk (w, reply_space (w, sizeof (struct nbd_structured_reply)),
               NBD_REPLY_TYPE_NONE, NBD_REPLY_FLAG_DONE, 0);
  else {
    reply = reply_space (w, sizeof *reply);
    put_chunk (w, &reply->chunk, NBD_REPLY_TYPE_OFFSET_DATA,
               NBD_REPLY_FLAG_DONE, sizeof reply->offset + length);
    reply->offset = htobe64 (w->request.offset);
  }
  if (length <= REPLY_ROOM)
    w->reply_length += length;
  else {
    w->reply_payload = w->payload;
    w->reply_payload_length = length;
  }
}

/* One chunk of a BLOCK_STATUS.  Few extents are copied behind the other
 * chunks, many are sent from where they are, at once if they are to be
 * built over by the next context's.
 */
static void
reply_block_status (struct worker *w, uint32_t id, bool last)
{
  const size_t size = w->extents.nr * sizeof w->extents.extent[0];
  struct nbd_block_status_chunk *reply;
  bool few = sizeof *reply + size <= REPLY_ROOM;

  if (w->reply_length + sizeof *reply + (few ? size : 0) > REPLY_ROOM)
    output_partial_reply (w);
  reply = reply_space (w, sizeof *reply);
  put_chunk (w, &reply->chunk, NBD_REPLY_TYPE_BLOCK_STATUS,
             last ? NBD_REPLY_FLAG_DONE : 0, sizeof reply->context_id + size);
  reply->context_id = htobe32 (id);
  if (few)
    memcpy (reply_space (w, size), w->extents.extent, size);
  else {
    w->reply_payload = w->extents.extent;
    w->reply_payload_length = size;
    if (!last)
      output_partial_reply (w);
  }
}

static int
execute_read (struct worker *w, struct disk *disk)
{
  const struct request *r = &w->request;
  uint8_t *data = w->output + w->reply_at + read_header_size (w);

  if (r->length > REPLY_ROOM)
    data = worker_payload (w, r->length);
  if (data == NULL)
    return -1;
  return disk_read (disk, data, r->length, r->offset);
}

/* The contexts of allocation come first, and only they can fail.  If the
 * second of them does, the first one's chunk stands before the error,
 * which is the last chunk and the whole request's result.
 */
static int
execute_block_status (struct worker *w)
{
  const struct connection *c = w->connection;
  const struct request *r = &w->request;

  for (size_t i = 0; i < c->nr_contexts; ++i) {
    int err = extents_build (w, c->contexts[i], r->offset, r->length,
                             (r->flags & NBD_CMD_FLAG_REQ_ONE) != 0);

    if (err != 0) {
      errno = err;
      return -1;
    }
    reply_block_status (w, c->contexts[i], i + 1 == c->nr_contexts);
  }
  return 0;
}

/* Do what a valid request asks.  -1 with errno. */
static int
execute (struct worker *w)
{
  struct disk *disk = w->connection->server->disk;
  const struct request *r = &w->request;
  bool fua = (r->flags & NBD_CMD_FLAG_FUA) != 0;

  if (r->type == NBD_CMD_FLUSH)
    return disk_flush (disk, &w->connection->client);
  if (r->length == 0)
    return 0;

  switch (r->type) {
  case NBD_CMD_READ:
    return execute_read (w, disk);
  case NBD_CMD_WRITE:
    return disk_write (disk, w->payload, r->length, r->offset, fua);
  case NBD_CMD_TRIM:
    return disk_trim (disk, r->length, r->offset, fua);
  case NBD_CMD_CACHE:
    return disk_cache (disk, r->length, r->offset);
  case NBD_CMD_WRITE_ZEROES:
    return disk_zero (disk, r->length, r->offset,
                      (r->flags & NBD_CMD_FLAG_NO_HOLE) != 0,
                      (r->flags & NBD_CMD_FLAG_FAST_ZERO) != 0, fua);
  default:
    return execute_block_status (w);
  }
}

/* Execute with the role or without, and make the reply. */
static void
execute_and_reply (struct worker *w)
{
  struct connection *c = w->connection;
  const struct request *r = &w->request;
  bool slow = is_slow_by_nature (r);
  bool more = !input_is_empty (c);
  int result, err;

  pace_begin (w, slow);
  if ((more && (slow || is_large (r))) ||
      atomic_load_explicit (&c->eager, memory_order_relaxed)) {
    role_release (w);
    w->reply_at = 0;
  }
  else if (slow && w->gathered > 0) {
    /* What takes long by nature must not delay what is answered. */
    output_flush_keeping_role (w);
    w->reply_at = 0;
  }
  if (w->has_role)
    role_begin_executing (w, slow);

  result = execute (w);
  err = errno;
  if (w->has_role)
    role_end_executing (w);
  pace_end (w);

  if (result == -1)
    reply_error (w, err, "request failed");
  else if (r->type == NBD_CMD_READ)
    reply_read (w);
  else if (r->type != NBD_CMD_BLOCK_STATUS)
    reply_simple (w, NBD_SUCCESS);
}

/* Receive a request and, if it is a write, its payload.  Returns 0 with
 * the verdict on it in *err and *reason, or -1 if there are no more.
 */
static int
receive_request (struct worker *w, int *err, const char **reason)
{
  struct connection *c = w->connection;
  struct request *r = &w->request;
  struct nbd_request wire;

  if (atomic_load_explicit (&c->dead, memory_order_relaxed) ||
      input_header (c, &wire, w) == -1)
    return -1;
  if (be32toh (wire.magic) != NBD_REQUEST_MAGIC) {
    debug_request ("nbd: bad magic, client is cut off");
    return -1;
  }
  r->flags = be16toh (wire.flags);
  r->type = be16toh (wire.type);
  r->cookie = wire.cookie;      /* ours to return, not to understand */
  r->offset = be64toh (wire.offset);
  r->length = be32toh (wire.length);
  debug_request ("nbd: command %u, flags 0x%x, offset %" PRIu64 ", length %u",
                 r->type, r->flags, r->offset, r->length);
  if (r->type == NBD_CMD_DISC)
    return -1;

  *err = validate (c, r, reason);
  if (r->type != NBD_CMD_WRITE || r->length == 0)
    return 0;
  if (*err == 0 && worker_payload (w, r->length) == NULL) {
    *err = ENOMEM;
    *reason = "no memory";
  }
  return *err == 0 ? input_read (c, w->payload, r->length)
                   : input_skip (c, r->length);
}

int
request_serve (struct worker *w)
{
  const char *reason = NULL;
  int err;

  if (receive_request (w, &err, &reason) == -1)
    return -1;

  w->reply_at = w->gathered;
  w->reply_length = 0;
  if (err != 0)
    reply_error (w, err, reason);
  else
    execute_and_reply (w);
  output_reply (w);
  return 0;
}
