/* nbdkit-dirty-bitmap-filter
 * SPDX-License-Identifier: BSD-3-Clause
 * Copyright the nbdkit-dirty-bitmap-filter authors
 */

#ifndef DIRTY_BITMAP_SOAK_PEER_H
#define DIRTY_BITMAP_SOAK_PEER_H

/* An NBD client that holds the server to the model, and that can be left
 * at any byte.
 *
 * Functions that return an int return -1 when the server has ended the
 * connection.  An answer that is wrong, or that does not come, ends the
 * process, with a message and the model's flag.
 */

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <time.h>
#include <gnutls/gnutls.h>

#include "model.h"

#define NR_CONTEXTS 4           /* base:allocation, and bitmaps */
#define MAX_COUNT 1024          /* sectors of a request */

struct address {
  const char *unix_path;
  uint16_t tcp_port;
};

struct buffer {
  uint8_t *data;
  size_t start, end, capacity;
};

struct pending {
  bool used;
  bool invalid;                 /* an error is the right answer */
  uint16_t type, flags;
  uint64_t cookie;
  uint32_t first, count;        /* sectors */
  struct operation *operation;  /* of a change */
  uint8_t *data;                /* of a read, so far */
  uint32_t received;            /* bytes of it */
};

struct peer {
  struct model *model;
  struct slot *slot;
  int fd;
  gnutls_session_t session;     /* or NULL */
  time_t keys_changed;          /* in which second */
  bool structured, extended;    /* the latter has the former */
  uint32_t contexts[NR_CONTEXTS];       /* ids, or UINT32_MAX */
  uint64_t next_cookie;
  struct pending pending[DEPTH];
  struct buffer in, out;
  const char *life;             /* for messages */
};

/* The names of the contexts; those from 1 on are bitmaps that record. */
extern const char *const peer_contexts[NR_CONTEXTS];

extern void __attribute__ ((noreturn, format (printf, 2, 3)))
peer_failure (const struct peer *, const char *fmt, ...);

extern int peer_connect (struct peer *, const struct address *, bool tcp);

/* Close, as the kernel does when the process dies; or reset. */
extern void peer_vanish (struct peer *, bool reset);

/* Bytes to be sent; send them all; have count bytes received. */
extern void peer_put (struct peer *, const void *, size_t count);
extern int peer_flush (struct peer *);
extern int peer_need (struct peer *, size_t count);

/* Send what can be sent for so long, and receive nothing. */
extern void peer_flush_deaf (struct peer *, int milliseconds);

/* What an option reply has; put an option. */
extern int peer_greet (struct peer *);
extern void peer_put_option (struct peer *, uint32_t option,
                               const void *, uint32_t length);
extern int peer_option_reply (struct peer *, uint32_t *type,
                                uint32_t *length);
extern int peer_starttls (struct peer *);
extern int peer_tls_handshake (struct peer *);
extern int peer_negotiate (struct peer *);

/* Requests.  Those that are put are sent by peer_flush at the latest.
 * False if there is no room, or another request is in the way.
 */
extern bool peer_request (struct peer *, uint16_t type, uint16_t flags,
                            uint32_t max_sectors);
extern void peer_put_header (struct peer *, uint16_t type,
                               uint16_t flags, uint64_t cookie,
                               uint64_t offset, uint32_t length);

/* Take one reply, or chunk of one. */
extern int peer_reply (struct peer *);
extern unsigned peer_in_flight (const struct peer *);

/* No more requests: the other half stays open. */
extern void peer_half_close (struct peer *);

#endif /* DIRTY_BITMAP_SOAK_PEER_H */
