/* nbdkit-dirty-bitmap-filter
 * SPDX-License-Identifier: BSD-3-Clause
 * Copyright the nbdkit-dirty-bitmap-filter authors
 */

#include <config.h>

#include <dirent.h>
#include <errno.h>
#include <poll.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/un.h>
#include <time.h>
#include <unistd.h>

#include "common/bytes.h"
#include "common/cleanup.h"
#include "nbd/server.h"
#include "nbd-client.h"
#include "tls-relay.h"

/* What a server that works never takes. */
#define TIMEOUT_SECONDS 30

bool fixture_over_tls;
bool client_wants_extended;

/* By descriptor: has it negotiated extended headers? */
static bool is_extended[1024];

struct nbd_tls *
fixture_load_tls (const struct fixture *f, bool required)
{
  char path[100];
  struct nbd_tls_options options = {
    .required = required,
    .psk_file = path,
    .priority = "NORMAL",
  };
  struct nbd_tls *tls;
  FILE *fp;

  snprintf (path, sizeof path, "%s/keys", f->dir);
  fp = fopen (path, "w");
  assert_non_null (fp);
  fprintf (fp, "%s:%s\n", RELAY_USER, RELAY_KEY);
  assert_int_equal (fclose (fp), 0);
  tls = nbd_tls_load (&options);
  assert_non_null (tls);
  return tls;
}

void
fixture_init (struct fixture *f, uint64_t size)
{
  const char *tmp = getenv ("TMPDIR");

  f->disk = fake_disk_new (size);
  f->server = NULL;
  f->tls = NULL;
  memset (&f->limits, 0, sizeof f->limits);
  f->export_name = NULL;
  f->list_deltas = false;
  f->paused = false;
  snprintf (f->dir, sizeof f->dir, "%s/nbdXXXXXX",
            tmp != NULL && strlen (tmp) < 40 ? tmp : "/tmp");
  assert_non_null (mkdtemp (f->dir));
  snprintf (f->path, sizeof f->path, "%s/socket", f->dir);
}

void
fixture_start (struct fixture *f, bool readonly)
{
  struct nbd_options options = {
    .readonly = readonly,
    .export = { f->export_name, "a fake disk", f->list_deltas },
  };
  struct sockaddr_un addr = { .sun_family = AF_UNIX };
  int fd = socket (AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0);

  strcpy (addr.sun_path, f->path);
  assert_return_code (fd, errno);
  assert_return_code (bind (fd, (struct sockaddr *) &addr, sizeof addr),
                      errno);
  assert_return_code (listen (fd, SOMAXCONN), errno);
  if (fixture_over_tls && f->tls == NULL)
    f->tls = fixture_load_tls (f, true);
  options.tls = f->tls;
  options.limits = f->limits;
  f->server = nbd_server_new (f->disk, &options);
  assert_non_null (f->server);
  assert_int_equal (nbd_server_add_socket (f->server, fd), 0);
  assert_int_equal (nbd_server_start (f->server), 0);
}

void
fixture_stop (struct fixture *f)
{
  if (f->paused)                /* where a test has failed */
    fixture_resume_monitor (f);
  nbd_server_stop (f->server, 1000);
  nbd_server_free (f->server);
  tls_relay_end ();
  nbd_tls_free (f->tls);
  fake_disk_free (f->disk);
  unlink (f->path);
  snprintf (f->path, sizeof f->path, "%s/keys", f->dir);
  unlink (f->path);
  rmdir (f->dir);
}

int
fixture_connect (const struct fixture *f)
{
  struct sockaddr_un addr = { .sun_family = AF_UNIX };
  const struct timeval tv = { .tv_sec = TIMEOUT_SECONDS };
  int fd = socket (AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0);

  strcpy (addr.sun_path, f->path);
  assert_return_code (fd, errno);
  assert_return_code (connect (fd, (struct sockaddr *) &addr, sizeof addr),
                      errno);
  if (fixture_over_tls)
    fd = tls_relay_start (fd);
  assert_in_range (fd, 0, sizeof is_extended - 1);
  is_extended[fd] = false;
  setsockopt (fd, SOL_SOCKET, SO_RCVTIMEO, &tv, sizeof tv);
  setsockopt (fd, SOL_SOCKET, SO_SNDTIMEO, &tv, sizeof tv);
  return fd;
}

