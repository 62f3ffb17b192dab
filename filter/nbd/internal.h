/* nbdkit-dirty-bitmap-filter
 * SPDX-License-Identifier: BSD-3-Clause
 * Copyright the nbdkit-dirty-bitmap-filter authors
 */

#ifndef DIRTY_BITMAP_NBD_INTERNAL_H
#define DIRTY_BITMAP_NBD_INTERNAL_H

/* What the files of this room share.
 *
 *   server.c      listening sockets, the list of connections, start, stop
 *   bounds.c      who is let in, and who is cut
 *   budget.c      memory for all connections
 *   connection.c  one connection: its workers from birth to end
 *   role.c        who receives: the role, stealing it, the monitor
 *   input.c       bytes from the client
 *   output.c      bytes to the client
 *   tls.c         encryption between these two and the socket
 *   tls-credentials.c  what TLS needs, loaded once
 *   handshake.c   option haggling
 *   exports.c     what the names of exports stand for
 *   contexts.c    metadata contexts: names, queries, selection
 *   request.c     requests: receive, validate, execute
 *   reply.c       replies, in the form that was negotiated
 *   parts.c       large data, part by part
 *   extents.c     the extents of one context
 *   trace.c       what is told, and counted, of connections and requests
 *
 * Locks, in the order in which they may be taken: server->lock, then
 * connection->lock.  connection->send_lock and server->monitor_lock are
 * taken with no other lock held.  Inside send_lock only the lock of
 * struct tls is taken, which the receiver takes too, and inside which
 * none is.  The locks of struct budget and struct limit are
 * taken inside any other, and none inside them.
 */

#include <pthread.h>
#include <stdatomic.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <string.h>
#include <sys/eventfd.h>
#include <sys/uio.h>

#include "common/clock.h"
#include "common/limit.h"
#include "common/report.h"
#include "common/threads.h"
#include "disk/disk.h"
#include "nbd/client-errors.h"
#include "nbd/debug.h"
#include "nbd/nbd.h"
#include "nbd/protocol.h"
#include "nbd/stream.h"
#include "nbd/tls.h"
#include "stats/stats.h"

#define MAX_WORKERS NBD_MAX_REQUESTS

/* Replies are gathered until GATHER_LIMIT is passed.  One of up to
 * REPLY_ROOM bytes (and its header) is made in place behind them.
 */
#define GATHER_LIMIT (64 * 1024)
#define REPLY_ROOM (64 * 1024)
#define OUTPUT_SIZE (GATHER_LIMIT + REPLY_ROOM + 512)

/* A payload up to this, and an array of extents up to this many bytes,
 * are in a buffer of the worker's own; larger ones come out of the budget.
 * Any payload that the input buffer can hold whole is a small one.
 */
#define SMALL_PAYLOAD INPUT_SIZE
#define SMALL_EXTENTS (32 * 1024)

/* An array of extents of so many bytes is kept for the next request by the
 * holder of the role.  Others may have to wait long for one.
 */
#define KEPT_EXTENTS (1024 * 1024)

/* What TLS costs a connection. */
#define TLS_COST (320 * 1024)

/* Large data are moved in parts of this size (parts.c). */
#define PART_SIZE (128 * 1024)

struct connection;
struct worker;

/* A bitmap's context, sorted by name for look-ups. */
struct context_name {
  const char *name;
  size_t bitmap;                /* as disk.h numbers them */
};

/* Free buffers of one size. */
struct budget_class {
  void *free;                   /* the first; each points to the next */
  unsigned nr;
  unsigned nr_spare;            /* the least nr since the last look */
};

struct budget_waiter;

/* From twice SMALL_PAYLOAD to NBD_MAX_PAYLOAD. */
#define BUDGET_CLASSES 8

/* Memory for requests: see budget.c. */
struct budget {
  uint64_t size;                /* fixed */
  atomic_uint waiting;          /* workers; changed under lock */

  /* Protects what follows, and connection->held and
   * ->waiting_for_memory.
   */
  pthread_mutex_t lock;
  pthread_cond_t freed;
  uint64_t used, cached;
  struct budget_waiter *line;   /* who waits */
  bool watched;                 /* budget_trim will be called */
  struct budget_class class[BUDGET_CLASSES];
};

struct nbd_server {
  /* Fixed once nbd_server_new has returned. */
  struct disk *disk;
  uint64_t size;
  uint32_t preferred_block_size;
  bool readonly;
  struct export_options export;
  const struct nbd_tls *tls;    /* or NULL: there is none */
  struct stats *stats;          /* or NULL: nobody wants them */
  uint16_t eflags;              /* transmission flags without DF */
  struct context_name *contexts;
  size_t nr_bitmaps;
  struct nbd_limits limits;     /* in force; none is 0 but idle_seconds */
  unsigned max_extra_threads;
  struct budget budget;
  struct limit errors;          /* messages about clients */

