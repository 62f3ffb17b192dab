/* nbdkit-dirty-bitmap-filter
 * SPDX-License-Identifier: BSD-3-Clause
 * Copyright the nbdkit-dirty-bitmap-filter authors
 */

#ifndef DIRTY_BITMAP_NBD_REPLY_H
#define DIRTY_BITMAP_NBD_REPLY_H

/* Replies, in the form that was negotiated: one function each.  They put it
 * into the worker's output buffer; output.h sends it.
 */

#include <stdbool.h>
#include <stdint.h>

#include "nbd/worker.h"

/* An error, an errno.  offset says where in a READ, of which what was sent
 * before is valid, or is NULL.
 */
extern void reply_error_at (struct worker *, int err, const char *message,
                            const uint64_t *offset);
extern void reply_error (struct worker *, int err, const char *message);

/* Success, and nothing to say. */
extern void reply_done (struct worker *);

/* A successful READ, or a part of it, w->part.  Its data are in the payload
 * if the READ is longer than REPLY_ROOM; else they are already where
 * reply_read_place says, behind the header that is made here.
 */
extern void reply_read (struct worker *);
extern uint8_t *reply_read_place (const struct worker *);

/* One chunk of a BLOCK_STATUS, of w->extents. */
extern void reply_block_status (struct worker *, uint32_t id, bool last);

#endif /* DIRTY_BITMAP_NBD_REPLY_H */
