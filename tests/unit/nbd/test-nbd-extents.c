/* nbdkit-dirty-bitmap-filter
 * SPDX-License-Identifier: BSD-3-Clause
 * Copyright the nbdkit-dirty-bitmap-filter authors
 */

/* BLOCK_STATUS of filter/nbd: the rules of the wire that clients depend
 * on, R1 to R8 and R13 of the comments in nbd/extents.c.
 */

#include <config.h>

#include <errno.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "common/bytes.h"
#include "nbd-fixture.h"

/* nbd/extents.h */
extern size_t extents_max;

#define BLOCK 4096
#define NR_BLOCKS 4096
#define SIZE ((uint64_t) BLOCK * NR_BLOCKS)

static uint8_t *fine, *coarse;  /* the bitmaps' granules */

static int
setup (void **state)
{
  (void) state;
  fixture_init (&f, SIZE);
  f.disk->block_size = BLOCK;
  f.disk->flags = calloc (NR_BLOCKS, 1);
  f.disk->depths = calloc (NR_BLOCKS, 1);
  fake_disk_add_bitmap (f.disk, "fine", 512);
  fake_disk_add_bitmap (f.disk, "coarse", 65536);
  fine = f.disk->bitmaps[0].dirty;
  coarse = f.disk->bitmaps[1].dirty;
  extents_max = (1 << 20) - 1;
  fixture_start (&f, false);
  return 0;
}

#define BASE "base:allocation"
#define DEPTH "qemu:allocation-depth"
#define FINE "qemu:dirty-bitmap:fine"
#define COARSE "qemu:dirty-bitmap:coarse"

static const char *const all[] = { BASE, DEPTH, FINE, COARSE, NULL };

#define MAX_DEPTH 255

/* The truth: what context id says of a byte. */
static uint32_t
truth (uint32_t id, uint64_t offset)
{
  uint32_t flags;

  switch (id) {
  case 0:
    flags = f.disk->flags[offset / BLOCK];
    return flags == DISK_EXTENT_HOLE ? 0 : flags;
  case 1:
    return f.disk->depths[offset / BLOCK];
  case 2:
    return fine[offset / 512];
  default:
    return coarse[offset / 65536];
  }
}

#define MAX_EXTENTS 40000

struct chunk {
  uint32_t id;
  size_t nr;
  struct { uint64_t length, flags; } extent[MAX_EXTENTS];
};

static struct chunk chunk;

/* A flush may be answered between any two chunks. */
#define FLUSH_COOKIE 7

static unsigned nr_flushed;

/* Receive a chunk, and check all that holds for every chunk: it belongs
 * to cookie 42, covers the range exactly, and equal neighbours are
 * merged.
 */
static void
recv_status (int fd, uint32_t id, bool last, uint64_t length)
{
  struct reply reply;
  uint64_t sum = 0;
  const size_t head = client_wants_extended ? 8 : 4;
  const size_t each = client_wants_extended ? 16 : 8;

  for (;;) {
    recv_reply (fd, &reply, 0);
    if (reply.cookie != FLUSH_COOKIE)
      break;
    assert_int_equal (reply.error, 0);
    free (reply.data);
    nr_flushed++;
  }
  assert_true (reply.structured);
  assert_int_equal (reply.type, client_wants_extended
                    ? NBD_REPLY_TYPE_BLOCK_STATUS_EXT
                    : NBD_REPLY_TYPE_BLOCK_STATUS);
  assert_int_equal (reply.cookie, 42);
  assert_int_equal (reply.flags, last ? NBD_REPLY_FLAG_DONE : 0);
  assert_int_equal (reply.length % each, head);
  chunk.id = get_be32 (reply.data);
  assert_int_equal (chunk.id, id);
  chunk.nr = reply.length / each;
  assert_in_range (chunk.nr, 1, MAX_EXTENTS);
  assert_true (chunk.nr <= extents_max);
  if (client_wants_extended)
    assert_int_equal (chunk.nr, get_be32 (reply.data + 4));
  for (size_t i = 0; i < chunk.nr; ++i) {
    const uint8_t *p = reply.data + head + each * i;

    chunk.extent[i].length =
      client_wants_extended ? get_be64 (p) : get_be32 (p);
    chunk.extent[i].flags =
      client_wants_extended ? get_be64 (p + 8) : get_be32 (p + 4);
    assert_int_not_equal (chunk.extent[i].length, 0);
    assert_in_range (chunk.extent[i].flags, 0,
                     id == 0 ? 3 : id == 1 ? MAX_DEPTH : 1);
    assert_true (i == 0 ||
                 chunk.extent[i].flags != chunk.extent[i - 1].flags);
    sum += chunk.extent[i].length;
  }
  free (reply.data);
  assert_true (length == 0 || sum == length);
}

