/* nbdkit-dirty-bitmap-filter
 * SPDX-License-Identifier: BSD-3-Clause
 * Copyright the nbdkit-dirty-bitmap-filter authors
 */

/* From RAM to the image, within a flush.
 *
 * internal.h has the states and the invariants.  A flush that finds every
 * bitmap SYNCED does nothing.  Otherwise the steps that disk/flush.c
 * conducts do the following for the bitmaps that record:
 *
 * A bitmap that is kept (keep.c) is SYNCED, and a flush does nothing for it
 * but write the pieces for which keep.c wants a table entry, by the first
 * three steps.
 *
 * data: waits for the marks under way, so that every bit that any thread has
 * seen set has its piece flagged; takes the flagged pieces; and writes them,
 * which in_use makes safe.  If the table entry has a data cluster, the piece
 * is written in place.  If the entry is all zeroes, the cluster that the
 * mark has reserved is taken, or one is allocated; it is written whole
 * unless it reads as zeroes, and the table entry becomes pending.  If the
 * cluster's bits are all set now, nothing is written and the entry becomes
 * all ones, which is pending, too.
 *
 * references: the taken pieces are durable.  Pending entries are written.
 * Bitmaps that have none are closed: the state becomes CLOSING, and this step
 * waits for the marks under way.  If no piece has been flagged since data,
 * in_use is cleared in the image, which leaves the bitmap DOUBTFUL.
 * Otherwise the bitmap is IN_USE again, for the next flush to close.
 *
 * settle: the written entries are durable, so the clusters that they
 * replaced are released, and their bitmaps are closed now.
 *
 * done: the cleared flags are durable: DOUBTFUL becomes SYNCED, unless
 * a mark has written the flags again.
 *
 * What may fail, and what is true then:
 *
 * - Before references (refcounts, the first barrier): nothing in the image
 *   refers to anything new.  The bitmaps are IN_USE.  Taken pieces are
 *   flagged again, entries that became pending in this flush are undone, and
 *   their clusters are reserved again.
 * - Writing a bitmap's pieces, or allocation: the same is done for this
 *   bitmap, which is left out of the flush.  The other bitmaps are not.  A
 *   bitmap is also left out if its table entries cannot be written: they
 *   stay pending.
 * - In references, or at the barrier after it: pieces and new clusters are
 *   durable.  An entry may or may not be in the image, so old and new
 *   clusters both stay as they are, and the entry stays pending
 *   ("attempted"), to be written again.  While the entry is pending, changes
 *   go to the new cluster.  That bitmap is IN_USE.  A bitmap whose in_use
 *   was cleared, successfully or not, is DOUBTFUL: its bits are durable, a
 *   mark will set in_use again, and the next flush clears it again.
 * - In settle or after it: the same for the bitmaps closed there.
 *
 * The reason for a failure is remembered (why) until a flush has stored
 * everything.  Guest data never wait for that.
 *
 * Ownership: bitmap tables, pending entries and taken pieces belong to the
 * flush; qcow2/ runs one flush at a time.  reserve.c and keep.c read the
 * tables, and keep.c the pending entries, so these are changed under
 * reserve_lock.  States and flags words are changed
 * under state_lock.  Marks may run at any time.
 */

#include <config.h>

#include <assert.h>
#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "bitmap/internal.h"
#include "common/bytes.h"
#include "common/cleanup.h"
#include "common/lock.h"
#include "common/report.h"
#include "common/vector.h"
#include "qcow2/order.h"

/* Change a table entry.  The caller has made room in pending. */
static void
set_table_entry (struct bitmap *b, uint32_t index, uint64_t entry,
                 uint64_t reserved)
{
  b->pending[b->nr_pending++] = (struct pending_entry) {
    .index = index, .old_entry = b->table[index], .reserved = reserved,
  };
  b->table[index] = entry;
}

static int
reserve_pending (struct bitmap *b)
{
  if (vector_reserve (b->pending, b->nr_pending, b->max_pending, 1) == -1) {
    report_error ("bitmap '%s': realloc: %m", b->name);
    return -1;
  }
  return 0;
}

