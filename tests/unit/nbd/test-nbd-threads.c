/* nbdkit-dirty-bitmap-filter
 * SPDX-License-Identifier: BSD-3-Clause
 * Copyright the nbdkit-dirty-bitmap-filter authors
 */

/* The threads of filter/nbd: parallel requests, slow disks, and clients
 * that are slow to read.
 */

#include <config.h>

#include <pthread.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>
#include <unistd.h>

#include "common/bytes.h"
#include "common/cleanup.h"
#include "image.h"
#include "nbd-fixture.h"

#define SIZE (UINT64_C (128) * 1024 * 1024)

static int
setup (void **state)
{
  (void) state;
  fixture_init (&f, SIZE);
  fixture_start (&f, false);
  return 0;
}

/* One slow request among fast ones, all in one packet: those before it
 * and those behind it are answered while it hangs.
 */
static void
check_slow_one_is_passed (uint16_t type, uint64_t offset, uint32_t length)
{
  enum { N = 20, SLOW = 7 };
  uint8_t buf[N * sizeof (struct nbd_request)];
  int fd = client_open (&f, NULL);
  struct reply reply;
  unsigned seen = 0;

  for (int i = 0; i < N; ++i)
    put_request (buf + i * sizeof (struct nbd_request), 0,
                 i == SLOW ? type : NBD_CMD_READ, i,
                 i == SLOW ? offset : 8192, i == SLOW ? length : 512);
  send_bytes (fd, buf, sizeof buf);
  for (int i = 0; i < N - 1; ++i) {
    recv_whole_reply (fd, &reply, 0);
    assert_int_equal (reply.error, 0);
    assert_int_not_equal (reply.cookie, SLOW);
    assert_true (reply.cookie < N && (seen & 1u << reply.cookie) == 0);
    seen |= 1u << reply.cookie;
    free (reply.data);
  }
  gate_open ();
  recv_whole_reply (fd, &reply, 0);
  assert_int_equal (reply.cookie, SLOW);
  assert_int_equal (reply.error, 0);
  free (reply.data);
  client_check_alive (&f, fd);
  close (fd);
}

static void
test_slow_read_is_passed (void **state)
{
  (void) state;
  for (int i = 0; i < 10; ++i) {
    gate_close (f.disk, FAKE_READ, 0);
    check_slow_one_is_passed (NBD_CMD_READ, 0, 512);
  }
  gate_close (f.disk, FAKE_READ, 0);
  check_slow_one_is_passed (NBD_CMD_READ, 0, 1 << 20);
}

static void
test_slow_flush_is_passed (void **state)
{
  (void) state;
  gate_close (f.disk, FAKE_FLUSH, 0);
  check_slow_one_is_passed (NBD_CMD_FLUSH, 0, 0);
  gate_close (f.disk, FAKE_ZERO, 0);
  check_slow_one_is_passed (NBD_CMD_WRITE_ZEROES, 0, 1 << 24);
}

/* A request that comes when one is hanging already. */
static void
test_hanging_alone (void **state)
{
  int fd = client_open (&f, NULL);

  (void) state;
  gate_close (f.disk, FAKE_FLUSH, 0);
  send_request (fd, 0, NBD_CMD_FLUSH, 1, 0, 0);
  gate_wait ();
  client_check_alive (&f, fd);
  gate_open ();
  expect_error (fd, 1, 0);
  close (fd);
}

/* On a slow disk the requests of one connection run in parallel, 16 at
 * a time.
 */
static void
test_parallel (void **state)
{
  enum { N = 160 };
  unsigned ms = 50, start, took;
  int fd = client_open (&f, NULL);
  struct reply reply;

  (void) state;
  f.disk->opaque = &ms;
  f.disk->hook = hook_sleep;
  start = milliseconds ();
  for (int i = 0; i < N; ++i)
    send_request (fd, 0, NBD_CMD_READ, i, 512 * i, 512);
  for (int i = 0; i < N; ++i) {
    recv_whole_reply (fd, &reply, 0);
    assert_int_equal (reply.error, 0);
    free (reply.data);
  }
  took = milliseconds () - start;
  assert_in_range (f.disk->most_under_way, 12, 16);
  /* One after the other would be 8000. */
  assert_true (took < 6000);
  f.disk->hook = NULL;
  close (fd);
}

/* Sleeps too short for a tick are noticed as well. */
static int
sleep_200us (struct disk *d, enum fake_op op, uint64_t offset, uint64_t count)
{
  const struct timespec ts = { .tv_nsec = 200000 };

  (void) d;
  (void) op;
  (void) offset;
  (void) count;
  nanosleep (&ts, NULL);
  return 0;
}

