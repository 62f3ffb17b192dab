/* nbdkit-dirty-bitmap-filter
 * SPDX-License-Identifier: BSD-3-Clause
 * Copyright the nbdkit-dirty-bitmap-filter authors
 */

#ifndef DIRTY_BITMAP_NBD_MONITOR_H
#define DIRTY_BITMAP_NBD_MONITOR_H

/* The thread that steals the role of workers that execute for too long. */

struct nbd_server;

/* 0, or an errno. */
extern int monitor_start (struct nbd_server *);
extern void monitor_quit (struct nbd_server *);

#endif /* DIRTY_BITMAP_NBD_MONITOR_H */
