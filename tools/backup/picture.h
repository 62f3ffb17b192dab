/* nbdkit-dirty-bitmap-filter
 * SPDX-License-Identifier: BSD-3-Clause
 * Copyright the nbdkit-dirty-bitmap-filter authors
 */

#ifndef DIRTY_BITMAP_BACKUP_PICTURE_H
#define DIRTY_BITMAP_BACKUP_PICTURE_H

/* What --map has found out of a disk, and the picture of it (picture.c). */

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <time.h>

#include "backup/cells.h"

#define MAP_MAX_BITMAPS 16

struct map_bitmap {
  const char *name;
  struct cells cells;
};

struct map {
  char *export;
  uint64_t size;                /* of the disk, bytes */
  struct tm when;               /* UTC */
  bool has_allocation;
  struct cells allocation;      /* empty if there is none */
  struct map_bitmap bitmap[MAP_MAX_BITMAPS];
  size_t nr_bitmaps;            /* of these */
  size_t nr_left_out;           /* which the server has besides */
};

/* Write it as SVG.  0, or -1 with the reason reported, but for errors of the
 * file: the caller looks for those.
 */
extern int picture_draw (FILE *, const struct map *);

#endif /* DIRTY_BITMAP_BACKUP_PICTURE_H */