size_t
fixture_memory (const struct fixture *f)
{
  struct budget *b = &f->server->budget;

  ACQUIRE_LOCK_FOR_CURRENT_SCOPE (&b->lock);
  return b->used;
}

/* The monitor looks at the connections under this lock. */
void
fixture_pause_monitor (struct fixture *f)
{
  pthread_mutex_lock (&f->server->lock);
  f->paused = true;
}

void
fixture_resume_monitor (struct fixture *f)
{
  f->paused = false;
  pthread_mutex_unlock (&f->server->lock);
}

bool
is_instrumented (void)
{
  const char *preload = getenv ("LD_PRELOAD");

#if defined __SANITIZE_ADDRESS__ || defined __SANITIZE_THREAD__
  return true;
#endif
  return preload != NULL && strstr (preload, "valgrind") != NULL;
}

unsigned
milliseconds (void)
{
  struct timespec ts;

  clock_gettime (CLOCK_MONOTONIC, &ts);
  return ts.tv_sec * 1000 + ts.tv_nsec / 1000000;
}

unsigned
count_threads (void)
{
  DIR *dir = opendir ("/proc/self/task");
  unsigned n = 0;

  assert_non_null (dir);
  while (readdir (dir) != NULL)
    n++;
  closedir (dir);
  return n - 2;
}

void
send_bytes (int fd, const void *buf, size_t count)
{
  const uint8_t *p = buf;

  while (count > 0) {
    ssize_t r = send (fd, p, count, MSG_NOSIGNAL);

    if (r == -1)
      fail_msg ("send: %s", strerror (errno));
    p += r;
    count -= r;
  }
}

void
recv_bytes (int fd, void *buf, size_t count)
{
  uint8_t *p = buf;

  while (count > 0) {
    ssize_t r = recv (fd, p, count, 0);

    if (r <= 0)
      fail_msg ("recv: %s", r == 0 ? "end of stream" : strerror (errno));
    p += r;
    count -= r;
  }
}

void
expect_end (int fd)
{
  uint8_t byte;
  ssize_t r = recv (fd, &byte, 1, 0);

  assert_true (r == 0 || (r == -1 && errno == ECONNRESET));
}

void
client_greet (int fd, uint32_t cflags)
{
  struct nbd_new_handshake greeting;

  recv_bytes (fd, &greeting, sizeof greeting);
  assert_true (be64toh (greeting.nbdmagic) == NBD_MAGIC);
  assert_true (be64toh (greeting.version) == NBD_OPTION_MAGIC);
  assert_int_equal (be16toh (greeting.gflags),
                    NBD_FLAG_FIXED_NEWSTYLE | NBD_FLAG_NO_ZEROES);
  cflags = htobe32 (cflags);
  send_bytes (fd, &cflags, sizeof cflags);
}

void
send_option (int fd, uint32_t option, const void *data, uint32_t length)
{
  const struct nbd_new_option header = {
    .magic = htobe64 (NBD_OPTION_MAGIC),
    .option = htobe32 (option),
    .length = htobe32 (length),
  };

  send_bytes (fd, &header, sizeof header);
  send_bytes (fd, data, length);
}

void
recv_option_reply (int fd, struct option_reply *reply)
{
  struct nbd_option_reply header;

  recv_bytes (fd, &header, sizeof header);
  assert_true (be64toh (header.magic) == NBD_OPTION_REPLY_MAGIC);
  reply->option = be32toh (header.option);
  reply->type = be32toh (header.reply);
  reply->length = be32toh (header.length);
  assert_true (reply->length < sizeof reply->data);
  recv_bytes (fd, reply->data, reply->length);
  reply->data[reply->length] = '\0';
}

void
expect_option_reply (int fd, uint32_t option, uint32_t type,
                     struct option_reply *reply)
{
  struct option_reply local;

  if (reply == NULL)
    reply = &local;
  recv_option_reply (fd, reply);
  assert_int_equal (reply->option, option);
  assert_int_equal (reply->type, type);
}

uint32_t
make_context_query (uint8_t *buf, const char *name,
                    const char *const *queries)
{
  uint32_t used = 0, nr = 0;

  put_be32 (buf, strlen (name));
  memcpy (buf + 4, name, strlen (name));
  used = 4 + strlen (name) + 4;
  for (; queries[nr] != NULL; ++nr) {
    size_t n = strlen (queries[nr]);

    put_be32 (buf + used, n);
    memcpy (buf + used + 4, queries[nr], n);
    used += 4 + n;
  }
  put_be32 (buf + 4 + strlen (name), nr);
  return used;
}

