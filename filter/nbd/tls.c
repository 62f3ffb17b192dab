/* nbdkit-dirty-bitmap-filter
 * SPDX-License-Identifier: BSD-3-Clause
 * Copyright the nbdkit-dirty-bitmap-filter authors
 */

/* TLS of one connection.
 *
 * One worker receives while another sends.  GnuTLS allows two threads to
 * use a session like that only as long as no keys are changed, and in
 * TLS 1.3 the client may change them whenever it likes: receiving that
 * message changes what sending uses.  So a lock is taken for every call
 * that uses the session.  It must not be held by a thread that waits for
 * the client, since a client may well send before it takes its replies.
 * Therefore GnuTLS never touches the socket once the handshake is done;
 * it reads records from a buffer in memory, and writes them to another:
 *
 * - The receiver fills the input buffer from the socket without the
 *   lock, one system call for as many records as there are, and decrypts
 *   them under the lock, one by one.
 * - The sender encrypts a record under the lock, into the output buffer,
 *   and sends that without the lock when it is full or all is in it.
 *
 * Invariants:
 * - The input buffer is the receiver's, the output buffer the sender's:
 *   the thread's that holds send_lock.  Only GnuTLS's calls for sending write
 *   records.  (The answer to a client that asks for new keys is sent by
 *   GnuTLS before the next reply.)
 * - Records leave in the order in which they were encrypted, because
 *   send_lock is held from the first of a reply to the last.
 * - The receiver waits for the socket only when GnuTLS has taken all
 *   that is in the input buffer: otherwise it would sleep on a request
 *   that has come already.
 *
 * The handshake is the exception.  One thread alone uses the connection
 * then, GnuTLS reads and writes the socket, which does not block, and
 * poll waits.
 *
 * Where the system's GnuTLS is configured to (ktls in its configuration
 * file), and the kernel can, it hands the keys to the kernel at the end
 * of the handshake.  The connection is then read and written as one
 * without TLS.  What is not data among the records from the client (the
 * end of the session, new keys) is an error of recvmsg there, which ends
 * the connection.
 */

#include <config.h>

#include <errno.h>
#include <fcntl.h>
#include <poll.h>
#include <pthread.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>

#include "common/buffer.h"
#include "common/bytes.h"
#include "common/cleanup.h"
#include "common/report.h"
#include "nbd/client-errors.h"
#include "nbd/debug.h"
#include "nbd/socket.h"
#include "nbd/tls.h"

#if GNUTLS_VERSION_NUMBER >= 0x030703
#include <gnutls/socket.h>
#include <linux/tls.h>
#endif

#ifndef SOL_TLS
#define SOL_TLS 282
#endif

/* The most that GnuTLS puts in a record, and what it may add to one,
 * with the message about new keys before it.
 */
#define RECORD_SIZE 16384
#define RECORD_OVERHEAD 1024

/* Each costs little more than what is in it. */
#define TLS_INPUT_SIZE (128 * 1024)
#define TLS_OUTPUT_SIZE (128 * 1024 + RECORD_OVERHEAD)

struct tls {
  struct socket *socket;
  gnutls_session_t session;
  bool in_kernel;

  /* Protects the session.  Never held while anything is waited for, and
   * no other lock is taken inside it.
   */
  pthread_mutex_t lock;

  /* What the receiver owns. */
  uint8_t *in;                  /* TLS_INPUT_SIZE bytes */
  size_t in_start, in_end;
  bool ran_dry;                 /* GnuTLS wanted more than was there */

  /* What the sender owns. */
  uint8_t *out;                 /* TLS_OUTPUT_SIZE bytes */
  size_t out_used;
  uint8_t *joined;              /* a record's worth, RECORD_SIZE bytes */
};

/* Instead of recv, for GnuTLS. */
static ssize_t
pull (gnutls_transport_ptr_t vp, void *buf, size_t count)
{
  struct tls *tls = vp;
  size_t n = min_u64 (count, tls->in_end - tls->in_start);

  if (n == 0) {
    tls->ran_dry = true;
    gnutls_transport_set_errno (tls->session, EAGAIN);
    return -1;
  }
  memcpy (buf, tls->in + tls->in_start, n);
  tls->in_start += n;
  return n;
}

