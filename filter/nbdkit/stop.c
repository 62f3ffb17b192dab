/* nbdkit-dirty-bitmap-filter
 * SPDX-License-Identifier: BSD-3-Clause
 * Copyright the nbdkit-dirty-bitmap-filter authors
 */

/* How this works
 *
 * What is only in RAM is lost if nbdkit is killed, and two things get in the
 * way of storing it when nbdkit is told to end:
 *
 * - Once nbdkit quits, every nbdkit_nanosleep fails.  Filters below that
 *   sleep (delay, rate, retry) then fail the writes that they delay.
 * - nbdkit waits until its connections have ended by themselves, and only
 *   then calls cleanup.  Before that, the program that started it may lose
 *   patience and kill it.
 *
 * So signals go to a thread of ours (signals.c), which works through these
 * steps and then tells nbdkit to quit:
 *
 *   refuse      No more requests begin for clients of nbdkit's server, and
 *               our server begins to stop, by itself, while this thread
 *               continues here.
 *   store       disk_sync, while the last requests are still under way, so
 *               that a kill in the following steps loses nothing that was
 *               acknowledged until now.  Another thread does this, the one
 *               that stores, so that this one goes on.
 *   wait        Until no request, and no command of the control socket, is
 *               under way.  GRACE_MS after "refuse", long requests end early
 *               (disk_hurry), and clients of our server are disconnected.
 *               If a request is still there after STUCK_MS, maybe asleep in a
 *               filter below: store again and again, and tidy the bitmaps.
 *               After PATIENCE_MS let nbdkit quit, which wakes the request,
 *               whatever the thread that stores has come to; then wait for as
 *               long as it takes.
 *   stop        disk_stop.  No request comes after it, and the thread that
 *               stores has ended.
 *   quit        nbdkit_shutdown.
 *   shut down   The receiving side of the connections of nbdkit's server is
 *               shut down after a while: replies still get out, and idle
 *               connections end.  Later the sending side is shut down, too,
 *               because of clients that do not receive their replies.  Both
 *               are repeated until cleanup, since nbdkit may still be
 *               starting a connection that it accepted just before.  (nbdkit
 *               1.32 aborts if the second is done to a client that has
 *               several replies to receive: an assertion in its
 *               raw_send_socket.  There the process ends instead, with the
 *               status that it would have had, and without the cleanup of
 *               plugin and filters, which an abort skips, too.)
 *
 * Why nothing that was acknowledged is missing from the image: a request is
 * either counted as under way, from before it reads the gate of clients.c or
 * the server's flag until it has left the disk, or it is refused.  "wait"
 * ends when both are closed and none is counted, so disk_stop comes after
 * the last change.  (The gate says why none slips through; our server has
 * joined its threads.)  The first store races with requests, as every flush
 * does.  A change that it missed is in RAM, and until disk_stop its bitmap is
 * in use in the image, or has its bits there (dirty-bitmap-crash=keep).
 *
 * Why another thread stores: a flush takes no range lock, and waits only for
 * marks under way, each of which is short.  But it also waits for a flush of a
 * client, and to tidy waits for a mark that writes bits ahead, and these may
 * be asleep in a filter below.  So all that this thread wants to have stored
 * or tidied, at any time, is done by the other one.
 *
 * If nbdkit quits for another reason, the same is done, as far as possible
 * then.  Such reasons, and how this thread learns of them:
 *
 * - A signal before after_fork has ended; a plugin, or a filter, that calls
 *   nbdkit_shutdown.  If nbdkit's own server answers, another thread sleeps
 *   in nbdkit_nanosleep, which fails at that moment (at the price of a line
 *   in the log).  Otherwise nbdkit has no client, and calls cleanup at once.
 * - The filters exitlast and exitwhen do that when a client has
 *   disconnected.  They learn of it after us, in close: so in finalize
 *   (clients.c) the other thread stores everything (stop_store).  The
 *   connection's own thread could not, since filters below cannot sleep in
 *   it once its client has disconnected.
 * - With -s, the client has disconnected: nbdkit calls cleanup, without
 *   quitting.
 *
 * cleanup (stop_finish) waits for this thread, whatever woke it.  So there
 * is one thread that stops the disk, and it does so once.
 */

