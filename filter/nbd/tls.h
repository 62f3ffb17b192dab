/* nbdkit-dirty-bitmap-filter
 * SPDX-License-Identifier: BSD-3-Clause
 * Copyright the nbdkit-dirty-bitmap-filter authors
 */

#ifndef DIRTY_BITMAP_NBD_TLS_H
#define DIRTY_BITMAP_NBD_TLS_H

/* TLS of one connection, by GnuTLS.
 *
 *   tls-credentials.c  what is loaded once for all connections
 *   tls.c              a connection's session
 *
 * A connection without TLS has no struct tls.
 */

#include <stdbool.h>
#include <stddef.h>
#include <sys/types.h>
#include <sys/uio.h>

#include <gnutls/gnutls.h>

struct limit;
struct nbd_tls;
struct socket;
struct tls;

/* tls-credentials.c */

/* Clients get nothing without TLS. */
extern bool nbd_tls_is_required (const struct nbd_tls *);

/* Make a session as it was configured.  Returns a GnuTLS error. */
extern int nbd_tls_new_session (const struct nbd_tls *, gnutls_session_t *);

/* tls.c */

/* Shake hands on a socket: the next byte from the client, and the next to
 * it, is of the TLS handshake.  NULL if it fails, and then the connection
 * cannot go on; errors about the client are reported within the limit.
 */
extern struct tls *tls_start (struct socket *, const struct nbd_tls *,
                              struct limit *errors);

/* Is it this room that encrypts, and not the kernel?  Then what is sent
 * and received goes through the functions below.
 */
extern bool tls_is_ours (const struct tls *);

/* Receive what there is into the first and then the second buffer; wait
 * if there is nothing.  Returns the number of bytes, 0 at the end, or -1
 * with errno, as recvmsg does; with EINTR if only a part of a record came.
 * By the holder of the receive role.
 */
extern ssize_t tls_receive (struct tls *, const struct iovec iov[2]);

/* Send all.  -1 with errno if the connection is of no use any more.
 * Called with send_lock.
 */
extern int tls_send (struct tls *, const struct iovec *iov, size_t nr);

/* Tell the client that nothing more comes.  Does not wait.  When no
 * other thread uses the connection any more.
 */
extern void tls_bye (struct tls *);
extern void tls_free (struct tls *);

#endif /* DIRTY_BITMAP_NBD_TLS_H */
