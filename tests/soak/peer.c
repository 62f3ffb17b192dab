/* nbdkit-dirty-bitmap-filter
 * SPDX-License-Identifier: BSD-3-Clause
 * Copyright the nbdkit-dirty-bitmap-filter authors
 */

/* The client's bytes: sockets, TLS, buffers and the handshake.
 *
 * Nothing blocks but poll, which waits for both directions, so that a
 * server that wants its replies taken first does not wait for a client
 * that wants its requests taken first.
 */

#include <config.h>

#include <errno.h>
#include <fcntl.h>
#include <inttypes.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <poll.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/un.h>
#include <time.h>
#include <unistd.h>

#include "common/bytes.h"
#include "nbd/protocol.h"
#include "lib/tls-relay.h"
#include "peer.h"

/* What a server that works never takes, however busy the machine is. */
#define PATIENCE_MS (90 * 1000)

#define PIECE 65536

const char *const peer_contexts[NR_CONTEXTS] = {
  "base:allocation", "qemu:dirty-bitmap:fine", "qemu:dirty-bitmap:usual",
  "qemu:dirty-bitmap:coarse",
};

void
peer_failure (const struct peer *c, const char *fmt, ...)
{
  va_list args;

  fprintf (stderr, "soak: %s%s, slot %td: ", c->life,
           c->session != NULL ? ", TLS" : "", c->slot - c->model->slots);
  va_start (args, fmt);
  vfprintf (stderr, fmt, args);
  va_end (args);
  fputc ('\n', stderr);
  atomic_store (&c->model->failed, true);
  _exit (EXIT_FAILURE);
}

static int
open_socket (struct peer *c, const struct address *address, bool tcp)
{
  struct sockaddr_un un = { .sun_family = AF_UNIX };
  const struct sockaddr_in in = {
    .sin_family = AF_INET, .sin_port = htobe16 (address->tcp_port),
    .sin_addr.s_addr = htobe32 (INADDR_LOOPBACK),
  };
  const int on = 1;

  snprintf (un.sun_path, sizeof un.sun_path, "%s", address->unix_path);
  c->fd = socket (tcp ? AF_INET : AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0);
  if (c->fd == -1)
    peer_failure (c, "socket: %s", strerror (errno));
  if (tcp)
    setsockopt (c->fd, IPPROTO_TCP, TCP_NODELAY, &on, sizeof on);
  return tcp ? connect (c->fd, (const struct sockaddr *) &in, sizeof in)
             : connect (c->fd, (const struct sockaddr *) &un, sizeof un);
}

int
peer_connect (struct peer *c, const struct address *address, bool tcp)
{
  c->session = NULL;
  c->structured = c->extended = false;
  for (unsigned i = 0; i < NR_CONTEXTS; ++i)
    c->contexts[i] = UINT32_MAX;
  if (open_socket (c, address, tcp) == -1) {
    if (atomic_load (&c->model->stopping))
      return -1;
    peer_failure (c, "connect: %s", strerror (errno));
  }
  fcntl (c->fd, F_SETFL, O_NONBLOCK);
  return 0;
}

void
peer_vanish (struct peer *c, bool reset)
{
  const struct linger hard = { .l_onoff = 1, .l_linger = 0 };

  if (reset)
    setsockopt (c->fd, SOL_SOCKET, SO_LINGER, &hard, sizeof hard);
  close (c->fd);
  c->fd = -1;
  if (c->session != NULL)
    gnutls_deinit (c->session);
  c->session = NULL;
  for (unsigned i = 0; i < DEPTH; ++i) {
    free (c->pending[i].data);
    c->pending[i] = (struct pending) { .used = false };
  }
  c->in.start = c->in.end = c->out.start = c->out.end = 0;
  model_vanished (c->model, c->slot);
}

/* Room for count more bytes behind those there are. */
static uint8_t *
make_room (struct buffer *b, size_t count)
{
  if (b->start > 0) {
    memmove (b->data, b->data + b->start, b->end - b->start);
    b->end -= b->start;
    b->start = 0;
  }
  if (b->end + count > b->capacity) {
    b->capacity = (b->end + count) * 2;
    b->data = realloc (b->data, b->capacity);
    if (b->data == NULL)
      abort ();
  }
  return b->data + b->end;
}

void
peer_put (struct peer *c, const void *data, size_t count)
{
  uint8_t *p;

  if (count == 0)
    return;
  p = make_room (&c->out, count);
  memcpy (p, data, count);
  c->out.end += count;
}

