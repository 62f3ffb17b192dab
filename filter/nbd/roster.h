/* nbdkit-dirty-bitmap-filter
 * SPDX-License-Identifier: BSD-3-Clause
 * Copyright the nbdkit-dirty-bitmap-filter authors
 */

#ifndef DIRTY_BITMAP_NBD_ROSTER_H
#define DIRTY_BITMAP_NBD_ROSTER_H

/* The lists of a server's connections. */

#include "nbd/connection.h"

/* A connection that was started is on the list of live ones.  Called with
 * server->lock.
 */
extern void roster_add (struct connection *);

/* It is through its handshake. */
extern void roster_handshake_done (struct connection *);

/* It has ended: close its descriptor and have it joined. */
extern void roster_finish (struct connection *);

/* Those that are to be joined and freed. */
extern struct connection *roster_take_finished (struct nbd_server *);

#endif /* DIRTY_BITMAP_NBD_ROSTER_H */
