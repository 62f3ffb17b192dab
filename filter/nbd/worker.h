/* nbdkit-dirty-bitmap-filter
 * SPDX-License-Identifier: BSD-3-Clause
 * Copyright the nbdkit-dirty-bitmap-filter authors
 */

#ifndef DIRTY_BITMAP_NBD_WORKER_H
#define DIRTY_BITMAP_NBD_WORKER_H

/* A worker: a thread of a connection, and what it has for the request at
 * hand.  Only the worker itself touches it, but where it says so.
 */

#include <pthread.h>
#include <semaphore.h>
#include <stdatomic.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "nbd/budget.h"
#include "nbd/debug.h"
#include "nbd/service.h"
#include "nbd/session.h"
#include "nbd/stream.h"
#include "nbd/wire.h"

/* Replies are gathered until GATHER_LIMIT is passed.  One of up to
 * REPLY_ROOM bytes (and its header) is made in place behind them.
 */
#define GATHER_LIMIT (64 * 1024)
#define REPLY_ROOM (64 * 1024)
#define OUTPUT_SIZE (GATHER_LIMIT + REPLY_ROOM + 512)

/* Any payload that the input buffer can hold whole is a small one. */
_Static_assert (SMALL_PAYLOAD >= INPUT_SIZE, "a worker's buffer is small");

/* An array of extents up to this many bytes is the worker's own; a larger
 * one comes out of the budget.
 */
#define SMALL_EXTENTS (32 * 1024)

struct connection;
struct team;

/* What of a READ or WRITE is moved now: most often the whole. */
struct part {
  uint64_t offset;
  uint32_t length;
  bool is_whole, is_last;
  bool is_hole;                 /* of a READ, once it was executed */
  unsigned chunks_left;         /* of a small READ, with this one */
};

struct extents {
  struct account *account;      /* that pays for it */
  size_t reserved;              /* bytes out of the budget */
  union {                       /* in wire format */
    struct nbd_extent *compact;
    struct nbd_extent_ext *extended; /* where extended headers are */
    void *wire;
  };
  size_t nr, capacity;          /* in extents */
};

struct worker {
  /* Constant: the parts of its connection. */
  struct connection *connection;
  const struct service *service;
  struct session *session;      /* changed in the handshake only */
  struct stream *stream;
  struct team *team;
  struct account *account;
  pthread_t thread;

  /* The next one that is idle: protected by the team's lock. */
  struct worker *next_idle;
  sem_t called;

  /* The worker's own. */
  bool has_role;
  atomic_uint_fast64_t ticket;  /* the role word of what it executes, or
                                   0; see output_flush_robbed */
  struct request request;
  struct part part;             /* of it */
  uint8_t *payload;             /* of a WRITE, or a large READ: one of */
  uint8_t *small;               /* SMALL_PAYLOAD bytes, or NULL */
  uint8_t *large;               /* out of the budget, or NULL */
  size_t large_capacity;
  struct extents extents;
  const uint32_t *contexts;     /* the ids that a BLOCK_STATUS asks for, */
  size_t nr_contexts;           /* ascending */
  bool measured;                /* see role.c, "pace" */
  bool measured_eager;
  unsigned until_measured;      /* how many requests, if eager */
  long sleeps;
  struct debug_context id;      /* of the request at hand */
  uint64_t began;               /* see stats.h */
  int error;                    /* an errno: how the request failed, or 0 */

  /* Replies: output[0, gathered) is complete and not yet sent; the
   * reply to the request at hand is output[reply_at, +reply_length)
   * and then reply_payload.  gathered is changed by this worker while
   * it has the role, and under send_lock when it has not.
   */
  uint8_t *output;              /* OUTPUT_SIZE bytes */
  size_t gathered;
  size_t reply_at, reply_length;
  const void *reply_payload;
  size_t reply_payload_length;
};

/* A worker of the same connection, without a thread.  NULL with errno. */
extern struct worker *worker_new (const struct worker *);
extern void worker_free (struct worker *);

/* A buffer for a payload, w->payload, NULL with errno.  A large one may
 * have to be waited for, and is the worker's until the request ends.
 */
extern uint8_t *worker_payload (struct worker *, uint32_t length);

/* Room for an array of extents of so many bytes.  False if there is
 * none.
 */
extern bool worker_extents_room (struct extents *, size_t size);

/* The request is answered: give back what is large. */
extern void worker_end_request (struct worker *);

/* Give back the array of extents, if it counts in the budget: before
 * waiting, for memory or for the client.
 */
extern void worker_give_extents (struct worker *);

/* The same, if others wait for memory. */
extern void worker_share (struct worker *);

/* Idle: give back all that can be. */
extern void worker_trim (struct worker *);

#endif /* DIRTY_BITMAP_NBD_WORKER_H */
