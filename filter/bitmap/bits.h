/* nbdkit-dirty-bitmap-filter
 * SPDX-License-Identifier: BSD-3-Clause
 * Copyright the nbdkit-dirty-bitmap-filter authors
 */

#ifndef DIRTY_BITMAP_BITS_H
#define DIRTY_BITMAP_BITS_H

/* The bits of one bitmap in RAM: a flat array, a bit a granule, least
 * significant bit of a word first, so that on a little-endian machine the
 * words are the bytes of the image.  The memory of a piece is not touched if
 * the piece has no set bit, or if the image says that it is all ones.
 *
 * A piece is 512 bytes of bits: a disk writes it whole, and changes are
 * remembered by piece (changes.h).
 */

#include <stdatomic.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#define PIECE_BYTES 512
#define PIECE_WORDS (PIECE_BYTES / 8)
#define PIECE_BITS  (PIECE_BYTES * 8)

struct bits {
  _Atomic uint64_t *words;      /* nr_pieces * PIECE_WORDS */

  /* A bit a piece: set before any bit of the piece is, so that a clear
   * one lets a reader skip the piece.
   */
  _Atomic uint64_t *populated;

  /* A bit a piece, or NULL: all bits of the piece are set, whatever its
   * words say.  Fixed when the bits are loaded.
   */
  uint64_t *full;

  uint64_t nr_bits;
  uint64_t nr_pieces;
  uint64_t mapped_bytes;        /* of words, if they are a mapping, or 0 */
};

/* All bits clear.  -1 with errno ENOMEM. */
extern int bits_init (struct bits *, uint64_t nr_bits);
extern void bits_free (struct bits *);

/* bits_all_set, for bits that have full pieces. */
extern bool bits_all_set_or_full (const struct bits *, uint64_t first,
                                  uint64_t last);

/* Are all bits of [first, last] set?  first <= last < nr_bits.  If this
 * returns true, the caller sees what the threads that set them did before.
 */
static inline bool
bits_all_set (const struct bits *bits, uint64_t first, uint64_t last)
{
  uint64_t w = first / 64, last_word = last / 64;
  uint64_t mask = ~UINT64_C (0) << (first % 64);

  for (; w < last_word; ++w, mask = ~UINT64_C (0))
    if (~atomic_load_explicit (&bits->words[w], memory_order_acquire) & mask)
      return bits->full != NULL && bits_all_set_or_full (bits, first, last);
  mask &= ~UINT64_C (0) >> (63 - last % 64);
  if (!(~atomic_load_explicit (&bits->words[w], memory_order_acquire) & mask))
    return true;
  return bits->full != NULL && bits_all_set_or_full (bits, first, last);
}

/* Set the bits of [first, last], which lie in one piece.  Returns true if
 * any bit changed.
 */
extern bool bits_set_in_piece (struct bits *, uint64_t first, uint64_t last);

/* May a piece have a set bit?  While this is false, it has none. */
static inline bool
bits_is_populated (const struct bits *bits, uint64_t piece)
{
  return atomic_load_explicit (&bits->populated[piece / 64],
                               memory_order_acquire) >> (piece % 64) & 1;
}

/* The same for all pieces of [first, last]. */
extern bool bits_all_populated (const struct bits *, uint64_t first,
                                uint64_t last);

/* The first clear bit at or after `from`, or end if there is none before
 * end.
 */
extern uint64_t bits_next_clear (const struct bits *, uint64_t from,
                                 uint64_t end);

/* Set all bits.  No other thread has them. */
extern void bits_set_all (struct bits *);

/* Set every bit whose granule has a byte in common with that of a set bit of
 * other, for two arrays that cover the same disk.  The latter are rounded to
 * granules of 2^round_shift bytes first.  The shifts are log2 of the
 * granularities.  No other thread has the bits.
 */
extern void bits_add (struct bits *, unsigned shift, const struct bits *other,
                      unsigned other_shift, unsigned round_shift);

/* How many bits are set, and the bytes of memory that hold them. */
extern uint64_t bits_count (const struct bits *, uint64_t *bytes);

/* The runs of equal bits from `from` on, up to max of them (at least 1): run
 * k ends before bit ends[k] >> shift.  Returns how many there are; the last
 * one ends at end.  *set says whether the bits of the first run are set; set
 * and clear runs alternate.  from < end <= nr_bits.
 */
extern size_t bits_runs (const struct bits *, uint64_t from, uint64_t end,
                         unsigned shift, uint64_t *ends, size_t max,
                         bool *set);

/* Copy words out as the image has them: little-endian bytes.  The words must
 * lie inside the array.
 */
extern void bits_copy_out (const struct bits *, void *buf,
                           uint64_t first_word, size_t nr_words);

/* While no other thread has the bits: the bytes [offset, offset + count) of
 * the array, for the caller to fill from the image.  The caller then calls
 * bits_loaded.  Both numbers are multiples of 512.
 */
extern void *bits_bytes (struct bits *, uint64_t offset);
extern void bits_loaded (struct bits *, uint64_t offset, uint64_t count);

/* All of these bytes will be filled: their memory may come in large pages. */
extern void bits_expect (struct bits *, uint64_t offset, uint64_t count);

/* The same, if all bits of these bytes are set in the image.  This takes a
 * bit a piece, once for the whole array.  -1 with errno ENOMEM.
 */
extern int bits_fill (struct bits *, uint64_t offset, uint64_t count);

#endif /* DIRTY_BITMAP_BITS_H */
