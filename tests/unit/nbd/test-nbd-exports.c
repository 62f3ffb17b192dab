/* nbdkit-dirty-bitmap-filter
 * SPDX-License-Identifier: BSD-3-Clause
 * Copyright the nbdkit-dirty-bitmap-filter authors
 */

/* The names of exports, what an unknown one gets, and what is served
 * under delta:BITMAP.  What is served under backup:BITMAP is in
 * test-nbd-views.c.
 */

#include <config.h>

#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "common/bytes.h"
#include "nbd/exports.h"
#include "nbd-fixture.h"

#define SIZE (1024 * 1024)
#define GRANULE 4096
#define FIXED_NO_ZEROES (NBD_FLAG_FIXED_NEWSTYLE | NBD_FLAG_NO_ZEROES)
#define LIST(...) ((const char *const[]) { __VA_ARGS__ __VA_OPT__ (,) NULL })
#define BASE "base:allocation"
#define EVERYTHING BASE, "qemu:allocation-depth", \
    "qemu:dirty-bitmap:monday", "qemu:dirty-bitmap:mon"

extern size_t extents_max;

static uint8_t *dirty;          /* monday's granules */

static int
setup_named (const char *name, bool list_deltas)
{
  fixture_init (&f, SIZE);
  fake_disk_add_bitmap (f.disk, "monday", GRANULE);
  fake_disk_add_bitmap (f.disk, "mon", 65536);
  for (size_t i = 0; i < SIZE; ++i)
    f.disk->data[i] = 1 + i / 512 % 255;
  dirty = f.disk->bitmaps[0].dirty;
  f.export_name = name;
  f.list_deltas = list_deltas;
  extents_max = (1 << 20) - 1;
  exports_list_max = 10000;
  fixture_start (&f, false);
  return 0;
}

static int
setup_any (void **state)
{
  (void) state;
  return setup_named (NULL, true);
}

static int
setup_disk (void **state)
{
  (void) state;
  return setup_named ("disk", true);
}

static int
setup_empty (void **state)
{
  (void) state;
  return setup_named ("", true);
}

/* So many that two options for each are more than a client may send that
 * was told of none.
 */
#define NR_MANY 2100

static int
setup_many (void **state)
{
  static char names[NR_MANY][8];

  (void) state;
  fixture_init (&f, SIZE);
  for (unsigned i = 0; i < NR_MANY; ++i) {
    snprintf (names[i], sizeof names[i], "b%u", i);
    fake_disk_add_bitmap (f.disk, names[i], 65536);
  }
  f.export_name = NULL;
  f.list_deltas = true;
  exports_list_max = 10000;
  fixture_start (&f, false);
  return 0;
}

/* Both bitmaps have a view. */
static int
setup_views (void **state)
{
  (void) state;
  setup_named ("disk", true);
  fake_disk_begin_view (f.disk, "mon");
  fake_disk_begin_view (f.disk, "monday");
  return 0;
}

static int
setup_unlisted (void **state)
{
  (void) state;
  return setup_named (NULL, false);
}

static int
greeted (void)
{
  int fd = fixture_connect (&f);

  client_greet (fd, FIXED_NO_ZEROES);
  client_structured (fd);
  return fd;
}

/* LIST shows exactly these names and descriptions. */
static void
check_list (const char *const *names, const char *const *descriptions)
{
  int fd = greeted ();
  struct option_reply reply;

  send_option (fd, NBD_OPT_LIST, NULL, 0);
  for (size_t i = 0; names[i] != NULL; ++i) {
    const size_t n = strlen (names[i]);

    expect_option_reply (fd, NBD_OPT_LIST, NBD_REP_SERVER, &reply);
    assert_int_equal (get_be32 (reply.data), n);
    assert_memory_equal (reply.data + 4, names[i], n);
    assert_string_equal ((char *) reply.data + 4 + n, descriptions[i]);
  }
  expect_option_reply (fd, NBD_OPT_LIST, NBD_REP_ACK, NULL);
  close (fd);
}

/* INFO or GO of a name, which asks for name and description. */
static void
send_info (int fd, uint32_t option, const char *name)
{
  uint8_t buf[8192];
  const size_t n = strlen (name);

  put_be32 (buf, n);
  memcpy (buf + 4, name, n);
  put_be16 (buf + 4 + n, 2);
  put_be16 (buf + 6 + n, NBD_INFO_NAME);
  put_be16 (buf + 8 + n, NBD_INFO_DESCRIPTION);
  send_option (fd, option, buf, n + 10);
}

