/* nbdkit-dirty-bitmap-filter
 * SPDX-License-Identifier: BSD-3-Clause
 * Copyright the nbdkit-dirty-bitmap-filter authors
 */

/* A bare NBD responder, the peer "bare" of side-by-side: what a server
 * costs that has no disk, so that the others can be held against the
 * limit of the socket itself.
 *
 * How this works: one thread a connection.  Requests are received as
 * many as there are and answered as many as were received, in order,
 * with one sendmsg.  A read is answered out of one buffer that never
 * changes, a write is received and forgotten, a flush does nothing.
 * Replies are simple ones, the shortest that there are.  It is a
 * measuring stick and not a server: it keeps nothing.
 */

#include <config.h>

#include <endian.h>
#include <errno.h>
#include <inttypes.h>
#include <pthread.h>
#include <signal.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/uio.h>
#include <sys/un.h>
#include <unistd.h>

#include "common/cleanup.h"
#include "nbd/protocol.h"

#define MAX_BATCH 256           /* requests answered by one sendmsg */
#define RECEIVE_BYTES (256 * 1024)
#define MAX_OPTION_BYTES 65536

static const char *socket_path;
static uint64_t disk_bytes;

/* What reads are answered with. */
static char source[NBD_MAX_PAYLOAD];

struct connection {
  int fd;
  char in[RECEIVE_BYTES];
  size_t have;                  /* bytes in in[] */
  struct nbd_simple_reply replies[MAX_BATCH];
  struct iovec iov[2 * MAX_BATCH];
  size_t nr_replies, nr_iov;
  char sink[NBD_MAX_PAYLOAD];   /* the rest of a write */
};

static int
receive_all (int fd, void *buf, size_t n)
{
  ssize_t r;
  char *p = buf;

  while (n > 0) {
    r = recv (fd, p, n, 0);
    if (r == -1 && errno == EINTR)
      continue;
    if (r <= 0)
      return -1;
    p += r;
    n -= r;
  }
  return 0;
}

static int
send_all (int fd, const void *buf, size_t n)
{
  ssize_t r;
  const char *p = buf;

  while (n > 0) {
    r = send (fd, p, n, MSG_NOSIGNAL);
    if (r == -1 && errno == EINTR)
      continue;
    if (r == -1)
      return -1;
    p += r;
    n -= r;
  }
  return 0;
}

static int
send_option_reply (int fd, uint32_t option, uint32_t reply,
                   const void *payload, size_t n)
{
  struct nbd_option_reply r = {
    .magic = htobe64 (NBD_OPTION_REPLY_MAGIC),
    .option = htobe32 (option),
    .reply = htobe32 (reply),
    .length = htobe32 (n),
  };

  if (send_all (fd, &r, sizeof r) == -1)
    return -1;
  return send_all (fd, payload, n);
}

#define EFLAGS (NBD_FLAG_HAS_FLAGS | NBD_FLAG_SEND_FLUSH | \
                NBD_FLAG_CAN_MULTI_CONN)

static int
answer_go (int fd, uint32_t option)
{
  const struct nbd_info_export info = {
    .info = htobe16 (NBD_INFO_EXPORT),
    .exportsize = htobe64 (disk_bytes),
    .eflags = htobe16 (EFLAGS),
  };

  if (send_option_reply (fd, option, NBD_REP_INFO, &info, sizeof info) == -1)
    return -1;
  return send_option_reply (fd, option, NBD_REP_ACK, NULL, 0);
}

static int
answer_export_name (int fd, bool no_zeroes)
{
  const struct nbd_export_name_reply r = {
    .exportsize = htobe64 (disk_bytes),
    .eflags = htobe16 (EFLAGS),
  };

  return send_all (fd, &r, sizeof r - (no_zeroes ? sizeof r.zeroes : 0));
}

/* Until the client has opened the export.  -1: it went, or is none. */
static int
handshake (int fd)
{
  const struct nbd_new_handshake hello = {
    .nbdmagic = htobe64 (NBD_MAGIC),
    .version = htobe64 (NBD_OPTION_MAGIC),
    .gflags = htobe16 (NBD_FLAG_FIXED_NEWSTYLE | NBD_FLAG_NO_ZEROES),
  };
  uint32_t client_flags, option, length;
  struct nbd_new_option o;
  char payload[MAX_OPTION_BYTES];

  if (send_all (fd, &hello, sizeof hello) == -1 ||
      receive_all (fd, &client_flags, sizeof client_flags) == -1)
    return -1;
  for (;;) {
    if (receive_all (fd, &o, sizeof o) == -1)
      return -1;
    option = be32toh (o.option);
    length = be32toh (o.length);
    if (o.magic != htobe64 (NBD_OPTION_MAGIC) || length > sizeof payload ||
        receive_all (fd, payload, length) == -1)
      return -1;
    switch (option) {
    case NBD_OPT_EXPORT_NAME:
      return answer_export_name (fd, be32toh (client_flags) &
                                 NBD_FLAG_NO_ZEROES);
    case NBD_OPT_GO:
      return answer_go (fd, option);
    case NBD_OPT_ABORT:
      return -1;
    default:
      if (send_option_reply (fd, option, NBD_REP_ERR_UNSUP, NULL, 0) == -1)
        return -1;
    }
  }
}

