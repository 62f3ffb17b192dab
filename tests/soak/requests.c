/* nbdkit-dirty-bitmap-filter
 * SPDX-License-Identifier: BSD-3-Clause
 * Copyright the nbdkit-dirty-bitmap-filter authors
 */

/* The client's requests, and the judgement on their replies.
 *
 * No two requests of a connection that are in flight overlap, so that
 * what a read has to find is known.
 */

#include <config.h>

#include <inttypes.h>
#include <stdlib.h>
#include <string.h>

#include "common/bytes.h"
#include "nbd/protocol.h"
#include "peer.h"

#define MAX_CHUNK (64 * 1024 * 1024)

unsigned
peer_in_flight (const struct peer *c)
{
  unsigned n = 0;

  for (unsigned i = 0; i < DEPTH; ++i)
    n += c->pending[i].used;
  return n;
}

void
peer_put_header (struct peer *c, uint16_t type, uint16_t flags,
                   uint64_t cookie, uint64_t offset, uint32_t length)
{
  const struct nbd_request header = {
    .magic = htobe32 (NBD_REQUEST_MAGIC),
    .flags = htobe16 (flags),
    .type = htobe16 (type),
    .cookie = cookie,
    .offset = htobe64 (offset),
    .length = htobe32 (length),
  };
  struct nbd_extended_request extended = {
    .magic = htobe32 (NBD_EXTENDED_REQUEST_MAGIC),
    .flags = htobe16 (flags),
    .type = htobe16 (type),
    .cookie = cookie,
    .offset = htobe64 (offset),
    .length = htobe64 (length),
  };

  if (!c->extended) {
    peer_put (c, &header, sizeof header);
    return;
  }
  /* As libnbd's clients do, and QEMU's do not: both are taken. */
  if (type == NBD_CMD_WRITE && cookie % 2 == 0)
    extended.flags |= htobe16 (NBD_CMD_FLAG_PAYLOAD_LEN);
  peer_put (c, &extended, sizeof extended);
}

static struct pending *
free_pending (struct peer *c)
{
  for (unsigned i = 0; i < DEPTH; ++i)
    if (!c->pending[i].used)
      return &c->pending[i];
  return NULL;
}

static bool
is_free (const struct peer *c, uint32_t first, uint32_t count)
{
  for (unsigned i = 0; i < DEPTH; ++i) {
    const struct pending *p = &c->pending[i];

    if (p->used && first < p->first + p->count && p->first < first + count)
      return false;
  }
  return true;
}

static bool
begin_change (struct peer *c, struct pending *p)
{
  enum change change = p->type == NBD_CMD_WRITE ? CHANGE_WRITE
    : p->type == NBD_CMD_TRIM ? CHANGE_TRIM : CHANGE_ZERO;

  if (p->type != NBD_CMD_WRITE && p->type != NBD_CMD_TRIM &&
      p->type != NBD_CMD_WRITE_ZEROES)
    return true;
  p->operation = model_begin (c->model, c->slot, change, p->first, p->count);
  return p->operation != NULL;
}

static void
put_payload (struct peer *c, const struct pending *p)
{
  uint8_t bytes[SECTOR];

  for (uint32_t i = 0; i < p->count; ++i) {
    model_fill (bytes, p->first + i, p->operation->stamp);
    peer_put (c, bytes, sizeof bytes);
  }
}

/* What has just been acknowledged, by this connection or the one before
 * it, is asked for more often than chance would have it.
 */
static void
draw_place (struct peer *c, struct pending *p, uint32_t max)
{
  const struct slot *s = c->slot;

  if ((p->type == NBD_CMD_READ || p->type == NBD_CMD_BLOCK_STATUS) &&
      s->last_count > 0 && model_draw (c->slot, 2) == 0) {
    p->first = s->last_first;
    p->count = s->last_count;
  }
  else
    model_place (c->model, c->slot, max, &p->first, &p->count);
}

bool
peer_request (struct peer *c, uint16_t type, uint16_t flags,
                uint32_t max_sectors)
{
  struct pending *p = free_pending (c);
  struct pending new = { .used = true, .type = type, .flags = flags };
  uint64_t offset;

  if (p == NULL)
    return false;
  if (type != NBD_CMD_FLUSH) {
    draw_place (c, &new, max_sectors);
    if (!is_free (c, new.first, new.count) || !begin_change (c, &new))
      return false;
  }
  if (type == NBD_CMD_READ) {
    new.data = malloc (new.count * SECTOR);
    if (new.data == NULL)
      abort ();
  }
  new.cookie = ++c->next_cookie;
  offset = (uint64_t) new.first * SECTOR;
  if (type == NBD_CMD_CACHE && model_draw (c->slot, 2) == 0) {
    offset += (uint64_t) c->model->nr_sectors * SECTOR;
    new.invalid = true;
  }
  peer_put_header (c, type, flags, new.cookie, offset, new.count * SECTOR);
  if (type == NBD_CMD_WRITE)
    put_payload (c, &new);
  *p = new;
  c->slot->nr_requests++;
  return true;
}

