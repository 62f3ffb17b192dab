/* nbdkit-dirty-bitmap-filter
 * SPDX-License-Identifier: BSD-3-Clause
 * Copyright the nbdkit-dirty-bitmap-filter authors
 */

/* Space for bits that a flush will write.
 *
 * The data clusters of a bitmap and their table entries are written by the
 * flush.  If the flush had to find the space, guest data might have taken
 * the last of it by then, and the bitmap could not be stored.  So a mark
 * reserves it first.  Before the first bit of a cluster of bits is set, a
 * cluster is allocated.  Before the first bit of a piece is set, zeroes are
 * written to the piece, and to the other pieces of its 4 KiB that have no
 * bits, since they may lie in a hole (qcow2/holes.c).  Zeroes are written to
 * the sector of the table in the same way.  A cluster whose bits will all be
 * set needs no data.
 *
 * If a mark finds no space, it goes on.  The bitmap is in use then, and the
 * flush tries again, with the table first.
 *
 * reserve_lock, the last of our locks, is held here, and by the flush while
 * it writes the pieces of a cluster or changes table entries.  So:
 *
 * - Zeroes are written only where the image has zeroes: a piece has no bits
 *   there while it is not populated in RAM, and the flush, which writes only
 *   populated pieces, cannot come in between.
 * - The flush that first writes bits to a reserved cluster makes it the
 *   entry's; if the entry becomes all ones, the cluster is given back.  A
 *   cluster that is not known to read as zeroes is written whole by that
 *   flush, since the zeroes written here may be lost.
 *
 * A crash leaks reserved clusters, like all new clusters.
 */

#include <config.h>

#include <assert.h>
#include <errno.h>
#include <stdlib.h>
#include <string.h>

#include "bitmap/internal.h"
#include "common/bytes.h"
#include "common/cleanup.h"
#include "common/lock.h"
#include "common/report.h"

static const uint8_t zeroes[65536];

int
bitmap_reserve_init (struct bitmap *b)
{
  uint8_t *bytes = (uint8_t *) b->table;

  /* Zero is the same in any byte order. */
  b->table_holes = holes_in_table (bytes, 8 * (size_t) b->table_entries);
  if (b->table_holes == NULL)
    return -1;
  /* calloc, so that entries that never have a cluster cost no memory. */
  b->reserved = calloc (b->table_entries + UINT64_C (1), 8);
  if (b->reserved == NULL) {
    report_error ("calloc: %m");
    return -1;
  }
  return 0;
}

void
bitmap_reserve_table_written (struct bitmap *b)
{
  if (b->table_holes != NULL)
    memset (b->table_holes, 0,
            div_round_up (bitmap_table_bytes (b),
                          HOLES_CHUNK_BYTES));
}

void
bitmap_reserve_free (struct bitmap *b)
{
  free (b->reserved);
  free (b->table_holes);
}

uint64_t
bitmap_take_reserved (struct bitmap *b, uint32_t index)
{
  const uint64_t reserved = b->reserved[index];

  if (reserved != 0)
    b->nr_reserved--;
  b->reserved[index] = 0;
  return reserved;
}

void
bitmap_keep_reserved (struct bitmap *b, uint32_t index, uint64_t reserved)
{
  b->reserved[index] = reserved;
  b->nr_reserved++;
}

static int
write_zeroes (struct bitmap_set *set, uint64_t count, uint64_t host_offset)
{
  while (count > 0) {
    const size_t n = min_u64 (count, sizeof zeroes);

    if (qcow2_write_metadata (set->image, QCOW2_BITMAP_DATA, zeroes, n,
                              host_offset) == -1)
      return -1;
    host_offset += n;
    count -= n;
  }
  return 0;
}

static int
reserve_cluster (struct bitmap_set *set, struct bitmap *b, uint32_t index)
{
  uint64_t host;
  bool zeroed;

  if (qcow2_alloc (set->image, QCOW2_BITMAP_DATA, 1, &host, &zeroed) == -1)
    return -1;
  bitmap_keep_reserved (b, index, host | (zeroed ? RESERVED_ZEROED : 0));
  return zeroed ? 0
    : write_zeroes (set, set->geometry.cluster_size_bytes, host);
}

/* May a piece have a set bit, in RAM or in the image? */
static bool
has_bits (const struct bitmap *b, uint64_t piece)
{
  return bits_is_populated (&b->bits, piece) ||
    (b->ahead.ahead != NULL && ahead_has_extra (&b->ahead, piece));
}

/* Make sure that the pieces of [first, last], all of one cluster, which is
 * at host_offset in the image, have their space.
 */