static void
check_known (const char *name, const char *description, bool readonly)
{
  const uint32_t option = NBD_OPT_INFO;
  struct option_reply reply;
  uint8_t buf[4096];
  int fd = greeted ();
  uint32_t n;

  print_message ("known: '%s'\n", name);
  send_info (fd, option, name);
  expect_option_reply (fd, option, NBD_REP_INFO, &reply);
  assert_int_equal (get_be16 (reply.data), NBD_INFO_NAME);
  assert_string_equal ((char *) reply.data + 2, name);
  expect_option_reply (fd, option, NBD_REP_INFO, &reply);
  assert_int_equal (get_be16 (reply.data), NBD_INFO_DESCRIPTION);
  assert_string_equal ((char *) reply.data + 2, description);
  expect_option_reply (fd, option, NBD_REP_INFO, &reply);
  assert_int_equal (get_be16 (reply.data), NBD_INFO_BLOCK_SIZE);
  expect_option_reply (fd, option, NBD_REP_INFO, &reply);
  assert_int_equal (get_be16 (reply.data), NBD_INFO_EXPORT);
  assert_int_equal (get_be64 (reply.data + 2), SIZE);
  assert_int_equal (get_be16 (reply.data + 10), readonly ? 0x058f : 0x0ded);
  expect_option_reply (fd, option, NBD_REP_ACK, NULL);

  n = make_context_query (buf, name, LIST (BASE));
  send_option (fd, NBD_OPT_SET_META_CONTEXT, buf, n);
  expect_option_reply (fd, NBD_OPT_SET_META_CONTEXT, NBD_REP_META_CONTEXT,
                       NULL);
  expect_option_reply (fd, NBD_OPT_SET_META_CONTEXT, NBD_REP_ACK, NULL);

  send_option (fd, NBD_OPT_EXPORT_NAME, name, strlen (name));
  recv_bytes (fd, buf, 10);
  assert_int_equal (get_be64 (buf), SIZE);
  assert_int_equal (get_be16 (buf + 8), readonly ? 0x058f : 0x0ded);
  send_request (fd, 0, NBD_CMD_FLUSH, 1, 0, 0);
  expect_error (fd, 1, 0);
  close (fd);
}

static void
check_no_export_name (int fd, const char *name, size_t length)
{
  send_option (fd, NBD_OPT_EXPORT_NAME, name, length);
  expect_end (fd);
  close (fd);
}

/* Each option refuses it, the stream stays in step, and EXPORT_NAME is
 * the end.
 */
static void
check_unknown (const char *name)
{
  static const uint32_t about_contexts[] = {
    NBD_OPT_LIST_META_CONTEXT, NBD_OPT_SET_META_CONTEXT
  };
  uint8_t buf[8192];
  int fd = greeted ();
  uint32_t n;

  print_message ("unknown: '%.40s'\n", name);
  send_info (fd, NBD_OPT_INFO, name);
  expect_option_reply (fd, NBD_OPT_INFO, NBD_REP_ERR_UNKNOWN, NULL);
  send_info (fd, NBD_OPT_GO, name);
  expect_option_reply (fd, NBD_OPT_GO, NBD_REP_ERR_UNKNOWN, NULL);
  for (size_t i = 0; i < 2; ++i) {
    n = make_context_query (buf, name, LIST (EVERYTHING));
    send_option (fd, about_contexts[i], buf, n);
    expect_option_reply (fd, about_contexts[i], NBD_REP_ERR_UNKNOWN, NULL);
  }
  check_no_export_name (fd, name, strlen (name));
}

#define MONDAY "what was changed according to the dirty bitmap monday"
#define MON "what was changed according to the dirty bitmap mon"

static void
check_unknown_deltas (void)
{
  char longest[4097];

  check_unknown ("delta:");
  check_unknown ("delta:m");
  check_unknown ("delta:mond");
  check_unknown ("delta:mondays");
  check_unknown ("delta:Monday");
  /* What follows a NUL is a part of the name. */
  check_no_export_name (greeted (), "delta:monday", sizeof "delta:monday");
  memset (longest, 'm', 4096);
  memcpy (longest, "delta:", 6);
  longest[4096] = '\0';
  check_unknown (longest);
}

