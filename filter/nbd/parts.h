/* nbdkit-dirty-bitmap-filter
 * SPDX-License-Identifier: BSD-3-Clause
 * Copyright the nbdkit-dirty-bitmap-filter authors
 */

#ifndef DIRTY_BITMAP_NBD_PARTS_H
#define DIRTY_BITMAP_NBD_PARTS_H

/* Large data, part by part: which part is next, and reading one.  See
 * parts.c.
 */

#include <stdbool.h>
#include <stdint.h>

#include "nbd/worker.h"

/* Data longer than this are read part by part.  Variable for the unit
 * tests.
 */
extern uint32_t parts_above;

/* Begin with the whole of a READ or WRITE as its only part. */
extern void part_whole (struct worker *);

/* The first part of a READ that may be answered in several chunks; and
 * the next one.
 */
extern void part_first_read (struct worker *);
extern void part_next_read (struct worker *);

/* Read the part from the export.  It is what there was to be read, and may be
 * shorter, or a hole.  -1 with errno.
 */
extern int part_read (struct worker *);

#endif /* DIRTY_BITMAP_NBD_PARTS_H */
