/* nbdkit-dirty-bitmap-filter
 * SPDX-License-Identifier: BSD-3-Clause
 * Copyright the nbdkit-dirty-bitmap-filter authors
 */

#ifndef DIRTY_BITMAP_CHANGES_H
#define DIRTY_BITMAP_CHANGES_H

/* Which pieces of a bitmap have changed since they were last written.
 *
 * Marks flag pieces, from any thread.  One thread at a time (the one that
 * flushes) takes all flags, writes the taken pieces, and then either forgets
 * them, if they are durable, or gives them back.
 */

#include <stdatomic.h>
#include <stdbool.h>
#include <stdint.h>

struct changes {
  uint64_t nr_pieces;

  /* A bit a piece, and a bit a word of flags that may not be 0. */
  _Atomic uint64_t *flags;
  _Atomic uint64_t *summary;

  /* The same for taken pieces.  Only the thread that took them uses these. */
  uint64_t *taken;
  uint64_t *taken_summary;
};

/* -1 with errno ENOMEM. */
extern int changes_init (struct changes *, uint64_t nr_pieces);
extern void changes_free (struct changes *);

/* The piece's bits have changed.  Call this after the change. */
extern void changes_flag (struct changes *, uint64_t piece);

/* Is any piece flagged?  Exact if no other thread flags. */
extern bool changes_any (const struct changes *);

/* Take all flags.  The caller sees the bits that were set in a piece before
 * it was flagged.
 */
extern void changes_take (struct changes *);

/* The first piece at or after from that was taken, or nr_pieces. */
extern uint64_t changes_next_taken (const struct changes *, uint64_t from);

extern void changes_forget_taken (struct changes *);
extern void changes_give_back_taken (struct changes *);

#endif /* DIRTY_BITMAP_CHANGES_H */
