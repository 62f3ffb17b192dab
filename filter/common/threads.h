/* nbdkit-dirty-bitmap-filter
 * SPDX-License-Identifier: BSD-3-Clause
 * Copyright the nbdkit-dirty-bitmap-filter authors
 */

#ifndef DIRTY_BITMAP_THREADS_H
#define DIRTY_BITMAP_THREADS_H

/* Threads, and waiting with a timeout. */

#include <pthread.h>
#include <semaphore.h>
#include <stdbool.h>

/* Start a thread with all signals blocked, since signals are for nbdkit's
 * threads, and with a stack of at least 1 MiB.  Returns 0 or an error.
 */
extern int thread_create (pthread_t *, void *(*) (void *), void *);

/* A condition whose timed waits use CLOCK_MONOTONIC.  -1 with errno. */
extern int monotonic_cond_init (pthread_cond_t *);

/* Wait for a semaphore, no longer than so many seconds.  False if the time is
 * over.  Where the C library can do it only by the clock of the day, a change
 * of that changes the time.
 */
extern bool semaphore_wait (sem_t *, unsigned seconds);

#endif /* DIRTY_BITMAP_THREADS_H */
