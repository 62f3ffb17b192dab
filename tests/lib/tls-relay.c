/* nbdkit-dirty-bitmap-filter
 * SPDX-License-Identifier: BSD-3-Clause
 * Copyright the nbdkit-dirty-bitmap-filter authors
 */

#include <config.h>

#include <errno.h>
#include <fcntl.h>
#include <poll.h>
#include <pthread.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <unistd.h>

#include "common/bytes.h"
#include "common/cleanup.h"
#include "nbd/protocol.h"
#include "nbd-client.h"
#include "tls-relay.h"

/* GnuTLS takes at most 8 changes of a peer's keys a second. */
#define KEY_UPDATE_MS 150

const char *tls_relay_priority;

static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
static pthread_cond_t ended = PTHREAD_COND_INITIALIZER;
static struct relay *relays;    /* all that run; protected by lock */

struct relay {
  struct relay *next;           /* protected by lock */
  int server, test;             /* descriptors */
  gnutls_session_t session;
  unsigned next_update;         /* in milliseconds () */
  bool updating, sending;       /* begun, and to be called again */
};

/* Bytes on their way in one direction. */
struct stream {
  uint8_t buf[65536];
  size_t start, end;
  bool eof;
};

static bool
is_empty (const struct stream *s)
{
  return s->start == s->end;
}

static void
filled (struct stream *s, ssize_t n)
{
  s->start = 0;
  s->end = n;
}

gnutls_session_t
tls_client_session (int fd, int nonblocking)
{
  static gnutls_psk_client_credentials_t credentials;
  const gnutls_datum_t key = {
    .data = (unsigned char *) RELAY_KEY, .size = strlen (RELAY_KEY),
  };
  gnutls_session_t session;

  {
    ACQUIRE_LOCK_FOR_CURRENT_SCOPE (&lock);
    if (credentials == NULL) {
      gnutls_psk_allocate_client_credentials (&credentials);
      gnutls_psk_set_client_credentials (credentials, RELAY_USER, &key,
                                         GNUTLS_PSK_KEY_HEX);
    }
  }
  if (gnutls_init (&session, GNUTLS_CLIENT | GNUTLS_NO_SIGNAL |
                   (nonblocking ? GNUTLS_NONBLOCK : 0)) < 0 ||
      gnutls_credentials_set (session, GNUTLS_CRD_PSK, credentials) < 0 ||
      gnutls_priority_set_direct (session, tls_relay_priority != NULL
                                  ? tls_relay_priority
                                  : "NORMAL:+ECDHE-PSK:+DHE-PSK:+PSK",
                                  NULL) < 0)
    abort ();
  gnutls_transport_set_int (session, fd);
  return session;
}

static int
read_all (int fd, void *buf, size_t count)
{
  return recv (fd, buf, count, MSG_WAITALL) == (ssize_t) count ? 0 : -1;
}

static int
write_all (int fd, const void *buf, size_t count)
{
  return send (fd, buf, count, MSG_NOSIGNAL) == (ssize_t) count ? 0 : -1;
}

/* Until TLS begins.  -1 if the server or the test hangs up. */
static int
start_tls (struct relay *r)
{
  struct nbd_new_handshake greeting;
  const struct nbd_new_option option = {
    .magic = htobe64 (NBD_OPTION_MAGIC),
    .option = htobe32 (NBD_OPT_STARTTLS),
  };
  struct nbd_option_reply reply;
  struct pollfd fds[2] = {
    { .fd = r->test, .events = POLLIN }, { .fd = r->server, .events = POLLIN },
  };
  uint32_t cflags;

  if (read_all (r->server, &greeting, sizeof greeting) == -1 ||
      write_all (r->test, &greeting, sizeof greeting) == -1)
    return -1;
  poll (fds, 2, -1);
  if (fds[0].revents == 0 ||
      read_all (r->test, &cflags, sizeof cflags) == -1 ||
      write_all (r->server, &cflags, sizeof cflags) == -1 ||
      write_all (r->server, &option, sizeof option) == -1 ||
      read_all (r->server, &reply, sizeof reply) == -1 ||
      be32toh (reply.reply) != NBD_REP_ACK)
    return -1;

  fcntl (r->server, F_SETFL, O_NONBLOCK);
  fcntl (r->test, F_SETFL, O_NONBLOCK);
  r->session = tls_client_session (r->server, true);
  for (;;) {
    int err = gnutls_handshake (r->session);

    if (err == 0)
      return 0;
    if (gnutls_error_is_fatal (err))
      return -1;
    fds[1].events = gnutls_record_get_direction (r->session)
      ? POLLOUT : POLLIN;
    poll (&fds[1], 1, -1);
  }
}

