/* nbdkit-dirty-bitmap-filter
 * SPDX-License-Identifier: BSD-3-Clause
 * Copyright the nbdkit-dirty-bitmap-filter authors
 */

#ifndef DIRTY_BITMAP_STOP_H
#define DIRTY_BITMAP_STOP_H

/* The way to the end: everything is stored, then nbdkit quits. */

#include <stdbool.h>

struct control;
struct disk;
struct nbd_server;

struct stop_options {
  struct disk *disk;
  struct nbd_server *server;    /* ours, started, or NULL */
  struct control *control;      /* started, or NULL */
  bool nbdkit_answers;          /* nbdkit's own server has clients */

  /* The name of a filter below that sleeps, which it can only until nbdkit
   * quits; or NULL.
   */
  const char *sleeper;

  /* Called, at most once and when everything is stored, before the process
   * ends without cleanup.
   */
  void (*give_up) (void);
};

/* Start a thread that waits for whatever ends nbdkit.  Everything in the
 * options outlives it.  -1, with the reason reported.  At the end of
 * after_fork.
 */
extern int stop_start (const struct stop_options *);

/* Stop, as if a signal had come.  Returns at once.  Any thread, at any time,
 * even before stop_start.
 */
extern void stop_ask (void);

/* A client of nbdkit's server has disconnected, and nbdkit may quit because
 * of that without a signal: write what is in RAM, and return when that is
 * done.
 */
extern void stop_store (void);

/* Finish the stop, if that is not done yet: our server is stopped, clients
 * are refused, no request is under way, and the disk is stopped.  -1 if
 * something could not be written.  In cleanup.
 */
extern int stop_finish (void);

#endif /* DIRTY_BITMAP_STOP_H */
