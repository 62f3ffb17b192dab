/* nbdkit-dirty-bitmap-filter
 * SPDX-License-Identifier: BSD-3-Clause
 * Copyright the nbdkit-dirty-bitmap-filter authors
 */

/* The bounds of filter/nbd: clients that are too many, too slow, too
 * greedy or idle, and those beside them, who must not suffer.
 */

#include <config.h>

#include <errno.h>
#include <poll.h>
#include <pthread.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <unistd.h>

#include "common/bytes.h"
#include "common/report.h"
#include "nbd-fixture.h"

#define SIZE (UINT64_C (256) * 1024 * 1024)
#define MiB (UINT32_C (1) << 20)

/* Under TSan the client and the disk are so slow that a client may be
 * taken for one that stalls.
 */
#ifdef __SANITIZE_THREAD__
#define SLOWER 5
#else
#define SLOWER 1
#endif

extern unsigned place_ms, stall_ms, trim_ms;
extern size_t extents_max;

static int
setup (void **state)
{
  (void) state;
  fixture_init (&f, SIZE);
  fake_disk_add_bitmap (f.disk, "b", 512);
  place_ms = 1000;
  stall_ms = 5000;
  trim_ms = 5000;
  extents_max = (1 << 20) - 1;
  return 0;
}

/* The memory of this process, in bytes. */
static size_t
resident (void)
{
  FILE *fp = fopen ("/proc/self/statm", "r");
  unsigned long size, pages;

  assert_non_null (fp);
  assert_int_equal (fscanf (fp, "%lu %lu", &size, &pages), 2);
  fclose (fp);
  return pages * sysconf (_SC_PAGESIZE);
}

/* What else may be in use: of the test, or by the allocator. */
#define SLACK ((size_t) 48 * MiB)

static void
assert_memory_below (size_t before, size_t bound)
{
  const size_t now = resident ();

  if (!is_instrumented () && now > before + bound + SLACK)
    fail_msg ("%zu MiB more than before", (now - before) / MiB);
}

/* True if the server ends the connection within so long. */
static bool
ends_within (int fd, unsigned ms)
{
  struct pollfd p = { .fd = fd, .events = POLLIN };
  const unsigned start = milliseconds ();
  char buf[4096];
  ssize_t r;

  while (milliseconds () - start < ms) {
    if (poll (&p, 1, 10) <= 0)
      continue;
    r = recv (fd, buf, sizeof buf, MSG_DONTWAIT);
    if (r == 0 || (r == -1 && errno != EAGAIN))
      return true;
  }
  return false;
}

/* True if the server says hello within so long. */
static bool
greeted_within (int fd, int ms)
{
  struct pollfd p = { .fd = fd, .events = POLLIN };
  char byte;

  return poll (&p, 1, ms) == 1 && recv (fd, &byte, 1, MSG_PEEK) == 1;
}

/* All places are taken by clients that work: one more is refused, nobody
 * is cut, and when one leaves there is a place.
 */
static void
test_too_many_clients (void **state)
{
  enum { N = 12 };
  int fd[N], more;

  (void) state;
  f.limits.connections = N;
  fixture_start (&f, false);
  for (int i = 0; i < N; ++i)
    fd[i] = client_open (&f, NULL);
  for (int i = 0; i < 5; ++i) {
    more = fixture_connect (&f);
    expect_end (more);
    close (more);
  }
  for (int i = 0; i < N; ++i)
    client_check_alive (&f, fd[i]);
  close (fd[0]);
  for (int i = 0;; ++i) {
    more = fixture_connect (&f);
    if (greeted_within (more, 10000))
      break;
    close (more);
    assert_true (i < 500);
    sleep_ms (10);
  }
  close (more);
  for (int i = 1; i < N; ++i)
    close (fd[i]);
}