/* These return what recv and send return, with errno. */
static ssize_t
tls_result (ssize_t r)
{
  if (r >= 0)
    return r;
  errno = gnutls_error_is_fatal (r) ? ECONNRESET : EAGAIN;
  return -1;
}

static ssize_t
receive (struct peer *c, void *buf, size_t count)
{
  if (c->session != NULL)
    return tls_result (gnutls_record_recv (c->session, buf, count));
  return recv (c->fd, buf, count, 0);
}

static ssize_t
transmit (struct peer *c, const void *buf, size_t count)
{
  if (c->session != NULL)
    return tls_result (gnutls_record_send (c->session, buf, count));
  return send (c->fd, buf, count, MSG_NOSIGNAL);
}

/* One step in each direction.  1 if there was any, 0 if not. */
static int
step (struct peer *c, bool deaf)
{
  ssize_t sent = 0, received = 0;

  if (c->out.start < c->out.end) {
    sent = transmit (c, c->out.data + c->out.start,
                     min_u64 (c->out.end - c->out.start, PIECE));
    if (sent > 0)
      c->out.start += sent;
    else if (errno != EAGAIN)
      return -1;
  }
  if (!deaf) {
    uint8_t *p = make_room (&c->in, PIECE);

    received = receive (c, p, PIECE);
    if (received > 0)
      c->in.end += received;
    else if ((received == 0 || errno != EAGAIN) && sent <= 0)
      return -1;
  }
  return sent > 0 || received > 0;
}

/* Step, or wait for one. */
static int
pump (struct peer *c)
{
  struct pollfd fd = { .fd = c->fd, .events = POLLIN };
  int r = step (c, false);

  if (r != 0)
    return r == -1 ? -1 : 0;
  if (c->out.start < c->out.end)
    fd.events |= POLLOUT;
  if (poll (&fd, 1, PATIENCE_MS) == 0)
    peer_failure (c, "the server does not answer; %u requests, %zu bytes "
                    "to send", peer_in_flight (c), c->out.end - c->out.start);
  return 0;
}

int
peer_flush (struct peer *c)
{
  while (c->out.start < c->out.end)
    if (pump (c) == -1)
      return -1;
  return 0;
}

int
peer_need (struct peer *c, size_t count)
{
  while (c->in.end - c->in.start < count)
    if (pump (c) == -1)
      return -1;
  return 0;
}

void
peer_flush_deaf (struct peer *c, int milliseconds)
{
  const struct timespec ts = { .tv_nsec = 10 * 1000 * 1000 };

  for (int t = 0; t < milliseconds; t += 10) {
    if (step (c, true) == -1 || atomic_load (&c->model->over))
      return;
    nanosleep (&ts, NULL);
  }
}

void
peer_half_close (struct peer *c)
{
  if (c->session != NULL)
    gnutls_bye (c->session, GNUTLS_SHUT_WR);
  shutdown (c->fd, SHUT_WR);
}

/* Handshake. */

int
peer_greet (struct peer *c)
{
  struct nbd_new_handshake greeting;
  const uint32_t cflags = htobe32 (NBD_FLAG_FIXED_NEWSTYLE |
                                   NBD_FLAG_NO_ZEROES);

  if (peer_need (c, sizeof greeting) == -1)
    return -1;
  memcpy (&greeting, c->in.data + c->in.start, sizeof greeting);
  c->in.start += sizeof greeting;
  if (be64toh (greeting.nbdmagic) != NBD_MAGIC ||
      be64toh (greeting.version) != NBD_OPTION_MAGIC)
    peer_failure (c, "this is no greeting");
  peer_put (c, &cflags, sizeof cflags);
  return 0;
}

void
peer_put_option (struct peer *c, uint32_t option,
                   const void *data, uint32_t length)
{
  const struct nbd_new_option header = {
    .magic = htobe64 (NBD_OPTION_MAGIC),
    .option = htobe32 (option),
    .length = htobe32 (length),
  };

  peer_put (c, &header, sizeof header);
  peer_put (c, data, length);
}

/* Its data are the next length bytes. */
int
peer_option_reply (struct peer *c, uint32_t *type, uint32_t *length)
{
  struct nbd_option_reply header;

  if (peer_need (c, sizeof header) == -1)
    return -1;
  memcpy (&header, c->in.data + c->in.start, sizeof header);
  c->in.start += sizeof header;
  *type = be32toh (header.reply);
  *length = be32toh (header.length);
  if (be64toh (header.magic) != NBD_OPTION_REPLY_MAGIC || *length > PIECE)
    peer_failure (c, "this is no option reply");
  if (*type >= NBD_REP_ERR (0))
    peer_failure (c, "option %" PRIu32 ": error %" PRIx32,
                    be32toh (header.option), *type);
  return peer_need (c, *length);
}

