/* nbdkit-dirty-bitmap-filter
 * SPDX-License-Identifier: BSD-3-Clause
 * Copyright the nbdkit-dirty-bitmap-filter authors
 */

#ifndef DIRTY_BITMAP_CONTROL_H
#define DIRTY_BITMAP_CONTROL_H

/* The control socket: QEMU's machine protocol (QMP) for the disk and its
 * bitmaps, on a Unix socket.
 *
 * One thread serves all its clients, and executes their commands, one at a
 * time.  A command that takes long makes the other clients of this socket
 * wait.  Clients of the disk have other threads, and wait in two cases only:
 *
 * - while bitmaps are changed, changes and flushes of the disk wait
 *   (disk/change.h);
 * - while a client of this socket has closed the gate, changes of the disk
 *   wait.  The gate opens by itself when that client is gone, and after 10
 *   seconds at most.
 *
 * The stop of nbdkit does not wait for clients, only for a command that is
 * being executed, as it waits for requests.  control_begin_stop returns at
 * once, and no command begins after it.  One under way ends in the same way as
 * a request does: it is inside the disk, where long work ends early
 * (disk_hurry), and if the storage hangs, the stop is patient with it as it is
 * with a request (control_wait, nbdkit/stop.c).  So a command may wait for the
 * disk, but for nothing that a client does.
 */

#include <stdbool.h>

#include "nbd/exports.h"

struct control;
struct disk;
struct stats;

struct control_options {
  struct disk *disk;
  struct stats *stats;
  struct export_options exports; /* what clients of the disk can open */
  const char *node;             /* the name of the disk's node */
  const char *image;            /* a name for the image, for people */

  /* End nbdkit, as SIGTERM does.  Called by the thread, and returns at once. */
  void (*quit) (void);
};

/* The node's name, if the user does not give one. */
#define CONTROL_DEFAULT_NODE "disk"

/* May a node have this name?  The rule is QEMU's. */
extern bool control_is_node_name (const char *);

/* Serve a listening Unix socket, from control_start on.  The descriptor
 * becomes the control's, whatever is returned, and what the options refer to
 * outlives the control.  NULL with errno.
 */
extern struct control *control_new (const struct control_options *, int fd);

/* Start the thread.  -1 with the reason reported. */
extern int control_start (struct control *);

/* Begin to stop, and return at once: no more commands are executed, clients
 * get the event SHUTDOWN, and all are disconnected when they have received
 * what was sent, or grace_ms later.  Nothing happens if it has begun, or there
 * was no start.
 */
extern void control_begin_stop (struct control *, unsigned grace_ms);

/* After that: wait until the thread has ended, so that nothing of it is inside
 * the disk.  False if it takes longer than patience_ms.
 */
extern bool control_wait (struct control *, unsigned patience_ms);

/* Stop: begin, if that was not done, and join the thread. */
extern void control_stop (struct control *, unsigned grace_ms);

/* Free a control that was stopped or never started; NULL is allowed. */
extern void control_free (struct control *);

#endif /* DIRTY_BITMAP_CONTROL_H */
