/* nbdkit-dirty-bitmap-filter
 * SPDX-License-Identifier: BSD-3-Clause
 * Copyright the nbdkit-dirty-bitmap-filter authors
 */

/* LIST_META_CONTEXT and SET_META_CONTEXT of filter/nbd: what each kind of
 * query matches, and malformed ones.
 */

#include <config.h>

#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "common/bytes.h"
#include "nbd-fixture.h"

#define SIZE (1024 * 1024)
#define FIXED_NO_ZEROES (NBD_FLAG_FIXED_NEWSTYLE | NBD_FLAG_NO_ZEROES)

static int
setup (void **state)
{
  (void) state;
  fixture_init (&f, SIZE);
  fake_disk_add_bitmap (f.disk, "tuesday", 65536);
  fake_disk_add_bitmap (f.disk, "monday", 65536);
  fake_disk_add_bitmap (f.disk, "mon", 65536);
  fixture_start (&f, false);
  return 0;
}

static int
greeted (void)
{
  int fd = fixture_connect (&f);

  client_greet (fd, FIXED_NO_ZEROES);
  return fd;
}

/* The stream is in step: GO works. */
static void
finish (int fd)
{
  client_go (fd, "", NULL);
  send_request (fd, 0, NBD_CMD_FLUSH, 77, 0, 0);
  expect_error (fd, 77, 0);
  close (fd);
}

/* Ask for queries; the replies must be these names with these ids. */
static void
check_query (int fd, uint32_t option, const char *const *queries,
             const char *const *names, const uint32_t *ids)
{
  uint8_t buf[16384];
  struct option_reply reply;
  uint32_t n = make_context_query (buf, "", queries);

  send_option (fd, option, buf, n);
  for (size_t i = 0; names[i] != NULL; ++i) {
    expect_option_reply (fd, option, NBD_REP_META_CONTEXT, &reply);
    assert_int_equal (get_be32 (reply.data),
                      option == NBD_OPT_SET_META_CONTEXT ? ids[i] : 0);
    assert_string_equal ((char *) reply.data + 4, names[i]);
  }
  expect_option_reply (fd, option, NBD_REP_ACK, NULL);
}

#define LIST(...) ((const char *const[]) { __VA_ARGS__ __VA_OPT__ (,) NULL })
#define IDS(...) ((const uint32_t[]) { __VA_ARGS__ })
#define BASE "base:allocation"
#define DEPTH "qemu:allocation-depth"
#define TUESDAY "qemu:dirty-bitmap:tuesday"
#define MONDAY "qemu:dirty-bitmap:monday"
#define MON "qemu:dirty-bitmap:mon"
#define FRIDAY "qemu:dirty-bitmap:friday"

static void
test_queries (void **state)
{
  static const struct {
    const char *query;
    const char *list[6], *set[6];
    uint32_t ids[4];
  } rows[] = {
    { "", { NULL }, { NULL }, { 0 } },
    { "base:", { BASE }, { NULL }, { 0 } },
    { BASE, { BASE }, { BASE }, { 0 } },
    { "base:foo", { NULL }, { NULL }, { 0 } },
    { "base", { NULL }, { NULL }, { 0 } },
    { "base:allocation2", { NULL }, { NULL }, { 0 } },
    { "qemu:", { DEPTH, TUESDAY, MONDAY, MON }, { NULL }, { 0 } },
    { "qemu:dirty-bitmap:", { TUESDAY, MONDAY, MON }, { NULL }, { 0 } },
    { MONDAY, { MONDAY }, { MONDAY }, { 3 } },
    { MON, { MON }, { MON }, { 4 } },
    { TUESDAY, { TUESDAY }, { TUESDAY }, { 2 } },
    { "qemu:dirty-bitmap:tue", { NULL }, { NULL }, { 0 } },
    { "qemu:dirty-bitmap:mondays", { NULL }, { NULL }, { 0 } },
    { "qemu:dirty-bitmap", { NULL }, { NULL }, { 0 } },
    { "qemu", { NULL }, { NULL }, { 0 } },
    { DEPTH, { DEPTH }, { DEPTH }, { 1 } },
    { "qemu:allocation-depth:", { NULL }, { NULL }, { 0 } },
    { "qemu:allocation", { NULL }, { NULL }, { 0 } },
    { "x-other:thing", { NULL }, { NULL }, { 0 } },
  };
  int fd = greeted ();

  (void) state;
  client_structured (fd);
  for (size_t i = 0; i < sizeof rows / sizeof rows[0]; ++i) {
    check_query (fd, NBD_OPT_LIST_META_CONTEXT, LIST (rows[i].query),
                 rows[i].list, NULL);
    check_query (fd, NBD_OPT_SET_META_CONTEXT, LIST (rows[i].query),
                 rows[i].set, rows[i].ids);
  }
  check_query (fd, NBD_OPT_LIST_META_CONTEXT, LIST (),
               LIST (BASE, DEPTH, TUESDAY, MONDAY, MON), NULL);
  check_query (fd, NBD_OPT_SET_META_CONTEXT, LIST (), LIST (), NULL);
  /* In the order of ids, whatever the order of queries; no duplicates. */
  check_query (fd, NBD_OPT_SET_META_CONTEXT,
               LIST (MON, BASE, "y:", MONDAY, BASE, MON),
               LIST (BASE, MONDAY, MON), IDS (0, 3, 4));
  check_query (fd, NBD_OPT_SET_META_CONTEXT,
               LIST (MON, DEPTH, BASE, DEPTH, TUESDAY),
               LIST (BASE, DEPTH, TUESDAY, MON), IDS (0, 1, 2, 4));
  check_query (fd, NBD_OPT_LIST_META_CONTEXT,
               LIST (MON, "qemu:", "base:", MONDAY, BASE, MON),
               LIST (BASE, DEPTH, TUESDAY, MONDAY, MON), NULL);
  finish (fd);
}

