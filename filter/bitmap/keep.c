/* nbdkit-dirty-bitmap-filter
 * SPDX-License-Identifier: BSD-3-Clause
 * Copyright the nbdkit-dirty-bitmap-filter authors
 */

/* Bits in the image ahead of the changes (dirty-bitmap-crash=keep, I9).
 *
 * While a bitmap is SYNCED, the image durably has every bit that RAM has.
 * Usually a mark makes the bitmap IN_USE before it sets a bit.  Here it
 * makes sure instead that the image durably has the bit first, so the bitmap
 * stays SYNCED, and after a crash it reports all changes, and some more.
 *
 * To write each bit for itself would cost a barrier for each change.  So the
 * bits of a whole region are written at once.  Its units are ahead then
 * (ahead.h): the image has all their bits, RAM has those of real changes,
 * and a mark in such a unit does no I/O.
 *
 * A region is the least power of two of bytes that region_shift says, and
 * aligned.  It is small at first, since all of it is reported after a crash,
 * and doubles while threads spend more than a twentieth of the time here.
 *
 * Marks that need a region come in rounds.  One of the threads that wait
 * leads: it writes the bits that all of them need, and makes them durable.
 * Few writes are made durable one by one, many by one barrier.  Threads that
 * come meanwhile wait for the next round.  If a bitmap has no data cluster for
 * these bits yet, the leader lets a flush write them, with the table entry
 * (sync.c): that is two barriers, once for each cluster of bits.  The room
 * above conducts flushes, and has handed over how to ask for one
 * (bitmap_options).
 *
 * If that fails, for one bitmap or all, its units are not ahead.  The mark
 * goes on as without all this, and makes the bitmap IN_USE (mark.c).  Its
 * bits are written ahead again once a flush has stored it.  A flush may have
 * written its bits, and find that marks have set new ones meanwhile.  Then it
 * cannot close the bitmap, which is `returning` from then on: marks write its
 * bits ahead, though it is IN_USE.  So the next flush finds no new ones.
 *
 * Units that were of no use for a while are tidied.  They cease to be ahead.
 * After a grace period RAM has the bits of all marks that relied on them,
 * and the pieces are written as RAM has them (I10).  This needs no barrier:
 * before and after it, and if it is torn, the image has the bits of RAM.  All
 * pieces are tidied at the end.
 *
 * What is in the image is the bits of RAM, and those of units that are ahead,
 * or that a round is writing, or that ceased to be ahead before the grace
 * period is over (ahead_hold).  A writer of a piece writes all these, and
 * holds reserve_lock meanwhile (bitmap_write_bits).
 *
 * Locks: keep_lock is held for a moment, with no other lock.  The leader and
 * the tidying thread hold no lock, and exclude each other by keep_busy.  So
 * the leader may flush.
 */

#include <config.h>

#include <assert.h>
#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "bitmap/change.h"
#include "bitmap/internal.h"
#include "common/bytes.h"
#include "common/cleanup.h"
#include "common/clock.h"
#include "common/lock.h"
#include "common/report.h"
#include "common/vector.h"
#include "qcow2/order.h"

#define LEAST_REGION 20         /* log2 of bytes */
#define LARGEST_REGION 28

/* So many writes are made durable one by one.  That takes less time than a
 * barrier, which has to write all that clients have written, too.
 */
#define DURABLE_WRITES 4

/* Units of a bitmap that a round makes ahead. */
struct keep_want {
  struct bitmap *bitmap;
  uint64_t first, last;
  bool durable;                 /* what was written is, without a barrier */
  bool needs_entry;             /* a flush has to write some of it */
  bool failed;
};

static bool
has_any_entry (const struct bitmap *b)
{
  for (uint32_t i = 0; i < b->table_entries; ++i)
    if (b->table[i] != BITMAP_TABLE_ALL_ZEROES)
      return true;
  return false;
}

int
keep_init_ahead (const struct bitmap_set *set, struct ahead *a,
                 unsigned granularity)
{
  if (ahead_init (a, set->geometry.disk_size_bytes, granularity) == 0)
    return 0;
  report_error ("calloc: %m");
  return -1;
}

