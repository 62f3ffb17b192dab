/* nbdkit-dirty-bitmap-filter
 * SPDX-License-Identifier: BSD-3-Clause
 * Copyright the nbdkit-dirty-bitmap-filter authors
 */

/* What is served under backup:BITMAP: the contexts of a view, its data and
 * extents while the disk changes, for how long it is held, and what its
 * clients get when it has ended or is broken.
 */

#include <config.h>

#include <errno.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "common/bytes.h"
#include "nbd-fixture.h"

#define SIZE (3 * 1024 * 1024)
#define BLOCK 4096              /* of zeroes and holes */
#define GRANULE 8192
#define FIXED_NO_ZEROES (NBD_FLAG_FIXED_NEWSTYLE | NBD_FLAG_NO_ZEROES)
#define LIST(...) ((const char *const[]) { __VA_ARGS__ __VA_OPT__ (,) NULL })
#define BASE "base:allocation"
#define DEPTH "qemu:allocation-depth"
#define TUESDAY "qemu:dirty-bitmap:tuesday"
#define MONDAY "qemu:dirty-bitmap:monday"
#define EVERYTHING BASE, DEPTH, TUESDAY, MONDAY

/* The ids of the view's contexts, which are all that it has. */
#define ID_BASE 0
#define ID_MONDAY 2

extern size_t extents_max;

static struct disk_view *view;
static uint8_t buf[SIZE];

/* The disk has other bytes, holes and bits than the view. */
static void
change_disk (void)
{
  memset (f.disk->data, 0xee, SIZE);
  memset (f.disk->flags, 0, SIZE / BLOCK);
  memset (f.disk->bitmaps[1].dirty, 1, SIZE / GRANULE);
}

static int
setup (void **state)
{
  (void) state;
  fixture_init (&f, SIZE);
  f.disk->block_size = BLOCK;
  f.disk->flags = calloc (SIZE / BLOCK, 1);
  assert_non_null (f.disk->flags);
  fake_disk_add_bitmap (f.disk, "tuesday", 65536);
  fake_disk_add_bitmap (f.disk, "monday", GRANULE);
  for (size_t i = 0; i < SIZE / BLOCK; ++i)
    f.disk->flags[i] = i % 24 < 10 ? 0
      : i % 24 < 20 ? DISK_EXTENT_HOLE | DISK_EXTENT_ZERO : DISK_EXTENT_ZERO;
  for (size_t i = 0; i < SIZE; ++i)
    f.disk->data[i] = f.disk->flags[i / BLOCK] != 0 ? 0 : 1 + i / 512 % 200;
  for (size_t i = 0; i < SIZE / GRANULE; ++i)
    f.disk->bitmaps[1].dirty[i] = i % 5 == 2;
  view = fake_disk_begin_view (f.disk, "monday");
  change_disk ();
  extents_max = (1 << 20) - 1;
  fixture_start (&f, false);
  return 0;
}

enum form { SIMPLE, STRUCTURED, EXTENDED };

static int
greeted (enum form form)
{
  int fd = fixture_connect (&f);

  client_greet (fd, FIXED_NO_ZEROES);
  if (form == STRUCTURED)
    client_structured (fd);
  if (form == EXTENDED)
    client_extended (fd);
  return fd;
}

/* Ask for the contexts of an export; they are these, with these ids. */
static void
check_contexts (int fd, uint32_t option, const char *export,
                const char *const *queries, const char *const *names,
                const uint32_t *ids)
{
  struct option_reply reply;
  uint8_t data[1024];
  const uint32_t n = make_context_query (data, export, queries);

  send_option (fd, option, data, n);
  for (size_t i = 0; names[i] != NULL; ++i) {
    expect_option_reply (fd, option, NBD_REP_META_CONTEXT, &reply);
    assert_string_equal ((char *) reply.data + 4, names[i]);
    assert_int_equal (get_be32 (reply.data),
                      option == NBD_OPT_SET_META_CONTEXT ? ids[i] : 0);
  }
  expect_option_reply (fd, option, NBD_REP_ACK, NULL);
}