/* Those who say nothing occupy half of the places for a while each. */
static void
test_silent_clients_make_room (void **state)
{
  enum { N = 8, SILENT = 40 };
  int fd[SILENT], good, other, ended = 0;
  unsigned start;

  (void) state;
  f.limits.connections = N;
  place_ms = 100;
  fixture_start (&f, false);
  other = client_open (&f, NULL);
  for (int i = 0; i < SILENT; ++i)
    fd[i] = fixture_connect (&f);
  client_check_alive (&f, other);

  /* At the end of the queue: ten turns of four. */
  start = milliseconds ();
  good = client_open (&f, NULL);
  client_check_alive (&f, good);
  assert_true (milliseconds () - start < 15000);
  client_check_alive (&f, other);

  for (int i = 0; i < SILENT; ++i)
    ended += ends_within (fd[i], 1);
  assert_true (ended >= SILENT - N);
  for (int i = 0; i < SILENT; ++i)
    close (fd[i]);
  close (good);
  close (other);
}

/* A crowd that comes at once and means it is let in, all of it. */
static void
test_crowd (void **state)
{
  enum { N = 40 };
  int fd[N];

  (void) state;
  f.limits.connections = N;
  fixture_start (&f, false);
  for (int i = 0; i < N; ++i)
    fd[i] = fixture_connect (&f);
  for (int i = 0; i < N; ++i) {
    client_greet (fd[i], NBD_FLAG_FIXED_NEWSTYLE | NBD_FLAG_NO_ZEROES);
    client_structured (fd[i]);
    client_go (fd[i], "", NULL);
  }
  for (int i = 0; i < N; ++i) {
    client_check_alive (&f, fd[i]);
    close (fd[i]);
  }
}

/* The deadline is for the whole handshake, not for each byte. */
static void
test_slow_handshake (void **state)
{
  const uint8_t option[64] = { 'I', 'H', 'A', 'V', 'E', 'O', 'P', 'T',
                               0, 0, 0, 99, 0, 1, 0, 0 };
  unsigned start = milliseconds ();
  int fd, good;
  size_t i;

  (void) state;
  f.limits.handshake_seconds = 1;
  fixture_start (&f, false);
  good = client_open (&f, NULL);
  fd = fixture_connect (&f);
  client_greet (fd, 0);
  for (i = 0; i < sizeof option; ++i) {
    if (send (fd, option + i, 1, MSG_NOSIGNAL) != 1)
      break;
    if (ends_within (fd, 100))
      break;
  }
  assert_true (i < sizeof option);
  assert_in_range (milliseconds () - start, 900, 6000);
  close (fd);
  client_check_alive (&f, good);
  close (good);
}

/* Nor does it help not to take what one has asked for. */
static void
test_handshake_that_does_not_read (void **state)
{
  uint8_t list[16];
  int fd;

  (void) state;
  f.limits.handshake_seconds = 1;
  fixture_start (&f, false);
  fd = fixture_connect (&f);
  client_greet (fd, 0);
  put_be32 (list, 0);
  put_be32 (list + 4, 0);
  for (int i = 0; i < 100000; ++i) {
    struct nbd_new_option header = {
      .magic = htobe64 (NBD_OPTION_MAGIC),
      .option = htobe32 (NBD_OPT_LIST_META_CONTEXT),
      .length = htobe32 (8),
    };

    if (send (fd, &header, sizeof header, MSG_NOSIGNAL) < 0 ||
        send (fd, list, 8, MSG_NOSIGNAL) < 0)
      break;
    assert_int_not_equal (i, 99999);
  }
  /* We are not allowed to go on, rather than not getting any further. */
  assert_true (errno == EPIPE || errno == ECONNRESET);
  close (fd);
}

