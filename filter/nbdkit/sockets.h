/* nbdkit-dirty-bitmap-filter
 * SPDX-License-Identifier: BSD-3-Clause
 * Copyright the nbdkit-dirty-bitmap-filter authors
 */

#ifndef DIRTY_BITMAP_SOCKETS_H
#define DIRTY_BITMAP_SOCKETS_H

/* The sockets of nbdkit's own server. */

struct command_line;
struct nbd_server;

/* In get_ready, before nbdkit opens its sockets: remember the listening
 * sockets that are not nbdkit's.
 */
extern int sockets_note_others (const struct command_line *);

/* In after_fork, before nbdkit accepts: find nbdkit's listening sockets.
 * Returns how many there are, or -1 with the reason reported.
 */
extern int sockets_find (const struct command_line *);

/* Give the sockets found to our server, and give nbdkit descriptors on which
 * nothing ever happens.  -1, with the reason reported.
 */
extern int sockets_take_over (struct nbd_server *);

/* shutdown(2) the connections of nbdkit's clients; how is as in shutdown. */
extern void sockets_shut_clients (int how);

/* Does one of these clients not receive what nbdkit sends? */
extern bool sockets_client_is_stuck (void);

extern void sockets_free (void);

#endif /* DIRTY_BITMAP_SOCKETS_H */
