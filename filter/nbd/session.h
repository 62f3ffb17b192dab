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

/* The ids of contexts.  The id of a bitmap is CONTEXT_FIRST_BITMAP plus its
 * place on the list of offers (disk_offers_at) that was current when the
 * client selected it.  The bitmap has this id until the session ends, even if
 * another list becomes current.
 */
#define CONTEXT_BASE_ALLOCATION 0
#define CONTEXT_ALLOCATION_DEPTH 1
#define CONTEXT_FIRST_BITMAP 2

struct session {
  struct export export;
  bool structured;              /* replies are structured or extended */
  bool extended;                /* headers, both ways */
  uint32_t *contexts;           /* the ids that are selected, ascending */
  struct disk_offer **offers;   /* for each of these ids: a reference to the
                                   bitmap, or NULL if the context is not a
                                   bitmap's */
  size_t nr_contexts;           /* the length of both arrays */
  bool is_holding;              /* the session holds the export, and these
                                   bitmaps (disk_bitmap_hold) */
  char export_name[64];         /* made printable, and cut */
};

#endif /* DIRTY_BITMAP_NBD_SESSION_H */
