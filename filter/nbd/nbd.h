/* nbdkit-dirty-bitmap-filter
 * SPDX-License-Identifier: BSD-3-Clause
 * Copyright the nbdkit-dirty-bitmap-filter authors
 */

#ifndef DIRTY_BITMAP_NBD_H
#define DIRTY_BITMAP_NBD_H

/* An NBD server over a disk: fixed newstyle, structured replies, and
 * the metadata contexts base:allocation, qemu:allocation-depth and
 * qemu:dirty-bitmap:NAME.
 *
 * It serves listening sockets that it is given and owns from then on.
 * Nothing that a client sends ends more than its own connection.
 */

#include <stdbool.h>
#include <stddef.h>

struct disk;
struct nbd_server;

struct nbd_options {
  bool readonly;                /* clients may not write */
  const char *description;      /* of the export, or NULL */
};

/* Make a server with no sockets yet, and no threads.  NULL with errno. */
extern struct nbd_server *nbd_server_new (struct disk *,
                                          const struct nbd_options *);

/* Serve a listening socket (Unix, TCP, vsock).  The descriptor becomes
 * the server's, whatever is returned.  Before nbd_server_start only.
 */
extern int nbd_server_add_socket (struct nbd_server *, int fd);

/* Begin to accept.  The threads block all signals. */
extern int nbd_server_start (struct nbd_server *);

/* Stop: accept no more, finish the requests that were received whole,
 * answer what the clients still take within grace_ms, cut every
 * connection, and join every thread.  Returns in little more than
 * grace_ms whatever the clients do.  Idle clients are cut at once.
 */
extern void nbd_server_stop (struct nbd_server *, unsigned grace_ms);

/* Free a server that was stopped or never started. */
extern void nbd_server_free (struct nbd_server *);

#endif /* DIRTY_BITMAP_NBD_H */