/* Instead of send. */
static ssize_t
push (gnutls_transport_ptr_t vp, const void *buf, size_t count)
{
  struct tls *tls = vp;

  if (count > TLS_OUTPUT_SIZE - tls->out_used) {
    gnutls_transport_set_errno (tls->session, EIO);
    return -1;
  }
  memcpy (tls->out + tls->out_used, buf, count);
  tls->out_used += count;
  return count;
}

static int
set_nonblocking (int fd, bool on)
{
  int flags = fcntl (fd, F_GETFL);

  if (flags == -1)
    return -1;
  return fcntl (fd, F_SETFL, on ? flags | O_NONBLOCK : flags & ~O_NONBLOCK);
}

/* What went wrong, and if it is the client's certificate, why: for the
 * operator.  That we cut the connection ourselves is no news.
 */
static void
report_failure (const struct socket *s, struct limit *errors,
                gnutls_session_t session, int err)
{
  gnutls_datum_t text;

  if (atomic_load (&s->dead))
    return;
  if (err == GNUTLS_E_CERTIFICATE_VERIFICATION_ERROR &&
      gnutls_certificate_verification_status_print
      (gnutls_session_get_verify_cert_status (session),
       gnutls_certificate_type_get (session), &text, 0) >= 0) {
    client_error (errors, "nbd: TLS handshake: %s",
                  (const char *) text.data);
    gnutls_free (text.data);
  }
  else
    client_error (errors, "nbd: TLS handshake: %s", gnutls_strerror (err));
}

/* One call does as much as it can without waiting.  Then wait for the
 * client to go on; if that takes too long, the connection is cut.
 */
static int
shake_hands (struct socket *s, struct limit *errors, gnutls_session_t session)
{
  int r;

  while ((r = gnutls_handshake (session)) != GNUTLS_E_SUCCESS) {
    struct pollfd fd = {
      .fd = s->fd,
      .events = gnutls_record_get_direction (session) ? POLLOUT : POLLIN,
    };

    if (gnutls_error_is_fatal (r)) {
      report_failure (s, errors, session, r);
      gnutls_alert_send_appropriate (session, r);
      return -1;
    }
    if (atomic_load (&s->dead))
      return -1;
    if (r == GNUTLS_E_AGAIN && poll (&fd, 1, -1) == -1 && errno != EINTR)
      return -1;
  }
  return 0;
}

#if GNUTLS_VERSION_NUMBER >= 0x030703
static bool
kernel_has_keys (int fd, int direction)
{
  struct tls_crypto_info info;
  socklen_t length = sizeof info;

  return getsockopt (fd, SOL_TLS, direction, &info, &length) == 0;
}

/* GnuTLS 3.7 goes on to say that the kernel encrypts if it could not
 * give it the keys (of a cipher that the kernel does not have), and data
 * would leave in plaintext: so ask the kernel.
 */
static int
find_out_if_kernel_encrypts (struct tls *tls)
{
  tls->in_kernel = gnutls_transport_is_ktls_enabled (tls->session) != 0;
  if (!tls->in_kernel ||
      (kernel_has_keys (tls->socket->fd, TLS_TX) &&
       kernel_has_keys (tls->socket->fd, TLS_RX)))
    return 0;
  report_error ("nbd: GnuTLS handed this connection to the kernel, "
                "which has no keys for it: it is closed "
                "(without ktls in GnuTLS's configuration it would work)");
  return -1;
}
#else
static int
find_out_if_kernel_encrypts (struct tls *tls)
{
  (void) tls;
  return 0;
}
#endif

static struct tls *
tls_new (struct socket *s, const struct nbd_tls *credentials,
         struct limit *errors)
{
  struct tls *tls = calloc (1, sizeof *tls);
  int r;

