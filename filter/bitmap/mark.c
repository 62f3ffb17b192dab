/* nbdkit-dirty-bitmap-filter
 * SPDX-License-Identifier: BSD-3-Clause
 * Copyright the nbdkit-dirty-bitmap-filter authors
 */

/* Marking.
 *
 * internal.h has the states and the invariants.  There are three ways
 * through a mark, each taken only if the previous one is not possible:
 *
 * - All bits are set in all recording bitmaps: they are only read.
 * - All bitmaps that lack a bit are IN_USE: the bits are set with
 *   atomics, in a section.
 * - Some bitmap that lacks a bit is not IN_USE: under state_lock in_use
 *   is written for all such bitmaps, one barrier makes it durable, and
 *   the bits are set before the lock is released.  So no flush can clear
 *   in_use in between, however many flushes there are, and every mark
 *   ends after at most one barrier.
 *
 * Before the second and the third way, the space that the flush will need is
 * reserved (reserve.c).
 *
 * In a set that keeps its bitmaps, bits that are ahead in the image can be
 * set in the second way, too, and they are written ahead before the third way
 * is tried (keep.c).
 *
 * Bitmaps that are in RAM alone are set in the same section, and need nothing
 * before that.
 *
 * A mark of more than mark_bytes is made in parts, so that no section is
 * long: a thread may be waiting for its end.
 *
 * Failure: if a flags word cannot be written, or the barrier fails, the
 * bitmaps tried are DOUBTFUL, no bit of this part has been set, and the mark
 * fails.  Bits of earlier parts, and bitmaps that are in use without a
 * change, do no harm: the next flush writes the former and clears the
 * latter.
 */

#include <config.h>

#include <assert.h>
#include <errno.h>
#include <stdlib.h>

#include "bitmap/change.h"
#include "bitmap/internal.h"
#include "common/bytes.h"
#include "common/cleanup.h"
#include "common/lock.h"
#include "common/report.h"
#include "qcow2/order.h"

/* The states that may follow each state. */
static const unsigned next_states[] = {
  [SYNCED] = 1 << DOUBTFUL,
  [DOUBTFUL] = 1 << DOUBTFUL | 1 << IN_USE | 1 << SYNCED,
  [IN_USE] = 1 << CLOSING,
  [CLOSING] = 1 << IN_USE | 1 << DOUBTFUL,
};

void
bitmap_set_state (struct bitmap_set *set, struct bitmap *b,
                  enum bitmap_state state)
{
  enum bitmap_state old = atomic_load (&b->state);

  assert (lock_is_mine (&set->state_lock));
  assert ((next_states[old] & 1 << state) != 0);
  /* Raise the count first, and lower it last: a thread that finds it 0 may
   * rely on that.
   */
  if (old == SYNCED && state != SYNCED)
    atomic_fetch_add (&set->nr_unsettled, 1);
  atomic_store (&b->state, state);
  if (old != SYNCED && state == SYNCED)
    atomic_fetch_sub (&set->nr_unsettled, 1);
}

int
bitmap_write_flags (struct bitmap_set *set, struct bitmap *b, bool in_use)
{
  uint8_t word[4];

  assert (lock_is_mine (&set->state_lock));
  put_be32 (word, b->flags | (in_use ? BITMAP_FLAG_IN_USE : 0));
  b->cleared = false;
  bitmap_set_state (set, b, DOUBTFUL);
  return qcow2_write_metadata (set->image, QCOW2_BITMAP_DIRECTORY,
                               word, sizeof word,
                               b->entry_offset + BITMAP_ENTRY_FLAGS_OFFSET);
}

/* Does the image have these bits already? */
static bool
is_in_image (const struct bitmap *b, uint64_t offset, uint64_t count)
{
  return bitmap_has_all (b, offset, count) ||
    bitmap_is_ahead (b, offset, count);
}

/* A mark relies on it that the image has these bits already, or that the
 * bitmap is IN_USE.
 */
static bool
may_set_bits (const struct bitmap *b, uint64_t offset, uint64_t count)
{
  return atomic_load (&b->state) == IN_USE || is_in_image (b, offset, count);
}

static void
set_bits (struct bitmap *b, uint64_t offset, uint64_t count)
{
  const bool is_ahead = bitmap_is_ahead (b, offset, count);
  uint64_t first = bitmap_first_bit (b, offset);
  uint64_t last = bitmap_last_bit (b, offset, count);

  while (first <= last) {
    uint64_t piece = first / PIECE_BITS;
    uint64_t last_here = min_u64 (last, piece * PIECE_BITS + PIECE_BITS - 1);

    /* A bit that was set already was set in another section, which
     * flags the piece itself.
     */
    if (bits_set_in_piece (&b->bits, first, last_here) && !is_ahead)
      changes_flag (&b->changes, piece);
    first = last_here + 1;
  }
  if (is_ahead)
    ahead_use (&b->ahead, ahead_first (&b->ahead, offset),
               ahead_last (&b->ahead, offset, count));
}

