/* nbdkit-dirty-bitmap-filter
 * SPDX-License-Identifier: BSD-3-Clause
 * Copyright the nbdkit-dirty-bitmap-filter authors
 */

/* The moments that are over in an instant are made to last: between
 * setting a bit and flagging its piece, and between deciding that a
 * bitmap can be closed and writing so.  Whenever in_use is written
 * clear, the image must have every bit that RAM has, and all marks are
 * excluded, so this can be looked at.
 *
 * mark.c is compiled into this program in place of the library's.
 */

#include <config.h>

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
#include "disk/flush.h"

static void slow_flag (struct changes *changes, uint64_t piece);
static bool slow_set (struct bits *bits, uint64_t first, uint64_t last);

#define changes_flag slow_flag
#define bits_set_in_piece slow_set
#include "bitmap/mark.c"
#undef changes_flag
#undef bits_set_in_piece

#include "image.h"
#include "bitmap-image.h"

#define LIMIT (1 << 17)
#define SIZE (UINT64_C (1) << 20)
#define MARKERS 3
#define ROUNDS 60

static void
linger (void)
{
  static _Thread_local uint64_t seed;
  const struct timespec ts = { .tv_nsec = 20000 };

  switch (random_next (&seed) % 8) {
  case 0:
    nanosleep (&ts, NULL);
    break;
  case 1: case 2: case 3:
    sched_yield ();
  }
}

static void
slow_flag (struct changes *changes, uint64_t piece)
{
  linger ();
  changes_flag (changes, piece);
  linger ();
}

static bool
slow_set (struct bits *bits, uint64_t first, uint64_t last)
{
  linger ();
  return bits_set_in_piece (bits, first, last);
}

static const struct bitmap_spec specs[] = {
  { .name = "b", .granularity_bits = 9, .flags = 2 },
};

struct world {
  struct crafted crafted;
  struct container *c;
  struct qcow2 *q;
  struct bitmap_set *set;
  uint64_t seed;
  atomic_uint markers_left, nr_marks, nr_lacking;
  atomic_ulong nr_cleared;
};

/* in_use is about to be cleared: does the image have all bits? */
static void
watch (void *opaque, const void *buf, size_t count, uint64_t offset)
{
  struct world *w = opaque;
  const struct bitmap *b = bitmap_set_exposed (w->set, 0);
  struct bytes now = recorder_image (w->c);
  struct disk_bitmap d;

  if (count != 4 || offset != w->crafted.entry[0] + 12 || get_be32 (buf) != 2)
    return;
  linger ();
  d = disk_bitmap_read (&now, "b");
  for (uint64_t i = 0; i < d.nr_bits / 64; ++i) {
    uint64_t disk;

    memcpy (&disk, d.bits + 8 * i, 8);
    if (atomic_load (&b->bits.words[i]) & ~le64toh (disk))
      atomic_fetch_add (&w->nr_lacking, 1);
  }
  free (d.bits);
  atomic_fetch_add (&w->nr_cleared, 1);
}

/* Marks in bursts, so that there are moments without any. */
static void *
mark_thread (void *arg)
{
  struct world *w = arg;
  uint64_t seed = w->seed + atomic_fetch_add (&w->nr_marks, 1);

  for (unsigned i = 0; i < 120; ++i) {
    uint64_t offset = random_next (&seed) % SIZE;
    const struct timespec ts = { .tv_nsec = random_next (&seed) % 60000 };

    assert_int_equal (bitmap_set_mark (w->set, offset, 1), 0);
    note_mark (w->set, w->c, offset, 1);
    if (random_next (&seed) % 3 == 0)
      nanosleep (&ts, NULL);
  }
  atomic_fetch_sub (&w->markers_left, 1);
  return NULL;
}

static void
one_round (uint64_t seed, unsigned long *nr_cleared)
{
  struct world w = { .seed = seed };
  pthread_t markers[MARKERS];

  craft (&w.crafted, 9, SIZE, specs, 1);
  w.c = recorder_open (&w.crafted.bytes, LIMIT);
  recorder_yield (w.c, true);
  w.q = open_image (w.c, false);
  w.set = open_set (w.q);
  recorder_watch (w.c, watch, &w);

  atomic_store (&w.markers_left, MARKERS);
  for (unsigned i = 0; i < MARKERS; ++i)
    pthread_create (&markers[i], NULL, mark_thread, &w);
  while (atomic_load (&w.markers_left) > 0)
    assert_int_equal (image_flush (w.q, w.set), 0);
  for (unsigned i = 0; i < MARKERS; ++i)
    pthread_join (markers[i], NULL);

  assert_int_equal (image_flush (w.q, w.set), 0);
  assert_true (bitmap_set_all_stored (w.set));
  assert_int_equal (atomic_load (&w.nr_lacking), 0);
  *nr_cleared += atomic_load (&w.nr_cleared);
  recorder_crash (w.c, 2, seed);

  bitmap_set_close (w.set);
  qcow2_close (w.q);
  container_close (w.c);
  free (w.crafted.bytes.p);
}

static void
test_races (void **state)
{
  unsigned long nr_cleared = 0;

  (void) state;
  for (uint64_t round = 0; round < ROUNDS; ++round)
    one_round (1000 * round, &nr_cleared);
  print_message ("cleared %lu times\n", nr_cleared);
  assert_true (nr_cleared > ROUNDS);
}

int
main (void)
{
  const struct CMUnitTest tests[] = {
    cmocka_unit_test (test_races),
  };

  messages_install ();
  return cmocka_run_group_tests (tests, NULL, NULL);
}
