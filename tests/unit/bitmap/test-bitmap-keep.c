/* nbdkit-dirty-bitmap-filter
 * SPDX-License-Identifier: BSD-3-Clause
 * Copyright the nbdkit-dirty-bitmap-filter authors
 */

/* Bits in the image ahead of the changes: what that costs, what the image
 * has, errors, and marks by several threads while another one tidies.
 *
 * mark.c and keep.c are compiled into this program in place of the library's,
 * so that a mark can linger between the look at the units and its bits, and
 * so that rules of tidying can be broken, to see that this is noticed.
 */

#include <config.h>

#include <errno.h>
#include <pthread.h>
#include <sched.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

#include <cmocka.h>

#include "bitmap/internal.h"

static bool slow_set (struct bits *bits, uint64_t first, uint64_t last);

#define bits_set_in_piece slow_set
#include "bitmap/mark.c"
#undef bits_set_in_piece

/* Which rule of tidying is broken. */
static enum {
  NONE,
  GRACE_BEFORE_TIDY,            /* pieces are written as RAM has them only
                                   when all marks that relied on units that
                                   are not ahead any more have set their bits */
  HOLD_UNTIL_GRACE,             /* until then, writers of a piece write the
                                   bits of those units */
} broken;

static void maybe_synchronize (struct grace *grace);
static void maybe_hold (struct ahead *ahead);

#define grace_synchronize maybe_synchronize
#define ahead_hold maybe_hold
#include "bitmap/keep.c"
#undef grace_synchronize
#undef ahead_hold

static void
maybe_synchronize (struct grace *grace)
{
  if (broken != GRACE_BEFORE_TIDY)
    grace_synchronize (grace);
}

static void
maybe_hold (struct ahead *ahead)
{
  if (broken != HOLD_UNTIL_GRACE)
    ahead_hold (ahead);
}

#include "image.h"
#include "bitmap-image.h"
#include "disk/flush.h"

#define MIB (UINT64_C (1) << 20)
#define LIMIT (1 << 20)
#define SIZE (64 * MIB)
#define MARKERS 3
#define MARKS 150
#define ROUNDS 30

static bool is_slow;

static bool
slow_set (struct bits *bits, uint64_t first, uint64_t last)
{
  static _Thread_local uint64_t seed;
  const struct timespec ts = { .tv_nsec = 50000 };

  if (is_slow && random_next (&seed) % 4 == 0)
    nanosleep (&ts, NULL);
  return bits_set_in_piece (bits, first, last);
}

/* Clusters of 4 KiB: those of bits have 32768 bits.  "fine" has units of 2048
 * bits, "coarse" of one, and "off" does not record.
 */
