/* nbdkit-dirty-bitmap-filter
 * SPDX-License-Identifier: BSD-3-Clause
 * Copyright the nbdkit-dirty-bitmap-filter authors
 */

#ifndef DIRTY_BITMAP_LISTEN_H
#define DIRTY_BITMAP_LISTEN_H

/* The sockets of dirty-bitmap-listen=ADDRESS and dirty-bitmap-control=PATH. */

#include <stdbool.h>
#include <stddef.h>
#include <sys/types.h>

#define LISTEN_MAX_SOCKETS 16

struct listen_address {
  const char *parameter;        /* for messages */
  bool is_private;              /* a Unix socket for its owner alone */
  char *path;                   /* of a Unix socket, absolute; or */
  char *host, *port;            /* of TCP; host is NULL for any */
};

struct listen_sockets {
  int fd[LISTEN_MAX_SOCKETS];
  size_t nr;

  /* The Unix socket that we made, so that no other socket is removed. */
  char *path;
  dev_t dev;
  ino_t ino;
};

/* Parse ADDRESS: HOST:PORT, [HOST]:PORT, :PORT, or else the path of a Unix
 * socket.  An ADDRESS with a '/' in it is a path.  A relative path is
 * relative to the current directory.  The second function takes only paths.
 * -1, with the reason reported.
 */
extern int listen_parse (const char *parameter, const char *address,
                         struct listen_address *);
extern int listen_parse_path (const char *parameter, const char *path,
                              struct listen_address *);
extern void listen_address_free (struct listen_address *);

/* Bind and listen.  The sockets get the SELinux label, if it is not NULL.
 * -1, with the reason reported.
 */
extern int listen_open (const struct listen_address *,
                        const char *selinux_label, struct listen_sockets *);

/* The first makes sure that the Unix socket is removed even if nbdkit exits
 * before it calls us again.  Call it in get_ready, once for each of our two
 * parameters.  forks says whether nbdkit will continue in a child.  Call the
 * second in the process that serves: children that are forked from then on
 * do not remove the sockets.
 */
extern void listen_unlink_at_exit (struct listen_sockets *, bool forks);
extern void listen_serves (void);

/* Remove the Unix socket, if it is still ours. */
extern void listen_unlink (struct listen_sockets *);

/* Close the sockets that were not given away (fd[i] set to -1), and free. */
extern void listen_close (struct listen_sockets *);

#endif /* DIRTY_BITMAP_LISTEN_H */
