/* nbdkit-dirty-bitmap-filter
 * SPDX-License-Identifier: BSD-3-Clause
 * Copyright the nbdkit-dirty-bitmap-filter authors
 */

/* The handshake of filter/nbd: every option, right and malformed.
 */

#include <config.h>

#include <errno.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "common/bytes.h"
#include "nbd-fixture.h"

#define SIZE (1024 * 1024)
#define FIXED_NO_ZEROES (NBD_FLAG_FIXED_NEWSTYLE | NBD_FLAG_NO_ZEROES)

static int
setup (void **state)
{
  (void) state;
  fixture_init (&f, SIZE);
  fake_disk_add_bitmap (f.disk, "tuesday", 65536);
  fake_disk_add_bitmap (f.disk, "monday", 65536);
  fake_disk_add_bitmap (f.disk, "mon", 65536);
  fixture_start (&f, false);
  return 0;
}

static int
setup_readonly (void **state)
{
  (void) state;
  fixture_init (&f, SIZE);
  fixture_start (&f, true);
  return 0;
}

static int
setup_image_readonly (void **state)
{
  (void) state;
  fixture_init (&f, SIZE);
  f.disk->readonly = true;
  f.disk->block_size = 512;
  fixture_start (&f, false);
  return 0;
}

static int
greeted (void)
{
  int fd = fixture_connect (&f);

  client_greet (fd, FIXED_NO_ZEROES);
  return fd;
}

/* The stream is in step: GO works. */
static void
finish (int fd)
{
  client_go (fd, "", NULL);
  send_request (fd, 0, NBD_CMD_FLUSH, 77, 0, 0);
  expect_error (fd, 77, 0);
  close (fd);
}

static void
test_export_name (void **state)
{
  uint8_t buf[134];
  int fd;

  (void) state;
  /* The oldest clients set no flags, and get zeroes. */
  fd = fixture_connect (&f);
  client_greet (fd, 0);
  send_option (fd, NBD_OPT_EXPORT_NAME, "any", 3);
  memset (buf, 0xff, sizeof buf);
  recv_bytes (fd, buf, 134);
  assert_int_equal (get_be64 (buf), SIZE);
  assert_int_equal (get_be16 (buf + 8), 0x0d6d);
  for (size_t i = 10; i < 134; ++i)
    assert_int_equal (buf[i], 0);
  send_request (fd, 0, NBD_CMD_FLUSH, 1, 0, 0);
  expect_error (fd, 1, 0);
  close (fd);

  fd = greeted ();
  client_structured (fd);
  send_option (fd, NBD_OPT_EXPORT_NAME, "", 0);
  recv_bytes (fd, buf, 10);
  assert_int_equal (get_be16 (buf + 8), 0x0ded);
  send_request (fd, 0, NBD_CMD_FLUSH, 1, 0, 0);
  expect_error (fd, 1, 0);
  close (fd);

  /* A name that is too long can only be refused by the end. */
  fd = greeted ();
  {
    /* In one piece: the server does not wait for the name. */
    uint8_t option[16 + 4097] = { 0 };

    put_be64 (option, NBD_OPTION_MAGIC);
    put_be32 (option + 8, NBD_OPT_EXPORT_NAME);
    put_be32 (option + 12, 4097);
    send_bytes (fd, option, sizeof option);
  }
  expect_end (fd);
  close (fd);
}

static void
test_client_flags (void **state)
{
  int fd = fixture_connect (&f);

  (void) state;
  client_greet (fd, 4);
  expect_end (fd);
  close (fd);
}

static void
test_abort (void **state)
{
  int fd = greeted ();

  (void) state;
  send_option (fd, NBD_OPT_ABORT, NULL, 0);
  expect_option_reply (fd, NBD_OPT_ABORT, NBD_REP_ACK, NULL);
  expect_end (fd);
  close (fd);
}

static void
test_list (void **state)
{
  int fd = greeted ();
  struct option_reply reply;

  (void) state;
  send_option (fd, NBD_OPT_LIST, "x", 1);
  expect_option_reply (fd, NBD_OPT_LIST, NBD_REP_ERR_INVALID, NULL);
  send_option (fd, NBD_OPT_LIST, NULL, 0);
  expect_option_reply (fd, NBD_OPT_LIST, NBD_REP_SERVER, &reply);
  assert_int_equal (get_be32 (reply.data), 0);
  assert_string_equal ((char *) reply.data + 4, "a fake disk");
  expect_option_reply (fd, NBD_OPT_LIST, NBD_REP_ACK, NULL);
  finish (fd);
}