#include <config.h>

#include <errno.h>
#include <limits.h>
#include <poll.h>
#include <pthread.h>
#include <stdint.h>
#include <stdlib.h>
#include <sys/eventfd.h>
#include <sys/socket.h>
#include <time.h>
#include <unistd.h>

#include <nbdkit-filter.h>

#include "common/cleanup.h"
#include "common/clock.h"
#include "common/report.h"
#include "common/threads.h"
#include "control/control.h"
#include "disk/disk.h"
#include "nbd/nbd.h"
#include "nbdkit/clients.h"
#include "nbdkit/signals.h"
#include "nbdkit/single.h"
#include "nbdkit/sockets.h"
#include "nbdkit/stop.h"

#define TICK_MS 20

/* The time for requests under way to end by themselves, for clients to
 * disconnect by themselves, and, once the disk is stopped, for clients to
 * receive their replies.
 */
#define GRACE_MS 300

/* How long a request may be stuck; from when on that is expected, and then how
 * often everything is stored meanwhile.
 */
#define PATIENCE_MS (5 * 1000)
#define STUCK_MS (4 * 1000)
#define STUCK_STORE_MS 200

/* The thread that does all this; the thread that stores; and the thread that
 * sleeps until nbdkit quits.
 */
static pthread_t stopper, storer, sleeper;
static bool has_stopper, has_storer, has_sleeper;
static struct stop_options options;

/* Eventfds: a signal has come; the state below has changed. */
static int signal_fd = -1, wake_fd = -1;

/* Protects what follows.  No other lock is taken while it is held. */
static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
static pthread_cond_t changed = PTHREAD_COND_INITIALIZER;
static bool is_asked;           /* to stop */
static bool is_finishing;       /* cleanup was called */
static bool is_stopped;         /* the disk is */
static unsigned stores_asked, stores_done;
static unsigned jobs;           /* of the thread that stores, as below */
static int result;              /* of disk_stop */

/* What the thread that stores is asked for. */
enum {
  JOB_TIDY = 1,
  JOB_SETTLE = 2,               /* for clients that have disconnected */
  JOB_STORE = 4,
  JOB_STORE_TIDILY = 8,
  JOB_END = 16,                 /* after all other jobs */
};

static void
ask_storer (unsigned job)
{
  ACQUIRE_LOCK_FOR_CURRENT_SCOPE (&lock);
  jobs |= job;
  pthread_cond_broadcast (&changed);
}

/* Wait for jobs.  *asked: the stores that JOB_SETTLE is for. */
static unsigned
take_jobs (unsigned *asked)
{
  ACQUIRE_LOCK_FOR_CURRENT_SCOPE (&lock);
  while (jobs == 0)
    pthread_cond_wait (&changed, &lock);
  const unsigned mine = jobs;

  jobs = 0;
  *asked = stores_asked;
  return mine;
}

static void
settle (unsigned asked)
{
  disk_settle (options.disk);

  ACQUIRE_LOCK_FOR_CURRENT_SCOPE (&lock);
  stores_done = asked;
  pthread_cond_broadcast (&changed);
}

static void *
storer_main (void *unused)
{
  unsigned mine, asked;

  (void) unused;
  report_limit_thread ();
  do {
    mine = take_jobs (&asked);
    if (mine & JOB_TIDY)
      disk_tidy (options.disk, false);
    if (mine & JOB_SETTLE)
      settle (asked);
    if (mine & (JOB_STORE | JOB_STORE_TIDILY))
      disk_sync (options.disk); /* If this fails, disk_stop reports it. */
    if (mine & JOB_STORE_TIDILY)
      disk_tidy (options.disk, true);
  } while (!(mine & JOB_END));
  return NULL;
}

