/* nbdkit-dirty-bitmap-filter
 * SPDX-License-Identifier: BSD-3-Clause
 * Copyright the nbdkit-dirty-bitmap-filter authors
 */

/* Marks and flushes by one thread: what is written and what is not, an
 * error at every operation, and a crash at every point (I3, I4, I5).
 */

#include <config.h>

#include <errno.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include <cmocka.h>

#include "common/bytes.h"
#include "disk/flush.h"
#include "image.h"
#include "bitmap-image.h"

#define MIB (UINT64_C (1) << 20)
#define LIMIT (1 << 19)
#define SIZE (8 * MIB)

/* Writes of the first mark, in a world of large clusters, before the flags:
 * a cluster and the sector of a table, of two bitmaps.
 */
#define RESERVING 4

/* With clusters of 512 bytes: 4 clusters of bits, and half of one.  With
 * one of 4096 bytes: half of one, and little of one.
 */
static const struct bitmap_spec specs[] = {
  { .name = "fine", .granularity_bits = 9, .flags = 2 },
  { .name = "coarse", .granularity_bits = 12, .flags = 2 },
  { .name = "off", .granularity_bits = 12, .flags = 0, .table = "d",
    .fill = 0x11 },
};

struct world {
  struct crafted crafted;
  struct container *c;
  struct qcow2 *q;
  struct bitmap_set *set;
};

static void
open_world (struct world *w, unsigned cluster_bits)
{
  craft (&w->crafted, cluster_bits, SIZE, specs, 3);
  craft_garbage (&w->crafted, 12);
  w->c = recorder_open (&w->crafted.bytes, LIMIT);
  w->q = open_image (w->c, false);
  w->set = open_set (w->q);
}

static void
close_world (struct world *w)
{
  bitmap_set_close (w->set);
  qcow2_close (w->q);
  container_close (w->c);
  free (w->crafted.bytes.p);
}

static int
flush (struct world *w)
{
  return image_flush (w->q, w->set);
}

static void
stop_cleanly (struct world *w)
{
  assert_int_equal (image_stop (w->q, w->set), 0);
  if (bitmap_set_give_back_reserved (w->set))
    assert_int_equal (qcow2_stop (w->q), 0);
}

static uint32_t
disk_flags (struct world *w, unsigned i)
{
  return get_be32 (recorder_image (w->c).p + w->crafted.entry[i] + 12);
}

/* RAM and image say the same, and the image says that it is sound. */
static void
assert_synced (struct world *w)
{
  struct bytes now = recorder_image (w->c);

  assert_true (bitmap_set_all_stored (w->set));
  for (size_t i = 0; i < bitmap_set_nr_exposed (w->set); ++i) {
    const struct bitmap *b = bitmap_set_exposed (w->set, i);
    struct disk_bitmap d = disk_bitmap_read (&now, bitmap_name (b));

    assert_int_equal (d.state, DISK_CLEAN);
    for (uint64_t bit = 0; bit < d.nr_bits; ++bit)
      if (ram_bit (b, bit) != disk_bitmap_bit (&d, bit))
        fail_msg ("%s: bit %d differs", bitmap_name (b), (int) bit);
    if (strcmp (bitmap_name (b), "off") != 0)
      for (size_t at = div_round_up (d.nr_bits, 8); at < d.nr_bytes; ++at)
        assert_int_equal (d.bits[at], 0);
    free (d.bits);
  }
}