static void
test_unsupported (void **state)
{
  int fd = greeted ();
  char *junk = calloc (1, 1 << 20);

  (void) state;
  send_option (fd, NBD_OPT_STARTTLS, NULL, 0);
  expect_option_reply (fd, NBD_OPT_STARTTLS, fixture_over_tls
                       ? NBD_REP_ERR_INVALID : NBD_REP_ERR_POLICY, NULL);
  send_option (fd, NBD_OPT_STARTTLS, "x", 1);
  expect_option_reply (fd, NBD_OPT_STARTTLS, NBD_REP_ERR_INVALID, NULL);
  send_option (fd, 12, NULL, 0);
  expect_option_reply (fd, 12, NBD_REP_ERR_UNSUP, NULL);
  send_option (fd, 0xfffffff0, junk, 1 << 20);
  expect_option_reply (fd, 0xfffffff0, NBD_REP_ERR_UNSUP, NULL);
  send_option (fd, NBD_OPT_STRUCTURED_REPLY, "x", 1);
  expect_option_reply (fd, NBD_OPT_STRUCTURED_REPLY,
                       NBD_REP_ERR_INVALID, NULL);
  client_structured (fd);
  client_structured (fd);
  finish (fd);
  free (junk);
}

static void
test_garbage (void **state)
{
  struct nbd_new_option header = { .magic = htobe64 (NBD_OPTION_MAGIC) };
  uint8_t buf[64];
  int fd = greeted ();

  (void) state;
  memset (buf, 'G', sizeof buf);
  send_bytes (fd, buf, sizeof buf);
  expect_end (fd);
  close (fd);

  /* An absurd length is not waited for. */
  fd = greeted ();
  header.option = htobe32 (NBD_OPT_GO);
  header.length = htobe32 (0x2000001);
  send_bytes (fd, &header, sizeof header);
  expect_end (fd);
  close (fd);
}

static uint32_t
make_info (uint8_t *buf, const char *name, size_t nr, const uint16_t *info)
{
  size_t n = strlen (name);

  put_be32 (buf, n);
  memcpy (buf + 4, name, n);
  put_be16 (buf + 4 + n, nr);
  for (size_t i = 0; i < nr; ++i)
    put_be16 (buf + 6 + n + 2 * i, info[i]);
  return 6 + n + 2 * nr;
}

static void
test_info (void **state)
{
  const uint16_t wanted[] = { 0, 3, 2, 1, 999 };
  struct option_reply reply;
  uint8_t buf[256];
  int fd = greeted ();

  (void) state;
  send_option (fd, NBD_OPT_INFO, buf, make_info (buf, "disk", 5, wanted));
  expect_option_reply (fd, NBD_OPT_INFO, NBD_REP_INFO, &reply);
  assert_int_equal (get_be16 (reply.data), NBD_INFO_NAME);
  assert_string_equal ((char *) reply.data + 2, "disk");
  expect_option_reply (fd, NBD_OPT_INFO, NBD_REP_INFO, &reply);
  assert_int_equal (get_be16 (reply.data), NBD_INFO_DESCRIPTION);
  assert_string_equal ((char *) reply.data + 2, "a fake disk");
  expect_option_reply (fd, NBD_OPT_INFO, NBD_REP_INFO, &reply);
  assert_int_equal (get_be16 (reply.data), NBD_INFO_BLOCK_SIZE);
  assert_int_equal (reply.length, 14);
  assert_int_equal (get_be32 (reply.data + 2), 1);
  assert_int_equal (get_be32 (reply.data + 6), 65536);
  assert_int_equal (get_be32 (reply.data + 10), 32 * 1024 * 1024);
  expect_option_reply (fd, NBD_OPT_INFO, NBD_REP_INFO, &reply);
  assert_int_equal (get_be16 (reply.data), NBD_INFO_EXPORT);
  assert_int_equal (get_be64 (reply.data + 2), SIZE);
  assert_int_equal (get_be16 (reply.data + 10), 0x0d6d);
  expect_option_reply (fd, NBD_OPT_INFO, NBD_REP_ACK, NULL);
  finish (fd);
}

static void
test_info_malformed (void **state)
{
  uint8_t buf[8192] = { 0 };
  const uint16_t wanted[] = { 3 };
  uint32_t n;
  int fd = greeted ();

#define BAD(length)                                                     \
  do {                                                                  \
    send_option (fd, NBD_OPT_INFO, buf, (length));                      \
    expect_option_reply (fd, NBD_OPT_INFO, NBD_REP_ERR_INVALID, NULL);  \
  } while (0)

  (void) state;
  n = make_info (buf, "disk", 1, wanted);
  for (uint32_t i = 0; i < n; ++i)
    BAD (i);
  BAD (n + 1);
  BAD (n + 2);
  put_be32 (buf, 5000);
  BAD (sizeof buf);
  put_be32 (buf, 0xffffffff);
  BAD (n);
  make_info (buf, "di", 1, wanted);
  buf[5] = '\0';
  BAD (10);
#undef BAD
  finish (fd);
}

