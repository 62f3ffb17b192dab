/* nbdkit-dirty-bitmap-filter
 * SPDX-License-Identifier: BSD-3-Clause
 * Copyright the nbdkit-dirty-bitmap-filter authors
 */

#ifndef DIRTY_BITMAP_BACKUP_CELLS_H
#define DIRTY_BITMAP_BACKUP_CELLS_H

/* A disk of any size as a grid of a few thousand cells (cells.c). */

#include <stddef.h>
#include <stdint.h>

#define CELLS_COLUMNS 128
#define CELLS_MAX_ROWS 32

/* What the bytes of a cell are.  In the cells of a bitmap they are marked, if
 * they are dirty, or else the rest.
 */
enum cells_kind {
  CELLS_MARKED,                 /* data, or dirty */
  CELLS_ZERO,                   /* zeroes that take space, or may */
  CELLS_REST,                   /* a hole, or clean */
};
#define CELLS_NR_KINDS 3

struct cells {
  uint64_t size;                /* of the disk, bytes */
  unsigned cell_bits;           /* a cell has 1 << cell_bits bytes */
  size_t nr;                    /* the last cell may have fewer bytes */
  uint64_t total[CELLS_NR_KINDS];       /* bytes of the disk */
  uint64_t (*bytes)[CELLS_NR_KINDS];    /* bytes of each cell */
};

/* 0, or -1 with the reason reported. */
extern int cells_init (struct cells *, uint64_t size);
extern void cells_free (struct cells *);

/* [begin, end) of the disk is of a kind. */
extern void cells_add (struct cells *, uint64_t begin, uint64_t end,
                       enum cells_kind);

extern size_t cells_nr_rows (const struct cells *);

/* The cells of a row: the last one may have fewer. */
extern size_t cells_in_row (const struct cells *, size_t row);

#endif /* DIRTY_BITMAP_BACKUP_CELLS_H */