int
keep_init (struct bitmap_set *set,
           int (*flush) (struct qcow2 *, struct bitmap_set *))
{
  bool any = false;

  assert (flush != NULL);
  set->flush = flush;
  set->keep_buffer = malloc (SYNC_BUFFER_BYTES);
  if (set->keep_buffer == NULL) {
    report_error ("malloc: %m");
    return -1;
  }
  set->region_shift = LEAST_REGION;
  set->pace_began = now_ns ();
  set->next_round = 1;
  for (size_t i = 0; i < set->nr_recording; ++i) {
    struct bitmap *b = set->recording[i];

    if (keep_init_ahead (set, &b->ahead, b->shift) == -1)
      return -1;
    any |= has_any_entry (b);
  }
  atomic_init (&set->loaded_is_durable, !any);
  set->keeps = true;
  return 0;
}

int
keep_begin (struct bitmap_set *set)
{
  if (qcow2_barrier_since (set->image, qcow2_lost (set->image)) == -1)
    return -1;
  atomic_store_explicit (&set->loaded_is_durable, true, memory_order_release);
  return 0;
}

void
keep_free (struct bitmap_set *set)
{
  free (set->keep_buffer);
  free (set->wants);
}

/* keep_lock is held: will the next round do this already? */
static bool
is_wanted (const struct bitmap_set *set, const struct keep_want *w)
{
  assert (lock_is_mine (&set->keep_lock));
  for (size_t i = 0; i < set->nr_wants; ++i)
    if (set->wants[i].bitmap == w->bitmap &&
        set->wants[i].first <= w->first && set->wants[i].last >= w->last)
      return true;
  return false;
}

/* Note what this mark needs, for the next round.  keep_lock is held.
 * Returns 1, 0 if that is nothing, or -1.
 */
static int
want_region (struct bitmap_set *set, uint64_t offset, uint64_t count)
{
  const uint64_t region = UINT64_C (1) << set->region_shift;
  const uint64_t from = round_down (offset, region);
  const uint64_t to = min_u64 (round_up (offset + count, region),
                               set->geometry.disk_size_bytes);
  bool any = false;

  assert (lock_is_mine (&set->keep_lock));
  if (vector_reserve (set->wants, set->nr_wants, set->max_wants,
                      set->nr_recording) == -1)
    return -1;
  for (size_t i = 0; i < set->nr_recording; ++i) {
    struct bitmap *b = set->recording[i];

    const struct keep_want w = {
      .bitmap = b,
      .first = ahead_first (&b->ahead, from),
      .last = ahead_last (&b->ahead, from, to - from),
    };

    if ((atomic_load (&b->state) == IN_USE && !atomic_load (&b->returning)) ||
        bitmap_has_all (b, offset, count) ||
        bitmap_is_ahead (b, offset, count))
      continue;
    any = true;
    if (!is_wanted (set, &w))
      set->wants[set->nr_wants++] = w;
  }
  return any;
}

/* reserve_lock is held: is a table entry in the image as it is in RAM? */
static bool
is_durable (const struct bitmap *b, uint64_t index)
{
  for (size_t i = 0; i < b->nr_pending; ++i)
    if (b->pending[i].index == index)
      return false;
  return b->table[index] != BITMAP_TABLE_ALL_ZEROES;
}

/* Write pieces [first, end) of one cluster of bits, or flag them for the
 * flush that gives them a cluster.  reserve_lock is held.
 */
static int
write_in_cluster (struct bitmap_set *set, struct keep_want *w, uint64_t first,
                  uint64_t end)
{
  const uint64_t in_cluster = set->geometry.cluster_size_bytes / PIECE_BYTES;
  struct bitmap *b = w->bitmap;
  const uint64_t entry = b->table[first / in_cluster];

  assert (lock_is_mine (&set->reserve_lock));
  if (!is_durable (b, first / in_cluster)) {
    for (uint64_t p = first; p < end; ++p)
      changes_flag (&b->changes, p);
    w->needs_entry = true;
    return 0;
  }
  if (entry == BITMAP_TABLE_ALL_ONES)
    return 0;
  return bitmap_write_bits (set, b, set->keep_buffer, first * PIECE_BYTES,
                            (end - first) * PIECE_BYTES,
                            entry + first % in_cluster * PIECE_BYTES,
                            &w->durable);
}