static void
test_list_without_structured (void **state)
{
  int fd = greeted ();

  (void) state;
  check_query (fd, NBD_OPT_LIST_META_CONTEXT, LIST ("base:"),
               LIST (BASE), NULL);
  send_option (fd, NBD_OPT_SET_META_CONTEXT, "\0\0\0\0\0\0\0\0", 8);
  expect_option_reply (fd, NBD_OPT_SET_META_CONTEXT,
                       NBD_REP_ERR_INVALID, NULL);
  finish (fd);
}

static void
bad_query (int fd, const void *buf, uint32_t length)
{
  send_option (fd, NBD_OPT_SET_META_CONTEXT, buf, length);
  expect_option_reply (fd, NBD_OPT_SET_META_CONTEXT,
                       NBD_REP_ERR_INVALID, NULL);
  send_option (fd, NBD_OPT_LIST_META_CONTEXT, buf, length);
  expect_option_reply (fd, NBD_OPT_LIST_META_CONTEXT,
                       NBD_REP_ERR_INVALID, NULL);
}

static void
test_queries_malformed (void **state)
{
  uint8_t buf[16384] = { 0 };
  uint32_t n;
  int fd = greeted ();

  (void) state;
  client_structured (fd);
  n = make_context_query (buf, "disk", LIST (BASE, MONDAY));
  for (uint32_t i = 0; i < n; ++i)
    bad_query (fd, buf, i);
  bad_query (fd, buf, n + 1);   /* trailing garbage */
  bad_query (fd, buf, n + 9);
  buf[20] = '\0';               /* inside the first query */
  bad_query (fd, buf, n);
  buf[5] = '\0';                /* inside the export's name */
  bad_query (fd, buf, n);
  memset (buf, 'a', sizeof buf);
  put_be32 (buf, 4097);
  bad_query (fd, buf, sizeof buf);
  put_be32 (buf, 0xfffffff0);
  bad_query (fd, buf, 100);
  put_be32 (buf, 0);
  put_be32 (buf + 4, 0xffffffff); /* that many queries */
  put_be32 (buf + 8, 0);
  bad_query (fd, buf, 12);
  put_be32 (buf + 4, 1);
  put_be32 (buf + 8, 0xffffffff); /* of that length */
  bad_query (fd, buf, 100);
  finish (fd);
}

static void
test_long_query_is_skipped (void **state)
{
  char *longest = malloc (4098), *too_long = malloc (4098);
  int fd = greeted ();

  (void) state;
  memset (longest, 'q', 4098);
  memset (too_long, 'q', 4098);
  longest[4096] = '\0';
  too_long[4097] = '\0';
  client_structured (fd);
  check_query (fd, NBD_OPT_SET_META_CONTEXT,
               LIST (longest, too_long, BASE), LIST (BASE), IDS (0));
  finish (fd);
  free (longest);
  free (too_long);
}

static void
test_many_queries (void **state)
{
  const uint32_t nr = 500000;
  uint8_t *buf = calloc (nr + 2, 4);
  struct option_reply reply;
  int fd = greeted ();

  (void) state;
  client_structured (fd);
  put_be32 (buf + 4, nr);
  send_option (fd, NBD_OPT_SET_META_CONTEXT, buf, (nr + 2) * 4);
  expect_option_reply (fd, NBD_OPT_SET_META_CONTEXT, NBD_REP_ACK, &reply);
  finish (fd);
  free (buf);
}