int
bitmap_write_bits (struct bitmap_set *set, struct bitmap *b, uint8_t *buffer,
                   uint64_t offset, uint64_t count, uint64_t host_offset,
                   bool *durable)
{
  uint64_t array_bytes = b->bits.nr_pieces * PIECE_BYTES;

  assert (b->ahead.ahead == NULL || lock_is_mine (&set->reserve_lock));
  while (count > 0) {
    size_t n = min_u64 (count, SYNC_BUFFER_BYTES);
    size_t have = min_u64 (n, array_bytes - min_u64 (offset, array_bytes));

    bits_copy_out (&b->bits, buffer, offset / 8, have / 8);
    if (b->ahead.ahead != NULL && have > 0)
      ahead_add_bits (&b->ahead, buffer, offset, have);
    memset (buffer + have, 0, n - have);
    const int r = (durable != NULL && *durable ?
                   qcow2_write_metadata_durable : qcow2_write_metadata)
      (set->image, QCOW2_BITMAP_DATA, buffer, n, host_offset);

    if (r == -1)
      return -1;
    if (r == 1)
      *durable = false;
    offset += n;
    host_offset += n;
    count -= n;
  }
  return 0;
}

static int
write_bits (struct bitmap_set *set, struct bitmap *b,
            uint64_t offset, uint64_t count, uint64_t host_offset)
{
  assert (lock_is_mine (&set->reserve_lock));
  set->sync_bytes += count;
  return bitmap_write_bits (set, b, set->buffer, offset, count, host_offset,
                            NULL);
}

bool
bitmap_cluster_is_full (const struct bitmap_set *set, const struct bitmap *b,
                        uint32_t index)
{
  uint64_t cluster_bits = 8 * (uint64_t) set->geometry.cluster_size_bytes;
  uint64_t first = index * cluster_bits, end = first + cluster_bits;

  return end <= b->bits.nr_bits &&
    bits_next_clear (&b->bits, first, end) == end;
}

/* The entry becomes all ones. */
static void
fill_cluster (struct bitmap_set *set, struct bitmap *b, uint32_t index)
{
  const uint64_t reserved = bitmap_take_reserved (b, index);

  set_table_entry (b, index, BITMAP_TABLE_ALL_ONES, 0);
  if (reserved != 0)
    qcow2_release (set->image, reserved & ~RESERVED_ZEROED, 1);
}

/* Give a data cluster to the entry, which is all zeroes.  *zeroed says
 * whether the cluster reads as zeroes.
 */
static int
new_cluster (struct bitmap_set *set, struct bitmap *b, uint32_t index,
             bool *zeroed)
{
  uint64_t reserved = bitmap_take_reserved (b, index), host;

  if (reserved == 0) {
    if (qcow2_alloc (set->image, QCOW2_BITMAP_DATA, 1, &host, zeroed) == -1)
      return -1;
    reserved = host | (*zeroed ? RESERVED_ZEROED : 0);
  }
  *zeroed = reserved & RESERVED_ZEROED;
  set_table_entry (b, index, reserved & ~RESERVED_ZEROED, reserved);
  return 0;
}

/* Write the taken pieces of one cluster of bits.  piece is the first of
 * them, end the end of the cluster's pieces.
 */