static void
check_data (struct peer *c, const struct pending *p)
{
  if (p->received != p->count * SECTOR)
    peer_failure (c, "a read of %" PRIu32 " bytes got %" PRIu32,
                    p->count * SECTOR, p->received);
  for (uint32_t i = 0; i < p->count; ++i) {
    const uint32_t number = p->first + i;

    if (model_is_sure (c->model, number) &&
        !model_allows (c->model, number, p->data + i * SECTOR)) {
      model_explain (c->model, number, p->data + i * SECTOR);
      peer_failure (c, "wrong data in sector %" PRIu32 " of a read of "
                      "%" PRIu32 " at %" PRIu32, number, p->count, p->first);
    }
  }
}

/* A request is done, with an error of the protocol or 0. */
static void
complete (struct peer *c, struct pending *p, uint32_t error)
{
  const bool may_refuse = p->invalid ||
    ((p->flags & NBD_CMD_FLAG_FAST_ZERO) != 0 && error == NBD_ENOTSUP);

  if (error != 0 && !may_refuse) {
    /* It is not for us to say what has become of it. */
    if (!atomic_load (&c->model->stopping))
      peer_failure (c, "command %u, %" PRIu32 " sectors at %" PRIu32
                      ": error %" PRIu32, p->type, p->count, p->first, error);
  }
  else if (error == 0 && p->invalid)
    peer_failure (c, "a request past the end succeeds");
  else if (p->operation != NULL && error != 0)
    model_refused (p->operation);
  else if (p->operation != NULL) {
    model_acked (c->model, p->operation);
    c->slot->last_first = p->first;
    c->slot->last_count = p->count;
  }
  else if (p->type == NBD_CMD_READ)
    check_data (c, p);

  if (error == 0)
    c->slot->nr_acked++;
  free (p->data);
  *p = (struct pending) { .used = false };
}

static struct pending *
find_pending (struct peer *c, uint64_t cookie)
{
  for (unsigned i = 0; i < DEPTH; ++i)
    if (c->pending[i].used && c->pending[i].cookie == cookie)
      return &c->pending[i];
  peer_failure (c, "a reply to a request that was not made: %" PRIx64,
                  cookie);
}

static void
take_data (struct peer *c, struct pending *p, uint64_t offset,
           const uint8_t *data, uint32_t length)
{
  const uint64_t at = offset - (uint64_t) p->first * SECTOR;

  if (p->type != NBD_CMD_READ || offset < (uint64_t) p->first * SECTOR ||
      range_exceeds (at, length, p->count * SECTOR))
    peer_failure (c, "data that were not asked for");
  if (data != NULL)
    memcpy (p->data + at, data, length);
  else
    memset (p->data + at, 0, length);
  p->received += length;
}

/* What was changed and acknowledged has to be dirty in every bitmap. */
static void
check_dirty (struct peer *c, const struct pending *p, unsigned context,
             uint64_t start, uint64_t end)
{
  for (uint32_t i = p->first; i < p->first + p->count; ++i)
    if ((uint64_t) i * SECTOR >= start && (uint64_t) (i + 1) * SECTOR <= end &&
        (c->model->sectors[i].flags & SECTOR_CHANGED) != 0)
      peer_failure (c, "sector %" PRIu32 " was changed, but is not dirty "
                      "in %s", i, peer_contexts[context]);
}

static void
take_extents (struct peer *c, const struct pending *p,
              const uint8_t *data, uint32_t length)
{
  const uint32_t head = c->extended ? 8 : 4, each = c->extended ? 16 : 8;
  uint64_t offset = (uint64_t) p->first * SECTOR;
  unsigned context = 0;

  if (p->type != NBD_CMD_BLOCK_STATUS || length < head + each ||
      length % each != head)
    peer_failure (c, "extents that were not asked for");
  while (context < NR_CONTEXTS && c->contexts[context] != get_be32 (data))
    context++;
  if (context == NR_CONTEXTS)
    peer_failure (c, "a context that was not asked for");
  for (uint32_t i = head; i < length; i += each) {
    const uint64_t n = c->extended ? get_be64 (data + i) : get_be32 (data + i);
    const uint64_t end = offset + n;

    if (n == 0 || end < offset)
      peer_failure (c, "an impossible extent");
    /* The lowest bit of what comes last. */
    if (context > 0 && (data[i + each - 1] & 1) == 0)
      check_dirty (c, p, context, offset, end);
    offset = end;
  }
}