static void
check_exact (uint64_t offset)
{
  for (size_t i = 0; i < chunk.nr; ++i) {
    assert_int_equal (truth (chunk.id, offset), chunk.extent[i].flags);
    assert_int_equal (truth (chunk.id, offset + chunk.extent[i].length - 1),
                      chunk.extent[i].flags);
    for (uint64_t j = 0; j < chunk.extent[i].length; j += 512)
      assert_int_equal (truth (chunk.id, offset + j), chunk.extent[i].flags);
    offset += chunk.extent[i].length;
  }
}

/* Coarsened: what is not told is only ever told as what is safe. */
static void
check_safe (uint64_t offset)
{
  const uint32_t safe = chunk.id == 0 ? 0 : 1;

  for (size_t i = 0; i < chunk.nr; ++i) {
    for (uint64_t j = 0; j < chunk.extent[i].length; j += 512)
      if (chunk.extent[i].flags != safe)
        assert_int_equal (truth (chunk.id, offset + j),
                          chunk.extent[i].flags);
    offset += chunk.extent[i].length;
  }
}

static void
ask_all (int fd, uint64_t offset, uint64_t length,
         void (*check) (uint64_t offset))
{
  send_request (fd, 0, NBD_CMD_BLOCK_STATUS, 42, offset, length);
  recv_status (fd, 0, false, length);
  check (offset);
  recv_status (fd, 1, false, length);
  check (offset);
  recv_status (fd, 2, false, length);
  check (offset);
  recv_status (fd, 3, true, length);
  check (offset);
}

static void
randomize (void)
{
  for (size_t i = 0; i < NR_BLOCKS; ++i) {
    f.disk->flags[i] = (const uint8_t[]) { 0, 2, 3, 1 }[random () % 4];
    f.disk->depths[i] = (const uint8_t[]) { 0, 1, 2, 3, MAX_DEPTH }
      [random () % 5];
  }
  for (size_t i = 0; i < SIZE / 512; ++i)
    fine[i] = random () % 2;
  for (size_t i = 0; i < SIZE / 65536; ++i)
    coarse[i] = random () % 2;
}

static void
test_exact (void **state)
{
  int fd = client_open (&f, all);

  (void) state;
  srandom (1);
  ask_all (fd, 0, SIZE, check_exact);
  assert_int_equal (chunk.nr, 1);
  randomize ();
  ask_all (fd, 0, SIZE, check_exact);
  assert_int_equal (chunk.extent[0].flags, coarse[0]);
  ask_all (fd, 1, 7, check_exact);
  ask_all (fd, SIZE - 1, 1, check_exact);
  for (int i = 0; i < 300; ++i) {
    uint64_t offset = random () % SIZE;

    ask_all (fd, offset, 1 + random () % (i < 200 ? 100000 : SIZE - offset) %
             (SIZE - offset), check_exact);
  }
  close (fd);
}

/* A bitmap alone (R4). */
static void
test_bitmap_alone (void **state)
{
  int fd = client_open (&f, (const char *const[]) { COARSE, NULL });

  (void) state;
  coarse[3] = 1;
  send_request (fd, 0, NBD_CMD_BLOCK_STATUS, 42, 0, SIZE);
  recv_status (fd, 3, true, SIZE);
  assert_int_equal (chunk.nr, 3);
  assert_int_equal (chunk.extent[0].length, 3 * 65536);
  assert_int_equal (chunk.extent[1].length, 65536);
  assert_int_equal (chunk.extent[1].flags, 1);
  check_exact (0);
  close (fd);
}

