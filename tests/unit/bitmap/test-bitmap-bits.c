/* nbdkit-dirty-bitmap-filter
 * SPDX-License-Identifier: BSD-3-Clause
 * Copyright the nbdkit-dirty-bitmap-filter authors
 */

/* The bits in RAM and the flags of what has changed, against a model of
 * one byte a bit.
 */

#include <config.h>

#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

#include <cmocka.h>

#include "bitmap/bits.h"
#include "bitmap/changes.h"
#include "common/bytes.h"
#include "image.h"

/* Set a range in bits and model; it may span pieces. */
static void
set_range (struct bits *bits, uint8_t *model, uint64_t first, uint64_t last)
{
  while (first <= last) {
    uint64_t here = min_u64 (last, first | (PIECE_BITS - 1));
    bool expected = false;

    for (uint64_t i = first; i <= here; ++i) {
      expected |= !model[i];
      model[i] = 1;
    }
    assert_int_equal (bits_set_in_piece (bits, first, here), expected);
    first = here + 1;
  }
}

static uint64_t
model_next (const uint8_t *model, uint64_t from, uint64_t end, int value)
{
  while (from < end && model[from] != value)
    from++;
  return from;
}

/* Walk [from, end) by up to max runs at a time. */
static void
compare_runs (struct bits *bits, const uint8_t *model, uint64_t from,
              uint64_t end, size_t max)
{
  uint64_t ends[8];

  while (from < end) {
    bool set;
    const size_t nr = bits_runs (bits, from, end, 0, ends, max, &set);

    assert_in_range (nr, 1, max);
    for (size_t i = 0; i < nr; ++i, set = !set) {
      assert_int_equal (set, model[from]);
      assert_int_equal (ends[i], model_next (model, from, end, !model[from]));
      from = ends[i];
    }
    assert_true (nr == max || from == end);
  }
}

static void
compare (struct bits *bits, const uint8_t *model, uint64_t n, uint64_t *seed)
{
  const unsigned nr = how_often (300, 300, 60);

  for (unsigned i = 0; i < nr; ++i) {
    uint64_t from = random_next (seed) % n;
    uint64_t end = from + 1 + random_next (seed) % (n - from);

    assert_int_equal (bits_next_clear (bits, from, end),
                      model_next (model, from, end, 0));
    assert_int_equal (bits_all_set (bits, from, end - 1),
                      model_next (model, from, end, 0) == end);
    if (i < 20)
      compare_runs (bits, model, from, end, 1 + random_next (seed) % 8);
  }
}

/* As an image has them: every second piece is full, or so. */
static void
fill_some (struct bits *bits, uint8_t *model, uint64_t n, uint64_t *seed)
{
  for (uint64_t piece = 0; piece < bits->nr_pieces; ++piece)
    if (random_next (seed) % 2 == 0) {
      const uint64_t first = piece * PIECE_BITS;

      assert_int_equal (bits_fill (bits, piece * PIECE_BYTES, PIECE_BYTES),
                        0);
      memset (model + first, 1, min_u64 (PIECE_BITS, n - first));
    }
}

/* What would be written to the image, and what is counted. */
static void
compare_copy (const struct bits *bits, const uint8_t *model, uint64_t n)
{
  const uint64_t count = bits->nr_pieces * PIECE_BYTES;
  uint8_t *out = malloc (count), *want = calloc (1, count);
  uint64_t set = 0, memory;

  assert_non_null (out);
  assert_non_null (want);
  for (uint64_t i = 0; i < n; ++i) {
    want[i / 8] |= model[i] << i % 8;
    set += model[i];
  }
  bits_copy_out (bits, out, 0, count / 8);
  assert_memory_equal (out, want, count);
  assert_int_equal (bits_count (bits, &memory), set);
  assert_true (memory <= count);
  free (out);
  free (want);
}

static void
test_against_model (void **state)
{
  static const uint64_t sizes[] = {
    1, 63, 64, 65, 4095, 4096, 4097, 70001, 262144, 600000,
  };
  uint64_t seed = 42;

  (void) state;
  for (size_t s = 0; s < sizeof sizes / sizeof sizes[0]; ++s) {
    uint64_t n = sizes[s];
    uint8_t *model = calloc (1, n);
    struct bits bits;

    assert_int_equal (bits_init (&bits, n), 0);
    if (s % 2 == 0)
      fill_some (&bits, model, n, &seed);
    compare (&bits, model, n, &seed);
    for (unsigned round = 0; round < 40; ++round) {
      uint64_t first = random_next (&seed) % n;
      uint64_t max = round % 2 ? 10 : n / 4 + 1;
      uint64_t last = min_u64 (n - 1, first + random_next (&seed) % max);

      set_range (&bits, model, first, last);
      compare (&bits, model, n, &seed);
    }
    compare_copy (&bits, model, n);
    bits_free (&bits);
    free (model);
  }
}

/* What comes from the image: least significant bit first, and nothing
 * beyond the end.
 */
static void
test_load (void **state)
{
  struct bits bits;
  uint8_t *p, out[PIECE_BYTES];

  (void) state;
  assert_int_equal (bits_init (&bits, 4096 + 70), 0);
  p = bits_bytes (&bits, 0);
  memset (p, 0, 512);
  p[0] = 0x05;
  p[1] = 0x80;
  memset (p + 512, 0xff, 512);
  bits_loaded (&bits, 0, 1024);

  const uint64_t want[] = { 1, 2, 3, 15, 16, 4096, 4166 };
  uint64_t ends[8];
  bool set;

  assert_int_equal (bits_runs (&bits, 0, 4166, 0, ends, 8, &set), 7);
  assert_true (set);
  assert_memory_equal (ends, want, sizeof want);
  assert_int_equal (bits_next_clear (&bits, 0, 4166), 1);
  assert_int_equal (bits_next_clear (&bits, 4096, 4166), 4166);

  bits_copy_out (&bits, out, PIECE_WORDS, PIECE_WORDS);
  assert_int_equal (out[0], 0xff);
  assert_int_equal (out[7], 0xff);
  assert_int_equal (out[8], 0x3f);
  for (unsigned i = 9; i < PIECE_BYTES; ++i)
    assert_int_equal (out[i], 0);
  bits_copy_out (&bits, out, 0, PIECE_WORDS);
  assert_int_equal (out[0], 0x05);
  assert_int_equal (out[1], 0x80);
  bits_free (&bits);
}