/* Is BLOCK_STATUS possible after this GO? */
static void
go_and_try_status (int fd, const char *name, bool possible)
{
  struct reply reply;

  client_go (fd, name, NULL);
  send_request (fd, 0, NBD_CMD_BLOCK_STATUS, 5, 0, 512);
  recv_reply (fd, &reply, 0);
  assert_true (reply.structured);
  assert_int_equal (reply.type, possible ? NBD_REPLY_TYPE_BLOCK_STATUS
                                         : NBD_REPLY_TYPE_ERROR);
  if (!possible)
    assert_int_equal (reply.error, NBD_EINVAL);
  free (reply.data);
  close (fd);
}

/* An option that is an export's name and no information requests. */
static uint32_t
make_info (uint8_t *buf, const char *name)
{
  size_t n = strlen (name);

  put_be32 (buf, n);
  memcpy (buf + 4, name, n);
  put_be16 (buf + 4 + n, 0);
  return 6 + n;
}

static void
test_set_is_replaced (void **state)
{
  uint8_t buf[256];
  int fd;

  (void) state;
  fd = greeted ();
  client_structured (fd);
  client_set_contexts (fd, LIST (BASE), 1);
  go_and_try_status (fd, "", true);

  fd = greeted ();
  client_structured (fd);
  client_set_contexts (fd, LIST (BASE), 1);
  client_set_contexts (fd, LIST (), 0);
  go_and_try_status (fd, "", false);

  /* Even by one that fails. */
  fd = greeted ();
  client_structured (fd);
  client_set_contexts (fd, LIST (BASE), 1);
  send_option (fd, NBD_OPT_SET_META_CONTEXT, buf,
               make_context_query (buf, "", LIST (BASE)) - 1);
  expect_option_reply (fd, NBD_OPT_SET_META_CONTEXT,
                       NBD_REP_ERR_INVALID, NULL);
  go_and_try_status (fd, "", false);

  /* LIST and INFO, of whatever export, do not disturb it. */
  fd = greeted ();
  client_structured (fd);
  client_set_contexts (fd, LIST (BASE), 1);
  check_query (fd, NBD_OPT_LIST_META_CONTEXT, LIST (MON), LIST (MON), NULL);
  send_option (fd, NBD_OPT_INFO, buf, make_info (buf, "other"));
  expect_option_reply (fd, NBD_OPT_INFO, NBD_REP_INFO, NULL);
  expect_option_reply (fd, NBD_OPT_INFO, NBD_REP_INFO, NULL);
  expect_option_reply (fd, NBD_OPT_INFO, NBD_REP_ACK, NULL);
  go_and_try_status (fd, "", true);

  /* Selected for "", opened is "other". */
  fd = greeted ();
  client_structured (fd);
  client_set_contexts (fd, LIST (BASE), 1);
  go_and_try_status (fd, "other", false);
}

/* Each option tells what is offered then.  What was selected keeps its id
 * and its bitmap.
 */
static void
test_set_changes (void **state)
{
  int fd = greeted (), other;
  struct reply reply;

  (void) state;
  client_structured (fd);
  check_query (fd, NBD_OPT_SET_META_CONTEXT, LIST (MON), LIST (MON), IDS (4));
  fake_disk_remove_bitmap (f.disk, "tuesday");
  fake_disk_add_bitmap (f.disk, "friday", 65536);
  other = greeted ();
  client_structured (other);
  check_query (other, NBD_OPT_LIST_META_CONTEXT, LIST ("qemu:dirty-bitmap:"),
               LIST (MONDAY, MON, FRIDAY), NULL);
  check_query (other, NBD_OPT_SET_META_CONTEXT, LIST (TUESDAY, MON, FRIDAY),
               LIST (MON, FRIDAY), IDS (3, 4));

  client_go (fd, "", NULL);
  assert_int_equal (f.disk->bitmaps[2].holders, 1);
  assert_int_equal (f.disk->bitmaps[3].holders, 0);
  memset (f.disk->bitmaps[2].dirty, 1, SIZE / 65536);
  send_request (fd, 0, NBD_CMD_BLOCK_STATUS, 5, 0, SIZE);
  recv_reply (fd, &reply, 0);
  assert_int_equal (reply.type, NBD_REPLY_TYPE_BLOCK_STATUS);
  assert_int_equal (get_be32 (reply.data), 4);
  assert_int_equal (get_be32 (reply.data + 8), 1);
  free (reply.data);
  fake_disk_remove_bitmap (f.disk, "mon");
  send_request (fd, 0, NBD_CMD_BLOCK_STATUS, 6, 0, SIZE);
  expect_error (fd, 6, NBD_EIO);
  client_check_alive (&f, fd);
  close (fd);
  close (other);
}

int
main (void)
{
  const struct CMUnitTest tests[] = {
    TEST (test_queries),
    TEST (test_list_without_structured),
    TEST (test_queries_malformed),
    TEST (test_long_query_is_skipped),
    TEST (test_many_queries),
    TEST (test_set_is_replaced),
    TEST (test_set_changes),
  };

  return cmocka_run_group_tests (tests, NULL, NULL);
}