static void
take_hole (struct peer *c, struct pending *p, const uint8_t *data,
           uint32_t length)
{
  const uint32_t n = length == 12 ? get_be32 (data + 8) : 0;
  uint8_t *zeroes;

  if (n == 0 || n > MAX_CHUNK)
    peer_failure (c, "a hole of %" PRIu32 " bytes", n);
  zeroes = calloc (n, 1);
  if (zeroes == NULL)
    abort ();
  take_data (c, p, get_be64 (data), zeroes, n);
  free (zeroes);
}

static void
take_chunk (struct peer *c, uint16_t type, uint16_t flags, uint64_t cookie,
            const uint8_t *data, uint32_t length)
{
  struct pending *p = find_pending (c, cookie);
  uint32_t error = 0;

  switch (type) {
  case NBD_REPLY_TYPE_NONE:
    break;
  case NBD_REPLY_TYPE_OFFSET_DATA:
    if (length < 8)
      peer_failure (c, "a short chunk");
    take_data (c, p, get_be64 (data), data + 8, length - 8);
    break;
  case NBD_REPLY_TYPE_OFFSET_HOLE:
    take_hole (c, p, data, length);
    break;
  case NBD_REPLY_TYPE_BLOCK_STATUS:
  case NBD_REPLY_TYPE_BLOCK_STATUS_EXT:
    if ((type == NBD_REPLY_TYPE_BLOCK_STATUS_EXT) != c->extended)
      peer_failure (c, "a chunk of type %u", type);
    take_extents (c, p, data, length);
    break;
  default:
    if ((type & 0x8000) == 0 || length < 6)
      peer_failure (c, "a chunk of type %u", type);
    error = get_be32 (data);
  }
  if (error != 0 || (flags & NBD_REPLY_FLAG_DONE) != 0)
    complete (c, p, error);
}

static int
structured_reply (struct peer *c)
{
  struct nbd_structured_reply h;
  uint32_t length;

  if (peer_need (c, sizeof h) == -1)
    return -1;
  memcpy (&h, c->in.data + c->in.start, sizeof h);
  length = be32toh (h.length);
  if (!c->structured || c->extended || length > MAX_CHUNK)
    peer_failure (c, "a chunk of %" PRIu32 " bytes", length);
  if (peer_need (c, sizeof h + length) == -1)
    return -1;
  c->in.start += sizeof h + length;
  take_chunk (c, be16toh (h.type), be16toh (h.flags), h.cookie,
              c->in.data + c->in.start - length, length);
  return 0;
}

static int
extended_reply (struct peer *c)
{
  struct nbd_extended_reply h;
  uint64_t length;

  if (peer_need (c, sizeof h) == -1)
    return -1;
  memcpy (&h, c->in.data + c->in.start, sizeof h);
  length = be64toh (h.length);
  if (!c->extended || length > MAX_CHUNK)
    peer_failure (c, "a chunk of %" PRIu64 " bytes", length);
  if (peer_need (c, sizeof h + length) == -1)
    return -1;
  c->in.start += sizeof h + length;
  take_chunk (c, be16toh (h.type), be16toh (h.flags), h.cookie,
              c->in.data + c->in.start - length, length);
  return 0;
}

static int
simple_reply (struct peer *c)
{
  struct nbd_simple_reply h;
  struct pending *p;
  uint32_t length = 0;

  if (peer_need (c, sizeof h) == -1)
    return -1;
  memcpy (&h, c->in.data + c->in.start, sizeof h);
  p = find_pending (c, h.cookie);
  if (p->type == NBD_CMD_READ && h.error == 0) {
    if (c->structured)
      peer_failure (c, "a simple reply to a read");
    length = p->count * SECTOR;
  }
  if (peer_need (c, sizeof h + length) == -1)
    return -1;
  c->in.start += sizeof h + length;
  if (length > 0)
    take_data (c, p, (uint64_t) p->first * SECTOR,
               c->in.data + c->in.start - length, length);
  complete (c, p, be32toh (h.error));
  return 0;
}

int
peer_reply (struct peer *c)
{
  uint32_t magic;

  if (peer_need (c, sizeof magic) == -1)
    return -1;
  magic = get_be32 (c->in.data + c->in.start);
  if (magic == NBD_STRUCTURED_REPLY_MAGIC)
    return structured_reply (c);
  if (magic == NBD_EXTENDED_REPLY_MAGIC)
    return extended_reply (c);
  if (magic != NBD_SIMPLE_REPLY_MAGIC || c->extended)
    peer_failure (c, "%08" PRIx32 " where a reply should begin", magic);
  return simple_reply (c);
}