static void
select_all (int fd)
{
  check_contexts (fd, NBD_OPT_SET_META_CONTEXT, "backup:monday",
                  LIST (EVERYTHING), LIST (BASE, MONDAY),
                  (const uint32_t[]) { ID_BASE, ID_MONDAY });
}

static int
open_view (enum form form)
{
  int fd = greeted (form);

  if (form != SIMPLE)
    select_all (fd);
  client_go (fd, "backup:monday", NULL);
  return fd;
}

static void
check_bytes (uint64_t offset, uint32_t length)
{
  assert_memory_equal (buf, view->copy->data + offset, length);
}

static struct read_reply
read_view (int fd, uint16_t flags, uint64_t offset, uint32_t length)
{
  struct read_reply reply;

  memset (buf, 0xa5, length);
  send_request (fd, flags, NBD_CMD_READ, 5, offset, length);
  reply = recv_read (fd, 5, offset, length, buf);
  return reply;
}

static unsigned
check_read (int fd, uint16_t flags, uint64_t offset, uint32_t length)
{
  const struct read_reply reply = read_view (fd, flags, offset, length);
  unsigned holes = 0;

  assert_int_equal (reply.error, 0);
  check_bytes (offset, length);
  for (unsigned i = 0; i < reply.nr_chunks; ++i)
    holes += reply.chunk[i].is_hole;
  return holes;
}

static void
test_contexts (void **state)
{
  static const struct {
    const char *query;
    const char *list[3], *set[2];
    uint32_t id;
  } rows[] = {
    { "", { NULL }, { NULL }, 0 },
    { "base:", { BASE }, { NULL }, 0 },
    { BASE, { BASE }, { BASE }, ID_BASE },
    { "base:allocation2", { NULL }, { NULL }, 0 },
    { "qemu:", { MONDAY }, { NULL }, 0 },
    { "qemu:dirty-bitmap:", { MONDAY }, { NULL }, 0 },
    { MONDAY, { MONDAY }, { MONDAY }, ID_MONDAY },
    { TUESDAY, { NULL }, { NULL }, 0 },
    { "qemu:dirty-bitmap:mon", { NULL }, { NULL }, 0 },
    { "qemu:dirty-bitmap:mondays", { NULL }, { NULL }, 0 },
    { "qemu:dirty-bitmap:backup:monday", { NULL }, { NULL }, 0 },
    { DEPTH, { NULL }, { NULL }, 0 },
  };
  int fd = greeted (STRUCTURED);

  (void) state;
  for (size_t i = 0; i < sizeof rows / sizeof rows[0]; ++i) {
    print_message ("'%s'\n", rows[i].query);
    check_contexts (fd, NBD_OPT_LIST_META_CONTEXT, "backup:monday",
                    LIST (rows[i].query), rows[i].list, NULL);
    check_contexts (fd, NBD_OPT_SET_META_CONTEXT, "backup:monday",
                    LIST (rows[i].query), rows[i].set, &rows[i].id);
  }
  check_contexts (fd, NBD_OPT_LIST_META_CONTEXT, "backup:monday", LIST (),
                  LIST (BASE, MONDAY), NULL);
  check_contexts (fd, NBD_OPT_SET_META_CONTEXT, "backup:monday", LIST (),
                  LIST (), NULL);
  check_contexts (fd, NBD_OPT_SET_META_CONTEXT, "backup:monday",
                  LIST (MONDAY, "y:", DEPTH, BASE, MONDAY),
                  LIST (BASE, MONDAY),
                  (const uint32_t[]) { ID_BASE, ID_MONDAY });
  close (fd);
}

static void
check_no_status (int fd)
{
  send_request (fd, 0, NBD_CMD_BLOCK_STATUS, 1, 0, SIZE);
  expect_error (fd, 1, NBD_EINVAL);
  close (fd);
}