void
client_go (int fd, const char *name, struct option_reply *export)
{
  uint8_t buf[8192];
  uint32_t n = strlen (name);
  struct option_reply reply;

  put_be32 (buf, n);
  memcpy (buf + 4, name, n);
  put_be16 (buf + 4 + n, 0);
  send_option (fd, NBD_OPT_GO, buf, 4 + n + 2);
  expect_option_reply (fd, NBD_OPT_GO, NBD_REP_INFO, &reply);
  assert_int_equal (get_be16 (reply.data), NBD_INFO_BLOCK_SIZE);
  expect_option_reply (fd, NBD_OPT_GO, NBD_REP_INFO, &reply);
  assert_int_equal (get_be16 (reply.data), NBD_INFO_EXPORT);
  assert_int_equal (reply.length, sizeof (struct nbd_info_export));
  if (export != NULL)
    *export = reply;
  expect_option_reply (fd, NBD_OPT_GO, NBD_REP_ACK, NULL);
}

void
client_structured (int fd)
{
  send_option (fd, NBD_OPT_STRUCTURED_REPLY, NULL, 0);
  expect_option_reply (fd, NBD_OPT_STRUCTURED_REPLY, NBD_REP_ACK, NULL);
}

void
client_extended (int fd)
{
  send_option (fd, NBD_OPT_EXTENDED_HEADERS, NULL, 0);
  expect_option_reply (fd, NBD_OPT_EXTENDED_HEADERS, NBD_REP_ACK, NULL);
  is_extended[fd] = true;
}

void
client_set_contexts (int fd, const char *const *queries, unsigned expected)
{
  uint8_t buf[65536];
  uint32_t n = make_context_query (buf, "", queries);

  send_option (fd, NBD_OPT_SET_META_CONTEXT, buf, n);
  for (unsigned i = 0; i < expected; ++i)
    expect_option_reply (fd, NBD_OPT_SET_META_CONTEXT,
                         NBD_REP_META_CONTEXT, NULL);
  expect_option_reply (fd, NBD_OPT_SET_META_CONTEXT, NBD_REP_ACK, NULL);
}

int
client_open (const struct fixture *f, const char *const *queries)
{
  int fd = fixture_connect (f);
  unsigned n = 0;

  client_greet (fd, NBD_FLAG_FIXED_NEWSTYLE | NBD_FLAG_NO_ZEROES);
  if (client_wants_extended)
    client_extended (fd);
  else
    client_structured (fd);
  if (queries != NULL) {
    while (queries[n] != NULL)
      n++;
    client_set_contexts (fd, queries, n);
  }
  client_go (fd, "", NULL);
  return fd;
}

void
put_request (void *buf, uint16_t flags, uint16_t type,
             uint64_t cookie, uint64_t offset, uint32_t length)
{
  const struct nbd_request request = {
    .magic = htobe32 (NBD_REQUEST_MAGIC),
    .flags = htobe16 (flags),
    .type = htobe16 (type),
    .cookie = cookie,
    .offset = htobe64 (offset),
    .length = htobe32 (length),
  };

  memcpy (buf, &request, sizeof request);
}

void
put_extended_request (void *buf, uint16_t flags, uint16_t type,
                      uint64_t cookie, uint64_t offset, uint64_t length)
{
  const struct nbd_extended_request request = {
    .magic = htobe32 (NBD_EXTENDED_REQUEST_MAGIC),
    .flags = htobe16 (flags),
    .type = htobe16 (type),
    .cookie = cookie,
    .offset = htobe64 (offset),
    .length = htobe64 (length),
  };

  memcpy (buf, &request, sizeof request);
}

void
send_request (int fd, uint16_t flags, uint16_t type,
              uint64_t cookie, uint64_t offset, uint64_t length)
{
  uint8_t buf[sizeof (struct nbd_extended_request)];

  if (is_extended[fd]) {
    put_extended_request (buf, flags, type, cookie, offset, length);
    send_bytes (fd, buf, sizeof (struct nbd_extended_request));
    return;
  }
  assert_true (length <= UINT32_MAX);
  put_request (buf, flags, type, cookie, offset, length);
  send_bytes (fd, buf, sizeof (struct nbd_request));
}