static void
test_idle (void **state)
{
  unsigned start;
  int fd, busy;

  (void) state;
  f.limits.idle_seconds = 1;
  fixture_start (&f, false);
  fd = client_open (&f, NULL);
  start = milliseconds ();

  /* Who has a request in flight is not idle. */
  busy = client_open (&f, NULL);
  gate_close (f.disk, FAKE_FLUSH, 0);
  send_request (busy, 0, NBD_CMD_FLUSH, 1, 0, 0);
  gate_wait ();
  assert_true (ends_within (fd, 20000));
  assert_true (milliseconds () - start >= 900);
  close (fd);
  assert_false (ends_within (busy, 1500));
  gate_open ();
  expect_error (busy, 1, 0);
  client_check_alive (&f, busy);
  assert_true (ends_within (busy, 20000));
  close (busy);

  /* Nor one that sends, however slowly. */
  fd = client_open (&f, NULL);
  for (int i = 0; i < 8; ++i) {
    uint8_t request[sizeof (struct nbd_request)];

    put_request (request, 0, NBD_CMD_FLUSH, 1, 0, 0);
    send_bytes (fd, request + i, 1);
    assert_false (ends_within (fd, 250));
  }
  close (fd);
}

/* Off by default. */
static void
test_not_idle (void **state)
{
  int fd;

  (void) state;
  fixture_start (&f, false);
  fd = client_open (&f, NULL);
  assert_false (ends_within (fd, 1500));
  client_check_alive (&f, fd);
  close (fd);
}

static void
test_max_requests (void **state)
{
  unsigned ms = 20;
  int fd;

  (void) state;
  f.limits.requests = 3;
  fixture_start (&f, false);
  fd = client_open (&f, NULL);
  f.disk->opaque = &ms;
  f.disk->hook = hook_sleep;
  for (int i = 0; i < 60; ++i)
    send_request (fd, 0, NBD_CMD_CACHE, i, 0, 512);
  for (int i = 0; i < 60; ++i) {
    struct reply reply;

    recv_reply (fd, &reply, 0);
    assert_int_equal (reply.error, 0);
  }
  assert_int_equal (f.disk->most_under_way, 3);
  f.disk->hook = NULL;
  close (fd);
}

/* Clients that ask for all they can in large pieces and take nothing, in
 * simple replies and structured ones.
 */
enum { HOGS = 4, ASKED = 16 };

static int
hog (unsigned kind)
{
  static const char *const contexts[] = { "qemu:dirty-bitmap:b", NULL };
  int fd;

  if (kind % 3 == 0) {
    fd = fixture_connect (&f);
    client_greet (fd, NBD_FLAG_FIXED_NEWSTYLE | NBD_FLAG_NO_ZEROES);
    client_go (fd, "", NULL);
  }
  else
    fd = client_open (&f, contexts);
  for (unsigned i = 0; i < ASKED; ++i)
    if (kind % 3 == 2)
      send_request (fd, 0, NBD_CMD_BLOCK_STATUS, i, 0, SIZE);
    else
      send_request (fd, kind % 3 == 1 ? NBD_CMD_FLAG_DF : 0, NBD_CMD_READ, i,
                    0, 32 * MiB);
  return fd;
}

/* And such as announce a payload, which with FUA is received whole, and
 * send one byte of it.
 */
static int
slow_writer (void)
{
  int fd = client_open (&f, NULL);

  send_request (fd, NBD_CMD_FLAG_FUA, NBD_CMD_WRITE, 1, 128 * MiB, 32 * MiB);
  send_bytes (fd, "x", 1);
  return fd;
}

static void
check_large_requests (int fd)
{
  struct reply reply;
  uint8_t *buf = malloc (32 * MiB);

  assert_non_null (buf);
  memset (buf, 0x5a, 32 * MiB);
  send_request (fd, NBD_CMD_FLAG_FUA, NBD_CMD_WRITE, 1, 64 * MiB, 32 * MiB);
  send_bytes (fd, buf, 32 * MiB);
  expect_error (fd, 1, 0);
  send_request (fd, NBD_CMD_FLAG_DF, NBD_CMD_READ, 2, 64 * MiB, 32 * MiB);
  recv_reply (fd, &reply, 0);
  assert_int_equal (reply.error, 0);
  assert_int_equal (reply.length, 8 + 32 * MiB);
  assert_memory_equal (reply.data + 8, buf, 32 * MiB);
  free (reply.data);
  free (buf);
}

/* Every other granule is dirty: half a million extents. */
static void
make_fragments (void)
{
  for (uint64_t i = 0; i < SIZE / 512; i += 2)
    f.disk->bitmaps[0].dirty[i] = 1;
}