  /* nbd_server_add_client's, or -1; -1 again when there is a connection
   * of this fd.  ended_fd is an eventfd.
   */
  int client_fd, ended_fd;

  /* Fixed once nbd_server_start has returned, and closed by the thread
   * that accepts when it ends.
   */
  int *sockets;
  size_t nr_sockets;
  struct pollfd *pollfds;       /* wake_fd, then the sockets */
  bool started;
  int wake_fd;                  /* an eventfd that wakes accept_thread */
  pthread_t accept_thread;
  pthread_t monitor_thread;

  atomic_bool stopping;         /* receive nothing more */
  int64_t cut_at_ms;            /* set before that: when to disconnect the
                                   clients that are left */
  atomic_uint nr_extra_threads; /* besides one for each connection */

  /* Protects the lists and counts below, and that the fd of a listed
   * connection is open.
   */
  pthread_mutex_t lock;
  pthread_cond_t changed;       /* nr_live has fallen */
  struct connection *live;
  atomic_uint nr_live;          /* may be read without it */
  unsigned nr_handshaking;      /* of these */
  unsigned nr_cut;              /* of these, to make room */
  bool crowded;                 /* nobody was let in for want of room */
  struct connection *finished;  /* to be joined and freed */
  uint64_t nr_served;           /* the serial number of the last one */

  /* The accepting thread's own. */
  bool was_short;               /* of memory */
  int64_t next_trim;            /* see bounds.c */

  /* The monitor sleeps when nothing has happened for a while.
   * monitor_lock protects going to sleep and being woken.
   */
  pthread_mutex_t monitor_lock;
  pthread_cond_t monitor_wake;
  atomic_bool monitor_asleep;
  atomic_bool monitor_stop;
};

/* The state of the receive role, in the low bits of connection->role.
 * The bits above are a number that grows with each request that is
 * executed with the role kept.
 */
enum role_state { ROLE_FREE = 0, ROLE_OWNED = 1, ROLE_EXECUTING = 2 };
#define ROLE_STATE_BITS 2
#define ROLE_STATE(word) ((word) & ((1 << ROLE_STATE_BITS) - 1))

struct request {
  uint16_t type, flags;
  uint64_t cookie, offset;
  uint64_t length;              /* the effect length */
};

/* What of a READ or WRITE is moved now: most often the whole. */
struct part {
  uint64_t offset;
  uint32_t length;
  bool is_whole, is_last;
  bool is_hole;                 /* of a READ, once it was executed */
  unsigned chunks_left;         /* of a small READ, with this one */
};

struct extents {
  struct connection *connection; /* whose budget it is */
  size_t reserved;              /* bytes out of the budget */
  union {                       /* in wire format */
    struct nbd_extent *compact;
    struct nbd_extent_ext *extended; /* where extended headers are */
    void *wire;
  };
  size_t nr, capacity;          /* in extents */
};

struct worker {
  struct connection *connection;
  pthread_t thread;

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
  long sleeps;
  struct debug_context id;      /* of the request at hand */
  uint64_t began;               /* see stats.h */
  uint64_t spent;               /* before that, on parts of it */
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

/* A worker that the role was taken from, or NULL: the next holder sends
 * its gathered replies, if its ticket is still this one.
 */
struct robbed {
  struct worker *worker;
  uint64_t ticket;
};

struct connection {
  struct nbd_server *server;
  uint64_t serial;              /* from 1 on */
  int ended_fd;                 /* an eventfd to write to at the end, or -1 */
  struct connection *prev, *next; /* server->lock */
  struct disk_client client;
  int64_t started_ms;
  bool cut_for_room;            /* server->lock */

  size_t held;                  /* out of the budget: budget->lock */
  unsigned waiting_for_memory;  /* workers: budget->lock */

  /* What the accepting thread knows (bounds.c). */
  int64_t stalled_since;
  uint64_t moved;
  bool holds_memory;

  struct stream stream;

  /* Negotiated; fixed when transmission begins. */
  struct export export;
  bool structured;              /* replies are structured or extended */
  bool extended;                /* headers, both ways */
  uint32_t *contexts;           /* the ids that are selected, ascending */
  size_t nr_contexts;
  bool holds_bitmaps;           /* those of the two above (disk.h) */

