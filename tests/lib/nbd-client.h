/* nbdkit-dirty-bitmap-filter
 * SPDX-License-Identifier: BSD-3-Clause
 * Copyright the nbdkit-dirty-bitmap-filter authors
 */

#ifndef DIRTY_BITMAP_TEST_NBD_CLIENT_H
#define DIRTY_BITMAP_TEST_NBD_CLIENT_H

/* A server over a fake disk, and a client that says exactly what it is
 * told, right or wrong.  Everything fails the running test if it does
 * not work.
 */

#include <stdarg.h>
#include <setjmp.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <cmocka.h>

#include "fake-disk.h"
#include "nbd/nbd.h"
#include "nbd/protocol.h"

struct fixture {
  struct disk *disk;
  struct nbd_server *server;
  char dir[64], path[96];
  struct nbd_tls *tls;          /* may be set before fixture_start, */
  struct nbd_limits limits;     /* and these */
  const char *export_name;
  bool list_deltas;             /* the same */
  bool paused;                  /* by fixture_pause_monitor */
};

/* Set to require TLS of all servers to come.  Clients then speak it
 * without noticing (tls-relay.h).
 */
extern bool fixture_over_tls;

/* Set to have client_open negotiate extended headers.  send_request and
 * recv_reply then speak them, and no other, with that client.
 */
extern bool client_wants_extended;

/* Keys in a file of the fixture, as nbd_options wants them. */
extern struct nbd_tls *fixture_load_tls (const struct fixture *,
                                         bool required);

/* Make a disk.  fixture_start then serves it. */
extern void fixture_init (struct fixture *, uint64_t size);
extern void fixture_start (struct fixture *, bool readonly);
extern void fixture_stop (struct fixture *);
extern int fixture_connect (const struct fixture *);

/* The memory that requests of all clients hold, and that workers keep for
 * the next one, in bytes.
 */
extern size_t fixture_memory (const struct fixture *);

/* Between the two no worker loses the receive role for being slow.  No
 * client may connect, finish its handshake or disconnect meanwhile: it
 * would wait.
 */
extern void fixture_pause_monitor (struct fixture *);
extern void fixture_resume_monitor (struct fixture *);

/* Does a sanitizer or valgrind make this program slow, and large? */
extern bool is_instrumented (void);
extern unsigned milliseconds (void);
extern unsigned count_threads (void);

extern void send_bytes (int fd, const void *, size_t);
extern void recv_bytes (int fd, void *, size_t);

/* The next thing from the server must be its end of the connection. */
extern void expect_end (int fd);

/* Greeting; cflags are sent. */
extern void client_greet (int fd, uint32_t cflags);

extern void send_option (int fd, uint32_t option, const void *, uint32_t);

struct option_reply {
  uint32_t option, type, length;
  uint8_t data[8192];
};
extern void recv_option_reply (int fd, struct option_reply *);

/* Receive one reply to this option of this type. */
extern void expect_option_reply (int fd, uint32_t option, uint32_t type,
                                 struct option_reply *);

/* LIST or SET_META_CONTEXT data: a NULL ends the queries.  Returns its
 * length.
 */
extern uint32_t make_context_query (uint8_t *buf, const char *name,
                                    const char *const *queries);

/* Negotiate: all in one. */
extern void client_go (int fd, const char *name, struct option_reply *export);
extern void client_structured (int fd);
extern void client_extended (int fd);
extern void client_set_contexts (int fd, const char *const *queries,
                                 unsigned expected);

/* A connection that has negotiated structured replies or extended headers
 * and contexts.
 */
extern int client_open (const struct fixture *, const char *const *queries);

extern void put_request (void *buf, uint16_t flags, uint16_t type,
                         uint64_t cookie, uint64_t offset, uint32_t length);
extern void put_extended_request (void *buf, uint16_t flags, uint16_t type,
                                  uint64_t cookie, uint64_t offset,
                                  uint64_t length);

/* A header in the form that was negotiated.  A WRITE says that it has a
 * payload; nothing else does of itself.
 */
extern void send_request (int fd, uint16_t flags, uint16_t type,
                          uint64_t cookie, uint64_t offset, uint64_t length);

struct reply {
  bool structured;              /* or extended */
  uint16_t flags, type;         /* of the chunk */
  uint64_t cookie;
  uint64_t offset;              /* of an extended one */
  uint32_t error;               /* of a simple reply or an error chunk */
  uint32_t length;              /* of the data of a chunk */
  uint8_t *data;                /* malloc'ed */
};

/* One simple reply or chunk.  simple_length is how many bytes follow a
 * simple reply without an error.
 */
extern void recv_reply (int fd, struct reply *, uint32_t simple_length);

/* The same, but if it is to a READ that is answered in several chunks,
 * wait for them all, and give them as one.  Those of replies that are not
 * complete yet are kept for the thread's next call.
 */
extern void recv_whole_reply (int fd, struct reply *, uint32_t simple_length);

/* The whole reply to a READ of length bytes from offset, which may come
 * in several chunks: the data in buf, each byte at most once, and if there
 * is no error all of them.
 */
#define MAX_CHUNKS 2048
struct read_chunk {
  uint32_t length;
  bool is_hole;
};
struct read_reply {
  unsigned nr_chunks;           /* of data or holes, or 1 for a simple reply */
  struct read_chunk chunk[MAX_CHUNKS]; /* of a structured reply */
  uint32_t got;                 /* bytes */
  uint32_t error;
  uint64_t error_offset;        /* or UINT64_MAX: the error has none */
};
extern struct read_reply recv_read (int fd, uint64_t cookie, uint64_t offset,
                                    uint32_t length, uint8_t *buf);

/* A reply without data, to cookie, with error. */
extern void expect_error (int fd, uint64_t cookie, uint32_t error);

/* One READ is answered, and right. */
extern void client_check_alive (const struct fixture *, int fd);

/* A client that asks for far more data than sockets hold, by 200 READs,
 * and does not read.
 */
extern int client_greedy (const struct fixture *);

#endif /* DIRTY_BITMAP_TEST_NBD_CLIENT_H */
