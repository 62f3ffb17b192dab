/* nbdkit-dirty-bitmap-filter
 * SPDX-License-Identifier: BSD-3-Clause
 * Copyright the nbdkit-dirty-bitmap-filter authors
 */

#ifndef DIRTY_BITMAP_NBD_H
#define DIRTY_BITMAP_NBD_H

/* An NBD server over a disk: fixed newstyle, TLS, structured replies, and
 * the metadata contexts base:allocation, qemu:allocation-depth and
 * qemu:dirty-bitmap:NAME.  Besides the disk there is an export
 * delta:BITMAP for each bitmap, which has base:allocation only, and an export
 * backup:BITMAP for each view, which has that and the context of its bitmap.
 *
 * It serves listening sockets that it is given and owns from then on.
 * Nothing that a client sends ends more than its own connection.
 */

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "nbd/exports.h"

struct disk;
struct nbd_server;
struct nbd_tls;
struct stats;

/* What TLS is to be like: by keys that server and clients share, or else
 * by certificates.
 */
struct nbd_tls_options {
  bool required;                /* clients without it get nothing */
  const char *psk_file;         /* USERNAME:HEXKEY lines; or NULL */
  const char *certificates;     /* a directory: ca-cert.pem, ca-crl.pem (if
                                   it exists), server-cert.pem,
                                   server-key.pem */
  bool verify_peer;             /* clients need a certificate of this CA */
  const char *priority;         /* GnuTLS's; the key exchange methods of
                                   keys are added */
};

/* Load keys or certificates: all that can be wrong with them is found
 * here.  NULL with the reason reported.  Keys are looked up in their
 * file when a client comes.
 */
extern struct nbd_tls *nbd_tls_load (const struct nbd_tls_options *);
extern void nbd_tls_free (struct nbd_tls *);

/* What clients can use at most.  0: the default. */
struct nbd_limits {
  unsigned connections;         /* up to NBD_MAX_CONNECTIONS */
  unsigned handshake_seconds;
  unsigned idle_seconds;        /* without a request; the default is none */
  unsigned requests;            /* of a connection at once, up to
                                   NBD_MAX_REQUESTS */
  uint64_t memory;              /* of all connections together, in bytes,
                                   at least NBD_MIN_MEMORY */
  bool others_wait;             /* in the backlog, while there are as many
                                   clients as may be; else they are closed */
};

#define NBD_MAX_CONNECTIONS 10000
#define NBD_MAX_REQUESTS 16
#define NBD_MIN_MEMORY ((uint64_t) 128 << 20)

#define NBD_DEFAULT_CONNECTIONS 256
#define NBD_DEFAULT_HANDSHAKE_SECONDS 30
#define NBD_DEFAULT_MEMORY ((uint64_t) 512 << 20)

struct nbd_options {
  bool readonly;                /* clients may not write */
  struct export_options export; /* names and descriptions; strings that
                                   outlive the server */
  struct nbd_tls *tls;          /* or NULL: none.  Stays the caller's */
  struct nbd_limits limits;
  struct stats *stats;          /* counts, or NULL.  Stays the caller's */

  /* Called when the last client has disconnected, if that one had opened an
   * export: by its thread, which holds no lock.  Or NULL.
   */
  void (*last_left) (void);
};

/* -D dirty-bitmap.request=1: show every option and request. */
extern int dirty_bitmap_debug_request;

/* Make a server with no sockets yet, and no threads.  NULL with errno. */
extern struct nbd_server *nbd_server_new (struct disk *,
                                          const struct nbd_options *);

/* Serve a listening socket (Unix, TCP, vsock).  The descriptor becomes
 * the server's, whatever is returned.  Before nbd_server_start only.
 */
extern int nbd_server_add_socket (struct nbd_server *, int fd);

/* Serve a client that is connected already, by a stream socket, from
 * nbd_server_start on.  The descriptor becomes the server's.  When the
 * connection has ended, or could not be begun, ended is written to: an
 * eventfd, which remains the caller's, or -1.  Once a server.
 */
extern void nbd_server_add_client (struct nbd_server *, int fd, int ended);

/* Begin to accept.  The threads block all signals. */
extern int nbd_server_start (struct nbd_server *);

/* Begin to stop, and return at once: accept no more, execute the requests
 * that were received whole, answer what the clients still take within
 * grace_ms, and then cut every connection.  From then on the disk is in a
 * hurry (disk_hurry).  Idle clients are cut at once.  Nothing
 * happens if it has begun, or there was no start.
 */
extern void nbd_server_begin_stop (struct nbd_server *, unsigned grace_ms);

/* After that: wait until all connections have ended, and so nothing of
 * theirs is inside the disk.  False if it takes longer than patience_ms.
 */
extern bool nbd_server_wait (struct nbd_server *, unsigned patience_ms);

/* Stop: begin, if that was not done; wait for as long as the disk takes;
 * and join every thread.  Takes little more than grace_ms whatever the
 * clients do.
 */
extern void nbd_server_stop (struct nbd_server *, unsigned grace_ms);

/* Free a server that was stopped or never started. */
extern void nbd_server_free (struct nbd_server *);

#endif /* DIRTY_BITMAP_NBD_H */