static int
write_cluster (struct bitmap_set *set, struct bitmap *b, uint32_t index,
               uint64_t piece, uint64_t end)
{
  uint64_t cluster_size = set->geometry.cluster_size_bytes;
  uint64_t cluster_start = index * cluster_size;
  bool zeroed;

  if (b->table[index] == BITMAP_TABLE_ALL_ONES)
    return 0;
  ACQUIRE_LOCK_FOR_CURRENT_SCOPE (&set->reserve_lock);
  if (reserve_pending (b) == -1)
    return -1;
  if (bitmap_reserve_entry (set, b, index) == -1)
    return -1;
  if (bitmap_cluster_is_full (set, b, index)) {
    fill_cluster (set, b, index);
    return 0;
  }
  if (b->table[index] == BITMAP_TABLE_ALL_ZEROES) {
    if (new_cluster (set, b, index, &zeroed) == -1)
      return -1;
    /* Pieces that were not taken have no bits yet. */
    if (!zeroed)
      return write_bits (set, b, cluster_start, cluster_size,
                         b->table[index]);
  }

  while (piece < end) {
    uint64_t run_end = piece + 1, offset = piece * PIECE_BYTES;

    while (run_end < end &&
           changes_next_taken (&b->changes, run_end) == run_end)
      run_end++;
    if (write_bits (set, b, offset, (run_end - piece) * PIECE_BYTES,
                    b->table[index] + (offset - cluster_start)) == -1)
      return -1;
    piece = changes_next_taken (&b->changes, run_end);
  }
  return 0;
}

static int
write_taken (struct bitmap_set *set, struct bitmap *b)
{
  uint64_t pieces_per_cluster =
    set->geometry.cluster_size_bytes / PIECE_BYTES;
  uint64_t piece = changes_next_taken (&b->changes, 0);

  while (piece < b->changes.nr_pieces) {
    uint32_t index = piece / pieces_per_cluster;
    uint64_t end = min_u64 ((index + UINT64_C (1)) * pieces_per_cluster,
                            b->changes.nr_pieces);

    if (write_cluster (set, b, index, piece, end) == -1)
      return -1;
    piece = changes_next_taken (&b->changes, end);
  }
  return 0;
}

/* Undo the changes that were not attempted, latest first: an entry may have
 * changed once before, in a flush that failed at a later step than this one.
 */
static void
undo_pending (struct bitmap_set *set, struct bitmap *b)
{
  ACQUIRE_LOCK_FOR_CURRENT_SCOPE (&set->reserve_lock);
  while (b->nr_pending > 0) {
    struct pending_entry *p = &b->pending[b->nr_pending - 1];

    if (p->attempted)
      break;
    /* The bits written to it will be written again. */
    if (p->reserved != 0)
      bitmap_keep_reserved (b, p->index, p->reserved);
    b->table[p->index] = p->old_entry;
    b->nr_pending--;
  }
}

/* This flush cannot store one or more bitmaps. */
static void
note_left_out (struct bitmap_set *set, const struct report_hold *hold)
{
  set->left_out = true;
  ACQUIRE_LOCK_FOR_CURRENT_SCOPE (&set->state_lock);
  snprintf (set->why, sizeof set->why, "%s",
            hold->any ? hold->text : "no reason");
}

/* Returns 1 if the bitmap was left out for lack of space. */
static int
write_data (struct bitmap_set *set, struct bitmap *b)
{
  struct report_hold hold;
  int r, err;

  changes_take (&b->changes);
  report_hold_begin (&hold);
  r = write_taken (set, b);
  err = errno;
  report_hold_end (&hold);
  if (r == 0)
    return 0;
  undo_pending (set, b);
  changes_give_back_taken (&b->changes);
  note_left_out (set, &hold);
  return err == ENOSPC;
}

int
bitmap_flush_data (struct bitmap_set *set)
{
  int r = 0;

  if (atomic_load (&set->nr_unsettled) == 0 &&
      atomic_load (&set->nr_entries_wanted) == 0)
    return 0;

  set->phase = SYNC_DATA;
  set->left_out = false;
  set->sync_began = meter_clock ();
  set->sync_bytes = 0;
  grace_synchronize (&set->grace);
  for (size_t i = 0; i < set->nr_recording; ++i)
    if (atomic_load (&set->recording[i]->state) == IN_USE ||
        atomic_load (&set->recording[i]->nr_entries_wanted) > 0)
      r |= write_data (set, set->recording[i]);
  return r;
}

/* Write the pending entries, and the entries between two that are near,
 * which the image has already; but no sector without pending entries, since
 * it may be a hole.  Pieces are taken in ascending order, so entries are
 * too, except for those left from a flush that failed.
 */
