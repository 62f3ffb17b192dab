/* nbdkit-dirty-bitmap-filter
 * SPDX-License-Identifier: BSD-3-Clause
 * Copyright the nbdkit-dirty-bitmap-filter authors
 */

#ifndef DIRTY_BITMAP_NBD_HANDSHAKE_H
#define DIRTY_BITMAP_NBD_HANDSHAKE_H

/* The handshake: the options of a client, until it chooses an export. */

#include "nbd/worker.h"

/* Negotiate until transmission begins.  -1 if it never does. */
extern int handshake (struct worker *);

#endif /* DIRTY_BITMAP_NBD_HANDSHAKE_H */
