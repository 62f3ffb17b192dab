/* nbdkit-dirty-bitmap-filter
 * SPDX-License-Identifier: BSD-3-Clause
 * Copyright the nbdkit-dirty-bitmap-filter authors
 */

/* The bits of one bitmap in RAM.
 *
 * The array is zeroed by the kernel when it is first touched, and large
 * parts of it never are: populated says which pieces hold a set bit, and
 * searches for one look only there.
 *
 * An image can say in a few bytes that a bitmap of 512 MiB is all ones, or
 * every second cluster of it.  So a piece that the image calls all ones is
 * only noted as full.  Its words stay clear and are never changed.
 *
 * Bits are only ever set while the bitmap is served.  So a search may run at
 * the same time as marks: it sees each word as it was at some moment, and it
 * always sees a mark that was complete before the search began.  For this,
 * populated is set before the bits (release), and a thread that finds a bit
 * set (acquire) also finds its piece populated.
 *
 * Bits at and after nr_bits are clear: bits_loaded clears them in what comes
 * from the image, and marks are clipped to the disk's size.
 */

#include <config.h>

#include <endian.h>
#include <errno.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>

#include "bitmap/bits.h"
#include "common/bytes.h"

/* The size of pages that the system may use for memory that is filled whole,
 * which saves thousands of page faults.  Elsewhere large pages are of no
 * use, but do no harm.
 */
#define LARGE_PAGE (UINT64_C (2) << 20)

/* Larger arrays are mapped. */
#define MAPPED_BYTES (UINT64_C (2) << 20)