/* The rest of its header. */
static void
recv_chunk_header (int fd, struct reply *reply)
{
  struct nbd_structured_reply h;

  recv_bytes (fd, (uint8_t *) &h + 4, sizeof h - 4);
  reply->flags = be16toh (h.flags);
  reply->type = be16toh (h.type);
  reply->cookie = h.cookie;
  reply->length = be32toh (h.length);
}

static void
recv_extended_header (int fd, struct reply *reply)
{
  struct nbd_extended_reply h;

  recv_bytes (fd, (uint8_t *) &h + 4, sizeof h - 4);
  reply->flags = be16toh (h.flags);
  reply->type = be16toh (h.type);
  reply->cookie = h.cookie;
  reply->offset = be64toh (h.offset);
  assert_true (be64toh (h.length) <= UINT32_MAX);
  reply->length = be64toh (h.length);
}

static void
recv_chunk (int fd, struct reply *reply)
{
  if (is_extended[fd])
    recv_extended_header (fd, reply);
  else
    recv_chunk_header (fd, reply);
  reply->structured = true;
  reply->data = malloc (reply->length + 1);
  assert_non_null (reply->data);
  recv_bytes (fd, reply->data, reply->length);
  if (reply->type & 0x8000) {
    assert_true (reply->length >= 6);
    reply->error = get_be32 (reply->data);
    assert_int_not_equal (reply->error, 0);
    assert_int_equal (reply->length, 6 + get_be16 (reply->data + 4) +
                      (reply->type == NBD_REPLY_TYPE_ERROR_OFFSET ? 8 : 0));
  }
}

void
recv_reply (int fd, struct reply *reply, uint32_t simple_length)
{
  struct nbd_simple_reply h;

  memset (reply, 0, sizeof *reply);
  recv_bytes (fd, &h.magic, sizeof h.magic);
  if (is_extended[fd])
    assert_int_equal (be32toh (h.magic), NBD_EXTENDED_REPLY_MAGIC);
  if (is_extended[fd] || be32toh (h.magic) == NBD_STRUCTURED_REPLY_MAGIC) {
    recv_chunk (fd, reply);
    return;
  }
  assert_int_equal (be32toh (h.magic), NBD_SIMPLE_REPLY_MAGIC);
  recv_bytes (fd, (uint8_t *) &h + 4, sizeof h - 4);
  reply->cookie = h.cookie;
  reply->error = be32toh (h.error);
  if (reply->error == 0 && simple_length > 0) {
    reply->length = simple_length;
    reply->data = malloc (simple_length);
    assert_non_null (reply->data);
    recv_bytes (fd, reply->data, simple_length);
  }
}

/* Replies of which chunks have come, and the last has not. */
static _Thread_local struct partial {
  int fd;
  struct reply reply;
} partials[64];
static _Thread_local size_t nr_partials;

static struct partial *
find_partial (int fd, uint64_t cookie)
{
  for (size_t i = 0; i < nr_partials; ++i)
    if (partials[i].fd == fd && partials[i].reply.cookie == cookie)
      return &partials[i];
  return NULL;
}

/* Make zeroes of the chunk of a hole. */
static void
expand_hole (struct reply *chunk)
{
  uint32_t n;

  if (chunk->type != NBD_REPLY_TYPE_OFFSET_HOLE)
    return;
  assert_int_equal (chunk->length, 12);
  n = get_be32 (chunk->data + 8);
  assert_true (n > 0);
  chunk->data = realloc (chunk->data, 8 + n);
  assert_non_null (chunk->data);
  memset (chunk->data + 8, 0, n);
  chunk->length = 8 + n;
  chunk->type = NBD_REPLY_TYPE_OFFSET_DATA;
}

/* Put the data of a chunk behind those before it. */
static void
join_chunk (struct reply *whole, struct reply *chunk)
{
  const uint32_t n = chunk->length - 8;

  assert_int_equal (chunk->type, NBD_REPLY_TYPE_OFFSET_DATA);
  assert_true (get_be64 (chunk->data) ==
               get_be64 (whole->data) + whole->length - 8);
  whole->data = realloc (whole->data, whole->length + n + 1);
  assert_non_null (whole->data);
  memcpy (whole->data + whole->length, chunk->data + 8, n);
  whole->length += n;
  whole->flags = chunk->flags;
  free (chunk->data);
}

