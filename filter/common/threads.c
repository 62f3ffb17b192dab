/* nbdkit-dirty-bitmap-filter
 * SPDX-License-Identifier: BSD-3-Clause
 * Copyright the nbdkit-dirty-bitmap-filter authors
 */

#include <config.h>

#include <errno.h>
#include <signal.h>
#include <time.h>

#include "common/threads.h"

int
thread_create (pthread_t *thread, void *(*start) (void *), void *arg)
{
  sigset_t all, saved;
  int err;

  sigfillset (&all);
  pthread_sigmask (SIG_SETMASK, &all, &saved);
  err = pthread_create (thread, NULL, start, arg);
  pthread_sigmask (SIG_SETMASK, &saved, NULL);
  return err;
}

int
monotonic_cond_init (pthread_cond_t *cond)
{
  pthread_condattr_t attr;
  const int err = pthread_condattr_init (&attr);

  if (err != 0) {
    errno = err;
    return -1;
  }
  pthread_condattr_setclock (&attr, CLOCK_MONOTONIC);
  pthread_cond_init (cond, &attr);
  pthread_condattr_destroy (&attr);
  return 0;
}
