/* nbdkit-dirty-bitmap-filter
 * SPDX-License-Identifier: BSD-3-Clause
 * Copyright the nbdkit-dirty-bitmap-filter authors
 */

/* A disk as a grid of cells.
 *
 * The bytes of a cell are the least power of two with which there are few
 * enough cells.  So the disk fills more than half of the rows, rows begin at
 * offsets that are easy to read, and no cluster lies in two cells unless it
 * is larger than a cell.
 */

#include <config.h>

#include <assert.h>
#include <stdlib.h>
#include <string.h>

#include "backup/cells.h"
#include "common/bytes.h"
#include "common/report.h"

int
cells_init (struct cells *c, uint64_t size)
{
  memset (c, 0, sizeof *c);
  c->size = size;
  while (div_round_up (size, UINT64_C (1) << c->cell_bits) >
         CELLS_COLUMNS * CELLS_MAX_ROWS)
    c->cell_bits++;
  c->nr = div_round_up (size, UINT64_C (1) << c->cell_bits);
  c->bytes = calloc (c->nr + 1, sizeof *c->bytes);
  if (c->bytes != NULL)
    return 0;
  report_error ("calloc: %m");
  return -1;
}

void
cells_free (struct cells *c)
{
  free (c->bytes);
  memset (c, 0, sizeof *c);
}

void
cells_add (struct cells *c, uint64_t begin, uint64_t end,
           enum cells_kind kind)
{
  assert (begin <= end && end <= c->size);
  c->total[kind] += end - begin;
  while (begin < end) {
    const size_t i = begin >> c->cell_bits;
    const uint64_t next = min_u64 (end, (uint64_t) (i + 1) << c->cell_bits);

    c->bytes[i][kind] += next - begin;
    begin = next;
  }
}

size_t
cells_nr_rows (const struct cells *c)
{
  return div_round_up (c->nr, CELLS_COLUMNS);
}

size_t
cells_in_row (const struct cells *c, size_t row)
{
  return min_u64 (CELLS_COLUMNS, c->nr - row * CELLS_COLUMNS);
}