static void
test_hogs (void **state)
{
  const uint64_t bound = 2 * NBD_MIN_MEMORY;
  int fd[2 * HOGS], good;
  size_t before;
  unsigned start;

  (void) state;
  make_fragments ();
  memset (f.disk->data, 1, SIZE);
  f.limits.memory = bound;
  stall_ms = 1000 * SLOWER;
  fixture_start (&f, false);
  good = client_open (&f, NULL);
  before = resident ();
  for (unsigned i = 0; i < HOGS; ++i) {
    fd[2 * i] = hog (i);
    fd[2 * i + 1] = slow_writer ();
    client_check_alive (&f, good);
    assert_memory_below (before, bound);
  }
  /* Small requests do not wait for memory at all, large ones until those
   * that hold it have been cut.
   */
  start = milliseconds ();
  for (unsigned i = 0; i < 200; ++i)
    client_check_alive (&f, good);
  assert_true (milliseconds () - start < 5000 * SLOWER);
  check_large_requests (good);
  assert_memory_below (before, bound);
  assert_true (milliseconds () - start < 25000 * SLOWER);
  client_check_alive (&f, good);
  for (unsigned i = 0; i < 2 * HOGS; ++i)
    close (fd[i]);
  close (good);
}

/* Replies to BLOCK_STATUS of half a million extents each. */
static void
test_extents_nobody_takes (void **state)
{
  const uint64_t bound = NBD_MIN_MEMORY;
  int fd[HOGS], good;
  size_t before;

  (void) state;
  make_fragments ();
  f.limits.memory = bound;
  fixture_start (&f, false);
  good = client_open (&f, NULL);
  before = resident ();
  for (unsigned i = 0; i < HOGS; ++i)
    fd[i] = hog (2);
  for (unsigned i = 0; i < 15; ++i) {
    sleep_ms (100);
    client_check_alive (&f, good);
    assert_memory_below (before, bound);
  }
  for (unsigned i = 0; i < HOGS; ++i)
    close (fd[i]);
  close (good);
}

/* More extents than extents_max, so they are told as one: the reply is short,
 * but the array of extents has grown to 1 MiB.  A worker keeps it until it
 * has been idle for a while.
 */
static void
ask_for_extents (int fd)
{
  struct reply reply;

  send_request (fd, 0, NBD_CMD_BLOCK_STATUS, 1, 0, 34 * MiB);
  recv_reply (fd, &reply, 0);
  assert_int_equal (reply.type, NBD_REPLY_TYPE_BLOCK_STATUS);
  assert_int_equal (reply.length, 4 + 8);
  free (reply.data);
}

/* A client of which a worker keeps extents.  A worker that loses the role
 * keeps nothing, so it must not be taken for slow, however slow the machine
 * is.  If it was when the monitor came back, another client tries.
 */
static int
client_keeping_extents (void)
{
  static const char *const contexts[] = { "qemu:dirty-bitmap:b", NULL };

  extents_max = 66000;
  for (unsigned i = 1;; ++i) {
    const int fd = client_open (&f, contexts);
    size_t before;

    /* Its handshake is finished. */
    client_check_alive (&f, fd);
    before = fixture_memory (&f);
    fixture_pause_monitor (&f);
    ask_for_extents (fd);
    sleep_ms (10);
    fixture_resume_monitor (&f);
    if (fixture_memory (&f) > before)
      return fd;
    assert_int_not_equal (i, 100);
    close (fd);
  }
}

/* What a worker keeps for its next request must not be what this waits
 * for: where memory is small 1 MiB less is too little.
 */
static void
test_large_request_after_extents (void **state)
{
  int fd;

  (void) state;
  make_fragments ();
  f.limits.memory = NBD_MIN_MEMORY;
  fixture_start (&f, false);
  fd = client_keeping_extents ();
  check_large_requests (fd);
  close (fd);
}

/* Clients that keep extents, and announce payloads that are refused and
 * do not come: nothing is kept meanwhile.
 */
