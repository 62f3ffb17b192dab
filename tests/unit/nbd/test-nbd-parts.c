/* nbdkit-dirty-bitmap-filter
 * SPDX-License-Identifier: BSD-3-Clause
 * Copyright the nbdkit-dirty-bitmap-filter authors
 */

/* Large data: where the answer to a READ is cut, what a failure in the middle
 * leaves, and that the stream stays in step; and that a WRITE is not cut.
 */

#include <config.h>

#include <errno.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <unistd.h>

#include "common/bytes.h"
#include "common/cleanup.h"
#include "nbd/parts.h"
#include "nbd-fixture.h"

#define SIZE (UINT64_C (64) * 1024 * 1024)
#define PART (128 * 1024)
#define MAX (32 * 1024 * 1024)

static uint8_t data[MAX], buf[MAX];

/* What the disk was asked for. */
static struct {
  enum fake_op op;
  uint64_t offset, count;
} asked[4096];
static size_t nr_asked;

/* Requests that touch this byte fail. */
static uint64_t bad_byte;

static int
record (struct disk *d, enum fake_op op, uint64_t offset, uint64_t count)
{
  ACQUIRE_LOCK_FOR_CURRENT_SCOPE (&d->lock);
  assert_true (nr_asked < sizeof asked / sizeof asked[0]);
  asked[nr_asked].op = op;
  asked[nr_asked].offset = offset;
  asked[nr_asked++].count = count;
  return bad_byte >= offset && bad_byte - offset < count ? ENOSPC : 0;
}

