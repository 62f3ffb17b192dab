/* nbdkit-dirty-bitmap-filter
 * SPDX-License-Identifier: BSD-3-Clause
 * Copyright the nbdkit-dirty-bitmap-filter authors
 */

/* TLS of filter/nbd: what is refused before it, what is forgotten when
 * it begins, clients that inject, stall, vanish and misbehave in it.
 * That everything else works over TLS is shown by the other tests of
 * nbd/, which run over it as well.
 */

#include <config.h>

#include <errno.h>
#include <poll.h>
#include <pthread.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <unistd.h>

#include "common/bytes.h"
#include "nbd/tls.h"
#include "nbd-fixture.h"
#include "tls-relay.h"

#define SIZE (UINT64_C (8) * 1024 * 1024)
#define FRAGMENTED (34 * 1024 * 1024)
#define FIXED_NO_ZEROES (NBD_FLAG_FIXED_NEWSTYLE | NBD_FLAG_NO_ZEROES)

extern size_t extents_max;

static int
start (bool required, unsigned handshake_seconds)
{
  fixture_init (&f, SIZE);
  fake_disk_add_bitmap (f.disk, "secret", 65536);
  f.tls = fixture_load_tls (&f, required);
  f.limits.handshake_seconds = handshake_seconds;
  fixture_start (&f, false);
  fixture_over_tls = false;
  tls_relay_priority = NULL;
  return 0;
}

static int
setup_required (void **state)
{
  (void) state;
  return start (true, 0);
}

static int
setup_optional (void **state)
{
  (void) state;
  return start (false, 0);
}

static int
setup_impatient (void **state)
{
  (void) state;
  return start (true, 1);
}

/* Many extents, and memory that is short. */
static int
setup_short_of_memory (void **state)
{
  (void) state;
  fixture_init (&f, FRAGMENTED);
  fake_disk_add_bitmap (f.disk, "fine", 512);
  for (size_t i = 0; i < FRAGMENTED / 512; i += 2)
    f.disk->bitmaps[0].dirty[i] = 1;
  f.tls = fixture_load_tls (&f, false);
  f.limits.memory = NBD_MIN_MEMORY;
  extents_max = 66000;
  fixture_start (&f, false);
  fixture_over_tls = false;
  tls_relay_priority = NULL;
  return 0;
}

static int
greeted (void)
{
  int fd = fixture_connect (&f);

  client_greet (fd, FIXED_NO_ZEROES);
  return fd;
}

/* Up to the first byte of the TLS handshake. */
static int
starttls (void)
{
  int fd = greeted ();

  send_option (fd, NBD_OPT_STARTTLS, NULL, 0);
  expect_option_reply (fd, NBD_OPT_STARTTLS, NBD_REP_ACK, NULL);
  return fd;
}

static gnutls_session_t
encrypted (int fd)
{
  gnutls_session_t session = tls_client_session (fd, false);
  int r;

  do
    r = gnutls_handshake (session);
  while (r < 0 && !gnutls_error_is_fatal (r));
  if (r < 0)
    fail_msg ("handshake: %s", gnutls_strerror (r));
  return session;
}

static void
tls_send_bytes (gnutls_session_t session, const void *buf, size_t count)
{
  while (count > 0) {
    ssize_t r = gnutls_record_send (session, buf, count);

    if (r < 0)
      fail_msg ("send: %s", gnutls_strerror (r));
    buf = (const uint8_t *) buf + r;
    count -= r;
  }
}

static void
tls_recv_bytes (gnutls_session_t session, void *buf, size_t count)
{
  unsigned begin = milliseconds ();

  while (count > 0) {
    ssize_t r = gnutls_record_recv (session, buf, count);

    if (r == GNUTLS_E_AGAIN && milliseconds () - begin < 20000)
      continue;                 /* that was a record with no data */
    if (r <= 0)
      fail_msg ("recv: %s", r == 0 ? "end of session" : gnutls_strerror (r));
    buf = (uint8_t *) buf + r;
    count -= r;
  }
}