static void
test_refused_payloads_that_stall (void **state)
{
  enum { STALLING = 24 };
  int fd[STALLING], good;

  (void) state;
  make_fragments ();
  f.limits.memory = NBD_MIN_MEMORY;
  fixture_start (&f, false);
  good = client_open (&f, NULL);
  for (unsigned i = 0; i < STALLING; ++i)
    fd[i] = client_keeping_extents ();
  for (unsigned i = 0; i < STALLING; ++i)
    send_request (fd[i], 0, NBD_CMD_WRITE, 2, SIZE, MiB);
  for (unsigned i = 0; fixture_memory (&f) > 0; ++i) {
    assert_true (i < 1000);
    sleep_ms (10);
  }
  check_large_requests (good);
  client_check_alive (&f, good);
  for (unsigned i = 0; i < STALLING; ++i)
    close (fd[i]);
  close (good);
}

static atomic_bool large_done;

static void *
be_large (void *vp)
{
  check_large_requests (*(int *) vp);
  atomic_store (&large_done, true);
  return NULL;
}

/* Clients that keep extents, and send the next request byte by byte: they
 * are not cut, and nobody waits for the last one.
 */
static void
test_headers_byte_by_byte (void **state)
{
  enum { SLOW = 24, STEP_MS = 500 * SLOWER };
  uint8_t header[sizeof (struct nbd_request)];
  int fd[SLOW], good;
  pthread_t thread;

  (void) state;
  make_fragments ();
  f.limits.memory = NBD_MIN_MEMORY;
  fixture_start (&f, false);
  good = client_open (&f, NULL);
  for (unsigned i = 0; i < SLOW; ++i)
    fd[i] = client_keeping_extents ();
  atomic_store (&large_done, false);
  assert_int_equal (pthread_create (&thread, NULL, be_large, &good), 0);
  put_request (header, 0, NBD_CMD_READ, 7, 0, 1);
  for (unsigned n = 0; n < sizeof header; ++n) {
    if (n == sizeof header - 1)
      assert_true (atomic_load (&large_done));
    for (unsigned i = 0; i < SLOW; ++i)
      send_bytes (fd[i], &header[n], 1);
    if (!atomic_load (&large_done))
      sleep_ms (STEP_MS);
  }
  pthread_join (thread, NULL);
  for (unsigned i = 0; i < SLOW; ++i) {
    struct reply reply;

    recv_reply (fd[i], &reply, 0);
    assert_int_equal (reply.error, 0);
    free (reply.data);
    close (fd[i]);
  }
  close (good);
}

/* However busy others are, and though each of them asks for less, one
 * that needs much gets its turn.
 */
static atomic_bool busy_ends;

static void *
be_busy (void *vp)
{
  int fd = client_open (&f, NULL);
  struct reply reply;
  unsigned asked = 0, answered = 0;

  (void) vp;
  while (answered < asked || !atomic_load (&busy_ends)) {
    if (asked < answered + 4 && !atomic_load (&busy_ends)) {
      send_request (fd, NBD_CMD_FLAG_DF, NBD_CMD_READ, asked++, 0, 4 * MiB);
      continue;
    }
    recv_reply (fd, &reply, 0);
    assert_int_equal (reply.error, 0);
    free (reply.data);
    answered++;
  }
  close (fd);
  return NULL;
}

static void
test_large_request_among_busy_ones (void **state)
{
  enum { BUSY = 8 };
  unsigned ms = 20;
  pthread_t thread[BUSY];
  int fd;

  (void) state;
  f.limits.memory = NBD_MIN_MEMORY;
  f.disk->opaque = &ms;
  f.disk->hook = hook_sleep;
  fixture_start (&f, false);
  fd = client_open (&f, NULL);
  atomic_store (&busy_ends, false);
  for (unsigned i = 0; i < BUSY; ++i)
    assert_int_equal (pthread_create (&thread[i], NULL, be_busy, NULL), 0);
  sleep_ms (200);
  check_large_requests (fd);
  atomic_store (&busy_ends, true);
  for (unsigned i = 0; i < BUSY; ++i)
    pthread_join (thread[i], NULL);
  f.disk->hook = NULL;
  close (fd);
}

