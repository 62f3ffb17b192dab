/* nbdkit-dirty-bitmap-filter
 * SPDX-License-Identifier: BSD-3-Clause
 * Copyright the nbdkit-dirty-bitmap-filter authors
 */

#ifndef DIRTY_BITMAP_NBD_SESSION_H
#define DIRTY_BITMAP_NBD_SESSION_H

/* What was negotiated.  The handshake changes it; it is constant once
 * transmission begins, so all workers read it without a lock.
 */

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "nbd/exports.h"

/* The ids of contexts.  A bitmap's id is this and its place on the list that
 * there was when it was selected (disk_offers_at).  The session keeps it,
 * whatever lists come later.
 */
#define CONTEXT_BASE_ALLOCATION 0
#define CONTEXT_ALLOCATION_DEPTH 1
#define CONTEXT_FIRST_BITMAP 2

struct session {
  struct export export;
  bool structured;              /* replies are structured or extended */
  bool extended;                /* headers, both ways */
  uint32_t *contexts;           /* the ids that are selected, ascending */
  struct disk_offer **offers;   /* of each, a reference to its bitmap, or
                                   NULL for those of allocation */
  size_t nr_contexts;
  bool is_holding;              /* the export, and those bitmaps (disk.h) */
  char export_name[64];         /* made printable, and cut */
};

#endif /* DIRTY_BITMAP_NBD_SESSION_H */