static void
test_cost (void **state)
{
  struct world w;

  (void) state;
  open_world (&w, 12);
  assert_cost (&w, 0, 0, bitmap_set_mark (w.set, 0, 0));

  /* The first change: a cluster and the sector of a table for each of the
   * two, then two flags and one barrier.  The next ones: nothing.
   */
  assert_cost (&w, 6, 1, mark_and_note (w.set, w.c, 1000, 1));
  assert_int_equal (disk_flags (&w, 0), 3);
  assert_int_equal (disk_flags (&w, 1), 3);
  assert_int_equal (disk_flags (&w, 2), 0);
  assert_false (bitmap_set_all_stored (w.set));
  assert_cost (&w, 0, 0, mark_and_note (w.set, w.c, 4 * MIB, 512));

  /* The first flush: two clusters, their refcounts; then two entries;
   * then two flags.  Without dirty L2 tables a barrier after each.
   */
  assert_cost (&w, 7, 3, assert_int_equal (flush (&w), 0));
  assert_synced (&w);
  /* Another one: nothing. */
  assert_cost (&w, 0, 0, assert_int_equal (flush (&w), 0));

  /* Marked already: nothing, though the flags are clear. */
  assert_cost (&w, 0, 0, mark_and_note (w.set, w.c, 1000, 1));
  assert_cost (&w, 0, 0, mark_and_note (w.set, w.c, 4 * MIB, 512));

  /* Marked already in the coarse one. */
  assert_cost (&w, 1, 1, mark_and_note (w.set, w.c, 512, 512 + 1));
  assert_int_equal (disk_flags (&w, 0), 3);
  assert_int_equal (disk_flags (&w, 1), 2);

  /* A piece in place, the flag: two barriers. */
  assert_cost (&w, 2, 2, assert_int_equal (flush (&w), 0));
  assert_synced (&w);
  close_world (&w);
}

/* A new cluster is written whole, whatever it had in it. */
static void
test_new_cluster (void **state)
{
  struct world w;

  (void) state;
  open_world (&w, 12);
  mark_and_note (w.set, w.c, 5 * MIB, 1);
  assert_int_equal (flush (&w), 0);
  assert_synced (&w);
  close_world (&w);
}

/* Clusters full of ones have no data; the last one, of which only a
 * part has valid bits, does.
 */
static void
test_uniform (void **state)
{
  struct disk_bitmap d;
  struct bytes now;
  struct world w;

  (void) state;
  open_world (&w, 9);
  mark_and_note (w.set, w.c, 0, MIB);
  assert_int_equal (flush (&w), 0);
  assert_synced (&w);
  now = recorder_image (w.c);
  d = disk_bitmap_read (&now, "fine");
  assert_int_equal (d.nr_zero, 3);
  assert_int_equal (d.nr_data, 1);
  free (d.bits);

  mark_and_note (w.set, w.c, MIB, 3 * MIB + 1);
  assert_int_equal (flush (&w), 0);
  assert_synced (&w);
  now = recorder_image (w.c);
  d = disk_bitmap_read (&now, "fine");
  assert_int_equal (d.nr_ones, 2);
  assert_int_equal (d.nr_data, 1);
  assert_int_equal (d.nr_zero, 1);
  free (d.bits);

  mark_and_note (w.set, w.c, 0, SIZE);
  assert_int_equal (flush (&w), 0);
  assert_synced (&w);
  now = recorder_image (w.c);
  d = disk_bitmap_read (&now, "fine");
  assert_int_equal (d.nr_ones, 4);
  free (d.bits);
  d = disk_bitmap_read (&now, "coarse");
  assert_int_equal (d.nr_data, 1);
  assert_int_equal (d.bits[255], 0xff);
  assert_int_equal (d.bits[256], 0);
  free (d.bits);

  /* The clusters that the ones replaced are given back. */
  stop_cleanly (&w);
  image_check (w.c, 1);
  recorder_crash (w.c, 64, 9);
  close_world (&w);
}

/* No space can be reserved: the mark succeeds, and so does the flush. */
static void
test_no_reservation (void **state)
{
  (void) state;
  for (unsigned nth = 0; nth < RESERVING; ++nth) {
    for (unsigned applied = 0; applied < 2; ++applied) {
      struct world w;

      open_world (&w, 12);
      recorder_fail (w.c, nth, false, applied);
      messages_clear ();
      mark_and_note (w.set, w.c, 4096, 512);
      assert_int_equal (recorder_failures (w.c), 1);
      assert_int_equal (messages_errors (), 0);
      assert_int_equal (flush (&w), 0);
      assert_synced (&w);
      recorder_crash (w.c, 64, nth);
      stop_cleanly (&w);
      image_check (w.c, 1);
      close_world (&w);
    }
  }
}