static void
count_round (struct bitmap_set *set, bool success, int64_t ns)
{
  tally_add (&set->rounds[success], 1);
  tally_add (&set->rounds_ns[success], ns);
}

static int
write_want (struct bitmap_set *set, struct keep_want *w)
{
  const uint64_t in_cluster = set->geometry.cluster_size_bytes / PIECE_BYTES;
  const struct ahead *a = &w->bitmap->ahead;
  uint64_t piece = (w->first << a->bits_shift) / PIECE_BITS;
  const uint64_t last = (w->last << a->bits_shift) / PIECE_BITS;

  ACQUIRE_LOCK_FOR_CURRENT_SCOPE (&set->reserve_lock);
  ahead_begin (&w->bitmap->ahead, w->first, w->last);
  while (piece <= last) {
    const uint64_t end =
      min_u64 (last + 1, round_down (piece, in_cluster) + in_cluster);

    if (write_in_cluster (set, w, piece, end) == -1)
      return -1;
    piece = end;
  }
  return 0;
}

/* Has a flush durably written the table entries of all these units? */
static bool
has_entries (struct bitmap_set *set, const struct keep_want *w)
{
  const uint64_t bits = 8 * (uint64_t) set->geometry.cluster_size_bytes;
  const struct bitmap *b = w->bitmap;
  const uint64_t first = (w->first << b->ahead.bits_shift) / bits;
  const uint64_t last = (w->last << b->ahead.bits_shift) / bits;

  ACQUIRE_LOCK_FOR_CURRENT_SCOPE (&set->reserve_lock);
  for (uint64_t i = first; i <= last; ++i)
    if (!is_durable (b, i))
      return false;
  return true;
}

/* Let a flush write what needs table entries. */
static int
flush_entries (struct bitmap_set *set, struct keep_want *wants, size_t nr)
{
  int r;

  for (size_t i = 0; i < nr; ++i)
    if (wants[i].needs_entry)
      atomic_fetch_add (&wants[i].bitmap->nr_entries_wanted, 1);
  atomic_fetch_add (&set->nr_entries_wanted, 1);
  r = set->flush (set->image, set);
  atomic_fetch_sub (&set->nr_entries_wanted, 1);
  for (size_t i = 0; i < nr; ++i) {
    if (!wants[i].needs_entry)
      continue;
    atomic_fetch_sub (&wants[i].bitmap->nr_entries_wanted, 1);
    /* A flag that remained says that a piece may not have been written. */
    if (!has_entries (set, &wants[i]) ||
        changes_any (&wants[i].bitmap->changes))
      wants[i].failed = true;
  }
  return r;
}

/* Write what a round is for, and make it durable.  -1 if some of it failed. */
static int
write_round (struct bitmap_set *set, struct keep_want *wants, size_t nr)
{
  const unsigned long lost = qcow2_lost (set->image);
  const bool durable = nr <= DURABLE_WRITES && ORDER (AHEAD_BEFORE_CHANGE);
  bool needs_entry = false, needs_barrier = false, failed = false;
  int r = 0;

  for (size_t i = 0; i < nr; ++i) {
    wants[i].durable = durable;
    wants[i].failed = write_want (set, &wants[i]) == -1;
    needs_entry |= wants[i].needs_entry;
    needs_barrier |= !wants[i].failed && !wants[i].durable;
  }
  if (!ORDER (AHEAD_BEFORE_CHANGE))
    ;
  else if (needs_entry)
    r = flush_entries (set, wants, nr);
  else if (needs_barrier)
    r = qcow2_barrier_since (set->image, lost);
  if (r == 0 && qcow2_lost (set->image) != lost)
    r = -1;

  ACQUIRE_LOCK_FOR_CURRENT_SCOPE (&set->reserve_lock);
  for (size_t i = 0; i < nr; ++i) {
    struct keep_want *w = &wants[i];

    ahead_end (&w->bitmap->ahead, w->first, w->last, r == 0 && !w->failed);
    tally_add (&set->regions_marked, r == 0 && !w->failed);
    if (r == -1 || w->failed)
      atomic_store (&w->bitmap->returning, false);
    failed |= w->failed;
  }
  return r == 0 && !failed ? 0 : -1;
}