/* CACHE requests, 64 (or all) under way. */
static void
cache_many (int fd, int nr)
{
  struct reply reply;

  for (int i = 0; i < nr + 64; ++i) {
    if (i < nr)
      send_request (fd, 0, NBD_CMD_CACHE, i, 0, 512);
    if (i >= 64) {
      recv_whole_reply (fd, &reply, 0);
      assert_int_equal (reply.error, 0);
    }
  }
}

static void
test_parallel_short_sleeps (void **state)
{
  int fd = client_open (&f, NULL);

  (void) state;
  f.disk->hook = sleep_200us;
  cache_many (fd, 24);
  assert_in_range (f.disk->most_under_way, 2, 16);
  cache_many (fd, 2000);
  assert_in_range (f.disk->most_under_way, 8, 16);
  f.disk->hook = NULL;

  /* And a disk that is quick again is served by one thread, if not at
   * once because this machine is busy, then soon.
   */
  for (int i = 0;; ++i) {
    f.disk->most_under_way = 0;
    cache_many (fd, 2000);
    if (f.disk->most_under_way == 1)
      break;
    assert_true (i < 50);
  }
  close (fd);
}

/* A client that works on its own part of the disk at random, several
 * requests ahead, and knows what it must read.
 */
struct worker {
  uint64_t offset;
  unsigned seed;
};

#define PART (UINT64_C (8) * 1024 * 1024)
#define DEPTH 8

static void
one_round (int fd, unsigned *seed, uint64_t part, uint8_t *model)
{
  uint64_t offset[DEPTH];
  uint32_t length[DEPTH];
  bool is_write[DEPTH];
  unsigned seen = 0;
  struct reply reply;

  for (unsigned i = 0; i < DEPTH; ++i) {
    /* Each in its own slice, so that order does not matter. */
    offset[i] = i * (PART / DEPTH) + rand_r (seed) % 1000;
    length[i] = 1 + rand_r (seed) % (rand_r (seed) % 10 ? 9000 : 300000);
    is_write[i] = rand_r (seed) % 2;
    send_request (fd, 0, is_write[i] ? NBD_CMD_WRITE : NBD_CMD_READ, i,
                  part + offset[i], length[i]);
    if (is_write[i]) {
      for (uint32_t j = 0; j < length[i]; ++j)
        model[offset[i] + j] = rand_r (seed);
      send_bytes (fd, model + offset[i], length[i]);
    }
  }
  for (unsigned i = 0; i < DEPTH; ++i) {
    uint64_t c;

    recv_whole_reply (fd, &reply, 0);
    c = reply.cookie;
    assert_true (c < DEPTH && (seen & 1u << c) == 0);
    assert_int_equal (reply.error, 0);
    seen |= 1u << c;
    if (!is_write[c]) {
      assert_int_equal (reply.length, 8 + length[c]);
      assert_memory_equal (reply.data + 8, model + offset[c], length[c]);
    }
    free (reply.data);
  }
}

static void *
client_main (void *vp)
{
  struct worker *w = vp;
  uint8_t *model = calloc (1, PART);
  int fd = client_open (&f, NULL);

  for (unsigned i = how_often (60, 60, 10); i > 0; --i)
    one_round (fd, &w->seed, w->offset, model);
  close (fd);
  free (model);
  return NULL;
}

/* Some operations of this disk are slow, at random. */
static int
sometimes_slow (struct disk *d, enum fake_op op,
                uint64_t offset, uint64_t count)
{
  (void) d;
  (void) op;
  (void) count;
  if (offset % 17 == 0)
    sleep_ms (offset % 5);
  return 0;
}

static void
test_many_clients (void **state)
{
  pthread_t threads[6];
  struct worker workers[6];

  (void) state;
  f.disk->hook = sometimes_slow;
  for (unsigned i = 0; i < 6; ++i) {
    workers[i] = (struct worker) { .offset = i * PART, .seed = i };
    assert_int_equal (pthread_create (&threads[i], NULL, client_main,
                                      &workers[i]), 0);
  }
  for (unsigned i = 0; i < 6; ++i)
    pthread_join (threads[i], NULL);
  f.disk->hook = NULL;
}

