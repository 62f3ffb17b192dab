/* nbdkit-dirty-bitmap-filter
 * SPDX-License-Identifier: BSD-3-Clause
 * Copyright the nbdkit-dirty-bitmap-filter authors
 */

/* The input is all that a client says.  There is one server for all
 * inputs, over a fake disk; each input is a connection of its own, and
 * the next begins when the server is done with it.  The replies are
 * read as they come.  Whatever was said, the server ends the connection
 * when the client has said all, and has no thread or memory for it then.
 */

#include <config.h>

#include <errno.h>
#include <fcntl.h>
#include <poll.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/un.h>
#include <unistd.h>

#include "common/bytes.h"
#include "common/cleanup.h"
#include "fake-disk.h"
#include "fuzz.h"
#include "nbd/connection.h"
#include "nbd/extents.h"
#include "nbd/server.h"

const char fuzz_target[] = "server";

/* Large enough for what the server calls a large request, with an end
 * that is not aligned.
 */
#define DISK_SIZE ((1 << 20) + 1537)

/* So few extents in a reply that many requests have more. */
#define MAX_EXTENTS 40

static struct disk *disk;
static struct nbd_server *server;
static struct sockaddr_un address;
static socklen_t address_length;

/* Some places of the disk fail, each in a way of its own. */
static int
fail_some (struct disk *d, enum fake_op op, uint64_t offset, uint64_t count)
{
  static const int errors[] = { EIO, ENOSPC, ENOTSUP, EPERM, ENOMEM, EROFS,
                                ESHUTDOWN, EINVAL, EOVERFLOW };

  (void) d;
  (void) op;
  (void) count;
  return offset % 4096 < 4000 ? 0
    : errors[offset / 4096 % (sizeof errors / sizeof errors[0])];
}

static struct disk *
make_disk (void)
{
  struct disk *d = fake_disk_new (DISK_SIZE);

  d->hook = fail_some;
  d->block_size = 4096;
  d->flags = calloc (DISK_SIZE / d->block_size + 1, 1);
  if (d->flags == NULL)
    abort ();
  for (size_t i = 0; i <= DISK_SIZE / d->block_size; ++i)
    d->flags[i] = i / 5 % 4;
  fake_disk_add_bitmap (d, "monday", 512);
  fake_disk_add_bitmap (d, "tuesday", 65536);
  fake_disk_add_bitmap (d, "a name: with / odd ,things", 4096);
  for (size_t i = 0; i < DISK_SIZE / 512; ++i)
    d->bitmaps[0].dirty[i] = i % 7 < 3;
  for (size_t i = 0; i < DISK_SIZE / 4096; ++i)
    d->bitmaps[2].dirty[i] = i % 100 == 99;
  fake_disk_begin_view (d, "monday");
  return d;
}

int
LLVMFuzzerInitialize (int *argc, char ***argv)
{
  const struct nbd_options options = {
    .export = { .description = "a fake disk", .list_deltas = true },
  };
  int fd = socket (AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0);

  (void) argc;
  (void) argv;
  fuzz_quiet ();
  dirty_bitmap_debug_request = 1;
  extents_max = MAX_EXTENTS;
  /* An abstract address, of the kernel's choice. */
  address.sun_family = AF_UNIX;
  address_length = sizeof address;
  disk = make_disk ();
  server = nbd_server_new (disk, &options);
  if (fd == -1 || server == NULL ||
      bind (fd, (struct sockaddr *) &address, sizeof (sa_family_t)) == -1 ||
      getsockname (fd, (struct sockaddr *) &address, &address_length) == -1 ||
      listen (fd, 1) == -1 || nbd_server_add_socket (server, fd) == -1 ||
      nbd_server_start (server) == -1)
    fuzz_fail ("cannot start the server");
  return 0;
}

void
fuzz_finish (void)
{
  nbd_server_stop (server, 1000);
  nbd_server_free (server);
  fake_disk_free (disk);
}