/* keep_lock is held: spend ns on a round.  A region doubles if threads spend
 * more than a twentieth of their time here.
 */
static void
pace (struct bitmap_set *set, int64_t ns)
{
  const int64_t now = now_ns ();

  assert (lock_is_mine (&set->keep_lock));
  set->pace_ns += ns;
  if (set->pace_ns * 20 <= now - set->pace_began)
    return;
  if (set->region_shift < LARGEST_REGION)
    set->region_shift++;
  set->pace_began = now;
  set->pace_ns = 0;
}

/* Lead the next round.  keep_lock is held, and is let go meanwhile. */
static void
lead (struct bitmap_set *set)
{
  struct keep_want *wants = set->wants;
  const size_t nr = set->nr_wants;
  const uint64_t round = set->next_round++;
  const int64_t began = now_ns ();
  struct report_hold hold;

  assert (lock_is_mine (&set->keep_lock));
  set->wants = NULL;
  set->nr_wants = set->max_wants = 0;
  set->keep_busy = true;
  pthread_mutex_unlock (&set->keep_lock);
  report_hold_begin (&hold);
  const int r = write_round (set, wants, nr);
  const int64_t ns = now_ns () - began;
  report_hold_end (&hold);
  free (wants);
  count_round (set, r == 0, ns);
  pthread_mutex_lock (&set->keep_lock);
  if (r == -1) {
    set->failed_round = round;
    snprintf (set->keep_why, sizeof set->keep_why, "%s",
              hold.any ? hold.text : "");
  }
  pace (set, ns);
  set->keep_busy = false;
  set->last_round = round;
  pthread_cond_broadcast (&set->keep_changed);
}

int
keep_ahead (struct bitmap_set *set, uint64_t offset, uint64_t count)
{
  const int err = errno;
  int r;

  pthread_mutex_lock (&set->keep_lock);
  const uint64_t mine = set->next_round;

  r = want_region (set, offset, count);
  if (r == -1)
    snprintf (set->keep_why, sizeof set->keep_why, "realloc: %m");
  else if (r == 1)
    while ((int64_t) (set->last_round - mine) < 0) {
      if (set->keep_busy)
        pthread_cond_wait (&set->keep_changed, &set->keep_lock);
      else
        lead (set);
    }
  if (r == 1 && set->failed_round >= mine)
    r = -1;
  pthread_mutex_unlock (&set->keep_lock);
  errno = err;
  return r == -1 ? -1 : 0;
}

void
keep_tell_fallbacks (struct bitmap_set *set)
{
  char why[sizeof set->keep_why];

  pthread_mutex_lock (&set->keep_lock);
  memcpy (why, set->keep_why, sizeof why);
  pthread_mutex_unlock (&set->keep_lock);

  ACQUIRE_LOCK_FOR_CURRENT_SCOPE (&set->state_lock);
  for (size_t i = 0; i < set->nr_recording; ++i) {
    struct bitmap *b = set->recording[i];

    if (b->fell_back || atomic_load (&b->state) == SYNCED)
      continue;
    b->fell_back = true;
    tally_add (&set->fallbacks, 1);
    /* A flush for the round has its own reason. */
    report_warning ("bitmap '%s' is marked as in use in the image until a "
                    "flush stores it: its bits could not be written ahead of "
                    "a change%s%s", b->name,
                    why[0] != '\0' || set->why[0] != '\0' ? ": " : "",
                    why[0] != '\0' ? why : set->why);
  }
}

/* Write the untidy pieces of a bitmap.  Those of one cluster go together. */
static int
tidy_pieces (struct bitmap_set *set, struct bitmap *b)
{
  const uint64_t in_cluster = set->geometry.cluster_size_bytes / PIECE_BYTES;
  uint64_t piece = 0, end;
  int r = 0;

  while ((piece = ahead_next_untidy (&b->ahead, piece)) <
         b->ahead.nr_pieces) {
    const uint64_t limit = min_u64 (round_down (piece, in_cluster) +
                                    in_cluster, b->ahead.nr_pieces);

    for (end = piece + 1; end < limit &&
           ahead_next_untidy (&b->ahead, end) == end; ++end)
      ;
    ACQUIRE_LOCK_FOR_CURRENT_SCOPE (&set->reserve_lock);
    const uint64_t entry = b->table[piece / in_cluster];

    if (bitmap_table_entry_is_data (entry) &&
        bitmap_write_bits (set, b, set->keep_buffer, piece * PIECE_BYTES,
                           (end - piece) * PIECE_BYTES,
                           entry + piece % in_cluster * PIECE_BYTES,
                           NULL) == -1) {
      r = -1;
      piece = end;
    }
    for (; piece < end; ++piece)
      ahead_tidied (&b->ahead, piece);
  }
  return r;
}