static const struct bitmap_spec specs[] = {
  { .name = "fine", .granularity_bits = 9, .flags = 2, .table = "d" },
  { .name = "coarse", .granularity_bits = 20, .flags = 2, .table = "d" },
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
open_world (struct world *w)
{
  const struct bitmap_options options = { .keep = true,
                                          .flush = image_flush };

  craft (&w->crafted, 12, SIZE, specs, 3);
  w->c = recorder_open (&w->crafted.bytes, LIMIT);
  w->q = open_image (w->c, false);
  w->set = bitmap_set_open (w->q, &options);
  assert_non_null (w->set);
}

static void
close_world (struct world *w)
{
  bitmap_set_close (w->set);
  qcow2_close (w->q);
  container_close (w->c);
  free (w->crafted.bytes.p);
}

static struct disk_bitmap
in_image (struct world *w, const char *name)
{
  const struct bytes now = recorder_image (w->c);

  return disk_bitmap_read (&now, name);
}

/* How many bits the image has of a bitmap that is not marked. */
static unsigned
count_in_image (struct world *w, const char *name)
{
  struct disk_bitmap d = in_image (w, name);
  unsigned nr = 0;

  assert_int_equal (d.state, DISK_CLEAN);
  for (uint64_t i = 0; i < d.nr_bits; ++i)
    nr += disk_bitmap_bit (&d, i);
  free (d.bits);
  return nr;
}

/* How many data clusters a bitmap has that is not marked. */
static unsigned
data_entries (struct world *w, const char *name)
{
  struct disk_bitmap d = in_image (w, name);

  assert_int_equal (d.state, DISK_CLEAN);
  free (d.bits);
  return d.nr_data;
}

static unsigned
count_in_ram (struct world *w, const char *name)
{
  const struct bitmap *b = find_exposed (w->set, name);
  uint64_t memory;

  return bitmap_dirty_bytes (b, SIZE, &memory) >> b->shift;
}

/* Does the image have all bits that RAM has, now? */
static bool
image_has_all (struct world *w)
{
  bool all = true;

  for (size_t i = 0; i < bitmap_set_nr_recording (w->set); ++i) {
    const struct bitmap *b = bitmap_set_recording (w->set, i);
    struct disk_bitmap d = in_image (w, bitmap_name (b));

    for (uint64_t bit = 0; bit < d.nr_bits; ++bit)
      if (ram_bit (b, bit) && !disk_bitmap_bit (&d, bit) &&
          d.state != DISK_MARKED)
        all = false;
    free (d.bits);
  }
  return all;
}

/* The first mark of a region: a write for each bitmap, and one barrier.  The
 * next ones cost nothing, and a flush writes nothing.  The first mark of all
 * has another barrier, since the process before may have been killed when
 * what was loaded was not durable yet.
 */
static void
test_cost (void **state)
{
  struct world w;

  (void) state;
  open_world (&w);
  w.set->region_shift = 20;
  assert_cost (&w, 2, 2, mark_and_note (w.set, w.c, 3 * MIB + 512, 1));
  assert_int_equal (count_in_image (&w, "fine"), 2048);
  assert_int_equal (count_in_image (&w, "coarse"), 1);
  assert_int_equal (count_in_ram (&w, "fine"), 1);
  assert_int_equal (count_in_ram (&w, "coarse"), 1);
  assert_int_equal (bitmap_extra_bytes (find_exposed (w.set, "fine")),
                    MIB - 512);
  assert_cost (&w, 0, 0, mark_and_note (w.set, w.c, 3 * MIB, 512));
  assert_cost (&w, 0, 0, mark_and_note (w.set, w.c, 4 * MIB - 9, 9));
  assert_cost (&w, 0, 0, assert_int_equal
               (image_flush (w.q, w.set), 0));

  /* Over a border: the part that is ahead is written along. */
  assert_cost (&w, 2, 1, mark_and_note (w.set, w.c, 4 * MIB - 9, 10));
  assert_true (image_has_all (&w));
  close_world (&w);
}

/* A region grows while marks follow each other closely. */
static void
test_pace (void **state)
{
  struct world w;
  unsigned nr = 0;

  (void) state;
  open_world (&w);
  for (uint64_t at = 0; at < SIZE; at += MIB) {
    const unsigned before = recorder_flushes (w.c);

    w.set->pace_ns = INT64_MAX / 40; /* as if they had taken that long */
    mark_and_note (w.set, w.c, at, 1);
    nr += recorder_flushes (w.c) - before;
  }
  /* 1, 2, 4, ... MiB, and one more for each of three new clusters. */
  assert_in_range (nr, 6, 10);
  close_world (&w);
}

/* No data cluster yet: a flush makes one, by two barriers. */
static void
test_new_cluster (void **state)
{
  struct world w;

  (void) state;
  open_world (&w);
  assert_int_equal (data_entries (&w, "fine"), 1);
  assert_int_equal (keep_begin (w.set), 0);
  const unsigned before = recorder_flushes (w.c);

  mark_and_note (w.set, w.c, SIZE - 1, 1);
  assert_int_equal (recorder_flushes (w.c) - before, 2);
  assert_int_equal (data_entries (&w, "fine"), 2);
  assert_true (image_has_all (&w));
  assert_true (bitmap_set_all_stored (w.set));
  close_world (&w);
}

/* What is not used is tidied, what is used is not, and at the end all is. */
static void
test_tidy (void **state)
{
  struct world w;

  (void) state;
  open_world (&w);
  mark_and_note (w.set, w.c, 0, 1);
  w.set->region_shift = 20;
  mark_and_note (w.set, w.c, 16 * MIB - 1, 1);
  assert_int_equal (bitmap_set_tidy (w.set, false), 0);
  assert_true (count_in_image (&w, "fine") >= 2 * 2048);

  /* Only the second is of use meanwhile. */
  mark_and_note (w.set, w.c, 16 * MIB - 2000, 1);
  assert_int_equal (bitmap_set_tidy (w.set, false), 0);
  assert_int_equal (count_in_image (&w, "fine"), 2048 + 1);
  mark_and_note (w.set, w.c, 16 * MIB - 3000, 1);
  assert_true (image_has_all (&w));

  assert_int_equal (bitmap_set_tidy (w.set, true), 0);
  assert_int_equal (count_in_image (&w, "fine"), 4);
  assert_int_equal (count_in_image (&w, "coarse"), 2);
  assert_cost (&w, 0, 0, bitmap_set_tidy (w.set, true));
  assert_int_equal (count_in_image (&w, "off"), 2 * (SIZE >> 12) / 8);
  recorder_crash (w.c, 8, 1);
  close_world (&w);
}

/* Each operation of a mark fails in turn, once or from then on.  Once: the
 * bitmap is marked, and kept again after a flush.  From then on: the change
 * must not be made.
 */
static void
test_failures (void **state)
{
  (void) state;
  for (unsigned n = 0; n < 12; ++n)
    for (unsigned for_ever = 0; for_ever < 2; ++for_ever) {
      struct world w;
      int r;

      open_world (&w);
      recorder_fail (w.c, n, for_ever, n % 2);
      r = bitmap_set_mark (w.set, SIZE - 1, 1);
      if (r == 0)
        note_mark (w.set, w.c, SIZE - 1, 1);
      assert_true (image_has_all (&w));
      if (recorder_failures (w.c) > 0 && for_ever && r == 0)
        fail_msg ("failure %u has no effect", n);
      recorder_stop_failing (w.c);

      mark_and_note (w.set, w.c, MIB, 1);
      assert_int_equal (image_flush (w.q, w.set), 0);
      assert_true (bitmap_set_all_stored (w.set));
      mark_and_note (w.set, w.c, 40 * MIB, 1);
      assert_true (bitmap_set_all_stored (w.set));
      assert_true (image_has_all (&w));
      recorder_crash (w.c, 4, n);
      close_world (&w);
    }
}

/* A flush, in whose middle two marks come, of two regions. */
static void
flush_with_marks (struct world *w, uint64_t offset)
{
  assert_int_equal (bitmap_flush_data (w->set), 0);
  assert_int_equal (qcow2_barrier_since (w->q, qcow2_lost (w->q)), 0);
  mark_and_note (w->set, w->c, offset, 1);
  mark_and_note (w->set, w->c, offset + MIB, 1);
  assert_true (bitmap_flush_references (w->set) >= 0);
  assert_int_equal (qcow2_barrier_since (w->q, qcow2_lost (w->q)), 0);
  assert_true (bitmap_flush_settle (w->set) >= 0);
  assert_int_equal (qcow2_barrier_since (w->q, qcow2_lost (w->q)), 0);
  bitmap_flush_done (w->set);
  assert_true (image_has_all (w));
}

/* A bitmap that could not be kept is so again, though new granules are
 * changed all the time: after the second flush from when it can be.
 */
static void
test_returns (void **state)
{
  struct world w;
  uint64_t nr;

  (void) state;
  open_world (&w);
  mark_and_note (w.set, w.c, 0, 1);
  assert_int_equal (image_flush (w.q, w.set), 0);
  w.set->region_shift = 20;
  recorder_fail (w.c, 0, false, false);
  mark_and_note (w.set, w.c, 2 * MIB, 1);
  assert_false (bitmap_set_all_stored (w.set));
  recorder_stop_failing (w.c);

  flush_with_marks (&w, 3 * MIB);
  assert_false (bitmap_set_all_stored (w.set));

  /* The first mark tries to write its bits ahead, which fails.  The second
   * one does not try.  ("coarse" is kept already.)
   */
  nr = tally_get (&w.set->rounds[0]);
  assert_int_equal (bitmap_flush_data (w.set), 0);
  recorder_fail (w.c, 0, false, false);
  mark_and_note (w.set, w.c, 5 * MIB, 1);
  mark_and_note (w.set, w.c, 6 * MIB, 1);
  recorder_stop_failing (w.c);
  bitmap_flush_failed (w.set);
  assert_int_equal (tally_get (&w.set->rounds[0]), nr + 1);
  assert_false (bitmap_is_ahead (find_exposed (w.set, "fine"), 6 * MIB, 1));
  assert_false (bitmap_set_all_stored (w.set));
  assert_true (image_has_all (&w));

  flush_with_marks (&w, 7 * MIB);
  assert_false (bitmap_set_all_stored (w.set));
  flush_with_marks (&w, 9 * MIB);
  assert_true (bitmap_set_all_stored (w.set));
  assert_cost (&w, 0, 0, mark_and_note (w.set, w.c, 9 * MIB + 512, 1));
  assert_true (image_has_all (&w));
  recorder_crash (w.c, 16, 1);
  close_world (&w);
}

struct race {
  struct world w;
  uint64_t seed;
  atomic_uint nr_threads, nr_left, nr_lacking;
  atomic_bool is_over;          /* for write_thread */
};

/* When a mark returns the image has its bits: units may be tidied at any
 * time, but not before the marks that relied on them.
 */
static void *
mark_thread (void *arg)
{
  struct race *r = arg;
  uint64_t seed = r->seed + atomic_fetch_add (&r->nr_threads, 1);

  for (unsigned i = 0; i < MARKS; ++i) {
    const uint64_t offset = random_next (&seed) % (4 * MIB);
    const uint64_t bit = offset >> 9;
    struct bytes now;
    struct disk_bitmap d;

    assert_int_equal (bitmap_set_mark (r->w.set, offset, 1), 0);
    note_mark (r->w.set, r->w.c, offset, 1);
    now = recorder_copy (r->w.c);
    d = disk_bitmap_read (&now, "fine");
    free (now.p);
    if (d.state != DISK_CLEAN || !disk_bitmap_bit (&d, bit))
      atomic_fetch_add (&r->nr_lacking, 1);
    free (d.bits);
  }
  atomic_fetch_sub (&r->nr_left, 1);
  return NULL;
}

/* Writes the bits of what marks change, as a flush does with a piece that is
 * flagged for another reason.
 */
static void *
write_thread (void *arg)
{
  struct race *r = arg;
  struct bitmap_set *set = r->w.set;
  struct bitmap *b = set->recording[0]; /* "fine" */
  const struct timespec pause = { .tv_nsec = 10000 };
  uint8_t buffer[SYNC_BUFFER_BYTES];

  while (!atomic_load (&r->is_over)) {
    pthread_mutex_lock (&set->reserve_lock);
    assert_int_equal (bitmap_write_bits (set, b, buffer, 0, 2 * PIECE_BYTES,
                                         b->table[0], NULL), 0);
    pthread_mutex_unlock (&set->reserve_lock);
    nanosleep (&pause, NULL);
  }
  return NULL;
}

/* Returns how many marks returned when the image did not have their bit, and
 * one more if in the end it has not exactly the bits of RAM.
 */
static unsigned
one_race (uint64_t seed)
{
  struct race r = { .seed = seed, .nr_left = MARKERS };
  const struct timespec pause = { .tv_nsec = 20000 };
  pthread_t markers[MARKERS], writer;
  unsigned nr = 0;

  open_world (&r.w);
  for (unsigned i = 0; i < MARKERS; ++i)
    pthread_create (&markers[i], NULL, mark_thread, &r);
  pthread_create (&writer, NULL, write_thread, &r);
  while (atomic_load (&r.nr_left) > 0) {
    nanosleep (&pause, NULL);
    assert_int_equal (bitmap_set_tidy (r.w.set, nr % 2), 0);
    if (++nr % 8 == 0)
      assert_int_equal (image_flush (r.w.q, r.w.set), 0);
  }
  for (unsigned i = 0; i < MARKERS; ++i)
    pthread_join (markers[i], NULL);
  atomic_store (&r.is_over, true);
  pthread_join (writer, NULL);
  assert_int_equal (bitmap_set_tidy (r.w.set, true), 0);
  if (count_in_image (&r.w, "fine") != count_in_ram (&r.w, "fine"))
    atomic_fetch_add (&r.nr_lacking, 1);
  assert_true (bitmap_set_all_stored (r.w.set));
  if (broken == NONE)
    recorder_crash (r.w.c, 1, seed);
  close_world (&r.w);
  return atomic_load (&r.nr_lacking);
}

static void
test_races (void **state)
{
  /* There one thread runs at a time, and this one would have most of it. */
  const uint64_t rounds = getenv ("UNDER_VALGRIND") != NULL ? 1 : ROUNDS;

  (void) state;
  is_slow = true;
  for (uint64_t i = 0; i < rounds; ++i)
    assert_int_equal (one_race (100 * i), 0);
  is_slow = false;
}

/* The races above notice each rule that is broken. */
static void
test_broken_rules (void **state)
{
  (void) state;
  if (getenv ("UNDER_VALGRIND") != NULL)
    return;
  is_slow = true;
  for (broken = GRACE_BEFORE_TIDY; broken <= HOLD_UNTIL_GRACE; ++broken) {
    unsigned nr = 0, tries;

    for (tries = 0; tries < 200 && nr == 0; ++tries)
      nr = one_race (tries);
    printf ("rule %d: noticed in race %u\n", broken, tries);
    assert_true (nr > 0);
  }
  broken = NONE;
  is_slow = false;
}

int
main (void)
{
  const struct CMUnitTest tests[] = {
    cmocka_unit_test (test_cost),
    cmocka_unit_test (test_pace),
    cmocka_unit_test (test_new_cluster),
    cmocka_unit_test (test_tidy),
    cmocka_unit_test (test_failures),
    cmocka_unit_test (test_returns),
    cmocka_unit_test (test_races),
    cmocka_unit_test (test_broken_rules),
  };

  messages_install ();
  return cmocka_run_group_tests (tests, NULL, NULL);
}
