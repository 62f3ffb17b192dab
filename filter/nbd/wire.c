/* nbdkit-dirty-bitmap-filter
 * SPDX-License-Identifier: BSD-3-Clause
 * Copyright the nbdkit-dirty-bitmap-filter authors
 */

/* Requests on the wire.  The two forms of headers differ behind the offset
 * only.
 */

#include <config.h>

#include <errno.h>
#include <string.h>

#include "nbd/wire.h"

uint32_t
wire_errno (int err)
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

bool
wire_get_request (bool extended, const union wire_request *wire,
                  struct request *r)
{
  r->flags = be16toh (wire->compact.flags);
  r->type = be16toh (wire->compact.type);
  r->cookie = wire->compact.cookie; /* ours to return, not to understand */
  r->offset = be64toh (wire->compact.offset);
  r->length = extended ? be64toh (wire->extended.length)
                       : be32toh (wire->compact.length);
  return be32toh (wire->compact.magic) == (extended
                                           ? NBD_EXTENDED_REQUEST_MAGIC
                                           : NBD_REQUEST_MAGIC);
}

bool
wire_is_whole (bool extended, const uint8_t *p, size_t n)
{
  const size_t size = wire_request_size (extended);
  union wire_request wire;
  struct request r;

  if (n < size)
    return false;
  memcpy (&wire, p, size);
  wire_get_request (extended, &wire, &r);
  return !wire_has_payload (extended, r.type, r.flags) ||
    r.length <= n - size;
}

void
wire_put_chunk (void *p, bool extended, const struct request *r,
                uint16_t type, uint16_t flags, uint32_t length)
{
  if (extended) {
    struct nbd_extended_reply *chunk = p;

    chunk->magic = htobe32 (NBD_EXTENDED_REPLY_MAGIC);
    chunk->flags = htobe16 (flags);
    chunk->type = htobe16 (type);
    chunk->cookie = r->cookie;
    chunk->offset = htobe64 (r->offset);
    chunk->length = htobe64 (length);
  }
  else {
    struct nbd_structured_reply *chunk = p;

    chunk->magic = htobe32 (NBD_STRUCTURED_REPLY_MAGIC);
    chunk->flags = htobe16 (flags);
    chunk->type = htobe16 (type);
    chunk->cookie = r->cookie;
    chunk->length = htobe32 (length);
  }
}

void
wire_put_simple (struct nbd_simple_reply *reply, const struct request *r,
                 uint32_t error)
{
  reply->magic = htobe32 (NBD_SIMPLE_REPLY_MAGIC);
  reply->error = htobe32 (error);
  reply->cookie = r->cookie;
}