static int
setup (void **state)
{
  (void) state;
  parts_above = PART;
  for (size_t i = 0; i < MAX; ++i)
    data[i] = i * 7 + i / 251 + i / 65536;
  fixture_init (&f, SIZE);
  fixture_start (&f, false);
  nr_asked = 0;
  bad_byte = UINT64_MAX;
  f.disk->hook = record;
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

/* What was asked covers [offset, offset + length), in order, and each
 * but the last ends at a multiple of part.
 */
static void
check_asked (enum fake_op op, uint64_t offset, uint64_t length, uint64_t part)
{
  const uint64_t end = offset + length;

  for (size_t i = 0; i < nr_asked; ++i) {
    assert_int_equal (asked[i].op, op);
    assert_true (asked[i].offset == offset);
    assert_true (asked[i].count > 0 && asked[i].count <= part);
    offset += asked[i].count;
    if (i + 1 < nr_asked)
      assert_true (offset % part == 0);
  }
  assert_true (offset == end);
}

static const struct { uint64_t offset; uint32_t length; } ranges[] = {
  { 0, PART }, { 0, PART + 1 }, { 0, 2 * PART }, { 1, 2 * PART },
  { PART - 1, PART + 1 }, { PART - 1, PART + 2 }, { PART / 2, PART + 1 },
  { 12345, 1000000 }, { 0, 1 << 20 }, { 4096, (1 << 20) + 1 },
  { 777, 5 << 20 }, { SIZE - MAX, MAX }, { SIZE - MAX + 5, MAX - 5 },
};
#define NR_RANGES (sizeof ranges / sizeof ranges[0])

static void
test_read (void **state)
{
  int fd = client_open (&f, NULL), simple = open_simple ();

  (void) state;
  memcpy (f.disk->data, data, MAX);
  memcpy (f.disk->data + MAX, data, MAX);
  for (size_t i = 0; i < NR_RANGES; ++i) {
    const uint64_t offset = ranges[i].offset;
    const uint32_t length = ranges[i].length;
    struct read_reply reply;

    nr_asked = 0;
    send_request (fd, 0, NBD_CMD_READ, 7, offset, length);
    reply = recv_read (fd, 7, offset, length, buf);
    assert_int_equal (reply.error, 0);
    assert_memory_equal (buf, f.disk->data + offset, length);
    if (length > PART)
      check_asked (FAKE_READ, offset, length, PART);
    assert_int_equal (reply.nr_chunks, nr_asked);
    assert_true (length <= PART || nr_asked > 1);

    /* In one where the client wants that, or cannot have it else. */
    nr_asked = 0;
    send_request (fd, NBD_CMD_FLAG_DF, NBD_CMD_READ, 8, offset, length);
    reply = recv_read (fd, 8, offset, length, buf);
    assert_int_equal (reply.nr_chunks, 1);
    assert_memory_equal (buf, f.disk->data + offset, length);
    send_request (simple, 0, NBD_CMD_READ, 9, offset, length);
    reply = recv_read (simple, 9, offset, length, buf);
    assert_memory_equal (buf, f.disk->data + offset, length);
    assert_int_equal (nr_asked, 2);
  }
  close (fd);
  close (simple);
}

/* Part number bad of the reply cannot be read. */
static void
check_failed_read (int fd, uint64_t offset, uint32_t length, uint64_t bad)
{
  const uint64_t start = round_down (bad, PART);
  struct read_reply reply;

  bad_byte = bad;
  send_request (fd, 0, NBD_CMD_READ, 7, offset, length);
  reply = recv_read (fd, 7, offset, length, buf);
  assert_int_equal (reply.error, NBD_ENOSPC);
  assert_true (reply.error_offset == (start < offset ? offset : start));
  assert_true (offset + reply.got == reply.error_offset);
  assert_memory_equal (buf, f.disk->data + offset, reply.got);
  bad_byte = UINT64_MAX;
  client_check_alive (&f, fd);
}

static void
test_failed_read (void **state)
{
  int fd = client_open (&f, NULL), simple = open_simple ();
  struct read_reply reply;

  (void) state;
  memcpy (f.disk->data, data, MAX);
  for (uint64_t bad = 1000; bad < 1000 + (2 << 20); bad += 100000)
    check_failed_read (fd, 1000, 2 << 20, bad);
  check_failed_read (fd, 1000, 2 << 20, 1000 + (2 << 20) - 1);
  check_failed_read (fd, 0, PART + 1, PART);

  /* Where all or nothing is sent, nothing is. */
  bad_byte = 2 << 20;
  send_request (fd, NBD_CMD_FLAG_DF, NBD_CMD_READ, 8, 0, 3 << 20);
  reply = recv_read (fd, 8, 0, 3 << 20, buf);
  assert_int_equal (reply.error, NBD_ENOSPC);
  assert_int_equal (reply.got, 0);
  assert_true (reply.error_offset == UINT64_MAX);
  send_request (simple, 0, NBD_CMD_READ, 8, 0, 3 << 20);
  reply = recv_read (simple, 8, 0, 3 << 20, buf);
  assert_int_equal (reply.error, NBD_ENOSPC);
  assert_int_equal (reply.got, 0);

  /* One that is not cut says no offset. */
  send_request (fd, 0, NBD_CMD_READ, 9, (2 << 20) - 5, 10);
  reply = recv_read (fd, 9, (2 << 20) - 5, 10, buf);
  assert_int_equal (reply.error, NBD_ENOSPC);
  assert_true (reply.error_offset == UINT64_MAX);
  close (fd);
  close (simple);
}

static void
check_write (int fd, uint16_t flags, uint64_t offset, uint32_t length)
{
  nr_asked = 0;
  send_request (fd, flags, NBD_CMD_WRITE, 3, offset, length);
  send_bytes (fd, data, length);
  expect_error (fd, 3, 0);
  assert_memory_equal (f.disk->data + offset, data, length);
}

/* Whole, whatever their length. */
static void
test_write (void **state)
{
  int fd = client_open (&f, NULL), simple = open_simple ();

  (void) state;
  for (size_t i = 0; i < NR_RANGES; ++i) {
    const uint64_t offset = ranges[i].offset;
    const uint32_t length = ranges[i].length;

    for (unsigned fua = 0; fua <= 1; ++fua) {
      check_write (i % 2 ? fd : simple, fua ? NBD_CMD_FLAG_FUA : 0, offset,
                   length);
      assert_int_equal (f.disk->last_fua, fua);
      assert_int_equal (nr_asked, 1);
      memset (f.disk->data + offset, 0, length);
    }
  }
  close (fd);
  close (simple);
}

static void
test_failed_write (void **state)
{
  int fd = client_open (&f, NULL);

  (void) state;
  for (uint64_t bad = 1000; bad < 1000 + (2 << 20); bad += 300000) {
    bad_byte = bad;
    nr_asked = 0;
    send_request (fd, 0, NBD_CMD_WRITE, 7, 1000, 2 << 20);
    send_bytes (fd, data, 2 << 20);
    expect_error (fd, 7, NBD_ENOSPC);
    assert_int_equal (nr_asked, 1);
    bad_byte = UINT64_MAX;
    client_check_alive (&f, fd);
  }
  close (fd);
}

/* A client that vanishes in the middle leaves nothing. */
static void
test_vanishing_client (void **state)
{
  (void) state;
  for (unsigned n = 0; n < 4; ++n) {
    int fd = client_open (&f, NULL), other = client_open (&f, NULL);

    memset (f.disk->data, 0, 1 << 20);
    send_request (fd, 0, NBD_CMD_WRITE, 7, 0, 1 << 20);
    send_bytes (fd, data, n * PART + 5000);
    client_check_alive (&f, other);
    nr_asked = 0;
    close (fd);
    sleep_ms (20);
    assert_int_equal (nr_asked, 0);
    for (size_t i = 0; i < 1 << 20; ++i)
      assert_int_equal (f.disk->data[i], 0);
    client_check_alive (&f, other);
    close (other);
  }
}

/* Stopping does not wait for the rest of a payload. */
static void
test_stop (void **state)
{
  int fd = client_open (&f, NULL);
  unsigned start;

  (void) state;
  send_request (fd, 0, NBD_CMD_WRITE, 7, 0, 1 << 20);
  send_bytes (fd, data, PART + 5000);
  sleep_ms (20);
  start = milliseconds ();
  nbd_server_stop (f.server, 10000);
  assert_true (milliseconds () - start < 5000);
  assert_int_equal (nr_asked, 0);
  close (fd);
}

/* While a part of a READ takes long, others are answered: for one in few
 * parts and for one in many, whether they were there before or came later.
 */
static void
test_slow_read_is_passed (void **state)
{
  static const uint32_t lengths[] = { 2 * PART, 1 << 20, 4 << 20 };

  (void) state;
  for (size_t i = 0; i < 2 * sizeof lengths / sizeof lengths[0]; ++i) {
    const uint32_t length = lengths[i / 2];
    int fd = client_open (&f, NULL);
    struct reply reply;

    /* The part before it fits into the socket. */
    gate_close (f.disk, FAKE_READ, PART);
    send_request (fd, 0, NBD_CMD_READ, 7, 0, length);
    if (i % 2)
      gate_wait ();
    send_request (fd, 0, NBD_CMD_READ, 8, 512, 512);
    for (unsigned data_of_7 = 0;;) {
      recv_reply (fd, &reply, 0);
      free (reply.data);
      if (reply.cookie == 8)
        break;
      assert_true (++data_of_7 <= 1);
    }
    assert_int_equal (reply.error, 0);
    gate_open ();
    do {
      recv_reply (fd, &reply, 0);
      assert_int_equal (reply.cookie, 7);
      assert_int_equal (reply.error, 0);
      free (reply.data);
    } while ((reply.flags & NBD_REPLY_FLAG_DONE) == 0);
    client_check_alive (&f, fd);
    close (fd);
  }
}

static int
record_and_sleep (struct disk *d, enum fake_op op,
                  uint64_t offset, uint64_t count)
{
  sleep_ms (1);
  return record (d, op, offset, count);
}

/* A disk that sleeps is given large writes as they are, several at once. */
static void
test_sleeping_disk (void **state)
{
  enum { N = 8, LENGTH = 4 << 20 };
  int fd = client_open (&f, NULL);
  unsigned seen = 0;

  (void) state;
  /* One that did not sleep, after which others are seldom measured. */
  client_check_alive (&f, fd);
  f.disk->hook = record_and_sleep;
  check_write (fd, 0, 4096, LENGTH);

  memset (f.disk->data, 0, N * LENGTH);
  nr_asked = 0;
  for (unsigned i = 0; i < N; ++i) {
    send_request (fd, 0, NBD_CMD_WRITE, i, i * LENGTH, LENGTH);
    send_bytes (fd, data + i, LENGTH);
  }
  for (unsigned i = 0; i < N; ++i) {
    struct reply reply;

    recv_reply (fd, &reply, 0);
    assert_int_equal (reply.error, 0);
    assert_true (reply.cookie < N && (seen & 1u << reply.cookie) == 0);
    seen |= 1u << reply.cookie;
    free (reply.data);
  }
  assert_int_equal (nr_asked, N);
  for (unsigned i = 0; i < N; ++i)
    assert_memory_equal (f.disk->data + i * LENGTH, data + i, LENGTH);
  close (fd);
}

int
main (void)
{
  const struct CMUnitTest tests[] = {
    TEST (test_read),
    TEST (test_failed_read),
    TEST (test_write),
    TEST (test_failed_write),
    TEST (test_vanishing_client),
    TEST (test_stop),
    TEST (test_slow_read_is_passed),
    TEST (test_sleeping_disk),
  };

  int failed = cmocka_run_group_tests_name ("plain", tests, NULL, NULL);

  client_wants_extended = true;
  failed += cmocka_run_group_tests_name ("extended headers", tests,
                                         NULL, NULL);
  client_wants_extended = false;

  fixture_over_tls = true;
  return failed +
    cmocka_run_group_tests_name ("over TLS", tests, NULL, NULL);
}
