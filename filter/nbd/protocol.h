/* nbdkit-dirty-bitmap-filter
 * SPDX-License-Identifier: BSD-3-Clause
 * Copyright the nbdkit-dirty-bitmap-filter authors
 */

#ifndef DIRTY_BITMAP_NBD_PROTOCOL_H
#define DIRTY_BITMAP_NBD_PROTOCOL_H

/* The NBD protocol on the wire, with the names of the protocol document
 * (doc/proto.md of the reference implementation, and for extended
 * headers that of its branch extension-ext-header).  All integers are
 * big endian.
 */

#include <stdint.h>

/* Handshake. */
#define NBD_MAGIC UINT64_C (0x4e42444d41474943)         /* NBDMAGIC */
#define NBD_OPTION_MAGIC UINT64_C (0x49484156454f5054)  /* IHAVEOPT */
#define NBD_OPTION_REPLY_MAGIC UINT64_C (0x0003e889045565a9)

#define NBD_MAX_STRING 4096

enum {
  NBD_FLAG_FIXED_NEWSTYLE = 1 << 0,
  NBD_FLAG_NO_ZEROES = 1 << 1,
};

enum {
  NBD_OPT_EXPORT_NAME = 1,
  NBD_OPT_ABORT = 2,
  NBD_OPT_LIST = 3,
  NBD_OPT_STARTTLS = 5,
  NBD_OPT_INFO = 6,
  NBD_OPT_GO = 7,
  NBD_OPT_STRUCTURED_REPLY = 8,
  NBD_OPT_LIST_META_CONTEXT = 9,
  NBD_OPT_SET_META_CONTEXT = 10,
  NBD_OPT_EXTENDED_HEADERS = 11,
};

#define NBD_REP_ERR(n) (UINT32_C (0x80000000) + (n))

#define NBD_REP_ACK UINT32_C (1)
#define NBD_REP_SERVER UINT32_C (2)
#define NBD_REP_INFO UINT32_C (3)
#define NBD_REP_META_CONTEXT UINT32_C (4)
#define NBD_REP_ERR_UNSUP NBD_REP_ERR (1)
#define NBD_REP_ERR_POLICY NBD_REP_ERR (2)
#define NBD_REP_ERR_INVALID NBD_REP_ERR (3)
#define NBD_REP_ERR_TLS_REQD NBD_REP_ERR (5)
#define NBD_REP_ERR_UNKNOWN NBD_REP_ERR (6)
#define NBD_REP_ERR_EXT_HEADER_REQD NBD_REP_ERR (10)

enum {
  NBD_INFO_EXPORT = 0,
  NBD_INFO_NAME = 1,
  NBD_INFO_DESCRIPTION = 2,
  NBD_INFO_BLOCK_SIZE = 3,
};

/* Transmission flags. */
enum {
  NBD_FLAG_HAS_FLAGS = 1 << 0,
  NBD_FLAG_READ_ONLY = 1 << 1,
  NBD_FLAG_SEND_FLUSH = 1 << 2,
  NBD_FLAG_SEND_FUA = 1 << 3,
  NBD_FLAG_ROTATIONAL = 1 << 4,
  NBD_FLAG_SEND_TRIM = 1 << 5,
  NBD_FLAG_SEND_WRITE_ZEROES = 1 << 6,
  NBD_FLAG_SEND_DF = 1 << 7,
  NBD_FLAG_CAN_MULTI_CONN = 1 << 8,
  NBD_FLAG_SEND_CACHE = 1 << 10,
  NBD_FLAG_SEND_FAST_ZERO = 1 << 11,
  NBD_FLAG_BLOCK_STATUS_PAYLOAD = 1 << 12,
};

struct nbd_new_handshake {
  uint64_t nbdmagic;
  uint64_t version;             /* NBD_OPTION_MAGIC */
  uint16_t gflags;
} __attribute__ ((packed));

struct nbd_new_option {
  uint64_t magic;
  uint32_t option;
  uint32_t length;
} __attribute__ ((packed));

struct nbd_option_reply {
  uint64_t magic;
  uint32_t option;
  uint32_t reply;
  uint32_t length;
} __attribute__ ((packed));

struct nbd_export_name_reply {
  uint64_t exportsize;
  uint16_t eflags;
  uint8_t zeroes[124];
} __attribute__ ((packed));

struct nbd_info_export {
  uint16_t info;
  uint64_t exportsize;
  uint16_t eflags;
} __attribute__ ((packed));

struct nbd_info_block_size {
  uint16_t info;
  uint32_t minimum;
  uint32_t preferred;
  uint32_t maximum;
} __attribute__ ((packed));

/* Transmission. */
#define NBD_REQUEST_MAGIC UINT32_C (0x25609513)
#define NBD_EXTENDED_REQUEST_MAGIC UINT32_C (0x21e41c71)
#define NBD_SIMPLE_REPLY_MAGIC UINT32_C (0x67446698)
#define NBD_STRUCTURED_REPLY_MAGIC UINT32_C (0x668e33ef)
#define NBD_EXTENDED_REPLY_MAGIC UINT32_C (0x6e8a278c)

#define NBD_MAX_PAYLOAD (UINT32_C (32) * 1024 * 1024)