static void
test_any_name (void **state)
{
  char longest[4097];

  (void) state;
  check_list (LIST ("", "delta:monday", "delta:mon"),
              LIST ("a fake disk", MONDAY, MON));
  check_known ("", "a fake disk", false);
  check_known ("delta", "a fake disk", false);
  check_known ("Delta:monday", "a fake disk", false);
  check_known (" delta:monday", "a fake disk", false);
  check_known ("delta:monday", MONDAY, true);
  check_known ("delta:mon", MON, true);
  memset (longest, 'x', 4000);  /* what make_context_query has room for */
  longest[4000] = '\0';
  check_known (longest, "a fake disk", false);
  check_unknown_deltas ();
}

static void
test_one_name (void **state)
{
  (void) state;
  check_list (LIST ("disk", "delta:monday", "delta:mon"),
              LIST ("a fake disk", MONDAY, MON));
  check_known ("disk", "a fake disk", false);
  check_known ("delta:monday", MONDAY, true);
  check_unknown ("");
  check_unknown ("dis");
  check_unknown ("disks");
  check_unknown ("Disk");
  check_no_export_name (greeted (), "disk", 5);
  check_unknown_deltas ();
}

static void
test_empty_name (void **state)
{
  (void) state;
  check_list (LIST ("", "delta:monday", "delta:mon"),
              LIST ("a fake disk", MONDAY, MON));
  check_known ("", "a fake disk", false);
  check_unknown ("disk");
  check_no_export_name (greeted (), "", 1);
}

/* What is not listed can be opened all the same. */
static void
test_unlisted (void **state)
{
  (void) state;
  check_list (LIST (""), LIST ("a fake disk"));
  check_known ("delta:monday", MONDAY, true);
  check_known ("delta:mon", MON, true);
  check_unknown_deltas ();
}

/* A list that clients would not take has the disk only. */
static void
test_list_limit (void **state)
{
  (void) state;
  exports_list_max = 3;
  check_list (LIST ("", "delta:monday", "delta:mon"),
              LIST ("a fake disk", MONDAY, MON));
  exports_list_max = 2;
  check_list (LIST (""), LIST ("a fake disk"));
  check_known ("delta:mon", MON, true);
}

#define VIEW_OF_MONDAY "the disk as it was when the backup of the dirty " \
    "bitmap monday began"
#define VIEW_OF_MON "the disk as it was when the backup of the dirty " \
    "bitmap mon began"

static void
check_unknown_views (void)
{
  check_unknown ("backup:");
  check_unknown ("backup:m");
  check_unknown ("backup:mond");
  check_unknown ("backup:mondays");
  check_unknown ("backup:Monday");
  check_no_export_name (greeted (), "backup:monday", sizeof "backup:monday");
}

/* There is a view while its backup is under way, and its name is never the
 * disk's.
 */
static void
test_view_names (void **state)
{
  struct disk_view *view;

  (void) state;
  check_unknown ("backup:monday");
  view = fake_disk_begin_view (f.disk, "monday");
  check_list (LIST ("", "backup:monday", "delta:monday", "delta:mon"),
              LIST ("a fake disk", VIEW_OF_MONDAY, MONDAY, MON));
  check_known ("", "a fake disk", false);
  check_known ("backup", "a fake disk", false);
  check_known ("Backup:monday", "a fake disk", false);
  check_known (" backup:monday", "a fake disk", false);
  check_known ("backup:monday", VIEW_OF_MONDAY, true);
  check_unknown ("backup:mon"); /* a bitmap without a backup */
  check_unknown_views ();

  fake_disk_break_view (view);
  check_list (LIST ("", "backup:monday", "delta:monday", "delta:mon"),
              LIST ("a fake disk", VIEW_OF_MONDAY, MONDAY, MON));
  check_known ("backup:monday", VIEW_OF_MONDAY, true);
  fake_disk_end_view (f.disk, view);
  check_list (LIST ("", "delta:monday", "delta:mon"),
              LIST ("a fake disk", MONDAY, MON));
  check_unknown ("backup:monday");

  /* The bitmap is removed, and the view stays. */
  fake_disk_begin_view (f.disk, "monday");
  fake_disk_remove_bitmap (f.disk, "monday");
  check_known ("backup:monday", VIEW_OF_MONDAY, true);
  check_unknown ("delta:monday");
}