/* A mark that fails has set nothing, and leaves nothing that the next
 * flush does not tidy up.
 */
static void
test_mark_fails (void **state)
{
  (void) state;
  for (unsigned nth = RESERVING; nth < RESERVING + 3; ++nth) {
    for (unsigned applied = 0; applied < 2; ++applied) {
      const struct bitmap *fine;
      struct world w;

      open_world (&w, 12);
      fine = find_exposed (w.set, "fine");
      recorder_fail (w.c, nth, false, applied);
      messages_clear ();
      errno = 0;
      assert_int_equal (bitmap_set_mark (w.set, 4096, 512), -1);
      assert_int_equal (errno, EIO);
      assert_true (messages_errors () > 0);
      assert_false (ram_bit (fine, 8));
      assert_false (bitmap_set_all_stored (w.set));

      if (nth == RESERVING) {   /* The next flush tidies up ... */
        assert_int_equal (flush (&w), 0);
        assert_synced (&w);
      }
      /* ... or the next mark succeeds, which does not rely on what the
       * failed one may have written.
       */
      mark_and_note (w.set, w.c, 4096, 512);
      assert_true (ram_bit (fine, 8));
      assert_int_equal (disk_flags (&w, 0), 3);
      assert_int_equal (disk_flags (&w, 1), 3);
      assert_int_equal (flush (&w), 0);
      assert_synced (&w);
      recorder_crash (w.c, 256, 5);
      close_world (&w);
    }
  }
}

/* The last barrier of a flush fails: nobody knows what the flags are.  The
 * bitmap is not called stored, and the next flush writes them again.
 */
static void
test_last_barrier_fails (void **state)
{
  struct world w;

  (void) state;
  open_world (&w, 12);
  mark_and_note (w.set, w.c, 0, 1);
  assert_int_equal (flush (&w), 0);
  mark_and_note (w.set, w.c, 512, 1);
  assert_int_equal (disk_flags (&w, 0), 3);
  /* A piece, a barrier, the flags, and the barrier. */
  recorder_fail (w.c, 3, false, false);
  assert_int_equal (flush (&w), -1);
  assert_int_equal (disk_flags (&w, 0), 2);
  messages_clear ();
  assert_false (bitmap_set_all_stored (w.set));
  assert_message ("bitmap 'fine' could not be stored and may be left in use");
  assert_cost (&w, 1, 2, assert_int_equal (flush (&w), 0));
  assert_synced (&w);
  recorder_crash (w.c, 256, 1);
  close_world (&w);
}

/* A mark in each gap between two steps, of a flush that succeeds or
 * fails there.
 */
static void
marks_between_steps (unsigned gap, bool fail, bool fresh)
{
  struct world w;
  int r;

  open_world (&w, 12);
  mark_and_note (w.set, w.c, 0, 512);
  if (!fresh) {
    assert_int_equal (flush (&w), 0);
    mark_and_note (w.set, w.c, 8192, 512);
  }

#define GAP(n)                                                  \
  if (gap == (n)) {                                             \
    mark_and_note (w.set, w.c, 4 * MIB, 4096 + 1);              \
    if (fail) {                                                 \
      bitmap_flush_failed (w.set);                                    \
      goto out;                                                 \
    }                                                           \
  }

  assert_int_equal (bitmap_flush_data (w.set), 0);
  GAP (0);
  assert_int_equal (qcow2_barrier (w.q), 0);
  GAP (1);
  r = bitmap_flush_references (w.set);
  assert_int_not_equal (r, -1);
  GAP (2);
  if (r == 1)
    assert_int_equal (qcow2_barrier (w.q), 0);
  GAP (3);
  r = bitmap_flush_settle (w.set);
  assert_int_not_equal (r, -1);
  GAP (4);
  if (r == 1)
    assert_int_equal (qcow2_barrier (w.q), 0);
  GAP (5);
#undef GAP
  bitmap_flush_done (w.set);

 out:
  /* The mark came too late to be stored, and nobody says that it was. */
  assert_false (bitmap_set_all_stored (w.set));
  assert_int_equal (disk_flags (&w, 0), 3);
  assert_int_equal (disk_flags (&w, 1), 3);
  assert_int_equal (flush (&w), 0);
  assert_synced (&w);
  recorder_crash (w.c, 512, gap);
  stop_cleanly (&w);
  image_check (w.c, 1);
  close_world (&w);
}

