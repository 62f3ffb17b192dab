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

/* Data longer than this are moved part by part.  Variable for the unit
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

/* Of what is left of a WRITE, may a part be written before the rest? */
extern bool part_is_to_be_cut (const struct worker *);

/* Make the first of what is left the part, and then what follows it. */
extern void part_first_write (struct worker *);
extern void part_rest_of_write (struct worker *);

#endif /* DIRTY_BITMAP_NBD_PARTS_H */
