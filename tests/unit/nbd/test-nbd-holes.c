/* nbdkit-dirty-bitmap-filter
 * SPDX-License-Identifier: BSD-3-Clause
 * Copyright the nbdkit-dirty-bitmap-filter authors
 */

/* READs of what reads as zeroes: which holes are told, of how many chunks
 * a reply is, that the disk is not asked for a hole, and that no memory is
 * taken.
 */

#include <config.h>

#include <errno.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "common/bytes.h"
#include "common/cleanup.h"
#include "disk/disk.h"
#include "nbd/server.h"
#include "nbd/stream.h"
#include "image.h"
#include "nbd-fixture.h"

#define BLOCK 512
#define SIZE (UINT64_C (40) << 20)
#define MAX (32 << 20)
#define KIB 1024

static uint8_t buf[MAX];

static void
set_hole (uint64_t offset, uint64_t length, bool hole)
{
  assert_true (offset % BLOCK == 0 && length % BLOCK == 0);
  memset (f.disk->flags + offset / BLOCK, hole ? DISK_EXTENT_ZERO : 0,
          length / BLOCK);
  for (uint64_t i = offset; i < offset + length; ++i)
    f.disk->data[i] = hole ? 0 : 1 + i % 251;
}

static int
setup (void **state)
{
  (void) state;
  fixture_init (&f, SIZE);
  f.disk->block_size = BLOCK;
  f.disk->flags = calloc (SIZE / BLOCK, 1);
  assert_non_null (f.disk->flags);
  fake_disk_add_bitmap (f.disk, "b", 64 * KIB);
  set_hole (0, SIZE, false);
  fixture_start (&f, false);
  return 0;
}

static void
check_bytes (uint64_t offset, uint32_t length)
{
  assert_memory_equal (buf, f.disk->data + offset, length);
}

static struct read_reply
read_and_check (int fd, uint16_t flags, uint64_t offset, uint32_t length)
{
  struct read_reply reply;

  memset (buf, 0xa5, length);
  send_request (fd, flags, NBD_CMD_READ, 77, offset, length);
  reply = recv_read (fd, 77, offset, length, buf);
  assert_int_equal (reply.error, 0);
  assert_int_equal (reply.got, length);
  check_bytes (offset, length);
  return reply;
}

static int
open_form (bool extended)
{
  int fd;

  client_wants_extended = extended;
  fd = client_open (&f, NULL);
  client_wants_extended = false;
  return fd;
}

static int
open_simple (void)
{
  int fd = fixture_connect (&f);

  client_greet (fd, NBD_FLAG_FIXED_NEWSTYLE | NBD_FLAG_NO_ZEROES);
  client_go (fd, "", NULL);
  return fd;
}

/* Lengths of what lies one behind the other, data first; 0 ends. */
#define NR 12
struct shape {
  uint64_t offset;
  uint32_t length;              /* of the READ, at offset */
  uint32_t disk[NR];            /* what lies at 1 MiB: data, hole, data ... */
  int chunk[NR];                /* expected; those of holes are negative */
};

