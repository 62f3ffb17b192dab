/* nbdkit-dirty-bitmap-filter
 * SPDX-License-Identifier: BSD-3-Clause
 * Copyright the nbdkit-dirty-bitmap-filter authors
 */

#ifndef DIRTY_BITMAP_SINGLE_H
#define DIRTY_BITMAP_SINGLE_H

/* nbdkit -s, answered by our server: one client on standard input and
 * output.  nbdkit ends when the client has disconnected.
 */

#include <stdbool.h>

struct nbd_server;

/* In get_ready, when nothing else can fail: keep standard input and output
 * for our server, and give nbdkit descriptors in their place on which
 * nothing ever happens.  -1 with the reason reported.
 */
extern int single_take (void);
extern bool single_is_taken (void);

/* In after_fork: give the client to our server, which is started later.  -1
 * with the reason reported.
 */
extern int single_serve (struct nbd_server *);

/* In preconnect, on nbdkit's thread: wait until the client has disconnected,
 * or nbdkit must end.
 */
extern void single_wait (void);

/* End the wait: nbdkit is about to end. */
extern void single_wake (void);

/* After the server has stopped: a client behind pipes has grace_ms to
 * receive the rest of its replies.
 */
extern void single_stop (unsigned grace_ms);

#endif /* DIRTY_BITMAP_SINGLE_H */