static void
test_changes (void **state)
{
  static const uint64_t sizes[] = { 1, 64, 65, 4096, 4097, 1 << 20 };
  uint64_t seed = 7;

  (void) state;
  for (size_t s = 0; s < sizeof sizes / sizeof sizes[0]; ++s) {
    uint64_t n = sizes[s];
    uint8_t *model = calloc (1, n);
    struct changes changes;

    assert_int_equal (changes_init (&changes, n), 0);
    assert_false (changes_any (&changes));
    for (unsigned round = 0; round < 6; ++round) {
      for (unsigned i = 0; i < 50; ++i) {
        uint64_t piece = random_next (&seed) % n;

        changes_flag (&changes, piece);
        model[piece] = 1;
      }
      assert_true (changes_any (&changes));
      changes_take (&changes);
      assert_false (changes_any (&changes));

      for (uint64_t from = 0;;) {
        uint64_t piece = changes_next_taken (&changes, from);

        assert_int_equal (piece, model_next (model, from, n, 1));
        if (piece == n)
          break;
        from = piece + 1;
      }
      /* Odd rounds failed: the next one finds these, too. */
      if (round % 2 == 0) {
        changes_give_back_taken (&changes);
        assert_true (changes_any (&changes));
      }
      else {
        changes_forget_taken (&changes);
        memset (model, 0, n);
        assert_false (changes_any (&changes));
      }
      assert_int_equal (changes_next_taken (&changes, 0), n);
    }
    changes_free (&changes);
    free (model);
  }
}

/* Arrays small and large, filled in pieces, with ones up to any bit. */
static void
test_fill (void **state)
{
  static const uint64_t sizes[] = {
    1, 4096, 100000, (UINT64_C (5) << 23) + 4097, (UINT64_C (7) << 23) + 64,
  };
  uint64_t seed = 3;

  (void) state;
  for (unsigned i = 0; i < sizeof sizes / sizeof sizes[0]; ++i)
    for (unsigned round = 0; round < 8; ++round) {
      const uint64_t n = sizes[i];
      struct bits bits;

      assert_int_equal (bits_init (&bits, n), 0);
      const uint64_t first = random_next (&seed) % bits.nr_pieces;
      const uint64_t end = round % 2 == 0 ? bits.nr_pieces
        : first + 1 + random_next (&seed) % (bits.nr_pieces - first);
      const uint64_t first_bit = first * PIECE_BITS;
      const uint64_t end_bit = min_u64 (end * PIECE_BITS, n);
      uint64_t ends[4];
      bool set;

      assert_int_equal (bits_fill (&bits, first * PIECE_BYTES,
                                   (end - first) * PIECE_BYTES), 0);
      const size_t nr = bits_runs (&bits, 0, n, 0, ends, 4, &set);
      assert_int_equal (nr, 1 + (first > 0) + (end_bit < n));
      assert_int_equal (set, first == 0);
      if (first > 0)
        assert_int_equal (ends[0], first_bit);
      assert_int_equal (ends[first > 0], end_bit);
      /* One bit after another can be set, and nothing beyond is. */
      if (first > 0)
        assert_true (bits_set_in_piece (&bits, first_bit - 1, first_bit - 1));
      assert_false (bits_set_in_piece (&bits, first_bit, first_bit));
      if (n % 64 != 0 && end == bits.nr_pieces)
        assert_int_equal (bits.words[n / 64] >> (n % 64), 0);
      bits_free (&bits);
    }
}

/* The bitmap of 1 TiB in 64 KiB granules, of which one is dirty, is
 * searched without looking at it all: within a millisecond even under
 * valgrind, were it not for noisy machines.
 */
static void
test_sparse_is_fast (void **state)
{
  const uint64_t n = UINT64_C (1) << 24;
  struct timespec before, after;
  struct bits bits;
  uint64_t ends[2];
  bool set = true;
  double ms;

  (void) state;
  assert_int_equal (bits_init (&bits, n), 0);
  bits_set_in_piece (&bits, n - 1, n - 1);
  clock_gettime (CLOCK_MONOTONIC, &before);
  for (unsigned i = 0; i < 100; ++i)
    assert_int_equal (bits_runs (&bits, 0, n, 0, ends, 2, &set), 2);
  assert_false (set);
  assert_int_equal (ends[0], n - 1);
  clock_gettime (CLOCK_MONOTONIC, &after);
  ms = (after.tv_sec - before.tv_sec) * 1e3 +
    (after.tv_nsec - before.tv_nsec) / 1e6;
  print_message ("%.1f us a search\n", ms * 10);
  assert_true (ms < 1000);
  bits_free (&bits);
}

int
main (void)
{
  const struct CMUnitTest tests[] = {
    cmocka_unit_test (test_against_model),
    cmocka_unit_test (test_load),
    cmocka_unit_test (test_changes),
    cmocka_unit_test (test_fill),
    cmocka_unit_test (test_sparse_is_fast),
  };

  return cmocka_run_group_tests (tests, NULL, NULL);
}
