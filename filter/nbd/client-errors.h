/* nbdkit-dirty-bitmap-filter
 * SPDX-License-Identifier: BSD-3-Clause
 * Copyright the nbdkit-dirty-bitmap-filter authors
 */

#ifndef DIRTY_BITMAP_NBD_CLIENT_ERRORS_H
#define DIRTY_BITMAP_NBD_CLIENT_ERRORS_H

/* Messages about what clients do wrong.  A client can cause as many as it
 * likes, so the log gets a few of them a minute, and how many more there
 * were.
 */

struct limit;

/* Report what a client has done wrong, or what was done about it.  The
 * limit is that of the server.
 */
extern void client_error (struct limit *, const char *fmt, ...)
  __attribute__ ((format (printf, 2, 3)));

/* The server stops: report how many messages were not shown. */
extern void client_errors_end (struct limit *);

#endif /* DIRTY_BITMAP_NBD_CLIENT_ERRORS_H */