#define AT (UINT64_C (1) << 20)
static const struct shape shapes[] = {
  /* One kind only, of any length. */
  { AT, 1, { 4096 }, { 1 } },
  { AT, 1, { 0, 4096 }, { -1 } },
  { AT + 700, 4096 - 700, { 0, 4096 }, { -(4096 - 700) } },
  { AT, 64 * KIB, { 64 * KIB }, { 64 * KIB } },
  { AT, 64 * KIB, { 0, 64 * KIB }, { -64 * KIB } },
  { AT, 64 * KIB + 512, { 0, 65 * KIB }, { -(64 * KIB + 512) } },
  { AT, 1 << 20, { 1 << 20 }, { 1 << 20 } },
  { AT, 1 << 20, { 0, 1 << 20 }, { -(1 << 20) } },
  /* As libnbd's interop/structured-read has it. */
  { AT, 1024, { 0, 512, 512 }, { -512, 512 } },
  { AT, 1024, { 512, 512 }, { 512, -512 } },
  { AT, 1536, { 512, 512, 512 }, { 512, -512, 512 } },
  { AT, 2048, { 512, 512, 512, 512 }, { 512, -512, 512, -512 } },
  /* What is cut off a hole is not worth a chunk. */
  { AT + 1, 1023, { 0, 512, 512 }, { 1023 } },
  { AT, 1023, { 512, 512 }, { 1023 } },
  { AT + 1, 1535, { 0, 1024, 512 }, { -1023, 512 } },
  /* Not more than four: the last is all that is left. */
  { AT, 4096, { 512, 512, 512, 512, 512, 512, 512, 512 },
    { 512, -512, 512, 4096 - 1536 } },
  { AT, 4096, { 0, 512, 512, 512, 512, 512, 512, 512, 512 },
    { -512, 512, -512, 4096 - 1536 } },
  { AT, 64 * KIB, { 0, 4096, 4096, 4096, 4096, 4096, 44 * KIB },
    { -4096, 4096, -4096, 52 * KIB } },
  { AT, 2560, { 512, 512, 512, 512 + 512 }, { 512, -512, 512, -1024 } },
  /* Longer ones: from 32 KiB on. */
  { AT, 128 * KIB, { 64 * KIB, 64 * KIB }, { 64 * KIB, -64 * KIB } },
  { AT, 128 * KIB, { 0, 64 * KIB, 64 * KIB }, { -64 * KIB, 64 * KIB } },
  { AT, 128 * KIB, { 48 * KIB, 32 * KIB, 48 * KIB },
    { 48 * KIB, -32 * KIB, 48 * KIB } },
  { AT, 128 * KIB, { 48 * KIB, 32 * KIB - 512, 48 * KIB + 512 },
    { 128 * KIB } },
  { AT, 128 * KIB, { 0, 16 * KIB, 96 * KIB, 16 * KIB }, { 128 * KIB } },
  { AT, 1 << 20, { 4096, 100 * KIB, 4096, 916 * KIB },
    { 4096, -100 * KIB, 4096, -916 * KIB } },
  { AT, 1 << 20, { 0, 40 * KIB, 512, 40 * KIB, 512, 943 * KIB },
    { -40 * KIB, 512, -40 * KIB, 512, -943 * KIB } },
  /* In parts: data end where a part does, holes do not.  What of a hole is
   * in a part that begins with data must be worth a chunk by itself.
   */
  { AT, 2 << 20, { 0, 2 << 20 }, { -(2 << 20) } },
  { AT, (1 << 20) + 512, { 100 * KIB, 924 * KIB + 512 },
    { 128 * KIB, -(896 * KIB + 512) } },
  { AT, (1 << 20) + 512, { 96 * KIB, 928 * KIB + 512 },
    { 96 * KIB, -(928 * KIB + 512) } },
  { AT, (1 << 20) + 512, { 200 * KIB, 824 * KIB, 512 },
    { 128 * KIB, 72 * KIB, -824 * KIB, 512 } },
  { AT + 512, 1 << 20, { 1024, 1 << 20 }, { 512, -((1 << 20) - 512) } },
  { AT, MAX, { 0, MAX - 512, 512 }, { -(MAX - 512), 512 } },
};

static void
lay_out (const struct shape *s)
{
  uint64_t at = AT;

  for (size_t i = 0; i < NR; ++i) {
    set_hole (at, s->disk[i], i % 2 == 1);
    at += s->disk[i];
  }
}

static void
check_shape (int fd, const struct shape *s)
{
  struct read_reply reply;
  unsigned reads = 0, nr = 0;

  lay_out (s);
  for (size_t i = 0; i < NR && s->chunk[i] != 0; ++i, ++nr)
    reads += s->chunk[i] > 0;
  f.disk->calls[FAKE_READ] = 0;
  reply = read_and_check (fd, 0, s->offset, s->length);
  assert_int_equal (reply.nr_chunks, nr);
  for (size_t i = 0; i < nr; ++i)
    assert_int_equal (reply.chunk[i].is_hole
                      ? -(int) reply.chunk[i].length
                      : (int) reply.chunk[i].length, s->chunk[i]);
  assert_int_equal (f.disk->calls[FAKE_READ], reads);
}