  /* What is told of it (trace.c).  The holder of the role counts. */
  char export_name[64];         /* made printable, and cut */
  uint64_t nr_requests;
  uint64_t bytes[2];            /* of NBD_CMD_READ, of NBD_CMD_WRITE */

  /* What the holder of the role owns. */
  bool out_of_step;             /* where the next request begins is not
                                   known, so there is none */
  uint64_t seq;                 /* of the request executed last */
  bool slow_by_nature;          /* the request that is executing */
  bool sending;                 /* or what it executes is sendmsg */
  bool has_gathered;            /* replies that were not sent before it */
  unsigned until_sample;

  _Alignas (64) atomic_uint_fast64_t role;
  uint64_t seen_role;           /* the monitor's */

  /* Protects the fields below, and every change of role from and to
   * ROLE_FREE.
   */
  pthread_mutex_t lock;
  pthread_cond_t role_freed;
  unsigned waiting;             /* workers that wait for the role */
  unsigned nr_workers;
  struct worker *workers[MAX_WORKERS];
  struct worker *holder;        /* who has the role, or had it last: it
                                   may read this without the lock */
  struct robbed robbed;         /* for the next holder */
  void *(*worker_main) (void *); /* the threads begin here */
  bool input_ended;             /* no more requests will come */

  atomic_bool handshaking;