static void
tls_option (gnutls_session_t session, uint32_t option, const void *data,
            uint32_t length)
{
  const struct nbd_new_option header = {
    .magic = htobe64 (NBD_OPTION_MAGIC),
    .option = htobe32 (option),
    .length = htobe32 (length),
  };

  tls_send_bytes (session, &header, sizeof header);
  if (length > 0)
    tls_send_bytes (session, data, length);
}

/* The type of one option reply; its data are in data[]. */
static uint32_t
tls_option_reply (gnutls_session_t session, uint8_t *data)
{
  struct nbd_option_reply header;
  uint8_t local[8192];

  tls_recv_bytes (session, &header, sizeof header);
  assert_true (be64toh (header.magic) == NBD_OPTION_REPLY_MAGIC);
  assert_true (be32toh (header.length) <= sizeof local);
  tls_recv_bytes (session, data != NULL ? data : local,
                  be32toh (header.length));
  return be32toh (header.reply);
}

static void
tls_go (gnutls_session_t session, uint8_t *info_export)
{
  tls_option (session, NBD_OPT_GO, "\0\0\0\0\0\0", 6);
  assert_int_equal (tls_option_reply (session, NULL), NBD_REP_INFO);
  assert_int_equal (tls_option_reply (session, info_export), NBD_REP_INFO);
  assert_int_equal (tls_option_reply (session, NULL), NBD_REP_ACK);
}

static void
tls_request (gnutls_session_t session, uint16_t type, uint64_t cookie,
             uint32_t length)
{
  uint8_t buf[sizeof (struct nbd_request)];

  put_request (buf, 0, type, cookie, 0, length);
  tls_send_bytes (session, buf, sizeof buf);
}

static uint32_t
tls_simple_reply (gnutls_session_t session, uint64_t cookie)
{
  struct nbd_simple_reply reply;

  tls_recv_bytes (session, &reply, sizeof reply);
  assert_int_equal (be32toh (reply.magic), NBD_SIMPLE_REPLY_MAGIC);
  assert_int_equal (reply.cookie, cookie);
  return be32toh (reply.error);
}

static void
hang_up (int fd, gnutls_session_t session)
{
  gnutls_deinit (session);
  close (fd);
}

/* Somebody else is served by the server, over TLS. */
static void
check_server (void)
{
  int fd;

  fixture_over_tls = true;
  fd = client_open (&f, NULL);
  client_check_alive (&f, fd);
  close (fd);
  fixture_over_tls = false;
}

/* Before TLS a client learns nothing, whatever it asks and however badly:
 * only that it has to turn to TLS, which it still can.
 */
static void
test_required (void **state)
{
  static const uint32_t options[] = {
    NBD_OPT_LIST, 4, NBD_OPT_INFO, NBD_OPT_GO, NBD_OPT_STRUCTURED_REPLY,
    NBD_OPT_LIST_META_CONTEXT, NBD_OPT_SET_META_CONTEXT, 11, 12, 0xffffffff,
  };
  const char *const all[] = { NULL };
  uint8_t query[64];
  uint32_t length = make_context_query (query, "", all);
  int fd = greeted ();
  gnutls_session_t session;
  struct option_reply reply;

  (void) state;
  for (size_t i = 0; i < sizeof options / sizeof options[0]; ++i)
    for (uint32_t n = 0; n <= length; ++n) {
      send_option (fd, options[i], query, n);
      expect_option_reply (fd, options[i], NBD_REP_ERR_TLS_REQD, &reply);
      assert_string_equal ((char *) reply.data, "TLS is required");
    }
  send_option (fd, NBD_OPT_STARTTLS, "x", 1);
  expect_option_reply (fd, NBD_OPT_STARTTLS, NBD_REP_ERR_INVALID, NULL);
  send_option (fd, NBD_OPT_STARTTLS, NULL, 0);
  expect_option_reply (fd, NBD_OPT_STARTTLS, NBD_REP_ACK, NULL);
  session = encrypted (fd);
  tls_option (session, NBD_OPT_STARTTLS, NULL, 0);
  assert_int_equal (tls_option_reply (session, NULL), NBD_REP_ERR_INVALID);
  tls_go (session, NULL);
  tls_request (session, NBD_CMD_FLUSH, 5, 0);
  assert_int_equal (tls_simple_reply (session, 5), 0);
  hang_up (fd, session);

  fd = greeted ();
  send_option (fd, NBD_OPT_ABORT, NULL, 0);
  expect_option_reply (fd, NBD_OPT_ABORT, NBD_REP_ACK, NULL);
  expect_end (fd);
  close (fd);
}