static void
test_marks_between_steps (void **state)
{
  (void) state;
  for (unsigned gap = 0; gap < 6; ++gap)
    for (unsigned i = 0; i < 4; ++i)
      marks_between_steps (gap, i & 1, i & 2);
}

/* A fixed sequence of marks, guest writes and flushes that goes through
 * all kinds of changes.  What fails, fails.
 */
static void
workload (struct world *w)
{
  static const struct { uint64_t offset, count; } steps[] = {
    { 0, 1 }, { 2 * MIB, 512 }, { 4096, 8192 }, { 2 * MIB - 512, 2048 },
    { 2 * MIB, 2 * MIB }, { 512, 1 }, { SIZE - 1, 1 }, { 0, 4 * MIB },
    { 5 * MIB, 512 }, { 0, SIZE }, { 7, 7 },
  };
  char data[512];

  memset (data, 'x', sizeof data);
  for (size_t i = 0; i < sizeof steps / sizeof steps[0]; ++i) {
    if (bitmap_set_mark (w->set, steps[i].offset, steps[i].count) == 0) {
      note_mark (w->set, w->c, steps[i].offset, steps[i].count);
      qcow2_write (w->q, data, min_u64 (steps[i].count, sizeof data),
                   steps[i].offset);
    }
    if (i % 2)
      flush (w);
  }
  flush (w);
}

static void
test_crash (void **state)
{
  (void) state;
  for (unsigned cluster_bits = 9; cluster_bits <= 12; cluster_bits += 3) {
    struct world w;
    unsigned long n;

    open_world (&w, cluster_bits);
    workload (&w);
    assert_synced (&w);
    stop_cleanly (&w);
    n = recorder_crash (w.c, 512, cluster_bits);
    print_message ("%lu images\n", n);
    assert_true (n > 500);
    image_check (w.c, 1);
    close_world (&w);
  }
}

/* Fail the nth operation of the workload, then see that nothing is
 * lost, and that it all comes right when the failures end.  Returns
 * false if there is no nth operation.
 */
static bool
fail_nth (unsigned cluster_bits, unsigned nth, bool for_ever, bool applied)
{
  struct world w;
  bool reached;

  open_world (&w, cluster_bits);
  recorder_fail (w.c, nth, for_ever, applied);
  workload (&w);
  reached = recorder_failures (w.c) > 0;
  recorder_stop_failing (w.c);

  assert_int_equal (flush (&w), 0);
  assert_synced (&w);
  assert_int_equal (disk_flags (&w, 2), 0);
  recorder_crash (w.c, 4, nth);
  stop_cleanly (&w);
  assert_synced (&w);
  if (nth % 16 == 0)
    image_check (w.c, 1);
  close_world (&w);
  return reached;
}

static void
test_failures (void **state)
{
  (void) state;
  for (unsigned cluster_bits = 9; cluster_bits <= 12; cluster_bits += 3)
    for (unsigned mode = 0; mode < 4; ++mode) {
      unsigned nth = 0;

      while (fail_nth (cluster_bits, nth, mode & 1, mode & 2))
        nth += how_often (1, 1, 6);
      print_message ("%u operations\n", nth);
      assert_true (nth > 40);
    }
}