/* What was selected for another export, or for an earlier view of the same
 * name, is not for this one.
 */
static void
test_selected_for_another (void **state)
{
  int fd = greeted (STRUCTURED);

  (void) state;
  client_set_contexts (fd, LIST (EVERYTHING), 4);
  client_go (fd, "backup:monday", NULL);
  check_no_status (fd);

  fd = greeted (STRUCTURED);
  select_all (fd);
  client_go (fd, "", NULL);
  check_no_status (fd);

  fd = greeted (STRUCTURED);
  select_all (fd);
  fake_disk_end_view (f.disk, view);
  view = fake_disk_begin_view (f.disk, "monday");
  client_go (fd, "backup:monday", NULL);
  check_read (fd, 0, 0, 4096);
  assert_int_equal (view->bitmap.holders, 0);
  check_no_status (fd);

  fd = open_view (STRUCTURED);
  assert_int_equal (view->bitmap.holders, 1);
  check_read (fd, 0, 0, SIZE);
  close (fd);
}

static void
test_read (void **state)
{
  (void) state;
  for (enum form form = SIMPLE; form <= EXTENDED; ++form) {
    int fd = open_view (form);
    unsigned reads;

    check_read (fd, 0, 0, 512);
    check_read (fd, 0, SIZE - 1, 1);
    check_read (fd, 0, BLOCK / 2, 300000);
    check_read (fd, 0, 0, SIZE);
    for (unsigned i = 0; i < 200; ++i)
      check_read (fd, 0, i * 7919 % (SIZE - 90000), 1 + i * 313 % 90000);
    if (form != SIMPLE)
      assert_int_equal (check_read (fd, NBD_CMD_FLAG_DF, 0, SIZE), 0);

    /* The disk is not read for it, nor the view for a hole. */
    reads = view->copy->calls[FAKE_READ];
    check_read (fd, 0, 10 * BLOCK, 10 * BLOCK);
    assert_int_equal (view->copy->calls[FAKE_READ],
                      form == SIMPLE ? reads + 1 : reads);
    assert_int_equal (f.disk->calls[FAKE_READ], 0);

    send_request (fd, 0, NBD_CMD_READ, 6, SIZE - 1, 2);
    expect_error (fd, 6, NBD_EINVAL);
    close (fd);
  }
}

/* A hole is a chunk, of short READs and of those in parts. */
static void
test_read_holes (void **state)
{
  (void) state;
  for (enum form form = STRUCTURED; form <= EXTENDED; ++form) {
    int fd = open_view (form);
    struct read_reply reply = read_view (fd, 0, 8 * BLOCK, 6 * BLOCK);

    assert_int_equal (reply.nr_chunks, 2);
    assert_false (reply.chunk[0].is_hole);
    assert_int_equal (reply.chunk[0].length, 2 * BLOCK);
    assert_true (reply.chunk[1].is_hole);
    check_bytes (8 * BLOCK, 6 * BLOCK);
    /* 14 blocks of 24 read as zeroes. */
    assert_int_equal (check_read (fd, 0, 0, SIZE), SIZE / BLOCK / 24);
    close (fd);
  }
}

/* Another client changes the disk, and the view stays. */
static void
test_disk_changes (void **state)
{
  static const uint8_t data[65536] = { 1, 2, 3 };
  int fd = open_view (STRUCTURED), disk = client_open (&f, NULL);

  (void) state;
  send_request (disk, 0, NBD_CMD_WRITE, 1, 4096, sizeof data);
  send_bytes (disk, data, sizeof data);
  expect_error (disk, 1, 0);
  send_request (disk, 0, NBD_CMD_WRITE_ZEROES, 2, 0, 4096);
  expect_error (disk, 2, 0);
  client_check_alive (&f, disk);
  check_read (fd, 0, 0, SIZE);
  close (disk);
  close (fd);
}

/* The extents of the view's contexts, as the reply has them. */
struct status {
  uint32_t id;
  unsigned nr;
  uint64_t length[SIZE / BLOCK];
  uint64_t flags[SIZE / BLOCK];
};