static void
test_required_export_name (void **state)
{
  uint8_t option[16 + 4] = { 0 };

  (void) state;
  /* In one piece: the server does not wait for the name. */
  put_be64 (option, NBD_OPTION_MAGIC);
  put_be32 (option + 8, NBD_OPT_EXPORT_NAME);
  put_be32 (option + 12, 4);
  for (uint32_t cflags = 0; cflags < 4; ++cflags) {
    int fd = fixture_connect (&f);

    client_greet (fd, cflags);
    send_bytes (fd, option, sizeof option);
    expect_end (fd);
    close (fd);
  }
}

static void
test_optional (void **state)
{
  int fd = client_open (&f, NULL);

  (void) state;
  client_check_alive (&f, fd);
  close (fd);
  check_server ();
}

/* What comes in plaintext behind STARTTLS is never taken for something
 * that came encrypted: with it in one packet, behind it after our
 * answer, and the other way round as a part of an option.
 */
static void
test_injection (void **state)
{
  const struct nbd_new_option starttls_option = {
    .magic = htobe64 (NBD_OPTION_MAGIC),
    .option = htobe32 (NBD_OPT_STARTTLS),
  };
  const struct nbd_new_option list = {
    .magic = htobe64 (NBD_OPTION_MAGIC),
    .option = htobe32 (NBD_OPT_LIST),
  };
  uint8_t buf[2 * sizeof list];
  int fd;

  (void) state;
  memcpy (buf, &starttls_option, sizeof list);
  memcpy (buf + sizeof list, &list, sizeof list);
  for (size_t n = sizeof list + 1; n <= sizeof buf; ++n) {
    fd = greeted ();
    send_bytes (fd, buf, n);
    expect_end (fd);
    close (fd);
  }
  fd = starttls ();
  send_bytes (fd, &list, sizeof list);
  /* All that may come is an alert of TLS. */
  if (recv (fd, buf, 1, 0) == 1)
    assert_int_equal (buf[0], 21);
  close (fd);
  check_server ();
}

/* What was agreed on in plaintext is void. */
static void
test_state_is_forgotten (void **state)
{
  const char *const base[] = { "base:allocation", NULL };
  const char *const secret[] = { "qemu:dirty-bitmap:secret", NULL };
  uint8_t data[8192];
  uint32_t length;
  int fd = greeted ();
  gnutls_session_t session;

  (void) state;
  client_structured (fd);
  client_extended (fd);
  client_set_contexts (fd, secret, 1);
  send_option (fd, NBD_OPT_STARTTLS, NULL, 0);
  expect_option_reply (fd, NBD_OPT_STARTTLS, NBD_REP_ACK, NULL);
  session = encrypted (fd);

  /* Structured replies and extended headers, which would refuse them. */
  length = make_context_query (data, "", base);
  tls_option (session, NBD_OPT_SET_META_CONTEXT, data, length);
  assert_int_equal (tls_option_reply (session, NULL), NBD_REP_ERR_INVALID);
  /* And contexts, also if structured replies come again. */
  tls_option (session, NBD_OPT_STRUCTURED_REPLY, NULL, 0);
  assert_int_equal (tls_option_reply (session, NULL), NBD_REP_ACK);
  tls_go (session, data);
  assert_int_equal (get_be16 (data + 10) & NBD_FLAG_SEND_DF,
                    NBD_FLAG_SEND_DF);
  tls_request (session, NBD_CMD_BLOCK_STATUS, 7, 65536);
  tls_recv_bytes (session, data, sizeof (struct nbd_structured_reply));
  assert_int_equal (get_be16 (data + 6), NBD_REPLY_TYPE_ERROR);
  hang_up (fd, session);
}