  atomic_bool eager;            /* see role.c */
  atomic_uint quick_run, sampled_waits;
};

static inline size_t
request_header_size (const struct connection *c)
{
  return c->extended ? sizeof (struct nbd_extended_request)
                     : sizeof (struct nbd_request);
}

/* Is the length of a request that of a payload behind its header? */
static inline bool
request_has_payload (const struct connection *c, uint16_t type,
                     uint16_t flags)
{
  return type == NBD_CMD_WRITE ||
    (c->extended && (flags & NBD_CMD_FLAG_PAYLOAD_LEN) != 0);
}

/* The bytes behind a header in the form of the wire. */
static inline uint64_t
request_payload_length (const struct connection *c, const void *header)
{
  struct nbd_extended_request extended;
  struct nbd_request compact;   /* the other begins as this does */

  memcpy (&compact, header, sizeof compact);
  if (!request_has_payload (c, be16toh (compact.type),
                            be16toh (compact.flags)))
    return 0;
  if (!c->extended)
    return be32toh (compact.length);
  memcpy (&extended, header, sizeof extended);
  return be64toh (extended.length);
}

static inline size_t
extent_size (const struct connection *c)
{
  return c->extended ? sizeof (struct nbd_extent_ext)
                     : sizeof (struct nbd_extent);
}

/* server.c */

/* Let the accepting thread look at what there is to do. */
static inline void
server_wake (struct nbd_server *server)
{
  eventfd_write (server->wake_fd, 1);
}

/* roster.c */

/* A connection that was started is on the list of live ones.  Called with
 * server->lock.
 */
extern void roster_add (struct connection *);

/* It is through its handshake. */
extern void roster_handshake_done (struct connection *);

/* It has ended: close its descriptor and have it joined. */
extern void roster_finish (struct connection *);

/* Those that are to be joined and freed. */
extern struct connection *roster_take_finished (struct nbd_server *);

/* bounds.c */

/* How long a place in the handshake is a client's own, a client may hold
 * memory that others wait for without moving data, and a free buffer is
 * kept.  Variable for the unit tests.
 */
extern unsigned place_ms, stall_ms, trim_ms;

/* Lower the number of connections to what the limit of open files allows
 * for.
 */
extern void bounds_for_descriptors (struct nbd_limits *);

/* May another client be let in?  If it has to WAIT, *wait_ms says how
 * long until it is worth asking again, -1 if somebody will wake us.
 */
enum admission { ADMIT, WAIT, REFUSE };
extern enum admission bounds_admit (struct nbd_server *, int *wait_ms);

/* Cut whom it is time to cut.  Returns in how many milliseconds to look
 * again, -1 for never.
 */
extern int bounds_look (struct nbd_server *);

/* budget.c */

/* Divide limits.memory among connections (their number may be lowered),
 * threads and the budget.  limits and nr_bitmaps are set.  -1 with errno.
 */
extern int budget_divide (struct nbd_server *);
extern void budget_free (struct budget *);

/* A buffer of at least length bytes, and its capacity.  Waits until there
 * is room.  NULL with errno, ESHUTDOWN if the connection is cut.
 */
extern uint8_t *budget_take (struct connection *, size_t length,
                             size_t *capacity);
extern void budget_give (struct connection *, uint8_t *buffer,
                         size_t capacity);

/* Count memory that the caller allocates, or has freed.  False if there
 * is no room for so long.
 */
extern bool budget_reserve (struct connection *, size_t count,
                            unsigned patience_ms);
extern void budget_unreserve (struct connection *, size_t count);

/* Does anybody wait? */
extern bool budget_is_short (const struct budget *);

/* Wake who waits, because a connection was cut. */
extern void budget_wake (struct budget *);

/* Give buffers that were not needed since the last call to the system.
 * False if there is nothing more to look at.
 */
extern bool budget_trim (struct budget *);

/* connection.c */

/* Serve a client in threads of its own.  The descriptor becomes the
 * connection's, unless this returns NULL.  Called with server->lock.
 */
extern struct connection *connection_start (struct nbd_server *, int fd);

/* Join the last thread and free.  Not on a list any more. */
extern void connection_join (struct connection *);

/* No more replies can be sent, no more requests are wanted. */
extern void connection_cut (struct connection *);

/* worker.c */
extern struct worker *worker_new (struct connection *);
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

/* role.c */

/* Wait for the role.  False if there is nothing more to receive.  The
 * caller sends the replies of the robbed worker, if there is one, and may
 * lose the role meanwhile.
 */
extern bool role_acquire (struct worker *, struct robbed *);

/* Another worker may receive.  The caller sends what it has gathered. */
extern void role_release (struct worker *);
extern void role_end_input (struct worker *);
extern void role_begin_executing (struct worker *, bool slow_by_nature);
extern void role_begin_sending (struct worker *);

/* Take the role from a holder that executes for too long, if the word is
 * still this one.  Called with server->lock.
 */
extern void role_steal (struct connection *, uint_fast64_t word);
extern void role_end_executing (struct worker *);
extern void pace_begin (struct worker *, bool slow_by_nature);
extern void pace_end (struct worker *);
extern void monitor_wake (struct nbd_server *);

/* monitor.c */
extern void *monitor_main (void *server);
extern void monitor_quit (struct nbd_server *);

/* output.c */

/* Send the reply of a worker that has the role, now or with the next
 * ones; send that of one that has not.
 */
extern void output_reply (struct worker *);

/* Give up the role if we have it and send what there is of the reply,
 * of which more follows.
 */
extern void output_partial_reply (struct worker *);

/* Send the gathered replies of a worker. */
extern void output_flush (struct worker *);

/* The same for a worker that has the role, and may be without it
 * afterwards: its own replies; or those of a robbed worker, if that is
 * still at the request of which this was the ticket.
 */
extern void output_flush_keeping_role (struct worker *);
extern void output_flush_robbed (struct worker *, const struct robbed *);

/* The same, if there are any. */
extern void output_flush_gathered (struct worker *);

/* Let another worker receive, and send what is gathered. */
extern void output_release_role (struct worker *);

/* Gather bytes and send them when there are many, or by output_flush:
 * for the handshake, before there are roles.
 */
extern int output_append (struct worker *, const void *, size_t);

/* handshake.c */

/* Haggle until transmission begins.  -1 if it never does. */
extern int handshake (struct worker *);

/* An option being received: what the client said it sends, and how much
 * of it has not been taken.
 */
struct option {
  struct worker *worker;
  uint32_t option;
  uint32_t remaining;
  unsigned nr_listed;           /* exports that LIST has told of */
};

/* Take count bytes of the option.  1 if it is shorter than that, -1 if
 * the connection ends.
 */
extern int option_read (struct option *, void *buf, size_t count);
extern int option_skip (struct option *, size_t count);

/* One option reply.  The error also drains the option. */
extern int option_reply (struct option *, uint32_t reply,
                         const void *data, size_t length);
extern int option_reply2 (struct option *, uint32_t reply,
                          const void *data, size_t length,
                          const void *more, size_t more_length);
extern int option_error (struct option *, uint32_t reply,
                         const char *message);

/* An export's name: its 32 bit length and its bytes, into name[] of
 * NBD_MAX_STRING.  0 if it is fine; 1 if not, and an error reply was
 * sent; -1.
 */
extern int option_export_name (struct option *, char *name,
                               uint32_t *length);

/* The export of a name that the client gave: 0; 1 if there is none, and
 * an error reply was sent; -1.
 */
extern int option_find_export (struct option *, const char *name,
                               uint32_t length, struct export *);

/* contexts.c */

/* What SET_META_CONTEXT said last, kept during the handshake. */
struct selection {
  char *export_name;            /* NULL if nothing is selected */
  uint32_t export_name_length;
};

extern int contexts_index (struct nbd_server *);
extern int contexts_list (struct option *);
extern int contexts_set (struct option *, struct selection *);

/* Select nothing. */
extern void contexts_drop (struct connection *);

/* Are contexts selected, and for this export? */
extern bool contexts_selected (const struct connection *,
                               const struct selection *,
                               const char *name, uint32_t length);

/* The client opens this export: drop what was selected for another one, and
 * hold the bitmaps that it has from now on, before it learns that it has them;
 * and release them at its end.
 */
extern void contexts_bind (struct connection *, const struct selection *,
                           const char *name, uint32_t length);
extern void contexts_release (struct connection *);

#define CONTEXT_BASE_ALLOCATION 0
#define CONTEXT_ALLOCATION_DEPTH 1
#define CONTEXT_FIRST_BITMAP 2

/* request.c */

/* Receive, execute and answer one request.  -1 if there are no more. */
extern int request_serve (struct worker *);

/* reply.c */

/* An error, an errno.  offset says where in a READ, of which what was sent
 * before is valid, or is NULL.
 */
extern void reply_error_at (struct worker *, int err, const char *message,
                            const uint64_t *offset);
extern void reply_error (struct worker *, int err, const char *message);

/* Success, and nothing to say. */
extern void reply_done (struct worker *);

/* A successful READ, or a part of it, w->part.  Its data are in the payload
 * if the READ is longer than REPLY_ROOM; else they are already where
 * reply_read_place says, behind the header that is made here.
 */
extern void reply_read (struct worker *);
extern uint8_t *reply_read_place (const struct worker *);

/* One chunk of a BLOCK_STATUS, of w->extents. */
extern void reply_block_status (struct worker *, uint32_t id, bool last);

/* parts.c */

/* Data longer than this are moved part by part.  Variable for the unit
 * tests.
 */
extern uint32_t parts_above;

/* Begin with the whole of a READ or WRITE as its only part. */
extern void part_whole (struct worker *);

/* The first part of a READ that may be answered in several chunks; and
 * the next one.
 */
extern void part_first_read (struct worker *);
extern void part_next_read (struct worker *);

/* Read the part from the disk.  It is what there was to be read, and may be
 * shorter, or a hole.  -1 with errno.
 */
extern int part_read (struct worker *);

/* Of what is left of a WRITE, may a part be written before the rest? */
extern bool part_is_to_be_cut (const struct worker *);

/* Make the first of what is left the part, and then what follows it. */
extern void part_first_write (struct worker *);
extern void part_rest_of_write (struct worker *);

/* trace.c */
/* This thread is the worker's. */
extern void trace_thread (struct worker *);

/* The export that the client has chosen; its transmission phase begins;
 * it has ended.
 */
extern void trace_export (struct connection *,
                          const char *name, uint32_t length);
extern void trace_opened (struct connection *);
extern void trace_closed (struct connection *);

/* A request: its header is here, and it has the next number. */
extern void trace_show_header (struct worker *);

static inline void
trace_header (struct worker *w)
{
  w->id.request = ++w->connection->nr_requests;
  w->id.cookie = w->request.cookie;
  if (__builtin_expect (dirty_bitmap_debug_request, 0))
    trace_show_header (w);
}

/* It is here whole, and was refused with an errno, or 0 if not.  This and
 * the one above are for the holder of the role.
 */
static inline void
trace_begin (struct worker *w, int err)
{
  struct connection *c = w->connection;

  if (err == 0 && w->request.type <= NBD_CMD_WRITE)
    c->bytes[w->request.type] += w->request.length;
  w->error = 0;
  w->began = stats_begin (c->server->stats) - w->spent;
  w->spent = 0;
}

/* It is done, except for sending the reply. */
extern void trace_count (struct worker *);

static inline void
trace_end (struct worker *w)
{
  if (__builtin_expect (w->connection->server->stats != NULL, 0))
    trace_count (w);
  w->id.request = 0;
}

/* It says that there will be no others, and is none itself. */
extern void trace_disconnect (struct worker *);

/* extents.c */

/* The most extents in a chunk (R8).  Variable for the unit tests. */
extern size_t extents_max;

/* What context id has to say of [offset, offset + length), in
 * w->extents.  With req_one the first extent alone, in its own length
 * (R13).  Returns 0; or an errno, for the two contexts of allocation or
 * the first call of a reply only.
 */
extern int extents_build (struct worker *, uint32_t id,
                          uint64_t offset, uint64_t length, bool req_one);

#endif /* DIRTY_BITMAP_NBD_INTERNAL_H */