  if (tls == NULL)
    return NULL;
  tls->socket = s;
  pthread_mutex_init (&tls->lock, NULL);
  tls->in = buffer_new (TLS_INPUT_SIZE);
  tls->out = buffer_new (TLS_OUTPUT_SIZE);
  tls->joined = malloc (RECORD_SIZE);
  if (tls->in == NULL || tls->out == NULL || tls->joined == NULL) {
    tls_free (tls);
    return NULL;
  }
  r = nbd_tls_new_session (credentials, &tls->session);
  if (r < 0) {
    client_error (errors, "nbd: TLS: %s", gnutls_strerror (r));
    tls->session = NULL;
    tls_free (tls);
    return NULL;
  }
  return tls;
}

/* From here on GnuTLS uses the buffers. */
static void
leave_socket (struct tls *tls)
{
  gnutls_transport_set_ptr (tls->session, tls);
  gnutls_transport_set_pull_function (tls->session, pull);
  gnutls_transport_set_push_function (tls->session, push);
}

static void
debug_session (gnutls_session_t session)
{
  char *description = gnutls_session_get_desc (session);

  report_debug ("nbd: TLS: %s", description != NULL ? description : "unknown");
  gnutls_free (description);
}

struct tls *
tls_start (struct socket *s, const struct nbd_tls *credentials,
           struct limit *errors)
{
  struct tls *tls = tls_new (s, credentials, errors);

  if (tls == NULL)
    return NULL;
  gnutls_transport_set_int (tls->session, s->fd);
  if (set_nonblocking (s->fd, true) == -1 ||
      shake_hands (s, errors, tls->session) == -1 ||
      find_out_if_kernel_encrypts (tls) == -1 ||
      set_nonblocking (s->fd, false) == -1) {
    tls_free (tls);
    return NULL;
  }
  debug_session (tls->session);
  if (!tls->in_kernel)
    leave_socket (tls);
  else
    report_debug ("nbd: TLS: the kernel encrypts");
  return tls;
}

bool
tls_is_ours (const struct tls *tls)
{
  return !tls->in_kernel;
}

/* Fill the empty input buffer.  Returns as recv does. */
static ssize_t
fill (struct tls *tls)
{
  struct iovec iov = { .iov_base = tls->in, .iov_len = TLS_INPUT_SIZE };
  struct msghdr msg = { .msg_iov = &iov, .msg_iovlen = 1 };
  const ssize_t r = socket_receive (tls->socket, &msg, 0);

  if (r != -1) {
    tls->in_start = 0;
    tls->in_end = r;
  }
  return r;
}

/* Decrypt from the input buffer, some of a record at most.  Returns as
 * recv does; EAGAIN if more has to be received first.
 */
static ssize_t
decrypt (struct tls *tls, void *buf, size_t count)
{
  ACQUIRE_LOCK_FOR_CURRENT_SCOPE (&tls->lock);
  ssize_t r;

  /* A record that is no data is also told by GNUTLS_E_AGAIN. */
  tls->ran_dry = false;
  do
    r = gnutls_record_recv (tls->session, buf, count);
  while (r == GNUTLS_E_AGAIN && !tls->ran_dry);

  if (r >= 0)
    return r;
  errno = EAGAIN;
  if (r != GNUTLS_E_AGAIN) {
    debug_request ("nbd: TLS: receive: %s", gnutls_strerror (r));
    errno = EIO;
  }
  return -1;
}

/* As much as there is, without waiting. */
static ssize_t
decrypt_all (struct tls *tls, const struct iovec *iov, size_t *done)
{
  ssize_t r = 1;

  while (*done < iov->iov_len && r > 0) {
    r = decrypt (tls, (uint8_t *) iov->iov_base + *done,
                 iov->iov_len - *done);
    if (r > 0)
      *done += r;
  }
  return r;
}

/* Both buffers, without waiting.  An error or the end that comes after some
 * data is met again by the next call.
 */
static ssize_t
decrypt_both (struct tls *tls, const struct iovec iov[2])
{
  size_t done[2] = { 0, 0 };
  ssize_t r = decrypt_all (tls, &iov[0], &done[0]);

  if (r > 0)
    r = decrypt_all (tls, &iov[1], &done[1]);
  return done[0] + done[1] > 0 ? (ssize_t) (done[0] + done[1]) : r;
}