static int
send_replies (struct connection *c)
{
  struct iovec *iov = c->iov;
  struct msghdr msg = { 0 };
  ssize_t r;

  while (c->nr_iov > 0) {
    msg.msg_iov = iov;
    msg.msg_iovlen = c->nr_iov;
    r = sendmsg (c->fd, &msg, MSG_NOSIGNAL);
    if (r == -1 && errno == EINTR)
      continue;
    if (r == -1)
      return -1;
    for (; c->nr_iov > 0 && (size_t) r >= iov->iov_len; c->nr_iov--)
      r -= iov++->iov_len;
    if (c->nr_iov > 0) {
      iov->iov_base = (char *) iov->iov_base + r;
      iov->iov_len -= r;
    }
  }
  c->nr_replies = 0;
  return 0;
}

static int
add_reply (struct connection *c, uint64_t cookie_be, uint32_t payload,
           bool failed)
{
  struct nbd_simple_reply *reply = &c->replies[c->nr_replies++];

  reply->magic = htobe32 (NBD_SIMPLE_REPLY_MAGIC);
  reply->error = htobe32 (failed ? NBD_EINVAL : NBD_SUCCESS);
  reply->cookie = cookie_be;
  c->iov[c->nr_iov++] = (struct iovec) { reply, sizeof *reply };
  if (payload > 0)
    c->iov[c->nr_iov++] = (struct iovec) { source, payload };
  return c->nr_replies == MAX_BATCH ? send_replies (c) : 0;
}

/* The payload of a write begins at in[*at]; what is not there yet goes
 * where nobody reads it.
 */
static int
take_payload (struct connection *c, size_t *at, uint32_t length)
{
  size_t here = c->have - *at;

  if (here > length)
    here = length;
  *at += here;
  return receive_all (c->fd, c->sink, length - here);
}

/* Serve the request at in[*at] and move *at behind it. */
static int
serve (struct connection *c, size_t *at)
{
  struct nbd_request r;
  uint16_t type;
  uint32_t length;
  bool outside;

  memcpy (&r, &c->in[*at], sizeof r);
  *at += sizeof r;
  type = be16toh (r.type);
  length = be32toh (r.length);
  if (r.magic != htobe32 (NBD_REQUEST_MAGIC) || type == NBD_CMD_DISC)
    return -1;
  if ((type == NBD_CMD_READ || type == NBD_CMD_WRITE) &&
      length > NBD_MAX_PAYLOAD)
    return -1;
  outside = be64toh (r.offset) > disk_bytes ||
    length > disk_bytes - be64toh (r.offset);

  switch (type) {
  case NBD_CMD_READ:
    return add_reply (c, r.cookie, outside ? 0 : length, outside);
  case NBD_CMD_WRITE:
    if (take_payload (c, at, length) == -1)
      return -1;
    return add_reply (c, r.cookie, 0, outside);
  case NBD_CMD_FLUSH:
    return add_reply (c, r.cookie, 0, false);
  default:
    return add_reply (c, r.cookie, 0, true);
  }
}

static void
serve_all (struct connection *c)
{
  ssize_t r;
  size_t at;

  for (;;) {
    r = recv (c->fd, &c->in[c->have], sizeof c->in - c->have, 0);
    if (r == -1 && errno == EINTR)
      continue;
    if (r <= 0)
      return;
    c->have += r;
    at = 0;
    while (c->have - at >= sizeof (struct nbd_request))
      if (serve (c, &at) == -1)
        return;
    if (send_replies (c) == -1)
      return;
    memmove (c->in, &c->in[at], c->have - at);
    c->have -= at;
  }
}

static void *
run_connection (void *opaque)
{
  CLEANUP_FREE struct connection *c = opaque;

  if (handshake (c->fd) == 0)
    serve_all (c);
  close (c->fd);
  return NULL;
}

static void
ended (int signal_number)
{
  (void) signal_number;
  unlink (socket_path);
  _exit (EXIT_SUCCESS);
}

static void __attribute__ ((noreturn))
fail_errno (const char *what)
{
  fprintf (stderr, "echo: %s: %s\n", what, strerror (errno));
  exit (EXIT_FAILURE);
}

static int
listen_on (const char *path)
{
  struct sockaddr_un addr = { .sun_family = AF_UNIX };
  int fd;

  if (strlen (path) >= sizeof addr.sun_path) {
    errno = ENAMETOOLONG;
    fail_errno (path);
  }
  strcpy (addr.sun_path, path);
  fd = socket (AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0);
  if (fd == -1)
    fail_errno ("socket");
  if (bind (fd, (struct sockaddr *) &addr, sizeof addr) == -1 ||
      listen (fd, SOMAXCONN) == -1)
    fail_errno (path);
  return fd;
}

int
main (int argc, char *argv[])
{
  struct connection *c;
  pthread_t thread;
  char *end = NULL;
  int listening;

  if (argc == 3)
    disk_bytes = strtoull (argv[2], &end, 10);
  if (end == NULL || *end != '\0' || disk_bytes == 0) {
    fprintf (stderr, "usage: echo SOCKET SIZE\n");
    exit (EXIT_FAILURE);
  }
  socket_path = argv[1];
  memset (source, 0x5a, sizeof source);
  listening = listen_on (socket_path);
  signal (SIGTERM, ended);
  signal (SIGINT, ended);

  for (;;) {
    c = calloc (1, sizeof *c);
    if (c == NULL)
      fail_errno ("calloc");
    c->fd = accept4 (listening, NULL, NULL, SOCK_CLOEXEC);
    if (c->fd == -1) {
      free (c);
      if (errno == EINTR || errno == ECONNABORTED)
        continue;
      fail_errno ("accept");
    }
    errno = pthread_create (&thread, NULL, run_connection, c);
    if (errno != 0)
      fail_errno ("pthread_create");
    pthread_detach (thread);
  }
}
