/* nbdkit-dirty-bitmap-filter
 * SPDX-License-Identifier: BSD-3-Clause
 * Copyright the nbdkit-dirty-bitmap-filter authors
 */

/* Clients of filter/nbd that vanish, that there are no descriptors for,
 * that come over TCP.
 */

#include <config.h>

#include <arpa/inet.h>
#include <errno.h>
#include <netinet/in.h>
#include <stdlib.h>
#include <string.h>
#include <sys/resource.h>
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
  client_check_alive (&f, other);
  close (other);
  while (count_threads () > before && waited++ < 500)
    sleep_ms (10);
  assert_int_equal (count_threads (), before);
  free (buf);
}

/* Valgrind has its own bound on threads, below ours, and closes the
 * clients that accept would not have descriptors for.
 */
static bool
under_valgrind (void)
{
  const char *preload = getenv ("LD_PRELOAD");

  return preload != NULL && strstr (preload, "valgrind") != NULL;
}

/* No descriptors for a client: it waits, and we do not spin. */
static void
test_no_descriptors (void **state)
{
  struct rlimit limit, old;
  struct rusage before, after;
  int fd = fixture_connect (&f), again, next;

  (void) state;
  if (under_valgrind ()) {
    close (fd);
    skip ();
  }
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
  client_check_alive (&f, fd);
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

int
main (void)
{
  const struct CMUnitTest tests[] = {
    TEST (test_vanishing_clients),
    TEST (test_no_descriptors),
    TEST (test_ipv4),
    TEST (test_ipv6),
  };

  return cmocka_run_group_tests (tests, NULL, NULL);
}