/* Until the next grace period, flushes write the bits of all units that are
 * ahead now (ahead_hold).
 */
static void
hold_all (struct bitmap_set *set, bool hold)
{
  ACQUIRE_LOCK_FOR_CURRENT_SCOPE (&set->reserve_lock);
  for (size_t i = 0; i < set->nr_recording; ++i)
    (hold ? ahead_hold : ahead_release) (&set->recording[i]->ahead);
}

static int
tidy (struct bitmap_set *set, bool all)
{
  uint64_t nr = 0;
  int r = 0;

  hold_all (set, true);
  {
    /* A mark that holds state_lock relies on units that are ahead. */
    ACQUIRE_LOCK_FOR_CURRENT_SCOPE (&set->state_lock);
    for (size_t i = 0; i < set->nr_recording; ++i) {
      struct ahead *a = &set->recording[i]->ahead;
      const uint64_t aged = ahead_age (a, all);

      tally_add (&set->bytes_tidied, aged << a->shift);
      nr += aged;
    }
  }
  if (nr > 0)
    grace_synchronize (&set->grace);
  hold_all (set, false);
  for (size_t i = 0; i < set->nr_recording; ++i)
    if (tidy_pieces (set, set->recording[i]) == -1)
      r = -1;
  return r;
}

static bool
nothing_is_ahead (const struct bitmap_set *set)
{
  uint64_t first, last;

  for (size_t i = 0; i < set->nr_recording; ++i)
    if (ahead_next_run (&set->recording[i]->ahead, 0, &first, &last))
      return false;
  return true;
}

void
bitmap_set_pause (struct bitmap_set *set)
{
  ACQUIRE_LOCK_FOR_CURRENT_SCOPE (&set->keep_lock);
  while (set->keep_busy)
    pthread_cond_wait (&set->keep_changed, &set->keep_lock);
  set->keep_busy = true;
}

void
bitmap_set_resume (struct bitmap_set *set)
{
  ACQUIRE_LOCK_FOR_CURRENT_SCOPE (&set->keep_lock);
  if (set->keeps && nothing_is_ahead (set))
    set->region_shift = LEAST_REGION;
  set->keep_busy = false;
  pthread_cond_broadcast (&set->keep_changed);
}

int
bitmap_set_tidy_paused (struct bitmap_set *set)
{
  return set->keeps ? tidy (set, true) : 0;
}

int
bitmap_set_tidy (struct bitmap_set *set, bool all)
{
  int r;

  if (!set->keeps)
    return 0;
  bitmap_set_pause (set);
  r = tidy (set, all);
  bitmap_set_resume (set);
  return r;
}

bool
bitmap_set_keeps (const struct bitmap_set *set)
{
  return set->keeps;
}

/* Clear bits of units that are ahead. */
static uint64_t
extra_bits (const struct bitmap *b)
{
  const struct ahead *a = &b->ahead;
  uint64_t first, last, nr = 0;

  for (uint64_t unit = 0; ahead_next_run (a, unit, &first, &last);
       unit = last + 1) {
    uint64_t bit = first << a->bits_shift;
    const uint64_t end = min_u64 ((last + 1) << a->bits_shift, a->nr_bits);

    while (bit < end) {
      const uint64_t clear = bits_next_clear (&b->bits, bit, end);
      bool set;
      uint64_t ends[1];

      if (clear == end)
        break;
      bits_runs (&b->bits, clear, end, 0, ends, 1, &set);
      if (!set)                 /* A mark may have come. */
        nr += ends[0] - clear;
      bit = ends[0];
    }
  }
  return nr;
}

uint64_t
bitmap_extra_bytes (const struct bitmap *b)
{
  return b->ahead.ahead == NULL ? 0 : extra_bits (b) << b->shift;
}