static void
test_wrong_key (void **state)
{
  const gnutls_datum_t key = {
    .data = (unsigned char *) "ffffffff", .size = 8,
  };
  static const char *const names[] = { RELAY_USER, "mallory" };

  (void) state;
  for (int i = 0; i < 2; ++i) {
    gnutls_psk_client_credentials_t credentials;
    int fd = starttls (), r;
    gnutls_session_t session = tls_client_session (fd, false);

    gnutls_psk_allocate_client_credentials (&credentials);
    gnutls_psk_set_client_credentials (credentials, names[i], &key,
                                       GNUTLS_PSK_KEY_HEX);
    gnutls_credentials_set (session, GNUTLS_CRD_PSK, credentials);
    do
      r = gnutls_handshake (session);
    while (r < 0 && !gnutls_error_is_fatal (r));
    assert_true (r < 0);
    hang_up (fd, session);
    gnutls_psk_free_client_credentials (credentials);
  }
  check_server ();
}

/* Silent, or a byte now and then. */
static void
test_stalled_handshake (void **state)
{
  unsigned begin;
  int fd;

  (void) state;
  for (int drip = 0; drip < 2; ++drip) {
    begin = milliseconds ();
    fd = starttls ();
    for (unsigned i = 0;; ++i) {
      struct pollfd p = { .fd = fd, .events = POLLIN };

      if (poll (&p, 1, 50) == 1)
        break;
      assert_true (milliseconds () - begin < 20000);
      if (drip && send (fd, "\x16\x03\x01\x3f\x00\x01\x00\x3e\xfc" + i % 9,
                        1, MSG_NOSIGNAL) == -1)
        break;
    }
    assert_true (milliseconds () - begin >= 490);
    expect_end (fd);
    close (fd);
  }
}

static void
test_stop_in_handshake (void **state)
{
  unsigned begin;
  int fd = starttls ();

  (void) state;
  sleep_ms (50);
  begin = milliseconds ();
  nbd_server_stop (f.server, 10000);
  assert_true (milliseconds () - begin < 8000);
  expect_end (fd);
  close (fd);
}

/* Clients of which the bytes go through memory, so that tests can cut
 * and join them.
 */
static struct {
  uint8_t buf[1 << 20];
  size_t used;
} outbox;

static ssize_t
push_to_outbox (gnutls_transport_ptr_t ptr, const void *buf, size_t count)
{
  (void) ptr;
  assert_true (count <= sizeof outbox.buf - outbox.used);
  memcpy (outbox.buf + outbox.used, buf, count);
  outbox.used += count;
  return count;
}

static void
use_outbox (gnutls_session_t session)
{
  outbox.used = 0;
  gnutls_transport_set_push_function (session, push_to_outbox);
}

static void
send_outbox (int fd)
{
  send_bytes (fd, outbox.buf, outbox.used);
  outbox.used = 0;
}

/* Gone in the middle of the handshake, at every byte of the client's
 * first message, by close and by reset.
 */
static void
test_vanish_in_handshake (void **state)
{
  const struct linger reset = { .l_onoff = 1 };
  gnutls_session_t session = tls_client_session (-1, true);
  size_t length;

  (void) state;
  use_outbox (session);
  gnutls_handshake (session);
  length = outbox.used;
  gnutls_deinit (session);
  assert_true (length > 100);
  for (size_t n = 0; n <= length; n += n < 20 ? 1 : 13) {
    int fd = starttls ();

    send_bytes (fd, outbox.buf, n);
    if (n % 2 == 0)
      setsockopt (fd, SOL_SOCKET, SO_LINGER, &reset, sizeof reset);
    close (fd);
  }
  check_server ();
}

/* Gone in the middle of a record; and records that were changed. */
static void
test_broken_records (void **state)
{
  (void) state;
  for (unsigned i = 0; i < 60; ++i) {
    int fd = starttls ();
    gnutls_session_t session = encrypted (fd);

    tls_go (session, NULL);
    use_outbox (session);
    tls_request (session, NBD_CMD_FLUSH, 1, 0);
    assert_true (outbox.used >= 45);
    if (i < 20)
      outbox.used = 1 + i * 2;
    else
      outbox.buf[i < 30 ? i - 20 : outbox.used - 1 - (i - 30)] ^= 0x80;
    send_outbox (fd);
    if (i < 20)
      shutdown (fd, SHUT_WR);
    /* One that says it is longer than it is waits for the rest. */
    if (i == 23 || i == 24)
      shutdown (fd, SHUT_WR);
    {
      uint8_t byte;
      ssize_t r = gnutls_record_recv (session, &byte, 1);

      assert_true (r <= 0);
    }
    hang_up (fd, session);
  }
  check_server ();
  assert_int_equal (f.disk->calls[FAKE_FLUSH], 0);
}

