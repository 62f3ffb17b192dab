/* nbdkit-dirty-bitmap-filter
 * SPDX-License-Identifier: BSD-3-Clause
 * Copyright the nbdkit-dirty-bitmap-filter authors
 */

/* Starting threads, and waiting by the monotonic clock. */

#include <config.h>

#include <errno.h>
#include <signal.h>
#include <stdint.h>
#include <time.h>

#include "common/threads.h"

/* The minimum stack of a thread, in bytes.  musl's default is far smaller
 * (128 KiB).  A larger default is kept: the plugin is also called on our
 * threads, and may need it.
 */
#define MIN_STACK (UINT64_C (1) << 20)

static int
enlarge_stack (pthread_attr_t *attr)
{
  size_t bytes;
  const int err = pthread_attr_getstacksize (attr, &bytes);

  return err != 0 || bytes >= MIN_STACK ? err
    : pthread_attr_setstacksize (attr, MIN_STACK);
}

int
thread_create (pthread_t *thread, void *(*start) (void *), void *arg)
{
  pthread_attr_t attr;
  sigset_t all, saved;
  int err = pthread_attr_init (&attr);

  if (err != 0)
    return err;
  err = enlarge_stack (&attr);
  if (err == 0) {
    sigfillset (&all);
    pthread_sigmask (SIG_SETMASK, &all, &saved);
    err = pthread_create (thread, &attr, start, arg);
    pthread_sigmask (SIG_SETMASK, &saved, NULL);
  }
  pthread_attr_destroy (&attr);
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

bool
semaphore_wait (sem_t *semaphore, unsigned seconds)
{
  struct timespec until;
  int r;

#if HAVE_SEM_CLOCKWAIT
  const clockid_t clock = CLOCK_MONOTONIC;
#else
  const clockid_t clock = CLOCK_REALTIME;
#endif
  clock_gettime (clock, &until);
  until.tv_sec += seconds;
  do
#if HAVE_SEM_CLOCKWAIT
    r = sem_clockwait (semaphore, clock, &until);
#else
    r = sem_timedwait (semaphore, &until);
#endif
  while (r == -1 && errno == EINTR);
  return r == 0;
}