/* Say it all, and take what comes, until the server ends it. */
static void
talk (int fd, const uint8_t *data, size_t size)
{
  static uint8_t buf[65536];
  struct pollfd p = { .fd = fd, .events = POLLIN | POLLOUT };
  bool first = true;

  for (;;) {
    /* A signal of libFuzzer's clock. */
    if (poll (&p, 1, -1) == -1)
      continue;
    if (p.revents & POLLIN) {
      const ssize_t n = recv (fd, buf, sizeof buf, MSG_DONTWAIT);

      if (n == 0 || (n == -1 && errno != EAGAIN))
        return;
      if (n > 0 && first)
        FUZZ_CHECK (n >= 8 && get_be64 (buf) == NBD_MAGIC, "no greeting");
      first = n == -1 && first;
    }
    else if (p.revents & (POLLHUP | POLLERR))
      return;
    if ((p.revents & POLLOUT) && p.events & POLLOUT) {
      const ssize_t n = size == 0 ? 0
        : send (fd, data, size, MSG_DONTWAIT | MSG_NOSIGNAL);

      if (n > 0) {
        data += n;
        size -= n;
      }
      else if (n == -1 && errno != EAGAIN)
        size = 0;
      if (size == 0) {
        shutdown (fd, SHUT_WR);
        p.events = POLLIN;
      }
    }
  }
}

/* It has closed the connection, and its threads have ended but for what
 * is left of the last.
 */
static void
wait_for_end (void)
{
  ACQUIRE_LOCK_FOR_CURRENT_SCOPE (&server->lock);
  while (server->nr_live > 0)
    pthread_cond_wait (&server->changed, &server->lock);
  FUZZ_CHECK (atomic_load (&server->teams.nr_extra_threads) == 0,
              "threads are left");
}

int
LLVMFuzzerTestOneInput (const uint8_t *data, size_t size)
{
  CLEANUP_CLOSE int fd = socket (AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0);

  while (connect (fd, (struct sockaddr *) &address, address_length) == -1)
    FUZZ_CHECK (errno == EINTR, "connect: %s", strerror (errno));
  talk (fd, data, size);
  wait_for_end ();
  return 0;
}

/* ---------------------------------------------------------------------
 * A mutator that knows what a message is: the flags, options, requests.
 */

#define MAX_MESSAGES 128

struct message {
  const uint8_t *bytes;
  size_t length;
};

struct dialogue {
  struct message message[MAX_MESSAGES];
  unsigned nr;
  bool extended;                /* headers are asked for */
  uint64_t random;
};

static uint64_t
any (struct dialogue *s, uint64_t below)
{
  uint64_t z = s->random += UINT64_C (0x9e3779b97f4a7c15);

  z = (z ^ z >> 30) * UINT64_C (0xbf58476d1ce4e5b9);
  z = (z ^ z >> 27) * UINT64_C (0x94d049bb133111eb);
  z ^= z >> 31;
  return below == 0 ? 0 : z % below;
}

static bool
is_option (const uint8_t *p, size_t left)
{
  return left >= sizeof (struct nbd_new_option) &&
    get_be64 (p) == NBD_OPTION_MAGIC;
}

static bool
is_request (const uint8_t *p, size_t left)
{
  return left >= sizeof (struct nbd_request) &&
    get_be32 (p) == NBD_REQUEST_MAGIC;
}

static bool
is_extended_request (const uint8_t *p, size_t left)
{
  return left >= sizeof (struct nbd_extended_request) &&
    get_be32 (p) == NBD_EXTENDED_REQUEST_MAGIC;
}

/* Is the length in an extended request that of a payload? */
static bool
has_payload (uint16_t type, uint16_t flags)
{
  return type == NBD_CMD_WRITE || (flags & NBD_CMD_FLAG_PAYLOAD_LEN) != 0;
}

static size_t
message_length (const uint8_t *p, size_t left, bool first)
{
  uint64_t n = left;

  if (first)
    n = 4;
  else if (is_option (p, left))
    n = sizeof (struct nbd_new_option) + (uint64_t) get_be32 (p + 12);
  else if (is_request (p, left))
    n = sizeof (struct nbd_request)
      + (get_be16 (p + 6) == NBD_CMD_WRITE ? get_be32 (p + 24) : 0);
  else if (is_extended_request (p, left)) {
    n = sizeof (struct nbd_extended_request);
    if (has_payload (get_be16 (p + 6), get_be16 (p + 4)))
      n += min_u64 (get_be64 (p + 24), left);
  }
  return min_u64 (n, left);
}