static struct status
recv_status (int fd, bool extended)
{
  const size_t head = extended ? 8 : 4, size = extended ? 16 : 8;
  struct status s;
  struct reply reply;

  recv_reply (fd, &reply, 0);
  assert_int_equal (reply.error, 0);
  assert_int_equal (reply.type, extended ? NBD_REPLY_TYPE_BLOCK_STATUS_EXT
                                         : NBD_REPLY_TYPE_BLOCK_STATUS);
  s.id = get_be32 (reply.data);
  s.nr = (reply.length - head) / size;
  assert_in_range (s.nr, 1, SIZE / BLOCK);
  for (unsigned i = 0; i < s.nr; ++i) {
    const uint8_t *p = reply.data + head + i * size;

    s.length[i] = extended ? get_be64 (p) : get_be32 (p);
    s.flags[i] = extended ? get_be64 (p + 8) : get_be32 (p + 4);
  }
  free (reply.data);
  return s;
}

/* Each byte has the flags that the view has.  Returns where they end. */
static uint64_t
check_extents (const struct status *s, uint64_t offset)
{
  for (unsigned i = 0; i < s->nr; ++i) {
    for (uint64_t at = offset; at < offset + s->length[i]; at += 512)
      assert_int_equal (s->flags[i], s->id == ID_BASE
                        ? view->copy->flags[at / BLOCK]
                        : view->bitmap.dirty[at / GRANULE]);
    offset += s->length[i];
  }
  return offset;
}

static void
test_status (void **state)
{
  (void) state;
  for (enum form form = STRUCTURED; form <= EXTENDED; ++form) {
    int fd = open_view (form);
    struct status s;

    send_request (fd, 0, NBD_CMD_BLOCK_STATUS, 5, 512, SIZE - 512);
    s = recv_status (fd, form == EXTENDED);
    assert_int_equal (s.id, ID_BASE);
    assert_int_equal (s.nr, 3 * SIZE / BLOCK / 24);
    assert_int_equal (check_extents (&s, 512), SIZE);
    s = recv_status (fd, form == EXTENDED);
    assert_int_equal (s.id, ID_MONDAY);
    assert_int_equal (check_extents (&s, 512), SIZE);

    send_request (fd, NBD_CMD_FLAG_REQ_ONE, NBD_CMD_BLOCK_STATUS, 5, 0, SIZE);
    s = recv_status (fd, form == EXTENDED);
    assert_int_equal (s.nr, 1);
    assert_int_equal (check_extents (&s, 0), 10 * BLOCK);
    s = recv_status (fd, form == EXTENDED);
    assert_int_equal (s.nr, 1);
    assert_int_equal (check_extents (&s, 0), 2 * GRANULE);
    assert_int_equal (f.disk->calls[FAKE_EXTENT], 0);

    send_request (fd, 0, NBD_CMD_BLOCK_STATUS, 6, SIZE - 1, 2);
    expect_error (fd, 6, NBD_EINVAL);
    close (fd);
  }
}

/* Where there are too many extents, what is coarser is safe to believe. */
static void
test_status_coarser (void **state)
{
  int fd = open_view (STRUCTURED);

  (void) state;
  extents_max = 20;
  send_request (fd, 0, NBD_CMD_BLOCK_STATUS, 5, 0, SIZE);
  for (unsigned c = 0; c < 2; ++c) {
    const struct status s = recv_status (fd, false);
    uint64_t offset = 0;

    assert_in_range (s.nr, 1, 20);
    for (unsigned i = 0; i < s.nr; ++i)
      for (const uint64_t end = offset + s.length[i]; offset < end;
           offset += 512) {
        if (s.id == ID_BASE && s.flags[i] != 0)
          assert_int_not_equal (view->copy->flags[offset / BLOCK], 0);
        if (s.id == ID_MONDAY && s.flags[i] == 0)
          assert_int_equal (view->bitmap.dirty[offset / GRANULE], 0);
      }
    assert_int_equal (offset, SIZE);
  }
  close (fd);
}

