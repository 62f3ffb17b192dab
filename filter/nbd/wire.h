/* nbdkit-dirty-bitmap-filter
 * SPDX-License-Identifier: BSD-3-Clause
 * Copyright the nbdkit-dirty-bitmap-filter authors
 */

#ifndef DIRTY_BITMAP_NBD_WIRE_H
#define DIRTY_BITMAP_NBD_WIRE_H

/* Requests on the wire: bytes only, no threads and no state.  extended says
 * which form of headers was negotiated.
 */

#include <endian.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "nbd/protocol.h"

struct request {
  uint16_t type, flags;
  uint64_t cookie, offset;
  uint64_t length;              /* the effect length */
};

/* A request's header in either form. */
union wire_request {
  struct nbd_request compact;
  struct nbd_extended_request extended;
};

static inline size_t
wire_request_size (bool extended)
{
  return extended ? sizeof (struct nbd_extended_request)
                  : sizeof (struct nbd_request);
}

static inline size_t
wire_extent_size (bool extended)
{
  return extended ? sizeof (struct nbd_extent_ext)
                  : sizeof (struct nbd_extent);
}

static inline size_t
wire_chunk_size (bool extended)
{
  return extended ? sizeof (struct nbd_extended_reply)
                  : sizeof (struct nbd_structured_reply);
}

/* Is the length of a request that of a payload behind its header? */
static inline bool
wire_has_payload (bool extended, uint16_t type, uint16_t flags)
{
  return type == NBD_CMD_WRITE ||
    (extended && (flags & NBD_CMD_FLAG_PAYLOAD_LEN) != 0);
}

/* Decode a header.  False if its magic is wrong. */
extern bool wire_get_request (bool extended, const union wire_request *,
                              struct request *);

/* Do these bytes begin with a whole request, payload included? */
extern bool wire_is_whole (bool extended, const uint8_t *, size_t);

/* The protocol's error value of an errno. */
extern uint32_t wire_errno (int err);

/* Encode the header of a chunk, of wire_chunk_size bytes, with length bytes
 * of payload to follow; or a simple reply.
 */
extern void wire_put_chunk (void *, bool extended, const struct request *,
                            uint16_t type, uint16_t flags, uint32_t length);
extern void wire_put_simple (struct nbd_simple_reply *,
                             const struct request *, uint32_t error);

#endif /* DIRTY_BITMAP_NBD_WIRE_H */