static void
test_flags (void **state)
{
  struct option_reply reply;
  int fd = greeted ();

  (void) state;
  client_go (fd, "", &reply);
  assert_int_equal (get_be16 (reply.data + 10), 0x0d6d);
  close (fd);
  fd = greeted ();
  client_structured (fd);
  client_go (fd, "", &reply);
  assert_int_equal (get_be16 (reply.data + 10), 0x0ded);
  close (fd);
}

static void
test_flags_readonly (void **state)
{
  struct option_reply reply;
  int fd = greeted ();

  (void) state;
  client_structured (fd);
  client_go (fd, "", &reply);
  /* HAS_FLAGS, READ_ONLY, FLUSH, FUA, DF, MULTI_CONN, CACHE */
  assert_int_equal (get_be16 (reply.data + 10), 0x058f);
  close (fd);
}

static void
test_block_size_is_clamped (void **state)
{
  struct option_reply reply;
  uint8_t buf[64];
  int fd = greeted ();

  (void) state;
  send_option (fd, NBD_OPT_INFO, buf, make_info (buf, "", 0, NULL));
  expect_option_reply (fd, NBD_OPT_INFO, NBD_REP_INFO, &reply);
  assert_int_equal (get_be32 (reply.data + 6), 4096);
  expect_option_reply (fd, NBD_OPT_INFO, NBD_REP_INFO, NULL);
  expect_option_reply (fd, NBD_OPT_INFO, NBD_REP_ACK, NULL);
  close (fd);
}

/* A byte at a time, and all at once: how the stream is cut is nothing
 * to the server.
 */
static void
test_split_handshake (void **state)
{
  const char *const monday[] = { "qemu:dirty-bitmap:monday", NULL };
  uint8_t buf[512], query[128];
  size_t n = 4;
  struct option_reply reply;
  int fd;

  (void) state;
  put_be32 (buf, FIXED_NO_ZEROES);
#define OPTION(opt, data, length)                       \
  do {                                                  \
    put_be64 (buf + n, NBD_OPTION_MAGIC);               \
    put_be32 (buf + n + 8, (opt));                      \
    put_be32 (buf + n + 12, (length));                  \
    memcpy (buf + n + 16, (data), (length));            \
    n += 16 + (length);                                 \
  } while (0)
  OPTION (NBD_OPT_STRUCTURED_REPLY, query, 0);
  {
    uint32_t length = make_context_query (query, "", monday);

    OPTION (NBD_OPT_SET_META_CONTEXT, query, length);
  }
  OPTION (NBD_OPT_GO, "\0\0\0\0\0\0", 6);
#undef OPTION
  put_request (buf + n, 0, NBD_CMD_FLUSH, 9, 0, 0);
  n += sizeof (struct nbd_request);

  for (int pass = 0; pass < 2; ++pass) {
    uint8_t greeting[18];

    fd = fixture_connect (&f);
    for (size_t i = 0; pass == 0 && i < n; ++i)
      send_bytes (fd, buf + i, 1);
    if (pass == 1)
      send_bytes (fd, buf, n);
    recv_bytes (fd, greeting, sizeof greeting);
    expect_option_reply (fd, NBD_OPT_STRUCTURED_REPLY, NBD_REP_ACK, NULL);
    expect_option_reply (fd, NBD_OPT_SET_META_CONTEXT,
                         NBD_REP_META_CONTEXT, &reply);
    assert_int_equal (get_be32 (reply.data), 3);
    expect_option_reply (fd, NBD_OPT_SET_META_CONTEXT, NBD_REP_ACK, NULL);
    expect_option_reply (fd, NBD_OPT_GO, NBD_REP_INFO, NULL);
    expect_option_reply (fd, NBD_OPT_GO, NBD_REP_INFO, NULL);
    expect_option_reply (fd, NBD_OPT_GO, NBD_REP_ACK, NULL);
    expect_error (fd, 9, 0);
    close (fd);
  }
}

int
main (void)
{
  const struct CMUnitTest tests[] = {
    TEST (test_export_name),
    TEST (test_client_flags),
    TEST (test_abort),
    TEST (test_list),
    TEST (test_unsupported),
    TEST (test_garbage),
    TEST (test_info),
    TEST (test_info_malformed),
    TEST (test_flags),
    cmocka_unit_test_setup_teardown (test_flags_readonly,
                                     setup_readonly, teardown),
    cmocka_unit_test_setup_teardown (test_flags_readonly,
                                     setup_image_readonly, teardown),
    cmocka_unit_test_setup_teardown (test_block_size_is_clamped,
                                     setup_image_readonly, teardown),
    TEST (test_split_handshake),
  };

  int failed = cmocka_run_group_tests_name ("plain", tests, NULL, NULL);

  fixture_over_tls = true;
  return failed +
    cmocka_run_group_tests_name ("over TLS", tests, NULL, NULL);
}