static int
write_pending (struct bitmap_set *set, struct bitmap *b)
{
  const uint32_t max = SYNC_BUFFER_BYTES / 8, near = PIECE_BYTES / 8;
  size_t i = 0;

  while (i < b->nr_pending) {
    uint32_t first = b->pending[i].index, end = first + 1;

    while (++i < b->nr_pending) {
      uint32_t next = b->pending[i].index;

      if (next < first || next >= first + max || next >= end + near)
        break;
      if (next >= end)
        end = next + 1;
    }
    bitmap_table_put (set->buffer, &b->table[first], end - first);
    if (qcow2_write_metadata (set->image, QCOW2_BITMAP_TABLE, set->buffer,
                              8 * (size_t) (end - first),
                              b->table_offset + 8 * (uint64_t) first) == -1)
      return -1;
    set->sync_bytes += 8 * (uint64_t) (end - first);
  }
  return 0;
}

/* Begin to close: IN_USE becomes CLOSING, if nothing seems to prevent
 * closing the bitmap.
 */
static bool
begin_closing (struct bitmap_set *set, bool settling)
{
  bool any = false;

  for (size_t i = 0; i < set->nr_recording; ++i) {
    struct bitmap *b = set->recording[i];

    if (((b->settling == settling && b->nr_pending == 0) ||
         !ORDER (ENTRIES_BEFORE_CLEARED)) &&
        atomic_load (&b->state) == IN_USE && !changes_any (&b->changes)) {
      bitmap_set_state (set, b, CLOSING);
      any = true;
    }
  }
  return any;
}

/* Close the bitmaps that can be closed: those that had (settling), or had
 * not, table entries to write.  Returns 1 if it wrote anything.
 */
static int
close_bitmaps (struct bitmap_set *set, bool settling)
{
  int r = 0;

  ACQUIRE_LOCK_FOR_CURRENT_SCOPE (&set->state_lock);
  if (begin_closing (set, settling))
    grace_synchronize (&set->grace);

  for (size_t i = 0; i < set->nr_recording; ++i) {
    struct bitmap *b = set->recording[i];

    if (atomic_load (&b->state) == CLOSING) {
      if (r == -1 || changes_any (&b->changes)) {
        bitmap_set_state (set, b, IN_USE);
        continue;
      }
    }
    else if (r == -1 || settling || atomic_load (&b->state) != DOUBTFUL)
      continue;

    if (bitmap_write_flags (set, b, false) == -1)
      r = -1;
    else {
      b->cleared = true;
      r = 1;
    }
  }
  return r;
}

/* The same; a failure is remembered. */
static int
try_to_close (struct bitmap_set *set, bool settling)
{
  struct report_hold hold;
  int r, err;

  report_hold_begin (&hold);
  r = close_bitmaps (set, settling);
  err = errno;
  report_hold_end (&hold);
  if (r == -1)
    note_left_out (set, &hold);
  errno = err;
  return r;
}

static void
write_entries (struct bitmap_set *set, struct bitmap *b)
{
  struct report_hold hold;

  report_hold_begin (&hold);
  if (write_pending (set, b) == -1)
    b->settling = false;
  report_hold_end (&hold);
  if (!b->settling)
    note_left_out (set, &hold);
}

int
bitmap_flush_references (struct bitmap_set *set)
{
  bool wrote = false;
  int r;

  if (set->phase == SYNC_IDLE)
    return 0;
  set->phase = SYNC_REFERENCES;

  /* From here on nothing is undone, so all of this has to be noted before
   * anything can fail.
   */
  for (size_t i = 0; i < set->nr_recording; ++i) {
    struct bitmap *b = set->recording[i];

    changes_forget_taken (&b->changes);
    for (size_t j = 0; j < b->nr_pending; ++j)
      b->pending[j].attempted = true;
    b->settling = b->nr_pending > 0;
  }

  for (size_t i = 0; i < set->nr_recording; ++i) {
    if (set->recording[i]->settling) {
      write_entries (set, set->recording[i]);
      wrote = true;
    }
  }
  r = try_to_close (set, false);
  return r == -1 ? -1 : r || wrote;
}

