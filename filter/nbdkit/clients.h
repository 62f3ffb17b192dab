/* nbdkit-dirty-bitmap-filter
 * SPDX-License-Identifier: BSD-3-Clause
 * Copyright the nbdkit-dirty-bitmap-filter authors
 */

#ifndef DIRTY_BITMAP_CLIENTS_H
#define DIRTY_BITMAP_CLIENTS_H

/* The clients of nbdkit's own server, over the disk.
 * Include <nbdkit-filter.h> first.
 */

#include <stdbool.h>

#include "nbd/exports.h"

struct disk;
struct stats;

/* Count the clients' requests, if stats is not NULL. */
extern void clients_count (struct stats *);

/* From now on answer requests from the disk.  The strings of the options
 * outlive the clients.
 */
extern void clients_start (struct disk *, const struct export_options *);

/* Call store when a client disconnects, before the filters above learn of
 * it.
 */
extern void clients_store_when_left (void (*store) (void));

/* From now on refuse requests and new connections.  Requests under way go
 * on.
 */
extern void clients_refuse (void);

/* How many requests are under way?  Once requests are refused and this is 0,
 * the disk is no longer used.
 */
extern long clients_in_flight (void);

/* Fill in nbdkit's callbacks for connections and requests. */
extern void clients_set_callbacks (struct nbdkit_filter *);

#endif /* DIRTY_BITMAP_CLIENTS_H */
