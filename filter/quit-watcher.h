/* nbdkit-dirty-bitmap-filter
 * SPDX-License-Identifier: BSD-3-Clause
 * Copyright the nbdkit-dirty-bitmap-filter authors
 */

#ifndef DIRTY_BITMAP_QUIT_WATCHER_H
#define DIRTY_BITMAP_QUIT_WATCHER_H

/* Making nbdkit's own server end when it is told to. */

struct disk;

/* Start a thread that sleeps until nbdkit quits, and then calls on_quit,
 * writes what the disk has in RAM, and shuts down nbdkit's clients.  -1,
 * with the reason reported.
 */
extern int quit_watcher_start (struct disk *, void (*on_quit) (void));

/* End and join the thread, if there is one.  In cleanup. */
extern void quit_watcher_stop (void);

#endif /* DIRTY_BITMAP_QUIT_WATCHER_H */