static void
end_storer (void)
{
  if (!has_storer)
    return;
  ask_storer (JOB_END);
  pthread_join (storer, NULL);
  has_storer = false;
}

/* Sleep until there is something to do.  True if that is to stop. */
static bool
wait_to_be_asked (void)
{
  struct pollfd fds[2] = {
    { .fd = signal_fd, .events = POLLIN },
    { .fd = wake_fd, .events = POLLIN },
  };
  eventfd_t ignored;

  if (poll (fds, 2, disk_tidy_ms (options.disk)) == 0)
    ask_storer (JOB_TIDY);
  if (fds[1].revents != 0)
    eventfd_read (wake_fd, &ignored);

  ACQUIRE_LOCK_FOR_CURRENT_SCOPE (&lock);
  return is_asked || fds[0].revents != 0;
}

/* Wait until no request or command is under way.  False if one still is at
 * `until`, in now_ms.
 */
static bool
requests_end (int64_t until)
{
  const struct timespec tick = { .tv_nsec = TICK_MS * 1000000L };

  while (clients_in_flight () > 0 ||
         (options.server != NULL &&
          !nbd_server_wait (options.server, TICK_MS)) ||
         (options.control != NULL &&
          !control_wait (options.control, TICK_MS))) {
    if (now_ms () >= until)
      return false;
    if (clients_in_flight () > 0)
      nanosleep (&tick, NULL);
  }
  return true;
}

/* The same, and let nbdkit quit if that takes too long. */
static void
wait_for_requests (int64_t began)
{
  for (int64_t ms = STUCK_MS; ms < PATIENCE_MS; ms += STUCK_STORE_MS) {
    if (requests_end (began + ms))
      return;
    ask_storer (JOB_STORE_TIDILY);
  }
  if (requests_end (began + PATIENCE_MS))
    return;
  nbdkit_shutdown ();
  requests_end (INT64_MAX);
}

static void
stop (int64_t began)
{
  int r;

  clients_refuse ();
  disk_hurry (options.disk, GRACE_MS);
  if (options.server != NULL)
    nbd_server_begin_stop (options.server, GRACE_MS);
  if (options.control != NULL)
    control_begin_stop (options.control, GRACE_MS);
  ask_storer (JOB_STORE);
  wait_for_requests (began);
  if (options.server != NULL)
    nbd_server_stop (options.server, GRACE_MS);
  if (options.control != NULL)
    control_stop (options.control, GRACE_MS);
  end_storer ();
  r = disk_stop (options.disk);

  ACQUIRE_LOCK_FOR_CURRENT_SCOPE (&lock);
  result = r;
  is_stopped = true;
  pthread_cond_broadcast (&changed);
}

/* Was cleanup called?  Waits a little for it. */
static bool
cleanup_comes (void)
{
  struct pollfd fd = { .fd = wake_fd, .events = POLLIN };
  eventfd_t ignored;

  if (poll (&fd, 1, TICK_MS) == 1)
    eventfd_read (wake_fd, &ignored);

  ACQUIRE_LOCK_FOR_CURRENT_SCOPE (&lock);
  return is_finishing;
}

/* Called once clients of nbdkit's server have had time to receive their
 * replies.
 */
static void
end_sending (void)
{
#if NBDKIT_VERSION_MINOR >= 34
  sockets_shut_clients (SHUT_RDWR);
#else
  sockets_shut_clients (SHUT_RD);
  if (!sockets_client_is_stuck ())
    return;
  report_warning ("some clients do not receive their replies, and this "
                  "version of nbdkit would abort if they were disconnected: "
                  "the disk is stopped, so the process ends here");
  options.give_up ();
  _exit (result == 0 ? EXIT_SUCCESS : EXIT_FAILURE);
#endif
}