static void
test_shapes (void **state)
{
  int simple = open_simple ();

  (void) state;
  for (int extended = 0; extended < 2; ++extended) {
    int fd = open_form (extended);

    for (size_t i = 0; i < sizeof shapes / sizeof shapes[0]; ++i) {
      const struct shape *s = &shapes[i];
      struct read_reply reply;

      check_shape (fd, s);
      /* In one piece, and never a hole. */
      reply = read_and_check (fd, NBD_CMD_FLAG_DF, s->offset, s->length);
      assert_int_equal (reply.nr_chunks, 1);
      assert_false (reply.chunk[0].is_hole);
      read_and_check (simple, 0, s->offset, s->length);
    }
    close (fd);
  }
  close (simple);
}

/* Whatever the disk is like. */
static void
test_bounds (void **state)
{
  uint64_t seed = 1;
  int fd = open_form (true);

  (void) state;
  for (unsigned i = 0; i < 300; ++i) {
    const unsigned run = 1u << random_next (&seed) % 9;
    uint32_t length = 1 + random_next (&seed) % (4 << 20);
    uint64_t offset;
    struct read_reply reply;

    if (i % 2)
      length = 1 + length % (64 * KIB);
    offset = random_next (&seed) % (SIZE - length);
    for (size_t j = offset / BLOCK; j <= (offset + length - 1) / BLOCK; ++j)
      set_hole (j * BLOCK, BLOCK,
                (j / run + random_next (&seed) % (1 + i % 3)) % 2);
    reply = read_and_check (fd, 0, offset, length);
    if (length <= 64 * KIB)
      assert_in_range (reply.nr_chunks, 1, 4);
    else
      assert_in_range (reply.nr_chunks, 1,
                       2 * (length / (32 * KIB)) + 1 +
                       length / (128 * KIB) + 1);
  }
  close (fd);
}

/* What was taken out of the budget, now or before. */
static uint64_t
budget_taken (void)
{
  struct budget *b = &f.server->budget;

  ACQUIRE_LOCK_FOR_CURRENT_SCOPE (&b->lock);
  return b->used + b->cached;
}

/* Holes cost no memory. */
static void
test_no_memory (void **state)
{
  static const uint32_t lengths[] = { 512, 1 << 20, 4 << 20, MAX };
  int fd = open_form (false);

  (void) state;
  set_hole (0, SIZE, true);
  f.disk->calls[FAKE_READ] = 0;
  for (size_t i = 0; i < sizeof lengths / sizeof lengths[0]; ++i) {
    struct read_reply reply = read_and_check (fd, 0, 512, lengths[i]);

    assert_int_equal (reply.nr_chunks, 1);
    assert_true (reply.chunk[0].is_hole);
  }
  assert_int_equal (f.disk->calls[FAKE_READ], 0);
  assert_int_equal (budget_taken (), 0);
  /* For data there has to be some. */
  set_hole (0, BLOCK, false);
  read_and_check (fd, 0, 0, 1 << 20);
  assert_true (budget_taken () > 0);
  close (fd);
}

/* Many in flight at once. */
static void
test_pipelined (void **state)
{
  enum { N = 64, LENGTH = 96 * KIB };
  int fd = open_form (true);

  (void) state;
  for (unsigned i = 0; i < N; ++i)
    set_hole (i * (uint64_t) LENGTH + i * BLOCK, 64 * KIB, true);
  for (unsigned i = 0; i < N; ++i)
    send_request (fd, 0, NBD_CMD_READ, i, i * (uint64_t) LENGTH, LENGTH);
  for (unsigned i = 0; i < N; ++i) {
    struct reply reply;

    recv_whole_reply (fd, &reply, 0);
    assert_int_equal (reply.error, 0);
    assert_int_equal (reply.length, 8 + LENGTH);
    memcpy (buf, reply.data + 8, LENGTH);
    check_bytes (get_be64 (reply.data), LENGTH);
    free (reply.data);
  }
  close (fd);
}