static int
reserve_pieces (struct bitmap_set *set, struct bitmap *b, uint64_t first,
                uint64_t last, uint64_t host_offset)
{
  const uint64_t in_cluster = set->geometry.cluster_size_bytes / PIECE_BYTES;
  const uint64_t near = min_u64 (in_cluster, HOLES_CHUNK_BYTES / PIECE_BYTES);
  uint64_t piece = first, end;

  for (; piece <= last; piece = end) {
    const uint64_t start = round_down (piece, near);
    const uint64_t limit = min_u64 (start + near, b->bits.nr_pieces);

    end = piece + 1;
    if (has_bits (b, piece))
      continue;
    while (piece > start && !has_bits (b, piece - 1))
      piece--;
    while (end < limit && !has_bits (b, end))
      end++;
    if (write_zeroes (set, (end - piece) * PIECE_BYTES,
                      host_offset + piece % in_cluster * PIECE_BYTES) == -1)
      return -1;
  }
  return 0;
}

int
bitmap_reserve_entry (struct bitmap_set *set, struct bitmap *b,
                      uint32_t index)
{
  assert (lock_is_mine (&set->reserve_lock));
  return holes_fill_table (set->image, QCOW2_BITMAP_TABLE, b->table_holes,
                           b->table_offset, 8 * (size_t) b->table_entries,
                           8 * (size_t) index);
}

/* The bits [first, last] of one cluster of bits are about to be set. */
static int
reserve_in_cluster (struct bitmap_set *set, struct bitmap *b, uint32_t index,
                    uint64_t first, uint64_t last)
{
  const uint64_t bits = 8 * (uint64_t) set->geometry.cluster_size_bytes;
  const uint64_t entry = b->table[index];
  uint64_t host = entry;

  if (entry == BITMAP_TABLE_ALL_ONES)
    return 0;
  if (bitmap_reserve_entry (set, b, index) == -1)
    return -1;
  if (last - first + 1 == bits)
    return 0;                   /* The cluster's bits will be all ones. */
  if (entry == BITMAP_TABLE_ALL_ZEROES) {
    if (b->reserved[index] == 0 && reserve_cluster (set, b, index) == -1)
      return -1;
    if (!(b->reserved[index] & RESERVED_ZEROED))
      return 0;                 /* The whole cluster was written. */
    host = b->reserved[index] & ~RESERVED_ZEROED;
  }
  return reserve_pieces (set, b, first / PIECE_BITS, last / PIECE_BITS, host);
}

/* The bits [first, last] of a bitmap are about to be set. */
static int
reserve_bits (struct bitmap_set *set, struct bitmap *b, uint64_t first,
              uint64_t last)
{
  const uint64_t bits = 8 * (uint64_t) set->geometry.cluster_size_bytes;

  ACQUIRE_LOCK_FOR_CURRENT_SCOPE (&set->reserve_lock);
  while (first <= last) {
    const uint64_t index = first / bits;
    const uint64_t last_here = min_u64 (last, (index + 1) * bits - 1);

    if (reserve_in_cluster (set, b, index, first, last_here) == -1)
      return -1;
    first = last_here + 1;
  }
  return 0;
}

void
bitmap_reserve (struct bitmap_set *set, uint64_t offset, uint64_t count)
{
  const int err = errno;
  struct report_hold hold;

  for (size_t i = 0; i < set->nr_recording; ++i) {
    struct bitmap *b = set->recording[i];
    const uint64_t first = bitmap_first_bit (b, offset);
    const uint64_t last = bitmap_last_bit (b, offset, count);

    /* Where there are bits, this was done or tried before. */
    if (bits_all_populated (&b->bits, first / PIECE_BITS, last / PIECE_BITS))
      continue;
    report_hold_begin (&hold);
    if (qcow2_begin_writing (set->image) == -1 ||
        reserve_bits (set, b, first, last) == -1)
      report_debug ("no space is reserved for bitmap '%s': %s", b->name,
                    hold.any ? hold.text : "no reason");
    report_hold_end (&hold);
  }
  errno = err;
}

bool
bitmap_release_reserved (struct bitmap_set *set, struct bitmap *b)
{
  const bool any = b->nr_reserved != 0;

  assert (lock_is_mine (&set->reserve_lock));
  for (uint32_t i = 0; b->nr_reserved != 0; ++i) {
    const uint64_t reserved = bitmap_take_reserved (b, i);

    if (reserved != 0)
      qcow2_release (set->image, reserved & ~RESERVED_ZEROED, 1);
  }
  return any;
}

bool
bitmap_set_give_back_reserved (struct bitmap_set *set)
{
  bool any = false;

  ACQUIRE_LOCK_FOR_CURRENT_SCOPE (&set->reserve_lock);
  for (size_t i = 0; i < set->nr_recording; ++i)
    any |= bitmap_release_reserved (set, set->recording[i]);
  return any;
}