/* Set the bits in those of the bitmaps that lack one. */
static void
set_lacking (struct bitmap *const *bitmaps, size_t nr, uint64_t offset,
             uint64_t count)
{
  for (size_t i = 0; i < nr; ++i)
    if (!bitmap_has_all (bitmaps[i], offset, count))
      set_bits (bitmaps[i], offset, count);
}

/* Set the bits in all bitmaps.  Set none, and return false, if a bitmap that
 * lacks one is neither IN_USE nor ahead.  With prefer_ahead, a bitmap that is
 * returning counts as not IN_USE.
 */
static bool
mark_in_section (struct bitmap_set *set, uint64_t offset, uint64_t count,
                 bool prefer_ahead)
{
  grace_ticket ticket = grace_enter (&set->grace);
  bool all = true;

  for (size_t i = 0; i < set->nr_recording && all; ++i) {
    const struct bitmap *b = set->recording[i];

    all = prefer_ahead && atomic_load (&b->returning)
      ? is_in_image (b, offset, count) : may_set_bits (b, offset, count);
  }
  if (all) {
    set_lacking (set->recording, set->nr_recording, offset, count);
    set_lacking (set->recording_in_ram, set->nr_recording_in_ram, offset,
                 count);
  }
  grace_leave (&set->grace, ticket);
  return all;
}

/* Make every bitmap IN_USE that lacks a bit of the range and is not ahead.
 * state_lock is held.  So no mark of another thread sets bits of a bitmap that
 * is neither IN_USE nor ahead.  A round may make its units ahead meanwhile, and
 * then they stay so, since tidying takes the lock, too.  If its flags were
 * written by then, the bitmap stays DOUBTFUL, which does no harm.
 */
static int
make_in_use (struct bitmap_set *set, uint64_t offset, uint64_t count)
{
  const unsigned long lost = qcow2_lost (set->image);

  assert (lock_is_mine (&set->state_lock));
  for (size_t i = 0; i < set->nr_recording; ++i) {
    struct bitmap *b = set->recording[i];

    if (!may_set_bits (b, offset, count) &&
        bitmap_write_flags (set, b, true) == -1)
      return -1;
  }

  if (ORDER (IN_USE_BEFORE_CHANGE) &&
      qcow2_barrier_since (set->image, lost) == -1)
    return -1;

  for (size_t i = 0; i < set->nr_recording; ++i) {
    struct bitmap *b = set->recording[i];

    if (!may_set_bits (b, offset, count))
      bitmap_set_state (set, b, IN_USE);
  }
  return 0;
}

/* Mark a part of which not all bits may be set as things are. */
static int
mark_in_use (struct bitmap_set *set, uint64_t offset, uint64_t count)
{
  ACQUIRE_LOCK_FOR_CURRENT_SCOPE (&set->state_lock);
  if (mark_in_section (set, offset, count, false))
    return 0;                   /* Another thread was faster. */
  if (make_in_use (set, offset, count) == -1)
    return -1;
  if (!mark_in_section (set, offset, count, false))
    abort ();                   /* Only a holder of the lock can undo it. */
  return 0;
}

static int
mark_part (struct bitmap_set *set, uint64_t offset, uint64_t count)
{
  int r;

  if (mark_in_section (set, offset, count, true))
    return 0;
  if (!set->keeps)
    return mark_in_use (set, offset, count);

  /* More than once only if the units were tidied at this very moment. */
  while (keep_ahead (set, offset, count) == 0)
    if (mark_in_section (set, offset, count, true))
      return 0;
  bitmap_reserve (set, offset, count);
  r = mark_in_use (set, offset, count);
  keep_tell_fallbacks (set);
  return r;
}

static bool
all_have (struct bitmap *const *bitmaps, size_t nr, uint64_t offset,
          uint64_t count)
{
  for (size_t i = 0; i < nr; ++i)
    if (!bitmap_has_all (bitmaps[i], offset, count))
      return false;
  return true;
}

static bool
marked_already (const struct bitmap_set *set, uint64_t offset, uint64_t count)
{
  return all_have (set->recording, set->nr_recording, offset, count) &&
    all_have (set->recording_in_ram, set->nr_recording_in_ram, offset, count);
}

int
bitmap_set_mark (struct bitmap_set *set, uint64_t offset, uint64_t count)
{
  assert (!set->readonly);
  assert (!range_exceeds (offset, count, set->geometry.disk_size_bytes));
  if (count == 0)
    return 0;
  if (atomic_load_explicit (&set->in_doubt, memory_order_acquire) &&
      bitmap_set_settle_doubt (set) == -1)
    return -1;
  if (set->keeps &&
      !atomic_load_explicit (&set->loaded_is_durable, memory_order_acquire) &&
      keep_begin (set) == -1)
    return -1;
  if (marked_already (set, offset, count))
    return 0;

  /* Bits ahead need a reserve only for what a flush has to write. */
  if (!set->keeps || atomic_load (&set->nr_unsettled) > 0)
    bitmap_reserve (set, offset, count);
  while (count > 0) {
    uint64_t part = min_u64 (count, set->mark_bytes);

    if (mark_part (set, offset, part) == -1)
      return -1;
    offset += part;
    count -= part;
  }
  return 0;
}
