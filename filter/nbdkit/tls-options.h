/* nbdkit-dirty-bitmap-filter
 * SPDX-License-Identifier: BSD-3-Clause
 * Copyright the nbdkit-dirty-bitmap-filter authors
 */

#ifndef DIRTY_BITMAP_TLS_OPTIONS_H
#define DIRTY_BITMAP_TLS_OPTIONS_H

/* From nbdkit's --tls options to the TLS of our server. */

struct command_line_tls;
struct nbd_tls;

/* Load the keys or certificates that nbdkit itself would use.  *tls is NULL
 * if nbdkit would offer no TLS.  -1, with the reason reported, if TLS was
 * required, or its keys or certificates were named, and cannot be had.
 */
extern int tls_options_load (const struct command_line_tls *,
                             struct nbd_tls **tls);

#endif /* DIRTY_BITMAP_TLS_OPTIONS_H */