static void
test_view_beside_one_name (void **state)
{
  (void) state;
  check_list (LIST ("disk", "backup:mon", "backup:monday", "delta:monday",
                    "delta:mon"),
              LIST ("a fake disk", VIEW_OF_MON, VIEW_OF_MONDAY, MONDAY, MON));
  check_known ("disk", "a fake disk", false);
  check_known ("backup:mon", VIEW_OF_MON, true);
  check_known ("backup:monday", VIEW_OF_MONDAY, true);
  check_unknown ("");
  check_unknown ("backup");
  check_unknown_views ();
}

/* Views are listed also where deltas are not. */
static void
test_views_listed (void **state)
{
  (void) state;
  fake_disk_begin_view (f.disk, "monday");
  check_list (LIST ("", "backup:monday"),
              LIST ("a fake disk", VIEW_OF_MONDAY));
  exports_list_max = 1;
  check_list (LIST (""), LIST ("a fake disk"));
}

/* First the deltas are left out. */
static void
test_views_list_limit (void **state)
{
  (void) state;
  exports_list_max = 5;
  check_list (LIST ("disk", "backup:mon", "backup:monday", "delta:monday",
                    "delta:mon"),
              LIST ("a fake disk", VIEW_OF_MON, VIEW_OF_MONDAY, MONDAY, MON));
  for (exports_list_max = 4; exports_list_max >= 3; --exports_list_max)
    check_list (LIST ("disk", "backup:mon", "backup:monday"),
                LIST ("a fake disk", VIEW_OF_MON, VIEW_OF_MONDAY));
  for (; exports_list_max >= 1; --exports_list_max)
    check_list (LIST ("disk"), LIST ("a fake disk"));
  check_known ("backup:mon", VIEW_OF_MON, true);
}

/* An option that has many replies, and is no error.  Returns how many. */
static unsigned
count_replies (int fd, uint32_t option)
{
  struct option_reply reply;
  unsigned nr = 0;

  for (;;) {
    recv_option_reply (fd, &reply);
    assert_int_equal (reply.option, option);
    if (reply.type == NBD_REP_ACK)
      return nr;
    assert_int_equal (reply.type & NBD_REP_ERR (0), 0);
    nr++;
  }
}

/* qemu-nbd --list and nbdinfo --list ask about every export that they are
 * told of, all on one connection.
 */
static void
test_list_and_ask (void **state)
{
  int fd = greeted ();

  (void) state;
  send_option (fd, NBD_OPT_LIST, NULL, 0);
  assert_int_equal (count_replies (fd, NBD_OPT_LIST), 1 + NR_MANY);
  for (unsigned i = 0; i <= NR_MANY; ++i) {
    char name[32] = "";
    uint8_t buf[64];
    uint32_t n;

    if (i < NR_MANY)
      snprintf (name, sizeof name, "delta:b%u", i);
    send_info (fd, NBD_OPT_INFO, name);
    assert_int_equal (count_replies (fd, NBD_OPT_INFO), 4);
    n = make_context_query (buf, name, LIST ());
    send_option (fd, NBD_OPT_LIST_META_CONTEXT, buf, n);
    assert_int_equal (count_replies (fd, NBD_OPT_LIST_META_CONTEXT),
                      i < NR_MANY ? 1 : 2 + NR_MANY);
  }
  client_go (fd, "", NULL);
  client_check_alive (&f, fd);
  close (fd);
}

/* The client may send so many more options, and none after them. */
static void
check_bound (int fd, unsigned left)
{
  for (unsigned i = 0; i < left; ++i) {
    send_option (fd, 99, NULL, 0);
    expect_option_reply (fd, 99, NBD_REP_ERR_UNSUP, NULL);
  }
  expect_end (fd);
  close (fd);
}

/* There is a bound all the same, which a second list does not move. */
static void
test_options_bound (void **state)
{
  int fd = greeted ();

  (void) state;
  check_bound (fd, 4096 - 1);
  fd = greeted ();
  for (unsigned i = 0; i < 2; ++i) {
    send_option (fd, NBD_OPT_LIST, NULL, 0);
    assert_int_equal (count_replies (fd, NBD_OPT_LIST), 3);
  }
  check_bound (fd, 4096 + 3 * 32 - 3);
}