/* No space for new clusters: the flush succeeds, the bitmap stays in use,
 * which is told once, and all is served.
 */
static void
test_no_space (void **state)
{
  static const struct bitmap_spec one = {
    .name = "fine", .granularity_bits = 9, .flags = 2,
  };
  struct bitmap_set_numbers n;
  struct world w;

  (void) state;
  craft (&w.crafted, 12, SIZE, &one, 1);
  w.c = recorder_open (&w.crafted.bytes, w.crafted.bytes.n);
  w.q = open_image (w.c, false);
  w.set = open_set (w.q);
  mark_and_note (w.set, w.c, 0, 1);
  messages_clear ();
  assert_int_equal (flush (&w), 0);
  assert_int_equal (messages_errors (), 0);
  assert_int_equal (disk_flags (&w, 0), 3);
  bitmap_set_tell_unstored (w.set);
  assert_message ("bitmaps cannot be stored at present");
  assert_message ("No space left on device");
  assert_false (bitmap_set_all_stored (w.set));
  assert_message ("bitmap 'fine' could not be stored and is left in use");
  assert_true (ram_bit (bitmap_set_exposed (w.set, 0), 0));

  mark_and_note (w.set, w.c, 4096, 1);
  messages_clear ();
  assert_int_equal (flush (&w), 0);
  bitmap_set_tell_unstored (w.set);
  assert_int_equal (messages_warnings (), 0);
  assert_int_equal (disk_flags (&w, 0), 3);
  bitmap_set_get_numbers (w.set, &n);
  assert_int_equal (n.syncs[0], 2);
  assert_int_equal (n.syncs[1], 0);
  recorder_crash (w.c, 256, 1);
  close_world (&w);
}

/* Random marks, flushes and failures. */
static void
test_random (void **state)
{
  unsigned long n = 0;

  (void) state;
  for (unsigned round = 0; round < how_often (40, 40, 8); ++round) {
    uint64_t seed = round;
    struct world w;

    open_world (&w, 9 + round % 4);
    for (unsigned i = 0; i < 60; ++i) {
      uint64_t offset = random_next (&seed) % SIZE;
      uint64_t max = random_next (&seed) % 8 ? 4096 : 2 * MIB;
      uint64_t count = min_u64 (1 + random_next (&seed) % max, SIZE - offset);

      if (round % 2 && random_next (&seed) % 10 == 0)
        recorder_fail (w.c, random_next (&seed) % 6, random_next (&seed) % 2,
                       random_next (&seed) % 2);
      else if (random_next (&seed) % 5 == 0)
        recorder_stop_failing (w.c);
      if (bitmap_set_mark (w.set, offset, count) == 0)
        note_mark (w.set, w.c, offset, count);
      if (random_next (&seed) % 4 == 0)
        flush (&w);
    }
    recorder_stop_failing (w.c);
    assert_int_equal (flush (&w), 0);
    assert_synced (&w);
    n += recorder_crash (w.c, 16, round);
    stop_cleanly (&w);
    if (round % 8 < 2)
      image_check (w.c, 1);
    close_world (&w);
  }
  print_message ("%lu images\n", n);
}

int
main (void)
{
  const struct CMUnitTest tests[] = {
    cmocka_unit_test (test_cost),
    cmocka_unit_test (test_new_cluster),
    cmocka_unit_test (test_uniform),
    cmocka_unit_test (test_no_reservation),
    cmocka_unit_test (test_mark_fails),
    cmocka_unit_test (test_last_barrier_fails),
    cmocka_unit_test (test_marks_between_steps),
    cmocka_unit_test (test_crash),
    cmocka_unit_test (test_failures),
    cmocka_unit_test (test_no_space),
    cmocka_unit_test (test_random),
  };

  messages_install ();
  return cmocka_run_group_tests (tests, NULL, NULL);
}
