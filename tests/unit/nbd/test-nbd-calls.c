/* nbdkit-dirty-bitmap-filter
 * SPDX-License-Identifier: BSD-3-Clause
 * Copyright the nbdkit-dirty-bitmap-filter authors
 */

/* What common requests cost in calls: no memory is allocated for them,
 * and those that come together are received by one system call and
 * answered by one.
 *
 * The server is over the real disk, in an image in memory.  The calls are
 * counted (those that receive, if there was something) by functions that
 * the linker finds before those of the C library, so this is no test for
 * sanitizers, which do the same.
 */

#include <config.h>

#include <dlfcn.h>
#include <errno.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stdatomic.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/un.h>
#include <unistd.h>

#include <cmocka.h>

#include "common/bytes.h"
#include "container/container.h"
#include "disk/disk.h"
#include "image.h"
#include "nbd/nbd.h"
#include "nbd/protocol.h"

#define BLOCK 4096
#define BATCH 16
#define ROUNDS 200
#define DISK_SIZE (UINT64_C (16) << 20)

/* Of all threads but that of the client. */
static atomic_bool counting;
static atomic_uint allocations, receives, sends;
static __thread bool is_client;

static void
count (atomic_uint *counter)
{
  if (atomic_load (&counting) && !is_client)
    atomic_fetch_add (counter, 1);
}

extern void *__libc_malloc (size_t);
extern void *__libc_calloc (size_t, size_t);
extern void *__libc_realloc (void *, size_t);
extern void *__libc_memalign (size_t, size_t);

void *
malloc (size_t size)
{
  count (&allocations);
  return __libc_malloc (size);
}

void *
calloc (size_t nr, size_t size)
{
  count (&allocations);
  return __libc_calloc (nr, size);
}

void *
realloc (void *p, size_t size)
{
  count (&allocations);
  return __libc_realloc (p, size);
}

int
posix_memalign (void **p, size_t alignment, size_t size)
{
  count (&allocations);
  *p = __libc_memalign (alignment, size);
  return *p == NULL ? ENOMEM : 0;
}

void *
mmap (void *p, size_t size, int prot, int flags, int fd, off_t offset)
{
  static void *(*next) (void *, size_t, int, int, int, off_t);

  if (next == NULL)
    *(void **) &next = dlsym (RTLD_NEXT, "mmap");
  count (&allocations);
  return next (p, size, prot, flags, fd, offset);
}

ssize_t
recvmsg (int fd, struct msghdr *msg, int flags)
{
  static ssize_t (*next) (int, struct msghdr *, int);
  ssize_t r;

  if (next == NULL)
    *(void **) &next = dlsym (RTLD_NEXT, "recvmsg");
  r = next (fd, msg, flags);
  if (r != -1)
    count (&receives);
  return r;
}

ssize_t
sendmsg (int fd, const struct msghdr *msg, int flags)
{
  static ssize_t (*next) (int, const struct msghdr *, int);

  if (next == NULL)
    *(void **) &next = dlsym (RTLD_NEXT, "sendmsg");
  count (&sends);
  return next (fd, msg, flags);
}

static struct disk *disk;
static struct nbd_server *server;
static int client;

/* On an abstract address, of the kernel's choice. */
static void
serve (void)
{
  const struct nbd_options options = { .readonly = false };
  struct sockaddr_un address = { .sun_family = AF_UNIX };
  socklen_t length = sizeof address;
  const int fd = socket (AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0);

  server = nbd_server_new (disk, &options);
  assert_non_null (server);
  assert_int_equal (bind (fd, (struct sockaddr *) &address,
                          sizeof (sa_family_t)), 0);
  assert_int_equal (getsockname (fd, (struct sockaddr *) &address, &length),
                    0);
  assert_int_equal (listen (fd, 1), 0);
  assert_int_equal (nbd_server_add_socket (server, fd), 0);
  assert_int_equal (nbd_server_start (server), 0);
  client = socket (AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0);
  assert_int_equal (connect (client, (struct sockaddr *) &address, length), 0);
}

static void
say (const void *data, size_t size)
{
  assert_int_equal (send (client, data, size, MSG_NOSIGNAL), size);
}

static void
hear (void *data, size_t size)
{
  assert_int_equal (recv (client, data, size, MSG_WAITALL), size);
}

static void
negotiate (void)
{
  const uint32_t cflags =
    htobe32 (NBD_FLAG_FIXED_NEWSTYLE | NBD_FLAG_NO_ZEROES);
  const struct nbd_new_option option = {
    .magic = htobe64 (NBD_OPTION_MAGIC),
    .option = htobe32 (NBD_OPT_EXPORT_NAME),
  };
  struct nbd_new_handshake greeting;
  uint8_t export[offsetof (struct nbd_export_name_reply, zeroes)];

  hear (&greeting, sizeof greeting);
  say (&cflags, sizeof cflags);
  say (&option, sizeof option);
  hear (export, sizeof export);
}