/* A connection to an export, with the contexts that it has of all. */
static int
open_export (const char *name, unsigned expected)
{
  uint8_t buf[1024];
  int fd = greeted ();
  const uint32_t n = make_context_query (buf, name, LIST (EVERYTHING));

  send_option (fd, NBD_OPT_SET_META_CONTEXT, buf, n);
  for (unsigned i = 0; i < expected; ++i)
    expect_option_reply (fd, NBD_OPT_SET_META_CONTEXT, NBD_REP_META_CONTEXT,
                         NULL);
  expect_option_reply (fd, NBD_OPT_SET_META_CONTEXT, NBD_REP_ACK, NULL);
  client_go (fd, name, NULL);
  return fd;
}

static void
test_delta_contexts (void **state)
{
  static const char *const queries[] = {
    "base:", BASE, "qemu:", "qemu:dirty-bitmap:", "qemu:dirty-bitmap:mon",
    "qemu:allocation-depth", NULL
  };
  struct option_reply reply;
  uint8_t buf[1024];
  int fd = greeted ();

  (void) state;
  /* Whatever is asked for, also nothing. */
  for (size_t i = 0; i < 2; ++i) {
    const uint32_t n =
      make_context_query (buf, "delta:monday", i == 0 ? queries : LIST ());

    send_option (fd, NBD_OPT_LIST_META_CONTEXT, buf, n);
    expect_option_reply (fd, NBD_OPT_LIST_META_CONTEXT, NBD_REP_META_CONTEXT,
                         &reply);
    assert_string_equal ((char *) reply.data + 4, BASE);
    expect_option_reply (fd, NBD_OPT_LIST_META_CONTEXT, NBD_REP_ACK, NULL);
  }
  close (fd);

  /* What was selected for the disk is not for a delta, and the reverse. */
  fd = greeted ();
  client_set_contexts (fd, LIST (EVERYTHING), 4);
  client_go (fd, "delta:monday", NULL);
  send_request (fd, 0, NBD_CMD_BLOCK_STATUS, 1, 0, SIZE);
  expect_error (fd, 1, NBD_EINVAL);
  close (fd);
  fd = open_export ("delta:monday", 1);
  send_request (fd, 0, NBD_CMD_BLOCK_STATUS, 1, 0, SIZE);
  {
    struct reply status;

    recv_reply (fd, &status, 0);
    assert_int_equal (status.type, NBD_REPLY_TYPE_BLOCK_STATUS);
    assert_int_equal (status.flags, NBD_REPLY_FLAG_DONE);
    assert_int_equal (get_be32 (status.data), 0);
    free (status.data);
  }
  close (fd);
}

/* What a read must return, by the bits as they are now. */
static void
check_read (int fd, uint64_t offset, uint32_t length)
{
  struct reply reply;

  send_request (fd, 0, NBD_CMD_READ, 5, offset, length);
  recv_whole_reply (fd, &reply, 0);
  assert_int_equal (reply.error, 0);
  assert_int_equal (reply.type, NBD_REPLY_TYPE_OFFSET_DATA);
  assert_int_equal (reply.length, 8 + length);
  for (uint32_t i = 0; i < length; ++i) {
    const uint64_t at = offset + i;
    const uint8_t expected = dirty[at / GRANULE] ? f.disk->data[at] : 0;

    if (reply.data[8 + i] != expected)
      fail_msg ("byte %u of %u at %u is %u, not %u", i, length,
                (unsigned) offset, reply.data[8 + i], expected);
  }
  free (reply.data);
}