static void
test_changes_refused (void **state)
{
  static const uint8_t data[512];
  int fd = open_view (STRUCTURED);

  (void) state;
  send_request (fd, 0, NBD_CMD_WRITE, 1, 0, sizeof data);
  send_bytes (fd, data, sizeof data);
  expect_error (fd, 1, NBD_EPERM);
  send_request (fd, 0, NBD_CMD_TRIM, 2, 0, 512);
  expect_error (fd, 2, NBD_EPERM);
  send_request (fd, 0, NBD_CMD_WRITE_ZEROES, 3, 0, 512);
  expect_error (fd, 3, NBD_EPERM);
  check_read (fd, 0, 0, 4096);
  assert_int_equal (f.disk->calls[FAKE_WRITE], 0);
  assert_int_equal (f.disk->calls[FAKE_TRIM], 0);
  assert_int_equal (f.disk->calls[FAKE_ZERO], 0);
  close (fd);
}

static void
test_cache_and_flush (void **state)
{
  int fd = open_view (STRUCTURED);

  (void) state;
  send_request (fd, 0, NBD_CMD_CACHE, 1, 0, SIZE);
  expect_error (fd, 1, 0);
  assert_int_equal (f.disk->calls[FAKE_CACHE], 0);
  assert_int_equal (view->copy->calls[FAKE_CACHE], 0);
  send_request (fd, 0, NBD_CMD_FLUSH, 2, 0, 0);
  expect_error (fd, 2, 0);
  close (fd);
}

/* So many clients have the view and its bitmap, soon. */
static void
check_holders (unsigned long of_view, unsigned long of_bitmap)
{
  for (unsigned i = 0; i < 1000 && (view->holders != of_view ||
                                    view->bitmap.holders != of_bitmap); ++i)
    sleep_ms (10);
  assert_int_equal (view->holders, of_view);
  assert_int_equal (view->bitmap.holders, of_bitmap);
}

static void
test_hold (void **state)
{
  uint8_t request[sizeof (struct nbd_request)];
  int fd = greeted (STRUCTURED), other;

  (void) state;
  /* Not before it is opened. */
  select_all (fd);
  check_contexts (fd, NBD_OPT_LIST_META_CONTEXT, "backup:monday", LIST (),
                  LIST (BASE, MONDAY), NULL);
  check_holders (0, 0);
  client_go (fd, "backup:monday", NULL);
  check_holders (1, 1);
  assert_int_equal (f.disk->bitmaps[1].holders, 0);

  /* The old way, without contexts. */
  other = greeted (SIMPLE);
  send_option (other, NBD_OPT_EXPORT_NAME, "backup:monday",
               strlen ("backup:monday"));
  recv_bytes (other, buf, 10);
  check_holders (2, 1);
  send_request (other, 0, NBD_CMD_DISC, 1, 0, 0);
  expect_end (other);
  close (other);
  check_holders (1, 1);

  /* Amid a request's header. */
  put_request (request, 0, NBD_CMD_READ, 1, 0, 512);
  send_bytes (fd, request, sizeof request / 2);
  close (fd);
  check_holders (0, 0);

  /* Amid the handshake, with contexts selected. */
  fd = greeted (STRUCTURED);
  select_all (fd);
  close (fd);
  for (unsigned i = 0; i < 1000 && view->references > 0; ++i)
    sleep_ms (10);
  assert_int_equal (view->references, 0);
}

/* The client goes while it is being served: the view is held until then. */
static void
test_hold_while_reading (void **state)
{
  int fd = open_view (STRUCTURED);

  (void) state;
  gate_close (view->copy, FAKE_READ, 0);
  send_request (fd, 0, NBD_CMD_READ, 1, 0, 4096);
  gate_wait ();
  close (fd);
  sleep_ms (50);
  check_holders (1, 1);
  gate_open ();
  check_holders (0, 0);
}

