/* nbdkit-dirty-bitmap-filter
 * SPDX-License-Identifier: BSD-3-Clause
 * Copyright the nbdkit-dirty-bitmap-filter authors
 */

/* The map of units that are ahead.
 *
 * Memory: three bits a unit, and two a piece; pages that were never written
 * cost nothing.  A disk of 16 TiB with units of 1 MiB has 16 Mi units.
 */

#include <config.h>

#include <errno.h>
#include <stdlib.h>
#include <string.h>

#include "bitmap/ahead.h"
#include "bitmap/bits.h"
#include "common/bytes.h"

#define LEAST_SHIFT 20

int
ahead_init (struct ahead *a, uint64_t disk_bytes, unsigned granularity)
{
  uint64_t nr_words;

  a->shift = granularity > LEAST_SHIFT ? granularity : LEAST_SHIFT;
  a->bits_shift = a->shift - granularity;
  a->nr_units = ((disk_bytes - 1) >> a->shift) + 1;
  a->nr_bits = ((disk_bytes - 1) >> granularity) + 1;
  a->nr_pieces = div_round_up (a->nr_bits, PIECE_BITS);
  nr_words = div_round_up (a->nr_units, 64);
  a->ahead = calloc (nr_words, 8);
  a->used = calloc (nr_words, 8);
  a->coming = calloc (nr_words, 8);
  a->extra = calloc (div_round_up (a->nr_pieces, 64), 8);
  a->untidy = calloc (div_round_up (a->nr_pieces, 64), 8);
  if (a->ahead == NULL || a->used == NULL || a->coming == NULL ||
      a->extra == NULL || a->untidy == NULL) {
    ahead_free (a);
    errno = ENOMEM;
    return -1;
  }
  return 0;
}

void
ahead_free (struct ahead *a)
{
  free (a->ahead);
  free (a->used);
  free (a->coming);
  free (a->extra);
  free (a->untidy);
  *a = (struct ahead) { 0 };
}

/* The bits of [first, last] in word w. */
static uint64_t
mask_in_word (uint64_t w, uint64_t first, uint64_t last)
{
  uint64_t mask = ~UINT64_C (0);

  if (w == first / 64)
    mask <<= first % 64;
  if (w == last / 64)
    mask &= ~UINT64_C (0) >> (63 - last % 64);
  return mask;
}

bool
ahead_all (const struct ahead *a, uint64_t first, uint64_t last)
{
  for (uint64_t w = first / 64; w <= last / 64; ++w)
    if (~atomic_load_explicit (&a->ahead[w], memory_order_acquire) &
        mask_in_word (w, first, last))
      return false;
  return true;
}

void
ahead_use (struct ahead *a, uint64_t first, uint64_t last)
{
  for (uint64_t w = first / 64; w <= last / 64; ++w) {
    const uint64_t mask = mask_in_word (w, first, last);

    if (~atomic_load_explicit (&a->used[w], memory_order_relaxed) & mask)
      atomic_fetch_or_explicit (&a->used[w], mask, memory_order_relaxed);
  }
}

/* The piece that a unit is in. */
static uint64_t
piece_of (const struct ahead *a, uint64_t unit)
{
  return (unit << a->bits_shift) / PIECE_BITS;
}

static void
add_untidy (struct ahead *a, uint64_t w, uint64_t units)
{
  for (; units != 0; units &= units - 1) {
    const uint64_t p = piece_of (a, w * 64 + __builtin_ctzll (units));

    a->untidy[p / 64] |= UINT64_C (1) << (p % 64);
  }
}

void
ahead_begin (struct ahead *a, uint64_t first, uint64_t last)
{
  for (uint64_t w = first / 64; w <= last / 64; ++w)
    a->coming[w] |= mask_in_word (w, first, last);
  for (uint64_t p = piece_of (a, first); p <= piece_of (a, last); ++p)
    a->extra[p / 64] |= UINT64_C (1) << (p % 64);
}

void
ahead_end (struct ahead *a, uint64_t first, uint64_t last, bool success)
{
  if (success)
    ahead_use (a, first, last);
  for (uint64_t w = first / 64; w <= last / 64; ++w) {
    const uint64_t mask = mask_in_word (w, first, last);

    if (success)
      atomic_fetch_or_explicit (&a->ahead[w], mask, memory_order_release);
    else
      add_untidy (a, w, mask & ~atomic_load (&a->ahead[w]));
    a->coming[w] &= ~mask;
  }
}

void
ahead_hold (struct ahead *a)
{
  for (uint64_t w = 0; w < div_round_up (a->nr_units, 64); ++w) {
    const uint64_t units =
      atomic_load_explicit (&a->ahead[w], memory_order_relaxed);

    if (units != 0)
      a->coming[w] |= units;
  }
}

