/* nbdkit-dirty-bitmap-filter
 * SPDX-License-Identifier: BSD-3-Clause
 * Copyright the nbdkit-dirty-bitmap-filter authors
 */

#ifndef DIRTY_BITMAP_SINGLE_H
#define DIRTY_BITMAP_SINGLE_H

/* nbdkit -s, answered by our server: one client on standard input and
 * standard output, and nbdkit ends when it has gone.
 */

#include <stdbool.h>

struct nbd_server;

/* In get_ready, when nothing else can fail: keep standard input and
 * output for ourselves, and leave nbdkit descriptors in their place on
 * which nothing ever happens.  -1 with the reason reported.
 */
extern int single_take (void);
extern bool single_is_taken (void);

/* In after_fork: give the client to our server, which is to be started.
 * -1 with the reason reported.
 */
extern int single_serve (struct nbd_server *);

/* In preconnect, on nbdkit's thread: wait until the client has gone, or
 * nbdkit is to end.
 */
extern void single_wait (void);

/* Let it end: nbdkit is about to. */
extern void single_wake (void);

/* When the server has stopped: a client behind pipes has grace_ms to take
 * what is left for it.
 */
extern void single_stop (unsigned grace_ms);

#endif /* DIRTY_BITMAP_SINGLE_H */
