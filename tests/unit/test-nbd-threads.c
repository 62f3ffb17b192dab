/* nbdkit-dirty-bitmap-filter
 * SPDX-License-Identifier: BSD-3-Clause
 * Copyright the nbdkit-dirty-bitmap-filter authors
 */

/* The threads of filter/nbd: parallel requests, slow disks, clients that
 * are silent, greedy or vanish, and stopping with all of them.
 */

#include <config.h>

#include <arpa/inet.h>
#include <errno.h>
#include <netinet/in.h>
#include <pthread.h>
#include <stdlib.h>
#include <string.h>
#include <sys/resource.h>
#include <sys/socket.h>
#include <time.h>
#include <unistd.h>

#include "common/bytes.h"
#include "common/cleanup.h"
#include "test-nbd-client.h"

#define SIZE (UINT64_C (128) * 1024 * 1024)

static struct fixture f;

/* A gate that operations at offset gate_offset wait at. */
static pthread_mutex_t gate_lock = PTHREAD_MUTEX_INITIALIZER;
static pthread_cond_t gate_changed = PTHREAD_COND_INITIALIZER;
static bool gate_open;
static unsigned gate_waiting;
static uint64_t gate_offset;
static enum fake_op gate_op;

static int
wait_at_gate (struct disk *d, enum fake_op op,
              uint64_t offset, uint64_t count)
{
  (void) d;
  (void) count;
  if (op != gate_op || offset != gate_offset)
    return 0;
  ACQUIRE_LOCK_FOR_CURRENT_SCOPE (&gate_lock);
  gate_waiting++;
  pthread_cond_broadcast (&gate_changed);
  while (!gate_open)
    pthread_cond_wait (&gate_changed, &gate_lock);
  return 0;
}

static void
close_gate (enum fake_op op, uint64_t offset)
{
  gate_op = op;
  gate_offset = offset;
  gate_open = false;
  gate_waiting = 0;
  f.disk->hook = wait_at_gate;
}

static void
open_gate (void)
{
  ACQUIRE_LOCK_FOR_CURRENT_SCOPE (&gate_lock);
  gate_open = true;
  pthread_cond_broadcast (&gate_changed);
}

static void
wait_until_at_gate (void)
{
  ACQUIRE_LOCK_FOR_CURRENT_SCOPE (&gate_lock);
  while (gate_waiting == 0)
    pthread_cond_wait (&gate_changed, &gate_lock);
}

static void
sleep_ms (unsigned ms)
{
  const struct timespec ts = {
    .tv_sec = ms / 1000,
    .tv_nsec = (ms % 1000) * 1000000L,
  };

  nanosleep (&ts, NULL);
}

/* A disk of which each operation takes *(unsigned *) opaque ms. */
static int
sleep_opaque (struct disk *d, enum fake_op op,
              uint64_t offset, uint64_t count)
{
  (void) op;
  (void) offset;
  (void) count;
  sleep_ms (*(unsigned *) d->opaque);
  return 0;
}

static int
setup (void **state)
{
  (void) state;
  fixture_init (&f, SIZE);
  fixture_start (&f, false);
  return 0;
}

static int
teardown (void **state)
{
  (void) state;
  fixture_stop (&f);
  return 0;
}

static void
check_alive (int fd)
{
  struct reply reply;

  send_request (fd, 0, NBD_CMD_READ, 321, 4096, 4096);
  recv_reply (fd, &reply, 0);
  assert_int_equal (reply.cookie, 321);
  assert_int_equal (reply.error, 0);
  assert_memory_equal (reply.data + 8, f.disk->data + 4096, 4096);
  free (reply.data);
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
    recv_reply (fd, &reply, 0);
    assert_int_equal (reply.error, 0);
    assert_int_not_equal (reply.cookie, SLOW);
    assert_true (reply.cookie < N && (seen & 1u << reply.cookie) == 0);
    seen |= 1u << reply.cookie;
    free (reply.data);
  }
  open_gate ();
  recv_reply (fd, &reply, 0);
  assert_int_equal (reply.cookie, SLOW);
  assert_int_equal (reply.error, 0);
  free (reply.data);
  check_alive (fd);
  close (fd);
}