/* Reads fail, and the connection goes on. */
static void
check_broken (int fd, bool has_bitmap)
{
  struct read_reply reply = read_view (fd, 0, 0, 4096);

  assert_int_equal (reply.error, NBD_EIO);
  reply = read_view (fd, 0, 0, SIZE); /* in parts */
  assert_int_equal (reply.error, NBD_EIO);
  reply = read_view (fd, NBD_CMD_FLAG_DF, 0, SIZE);
  assert_int_equal (reply.error, NBD_EIO);
  send_request (fd, 0, NBD_CMD_BLOCK_STATUS, 7, 0, SIZE);
  expect_error (fd, 7, NBD_EIO);
  send_request (fd, 0, NBD_CMD_FLUSH, 8, 0, 0);
  expect_error (fd, 8, 0);
  close (fd);

  /* Of the bitmap alone. */
  fd = greeted (STRUCTURED);
  if (has_bitmap) {
    struct status s;

    check_contexts (fd, NBD_OPT_SET_META_CONTEXT, "backup:monday",
                    LIST (MONDAY), LIST (MONDAY),
                    (const uint32_t[]) { ID_MONDAY });
    client_go (fd, "backup:monday", NULL);
    send_request (fd, 0, NBD_CMD_BLOCK_STATUS, 9, 0, SIZE);
    s = recv_status (fd, false);
    assert_int_equal (check_extents (&s, 0), SIZE);
  }
  close (fd);
}

static void
test_broken (void **state)
{
  int fd = open_view (STRUCTURED);

  (void) state;
  check_read (fd, 0, 0, 4096);
  fake_disk_break_view (view);
  check_broken (fd, true);
}

static void
test_ended (void **state)
{
  int fd = open_view (STRUCTURED), other = greeted (STRUCTURED), bitmap;

  (void) state;
  check_contexts (other, NBD_OPT_SET_META_CONTEXT, "backup:monday",
                  LIST (MONDAY), LIST (MONDAY),
                  (const uint32_t[]) { ID_MONDAY });
  client_go (other, "backup:monday", NULL);
  bitmap = other;
  check_read (fd, 0, 0, 4096);
  fake_disk_end_view (f.disk, view);
  check_broken (fd, false);
  send_request (bitmap, 0, NBD_CMD_BLOCK_STATUS, 1, 0, SIZE);
  expect_error (bitmap, 1, NBD_EIO);
  close (bitmap);
  check_holders (0, 0);
}

/* It is broken while a part is read: what came before it stands. */
static void
test_broken_while_reading (void **state)
{
  const uint64_t at = 48 * BLOCK; /* data, and a part of its own */
  int fd = open_view (STRUCTURED), disk;
  struct read_reply reply;

  (void) state;
  gate_close (view->copy, FAKE_READ, at);
  send_request (fd, 0, NBD_CMD_READ, 5, 0, SIZE);
  gate_wait ();
  fake_disk_break_view (view);
  gate_open ();
  reply = recv_read (fd, 5, 0, SIZE, buf);
  assert_int_equal (reply.error, NBD_EIO);
  assert_int_equal (reply.error_offset, at);
  assert_int_equal (reply.got, at);
  check_bytes (0, at);
  check_broken (fd, true);

  /* The disk beside it is served as ever. */
  disk = client_open (&f, NULL);
  client_check_alive (&f, disk);
  close (disk);
}

int
main (void)
{
  const struct CMUnitTest tests[] = {
    TEST (test_contexts),
    TEST (test_selected_for_another),
    TEST (test_read),
    TEST (test_read_holes),
    TEST (test_disk_changes),
    TEST (test_status),
    TEST (test_status_coarser),
    TEST (test_changes_refused),
    TEST (test_cache_and_flush),
    TEST (test_hold),
    TEST (test_hold_while_reading),
    TEST (test_broken),
    TEST (test_ended),
    TEST (test_broken_while_reading),
  };

  return cmocka_run_group_tests (tests, NULL, NULL);
}