static void
parse (struct dialogue *s, const uint8_t *data, size_t size)
{
  size_t at = 0;

  for (s->nr = 0; at < size && s->nr < MAX_MESSAGES; ++s->nr) {
    struct message *m = &s->message[s->nr];

    m->bytes = data + at;
    m->length = message_length (data + at, size - at, at == 0);
    if (at > 0 && is_option (m->bytes, m->length) &&
        get_be32 (m->bytes + 8) == NBD_OPT_EXTENDED_HEADERS)
      s->extended = true;
    at += m->length;
  }
}

/* A payload that selects contexts: those that there are, or nearly. */
static size_t
put_selection (struct dialogue *s, uint8_t *p, uint64_t length)
{
  const size_t nr = any (s, 6);

  put_be64 (p, length);
  for (size_t i = 0; i < nr; ++i)
    put_be32 (p + 8 + 4 * i, any (s, 7));
  return 8 + 4 * nr;
}

/* The same as make_request, with an extended header. */
static size_t
make_extended_request (struct dialogue *s, uint8_t *p, uint16_t type,
                       uint64_t offset, uint64_t length)
{
  const size_t header = sizeof (struct nbd_extended_request);
  uint16_t flags = any (s, 2) ? 0 : any (s, 32);

  if (type == NBD_CMD_WRITE ? any (s, 2)
      : type == NBD_CMD_BLOCK_STATUS ? any (s, 2) : any (s, 10) == 0)
    flags |= NBD_CMD_FLAG_PAYLOAD_LEN;
  if (has_payload (type, flags)) {
    if (type == NBD_CMD_BLOCK_STATUS)
      length = put_selection (s, p + header, length);
    else {
      length = min_u64 (length, 1000);
      memset (p + header, 0x58, length);
    }
  }
  put_be32 (p, NBD_EXTENDED_REQUEST_MAGIC);
  put_be16 (p + 4, flags);
  put_be16 (p + 6, type);
  put_be64 (p + 8, any (s, 1000));
  put_be64 (p + 16, type == NBD_CMD_FLUSH ? 0 : offset);
  put_be64 (p + 24, type == NBD_CMD_FLUSH ? 0 : length);
  return header + (has_payload (type, flags) && type != NBD_CMD_FLUSH
                   ? length : 0);
}

/* A request of any kind, within the disk or just not. */
static size_t
make_request (struct dialogue *s, uint8_t *p, size_t max)
{
  const uint16_t type = any (s, 9);
  const uint64_t offset = any (s, 8) == 0
    ? DISK_SIZE - 2 + any (s, 4) : any (s, DISK_SIZE);
  uint32_t length = any (s, 3) ? any (s, 2000) : any (s, DISK_SIZE);

  if (any (s, 3))
    length = min_u64 (length, DISK_SIZE - min_u64 (offset, DISK_SIZE));
  if (s->extended && any (s, 10) > 0)
    return make_extended_request (s, p, type, offset,
                                  any (s, 10) ? length
                                  : length * UINT64_C (0x100000001));
  if (type == NBD_CMD_WRITE)
    length = min_u64 (length, any (s, 1000));
  if (max < sizeof (struct nbd_request) + length && type == NBD_CMD_WRITE)
    length = 0;
  put_be32 (p, NBD_REQUEST_MAGIC);
  put_be16 (p + 4, any (s, 2) ? 0 : any (s, 32));
  put_be16 (p + 6, type);
  put_be64 (p + 8, any (s, 1000));
  put_be64 (p + 16, type == NBD_CMD_FLUSH ? 0 : offset);
  put_be32 (p + 24, type == NBD_CMD_FLUSH ? 0 : length);
  if (type != NBD_CMD_WRITE)
    return sizeof (struct nbd_request);
  memset (p + sizeof (struct nbd_request), 0x57, length);
  return sizeof (struct nbd_request) + length;
}