void
recv_whole_reply (int fd, struct reply *reply, uint32_t simple_length)
{
  for (;;) {
    struct partial *p;

    recv_reply (fd, reply, simple_length);
    if (reply->structured)
      expand_hole (reply);
    p = find_partial (fd, reply->cookie);
    if (p != NULL && reply->error == 0) {
      join_chunk (&p->reply, reply);
      *reply = p->reply;
    }
    else if (p != NULL)
      free (p->reply.data);
    if (p != NULL)
      *p = partials[--nr_partials];
    if (!reply->structured || (reply->flags & NBD_REPLY_FLAG_DONE) != 0)
      return;
    assert_int_equal (reply->type, NBD_REPLY_TYPE_OFFSET_DATA);
    assert_true (nr_partials < sizeof partials / sizeof partials[0]);
    partials[nr_partials++] = (struct partial) { fd, *reply };
  }
}

static void
take_chunk (struct read_reply *read, struct reply *chunk,
            uint64_t offset, uint32_t length, uint8_t *buf)
{
  const bool is_hole = chunk->type == NBD_REPLY_TYPE_OFFSET_HOLE;

  expand_hole (chunk);
  if (chunk->type == NBD_REPLY_TYPE_OFFSET_DATA) {
    const uint64_t at = get_be64 (chunk->data);
    const uint32_t count = chunk->length - 8;

    /* In order, so none overlap. */
    assert_true (count > 0 && at == offset + read->got);
    assert_true (count <= length - read->got);
    memcpy (buf + read->got, chunk->data + 8, count);
    read->got += count;
    read->chunk[min_u64 (read->nr_chunks++, MAX_CHUNKS - 1)] =
      (struct read_chunk) { count, is_hole };
  }
  else if (chunk->type & 0x8000) {
    read->error = chunk->error;
    if (chunk->type == NBD_REPLY_TYPE_ERROR_OFFSET)
      read->error_offset = get_be64 (chunk->data + chunk->length - 8);
    assert_int_equal (chunk->flags, NBD_REPLY_FLAG_DONE);
  }
  else
    assert_int_equal (chunk->type, NBD_REPLY_TYPE_NONE);
}

struct read_reply
recv_read (int fd, uint64_t cookie, uint64_t offset, uint32_t length,
           uint8_t *buf)
{
  struct read_reply read = { .error_offset = UINT64_MAX };
  struct reply reply;
  bool done;

  do {
    recv_reply (fd, &reply, length);
    assert_true (reply.cookie == cookie);
    if (is_extended[fd])
      assert_true (reply.offset == offset);
    done = !reply.structured || (reply.flags & NBD_REPLY_FLAG_DONE) != 0;
    if (reply.structured)
      take_chunk (&read, &reply, offset, length, buf);
    else {
      read.error = reply.error;
      if (read.error == 0) {
        memcpy (buf, reply.data, length);
        read.got = length;
        read.nr_chunks = 1;
      }
    }
    free (reply.data);
  } while (!done);
  if (read.error == 0)
    assert_int_equal (read.got, length);
  return read;
}

void
expect_error (int fd, uint64_t cookie, uint32_t error)
{
  struct reply reply;

  recv_reply (fd, &reply, 0);
  assert_int_equal (reply.cookie, cookie);
  assert_int_equal (reply.error, error);
  if (reply.structured)
    assert_int_equal (reply.flags, NBD_REPLY_FLAG_DONE);
  if (reply.structured && error == 0) {
    assert_int_equal (reply.type, NBD_REPLY_TYPE_NONE);
    assert_int_equal (reply.length, 0);
  }
  else if (reply.structured) {
    assert_int_equal (reply.type, NBD_REPLY_TYPE_ERROR);
    assert_true (reply.length > 6); /* it says why */
  }
  free (reply.data);
}

void
client_check_alive (const struct fixture *f, int fd)
{
  struct reply reply;

  send_request (fd, 0, NBD_CMD_READ, 321, 4096, 4096);
  recv_reply (fd, &reply, 0);
  assert_int_equal (reply.cookie, 321);
  assert_int_equal (reply.error, 0);
  assert_memory_equal (reply.data + 8, f->disk->data + 4096, 4096);
  free (reply.data);
}

int
client_greedy (const struct fixture *f)
{
  int fd = client_open (f, NULL);

  for (int i = 0; i < 200; ++i)
    send_request (fd, 0, NBD_CMD_READ, i, 0, i % 3 ? 1 << 20 : 4096);
  return fd;
}
