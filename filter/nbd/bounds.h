/* nbdkit-dirty-bitmap-filter
 * SPDX-License-Identifier: BSD-3-Clause
 * Copyright the nbdkit-dirty-bitmap-filter authors
 */

#ifndef DIRTY_BITMAP_NBD_BOUNDS_H
#define DIRTY_BITMAP_NBD_BOUNDS_H

/* What clients may use at most. */

#include "nbd/nbd.h"

/* How long a place in the handshake is a client's own, a client may hold
 * memory that others wait for without moving data, and a free buffer is
 * kept.  Variable for the unit tests.
 */
extern unsigned place_ms, stall_ms, trim_ms;

/* Lower the number of connections to what the limit of open files allows
 * for.
 */
extern void bounds_for_descriptors (struct nbd_limits *);

/* Divide limits.memory among connections (their number may be lowered),
 * threads and the budget.  The server's disk, limits and wake_fd are set.
 * -1 with errno.
 */
extern int bounds_divide (struct nbd_server *);

/* May another client be let in?  If it has to WAIT, *wait_ms says how
 * long until it is worth asking again, -1 if server_wake ends the wait.
 */
enum admission { ADMIT, WAIT, REFUSE };
extern enum admission bounds_admit (struct nbd_server *, int *wait_ms);

/* Cut the connections that it is time to cut.  Returns in how many
 * milliseconds to look again, -1 for never.
 */
extern int bounds_look (struct nbd_server *);

#endif /* DIRTY_BITMAP_NBD_BOUNDS_H */
