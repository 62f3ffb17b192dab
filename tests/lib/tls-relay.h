/* nbdkit-dirty-bitmap-filter
 * SPDX-License-Identifier: BSD-3-Clause
 * Copyright the nbdkit-dirty-bitmap-filter authors
 */

#ifndef DIRTY_BITMAP_TLS_RELAY_H
#define DIRTY_BITMAP_TLS_RELAY_H

/* A client's TLS, so that tests need not know of it: a thread between a
 * test that speaks plaintext and a server that is spoken to by TLS.
 *
 * It passes the greeting on, turns the connection to TLS, and then
 * encrypts and decrypts.  Several times a second it changes its keys and
 * asks the server to change its own, in the middle of whatever is going
 * on.
 */

#include <gnutls/gnutls.h>

#define RELAY_USER "alice"
#define RELAY_KEY "00112233445566778899aabbccddeeff"

/* The priority string of clients; NULL for the usual one. */
extern const char *tls_relay_priority;

/* Take over the descriptor of a connection to the server, and return one
 * that behaves like it.
 */
extern int tls_relay_start (int fd);

/* End all relays, also those of descriptors that a failed test has left
 * open, and wait for them.
 */
extern void tls_relay_end (void);

/* A client's session that knows the key.  fd is the connection; it is
 * not blocking if nonblocking.
 */
extern gnutls_session_t tls_client_session (int fd, int nonblocking);

#endif /* DIRTY_BITMAP_TLS_RELAY_H */
