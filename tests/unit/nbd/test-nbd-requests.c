/* nbdkit-dirty-bitmap-filter
 * SPDX-License-Identifier: BSD-3-Clause
 * Copyright the nbdkit-dirty-bitmap-filter authors
 */

/* The requests of filter/nbd: each command, what is refused and how, and
 * the bytes of the replies.
 */

#include <config.h>

#include <errno.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "common/bytes.h"
#include "image.h"
#include "nbd-fixture.h"

#define SIZE (UINT64_C (64) * 1024 * 1024)
#define MAX (32 * 1024 * 1024)

static int
setup (void **state)
{
  (void) state;
  fixture_init (&f, SIZE);
  fixture_start (&f, false);
  for (size_t i = 0; i < 1024 * 1024; ++i)
    f.disk->data[i] = i * 7 + i / 251;
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
open_simple (void)
{
  int fd = fixture_connect (&f);

  client_greet (fd, NBD_FLAG_FIXED_NEWSTYLE | NBD_FLAG_NO_ZEROES);
  client_go (fd, "", NULL);
  return fd;
}

static const char *const base[] = { "base:allocation", NULL };

static void
check_read (int fd, uint64_t offset, uint32_t length)
{
  const uint64_t cookie = 0x1122334455667788;
  uint8_t *buf = malloc (length);
  struct read_reply reply;

  send_request (fd, 0, NBD_CMD_READ, cookie, offset, length);
  reply = recv_read (fd, cookie, offset, length, buf);
  assert_int_equal (reply.error, 0);
  if (length <= 64 * 1024)
    assert_int_equal (reply.nr_chunks, 1);
  assert_memory_equal (buf, f.disk->data + offset, length);
  free (buf);
}

static void
test_read (void **state)
{
  static const uint32_t lengths[] =
    { 1, 511, 512, 4096, 65535, 65536, 65537, 131072, 1000000 };
  int simple = open_simple (), structured = client_open (&f, NULL);

  (void) state;
  for (size_t i = 0; i < sizeof lengths / sizeof lengths[0]; ++i) {
    check_read (simple, 13, lengths[i]);
    check_read (structured, 13, lengths[i]);
    check_read (simple, SIZE - lengths[i], lengths[i]);
    check_read (structured, SIZE - lengths[i], lengths[i]);
  }
  close (simple);
  close (structured);
}

static void
test_read_of_nothing (void **state)
{
  struct reply reply;
  int fd = client_open (&f, NULL);

  (void) state;
  send_request (fd, 0, NBD_CMD_READ, 1, 100, 0);
  recv_reply (fd, &reply, 0);
  assert_true (reply.structured);
  assert_int_equal (reply.type, NBD_REPLY_TYPE_NONE);
  assert_int_equal (reply.flags, NBD_REPLY_FLAG_DONE);
  assert_int_equal (reply.length, 0);
  free (reply.data);
  close (fd);
  fd = open_simple ();
  send_request (fd, 0, NBD_CMD_READ, 1, 100, 0);
  expect_error (fd, 1, 0);
  close (fd);
}

static void
write_and_check (int fd, uint16_t flags, uint64_t offset, uint32_t length)
{
  uint8_t *buf = malloc (length);

  for (uint32_t i = 0; i < length; ++i)
    buf[i] = i * 11 + i / 253 + length;
  send_request (fd, flags, NBD_CMD_WRITE, 3, offset, length);
  send_bytes (fd, buf, length);
  expect_error (fd, 3, 0);
  assert_memory_equal (f.disk->data + offset, buf, length);
  free (buf);
}

static void
test_write (void **state)
{
  static const uint32_t lengths[] =
    { 1, 512, 4096, 32767, 32768, 65536, 131073, 1 << 20 };
  const uint32_t largest = how_often (MAX, MAX, 3 << 20);
  int fd = client_open (&f, NULL);

  (void) state;
  for (size_t i = 0; i < sizeof lengths / sizeof lengths[0]; ++i)
    write_and_check (fd, 0, 12345, lengths[i]);
  write_and_check (fd, 0, 12345, largest);
  write_and_check (fd, 0, SIZE - largest, largest);
  assert_false (f.disk->last_fua);
  write_and_check (fd, NBD_CMD_FLAG_FUA, 0, 512);
  assert_true (f.disk->last_fua);
  send_request (fd, 0, NBD_CMD_WRITE, 4, 0, 0);
  expect_error (fd, 4, 0);
  close (fd);
}

static void
test_read_32m (void **state)
{
  const uint32_t largest = how_often (MAX, MAX, 3 << 20);
  int fd = client_open (&f, NULL);

  (void) state;
  memset (f.disk->data, 0x5a, largest);
  check_read (fd, 0, largest);
  close (fd);
}

static void
test_other_commands (void **state)
{
  int fd = client_open (&f, NULL);

  (void) state;
  memset (f.disk->data, 1, 65536);
  send_request (fd, 0, NBD_CMD_WRITE_ZEROES, 1, 0, 4096);
  expect_error (fd, 1, 0);
  assert_int_equal (f.disk->data[0], 0);
  assert_int_equal (f.disk->data[4095], 0);
  assert_int_equal (f.disk->data[4096], 1);
  assert_false (f.disk->last_no_hole || f.disk->last_fast ||
                f.disk->last_fua);
  send_request (fd, NBD_CMD_FLAG_NO_HOLE, NBD_CMD_WRITE_ZEROES, 1, 0, 4096);
  expect_error (fd, 1, 0);
  assert_true (f.disk->last_no_hole && !f.disk->last_fast);
  send_request (fd, NBD_CMD_FLAG_FAST_ZERO | NBD_CMD_FLAG_FUA,
                NBD_CMD_WRITE_ZEROES, 1, 0, 4096);
  expect_error (fd, 1, 0);
  assert_true (!f.disk->last_no_hole && f.disk->last_fast &&
               f.disk->last_fua);

  send_request (fd, NBD_CMD_FLAG_FUA, NBD_CMD_TRIM, 2, 8192, SIZE - 8192);
  expect_error (fd, 2, 0);
  assert_int_equal (f.disk->calls[FAKE_TRIM], 1);
  assert_int_equal (f.disk->data[8192], 0);
  send_request (fd, 0, NBD_CMD_CACHE, 3, 0, SIZE);
  expect_error (fd, 3, 0);
  assert_int_equal (f.disk->calls[FAKE_CACHE], 1);
  send_request (fd, NBD_CMD_FLAG_FUA, NBD_CMD_FLUSH, 4, 0, 0);
  expect_error (fd, 4, 0);
  assert_int_equal (f.disk->calls[FAKE_FLUSH], 1);

  /* Nothing to do is done. */
  send_request (fd, 0, NBD_CMD_WRITE_ZEROES, 5, SIZE, 0);
  expect_error (fd, 5, 0);
  send_request (fd, 0, NBD_CMD_TRIM, 6, 0, 0);
  expect_error (fd, 6, 0);
  send_request (fd, 0, NBD_CMD_CACHE, 7, 0, 0);
  expect_error (fd, 7, 0);
  assert_int_equal (f.disk->calls[FAKE_ZERO], 3);
  assert_int_equal (f.disk->calls[FAKE_TRIM], 1);
  assert_int_equal (f.disk->calls[FAKE_CACHE], 1);
  close (fd);
}

static void
test_refused (void **state)
{
  static const struct {
    uint16_t flags, type;
    uint64_t offset;
    uint32_t length;
    uint32_t error;
  } rows[] = {
    /* unknown commands */
    { 0, 8, 0, 512, NBD_EINVAL },
    { 0, 0xffff, 0, 512, NBD_EINVAL },
    /* unknown flags, and those of other commands */
    { 0x20, NBD_CMD_READ, 0, 512, NBD_EINVAL },
    { 0x8000, NBD_CMD_FLUSH, 0, 0, NBD_EINVAL },
    { NBD_CMD_FLAG_NO_HOLE, NBD_CMD_READ, 0, 512, NBD_EINVAL },
    { NBD_CMD_FLAG_REQ_ONE, NBD_CMD_READ, 0, 512, NBD_EINVAL },
    { NBD_CMD_FLAG_FAST_ZERO, NBD_CMD_READ, 0, 512, NBD_EINVAL },
    { NBD_CMD_FLAG_NO_HOLE, NBD_CMD_TRIM, 0, 512, NBD_EINVAL },
    { NBD_CMD_FLAG_DF, NBD_CMD_TRIM, 0, 512, NBD_EINVAL },
    { NBD_CMD_FLAG_DF, NBD_CMD_WRITE_ZEROES, 0, 512, NBD_EINVAL },
    { NBD_CMD_FLAG_REQ_ONE, NBD_CMD_WRITE_ZEROES, 0, 512, NBD_EINVAL },
    { NBD_CMD_FLAG_DF, NBD_CMD_FLUSH, 0, 0, NBD_EINVAL },
    { NBD_CMD_FLAG_NO_HOLE, NBD_CMD_CACHE, 0, 512, NBD_EINVAL },
    { 2, NBD_CMD_BLOCK_STATUS, 0, 512, NBD_EINVAL },
    { NBD_CMD_FLAG_DF, NBD_CMD_BLOCK_STATUS, 0, 512, NBD_EINVAL },
    { NBD_CMD_FLAG_FAST_ZERO, NBD_CMD_BLOCK_STATUS, 0, 512, NBD_EINVAL },
    /* ranges */
    { 0, NBD_CMD_READ, SIZE, 1, NBD_EINVAL },
    { 0, NBD_CMD_READ, SIZE - 1, 2, NBD_EINVAL },
    { 0, NBD_CMD_READ, SIZE + 1, 0, NBD_EINVAL },
    { 0, NBD_CMD_READ, UINT64_MAX, 1, NBD_EINVAL },
    { 0, NBD_CMD_READ, UINT64_MAX - 511, 512, NBD_EINVAL },
    { 0, NBD_CMD_TRIM, SIZE - 1, 2, NBD_EINVAL },
    { 0, NBD_CMD_TRIM, 0, 0xffffffff, NBD_EINVAL },
    { 0, NBD_CMD_CACHE, SIZE - 1, 2, NBD_EINVAL },
    { 0, NBD_CMD_WRITE_ZEROES, SIZE - 1, 2, NBD_ENOSPC },
    { 0, NBD_CMD_WRITE_ZEROES, UINT64_MAX, 1, NBD_ENOSPC },
    { 0, NBD_CMD_BLOCK_STATUS, SIZE - 1, 2, NBD_EINVAL },
    { 0, NBD_CMD_BLOCK_STATUS, UINT64_MAX, 1, NBD_EINVAL },
    /* lengths */
    { 0, NBD_CMD_READ, 0, MAX + 1, NBD_EINVAL },
    { 0, NBD_CMD_READ, 0, 0xffffffff, NBD_EINVAL },
    { NBD_CMD_FLAG_DF, NBD_CMD_READ, 0, MAX + 1, NBD_EOVERFLOW },
    { 0, NBD_CMD_BLOCK_STATUS, 0, 0, NBD_EINVAL },
  };
  int fd = client_open (&f, base);

  (void) state;
  for (size_t i = 0; i < sizeof rows / sizeof rows[0]; ++i) {
    send_request (fd, rows[i].flags, rows[i].type, 100 + i,
                  rows[i].offset, rows[i].length);
    expect_error (fd, 100 + i, rows[i].error);
  }
  for (size_t i = 0; i < FAKE_NR_OPS; ++i)
    assert_int_equal (f.disk->calls[i], 0);
  check_read (fd, 0, 512);
  close (fd);
}

static void
test_flags_accepted (void **state)
{
  struct reply reply;
  int fd = client_open (&f, base);

  (void) state;
  send_request (fd, NBD_CMD_FLAG_DF | NBD_CMD_FLAG_FUA,
                NBD_CMD_READ, 1, 0, 65536);
  recv_reply (fd, &reply, 0);
  assert_int_equal (reply.type, NBD_REPLY_TYPE_OFFSET_DATA);
  free (reply.data);
  send_request (fd, NBD_CMD_FLAG_REQ_ONE | NBD_CMD_FLAG_FUA,
                NBD_CMD_BLOCK_STATUS, 1, 0, 65536);
  recv_reply (fd, &reply, 0);
  assert_int_equal (reply.type, NBD_REPLY_TYPE_BLOCK_STATUS);
  free (reply.data);
  send_request (fd, NBD_CMD_FLAG_FUA, NBD_CMD_CACHE, 1, 0, 65536);
  expect_error (fd, 1, 0);
  close (fd);
}

/* Without structured replies there is no DF and no BLOCK_STATUS, and
 * errors are simple.
 */
static void
test_refused_simple (void **state)
{
  struct reply reply;
  int fd = open_simple ();

  (void) state;
  send_request (fd, NBD_CMD_FLAG_DF, NBD_CMD_READ, 1, 0, 512);
  recv_reply (fd, &reply, 512);
  assert_false (reply.structured);
  assert_int_equal (reply.error, NBD_EINVAL);
  send_request (fd, 0, NBD_CMD_BLOCK_STATUS, 1, 0, 512);
  recv_reply (fd, &reply, 0);
  assert_false (reply.structured);
  assert_int_equal (reply.error, NBD_EINVAL);
  check_read (fd, 0, 512);
  close (fd);

  /* Structured, but no context. */
  fd = client_open (&f, NULL);
  send_request (fd, 0, NBD_CMD_BLOCK_STATUS, 1, 0, 512);
  recv_reply (fd, &reply, 0);
  assert_true (reply.structured);
  assert_int_equal (reply.error, NBD_EINVAL);
  free (reply.data);
  close (fd);
}

/* The payload of a write that is refused is not taken for requests. */
static void
test_refused_write (void **state)
{
  static const struct {
    uint16_t flags;
    uint64_t offset;
    uint32_t length, error;
  } rows[] = {
    { 0, SIZE - 1, 2, NBD_ENOSPC },
    { 0, SIZE, 1, NBD_ENOSPC },
    { 0, UINT64_MAX, 70000, NBD_ENOSPC },
    { NBD_CMD_FLAG_NO_HOLE, 0, 512, NBD_EINVAL },
    { NBD_CMD_FLAG_DF, 0, 512, NBD_EINVAL },
    { 0, 0, MAX + 1, NBD_EINVAL },
    { 0, 0, 50000000, NBD_EINVAL },
  };
  uint8_t *buf = malloc (50000000);
  int fd = client_open (&f, NULL);

  (void) state;
  memset (buf, 0xee, 50000000);
  for (size_t i = 0; i < sizeof rows / sizeof rows[0]; ++i) {
    send_request (fd, rows[i].flags, NBD_CMD_WRITE, i,
                  rows[i].offset, rows[i].length);
    send_bytes (fd, buf, rows[i].length);
    expect_error (fd, i, rows[i].error);
  }
  assert_int_equal (f.disk->calls[FAKE_WRITE], 0);
  check_read (fd, 0, 512);
  free (buf);
  close (fd);
}

static void
test_readonly (void **state)
{
  int fd = client_open (&f, NULL);
  uint8_t buf[512] = { 1 };

  (void) state;
  send_request (fd, 0, NBD_CMD_WRITE, 1, 0, 512);
  send_bytes (fd, buf, 512);
  expect_error (fd, 1, NBD_EPERM);
  send_request (fd, 0, NBD_CMD_TRIM, 2, 0, 512);
  expect_error (fd, 2, NBD_EPERM);
  send_request (fd, 0, NBD_CMD_WRITE_ZEROES, 3, 0, 512);
  expect_error (fd, 3, NBD_EPERM);
  send_request (fd, 0, NBD_CMD_FLUSH, 4, 0, 0);
  expect_error (fd, 4, 0);
  check_read (fd, 0, 512);
  assert_int_equal (f.disk->calls[FAKE_WRITE] + f.disk->calls[FAKE_TRIM] +
                    f.disk->calls[FAKE_ZERO], 0);
  close (fd);
}

/* Each connection is told what happened to the others' flushes, once, and
 * one that comes afterwards is not.
 */
static void
test_told_apart (void **state)
{
  int fd[3];

  (void) state;
  fd[0] = client_open (&f, base);
  fd[1] = client_open (&f, base);
  /* An answer: so the connection has begun. */
  for (unsigned i = 0; i < 2; ++i) {
    send_request (fd[i], 0, NBD_CMD_FLUSH, 1, 0, 0);
    expect_error (fd[i], 1, 0);
  }
  f.disk->lost = 1;
  f.disk->told = 1;
  fd[2] = client_open (&f, base);
  for (unsigned n = 0; n < 2; ++n)
    for (unsigned i = 0; i < 3; ++i) {
      send_request (fd[i], 0, NBD_CMD_FLUSH, 2, 0, 0);
      expect_error (fd[i], 2, n == 0 && i < 2 ? NBD_EIO : 0);
    }
  f.disk->lost = f.disk->told = 0;
  for (unsigned i = 0; i < 3; ++i)
    close (fd[i]);
}

static int
fail_with_opaque (struct disk *d, enum fake_op op,
                  uint64_t offset, uint64_t count)
{
  (void) op;
  (void) offset;
  (void) count;
  return *(int *) d->opaque;
}

static void
test_errors (void **state)
{
  static const struct { int err; uint32_t error; } rows[] = {
    { EPERM, NBD_EPERM }, { EROFS, NBD_EPERM }, { EIO, NBD_EIO },
    { ENOMEM, NBD_ENOMEM }, { ENOSPC, NBD_ENOSPC }, { EFBIG, NBD_ENOSPC },
    { EDQUOT, NBD_ENOSPC }, { EOVERFLOW, NBD_EOVERFLOW },
    { ENOTSUP, NBD_ENOTSUP }, { ESHUTDOWN, NBD_ESHUTDOWN },
    { EINVAL, NBD_EINVAL }, { EBADF, NBD_EINVAL }, { ENOENT, NBD_EINVAL },
  };
  static const uint16_t types[] = {
    NBD_CMD_READ, NBD_CMD_WRITE, NBD_CMD_TRIM, NBD_CMD_CACHE,
    NBD_CMD_WRITE_ZEROES, NBD_CMD_BLOCK_STATUS, NBD_CMD_FLUSH,
  };
  int fd = client_open (&f, base), simple = open_simple (), err;
  uint8_t buf[512] = { 0 };
  struct reply reply;

  (void) state;
  f.disk->opaque = &err;
  f.disk->hook = fail_with_opaque;
  for (size_t i = 0; i < sizeof rows / sizeof rows[0]; ++i) {
    err = rows[i].err;
    for (size_t t = 0; t < sizeof types / sizeof types[0]; ++t) {
      send_request (fd, 0, types[t], t, 0,
                    types[t] == NBD_CMD_FLUSH ? 0 : 512);
      if (types[t] == NBD_CMD_WRITE)
        send_bytes (fd, buf, 512);
      expect_error (fd, t, rows[i].error);
    }
    send_request (simple, 0, NBD_CMD_READ, 1, 0, 200000);
    recv_reply (simple, &reply, 200000);
    assert_int_equal (reply.error, rows[i].error);
  }
  f.disk->hook = NULL;
  check_read (fd, 0, 512);
  check_read (simple, 0, 512);
  close (fd);
  close (simple);
}

static void
test_disconnect (void **state)
{
  int fd = client_open (&f, NULL), other = client_open (&f, NULL);
  uint8_t junk[sizeof (struct nbd_extended_request)];

  (void) state;
  /* What was asked before DISC is answered. */
  for (int i = 0; i < 20; ++i)
    send_request (fd, 0, i % 2 ? NBD_CMD_READ : NBD_CMD_FLUSH, i, 0, 0);
  send_request (fd, 0, NBD_CMD_DISC, 99, 0, 0);
  for (int i = 0; i < 20; ++i) {
    struct reply reply;

    recv_reply (fd, &reply, 0);
    assert_int_equal (reply.error, 0);
    free (reply.data);
  }
  expect_end (fd);
  close (fd);

  /* Garbage ends one connection. */
  fd = client_open (&f, NULL);
  memset (junk, 'x', sizeof junk);
  send_bytes (fd, junk, sizeof junk);
  expect_end (fd);
  close (fd);
  check_read (other, 0, 512);
  close (other);
}

/* Thousands of requests in one stream, cut at random. */
static void
test_pipelined (void **state)
{
  enum { N = 5000, BLOCK = 64 };
  size_t size = N * (sizeof (struct nbd_request) + BLOCK), n = 0, sent;
  uint8_t *buf = malloc (size), *seen = calloc (N, 1);
  int fd = client_open (&f, NULL), received = 0;

  (void) state;
  srandom (4);
  for (int i = 0; i < N; ++i) {
    bool is_write = i % 3 == 0;

    put_request (buf + n, 0, is_write ? NBD_CMD_WRITE : NBD_CMD_READ,
                 i, (is_write ? N + i : i) * BLOCK, BLOCK);
    n += sizeof (struct nbd_request);
    if (is_write) {
      memset (buf + n, i, BLOCK);
      n += BLOCK;
    }
  }
  for (sent = 0; sent < n || received < N;) {
    size_t piece = min_u64 (n - sent, random () % 2 ? random () % 40
                                                    : random () % 9000);

    send_bytes (fd, buf + sent, piece);
    sent += piece;
    /* Do not get ahead by more than the socket holds. */
    while (received < N && (sent == n || (int) (sent / 92) > received + 500)) {
      struct reply reply;

      recv_reply (fd, &reply, 0);
      assert_true (reply.cookie < N && !seen[reply.cookie]);
      assert_int_equal (reply.error, 0);
      if (reply.cookie % 3 != 0) {
        assert_int_equal (reply.length, 8 + BLOCK);
        assert_memory_equal (reply.data + 8,
                             f.disk->data + reply.cookie * BLOCK, BLOCK);
      }
      seen[reply.cookie] = 1;
      received++;
      free (reply.data);
    }
  }
  for (int i = 0; i < N; i += 3)
    for (int j = 0; j < BLOCK; ++j)
      assert_int_equal (f.disk->data[(N + i) * BLOCK + j], i & 0xff);
  close (fd);
  free (buf);
  free (seen);
}

/* Large payloads with small requests between them: each is received in
 * another way.
 */
static void
test_mixed_sizes (void **state)
{
  enum { N = 60 };
  int fd = client_open (&f, NULL);
  uint8_t *stream = malloc (N * 310000), *model = malloc (8 << 20);
  size_t n = 0;

  (void) state;
  srandom (5);
  memcpy (model, f.disk->data, 8 << 20);
  for (int i = 0; i < N; ++i) {
    uint32_t length = random () % 3 ? random () % 300000 : random () % 600;
    uint64_t offset = i * 130000;

    length = min_u64 (length, 130000) + 1;
    put_request (stream + n, 0, NBD_CMD_WRITE, i, offset, length);
    n += sizeof (struct nbd_request);
    for (uint32_t j = 0; j < length; ++j)
      stream[n + j] = model[offset + j] = random ();
    n += length;
    if (random () % 2) {
      put_request (stream + n, 0, NBD_CMD_FLUSH, 1000 + i, 0, 0);
      n += sizeof (struct nbd_request);
    }
  }
  put_request (stream + n, 0, NBD_CMD_DISC, 0, 0, 0);
  send_bytes (fd, stream, n + sizeof (struct nbd_request));
  for (;;) {
    struct nbd_simple_reply reply;
    ssize_t r = read (fd, &reply, 1);

    if (r <= 0)
      break;
    recv_bytes (fd, (uint8_t *) &reply + 1, sizeof reply - 1);
    assert_int_equal (reply.error, 0);
  }
  /* Writes of the stream overlap by one byte at most, in any order. */
  for (size_t i = 0; i < N * 130000; ++i)
    if (i % 130000 != 0)
      assert_int_equal (f.disk->data[i], model[i]);
  close (fd);
  free (stream);
  free (model);
}

int
main (void)
{
  const struct CMUnitTest tests[] = {
    TEST (test_read),
    TEST (test_read_of_nothing),
    TEST (test_write),
    TEST (test_read_32m),
    TEST (test_other_commands),
    TEST (test_refused),
    TEST (test_flags_accepted),
    TEST (test_refused_simple),
    TEST (test_refused_write),
    cmocka_unit_test_setup_teardown (test_readonly, setup_readonly, teardown),
    TEST (test_told_apart),
    TEST (test_errors),
    TEST (test_disconnect),
    TEST (test_pipelined),
    TEST (test_mixed_sizes),
  };

  /* Those which say what is the same in every form. */
  const struct CMUnitTest extended[] = {
    TEST (test_read),
    TEST (test_read_of_nothing),
    TEST (test_write),
    TEST (test_read_32m),
    TEST (test_other_commands),
    cmocka_unit_test_setup_teardown (test_readonly, setup_readonly, teardown),
    TEST (test_told_apart),
    TEST (test_errors),
    TEST (test_disconnect),
  };

  int failed = cmocka_run_group_tests_name ("plain", tests, NULL, NULL);

  client_wants_extended = true;
  failed += cmocka_run_group_tests_name ("extended headers", extended,
                                         NULL, NULL);
  client_wants_extended = false;

  fixture_over_tls = true;
  return failed +
    cmocka_run_group_tests_name ("over TLS", tests, NULL, NULL);
}
