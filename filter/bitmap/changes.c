/* nbdkit-dirty-bitmap-filter
 * SPDX-License-Identifier: BSD-3-Clause
 * Copyright the nbdkit-dirty-bitmap-filter authors
 */

/* Changed pieces.
 *
 * Why no change is lost: a mark sets the bits first and the flag after
 * (release); the taker clears the flag first (acquire) and reads the bits
 * after.  Both touch the flag with an atomic exchange or fetch_or, never
 * with a load that could skip it, so one of them comes first.  If the mark
 * comes first, the taker reads the bits.  If the taker comes first, the flag
 * is set again, and the next taker reads them.
 *
 * The summary follows the same rule one level up: flag first, summary bit
 * after; the taker clears the summary first.  A summary bit may remain after
 * its flags have been taken, and then means nothing.
 *
 * The cost of a take, forget or give back is proportional to the number of
 * changed pieces, plus one word for every 2^24 granules.
 */

#include <config.h>

#include <errno.h>
#include <stddef.h>
#include <stdlib.h>

#include "bitmap/changes.h"
#include "common/bytes.h"

int
changes_init (struct changes *changes, uint64_t nr_pieces)
{
  uint64_t nr_words = div_round_up (nr_pieces, 64);
  uint64_t nr_summary_words = div_round_up (nr_words, 64);

  changes->nr_pieces = nr_pieces;
  changes->flags = calloc (nr_words, 8);
  changes->summary = calloc (nr_summary_words, 8);
  changes->taken = calloc (nr_words, 8);
  changes->taken_summary = calloc (nr_summary_words, 8);
  if (changes->flags == NULL || changes->summary == NULL ||
      changes->taken == NULL || changes->taken_summary == NULL) {
    changes_free (changes);
    errno = ENOMEM;
    return -1;
  }
  return 0;
}

void
changes_free (struct changes *changes)
{
  free (changes->flags);
  free (changes->summary);
  free (changes->taken);
  free (changes->taken_summary);
  *changes = (struct changes) { 0 };
}

static uint64_t
nr_summary_words (const struct changes *changes)
{
  return div_round_up (changes->nr_pieces, 64 * 64);
}

static void
flag_word (struct changes *changes, uint64_t word, uint64_t flags)
{
  atomic_fetch_or_explicit (&changes->flags[word], flags,
                            memory_order_acq_rel);
  atomic_fetch_or_explicit (&changes->summary[word / 64],
                            UINT64_C (1) << (word % 64),
                            memory_order_acq_rel);
}

void
changes_flag (struct changes *changes, uint64_t piece)
{
  flag_word (changes, piece / 64, UINT64_C (1) << (piece % 64));
}

bool
changes_any (const struct changes *changes)
{
  for (uint64_t s = 0; s < nr_summary_words (changes); ++s) {
    uint64_t v = atomic_load_explicit (&changes->summary[s],
                                       memory_order_acquire);

    for (; v != 0; v &= v - 1) {
      uint64_t word = s * 64 + __builtin_ctzll (v);

      if (atomic_load_explicit (&changes->flags[word],
                                memory_order_acquire) != 0)
        return true;
    }
  }
  return false;
}

void
changes_take (struct changes *changes)
{
  for (uint64_t s = 0; s < nr_summary_words (changes); ++s) {
    uint64_t v;

    if (atomic_load_explicit (&changes->summary[s],
                              memory_order_relaxed) == 0)
      continue;
    v = atomic_exchange_explicit (&changes->summary[s], 0,
                                  memory_order_acq_rel);
    for (; v != 0; v &= v - 1) {
      uint64_t word = s * 64 + __builtin_ctzll (v);
      uint64_t flags = atomic_exchange_explicit (&changes->flags[word], 0,
                                                 memory_order_acq_rel);

      if (flags != 0) {
        changes->taken[word] |= flags;
        changes->taken_summary[s] |= UINT64_C (1) << (word % 64);
      }
    }
  }
}

uint64_t
changes_next_taken (const struct changes *changes, uint64_t from)
{
  if (from >= changes->nr_pieces)
    return changes->nr_pieces;

  uint64_t word = from / 64;
  uint64_t flags = changes->taken[word] & (~UINT64_C (0) << (from % 64));

  if (flags != 0)
    return word * 64 + __builtin_ctzll (flags);
  if (++word >= div_round_up (changes->nr_pieces, 64))
    return changes->nr_pieces;

  uint64_t s = word / 64;
  uint64_t v = changes->taken_summary[s] & (~UINT64_C (0) << (word % 64));

  while (v == 0) {
    if (++s == nr_summary_words (changes))
      return changes->nr_pieces;
    v = changes->taken_summary[s];
  }
  word = s * 64 + __builtin_ctzll (v);
  return word * 64 + __builtin_ctzll (changes->taken[word]);
}

static void
empty_taken (struct changes *changes, bool give_back)
{
  for (uint64_t s = 0; s < nr_summary_words (changes); ++s) {
    uint64_t v = changes->taken_summary[s];

    for (; v != 0; v &= v - 1) {
      uint64_t word = s * 64 + __builtin_ctzll (v);

      if (give_back)
        flag_word (changes, word, changes->taken[word]);
      changes->taken[word] = 0;
    }
    changes->taken_summary[s] = 0;
  }
}

void
changes_forget_taken (struct changes *changes)
{
  empty_taken (changes, false);
}

void
changes_give_back_taken (struct changes *changes)
{
  empty_taken (changes, true);
}
