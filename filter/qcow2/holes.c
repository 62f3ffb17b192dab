/* nbdkit-dirty-bitmap-filter
 * SPDX-License-Identifier: BSD-3-Clause
 * Copyright the nbdkit-dirty-bitmap-filter authors
 */

/* Space for metadata that is written later.
 *
 * A write is acknowledged when its data are in the container; the next flush
 * writes the tables and refcounts that lead to them.  If the container is a
 * sparse file, these can lie in a hole: in the part by which the file grew,
 * in a new image's L1 table, in a cluster that was freed and punched, in any
 * table of an image that was copied without its zeroes.  If they got their
 * storage only from the flush, data might have taken the last space by then,
 * and all acknowledged data would be lost.
 *
 * So a write reserves the space that it will need.  A sector that holds
 * anything other than zeroes has storage.  So only when the first byte of a
 * sector becomes nonzero may storage be missing: then zeroes are written to
 * the sector before the byte is changed in RAM.  If that fails, so does the
 * request.  All other zero sectors around it are written, too, so a table
 * that fills up from its beginning costs one write a chunk.
 *
 * This makes no difference to the order of writes, as the container has
 * zeroes there already.  It may race with a flush that writes the same
 * chunk: the flush leaves out the sectors that its flags call holes.
 *
 * Storage that needs new space for an overwrite (btrfs, ZFS, or any storage
 * that has a snapshot) gives no such guarantee, whatever is written first.
 */

#include <config.h>

#include <errno.h>
#include <inttypes.h>
#include <stdlib.h>

#include "qcow2/holes.h"
#include "qcow2/internal.h"

static const uint8_t zeroes[HOLES_CHUNK_BYTES];

uint8_t
holes_in (const void *bytes, size_t count)
{
  const uint8_t *p = bytes;
  uint8_t holes = 0;

  for (size_t at = 0; at < count; at += HOLES_SECTOR_BYTES)
    if (memcmp (p + at, zeroes, min_u64 (count - at,
                                         HOLES_SECTOR_BYTES)) == 0)
      holes |= 1 << at / HOLES_SECTOR_BYTES;
  return holes;
}

uint8_t *
holes_in_table (const void *bytes, size_t count)
{
  const uint8_t *p = bytes;
  uint8_t *holes = malloc (div_round_up (count, HOLES_CHUNK_BYTES) + 1);

  if (holes == NULL) {
    report_error ("malloc: %m");
    return NULL;
  }
  for (size_t at = 0; at < count; at += HOLES_CHUNK_BYTES)
    holes[at / HOLES_CHUNK_BYTES] =
      holes_in (p + at, min_u64 (count - at, HOLES_CHUNK_BYTES));
  return holes;
}

/* The sectors around one for which the flags say the same, as first and end. */
static void
alike (uint8_t holes, unsigned nr, unsigned sector, unsigned *first,
       unsigned *end)
{
  const unsigned is_hole = holes >> sector & 1;

  *first = sector;
  *end = sector + 1;
  while (*first > 0 && (holes >> (*first - 1) & 1) == is_hole)
    --*first;
  while (*end < nr && (holes >> *end & 1) == is_hole)
    ++*end;
}

int
holes_fill (struct qcow2 *q, enum qcow2_class class, uint8_t *holes,
            uint64_t host_offset, size_t count, size_t at)
{
  const unsigned sector = at / HOLES_SECTOR_BYTES;
  unsigned first, end;

  if ((*holes >> sector & 1) == 0)
    return 0;
  alike (*holes, div_round_up (count, HOLES_SECTOR_BYTES), sector, &first,
         &end);
  const size_t from = first * HOLES_SECTOR_BYTES;
  const size_t to = min_u64 (count, end * HOLES_SECTOR_BYTES);

  if (gate_write (q, class, zeroes, to - from, host_offset + from) == -1)
    return -1;
  for (; first < end; ++first)
    *holes &= ~(1U << first);
  return 0;
}

int
holes_fill_table (struct qcow2 *q, enum qcow2_class class, uint8_t *holes,
                  uint64_t table_offset, size_t count, size_t at)
{
  const size_t chunk = round_down (at, HOLES_CHUNK_BYTES);

  return holes_fill (q, class, &holes[chunk / HOLES_CHUNK_BYTES],
                     table_offset + chunk,
                     min_u64 (count - chunk, HOLES_CHUNK_BYTES), at - chunk);
}

int
holes_write_around (struct qcow2 *q, enum qcow2_class class,
                    const void *bytes, size_t count, uint8_t holes,
                    uint64_t host_offset)
{
  const unsigned nr = div_round_up (count, HOLES_SECTOR_BYTES);
  const uint8_t *p = bytes;
  unsigned first, end;

  for (unsigned sector = 0; sector < nr; sector = end) {
    alike (holes, nr, sector, &first, &end);
    const size_t from = first * HOLES_SECTOR_BYTES;
    const size_t to = min_u64 (count, end * HOLES_SECTOR_BYTES);

    if ((holes >> sector & 1) == 0 &&
        gate_write (q, class, p + from, to - from,
                    host_offset + from) == -1)
      return -1;
  }
  return 0;
}
