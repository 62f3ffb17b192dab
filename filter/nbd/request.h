/* nbdkit-dirty-bitmap-filter
 * SPDX-License-Identifier: BSD-3-Clause
 * Copyright the nbdkit-dirty-bitmap-filter authors
 */

#ifndef DIRTY_BITMAP_NBD_REQUEST_H
#define DIRTY_BITMAP_NBD_REQUEST_H

/* The transmission phase: one request after another. */

#include "nbd/worker.h"

/* Receive, execute and answer one request.  -1 if there are no more. */
extern int request_serve (struct worker *);

#endif /* DIRTY_BITMAP_NBD_REQUEST_H */