ssize_t
tls_receive (struct tls *tls, const struct iovec iov[2])
{
  ssize_t r = decrypt_both (tls, iov);

  if (r != -1 || errno != EAGAIN)
    return r;
  r = fill (tls);
  if (r <= 0)
    return r;
  r = decrypt_both (tls, iov);
  if (r == -1 && errno == EAGAIN)
    errno = EINTR;
  return r;
}

/* Send the output buffer. */
static int
drain (struct tls *tls, int flags)
{
  int64_t since = 0;
  size_t done = 0;

  while (done < tls->out_used) {
    struct iovec iov = {
      .iov_base = tls->out + done, .iov_len = tls->out_used - done,
    };
    const struct msghdr msg = { .msg_iov = &iov, .msg_iovlen = 1 };
    const ssize_t r = socket_send (tls->socket, &msg, flags, &since);

    if (r == -1)
      return -1;
    done += r;
  }
  tls->out_used = 0;
  return 0;
}

/* Encrypt a record's worth at most.  Returns how much. */
static ssize_t
encrypt_record (struct tls *tls, const void *buf, size_t count)
{
  ACQUIRE_LOCK_FOR_CURRENT_SCOPE (&tls->lock);
  ssize_t r = gnutls_record_send (tls->session, buf, count);

  if (r > 0)
    return r;
  debug_request ("nbd: TLS: send: %s", gnutls_strerror (r));
  errno = EIO;
  return -1;
}

/* What the next record is made from: straight from where it is if that
 * fills the record or is the last, otherwise joined with what follows,
 * so that headers do not travel in records of their own.
 */
static const void *
next_record (struct tls *tls, const struct iovec *iov, size_t nr,
             size_t offset, size_t *count)
{
  *count = min_u64 (iov->iov_len - offset, RECORD_SIZE);
  if (*count == RECORD_SIZE || nr == 1)
    return (const uint8_t *) iov->iov_base + offset;

  memcpy (tls->joined, (const uint8_t *) iov->iov_base + offset, *count);
  for (size_t i = 1; i < nr && *count < RECORD_SIZE; ++i) {
    size_t n = min_u64 (iov[i].iov_len, RECORD_SIZE - *count);

    if (n > 0)
      memcpy (tls->joined + *count, iov[i].iov_base, n);
    *count += n;
  }
  return tls->joined;
}

int
tls_send (struct tls *tls, const struct iovec *iov, size_t nr)
{
  size_t offset = 0;            /* in the first of iov */

  for (;;) {
    const void *record;
    size_t count;
    ssize_t r;

    while (nr > 0 && offset >= iov->iov_len) {
      offset -= iov->iov_len;
      iov++;
      nr--;
    }
    if (nr == 0)
      break;

    record = next_record (tls, iov, nr, offset, &count);
    if (TLS_OUTPUT_SIZE - tls->out_used < count + RECORD_OVERHEAD &&
        drain (tls, 0) == -1)
      return -1;
    r = encrypt_record (tls, record, count);
    if (r == -1)
      return -1;
    offset += r;
  }
  return drain (tls, 0);
}

void
tls_bye (struct tls *tls)
{
  struct socket *s = tls->socket;

  if (atomic_load (&s->dead) || set_nonblocking (s->fd, true) == -1)
    return;
  if (gnutls_bye (tls->session, GNUTLS_SHUT_WR) == GNUTLS_E_SUCCESS &&
      !tls->in_kernel)
    drain (tls, MSG_DONTWAIT);
}

void
tls_free (struct tls *tls)
{
  if (tls == NULL)
    return;
  if (tls->session != NULL)
    gnutls_deinit (tls->session);
  pthread_mutex_destroy (&tls->lock);
  buffer_free (tls->in, TLS_INPUT_SIZE);
  buffer_free (tls->out, TLS_OUTPUT_SIZE);
  free (tls->joined);
  free (tls);
}
