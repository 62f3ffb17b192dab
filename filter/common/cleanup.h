/* nbdkit-dirty-bitmap-filter
 * SPDX-License-Identifier: BSD-3-Clause
 * Copyright the nbdkit-dirty-bitmap-filter authors
 */

#ifndef DIRTY_BITMAP_CLEANUP_H
#define DIRTY_BITMAP_CLEANUP_H

/* Release at the end of the scope, by attribute. */

#include <pthread.h>
#include <stdlib.h>
#include <unistd.h>

static inline void
cleanup_free_ptr (void *p)
{
  free (*(void **) p);
}

static inline void
cleanup_unlock_ptr (pthread_mutex_t **p)
{
  pthread_mutex_unlock (*p);
}

static inline void
cleanup_close_ptr (int *fd)
{
  if (*fd >= 0)
    close (*fd);
}

#define CLEANUP_FREE __attribute__ ((cleanup (cleanup_free_ptr)))
#define CLEANUP_CLOSE __attribute__ ((cleanup (cleanup_close_ptr)))

#define CLEANUP_PASTE2(a, b) a##b
#define CLEANUP_PASTE(a, b) CLEANUP_PASTE2 (a, b)

/* Take a mutex until the end of the enclosing scope. */
#define ACQUIRE_LOCK_FOR_CURRENT_SCOPE(mutex)                           \
  __attribute__ ((cleanup (cleanup_unlock_ptr), unused))                \
  pthread_mutex_t *CLEANUP_PASTE (lock_at_, __LINE__) = (mutex);        \
  pthread_mutex_lock (CLEANUP_PASTE (lock_at_, __LINE__))

#endif /* DIRTY_BITMAP_CLEANUP_H */
