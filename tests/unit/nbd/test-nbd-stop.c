/* nbdkit-dirty-bitmap-filter
 * SPDX-License-Identifier: BSD-3-Clause
 * Copyright the nbdkit-dirty-bitmap-filter authors
 */

/* Stopping filter/nbd, whatever its clients do. */

#include <config.h>

#include <pthread.h>
#include <stdatomic.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <unistd.h>

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

static unsigned
stop_takes (unsigned grace_ms)
{
  unsigned start = milliseconds ();

  nbd_server_stop (f.server, grace_ms);
  return milliseconds () - start;
}

/* Connected only; greeted; in the middle of an option; ready and idle;
 * in the middle of a request; in the middle of a payload.
 */
static void
test_stop_with_silent_clients (void **state)
{
  uint8_t buf[100000] = { 1 };
  int fd[6];

  (void) state;
  fd[0] = fixture_connect (&f);
  fd[1] = fixture_connect (&f);
  client_greet (fd[1], NBD_FLAG_FIXED_NEWSTYLE);
  fd[2] = fixture_connect (&f);
  client_greet (fd[2], NBD_FLAG_FIXED_NEWSTYLE);
  send_bytes (fd[2], "IHAVEOPT\0\0\0\7\0\0\0\20", 16);
  fd[3] = client_open (&f, NULL);
  fd[4] = client_open (&f, NULL);
  send_bytes (fd[4], "\x25\x60\x95", 3);
  fd[5] = client_open (&f, NULL);
  send_request (fd[5], 0, NBD_CMD_WRITE, 1, 0, sizeof buf);
  send_bytes (fd[5], buf, sizeof buf - 1);
  sleep_ms (50);
  assert_true (stop_takes (10000) < 8000);
  recv_bytes (fd[0], buf, sizeof (struct nbd_new_handshake));
  for (int i = 0; i < 6; ++i) {
    expect_end (fd[i]);
    close (fd[i]);
  }
  assert_int_equal (f.disk->calls[FAKE_WRITE], 0);
}

static void
test_stop_with_greedy_clients (void **state)
{
  int fd[8];

  (void) state;
  for (int i = 0; i < 8; ++i)
    fd[i] = client_greedy (&f);
  sleep_ms (50);
  assert_in_range (stop_takes (300), 250, 10000);
  for (int i = 0; i < 8; ++i)
    close (fd[i]);
}

static unsigned
calls (enum fake_op op)
{
  pthread_mutex_lock (&f.disk->lock);
  const unsigned n = f.disk->calls[op];
  pthread_mutex_unlock (&f.disk->lock);

  return n;
}

/* Wait until the disk has nothing to do. */
static void
wait_for_quiet (void)
{
  unsigned n = calls (FAKE_READ), before;

  do {
    before = n;
    sleep_ms (200);
    n = calls (FAKE_READ);
  } while (n != before);
}

/* READs of as much as there may be, in parts and whole, of which clients
 * do not take a byte.  When they are cut nothing of these is read.
 */
static void
test_stop_reads_nothing_more (void **state)
{
  static const char *const contexts[] = { "base:allocation", NULL };
  unsigned before, after;
  int fd[12];

  (void) state;
  for (int i = 0; i < 12; ++i) {
    fd[i] = client_open (&f, i % 3 == 0 ? NULL : contexts);
    for (int j = 0; j < 40; ++j)
      send_request (fd[i], i % 3 == 1 && j % 2 ? NBD_CMD_FLAG_DF : 0,
                    NBD_CMD_READ, j, 0, j % 5 == 4 ? 1 << 20 : 32 << 20);
  }
  wait_for_quiet ();
  before = calls (FAKE_READ);
  assert_true (before > 12);
  assert_false (f.disk->hurried);
  assert_true (stop_takes (50) < 10000);
  after = calls (FAKE_READ);
  for (int i = 0; i < 12; ++i)
    close (fd[i]);
  /* There are tens of thousands left. */
  assert_in_range (after, before, before + 50);
  assert_true (f.disk->hurried);
  assert_int_equal (f.disk->hurry_ms, 50);
}

/* Of changes that have come whole, too, none is begun. */
static void
test_stop_begins_nothing_more (void **state)
{
  enum { N = 100 };
  uint8_t buf[N * (sizeof (struct nbd_request) + 16)] = { 0 };
  unsigned ms = 40;
  int fd = client_open (&f, NULL);
  size_t n = 0;

  (void) state;
  f.disk->opaque = &ms;
  f.disk->hook = hook_sleep;
  for (int i = 0; i < N; ++i) {
    put_request (buf + n, 0, NBD_CMD_WRITE, i, 16 * i, 16);
    n += sizeof (struct nbd_request) + 16;
  }
  send_bytes (fd, buf, n);
  sleep_ms (10);
  assert_true (stop_takes (100) < 3000);
  assert_true (calls (FAKE_WRITE) < N);
  close (fd);
}