static int
setup (void **state)
{
  static const char *const names[] = { "monday" };
  const struct disk_options options = {
    .cache_size = 8 << 20, .require = names, .nr_require = 1,
  };
  struct container *image = image_create ("-o preallocation=metadata", "16M",
                                          UINT64_C (64) << 20);

  (void) state;
  is_client = true;
  report_sink = report_if_verbose;
  disk = disk_open (image, &options);
  assert_non_null (disk);
  serve ();
  negotiate ();
  return 0;
}

static int
teardown (void **state)
{
  (void) state;
  close (client);
  nbd_server_stop (server, 1000);
  nbd_server_free (server);
  assert_int_equal (disk_stop (disk), 0);
  disk_close (disk);
  return 0;
}

/* So many requests at once, and their replies. */
static void
exchange (uint16_t type, unsigned nr, uint64_t *seed)
{
  static struct {
    struct nbd_request request;
    uint8_t data[BLOCK];
  } __attribute__ ((packed)) out[BATCH];
  static uint8_t data[BLOCK];
  uint8_t *p = (uint8_t *) out;
  struct nbd_simple_reply reply;

  for (unsigned i = 0; i < nr; ++i) {
    const struct nbd_request request = {
      .magic = htobe32 (NBD_REQUEST_MAGIC), .type = htobe16 (type),
      .cookie = i,
      .offset = type == NBD_CMD_FLUSH ? 0
        : htobe64 (random_next (seed) % (DISK_SIZE / BLOCK) * BLOCK),
      .length = type == NBD_CMD_FLUSH ? 0 : htobe32 (BLOCK),
    };

    memcpy (p, &request, sizeof request);
    p += sizeof request;
    if (type == NBD_CMD_WRITE) {
      memset (p, i + 1, BLOCK);
      p += BLOCK;
    }
  }
  say (out, p - (uint8_t *) out);
  for (unsigned i = 0; i < nr; ++i) {
    hear (&reply, sizeof reply);
    assert_int_equal (be32toh (reply.magic), NBD_SIMPLE_REPLY_MAGIC);
    assert_int_equal (reply.error, 0);
    if (type == NBD_CMD_READ)
      hear (data, sizeof data);
  }
}

static void
run_rounds (uint16_t type, unsigned nr)
{
  uint64_t seed = 1;

  for (unsigned i = 0; i < ROUNDS; ++i)
    exchange (type, nr, &seed);
}

/* After some rounds in which everything is touched once: is memory
 * allocated for so many requests at once of this kind, and how many calls
 * a round receive and send?  On a busy machine a request may seem to hang
 * and have another thread started, and a batch be answered in two.  So
 * this is tried again.
 */
static bool
is_cheap (uint16_t type, unsigned nr)
{
  run_rounds (type, nr);
  for (int tries = 0; tries < 20; ++tries) {
    allocations = receives = sends = 0;
    atomic_store (&counting, true);
    run_rounds (type, nr);
    atomic_store (&counting, false);
    assert_true (receives > 0 && sends > 0);
    if (allocations == 0 && receives <= 2 * ROUNDS && sends <= 2 * ROUNDS)
      return true;
  }
  print_message ("%u rounds of %u: %u allocations, received by %u calls, "
                 "answered by %u\n",
                 ROUNDS, nr, allocations, receives, sends);
  return false;
}

static void
test_single_requests (void **state)
{
  (void) state;
  assert_true (is_cheap (NBD_CMD_WRITE, 1));
  assert_true (is_cheap (NBD_CMD_READ, 1));
  assert_true (is_cheap (NBD_CMD_FLUSH, 1));
}

static void
test_batches (void **state)
{
  (void) state;
  assert_true (is_cheap (NBD_CMD_WRITE, BATCH));
  assert_true (is_cheap (NBD_CMD_READ, BATCH));
}

/* The counters count, and not what the client does. */
static void
test_counters (void **state)
{
  (void) state;
  allocations = 0;
  atomic_store (&counting, true);
  is_client = false;
  free (malloc (1));
  is_client = true;
  free (malloc (1));
  atomic_store (&counting, false);
  assert_int_equal (allocations, 1);
}

int
main (void)
{
  const struct CMUnitTest tests[] = {
    cmocka_unit_test (test_counters),
    cmocka_unit_test (test_single_requests),
    cmocka_unit_test (test_batches),
  };

  return cmocka_run_group_tests (tests, setup, teardown);
}
