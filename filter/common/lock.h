/* nbdkit-dirty-bitmap-filter
 * SPDX-License-Identifier: BSD-3-Clause
 * Copyright the nbdkit-dirty-bitmap-filter authors
 */

#ifndef DIRTY_BITMAP_LOCK_H
#define DIRTY_BITMAP_LOCK_H

/* Does the calling thread hold a lock?  For assertions alone: a function that
 * needs a lock asserts that it is held.
 *
 * The answer is known in builds with sanitizers, and with glibc, which notes
 * the owner in each mutex that has the default attributes, and the writer in
 * each rwlock.  (It does not where a tunable makes it elide locks.)  Else
 * the answer is always true, and the assertion costs nothing.
 *
 * Another thread may take or release the lock meanwhile.  That is no matter,
 * since no thread but the caller can store the caller's id, or remove it.
 */

#include <pthread.h>
#include <stdbool.h>

#if defined DEBUG_LOCKS && defined __GLIBC__

#include <unistd.h>

#define LOCKS_ARE_KNOWN 1

static inline bool
lock_is_mine (const pthread_mutex_t *mutex)
{
  return __atomic_load_n (&mutex->__data.__owner, __ATOMIC_RELAXED) ==
    gettid ();
}

/* Is it held for writing?  An rwlock does not note which threads hold it for
 * reading.
 */
static inline bool
write_lock_is_mine (const pthread_rwlock_t *rwlock)
{
  return __atomic_load_n (&rwlock->__data.__cur_writer, __ATOMIC_RELAXED) ==
    gettid ();
}

#else

#define LOCKS_ARE_KNOWN 0

static inline bool
lock_is_mine (const pthread_mutex_t *mutex)
{
  (void) mutex;
  return true;
}

static inline bool
write_lock_is_mine (const pthread_rwlock_t *rwlock)
{
  (void) rwlock;
  return true;
}

#endif

#endif /* DIRTY_BITMAP_LOCK_H */