/* Replies until the last one. */
static int
wait_for_ack (struct peer *c)
{
  uint32_t type, length;

  do {
    if (peer_option_reply (c, &type, &length) == -1)
      return -1;
    c->in.start += length;
  } while (type != NBD_REP_ACK);
  return 0;
}

int
peer_tls_handshake (struct peer *c)
{
  gnutls_session_t session = tls_client_session (c->fd, true);

  for (;;) {
    struct pollfd fd = { .fd = c->fd };
    const int err = gnutls_handshake (session);

    if (err == 0) {
      c->session = session;
      return 0;
    }
    if (gnutls_error_is_fatal (err)) {
      gnutls_deinit (session);
      return -1;
    }
    fd.events = gnutls_record_get_direction (session) ? POLLOUT : POLLIN;
    if (poll (&fd, 1, PATIENCE_MS) == 0)
      peer_failure (c, "the TLS handshake stands still");
  }
}

int
peer_starttls (struct peer *c)
{
  peer_put_option (c, NBD_OPT_STARTTLS, NULL, 0);
  if (peer_flush (c) == -1)
    return -1;
  return wait_for_ack (c);
}

static int
set_contexts (struct peer *c)
{
  uint8_t query[1024] = { 0 };
  size_t used = 8;

  put_be32 (query + 4, NR_CONTEXTS);
  for (unsigned i = 0; i < NR_CONTEXTS; ++i) {
    const uint32_t n = strlen (peer_contexts[i]);

    put_be32 (query + used, n);
    memcpy (query + used + 4, peer_contexts[i], n);
    used += 4 + n;
  }
  peer_put_option (c, NBD_OPT_SET_META_CONTEXT, query, used);

  for (;;) {
    uint32_t type, length, id;
    const uint8_t *data;

    if (peer_option_reply (c, &type, &length) == -1)
      return -1;
    data = c->in.data + c->in.start;
    c->in.start += length;
    if (type == NBD_REP_ACK)
      break;
    id = get_be32 (data);
    for (unsigned i = 0; i < NR_CONTEXTS; ++i)
      if (length - 4 == strlen (peer_contexts[i]) &&
          memcmp (data + 4, peer_contexts[i], length - 4) == 0)
        c->contexts[i] = id;
  }
  for (unsigned i = 0; i < NR_CONTEXTS; ++i)
    if (c->contexts[i] == UINT32_MAX)
      peer_failure (c, "there is no %s", peer_contexts[i]);
  return 0;
}

/* From the greeting's answer to transmission, one way or another. */
int
peer_negotiate (struct peer *c)
{
  const uint8_t no_name[6] = { 0 };
  struct nbd_info_export export;

  if (model_draw (c->slot, 4) > 0) {
    c->structured = true;
    c->extended = model_draw (c->slot, 2) == 0;
    peer_put_option (c, c->extended ? NBD_OPT_EXTENDED_HEADERS
                     : NBD_OPT_STRUCTURED_REPLY, NULL, 0);
    if (wait_for_ack (c) == -1)
      return -1;
    if (model_draw (c->slot, 2) == 0 && set_contexts (c) == -1)
      return -1;
  }
  if (model_draw (c->slot, 8) == 0) {
    peer_put_option (c, NBD_OPT_LIST, NULL, 0);
    if (wait_for_ack (c) == -1)
      return -1;
  }
  if (!c->extended && model_draw (c->slot, 4) == 0) {
    peer_put_option (c, NBD_OPT_EXPORT_NAME, NULL, 0);
    if (peer_need (c, offsetof (struct nbd_export_name_reply, zeroes))
        == -1)
      return -1;
    memcpy (&export.exportsize, c->in.data + c->in.start,
            sizeof export.exportsize);
    if (be64toh (export.exportsize) !=
        (uint64_t) c->model->nr_sectors * SECTOR)
      peer_failure (c, "the export's size is wrong");
    c->in.start += offsetof (struct nbd_export_name_reply, zeroes);
    return 0;
  }
  if (model_draw (c->slot, 8) == 0) {
    peer_put_option (c, NBD_OPT_INFO, no_name, sizeof no_name);
    if (wait_for_ack (c) == -1)
      return -1;
  }
  peer_put_option (c, NBD_OPT_GO, no_name, sizeof no_name);
  return wait_for_ack (c);
}