int
bitmap_flush_settle (struct bitmap_set *set)
{
  if (set->phase == SYNC_IDLE)
    return 0;
  set->phase = SYNC_SETTLE;

  for (size_t i = 0; i < set->nr_recording; ++i) {
    struct bitmap *b = set->recording[i];

    if (!b->settling)
      continue;
    for (size_t j = 0; j < b->nr_pending; ++j)
      if (bitmap_table_entry_is_data (b->pending[j].old_entry))
        qcow2_release (set->image, b->pending[j].old_entry, 1);
    ACQUIRE_LOCK_FOR_CURRENT_SCOPE (&set->reserve_lock);
    b->nr_pending = 0;
  }
  return try_to_close (set, true);
}

static void
end_flush (struct bitmap_set *set, bool success)
{
  ACQUIRE_LOCK_FOR_CURRENT_SCOPE (&set->state_lock);
  for (size_t i = 0; i < set->nr_recording; ++i) {
    struct bitmap *b = set->recording[i];

    if (b->cleared && success) {
      bitmap_set_state (set, b, SYNCED);
      b->fell_back = false;
    }
    b->cleared = false;
    b->settling = false;
    atomic_store (&b->returning, set->keeps && success && !set->left_out &&
                  atomic_load (&b->state) == IN_USE);
  }
  set->phase = SYNC_IDLE;
  success = success && !set->left_out;
  if (success) {
    set->why[0] = '\0';
    set->told = false;
  }
  tally_add (&set->syncs[success], 1);
  tally_add (&set->syncs_ns[success], meter_clock () - set->sync_began);
  tally_add (&set->syncs_bytes[success], set->sync_bytes);
}

void
bitmap_flush_done (struct bitmap_set *set)
{
  if (set->phase != SYNC_IDLE)
    end_flush (set, true);
}

void
bitmap_flush_failed (struct bitmap_set *set)
{
  if (set->phase == SYNC_IDLE)
    return;
  if (set->phase == SYNC_DATA) {
    for (size_t i = 0; i < set->nr_recording; ++i) {
      undo_pending (set, set->recording[i]);
      changes_give_back_taken (&set->recording[i]->changes);
    }
  }
  end_flush (set, false);
}

void
bitmap_set_get_numbers (const struct bitmap_set *set,
                        struct bitmap_set_numbers *n)
{
  for (unsigned i = 0; i < 2; ++i) {
    n->syncs[i] = tally_get (&set->syncs[i]);
    n->sync_ns[i] = tally_get (&set->syncs_ns[i]);
    n->sync_bytes[i] = tally_get (&set->syncs_bytes[i]);
    n->rounds[i] = tally_get (&set->rounds[i]);
    n->round_ns[i] = tally_get (&set->rounds_ns[i]);
  }
  n->regions_marked = tally_get (&set->regions_marked);
  n->bytes_tidied = tally_get (&set->bytes_tidied);
  n->fallbacks = tally_get (&set->fallbacks);
}

void
bitmap_set_tell_unstored (struct bitmap_set *set)
{
  ACQUIRE_LOCK_FOR_CURRENT_SCOPE (&set->state_lock);
  if (set->why[0] == '\0' || set->told)
    return;
  set->told = true;
  report_warning ("bitmaps cannot be stored at present, and stay marked as "
                  "in use in the image until a flush stores them: %s",
                  set->why);
}

bool
bitmap_set_all_stored (struct bitmap_set *set)
{
  bool all = true;

  ACQUIRE_LOCK_FOR_CURRENT_SCOPE (&set->state_lock);
  for (size_t i = 0; i < set->nr_recording; ++i) {
    struct bitmap *b = set->recording[i];
    enum bitmap_state state = atomic_load (&b->state);

    if (state != SYNCED) {
      /* Once for each bitmap, at the end. */
      report_limited_error ("bitmap '%s' could not be stored and %s in use in "
                            "the image%s%s", b->name,
                            state == DOUBTFUL ? "may be left" : "is left",
                            set->why[0] == '\0' ? "" : ": ", set->why);
      all = false;
    }
  }
  return all;
}