static void
test_delta_read (void **state)
{
  int fd = open_export ("delta:monday", 1);
  unsigned reads;

  (void) state;
  for (size_t i = 0; i < SIZE / GRANULE; ++i)
    dirty[i] = i % 3 == 1 || (i > 50 && i < 90) || i == SIZE / GRANULE - 1;
  check_read (fd, 0, SIZE);
  check_read (fd, GRANULE - 1, 2);
  check_read (fd, 2 * GRANULE - 1, 2);
  check_read (fd, 2 * GRANULE - 1, 1);
  check_read (fd, 2 * GRANULE, 1);
  check_read (fd, SIZE - 1, 1);
  check_read (fd, GRANULE / 2, 300000);
  for (unsigned i = 0; i < 200; ++i) {
    const uint64_t offset = i * 7919 % (SIZE - 9000);

    check_read (fd, offset, 1 + i * 31 % 9000);
  }

  /* What is clean is not even read. */
  memset (dirty, 0, SIZE / GRANULE);
  reads = f.disk->calls[FAKE_READ];
  check_read (fd, 0, SIZE);
  assert_int_equal (f.disk->calls[FAKE_READ], reads);

  /* Bits that turn up are seen by the next read. */
  dirty[7] = 1;
  check_read (fd, 0, SIZE);
  assert_int_equal (f.disk->calls[FAKE_READ], reads + 1);
  close (fd);
}

static void
test_delta_past_end (void **state)
{
  int fd = open_export ("delta:monday", 1);

  (void) state;
  send_request (fd, 0, NBD_CMD_READ, 5, SIZE - 1, 2);
  expect_error (fd, 5, NBD_EINVAL);
  send_request (fd, 0, NBD_CMD_BLOCK_STATUS, 6, SIZE - 1, 2);
  expect_error (fd, 6, NBD_EINVAL);
  close (fd);
}

static void
test_delta_changes_refused (void **state)
{
  static const uint8_t data[512];
  int fd = open_export ("delta:monday", 1);

  (void) state;
  memset (dirty, 1, SIZE / GRANULE);
  send_request (fd, 0, NBD_CMD_WRITE, 1, 0, sizeof data);
  send_bytes (fd, data, sizeof data);
  expect_error (fd, 1, NBD_EPERM);
  send_request (fd, 0, NBD_CMD_TRIM, 2, 0, 512);
  expect_error (fd, 2, NBD_EPERM);
  send_request (fd, 0, NBD_CMD_WRITE_ZEROES, 3, 0, 512);
  expect_error (fd, 3, NBD_EPERM);
  check_read (fd, 0, 4096);
  assert_int_equal (f.disk->calls[FAKE_WRITE], 0);
  assert_int_equal (f.disk->calls[FAKE_TRIM], 0);
  assert_int_equal (f.disk->calls[FAKE_ZERO], 0);
  close (fd);
}

/* One BLOCK_STATUS of a delta; each extent must be true.  Returns where
 * it ends.
 */
static uint64_t
check_status (int fd, uint16_t flags, uint64_t offset, uint64_t end,
              unsigned *nr)
{
  struct reply reply;

  send_request (fd, flags, NBD_CMD_BLOCK_STATUS, 5, offset, end - offset);
  recv_reply (fd, &reply, 0);
  assert_int_equal (reply.error, 0);
  assert_int_equal (reply.type, NBD_REPLY_TYPE_BLOCK_STATUS);
  *nr = (reply.length - 4) / 8;
  for (unsigned i = 0; i < *nr; ++i) {
    const uint32_t length = get_be32 (reply.data + 4 + 8 * i);
    const uint32_t type = get_be32 (reply.data + 8 + 8 * i);

    assert_true (length > 0 && length <= end - offset);
    for (uint64_t at = offset; at < offset + length; ++at)
      assert_int_equal (type, dirty[at / GRANULE] ? 0 : 3);
    offset += length;
    if (i + 1 < *nr)            /* neighbours differ */
      assert_int_not_equal (dirty[(offset - 1) / GRANULE],
                            dirty[offset / GRANULE]);
  }
  free (reply.data);
  return offset;
}

/* However many extents there are, none is told coarser: a reply of the
 * most that a client takes is a short one.
 */