static void
test_req_one (void **state)
{
  int fd = client_open (&f, all);

  (void) state;
  for (size_t i = 0; i < 10; ++i)
    f.disk->flags[i] = 3;
  memset (f.disk->depths, 7, 5);
  fine[2] = 1;
  coarse[1] = 1;
  send_request (fd, NBD_CMD_FLAG_REQ_ONE, NBD_CMD_BLOCK_STATUS,
                42, 100, SIZE / 2);
  recv_status (fd, 0, false, 0);
  assert_int_equal (chunk.nr, 1);
  assert_int_equal (chunk.extent[0].length, 10 * BLOCK - 100);
  assert_int_equal (chunk.extent[0].flags, 3);
  recv_status (fd, 1, false, 0);
  assert_int_equal (chunk.nr, 1);
  assert_int_equal (chunk.extent[0].length, 5 * BLOCK - 100);
  assert_int_equal (chunk.extent[0].flags, 7);
  recv_status (fd, 2, false, 0);
  assert_int_equal (chunk.nr, 1);
  assert_int_equal (chunk.extent[0].length, 1024 - 100);
  recv_status (fd, 3, true, 0);
  assert_int_equal (chunk.nr, 1);
  assert_int_equal (chunk.extent[0].length, 65536 - 100);

  /* Clipped to the request. */
  send_request (fd, NBD_CMD_FLAG_REQ_ONE, NBD_CMD_BLOCK_STATUS,
                42, 65536, 300);
  recv_status (fd, 0, false, 300);
  recv_status (fd, 1, false, 300);
  recv_status (fd, 2, false, 300);
  recv_status (fd, 3, true, 300);
  assert_int_equal (chunk.extent[0].flags, 1);
  close (fd);
}

static void
test_coarse (void **state)
{
  static const size_t bounds[] = { 1, 2, 3, 10, 100, 511, 512, 513, 5000 };
  int fd = client_open (&f, all);

  (void) state;
  srandom (2);
  randomize ();
  /* Something that is worth telling even coarsely. */
  memset (f.disk->flags + 1000, 3, 1000);
  memset (f.disk->depths + 1000, 2, 1000);
  memset (fine + 8000, 0, 8000);
  memset (coarse + 100, 0, 60);
  for (size_t i = 0; i < sizeof bounds / sizeof bounds[0]; ++i) {
    extents_max = bounds[i];
    ask_all (fd, 0, SIZE, check_safe);
    ask_all (fd, 12345, SIZE / 3, check_safe);
  }

  /* The long runs survive coarsening. */
  extents_max = 100;
  send_request (fd, 0, NBD_CMD_BLOCK_STATUS, 42, 0, SIZE);
  for (uint32_t id = 0; id <= 3; ++id) {
    const uint64_t at = id <= 1 ? UINT64_C (1500) * BLOCK
      : id == 2 ? UINT64_C (12000) * 512 : UINT64_C (130) * 65536;
    uint64_t offset = 0;
    size_t i;

    recv_status (fd, id, id == 3, SIZE);
    for (i = 0; offset + chunk.extent[i].length <= at; ++i)
      offset += chunk.extent[i].length;
    assert_int_equal (chunk.extent[i].flags,
                      id == 0 ? 3 : id == 1 ? 2 : 0);
    assert_true (chunk.nr > 2);
  }
  close (fd);
}

/* A bound that is just kept changes nothing. */
static void
test_bound_is_exact (void **state)
{
  int fd = client_open (&f, (const char *const[]) { FINE, NULL });

  (void) state;
  for (size_t i = 0; i < 1000; ++i)
    fine[i] = i % 2;
  extents_max = 1000;
  send_request (fd, 0, NBD_CMD_BLOCK_STATUS, 42, 0, 1000 * 512);
  recv_status (fd, 2, true, 1000 * 512);
  assert_int_equal (chunk.nr, 1000);
  extents_max = 999;
  send_request (fd, 0, NBD_CMD_BLOCK_STATUS, 42, 0, 1000 * 512);
  recv_status (fd, 2, true, 1000 * 512);
  assert_int_equal (chunk.nr, 1);
  assert_int_equal (chunk.extent[0].flags, 1);
  close (fd);
}