/* Several records in one packet, between them one that is no request:
 * the server must not wait for more before it has done them all.
 */
static void
test_new_keys_between_requests (void **state)
{
  int fd = starttls ();
  gnutls_session_t session = encrypted (fd);

  (void) state;
  tls_go (session, NULL);
  for (uint64_t i = 0; i < 2; ++i) {
    use_outbox (session);
    tls_request (session, NBD_CMD_FLUSH, 2 * i, 0);
    assert_int_equal (gnutls_session_key_update (session, GNUTLS_KU_PEER), 0);
    tls_request (session, NBD_CMD_FLUSH, 2 * i + 1, 0);
    send_outbox (fd);
    for (int j = 0; j < 2; ++j) {
      struct nbd_simple_reply reply;

      tls_recv_bytes (session, &reply, sizeof reply);
      assert_true (reply.cookie / 2 == i);
    }
    /* It first, and alone, and then a request. */
    for (int alone = 0; alone < 2; ++alone) {
      use_outbox (session);
      assert_int_equal (gnutls_session_key_update (session, 0), 0);
      if (alone) {
        send_outbox (fd);
        sleep_ms (20);
      }
      tls_request (session, NBD_CMD_FLUSH, 99, 0);
      send_outbox (fd);
      assert_int_equal (tls_simple_reply (session, 99), 0);
    }
  }
  hang_up (fd, session);
}

/* A client that does nothing but change keys is cut off; one of TLS 1.2
 * that wants to begin anew as well.
 */
static void
test_new_keys_without_end (void **state)
{
  int fd = starttls ();
  gnutls_session_t session = encrypted (fd);
  uint8_t byte;

  (void) state;
  tls_go (session, NULL);
  use_outbox (session);
  for (int i = 0; i < 100; ++i)
    assert_int_equal (gnutls_session_key_update (session, 0), 0);
  send_outbox (fd);
  assert_true (gnutls_record_recv (session, &byte, 1) <= 0);
  hang_up (fd, session);
  check_server ();
}

#define TLS_1_2 "NORMAL:-VERS-ALL:+VERS-TLS1.2:+ECDHE-PSK:+DHE-PSK:+PSK"

static void
test_renegotiation (void **state)
{
  int fd, r;
  gnutls_session_t session;

  (void) state;
  tls_relay_priority = TLS_1_2;
  fd = starttls ();
  session = encrypted (fd);
  assert_int_equal (gnutls_protocol_get_version (session), GNUTLS_TLS1_2);
  tls_go (session, NULL);
  do
    r = gnutls_handshake (session);
  while (r < 0 && !gnutls_error_is_fatal (r));
  assert_true (r < 0);
  hang_up (fd, session);
  check_server ();
}

/* Large and small requests with other versions, ciphers and sizes of
 * records.
 */
static void
check_data (void)
{
  enum { LENGTH = 3 * 1000 * 1000 };
  uint8_t *data = malloc (LENGTH);
  int fd;
  struct reply reply;

  for (int i = 0; i < LENGTH; ++i)
    data[i] = i * 7 % 251;
  fixture_over_tls = true;
  fd = client_open (&f, NULL);
  for (uint32_t length = 1; length <= LENGTH; length = length * 7 + 1) {
    send_request (fd, 0, NBD_CMD_WRITE, 1, 77, length);
    send_bytes (fd, data, length);
    expect_error (fd, 1, 0);
    send_request (fd, 0, NBD_CMD_READ, 2, 77, length);
    recv_whole_reply (fd, &reply, 0);
    assert_int_equal (reply.length, 8 + length);
    assert_memory_equal (reply.data + 8, data, length);
    free (reply.data);
  }
  close (fd);
  fixture_over_tls = false;
  free (data);
}