enum {
  NBD_CMD_READ = 0,
  NBD_CMD_WRITE = 1,
  NBD_CMD_DISC = 2,
  NBD_CMD_FLUSH = 3,
  NBD_CMD_TRIM = 4,
  NBD_CMD_CACHE = 5,
  NBD_CMD_WRITE_ZEROES = 6,
  NBD_CMD_BLOCK_STATUS = 7,
};

enum {
  NBD_CMD_FLAG_FUA = 1 << 0,
  NBD_CMD_FLAG_NO_HOLE = 1 << 1,
  NBD_CMD_FLAG_DF = 1 << 2,
  NBD_CMD_FLAG_REQ_ONE = 1 << 3,
  NBD_CMD_FLAG_FAST_ZERO = 1 << 4,
  NBD_CMD_FLAG_PAYLOAD_LEN = 1 << 5,
};

#define NBD_REPLY_FLAG_DONE 1

enum {
  NBD_REPLY_TYPE_NONE = 0,
  NBD_REPLY_TYPE_OFFSET_DATA = 1,
  NBD_REPLY_TYPE_OFFSET_HOLE = 2,
  NBD_REPLY_TYPE_BLOCK_STATUS = 5,
  NBD_REPLY_TYPE_BLOCK_STATUS_EXT = 6,
  NBD_REPLY_TYPE_ERROR = 0x8001,
  NBD_REPLY_TYPE_ERROR_OFFSET = 0x8002,
};

struct nbd_request {
  uint32_t magic;
  uint16_t flags;
  uint16_t type;
  uint64_t cookie;
  uint64_t offset;
  uint32_t length;
} __attribute__ ((packed));

struct nbd_extended_request {
  uint32_t magic;
  uint16_t flags;
  uint16_t type;
  uint64_t cookie;
  uint64_t offset;
  uint64_t length;              /* of the payload if there is one */
} __attribute__ ((packed));

struct nbd_simple_reply {
  uint32_t magic;
  uint32_t error;
  uint64_t cookie;
} __attribute__ ((packed));

struct nbd_structured_reply {
  uint32_t magic;
  uint16_t flags;
  uint16_t type;
  uint64_t cookie;
  uint32_t length;
} __attribute__ ((packed));

struct nbd_extended_reply {
  uint32_t magic;
  uint16_t flags;
  uint16_t type;
  uint64_t cookie;
  uint64_t offset;              /* the request's */
  uint64_t length;
} __attribute__ ((packed));

/* What the payloads of chunks begin with. */
struct nbd_offset_data {
  uint64_t offset;
} __attribute__ ((packed));

struct nbd_offset_hole {
  uint64_t offset;
  uint32_t length;
} __attribute__ ((packed));

struct nbd_error_chunk {
  uint32_t error;
  uint16_t message_length;
} __attribute__ ((packed));

struct nbd_block_status_chunk {
  uint32_t context_id;
} __attribute__ ((packed));

struct nbd_block_status_ext_chunk {
  uint32_t context_id;
  uint32_t count;
} __attribute__ ((packed));

struct nbd_extent {
  uint32_t length;
  uint32_t flags;
} __attribute__ ((packed));

struct nbd_extent_ext {
  uint64_t length;
  uint64_t flags;
} __attribute__ ((packed));

/* What a BLOCK_STATUS that selects contexts begins its payload with;
 * their ids (32 bits each) follow.
 */
struct nbd_block_status_payload {
  uint64_t effect_length;
} __attribute__ ((packed));

/* The sizes that the protocol document gives. */
#define NBD_SIZE(type, size)                                            \
  _Static_assert (sizeof (struct type) == (size), "size of " #type)

NBD_SIZE (nbd_new_handshake, 18);
NBD_SIZE (nbd_new_option, 16);
NBD_SIZE (nbd_option_reply, 20);
NBD_SIZE (nbd_export_name_reply, 134);
NBD_SIZE (nbd_info_export, 12);
NBD_SIZE (nbd_info_block_size, 14);
NBD_SIZE (nbd_request, 28);
NBD_SIZE (nbd_extended_request, 32);
NBD_SIZE (nbd_simple_reply, 16);
NBD_SIZE (nbd_structured_reply, 20);
NBD_SIZE (nbd_extended_reply, 32);
NBD_SIZE (nbd_offset_data, 8);
NBD_SIZE (nbd_offset_hole, 12);
NBD_SIZE (nbd_error_chunk, 6);
NBD_SIZE (nbd_block_status_chunk, 4);
NBD_SIZE (nbd_block_status_ext_chunk, 8);
NBD_SIZE (nbd_extent, 8);
NBD_SIZE (nbd_extent_ext, 16);
NBD_SIZE (nbd_block_status_payload, 8);

#undef NBD_SIZE

/* The error values of the protocol. */
enum {
  NBD_SUCCESS = 0,
  NBD_EPERM = 1,
  NBD_EIO = 5,
  NBD_ENOMEM = 12,
  NBD_EINVAL = 22,
  NBD_ENOSPC = 28,
  NBD_EOVERFLOW = 75,
  NBD_ENOTSUP = 95,
  NBD_ESHUTDOWN = 108,
};

#endif /* DIRTY_BITMAP_NBD_PROTOCOL_H */