void
ahead_release (struct ahead *a)
{
  /* No round is under way. */
  for (uint64_t w = 0; w < div_round_up (a->nr_units, 64); ++w)
    if (a->coming[w] != 0)
      a->coming[w] = 0;
}

uint64_t
ahead_age (struct ahead *a, bool all)
{
  uint64_t nr = 0;

  for (uint64_t w = 0; w < div_round_up (a->nr_units, 64); ++w) {
    uint64_t idle = atomic_load_explicit (&a->ahead[w], memory_order_relaxed);

    if (idle == 0)
      continue;
    const uint64_t used =
      atomic_exchange_explicit (&a->used[w], 0, memory_order_relaxed);

    if (!all)
      idle &= ~used;
    if (idle == 0)
      continue;
    atomic_fetch_and_explicit (&a->ahead[w], ~idle, memory_order_acq_rel);
    add_untidy (a, w, idle);
    nr += __builtin_popcountll (idle);
  }
  return nr;
}

/* Of one piece: the first unit, and the one after the last. */
static void
units_of (const struct ahead *a, uint64_t piece, uint64_t *first,
          uint64_t *end)
{
  *first = (piece * PIECE_BITS) >> a->bits_shift;
  *end = min_u64 (((piece + 1) * PIECE_BITS) >> a->bits_shift, a->nr_units);
}

bool
ahead_has_extra (const struct ahead *a, uint64_t piece)
{
  return a->extra[piece / 64] >> (piece % 64) & 1;
}

uint64_t
ahead_next_untidy (const struct ahead *a, uint64_t piece)
{
  for (; piece < a->nr_pieces; piece = (piece | 63) + 1) {
    const uint64_t rest = a->untidy[piece / 64] >> (piece % 64);

    if (rest != 0)
      return piece + __builtin_ctzll (rest);
  }
  return a->nr_pieces;
}

static bool
any_in (const struct ahead *a, uint64_t first, uint64_t end)
{
  for (uint64_t w = first / 64; w <= (end - 1) / 64; ++w)
    if ((atomic_load_explicit (&a->ahead[w], memory_order_relaxed) |
         a->coming[w]) & mask_in_word (w, first, end - 1))
      return true;
  return false;
}

void
ahead_tidied (struct ahead *a, uint64_t piece)
{
  uint64_t first, end;

  units_of (a, piece, &first, &end);
  a->untidy[piece / 64] &= ~(UINT64_C (1) << (piece % 64));
  if (!any_in (a, first, end))
    a->extra[piece / 64] &= ~(UINT64_C (1) << (piece % 64));
}

/* Set the bits [first, end) of an array of bytes. */
static void
fill_bits (uint8_t *buf, uint64_t first, uint64_t end)
{
  while (first < end && first % 8 != 0) {
    buf[first / 8] |= 1 << (first % 8);
    first++;
  }
  if (first < end) {
    memset (buf + first / 8, 0xff, (end - first) / 8);
    first += (end - first) & ~UINT64_C (7);
  }
  for (; first < end; ++first)
    buf[first / 8] |= 1 << (first % 8);
}

void
ahead_add_bits (const struct ahead *a, uint8_t *buf, uint64_t offset,
                uint64_t count)
{
  const uint64_t start = offset * 8;
  uint64_t unit = start >> a->bits_shift;
  const uint64_t end =
    min_u64 ((start + count * 8) >> a->bits_shift, a->nr_units);

  while (unit < end) {
    const uint64_t w = unit / 64;
    const uint64_t rest =
      (atomic_load_explicit (&a->ahead[w], memory_order_relaxed) |
       a->coming[w]) >> (unit % 64);

    if (rest == 0) {
      unit = (w + 1) * 64;
      continue;
    }
    unit += __builtin_ctzll (rest);
    if (unit >= end)
      return;
    fill_bits (buf, (unit << a->bits_shift) - start,
               min_u64 ((unit + 1) << a->bits_shift, a->nr_bits) - start);
    unit++;
  }
}

bool
ahead_next_run (const struct ahead *a, uint64_t unit, uint64_t *first,
                uint64_t *last)
{
  for (; unit < a->nr_units; unit = (unit | 63) + 1) {
    const uint64_t rest =
      atomic_load_explicit (&a->ahead[unit / 64], memory_order_relaxed)
      >> (unit % 64);

    if (rest == 0)
      continue;
    *first = *last = unit + __builtin_ctzll (rest);
    while (*last + 1 < a->nr_units && ahead_all (a, *last + 1, *last + 1))
      ++*last;
    return true;
  }
  return false;
}