/* Nobody waits on account of a client that does not read: it is not
 * cut, however long it takes, and gets its replies in the end.  Its own
 * requests wait.
 */
static void
test_hog_alone (void **state)
{
  struct reply reply;
  int fd, good;

  (void) state;
  f.limits.memory = NBD_MIN_MEMORY;
  stall_ms = 300;
  fixture_start (&f, false);
  good = client_open (&f, NULL);
  fd = hog (1);
  /* The socket's time-out tells of what was sent, then of nothing. */
  sleep_ms (2 * 2000 + 500);
  client_check_alive (&f, good);
  for (unsigned i = 0; i < ASKED; ++i) {
    recv_reply (fd, &reply, 0);
    assert_int_equal (reply.error, 0);
    assert_int_equal (reply.length, 8 + 32 * MiB);
    free (reply.data);
  }
  close (fd);
  close (good);
}

/* A client that is slow, but goes on, is not cut though others wait. */
static void
test_slow_but_steady (void **state)
{
  const unsigned start = milliseconds ();
  uint8_t *buf = calloc (1, 32 * MiB);
  int fd, good;
  size_t sent = 1 + MiB;

  (void) state;
  f.limits.memory = NBD_MIN_MEMORY;
  stall_ms = 1000;
  fixture_start (&f, false);
  good = client_open (&f, NULL);
  fd = slow_writer ();
  send_bytes (fd, buf, MiB);    /* more than the socket holds */
  send_request (good, NBD_CMD_FLAG_FUA, NBD_CMD_WRITE, 1, 0, 32 * MiB);
  while (milliseconds () - start < 2500) {
    send_bytes (fd, buf, 256 * 1024);
    sent += 256 * 1024;
    sleep_ms (50);
  }
  send_bytes (fd, buf, 32 * MiB - sent);
  expect_error (fd, 1, 0);
  send_bytes (good, buf, 32 * MiB);
  expect_error (good, 1, 0);
  close (fd);
  close (good);
  free (buf);
}

/* Nor is one that takes its reply slowly, but goes on. */
static void
test_slow_but_steady_reader (void **state)
{
  const size_t length = sizeof (struct nbd_structured_reply) + 8 + 32 * MiB;
  uint8_t *buf = calloc (1, length);
  int fd, good;
  size_t got = 1;
  unsigned start;

  (void) state;
  f.limits.memory = NBD_MIN_MEMORY;
  stall_ms = 1000;
  fixture_start (&f, false);
  good = client_open (&f, NULL);
  fd = client_open (&f, NULL);
  send_request (fd, NBD_CMD_FLAG_DF, NBD_CMD_READ, 1, 0, 32 * MiB);
  recv_bytes (fd, buf, 1);
  send_request (good, NBD_CMD_FLAG_FUA, NBD_CMD_WRITE, 1, 0, 32 * MiB);
  start = milliseconds ();
  while (milliseconds () - start < 2500) {
    recv_bytes (fd, buf, 256 * 1024);
    got += 256 * 1024;
    sleep_ms (50);
  }
  recv_bytes (fd, buf, length - got);
  send_bytes (good, buf, 32 * MiB);
  expect_error (good, 1, 0);
  close (fd);
  close (good);
  free (buf);
}

/* What large requests used is given back when they are no more. */
static void
test_memory_is_given_back (void **state)
{
  size_t before;
  int fd, i;

  (void) state;
  memset (f.disk->data, 1, SIZE);
  trim_ms = 200;
  fixture_start (&f, false);
  if (is_instrumented ())
    skip ();
  fd = client_open (&f, NULL);
  before = resident ();
  for (i = 0; i < 4; ++i)
    send_request (fd, NBD_CMD_FLAG_DF, NBD_CMD_READ, i, 0, 32 * MiB);
  for (i = 0; i < 4; ++i) {
    struct reply reply;

    recv_reply (fd, &reply, 0);
    free (reply.data);
  }
  for (i = 0; resident () > before + 8 * MiB; ++i) {
    assert_true (i < 300);
    sleep_ms (100);
  }
  client_check_alive (&f, fd);
  close (fd);
}