/* Large chunks, which are not gathered, between small requests. */
static void
test_large_replies (void **state)
{
  int fd = client_open (&f, all);

  (void) state;
  for (size_t i = 0; i < SIZE / 512; ++i)
    fine[i] = i % 2;
  nr_flushed = 0;
  for (int i = 0; i < 20; ++i) {
    send_request (fd, 0, NBD_CMD_FLUSH, FLUSH_COOKIE, 0, 0);
    send_request (fd, 0, NBD_CMD_BLOCK_STATUS, 42, 0, SIZE);
    recv_status (fd, 0, false, SIZE);
    recv_status (fd, 1, false, SIZE);
    recv_status (fd, 2, false, SIZE);
    assert_int_equal (chunk.nr, SIZE / 512);
    recv_status (fd, 3, true, SIZE);
  }
  while (nr_flushed < 20) {
    expect_error (fd, FLUSH_COOKIE, 0);
    nr_flushed++;
  }
  close (fd);
}

static int
fail_at (struct disk *d, enum fake_op op, uint64_t offset, uint64_t count)
{
  (void) d;
  (void) count;
  return op == FAKE_EXTENT && offset >= 10 * BLOCK ? EIO : 0;
}

static int
fail_depth_at (struct disk *d, enum fake_op op, uint64_t offset,
               uint64_t count)
{
  (void) d;
  (void) count;
  return op == FAKE_DEPTH && offset >= 10 * BLOCK ? EIO : 0;
}

static void
test_error_is_last (void **state)
{
  int fd = client_open (&f, all);

  (void) state;
  f.disk->hook = fail_at;
  send_request (fd, 0, NBD_CMD_BLOCK_STATUS, 1, 0, SIZE);
  expect_error (fd, 1, NBD_EIO);
  f.disk->hook = fail_depth_at;
  send_request (fd, 0, NBD_CMD_BLOCK_STATUS, 42, 0, SIZE);
  recv_status (fd, 0, false, SIZE);
  expect_error (fd, 42, NBD_EIO);
  f.disk->hook = NULL;
  ask_all (fd, 0, SIZE, check_exact);
  close (fd);
}

/* The bitmap of a context is removed, while the client has it. */
static void
test_removed_bitmap (void **state)
{
  int fd = client_open (&f, all);

  (void) state;
  ask_all (fd, 0, SIZE, check_exact);
  fake_disk_remove_bitmap (f.disk, "fine");
  for (unsigned i = 0; i < 3; ++i) {
    send_request (fd, 0, NBD_CMD_BLOCK_STATUS, 42, 0, SIZE);
    recv_status (fd, 0, false, SIZE);
    recv_status (fd, 1, false, SIZE);
    expect_error (fd, 42, NBD_EIO);
  }
  client_check_alive (&f, fd);
  close (fd);
}

static int
setup_large (void **state)
{
  (void) state;
  fixture_init (&f, UINT64_C (6) << 30);
  f.disk->block_size = 1 << 24;
  fake_disk_add_bitmap (f.disk, "coarse", 1 << 24);
  extents_max = (1 << 20) - 1;
  fixture_start (&f, false);
  return 0;
}

/* 4 GiB less one in one extent. */
static void
test_4g (void **state)
{
  int fd = client_open (&f, (const char *const[]) { BASE, COARSE, NULL });

  (void) state;
  send_request (fd, 0, NBD_CMD_BLOCK_STATUS, 42, 1 << 30, 0xffffffff);
  recv_status (fd, 0, false, 0xffffffff);
  assert_int_equal (chunk.nr, 1);
  recv_status (fd, 2, true, 0xffffffff);
  assert_int_equal (chunk.nr, 1);
  assert_int_equal (chunk.extent[0].length, 0xffffffff);
  close (fd);
}

int
main (void)
{
  const struct CMUnitTest tests[] = {
    TEST (test_exact),
    TEST (test_bitmap_alone),
    TEST (test_req_one),
    TEST (test_coarse),
    TEST (test_bound_is_exact),
    TEST (test_large_replies),
    TEST (test_error_is_last),
    TEST (test_removed_bitmap),
    cmocka_unit_test_setup_teardown (test_4g, setup_large, teardown),
  };

  int failed = cmocka_run_group_tests_name ("compact", tests, NULL, NULL);

  client_wants_extended = true;
  return failed +
    cmocka_run_group_tests_name ("extended headers", tests, NULL, NULL);
}
