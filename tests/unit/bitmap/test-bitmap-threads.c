/* nbdkit-dirty-bitmap-filter
 * SPDX-License-Identifier: BSD-3-Clause
 * Copyright the nbdkit-dirty-bitmap-filter authors
 */

/* Marks of several threads against flushes of several threads, with and
 * without failures.  The record of what reached the container, with a
 * note when each mark returned, is then crashed at every point.
 */

#include <config.h>

#include <pthread.h>
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
#define LIMIT (1 << 18)
#define SIZE (4 * MIB)
#define MARKERS 3
#define FLUSHERS 2

static const struct bitmap_spec specs[] = {
  { .name = "fine", .granularity_bits = 9, .flags = 2 },
  { .name = "coarse", .granularity_bits = 16, .flags = 2 },
};

struct world {
  struct container *c;
  struct qcow2 *q;
  struct bitmap_set *set;
  unsigned marks;               /* that each thread makes */
  bool failures;
  atomic_uint failed_marks, markers_left;
};

struct marker {
  struct world *w;
  pthread_t thread;
  uint64_t seed;
};

static void *
mark_thread (void *arg)
{
  struct marker *m = arg;
  struct world *w = m->w;

  for (unsigned i = 0; i < w->marks; ++i) {
    uint64_t r = random_next (&m->seed);
    uint64_t offset = random_next (&m->seed) % SIZE;
    uint64_t count = 1 + (r % 16 ? r / 16 % 1024 : r / 16 % (SIZE / 16));

    count = min_u64 (count, SIZE - offset);
    if (w->failures && r % 7 == 0)
      recorder_fail (w->c, r / 7 % 5, false, r & 1);
    if (bitmap_set_mark (w->set, offset, count) == 0)
      note_mark (w->set, w->c, offset, count);
    else
      atomic_fetch_add (&w->failed_marks, 1);
  }
  atomic_fetch_sub (&w->markers_left, 1);
  return NULL;
}

static void *
flush_thread (void *arg)
{
  struct world *w = arg;

  while (atomic_load (&w->markers_left) > 0)
    image_flush (w->q, w->set);
  return NULL;
}

static void *
read_thread (void *arg)
{
  struct world *w = arg;

  while (atomic_load (&w->markers_left) > 0)
    for (size_t i = 0; i < bitmap_set_nr_exposed (w->set); ++i)
      for (uint64_t offset = 0; offset < SIZE;) {
        bool dirty;
        uint64_t n = bitmap_run (bitmap_set_exposed (w->set, i), offset, SIZE,
                                 &dirty);

        if (n == 0 || n > SIZE - offset)
          abort ();
        offset += n;
      }
  return NULL;
}

static void
run_threads (struct world *w, uint64_t seed)
{
  struct marker markers[MARKERS];
  pthread_t flushers[FLUSHERS], reader;

  atomic_store (&w->markers_left, MARKERS);
  for (unsigned i = 0; i < MARKERS; ++i) {
    markers[i] = (struct marker) { .w = w, .seed = seed + i };
    pthread_create (&markers[i].thread, NULL, mark_thread, &markers[i]);
  }
  for (unsigned i = 0; i < FLUSHERS; ++i)
    pthread_create (&flushers[i], NULL, flush_thread, w);
  pthread_create (&reader, NULL, read_thread, w);
  for (unsigned i = 0; i < MARKERS; ++i)
    pthread_join (markers[i].thread, NULL);
  for (unsigned i = 0; i < FLUSHERS; ++i)
    pthread_join (flushers[i], NULL);
  pthread_join (reader, NULL);
}

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
      assert_int_equal (ram_bit (b, bit), disk_bitmap_bit (&d, bit));
    free (d.bits);
  }
}

static unsigned long
one_round (unsigned cluster_bits, unsigned marks, bool failures,
           uint64_t seed)
{
  struct world w = { .marks = marks, .failures = failures };
  struct crafted crafted;
  unsigned long n;

  craft (&crafted, cluster_bits, SIZE, specs, 2);
  w.c = recorder_open (&crafted.bytes, LIMIT);
  recorder_yield (w.c, true);
  w.q = open_image (w.c, false);
  w.set = open_set (w.q);

  run_threads (&w, seed);
  if (!failures)
    assert_int_equal (atomic_load (&w.failed_marks), 0);
  recorder_stop_failing (w.c);
  assert_int_equal (image_flush (w.q, w.set), 0);
  assert_synced (&w);
  n = recorder_crash (w.c, 3, seed);
  assert_int_equal (image_stop (w.q, w.set), 0);
  image_check (w.c, 1);

  bitmap_set_close (w.set);
  qcow2_close (w.q);
  container_close (w.c);
  free (crafted.bytes.p);
  return n;
}

static void
rounds (bool failures)
{
  unsigned long n = 0;

  for (unsigned round = 0; round < 24; ++round)
    n += one_round (9 + round % 4, round % 2 ? 400 : 60, failures,
                    1000 * round);
  print_message ("%lu images\n", n);
}

static void
test_threads (void **state)
{
  (void) state;
  rounds (false);
}

static void
test_threads_and_failures (void **state)
{
  (void) state;
  rounds (true);
}

int
main (void)
{
  const struct CMUnitTest tests[] = {
    cmocka_unit_test (test_threads),
    cmocka_unit_test (test_threads_and_failures),
  };

  messages_install ();
  return cmocka_run_group_tests (tests, NULL, NULL);
}