static void
make_nbdkit_end (int64_t began)
{
  const int64_t stopped = now_ms ();

  {
    ACQUIRE_LOCK_FOR_CURRENT_SCOPE (&lock);
    if (is_finishing)
      return;
  }
  nbdkit_shutdown ();
  single_wake ();
  while (!cleanup_comes ()) {
    const int64_t now = now_ms ();

    if (!options.nbdkit_answers)
      continue;
    if (now - stopped >= GRACE_MS)
      end_sending ();
    else if (now - began >= GRACE_MS)
      sockets_shut_clients (SHUT_RD);
  }
}

static void *
stopper_main (void *unused)
{
  int64_t began;

  (void) unused;
  report_limit_thread ();
  while (!wait_to_be_asked ())
    ;
  began = now_ms ();
  stop (began);
  make_nbdkit_end (began);
  return NULL;
}

static void *
sleeper_main (void *unused)
{
  (void) unused;
  while (nbdkit_nanosleep (INT_MAX - 1, 0) == 0)
    ;
  ACQUIRE_LOCK_FOR_CURRENT_SCOPE (&lock);
  is_asked = true;
  eventfd_write (wake_fd, 1);
  return NULL;
}

static int
start_thread (pthread_t *thread, void *(*start) (void *), bool *has)
{
  const int r = thread_create (thread, start, NULL);

  *has = r == 0;
  if (r == 0)
    return 0;
  errno = r;
  report_error ("pthread_create: %m");
  return -1;
}

void
stop_ask (void)
{
  ACQUIRE_LOCK_FOR_CURRENT_SCOPE (&lock);
  is_asked = true;
  if (wake_fd != -1)
    eventfd_write (wake_fd, 1);
}

static int
make_eventfds (void)
{
  ACQUIRE_LOCK_FOR_CURRENT_SCOPE (&lock);
  signal_fd = eventfd (0, EFD_CLOEXEC | EFD_NONBLOCK);
  wake_fd = eventfd (0, EFD_CLOEXEC | EFD_NONBLOCK);
  if (signal_fd == -1 || wake_fd == -1) {
    report_error ("eventfd: %m");
    return -1;
  }
  if (is_asked)                 /* by stop_ask, before there was a wake_fd */
    eventfd_write (wake_fd, 1);
  return 0;
}

int
stop_start (const struct stop_options *o)
{
  options = *o;
  if (make_eventfds () == -1)
    return -1;
  if (start_thread (&storer, storer_main, &has_storer) == -1 ||
      start_thread (&stopper, stopper_main, &has_stopper) == -1 ||
      (options.nbdkit_answers &&
       start_thread (&sleeper, sleeper_main, &has_sleeper) == -1))
    return -1;
  if (!signals_take (signal_fd) && options.sleeper != NULL)
    report_warning ("--filter=%s stops working when nbdkit is told to end, "
                    "and what is in memory then may be lost: nbdkit's "
                    "signal handler was not recognised",
                    options.sleeper);
  return 0;
}

void
stop_store (void)
{
  ACQUIRE_LOCK_FOR_CURRENT_SCOPE (&lock);
  const unsigned mine = ++stores_asked;

  if (!has_stopper)
    return;
  jobs |= JOB_SETTLE;
  pthread_cond_broadcast (&changed);
  while ((int) (stores_done - mine) < 0 && !is_stopped)
    pthread_cond_wait (&changed, &lock);
}

int
stop_finish (void)
{
  if (!has_stopper) {
    end_storer ();
    return 0;
  }
  {
    ACQUIRE_LOCK_FOR_CURRENT_SCOPE (&lock);
    is_asked = is_finishing = true;
    eventfd_write (wake_fd, 1);
    while (!is_stopped)
      pthread_cond_wait (&changed, &lock);
    has_stopper = false;
  }
  pthread_join (stopper, NULL);
  if (has_sleeper) {
    nbdkit_shutdown ();         /* Wakes it, if nothing has. */
    pthread_join (sleeper, NULL);
    has_sleeper = false;
  }
  signals_give_back ();
  ACQUIRE_LOCK_FOR_CURRENT_SCOPE (&lock);
  close (signal_fd);
  close (wake_fd);
  signal_fd = wake_fd = -1;
  return result;
}