static void
test_slow_read_is_passed (void **state)
{
  (void) state;
  for (int i = 0; i < 10; ++i) {
    close_gate (FAKE_READ, 0);
    check_slow_one_is_passed (NBD_CMD_READ, 0, 512);
  }
  close_gate (FAKE_READ, 0);
  check_slow_one_is_passed (NBD_CMD_READ, 0, 1 << 20);
}

static void
test_slow_flush_is_passed (void **state)
{
  (void) state;
  close_gate (FAKE_FLUSH, 0);
  check_slow_one_is_passed (NBD_CMD_FLUSH, 0, 0);
  close_gate (FAKE_ZERO, 0);
  check_slow_one_is_passed (NBD_CMD_WRITE_ZEROES, 0, 1 << 24);
}

/* A request that comes when one is hanging already. */
static void
test_hanging_alone (void **state)
{
  int fd = client_open (&f, NULL);

  (void) state;
  close_gate (FAKE_FLUSH, 0);
  send_request (fd, 0, NBD_CMD_FLUSH, 1, 0, 0);
  wait_until_at_gate ();
  check_alive (fd);
  open_gate ();
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
  f.disk->hook = sleep_opaque;
  start = milliseconds ();
  for (int i = 0; i < N; ++i)
    send_request (fd, 0, NBD_CMD_READ, i, 512 * i, 512);
  for (int i = 0; i < N; ++i) {
    recv_reply (fd, &reply, 0);
    assert_int_equal (reply.error, 0);
    free (reply.data);
  }
  took = milliseconds () - start;
  assert_in_range (f.disk->most_under_way, 12, 16);
  /* One after the other would be 8000. */
  assert_true (took < 2500);
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

/* CACHE requests, 64 under way. */
static void
cache_many (int fd, int nr)
{
  struct reply reply;

  for (int i = 0; i < nr + 64; ++i) {
    if (i < nr)
      send_request (fd, 0, NBD_CMD_CACHE, i, 0, 512);
    if (i >= 64) {
      recv_reply (fd, &reply, 0);
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

    recv_reply (fd, &reply, 0);
    c = reply.cookie;
    assert_true (c < DEPTH);
    assert_int_equal (reply.error, 0);
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

  for (int i = 0; i < 60; ++i)
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
    check_alive (b);
  }
  close (a);
  close (b);
}

/* Read requests for far more than sockets hold, and no reading. */
static int
greedy_client (void)
{
  int fd = client_open (&f, NULL);

  for (int i = 0; i < 200; ++i)
    send_request (fd, 0, NBD_CMD_READ, i, 0, i % 3 ? 1 << 20 : 4096);
  return fd;
}

static void
test_greedy_client_delays_nobody (void **state)
{
  int greedy = greedy_client (), fd = client_open (&f, NULL);
  unsigned start = milliseconds ();
  struct reply reply;

  (void) state;
  for (int i = 0; i < 100; ++i)
    check_alive (fd);
  assert_true (milliseconds () - start < 2000);
  /* It is answered in the end. */
  for (int i = 0; i < 200; ++i) {
    recv_reply (greedy, &reply, 0);
    assert_int_equal (reply.error, 0);
    free (reply.data);
  }
  close (fd);
  close (greedy);
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
  assert_true (stop_takes (5000) < 1000);
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
    fd[i] = greedy_client ();
  sleep_ms (50);
  assert_in_range (stop_takes (300), 250, 1500);
  for (int i = 0; i < 8; ++i)
    close (fd[i]);
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
  f.disk->hook = sleep_opaque;
  for (int i = 0; i < N; ++i) {
    put_request (buf + n, i % 4 == 0 ? NBD_CMD_FLAG_FUA : 0,
                 NBD_CMD_WRITE, i, 16 * i, 16);
    n += sizeof (struct nbd_request);
    memset (buf + n, 'a' + i % 26, 16);
    n += 16;
  }
  send_bytes (fd, buf, n);
  sleep_ms (10);
  assert_true (stop_takes (5000) < 3000);
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

static void *
open_gate_late (void *vp)
{
  (void) vp;
  sleep_ms (400);
  open_gate ();
  return NULL;
}

/* The disk is not abandoned, however long it takes. */
static void
test_stop_waits_for_the_disk (void **state)
{
  int fd = client_open (&f, NULL), idle = client_open (&f, NULL);
  pthread_t thread;

  (void) state;
  close_gate (FAKE_WRITE, 0);
  send_request (fd, 0, NBD_CMD_WRITE, 1, 0, 512);
  send_bytes (fd, f.disk->data, 512);
  wait_until_at_gate ();
  pthread_create (&thread, NULL, open_gate_late, NULL);
  assert_in_range (stop_takes (50), 300, 2000);
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
  assert_true (stop_takes (3000) < 2000);
  for (int i = 0; i < 4; ++i) {
    pthread_join (out[i], NULL);
    pthread_join (in[i], NULL);
    close (fd[i]);
  }
}

static int
slow_reads (struct disk *d, enum fake_op op, uint64_t offset, uint64_t count)
{
  (void) d;
  (void) offset;
  if (op == FAKE_READ && count > 4096)
    sleep_ms (count % 5);
  return 0;
}

/* Clients that vanish at any point leave nothing behind. */
static void
test_vanishing_clients (void **state)
{
  const struct linger reset = { .l_onoff = 1, .l_linger = 0 };
  unsigned before = count_threads (), waited = 0;
  uint8_t *buf = calloc (1, 70000);
  int other = client_open (&f, NULL);

  (void) state;
  f.disk->hook = slow_reads;
  srandom (6);
  for (int i = 0; i < 200; ++i) {
    int fd;

    if (i % 5 == 0) {
      fd = fixture_connect (&f);
      send_bytes (fd, buf, random () % 24);
    }
    else {
      fd = client_open (&f, NULL);
      for (int j = random () % 30; j > 0; --j)
        send_request (fd, 0, NBD_CMD_READ, j, 0, 1 + random () % 9000);
      send_request (fd, 0, NBD_CMD_WRITE, 1, 65536, 70000);
      send_bytes (fd, buf, random () % 70001);
    }
    if (i % 3 == 0)
      setsockopt (fd, SOL_SOCKET, SO_LINGER, &reset, sizeof reset);
    close (fd);
  }
  check_alive (other);
  close (other);
  while (count_threads () > before && waited++ < 500)
    sleep_ms (10);
  assert_int_equal (count_threads (), before);
  free (buf);
}

static void
test_too_many_clients (void **state)
{
  enum { N = 1030 };
  struct rlimit limit, old;
  int fd[N], nr_refused = 0;
  uint8_t byte;
  const char *preload = getenv ("LD_PRELOAD");

  (void) state;
  getrlimit (RLIMIT_NOFILE, &old);
  limit = old;
  limit.rlim_cur = limit.rlim_max;
  /* Valgrind has its own bound on threads, below ours. */
  if (limit.rlim_max < 4096 ||
      (preload != NULL && strstr (preload, "valgrind") != NULL))
    skip ();
  setrlimit (RLIMIT_NOFILE, &limit);
  for (int i = 0; i < N; ++i)
    fd[i] = fixture_connect (&f);
  for (int i = 0; i < N; ++i)
    if (recv (fd[i], &byte, 1, 0) != 1)
      nr_refused++;
  assert_int_equal (nr_refused, N - 1024);
  for (int i = 0; i < N; ++i)
    close (fd[i]);
  /* There is room again. */
  for (int i = 0;; ++i) {
    int again = fixture_connect (&f);
    ssize_t r = recv (again, &byte, 1, 0);

    close (again);
    if (r == 1)
      break;
    assert_true (i < 500);
    sleep_ms (10);
  }
  setrlimit (RLIMIT_NOFILE, &old);
}

/* No descriptors for a client: it waits, and we do not spin. */
static void
test_no_descriptors (void **state)
{
  struct rlimit limit, old;
  struct rusage before, after;
  int fd = fixture_connect (&f), again, next;

  (void) state;
  client_greet (fd, 0);
  getrlimit (RLIMIT_NOFILE, &old);
  again = socket (AF_UNIX, SOCK_STREAM, 0);
  next = dup (0);
  assert_true (next >= 0);
  close (next);
  limit = old;
  limit.rlim_cur = next;
  assert_int_equal (setrlimit (RLIMIT_NOFILE, &limit), 0);
  close (again);
  again = fixture_connect (&f); /* takes the last one */
  getrusage (RUSAGE_SELF, &before);
  sleep_ms (500);
  getrusage (RUSAGE_SELF, &after);
  assert_true ((after.ru_utime.tv_sec - before.ru_utime.tv_sec +
                after.ru_stime.tv_sec - before.ru_stime.tv_sec) * 1000000 +
               after.ru_utime.tv_usec - before.ru_utime.tv_usec +
               after.ru_stime.tv_usec - before.ru_stime.tv_usec < 250000);
  setrlimit (RLIMIT_NOFILE, &old);
  client_greet (again, 0);
  close (fd);
  close (again);
}

static void
serve_tcp (int family, const struct sockaddr *addr, socklen_t length)
{
  const struct nbd_options options = { .readonly = false };
  struct sockaddr_storage bound;
  struct nbd_server *server;
  int sock = socket (family, SOCK_STREAM, 0), fd;

  if (sock == -1 || bind (sock, addr, length) == -1)
    skip ();
  length = sizeof bound;
  assert_return_code (listen (sock, 5), errno);
  getsockname (sock, (struct sockaddr *) &bound, &length);
  server = nbd_server_new (f.disk, &options);
  assert_non_null (server);
  assert_int_equal (nbd_server_add_socket (server, sock), 0);
  assert_int_equal (nbd_server_start (server), 0);
  fd = socket (family, SOCK_STREAM, 0);
  assert_return_code (connect (fd, (struct sockaddr *) &bound, length),
                      errno);
  client_greet (fd, 0);
  client_structured (fd);
  client_go (fd, "", NULL);
  check_alive (fd);
  for (int i = 0; i < 100; ++i)
    send_request (fd, 0, NBD_CMD_READ, 1, 0, 100000);
  nbd_server_stop (server, 100);
  nbd_server_free (server);
  close (fd);
}

static void
test_ipv4 (void **state)
{
  const struct sockaddr_in addr = {
    .sin_family = AF_INET,
    .sin_addr.s_addr = htonl (INADDR_LOOPBACK),
  };

  (void) state;
  serve_tcp (AF_INET, (const struct sockaddr *) &addr, sizeof addr);
}

static void
test_ipv6 (void **state)
{
  const struct sockaddr_in6 addr = {
    .sin6_family = AF_INET6,
    .sin6_addr = IN6ADDR_LOOPBACK_INIT,
  };

  (void) state;
  serve_tcp (AF_INET6, (const struct sockaddr *) &addr, sizeof addr);
}

static void
test_never_started (void **state)
{
  const struct nbd_options options = { .description = "" };
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
#define TEST(name) cmocka_unit_test_setup_teardown (name, setup, teardown)
  const struct CMUnitTest tests[] = {
    TEST (test_slow_read_is_passed),
    TEST (test_slow_flush_is_passed),
    TEST (test_hanging_alone),
    TEST (test_parallel),
    TEST (test_parallel_short_sleeps),
    TEST (test_many_clients),
    TEST (test_two_connections_share),
    TEST (test_greedy_client_delays_nobody),
    TEST (test_stop_with_silent_clients),
    TEST (test_stop_with_greedy_clients),
    TEST (test_stop_answers),
    TEST (test_stop_waits_for_the_disk),
    TEST (test_stop_in_a_flood),
    TEST (test_vanishing_clients),
    TEST (test_too_many_clients),
    TEST (test_no_descriptors),
    TEST (test_ipv4),
    TEST (test_ipv6),
    TEST (test_never_started),
  };

  return cmocka_run_group_tests (tests, NULL, NULL);
}