/* An option, with a name and queries if it can have such. */
static size_t
make_option (struct dialogue *s, uint8_t *p)
{
  static const char *const queries[] = {
    "base:allocation", "qemu:dirty-bitmap:monday", "qemu:", "base:",
    "qemu:dirty-bitmap:", "qemu:allocation-depth", "other:", "",
    "qemu:dirty-bitmap:a name: with / odd ,things",
  };
  const uint32_t option = 1 + any (s, 11);
  uint32_t n = 0;

  if (option == NBD_OPT_INFO || option == NBD_OPT_GO) {
    put_be32 (p + 16, 0);
    put_be16 (p + 20, 2);
    put_be16 (p + 22, any (s, 5));
    put_be16 (p + 24, any (s, 5));
    n = 10;
  }
  else if (option == NBD_OPT_LIST_META_CONTEXT ||
           option == NBD_OPT_SET_META_CONTEXT) {
    const uint32_t nr = any (s, 4);

    put_be32 (p + 16, 0);
    put_be32 (p + 20, nr);
    n = 8;
    for (uint32_t i = 0; i < nr; ++i) {
      const char *query = queries[any (s, sizeof queries
                                       / sizeof queries[0])];
      const uint32_t length = strlen (query);

      put_be32 (p + 16 + n, length);
      memcpy (p + 20 + n, query, length);
      n += 4 + length;
    }
  }
  put_be64 (p, NBD_OPTION_MAGIC);
  put_be32 (p + 8, option);
  put_be32 (p + 12, n);
  return 16 + n;
}

static void
insert (struct dialogue *s, unsigned at, const uint8_t *bytes, size_t length)
{
  if (s->nr == MAX_MESSAGES)
    return;
  memmove (&s->message[at + 1], &s->message[at],
           (s->nr - at) * sizeof s->message[0]);
  s->message[at] = (struct message) { bytes, length };
  s->nr++;
}

/* Make an option's or a payload's length that of what follows. */
static void
mend_length (uint8_t *p, size_t length)
{
  if (is_option (p, length))
    put_be32 (p + 12, length - sizeof (struct nbd_new_option));
  else if (is_request (p, length) && get_be16 (p + 6) == NBD_CMD_WRITE)
    put_be32 (p + 24, length - sizeof (struct nbd_request));
  else if (is_extended_request (p, length) &&
           has_payload (get_be16 (p + 6), get_be16 (p + 4)))
    put_be64 (p + 24, length - sizeof (struct nbd_extended_request));
}

static size_t
put (struct dialogue *s, uint8_t *data, size_t max, unsigned to_mutate)
{
  size_t at = 0;

  for (unsigned i = 0; i < s->nr; ++i) {
    size_t length = s->message[i].length;

    if (length > max - at)
      break;
    memcpy (data + at, s->message[i].bytes, length);
    if (i == to_mutate && length > 0) {
      const size_t room = any (s, 3) ? length : min_u64 (length + 32,
                                                         max - at);

      length = LLVMFuzzerMutate (data + at, length, room);
      if (any (s, 4) > 0)
        mend_length (data + at, length);
    }
    at += length;
  }
  return at;
}

size_t
LLVMFuzzerCustomMutator (uint8_t *data, size_t size, size_t max,
                         unsigned seed)
{
  static uint8_t old[1 << 20], new[8192];
  struct dialogue s = { .random = seed };
  unsigned i, to_mutate = MAX_MESSAGES;

  if (size == 0 || size > sizeof old || any (&s, 20) == 0)
    return LLVMFuzzerMutate (data, size, max);
  memcpy (old, data, size);
  parse (&s, old, size);
  i = any (&s, s.nr);
  switch (any (&s, 7)) {
  case 0:
    insert (&s, i + 1, new, make_request (&s, new, sizeof new));
    break;
  case 1:
    insert (&s, i + 1, new, make_option (&s, new));
    break;
  case 2:
    insert (&s, i, s.message[i].bytes, s.message[i].length);
    break;
  case 3:
    s.message[i].length = 0;
    break;
  case 4:
    insert (&s, s.nr, new, make_request (&s, new, sizeof new));
    break;
  default:
    to_mutate = i;
  }
  return put (&s, data, max, to_mutate);
}
