/* nbdkit-dirty-bitmap-filter
 * SPDX-License-Identifier: BSD-3-Clause
 * Copyright the nbdkit-dirty-bitmap-filter authors
 */

#ifndef DIRTY_BITMAP_NBD_EXTENTS_H
#define DIRTY_BITMAP_NBD_EXTENTS_H

/* The extents of one metadata context, for a reply to BLOCK_STATUS. */

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "nbd/worker.h"

/* The most extents in a chunk (R8).  Variable for the unit tests. */
extern size_t extents_max;

/* What context id, of this bitmap or NULL (contexts_bitmap), has to say of
 * [offset, offset + length), in w->extents.  With req_one the first extent
 * alone, in its own length (R13).  Returns 0 or an errno.  ENOMEM is for the
 * first call of a reply only.
 */
extern int extents_build (struct worker *, uint32_t id,
                          const struct disk_offer *bitmap,
                          uint64_t offset, uint64_t length, bool req_one);

#endif /* DIRTY_BITMAP_NBD_EXTENTS_H */