static void
test_delta_status (void **state)
{
  static const size_t bounds[] = { 1000000, 147, 146, 13, 2, 1 };
  int fd = open_export ("delta:monday", 1);
  const uint64_t begin = 100, end = SIZE - 100;
  unsigned nr, runs = 1;

  (void) state;
  for (size_t i = 0; i < SIZE / GRANULE; ++i)
    dirty[i] = i % 3 == 1 || (i > 50 && i < 90);
  for (size_t i = 1; i < SIZE / GRANULE; ++i)
    runs += dirty[i] != dirty[i - 1];
  /* The disk's own zeroes and holes do not matter. */
  f.disk->flags = calloc (SIZE / f.disk->block_size + 1, 1);
  for (size_t i = 0; i < SIZE / f.disk->block_size; ++i)
    f.disk->flags[i] = i % 4;

  for (size_t i = 0; i < sizeof bounds / sizeof bounds[0]; ++i) {
    uint64_t offset = begin;
    unsigned replies = 0, total = 0;

    extents_max = bounds[i];
    while (offset < end) {
      const uint64_t next = check_status (fd, 0, offset, end, &nr);

      assert_true (nr >= 1 && nr <= bounds[i]);
      assert_true (next == end || nr == bounds[i]);
      assert_true (next > offset);
      offset = next;
      total += nr;
      replies++;
    }
    assert_int_equal (total, runs);
    assert_int_equal (replies, div_round_up (runs, bounds[i]));
  }
  extents_max = 1000000;
  assert_int_equal (check_status (fd, NBD_CMD_FLAG_REQ_ONE, begin, end, &nr),
                    GRANULE);
  assert_int_equal (nr, 1);
  assert_int_equal (check_status (fd, NBD_CMD_FLAG_REQ_ONE, 51 * GRANULE + 1,
                                  end, &nr), 90 * GRANULE);
  assert_int_equal (nr, 1);
  assert_int_equal (check_status (fd, 0, 51 * GRANULE, 51 * GRANULE + 1, &nr),
                    51 * GRANULE + 1);
  close (fd);
}

/* Its bitmap is removed: what is open fails, and no other client gets it. */
static void
test_delta_removed (void **state)
{
  int fd = open_export ("delta:monday", 1);

  (void) state;
  check_read (fd, 0, 4096);
  fake_disk_remove_bitmap (f.disk, "monday");
  send_request (fd, 0, NBD_CMD_READ, 5, 0, 4096);
  expect_error (fd, 5, NBD_EIO);
  send_request (fd, 0, NBD_CMD_READ, 6, 0, SIZE);
  expect_error (fd, 6, NBD_EIO);
  send_request (fd, 0, NBD_CMD_BLOCK_STATUS, 7, 0, SIZE);
  expect_error (fd, 7, NBD_EIO);
  close (fd);
  check_unknown ("delta:monday");
  check_known ("delta:mon", MON, true);
  check_list (LIST ("disk", "delta:mon"), LIST ("a fake disk", MON));
}

/* The disk beside it is served as ever. */
static void
test_disk_beside (void **state)
{
  static const uint8_t data[4096] = { 1, 2, 3 };
  int delta = open_export ("delta:monday", 1), fd = open_export ("disk", 4);

  (void) state;
  client_check_alive (&f, fd);
  send_request (fd, 0, NBD_CMD_WRITE, 1, 8192, sizeof data);
  send_bytes (fd, data, sizeof data);
  expect_error (fd, 1, 0);
  check_read (delta, 0, 65536);
  dirty[2] = 1;
  check_read (delta, 0, 65536);
  close (fd);
  close (delta);
}

int
main (void)
{
#define ANY(name) cmocka_unit_test_setup_teardown (name, setup_any, teardown)
#define NAMED(name) cmocka_unit_test_setup_teardown (name, setup_disk, teardown)
#define VIEWS(name) \
  cmocka_unit_test_setup_teardown (name, setup_views, teardown)
  const struct CMUnitTest tests[] = {
    ANY (test_any_name),
    NAMED (test_one_name),
    cmocka_unit_test_setup_teardown (test_empty_name, setup_empty, teardown),
    ANY (test_list_limit),
    cmocka_unit_test_setup_teardown (test_unlisted, setup_unlisted, teardown),
    ANY (test_view_names),
    VIEWS (test_view_beside_one_name),
    cmocka_unit_test_setup_teardown (test_views_listed, setup_unlisted,
                                     teardown),
    VIEWS (test_views_list_limit),
    cmocka_unit_test_setup_teardown (test_list_and_ask, setup_many, teardown),
    ANY (test_options_bound),
    ANY (test_delta_contexts),
    ANY (test_delta_read),
    ANY (test_delta_past_end),
    ANY (test_delta_changes_refused),
    ANY (test_delta_status),
    NAMED (test_delta_removed),
    NAMED (test_disk_beside),
  };

  return cmocka_run_group_tests (tests, NULL, NULL);
}