static uint64_t bad_byte;

static int
fail_bad_byte (struct disk *d, enum fake_op op, uint64_t offset,
               uint64_t count)
{
  (void) d;
  return op == FAKE_READ && bad_byte >= offset && bad_byte - offset < count
    ? EIO : 0;
}

/* What stands before an error is valid, small READ or large. */
static void
test_errors (void **state)
{
  static const uint32_t scale[] = { 1, 128 };

  (void) state;
  for (int extended = 0; extended < 2; ++extended)
    for (size_t i = 0; i < 2; ++i) {
      const uint32_t unit = 512 * scale[i];
      int fd = open_form (extended);
      struct read_reply reply;

      set_hole (AT, unit, false);
      set_hole (AT + unit, unit, true);
      set_hole (AT + 2 * unit, unit, false);
      f.disk->hook = fail_bad_byte;
      bad_byte = AT + 2 * unit;
      send_request (fd, 0, NBD_CMD_READ, 5, AT, 3 * unit);
      reply = recv_read (fd, 5, AT, 3 * unit, buf);
      assert_int_equal (reply.error, NBD_EIO);
      assert_true (reply.error_offset == AT + 2 * unit);
      assert_int_equal (reply.got, 2 * unit);
      check_bytes (AT, 2 * unit);

      /* None does, and no offset is told. */
      bad_byte = AT;
      send_request (fd, 0, NBD_CMD_READ, 6, AT, 3 * unit);
      reply = recv_read (fd, 6, AT, 3 * unit, buf);
      assert_int_equal (reply.error, NBD_EIO);
      assert_true (reply.error_offset == UINT64_MAX);
      assert_int_equal (reply.got, 0);
      f.disk->hook = NULL;
      read_and_check (fd, 0, AT, 3 * unit);
      close (fd);
    }
}

/* Of a delta what is clean is a hole, and what is dirty is as the disk. */
static void
test_delta (void **state)
{
  static const int chunks[] = { -64 * KIB, 32 * KIB, -96 * KIB, 64 * KIB };
  int fd = fixture_connect (&f);
  struct read_reply reply;

  (void) state;
  client_greet (fd, NBD_FLAG_FIXED_NEWSTYLE | NBD_FLAG_NO_ZEROES);
  client_structured (fd);
  client_go (fd, "delta:b", NULL);
  f.disk->bitmaps[0].dirty[1] = f.disk->bitmaps[0].dirty[2] = 1;
  f.disk->bitmaps[0].dirty[3] = 1;
  set_hole (96 * KIB, 96 * KIB, true);
  f.disk->calls[FAKE_READ] = 0;
  send_request (fd, 0, NBD_CMD_READ, 8, 0, 256 * KIB);
  reply = recv_read (fd, 8, 0, 256 * KIB, buf);
  assert_int_equal (reply.nr_chunks, 4);
  for (size_t i = 0; i < 4; ++i)
    assert_int_equal (reply.chunk[i].is_hole ? -(int) reply.chunk[i].length
                      : (int) reply.chunk[i].length, chunks[i]);
  assert_int_equal (f.disk->calls[FAKE_READ], 2);
  /* What the client sees of what is clean. */
  set_hole (0, 64 * KIB, true);
  check_bytes (0, 256 * KIB);
  /* Shorter runs of both kinds are zeroes among the data. */
  for (unsigned at = 60 * KIB; at < 200 * KIB; at += 777) {
    send_request (fd, 0, NBD_CMD_READ, 9, at, 20000);
    reply = recv_read (fd, 9, at, 20000, buf);
    assert_int_equal (reply.got, 20000);
    assert_in_range (reply.nr_chunks, 1, 3);
    check_bytes (at, 20000);
  }
  close (fd);
}

int
main (void)
{
  const struct CMUnitTest tests[] = {
    TEST (test_shapes),
    TEST (test_bounds),
    TEST (test_no_memory),
    TEST (test_pipelined),
    TEST (test_errors),
    TEST (test_delta),
  };

  return cmocka_run_group_tests (tests, NULL, NULL);
}
