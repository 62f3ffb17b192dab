/* nbdkit-dirty-bitmap-filter
 * SPDX-License-Identifier: BSD-3-Clause
 * Copyright the nbdkit-dirty-bitmap-filter authors
 */

#ifndef DIRTY_BITMAP_AHEAD_H
#define DIRTY_BITMAP_AHEAD_H

/* Where the image's bitmap has more bits than RAM (keep.c).
 *
 * The disk is divided into units of 1 MiB, or of one granule if that is more.
 * A unit is ahead if all its bits are durably set in the image, whatever RAM
 * has.  A bit of such a unit may be set in RAM without any I/O.
 *
 * A unit never spans two pieces (bits.h).
 */

#include <stdatomic.h>
#include <stdbool.h>
#include <stdint.h>

struct ahead {
  unsigned shift;               /* log2 of a unit's bytes of the disk */
  unsigned bits_shift;          /* log2 of a unit's bits */
  uint64_t nr_units, nr_bits;

  /* A bit a unit.  Any thread may read them. */
  _Atomic uint64_t *ahead;
  _Atomic uint64_t *used;       /* a bit was set in RAM because the unit is
                                   ahead, since ahead_age */

  /* Protected by the set's reserve_lock.  A bit a unit: it is being made
   * ahead.  A bit a piece: the image may have bits there that RAM has not.
   */
  uint64_t *coming;
  uint64_t *extra;
  uint64_t nr_pieces;

  /* A bit a piece: units of it ceased to be ahead, or never came to be, and
   * it has not been written since.  For the one thread that calls ahead_begin
   * and ahead_end, or tidies.
   */
  uint64_t *untidy;
};

/* No unit is ahead.  disk_bytes > 0; granularity is log2.  -1 with ENOMEM. */
extern int ahead_init (struct ahead *, uint64_t disk_bytes,
                       unsigned granularity);
extern void ahead_free (struct ahead *);

/* The units of [offset, offset + count) of the disk, count > 0. */
static inline uint64_t
ahead_first (const struct ahead *a, uint64_t offset)
{
  return offset >> a->shift;
}

static inline uint64_t
ahead_last (const struct ahead *a, uint64_t offset, uint64_t count)
{
  return (offset + count - 1) >> a->shift;
}

/* Are all units of [first, last] ahead?  If so, the caller sees what the
 * thread did before that made them so.
 */
extern bool ahead_all (const struct ahead *, uint64_t first, uint64_t last);

/* The units of [first, last] were of use. */
extern void ahead_use (struct ahead *, uint64_t first, uint64_t last);

/* Their bits are about to be written to the image (begin), and are durable
 * there, or that failed (end).  reserve_lock is held for both.
 */
extern void ahead_begin (struct ahead *, uint64_t first, uint64_t last);
extern void ahead_end (struct ahead *, uint64_t first, uint64_t last,
                       bool success);

/* For the tidying thread.  While they are held, a writer of a piece writes the
 * bits of all units that were ahead at that moment, whether or not they are
 * since: a mark may have relied on one that is not any more, and RAM may not
 * have its bits yet.  No round may be under way.  reserve_lock is held.
 */
extern void ahead_hold (struct ahead *);
extern void ahead_release (struct ahead *);

/* For the tidying thread.  Units that were of no use since the last call, or
 * all, cease to be ahead.  Returns how many.  Their pieces are untidy: the
 * image has bits there that RAM may lack.
 */
extern uint64_t ahead_age (struct ahead *, bool all);

/* The first untidy piece at or after this one, or nr_pieces. */
extern uint64_t ahead_next_untidy (const struct ahead *, uint64_t piece);

/* A piece was written to the image.  reserve_lock is held. */
extern void ahead_tidied (struct ahead *, uint64_t piece);

/* May the image have bits in this piece that RAM lacks?  reserve_lock is
 * held.
 */
extern bool ahead_has_extra (const struct ahead *, uint64_t piece);

/* Set the bits of units that are ahead or are about to be, in bytes of the
 * array of bits as the image has them: [offset, offset + count), multiples
 * of PIECE_BYTES.  reserve_lock is held.
 */
extern void ahead_add_bits (const struct ahead *, uint8_t *buf,
                            uint64_t offset, uint64_t count);

/* The next run of units that are ahead, at or after unit: its first and last.
 * False if there is none.
 */
extern bool ahead_next_run (const struct ahead *, uint64_t unit,
                            uint64_t *first, uint64_t *last);

#endif /* DIRTY_BITMAP_AHEAD_H */
