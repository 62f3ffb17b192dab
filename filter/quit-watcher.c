/* nbdkit-dirty-bitmap-filter
 * SPDX-License-Identifier: BSD-3-Clause
 * Copyright the nbdkit-dirty-bitmap-filter authors
 */

/* How this works
 *
 * nbdkit does not end on a signal while a client is connected and idle:
 * it waits until its connections have ended by themselves, and only then
 * calls cleanup.  Who started it loses patience and kills it, and what
 * is in RAM alone is lost.
 *
 * So where nbdkit's own server answers, a thread sleeps in
 * nbdkit_nanosleep, which fails the moment that nbdkit has begun to quit
 * (at the price of a line in the log).  From then on:
 *
 * - Further requests are refused.  Once those under way have ended, what
 *   is in RAM is written: even if we are killed before cleanup, nothing
 *   is lost.  cleanup remains the authority and writes what is left.
 * - After a grace time, in which clients may leave by themselves, the
 *   receiving side of their connections is shut down.  Replies still get
 *   out, and idle connections end.
 * - Later, when no request is under way any more, the sending side as
 *   well, for the sake of clients that do not take their replies.
 *
 * Both are repeated until cleanup, since nbdkit may still be starting a
 * connection that it accepted just before.
 */

#include <config.h>

#include <errno.h>
#include <limits.h>
#include <pthread.h>
#include <signal.h>
#include <stdbool.h>
#include <stdint.h>
#include <sys/socket.h>
#include <time.h>

#include <nbdkit-filter.h>

#include "clients.h"
#include "common/cleanup.h"
#include "common/report.h"
#include "common/threads.h"
#include "disk/disk.h"
#include "quit-watcher.h"
#include "sockets.h"

#define TICK_MS 20
#define RECEIVE_GRACE_MS 200
#define SEND_GRACE_MS 500

/* Protects stop, and cond belongs to it.  No other lock is taken while
 * it is held.
 */
static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
static pthread_cond_t cond = PTHREAD_COND_INITIALIZER;
static bool stop;

static bool is_running;
static pthread_t thread;
static struct disk *watched;
static void (*quit_callback) (void);

static int64_t
now_ms (void)
{
  struct timespec ts;

  clock_gettime (CLOCK_MONOTONIC, &ts);
  return (int64_t) ts.tv_sec * 1000 + ts.tv_nsec / 1000000;
}

/* Sleep for a tick.  False if it is time to stop. */
static bool
tick (void)
{
  struct timespec until;

  clock_gettime (CLOCK_REALTIME, &until);
  until.tv_nsec += TICK_MS * 1000000L;
  if (until.tv_nsec >= 1000000000L) {
    until.tv_sec++;
    until.tv_nsec -= 1000000000L;
  }

  ACQUIRE_LOCK_FOR_CURRENT_SCOPE (&lock);
  if (!stop)
    pthread_cond_timedwait (&cond, &lock, &until);
  return !stop;
}

static void *
watch (void *unused)
{
  int64_t began, elapsed;
  bool is_written = false;

  (void) unused;
  while (nbdkit_nanosleep (INT_MAX - 1, 0) == 0)
    ;
  began = now_ms ();
  clients_refuse ();
  quit_callback ();
  do {
    if (!is_written && clients_in_flight () == 0) {
      /* If it fails, cleanup tries again and its failure counts. */
      disk_sync (watched);
      is_written = true;
    }
    elapsed = now_ms () - began;
    if (elapsed >= SEND_GRACE_MS && clients_in_flight () == 0)
      sockets_shut_clients (SHUT_RDWR);
    else if (elapsed >= RECEIVE_GRACE_MS)
      sockets_shut_clients (SHUT_RD);
  } while (tick ());
  return NULL;
}

int
quit_watcher_start (struct disk *disk, void (*on_quit) (void))
{
  int r;

  watched = disk;
  quit_callback = on_quit;
  stop = false;

  r = thread_create (&thread, watch, NULL);
  if (r != 0) {
    errno = r;
    report_error ("pthread_create: %m");
    return -1;
  }
  is_running = true;
  return 0;
}

void
quit_watcher_stop (void)
{
  if (!is_running)
    return;

  pthread_mutex_lock (&lock);
  stop = true;
  pthread_cond_signal (&cond);
  pthread_mutex_unlock (&lock);

  /* Where nbdkit ends without quitting (-s), this wakes the thread. */
  nbdkit_shutdown ();
  pthread_join (thread, NULL);
  is_running = false;
}