/* Idle connections, and such as have used all of their threads and
 * buffers for small requests.
 */
static void
test_many_connections (void **state)
{
  enum { N = 1000 };
  const uint64_t bound = NBD_MIN_MEMORY;
  static unsigned ms = 1;       /* used until the server has stopped */
  unsigned n;
  int fd[N], good;
  size_t before;

  (void) state;
  f.limits.memory = bound;
  fixture_start (&f, false);
  if (is_instrumented ())
    skip ();
  before = resident ();
  good = client_open (&f, NULL);
  for (n = 0; n < N; ++n) {
    fd[n] = fixture_connect (&f);
    if (!greeted_within (fd[n], 10000))
      break;
    client_greet (fd[n], NBD_FLAG_FIXED_NEWSTYLE | NBD_FLAG_NO_ZEROES);
    client_structured (fd[n]);
    client_go (fd[n], "", NULL);
  }
  assert_in_range (n, 30, 255); /* memory lets no more in */
  f.disk->opaque = &ms;
  f.disk->hook = hook_sleep;
  for (unsigned i = 0; i < n; ++i)
    for (unsigned j = 0; j < 200; ++j)
      send_request (fd[i], 0, NBD_CMD_READ, j, j * MiB, 128 * 1024 - j);
  for (unsigned i = 0; i < 20; ++i)
    client_check_alive (&f, good);
  sleep_ms (500);
  client_check_alive (&f, good);
  assert_memory_below (before, bound);
  for (unsigned i = 0; i < n; ++i)
    close (fd[i]);
  close (fd[n]);
  close (good);
}

static unsigned nr_errors;
static char last_error[300];

static void
count_errors (enum report_level level, const char *fmt, va_list args)
{
  if (level == REPORT_DEBUG)
    return;
  nr_errors++;
  vsnprintf (last_error, sizeof last_error, fmt, args);
}

/* A thousand clients that do wrong are not a thousand lines. */
static void
test_messages (void **state)
{
  static const uint8_t nonsense[100];
  int fd;

  (void) state;
  report_sink = count_errors;
  nr_errors = 0;
  f.tls = fixture_load_tls (&f, true);
  fixture_start (&f, false);
  for (int i = 0; i < 300; ++i) {
    fd = fixture_connect (&f);
    client_greet (fd, 0);
    send_option (fd, NBD_OPT_STARTTLS, NULL, 0);
    expect_option_reply (fd, NBD_OPT_STARTTLS, NBD_REP_ACK, NULL);
    send_bytes (fd, nonsense, sizeof nonsense);
    assert_true (ends_within (fd, 20000));
    close (fd);
  }
  assert_int_equal (nr_errors, 10);
  nbd_server_stop (f.server, 1000);
  assert_int_equal (nr_errors, 11);
  assert_string_equal (last_error,
                       "nbd: 290 more errors of clients were not shown");
  report_sink = NULL;
}

int
main (int argc, char *argv[])
{
  const struct CMUnitTest tests[] = {
    TEST (test_too_many_clients),
    TEST (test_silent_clients_make_room),
    TEST (test_crowd),
    TEST (test_slow_handshake),
    TEST (test_handshake_that_does_not_read),
    TEST (test_idle),
    TEST (test_not_idle),
    TEST (test_max_requests),
    TEST (test_hogs),
    TEST (test_extents_nobody_takes),
    TEST (test_large_request_after_extents),
    TEST (test_refused_payloads_that_stall),
    TEST (test_headers_byte_by_byte),
    TEST (test_large_request_among_busy_ones),
    TEST (test_hog_alone),
    TEST (test_slow_but_steady),
    TEST (test_slow_but_steady_reader),
    TEST (test_memory_is_given_back),
    TEST (test_many_connections),
    TEST (test_messages),
  };

  if (argc > 1)
    cmocka_set_test_filter (argv[1]);
  return cmocka_run_group_tests (tests, NULL, NULL);
}
