/* nbdkit-dirty-bitmap-filter
 * SPDX-License-Identifier: BSD-3-Clause
 * Copyright the nbdkit-dirty-bitmap-filter authors
 */

/* Replies: one function each.  They put it behind w->reply_at, where there
 * may be a part of the reply already.
 *
 * There are three forms of replies.  With extended headers all are
 * chunks with those.  With structured replies READ, BLOCK_STATUS and
 * errors are chunks, and that something else is done is said by a simple
 * reply, which the protocol allows and which is shorter.  Without either
 * all are simple.
 */

#include <config.h>

#include <inttypes.h>
#include <string.h>

#include "common/bytes.h"
#include "nbd/debug.h"
#include "nbd/output.h"
#include "nbd/reply.h"

static void *
reply_space (struct worker *w, size_t length)
{
  void *p = w->output + w->reply_at + w->reply_length;

  w->reply_length += length;
  return p;
}

/* The header of a chunk, with length bytes of payload to follow. */
static void
put_chunk (struct worker *w, uint16_t type, uint16_t flags, uint32_t length)
{
  const bool extended = w->session->extended;

  wire_put_chunk (reply_space (w, wire_chunk_size (extended)), extended,
                  &w->request, type, flags, length);
}

static void
reply_simple (struct worker *w, uint32_t error)
{
  wire_put_simple (reply_space (w, sizeof (struct nbd_simple_reply)),
                   &w->request, error);
}

void
reply_error_at (struct worker *w, int err, const char *message,
                const uint64_t *offset)
{
  const struct request *r = &w->request;
  const uint32_t error = wire_errno (err);
  const size_t n = strlen (message);
  struct nbd_error_chunk *reply;

  w->error = err;
  debug_request ("nbd: command %u, offset %" PRIu64 ", length %" PRIu64
                 ": %s", r->type, r->offset, r->length, message);
  if (!w->session->structured) {
    reply_simple (w, error);
    return;
  }
  put_chunk (w, offset ? NBD_REPLY_TYPE_ERROR_OFFSET : NBD_REPLY_TYPE_ERROR,
             NBD_REPLY_FLAG_DONE,
             sizeof *reply + n + (offset ? sizeof *offset : 0));
  reply = reply_space (w, sizeof *reply);
  reply->error = htobe32 (error);
  reply->message_length = htobe16 (n);
  memcpy (reply_space (w, n), message, n);
  if (offset)
    put_be64 (reply_space (w, sizeof *offset), *offset);
}

void
reply_error (struct worker *w, int err, const char *message)
{
  reply_error_at (w, err, message, NULL);
}

void
reply_done (struct worker *w)
{
  if (w->session->extended)
    put_chunk (w, NBD_REPLY_TYPE_NONE, NBD_REPLY_FLAG_DONE, 0);
  else
    reply_simple (w, NBD_SUCCESS);
}

uint8_t *
reply_read_place (const struct worker *w)
{
  const struct session *s = w->session;
  const size_t header = s->structured
    ? wire_chunk_size (s->extended) + sizeof (struct nbd_offset_data)
    : sizeof (struct nbd_simple_reply);

  return w->output + w->reply_at + w->reply_length + header;
}

static void
put_hole (struct worker *w, uint16_t flags)
{
  struct nbd_offset_hole *reply;

  put_chunk (w, NBD_REPLY_TYPE_OFFSET_HOLE, flags, sizeof *reply);
  reply = reply_space (w, sizeof *reply);
  reply->offset = htobe64 (w->part.offset);
  reply->length = htobe32 (w->part.length);
}

static void
put_data (struct worker *w, uint16_t flags)
{
  struct nbd_offset_data *reply;

  put_chunk (w, NBD_REPLY_TYPE_OFFSET_DATA, flags,
             sizeof *reply + w->part.length);
  reply = reply_space (w, sizeof *reply);
  reply->offset = htobe64 (w->part.offset);
}

/* No data needs another kind of chunk. */
void
reply_read (struct worker *w)
{
  const struct part *p = &w->part;
  const uint16_t flags = p->is_last ? NBD_REPLY_FLAG_DONE : 0;

  if (!w->session->structured)
    reply_simple (w, NBD_SUCCESS);
  else if (p->length == 0)
    put_chunk (w, NBD_REPLY_TYPE_NONE, NBD_REPLY_FLAG_DONE, 0);
  else if (p->is_hole) {
    put_hole (w, flags);
    return;
  }
  else
    put_data (w, flags);
  if (w->request.length <= REPLY_ROOM)
    w->reply_length += p->length;
  else {
    w->reply_payload = w->payload;
    w->reply_payload_length = p->length;
  }
}

static void
put_block_status (struct worker *w, uint32_t id, bool last, size_t size)
{
  const uint16_t flags = last ? NBD_REPLY_FLAG_DONE : 0;

  if (w->session->extended) {
    struct nbd_block_status_ext_chunk *reply;

    put_chunk (w, NBD_REPLY_TYPE_BLOCK_STATUS_EXT, flags,
               sizeof *reply + size);
    reply = reply_space (w, sizeof *reply);
    reply->context_id = htobe32 (id);
    reply->count = htobe32 (w->extents.nr);
  }
  else {
    struct nbd_block_status_chunk *reply;

    put_chunk (w, NBD_REPLY_TYPE_BLOCK_STATUS, flags, sizeof *reply + size);
    reply = reply_space (w, sizeof *reply);
    reply->context_id = htobe32 (id);
  }
}

/* Above what a chunk of BLOCK_STATUS has before its extents. */
#define BLOCK_STATUS_HEADER 64

/* One chunk of a BLOCK_STATUS.  Few extents are copied behind the other
 * chunks, many are sent from where they are, at once if they are to be
 * built over by the next context's.
 */
void
reply_block_status (struct worker *w, uint32_t id, bool last)
{
  const size_t size = w->extents.nr * wire_extent_size (w->session->extended);
  const bool few = BLOCK_STATUS_HEADER + size <= REPLY_ROOM;

  if (w->reply_length + BLOCK_STATUS_HEADER + (few ? size : 0) > REPLY_ROOM)
    output_partial_reply (w);
  put_block_status (w, id, last, size);
  if (few)
    memcpy (reply_space (w, size), w->extents.wire, size);
  else {
    w->reply_payload = w->extents.wire;
    w->reply_payload_length = size;
    if (!last)
      output_partial_reply (w);
  }
}
