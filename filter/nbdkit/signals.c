/* nbdkit-dirty-bitmap-filter
 * SPDX-License-Identifier: BSD-3-Clause
 * Copyright the nbdkit-dirty-bitmap-filter authors
 */

/* The signals that end nbdkit, sent to a thread of ours.
 *
 * How this works
 *
 * nbdkit installs one handler for TERM, INT, QUIT and HUP before it calls
 * after_fork.  The handler sets a flag, and from then on every
 * nbdkit_nanosleep fails (stop.c says why that matters).  So this file
 * replaces it with a handler that only writes to an eventfd.  The thread
 * that reads the eventfd tells nbdkit when to quit.
 *
 * nbdkit's handler is recognised as the handler of TERM, which takes one
 * argument.  A signal that has another handler (of a plugin, or of the
 * language that it is written in), or that is ignored, is left alone.  A
 * second signal, when the eventfd is already written to, has no effect.
 *
 * nbdkit handles signals that came before: the flag is set, and nbdkit calls
 * cleanup as soon as after_fork has returned.
 *
 * Children that plugins fork have the handler, and the eventfd, until they
 * call exec.  A signal to such a child is not for us.
 *
 * When the filter is unloaded the handler must not be in use.  The kernel
 * delivers a signal of the process to the main thread, unless that blocks
 * it.  The main thread never does, except during a poll, and it is the
 * thread that puts nbdkit's handler back.
 */

#include <config.h>

#include <errno.h>
#include <signal.h>
#include <stddef.h>
#include <stdint.h>
#include <unistd.h>

#include "nbdkit/signals.h"

static const int quit_signals[] = { SIGTERM, SIGINT, SIGQUIT, SIGHUP };
#define NR_SIGNALS (sizeof quit_signals / sizeof quit_signals[0])

static struct sigaction saved[NR_SIGNALS];
static bool is_taken[NR_SIGNALS];

/* Set before the handler is installed. */
static volatile int write_fd = -1;
static volatile pid_t owner;

static void
handle_signal (int sig)
{
  const int saved_errno = errno;
  const uint64_t one = 1;
  ssize_t r;

  (void) sig;
  if (getpid () == owner) {
    r = write (write_fd, &one, sizeof one);
    (void) r;                   /* If it is full, the thread wakes anyway. */
  }
  errno = saved_errno;
}

static bool
is_plain_handler (const struct sigaction *sa)
{
  return (sa->sa_flags & SA_SIGINFO) == 0 && sa->sa_handler != SIG_DFL &&
    sa->sa_handler != SIG_IGN;
}

bool
signals_take (int fd)
{
  struct sigaction theirs, ours;

  if (sigaction (SIGTERM, NULL, &theirs) == -1 || !is_plain_handler (&theirs))
    return false;
  write_fd = fd;
  owner = getpid ();
  for (size_t i = 0; i < NR_SIGNALS; ++i) {
    if (sigaction (quit_signals[i], NULL, &saved[i]) == -1 ||
        !is_plain_handler (&saved[i]) ||
        saved[i].sa_handler != theirs.sa_handler)
      continue;
    ours = saved[i];            /* keep the flags and the mask */
    ours.sa_handler = handle_signal;
    is_taken[i] = sigaction (quit_signals[i], &ours, NULL) == 0;
  }
  return true;
}

void
signals_give_back (void)
{
  for (size_t i = 0; i < NR_SIGNALS; ++i) {
    struct sigaction now;

    if (is_taken[i] && sigaction (quit_signals[i], NULL, &now) == 0 &&
        is_plain_handler (&now) && now.sa_handler == handle_signal)
      sigaction (quit_signals[i], &saved[i], NULL);
    is_taken[i] = false;
  }
}