/* It is begun by one call, goes on by itself, and can be waited for. */
static void
test_stop_step_by_step (void **state)
{
  int busy = client_open (&f, NULL), idle = client_open (&f, NULL);
  int greedy = client_greedy (&f);

  (void) state;
  assert_false (nbd_server_wait (f.server, 0));
  gate_close (f.disk, FAKE_ZERO, 0);
  send_request (busy, 0, NBD_CMD_WRITE_ZEROES, 1, 0, 512);
  gate_wait ();
  nbd_server_begin_stop (f.server, 300);
  expect_end (idle);
  expect_end (busy);            /* the grace time is over */
  assert_false (nbd_server_wait (f.server, 50));
  gate_open ();
  assert_true (nbd_server_wait (f.server, 20000));
  assert_int_equal (f.disk->under_way, 0);
  assert_true (stop_takes (10000) < 5000);
  nbd_server_begin_stop (f.server, 10000);
  assert_true (nbd_server_wait (f.server, 0));
  close (busy);
  close (idle);
  close (greedy);
}

/* Requests that were received are answered, then the end. */
static void
test_stop_answers (void **state)
{
  enum { N = 40 };
  uint8_t buf[N * (sizeof (struct nbd_request) + 16)];
  unsigned ms = 20;
  int fd = client_open (&f, NULL);
  size_t n = 0;

  (void) state;
  f.disk->opaque = &ms;
  f.disk->hook = hook_sleep;
  for (int i = 0; i < N; ++i) {
    put_request (buf + n, i % 4 == 0 ? NBD_CMD_FLAG_FUA : 0,
                 NBD_CMD_WRITE, i, 16 * i, 16);
    n += sizeof (struct nbd_request);
    memset (buf + n, 'a' + i % 26, 16);
    n += 16;
  }
  send_bytes (fd, buf, n);
  sleep_ms (10);
  assert_true (stop_takes (10000) < 9000);
  assert_int_equal (f.disk->calls[FAKE_WRITE], N);
  for (int i = 0; i < N; ++i) {
    struct reply reply;

    recv_reply (fd, &reply, 0);
    assert_int_equal (reply.error, 0);
    assert_int_equal (f.disk->data[16 * reply.cookie],
                      'a' + reply.cookie % 26);
  }
  expect_end (fd);
  close (fd);
}

static atomic_bool gate_was_opened;

static void *
open_gate_late (void *vp)
{
  (void) vp;
  sleep_ms (400);
  atomic_store (&gate_was_opened, true);
  gate_open ();
  return NULL;
}

/* The disk is not abandoned, however long it takes. */
static void
test_stop_waits_for_the_disk (void **state)
{
  int fd = client_open (&f, NULL), idle = client_open (&f, NULL);
  pthread_t thread;

  (void) state;
  gate_close (f.disk, FAKE_WRITE, 0);
  send_request (fd, 0, NBD_CMD_WRITE, 1, 0, 512);
  send_bytes (fd, f.disk->data, 512);
  gate_wait ();
  pthread_create (&thread, NULL, open_gate_late, NULL);
  nbd_server_stop (f.server, 50);
  assert_true (atomic_load (&gate_was_opened));
  assert_int_equal (f.disk->under_way, 0);
  pthread_join (thread, NULL);
  expect_end (idle);
  close (idle);
  close (fd);
}

/* Requests come without end while we stop. */
static void *
flood (void *vp)
{
  int fd = *(int *) vp;
  uint8_t buf[64 * sizeof (struct nbd_request)];

  for (int i = 0; i < 64; ++i)
    put_request (buf + i * sizeof (struct nbd_request), 0,
                 NBD_CMD_CACHE, i, 0, 512);
  while (send (fd, buf, sizeof buf, MSG_NOSIGNAL) > 0)
    ;
  return NULL;
}

static void *
devour (void *vp)
{
  int fd = *(int *) vp;
  uint8_t buf[65536];

  while (recv (fd, buf, sizeof buf, 0) > 0)
    ;
  return NULL;
}

static void
test_stop_in_a_flood (void **state)
{
  int fd[4];
  pthread_t in[4], out[4];

  (void) state;
  for (int i = 0; i < 4; ++i) {
    fd[i] = client_open (&f, NULL);
    pthread_create (&out[i], NULL, flood, &fd[i]);
    pthread_create (&in[i], NULL, devour, &fd[i]);
  }
  sleep_ms (100);
  assert_true (stop_takes (10000) < 8000);
  for (int i = 0; i < 4; ++i) {
    pthread_join (out[i], NULL);
    pthread_join (in[i], NULL);
    close (fd[i]);
  }
}

static void
test_never_started (void **state)
{
  const struct nbd_options options = { .export.description = "" };
  struct nbd_server *server = nbd_server_new (f.disk, &options);

  (void) state;
  assert_non_null (server);
  assert_int_equal (nbd_server_add_socket (server, -1), -1);
  assert_int_equal (nbd_server_add_socket
                    (server, socket (AF_UNIX, SOCK_STREAM, 0)), 0);
  nbd_server_stop (server, 1000);
  nbd_server_free (server);
  nbd_server_free (NULL);
}

int
main (void)
{
  const struct CMUnitTest tests[] = {
    TEST (test_stop_with_silent_clients),
    TEST (test_stop_with_greedy_clients),
    TEST (test_stop_reads_nothing_more),
    TEST (test_stop_begins_nothing_more),
    TEST (test_stop_step_by_step),
    TEST (test_stop_answers),
    TEST (test_stop_waits_for_the_disk),
    TEST (test_stop_in_a_flood),
    TEST (test_never_started),
  };

  int failed = cmocka_run_group_tests_name ("plain", tests, NULL, NULL);

  fixture_over_tls = true;
  return failed +
    cmocka_run_group_tests_name ("over TLS", tests, NULL, NULL);
}
