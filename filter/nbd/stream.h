/* nbdkit-dirty-bitmap-filter
 * SPDX-License-Identifier: BSD-3-Clause
 * Copyright the nbdkit-dirty-bitmap-filter authors
 */

#ifndef DIRTY_BITMAP_NBD_STREAM_H
#define DIRTY_BITMAP_NBD_STREAM_H

/* A client's bytes, with TLS or without, and what of them is received and
 * not yet taken.
 *
 * Receiving is for one thread at a time: in the handshake the only one,
 * later the worker that has the receive role.  It does no more than that:
 * it returns what it found, and the caller acts.
 *
 * Sending is for the thread that holds send_lock, from the first byte of a
 * reply (or chunk) to its last, so that replies do not mix.  Inside it only
 * the lock of struct tls is taken.
 */

#include <pthread.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <sys/uio.h>

#include "nbd/socket.h"

struct limit;
struct nbd_tls;
struct tls;

/* The buffer that requests are received in. */
#define INPUT_SIZE (128 * 1024)

struct input {
  uint8_t *data;                /* INPUT_SIZE bytes */
  size_t start, end;            /* what is received and not yet taken */
  size_t header_size;           /* of requests */
  bool pipelined;               /* since data was received last a whole
                                   header was there already */
  bool is_brisk;                /* do not sleep at once when there is
                                   nothing */
  bool header_only;             /* after a large payload: receive no more
                                   than the next header ahead */
};

struct stream {
  struct socket socket;
  struct tls *tls;              /* NULL without TLS; constant once
                                   transmission begins */
  struct input in;              /* the receiver's */
  pthread_mutex_t send_lock;
};

/* -1 with errno.  The descriptor is the stream's when this returns 0, but
 * closing it is the caller's.
 */
extern int stream_init (struct stream *, int fd, unsigned idle_seconds,
                        const atomic_bool *stopping);
extern void stream_free (struct stream *);

/* Turn to TLS: the next byte from the client, and the next to it, is of
 * the TLS handshake.  Nothing of the client's may be buffered, nor of
 * ours gathered.  -1 if it fails, and then the connection cannot go on.
 */
extern int stream_start_tls (struct stream *, const struct nbd_tls *,
                             struct limit *errors);

/* Transmission begins: the size of request headers is known. */
extern void stream_begin_requests (struct stream *, size_t header_size);

/* Take exactly count bytes.  -1 at the end of the stream, or if the
 * connection or the server ends.
 */
extern int stream_read (struct stream *, void *buf, size_t count);
extern int stream_skip (struct stream *, uint64_t count);

/* Take the next request's header, as far as one receive call goes; *done
 * bytes are there already, 0 at first.  The caller calls again until it is
 * DONE.
 */
enum stream_wait {
  STREAM_SLEEP,                 /* the CPU is for others */
  STREAM_LOOK,                  /* look again and again at first */
  STREAM_YIELD,                 /* the same, after other connections have had
                                   their turn */
};
enum stream_found {
  STREAM_END = -1,              /* there is no more */
  STREAM_DONE,
  STREAM_MORE,                  /* some or nothing came: this may take
                                   longer */
  STREAM_IDLE,                  /* nothing came for IDLE_SECONDS */
};
extern enum stream_found stream_header (struct stream *, void *header,
                                        size_t *done, enum stream_wait);

/* What is buffered (as far as it is decrypted). */
static inline size_t
stream_buffered (const struct stream *s, const uint8_t **data)
{
  *data = &s->in.data[s->in.start];
  return s->in.end - s->in.start;
}

static inline bool
stream_has (const struct stream *s, size_t count)
{
  return s->in.end - s->in.start >= count;
}

/* Send everything.  -1 if that fails: the reason is noted, and the stream
 * is to be cut.  Called with send_lock.
 */
extern int stream_send (struct stream *, struct iovec *, size_t nr);

/* We end the connection: say so, and throw away what has come.  By the
 * last thread that uses it.
 */
extern void stream_linger (struct stream *);

#endif /* DIRTY_BITMAP_NBD_STREAM_H */