static void *
new_words (struct bits *bits)
{
  const uint64_t bytes = bits->nr_pieces * PIECE_BYTES;
  void *p;

  bits->mapped_bytes = 0;
  if (bytes <= MAPPED_BYTES)
    return calloc (bits->nr_pieces, PIECE_BYTES);
  p = mmap (NULL, bytes, PROT_READ | PROT_WRITE,
            MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (p == MAP_FAILED)
    return NULL;
  bits->mapped_bytes = bytes;
  return p;
}

int
bits_init (struct bits *bits, uint64_t nr_bits)
{
  bits->nr_bits = nr_bits;
  bits->nr_pieces = div_round_up (nr_bits, PIECE_BITS);
  bits->words = new_words (bits);
  bits->full = NULL;
  bits->populated = calloc (div_round_up (bits->nr_pieces, 64), 8);
  if (bits->words == NULL || bits->populated == NULL) {
    bits_free (bits);
    errno = ENOMEM;
    return -1;
  }
  return 0;
}

void
bits_free (struct bits *bits)
{
  if (bits->mapped_bytes != 0)
    munmap (bits->words, bits->mapped_bytes);
  else
    free (bits->words);
  bits->mapped_bytes = 0;
  free (bits->populated);
  free (bits->full);
  bits->words = NULL;
  bits->populated = NULL;
  bits->full = NULL;
}

static inline uint64_t
load (const _Atomic uint64_t *word)
{
  return atomic_load_explicit (word, memory_order_acquire);
}

static inline bool
is_full (const struct bits *bits, uint64_t piece)
{
  return bits->full != NULL && (bits->full[piece / 64] >> (piece % 64) & 1);
}

/* A word, with the bits of a full piece set. */
static inline uint64_t
load_word (const struct bits *bits, uint64_t w)
{
  const uint64_t v = load (&bits->words[w]);

  return v == 0 && is_full (bits, w / PIECE_WORDS) ? ~UINT64_C (0) : v;
}

bool
bits_set_in_piece (struct bits *bits, uint64_t first, uint64_t last)
{
  uint64_t piece = first / PIECE_BITS;
  uint64_t flag = UINT64_C (1) << (piece % 64);
  uint64_t mask = ~UINT64_C (0) << (first % 64);
  bool changed = false;

  if (is_full (bits, piece))
    return false;
  if (!(load (&bits->populated[piece / 64]) & flag))
    atomic_fetch_or_explicit (&bits->populated[piece / 64], flag,
                              memory_order_release);

  for (uint64_t w = first / 64; w <= last / 64; ++w, mask = ~UINT64_C (0)) {
    if (w == last / 64)
      mask &= ~UINT64_C (0) >> (63 - last % 64);
    if ((load (&bits->words[w]) & mask) != mask) {
      atomic_fetch_or_explicit (&bits->words[w], mask, memory_order_release);
      changed = true;
    }
  }
  return changed;
}

bool
bits_all_populated (const struct bits *bits, uint64_t first, uint64_t last)
{
  for (; first <= last; ++first) {
    if (first % 64 == 0 && last - first >= 63 &&
        load (&bits->populated[first / 64]) == UINT64_MAX)
      first += 63;
    else if (!bits_is_populated (bits, first))
      return false;
  }
  return true;
}

uint64_t
bits_count (const struct bits *bits, uint64_t *bytes)
{
  uint64_t n = 0, pieces = 0;

  for (uint64_t i = 0; i < div_round_up (bits->nr_pieces, 64); ++i)
    for (uint64_t flags = load (&bits->populated[i]); flags != 0;
         flags &= flags - 1) {
      const uint64_t piece = i * 64 + __builtin_ctzll (flags);

      if (is_full (bits, piece)) {
        n += PIECE_BITS;
        continue;
      }
      for (unsigned w = 0; w < PIECE_WORDS; ++w)
        n += __builtin_popcountll (load (&bits->words[piece * PIECE_WORDS
                                                      + w]));
      pieces++;
    }
  *bytes = pieces * PIECE_BYTES;
  return n;
}

/* The first populated piece at or after `from`, or nr_pieces. */
static uint64_t
next_populated (const struct bits *bits, uint64_t from)
{
  if (from >= bits->nr_pieces)
    return bits->nr_pieces;

  uint64_t nr_flag_words = div_round_up (bits->nr_pieces, 64);
  uint64_t w = from / 64;
  uint64_t v = load (&bits->populated[w]) & (~UINT64_C (0) << (from % 64));

  while (v == 0) {
    if (++w == nr_flag_words)
      return bits->nr_pieces;
    v = load (&bits->populated[w]);
  }
  return w * 64 + __builtin_ctzll (v);
}

/* The first word at or after w that may have a clear bit, if w begins a
 * piece; else w itself.
 */
static inline uint64_t
skip_full_pieces (const struct bits *bits, uint64_t w)
{
  uint64_t piece = w / PIECE_WORDS;

  if (bits->full == NULL || w % PIECE_WORDS != 0)
    return w;
  while (piece < bits->nr_pieces) {
    const uint64_t not_full = ~bits->full[piece / 64] >> (piece % 64);

    if (not_full != 0) {
      piece += __builtin_ctzll (not_full);
      break;
    }
    piece = round_down (piece, 64) + 64;
  }
  return piece * PIECE_WORDS;
}

uint64_t
bits_next_clear (const struct bits *bits, uint64_t from, uint64_t end)
{
  uint64_t mask = ~UINT64_C (0) << (from % 64), w = from / 64;

  while (w * 64 < end) {
    const uint64_t v = ~load_word (bits, w) & mask;

    if (v != 0)
      return min_u64 (w * 64 + __builtin_ctzll (v), end);
    w = skip_full_pieces (bits, w + 1);
    mask = ~UINT64_C (0);
  }
  return end;
}

bool
bits_all_set_or_full (const struct bits *bits, uint64_t first, uint64_t last)
{
  return bits_next_clear (bits, first, last + 1) > last;
}

/* The first word at or after w that may have a set bit, if w begins a piece;
 * else w itself.
 */
static inline uint64_t
skip_clear_pieces (const struct bits *bits, uint64_t w)
{
  return w % PIECE_WORDS != 0
    ? w : next_populated (bits, w / PIECE_WORDS) * PIECE_WORDS;
}

/* A run ends where a bit differs from the one before it.  A word is loaded
 * once, and all its run ends are found together.
 */
size_t
bits_runs (const struct bits *bits, uint64_t from, uint64_t end,
           unsigned shift, uint64_t *ends, size_t max, bool *set)
{
  uint64_t w = from / 64, v = load_word (bits, w);
  uint64_t run = v >> (from % 64) & 1; /* of the bit before the next */
  uint64_t mask = ~UINT64_C (1) << (from % 64);
  size_t n = 0;

  *set = run != 0;
  for (;;) {
    uint64_t turns = (v ^ (v << 1 | run)) & mask;

    if (end - w * 64 < 64)
      turns &= (UINT64_C (1) << (end - w * 64)) - 1;
    for (; turns != 0; turns &= turns - 1) {
      ends[n++] = (w * 64 + __builtin_ctzll (turns)) << shift;
      if (n == max)
        return n;
    }
    run = v >> 63;
    mask = ~UINT64_C (0);
    w++;
    w = run == 0 ? skip_clear_pieces (bits, w) : skip_full_pieces (bits, w);
    if (w * 64 >= end) {
      ends[n++] = end << shift;
      return n;
    }
    v = load_word (bits, w);
  }
}

void
bits_copy_out (const struct bits *bits, void *buf, uint64_t first_word,
               size_t nr_words)
{
  uint64_t *out = buf;

  for (size_t i = 0; i < nr_words; ++i)
    out[i] = htole64 (load_word (bits, first_word + i));
}

void *
bits_bytes (struct bits *bits, uint64_t offset)
{
  return (uint8_t *) bits->words + offset;
}

void
bits_expect (struct bits *bits, uint64_t offset, uint64_t count)
{
  const uintptr_t start = (uintptr_t) bits->words + offset;
  const uintptr_t from = round_up (start, LARGE_PAGE);
  const uintptr_t to = round_down (start + count, LARGE_PAGE);

  if (bits->mapped_bytes != 0 && from < to)
    madvise ((void *) from, to - from, MADV_HUGEPAGE);
}

void
bits_loaded (struct bits *bits, uint64_t offset, uint64_t count)
{
  uint64_t *words = (uint64_t *) bits->words;
  uint64_t tail = bits->nr_bits / 64;
  uint64_t first = offset / 8, end = (offset + count) / 8;

  if (first <= tail && tail < end) {
    words[tail] &= htole64 ((UINT64_C (1) << (bits->nr_bits % 64)) - 1);
    memset (&words[tail + 1], 0, 8 * (end - tail - 1));
  }
  for (uint64_t w = first; w < end; w += PIECE_WORDS) {
    const uint64_t piece = w / PIECE_WORDS;
    uint64_t any = 0;

    for (unsigned i = 0; i < PIECE_WORDS; ++i) {
      words[w + i] = le64toh (words[w + i]);
      any |= words[w + i];
    }
    if (any != 0)
      bits->populated[piece / 64] |= UINT64_C (1) << (piece % 64);
  }
}

static void
note_populated (struct bits *bits, uint64_t piece)
{
  bits->populated[piece / 64] |= UINT64_C (1) << (piece % 64);
}

int
bits_fill (struct bits *bits, uint64_t offset, uint64_t count)
{
  uint64_t *words = (uint64_t *) bits->words;
  uint64_t piece = offset / PIECE_BYTES;
  const uint64_t end = (offset + count) / PIECE_BYTES;
  const uint64_t whole = bits->nr_bits / PIECE_BITS;

  if (bits->full == NULL) {
    bits->full = calloc (div_round_up (bits->nr_pieces, 64), 8);
    if (bits->full == NULL)
      return -1;
  }
  for (; piece < end && piece < whole; ++piece) {
    note_populated (bits, piece);
    bits->full[piece / 64] |= UINT64_C (1) << (piece % 64);
  }
  if (piece < end && piece < bits->nr_pieces) {
    const uint64_t tail = bits->nr_bits / 64;

    note_populated (bits, piece);
    for (uint64_t w = piece * PIECE_WORDS; w < tail; ++w)
      words[w] = ~UINT64_C (0);
    words[tail] = (UINT64_C (1) << (bits->nr_bits % 64)) - 1;
  }
  return 0;
}

/* Set the bits [first, last]. */
static void
set_range (struct bits *bits, uint64_t first, uint64_t last)
{
  while (first <= last) {
    const uint64_t last_here = min_u64 (last, first | (PIECE_BITS - 1));

    bits_set_in_piece (bits, first, last_here);
    first = last_here + 1;
  }
}

void
bits_set_all (struct bits *bits)
{
  if (bits->nr_bits > 0)
    set_range (bits, 0, bits->nr_bits - 1);
}

/* Set the bits of a piece that other has, for arrays with the same granules.
 */
static void
add_piece (struct bits *bits, const struct bits *other, uint64_t piece)
{
  uint64_t *words = (uint64_t *) &bits->words[piece * PIECE_WORDS];

  note_populated (bits, piece);
  for (unsigned w = 0; w < PIECE_WORDS; ++w)
    words[w] |= load (&other->words[piece * PIECE_WORDS + w]);
}

static void
add_same (struct bits *bits, const struct bits *other)
{
  uint64_t piece = next_populated (other, 0);

  for (; piece < other->nr_pieces; piece = next_populated (other, piece + 1))
    if (is_full (other, piece))
      set_range (bits, piece * PIECE_BITS,
                 min_u64 ((piece + 1) * PIECE_BITS, bits->nr_bits) - 1);
    else
      add_piece (bits, other, piece);
}

void
bits_add (struct bits *bits, unsigned shift, const struct bits *other,
          unsigned other_shift, unsigned round_shift)
{
  const uint64_t granule = UINT64_C (1) << round_shift;
  uint64_t from = 0, end;
  bool set;

  if (shift == other_shift && round_shift <= shift) {
    add_same (bits, other);
    return;
  }
  for (; from < other->nr_bits; from = end) {
    bits_runs (other, from, other->nr_bits, 0, &end, 1, &set);
    if (set)
      set_range (bits, round_down (from << other_shift, granule) >> shift,
                 min_u64 ((round_up (end << other_shift, granule) - 1)
                          >> shift, bits->nr_bits - 1));
  }
}
