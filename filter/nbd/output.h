/* nbdkit-dirty-bitmap-filter
 * SPDX-License-Identifier: BSD-3-Clause
 * Copyright the nbdkit-dirty-bitmap-filter authors
 */

#ifndef DIRTY_BITMAP_NBD_OUTPUT_H
#define DIRTY_BITMAP_NBD_OUTPUT_H

/* Sending replies: gathered, and with the receive role kept or given up. */

#include <stddef.h>

#include "nbd/team.h"
#include "nbd/worker.h"

/* Send the reply of a worker that has the role, now or with the next
 * ones; send that of one that has not.
 */
extern void output_reply (struct worker *);

/* Give up the role if we have it and send what there is of the reply,
 * of which more follows.
 */
extern void output_partial_reply (struct worker *);

/* Send the gathered replies of a worker. */
extern void output_flush (struct worker *);

/* The same for a worker that has the role, and may be without it
 * afterwards: its own replies; or those of a robbed worker, if that is
 * still at the request of which this was the ticket.
 */
extern void output_flush_keeping_role (struct worker *);
extern void output_flush_robbed (struct worker *, const struct robbed *);

/* The same, if there are any. */
extern void output_flush_gathered (struct worker *);

/* Let another worker receive, and send what is gathered. */
extern void output_release_role (struct worker *);

/* Gather bytes and send them when there are many, or by output_flush:
 * for the handshake, before there are roles.
 */
extern int output_append (struct worker *, const void *, size_t);

#endif /* DIRTY_BITMAP_NBD_OUTPUT_H */