static void
test_two_connections_share (void **state)
{
  int a = client_open (&f, NULL), b = client_open (&f, NULL);
  uint8_t buf[4096];

  (void) state;
  memset (buf, 0xab, sizeof buf);
  for (int i = 0; i < 100; ++i) {
    buf[0] = i;
    send_request (a, 0, NBD_CMD_WRITE, i, 4096, sizeof buf);
    send_bytes (a, buf, sizeof buf);
    expect_error (a, i, 0);
    client_check_alive (&f, b);
  }
  close (a);
  close (b);
}

/* Replies gathered, the role stolen, and a client slow to read, all at
 * once: each reply comes once, and right.
 */
enum { ONCE_N = 4000, ONCE_LENGTH = 6000 };

static int
slow_at_odd_offsets (struct disk *d, enum fake_op op,
                     uint64_t offset, uint64_t count)
{
  (void) d;
  (void) op;
  (void) count;
  if (offset % 2 != 0)
    sleep_ms (3);
  return 0;
}

static uint64_t
once_offset (unsigned i)
{
  return i * 1024 + (i % 37 == 0);
}

static void *
send_once (void *vp)
{
  for (unsigned i = 0; i < ONCE_N; ++i)
    send_request (*(int *) vp, 0, NBD_CMD_READ, i, once_offset (i),
                  ONCE_LENGTH);
  return NULL;
}

static void
test_replies_once (void **state)
{
  uint8_t *seen = calloc (ONCE_N, 1);
  int fd = client_open (&f, NULL);
  pthread_t thread;
  struct reply reply;

  (void) state;
  for (uint32_t i = 0; i < ONCE_N * 1024 + ONCE_LENGTH; ++i)
    f.disk->data[i] = i % 251;
  f.disk->hook = slow_at_odd_offsets;
  assert_int_equal (pthread_create (&thread, NULL, send_once, &fd), 0);
  for (unsigned i = 0; i < ONCE_N; ++i) {
    if (i % 200 == 0)
      sleep_ms (15);
    recv_whole_reply (fd, &reply, 0);
    assert_true (reply.cookie < ONCE_N && !seen[reply.cookie]);
    seen[reply.cookie] = 1;
    assert_int_equal (reply.length, 8 + ONCE_LENGTH);
    assert_memory_equal (reply.data + 8,
                         f.disk->data + once_offset (reply.cookie),
                         ONCE_LENGTH);
    free (reply.data);
  }
  pthread_join (thread, NULL);
  close (fd);
  free (seen);
}

/* A client that sends many requests before it takes a reply, though
 * neither fits into the sockets.
 */
static void
test_client_that_sends_first (void **state)
{
  enum { N = 12, LENGTH = 1 << 20 };
  uint8_t *buf = calloc (1, LENGTH);
  int fd = client_open (&f, NULL);
  struct reply reply;

  (void) state;
  for (int round = 0; round < 3; ++round) {
    for (int i = 0; i < N; ++i) {
      bool is_write = i % 2;

      send_request (fd, 0, is_write ? NBD_CMD_WRITE : NBD_CMD_READ, i,
                    (uint64_t) i * LENGTH, LENGTH);
      if (is_write)
        send_bytes (fd, buf, LENGTH);
    }
    for (int i = 0; i < N; ++i) {
      recv_whole_reply (fd, &reply, 0);
      assert_int_equal (reply.error, 0);
      free (reply.data);
    }
  }
  close (fd);
  free (buf);
}

static void
test_greedy_client_delays_nobody (void **state)
{
  int greedy = client_greedy (&f), fd = client_open (&f, NULL);
  unsigned start = milliseconds ();
  struct reply reply;

  (void) state;
  for (int i = 0; i < 100; ++i)
    client_check_alive (&f, fd);
  assert_true (milliseconds () - start < 10000);
  /* It is answered in the end. */
  for (int i = 0; i < 200; ++i) {
    recv_whole_reply (greedy, &reply, 0);
    assert_int_equal (reply.error, 0);
    free (reply.data);
  }
  close (fd);
  close (greedy);
}

int
main (void)
{
  const struct CMUnitTest tests[] = {
    TEST (test_slow_read_is_passed),
    TEST (test_slow_flush_is_passed),
    TEST (test_hanging_alone),
    TEST (test_parallel),
    TEST (test_parallel_short_sleeps),
    TEST (test_many_clients),
    TEST (test_two_connections_share),
    TEST (test_replies_once),
    TEST (test_client_that_sends_first),
    TEST (test_greedy_client_delays_nobody),
  };

  int failed = cmocka_run_group_tests_name ("plain", tests, NULL, NULL);

  fixture_over_tls = true;
  return failed +
    cmocka_run_group_tests_name ("over TLS", tests, NULL, NULL);
}