/* Returns as gnutls_record_send does. */
static ssize_t
update_keys (struct relay *r)
{
  ssize_t err;

  if (!r->updating &&
      (gnutls_protocol_get_version (r->session) != GNUTLS_TLS1_3 ||
       (int) (milliseconds () - r->next_update) < 0))
    return 0;
  r->updating = true;
  err = gnutls_session_key_update (r->session, GNUTLS_KU_PEER);
  if (err == 0) {
    r->updating = false;
    r->next_update = milliseconds () + KEY_UPDATE_MS;
  }
  return err;
}

/* Each function takes a step if one can be taken: true if so.  *end if
 * there is nothing more to relay.
 */
static bool
receive_from_test (struct relay *r, struct stream *up, bool *end)
{
  ssize_t n;

  if (!is_empty (up))
    return false;
  n = recv (r->test, up->buf, sizeof up->buf, 0);
  if (n > 0)
    filled (up, n);
  else if (n == 0 || errno != EAGAIN)
    *end = true;
  return n > 0;
}

static bool
send_to_server (struct relay *r, struct stream *up, short *events, bool *end)
{
  ssize_t n;

  if (is_empty (up))
    return false;
  n = r->sending ? 0 : update_keys (r);
  if (n == 0) {
    n = gnutls_record_send (r->session, up->buf + up->start,
                            up->end - up->start);
    r->sending = n == GNUTLS_E_AGAIN;
    if (n > 0)
      up->start += n;
  }
  if (n == GNUTLS_E_AGAIN)
    *events |= POLLOUT;
  else if (n < 0)
    *end = true;
  return n > 0;
}

static bool
receive_from_server (struct relay *r, struct stream *down, short *events)
{
  ssize_t n;

  if (!is_empty (down) || down->eof)
    return false;
  n = gnutls_record_recv (r->session, down->buf, sizeof down->buf);
  if (n > 0)
    filled (down, n);
  else if (n == GNUTLS_E_AGAIN)
    *events |= POLLIN;
  else
    down->eof = true;
  return n > 0;
}

static bool
send_to_test (struct relay *r, struct stream *down, short *events, bool *end)
{
  ssize_t n;

  if (is_empty (down)) {
    *end = *end || down->eof;
    return false;
  }
  n = send (r->test, down->buf + down->start, down->end - down->start,
            MSG_NOSIGNAL);
  if (n > 0)
    down->start += n;
  else if (errno == EAGAIN)
    *events |= POLLOUT;
  else
    *end = true;
  return n > 0;
}

static void
pump (struct relay *r)
{
  struct stream *up = calloc (1, sizeof *up), *down = calloc (1, sizeof *down);
  bool end = false;

  while (!end) {
    struct pollfd fds[2] = { { .fd = r->test }, { .fd = r->server } };
    bool progress = receive_from_test (r, up, &end);

    progress |= send_to_server (r, up, &fds[1].events, &end);
    progress |= receive_from_server (r, down, &fds[1].events);
    progress |= send_to_test (r, down, &fds[0].events, &end);
    if (is_empty (up))
      fds[0].events |= POLLIN;
    /* poll would return at once for a peer that hung up, whether anything
     * is wanted of it or not.
     */
    for (int i = 0; i < 2; ++i)
      if (fds[i].events == 0)
        fds[i].fd = -1;
    if (!progress && !end)
      poll (fds, 2, 1000);
  }
  free (up);
  free (down);
}

static void *
relay_main (void *vp)
{
  struct relay *r = vp;

  if (start_tls (r) == 0)
    pump (r);
  if (r->session != NULL)
    gnutls_deinit (r->session);

  ACQUIRE_LOCK_FOR_CURRENT_SCOPE (&lock);
  struct relay **place = &relays;
  while (*place != r)
    place = &(*place)->next;
  *place = r->next;
  close (r->server);
  close (r->test);
  free (r);
  pthread_cond_broadcast (&ended);
  return NULL;
}

int
tls_relay_start (int fd)
{
  struct relay *r = calloc (1, sizeof *r);
  int pair[2];
  pthread_t thread;

  if (r == NULL || socketpair (AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0,
                               pair) == -1)
    abort ();
  r->server = fd;
  r->test = pair[1];

  ACQUIRE_LOCK_FOR_CURRENT_SCOPE (&lock);
  if (pthread_create (&thread, NULL, relay_main, r) != 0)
    abort ();
  pthread_detach (thread);
  r->next = relays;
  relays = r;
  return pair[0];
}

void
tls_relay_end (void)
{
  ACQUIRE_LOCK_FOR_CURRENT_SCOPE (&lock);
  for (struct relay *r = relays; r != NULL; r = r->next) {
    shutdown (r->test, SHUT_RDWR);
    shutdown (r->server, SHUT_RDWR);
  }
  while (relays != NULL)
    pthread_cond_wait (&ended, &lock);
}