static void
test_versions (void **state)
{
  static const char *const priorities[] = {
    TLS_1_2,
    TLS_1_2 ":-CIPHER-ALL:+AES-256-CBC:%NO_ETM",
    "NORMAL:-VERS-ALL:+VERS-TLS1.3:-CIPHER-ALL:+AES-128-GCM"
    ":+ECDHE-PSK:+DHE-PSK:+PSK",
    "NORMAL:-VERS-ALL:+VERS-TLS1.3:-CIPHER-ALL:+CHACHA20-POLY1305"
    ":+ECDHE-PSK:+DHE-PSK:+PSK",
  };

  (void) state;
  for (size_t i = 0; i < sizeof priorities / sizeof priorities[0]; ++i) {
    tls_relay_priority = priorities[i];
    check_data ();
  }
}

/* A client can ask for records of 512 bytes. */
static void
test_small_records (void **state)
{
  enum { LENGTH = 200000 };
  int fd = starttls ();
  gnutls_session_t session = tls_client_session (fd, false);
  uint8_t *buf = malloc (LENGTH);

  (void) state;
  assert_int_equal (gnutls_record_set_max_recv_size (session, 512), 0);
  assert_int_equal (gnutls_handshake (session), 0);
  tls_go (session, NULL);
  for (int i = 0; i < LENGTH; ++i)
    f.disk->data[i] = i * 7 % 251;
  tls_request (session, NBD_CMD_READ, 3, LENGTH);
  assert_int_equal (tls_simple_reply (session, 3), 0);
  tls_recv_bytes (session, buf, LENGTH);
  assert_memory_equal (buf, f.disk->data, LENGTH);
  free (buf);
  hang_up (fd, session);
}

/* A session is ended as TLS wants it, so that the client knows that
 * nobody cut it: when the client takes its leave, and when we stop.
 */
static void
test_close_notify (void **state)
{
  uint8_t byte;

  (void) state;
  for (int i = 0; i < 2; ++i) {
    int fd = starttls ();
    gnutls_session_t session = encrypted (fd);

    tls_go (session, NULL);
    tls_request (session, NBD_CMD_FLUSH, 3, 0);
    assert_int_equal (tls_simple_reply (session, 3), 0);
    if (i == 0)
      tls_request (session, NBD_CMD_DISC, 4, 0);
    else
      nbd_server_stop (f.server, 1000);
    assert_int_equal (gnutls_record_recv (session, &byte, 1), 0);
    hang_up (fd, session);
  }
}

static gnutls_session_t
with_context (int fd)
{
  static const char *const queries[] = { "qemu:dirty-bitmap:fine", NULL };
  gnutls_session_t session = encrypted (fd);
  uint8_t data[100];
  uint32_t length;

  tls_option (session, NBD_OPT_STRUCTURED_REPLY, NULL, 0);
  assert_int_equal (tls_option_reply (session, NULL), NBD_REP_ACK);
  length = make_context_query (data, "", queries);
  tls_option (session, NBD_OPT_SET_META_CONTEXT, data, length);
  assert_int_equal (tls_option_reply (session, NULL), NBD_REP_META_CONTEXT);
  assert_int_equal (tls_option_reply (session, NULL), NBD_REP_ACK);
  tls_go (session, NULL);
  return session;
}

/* Ask for more extents than extents_max: they are told as one, but the array
 * of extents has grown to 1 MiB, and a worker keeps it until it has been
 * idle for a while.
 */
static void
ask_for_extents (gnutls_session_t session)
{
  struct nbd_structured_reply reply;
  uint8_t data[4 + 8];

  tls_request (session, NBD_CMD_BLOCK_STATUS, 1, FRAGMENTED);
  tls_recv_bytes (session, &reply, sizeof reply);
  assert_int_equal (be16toh (reply.type), NBD_REPLY_TYPE_BLOCK_STATUS);
  assert_int_equal (be32toh (reply.length), 4 + 8);
  tls_recv_bytes (session, data, sizeof data);
}

/* A client of which a worker keeps extents.  A worker that loses the role
 * keeps nothing, so it must not be taken for slow, however slow the machine
 * is.  If it was when the monitor came back, another client tries.
 */
static int
client_keeping_extents (gnutls_session_t *session)
{
  for (unsigned i = 1;; ++i) {
    const int fd = starttls ();
    size_t before;

    *session = with_context (fd);
    /* Its handshake is finished. */
    tls_request (*session, NBD_CMD_FLUSH, 9, 0);
    assert_int_equal (tls_simple_reply (*session, 9), 0);
    before = fixture_memory (&f);
    fixture_pause_monitor (&f);
    ask_for_extents (*session);
    sleep_ms (10);
    fixture_resume_monitor (&f);
    if (fixture_memory (&f) > before)
      return fd;
    assert_int_not_equal (i, 100);
    hang_up (fd, *session);
  }
}

/* Clients that send the record of their next request byte by byte.  What
 * their workers keep is given to one that waits for it: a byte is enough.
 */
static void
test_records_byte_by_byte (void **state)
{
  enum { SLOW = 16, STEP_MS = 100, LARGE = 32 * 1024 * 1024 };
  struct {
    int fd;
    gnutls_session_t session;
    uint8_t record[100];
  } slow[SLOW];
  size_t length = 0;
  struct reply reply;
  struct pollfd good = { .events = POLLIN };

  (void) state;
  good.fd = client_open (&f, NULL);
  for (unsigned i = 0; i < SLOW; ++i) {
    slow[i].fd = client_keeping_extents (&slow[i].session);
    use_outbox (slow[i].session);
    tls_request (slow[i].session, NBD_CMD_FLUSH, 2, 0);
    length = outbox.used;
    assert_in_range (length, sizeof (struct nbd_request) + 1,
                     sizeof slow[i].record);
    memcpy (slow[i].record, outbox.buf, length);
  }

  send_request (good.fd, NBD_CMD_FLAG_DF, NBD_CMD_READ, 3, 0, LARGE);
  for (size_t n = 0; n < length; ++n) {
    const int come = poll (&good, 1, STEP_MS);

    if (n == length - 1)
      assert_int_equal (come, 1);
    for (unsigned i = 0; i < SLOW; ++i)
      send_bytes (slow[i].fd, &slow[i].record[n], 1);
  }
  recv_reply (good.fd, &reply, 0);
  assert_int_equal (reply.error, 0);
  assert_int_equal (reply.length, 8 + LARGE);
  free (reply.data);
  close (good.fd);

  for (unsigned i = 0; i < SLOW; ++i) {
    assert_int_equal (tls_simple_reply (slow[i].session, 2), 0);
    hang_up (slow[i].fd, slow[i].session);
  }
}

int
main (int argc, char *argv[])
{
#define REQUIRED(name)                                                  \
  cmocka_unit_test_setup_teardown (name, setup_required, teardown)
#define OPTIONAL(name)                                                  \
  cmocka_unit_test_setup_teardown (name, setup_optional, teardown)
  const struct CMUnitTest tests[] = {
    REQUIRED (test_required),
    REQUIRED (test_required_export_name),
    OPTIONAL (test_optional),
    OPTIONAL (test_injection),
    REQUIRED (test_injection),
    OPTIONAL (test_state_is_forgotten),
    REQUIRED (test_wrong_key),
    cmocka_unit_test_setup_teardown (test_stalled_handshake,
                                     setup_impatient, teardown),
    REQUIRED (test_stop_in_handshake),
    REQUIRED (test_vanish_in_handshake),
    REQUIRED (test_broken_records),
    REQUIRED (test_new_keys_between_requests),
    REQUIRED (test_new_keys_without_end),
    REQUIRED (test_renegotiation),
    REQUIRED (test_versions),
    REQUIRED (test_small_records),
    REQUIRED (test_close_notify),
    cmocka_unit_test_setup_teardown (test_records_byte_by_byte,
                                     setup_short_of_memory, teardown),
  };

  if (argc > 1)
    cmocka_set_test_filter (argv[1]);
  return cmocka_run_group_tests (tests, NULL, NULL);
}
