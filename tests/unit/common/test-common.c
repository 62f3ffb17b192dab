/* nbdkit-dirty-bitmap-filter
 * SPDX-License-Identifier: BSD-3-Clause
 * Copyright the nbdkit-dirty-bitmap-filter authors
 */

/* What all rooms share: threads, locks, grace periods, and arrays. */

#include <config.h>

#include <errno.h>
#include <pthread.h>
#include <setjmp.h>
#include <signal.h>
#include <stdarg.h>
#include <stdatomic.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <stdlib.h>

#include <cmocka.h>

#include "common/grace.h"
#include "common/lock.h"
#include "common/shard.h"
#include "common/threads.h"
#include "common/vector.h"
#include "image.h"

#define MIB ((size_t) 1 << 20)

struct seen {
  size_t stack_bytes;
  bool blocks_signals;
};

static void *
look_at_oneself (void *opaque)
{
  struct seen *seen = opaque;
  pthread_attr_t attr;
  sigset_t blocked;

  if (pthread_getattr_np (pthread_self (), &attr) != 0)
    abort ();
  pthread_attr_getstacksize (&attr, &seen->stack_bytes);
  pthread_attr_destroy (&attr);
  pthread_sigmask (SIG_SETMASK, NULL, &blocked);
  seen->blocks_signals = sigismember (&blocked, SIGTERM) &&
    sigismember (&blocked, SIGUSR1);
  return NULL;
}

/* Where the system gives little, it is a MiB; more stays more. */
static void
test_stack (void **state)
{
  static const size_t defaults[] = { MIB / 8, 4 * MIB };

  (void) state;
  for (unsigned i = 0; i < 2; ++i) {
    struct seen seen = { 0 };
    pthread_attr_t attr;
    pthread_t thread;
    sigset_t blocked;

    assert_int_equal (pthread_attr_init (&attr), 0);
    assert_int_equal (pthread_attr_setstacksize (&attr, defaults[i]), 0);
    assert_int_equal (pthread_setattr_default_np (&attr), 0);
    pthread_attr_destroy (&attr);
    assert_int_equal (thread_create (&thread, look_at_oneself, &seen), 0);
    assert_int_equal (pthread_join (thread, NULL), 0);
    assert_true (seen.stack_bytes >= MIB);
    assert_true (seen.stack_bytes >= defaults[i]);
    assert_true (seen.blocks_signals);
    pthread_sigmask (SIG_SETMASK, NULL, &blocked);
    assert_false (sigismember (&blocked, SIGTERM));
  }
}

/* Periods that are asked for at several moments of sections. */
static void
test_periods (void **state)
{
  struct grace *g = aligned_alloc (_Alignof (struct grace), sizeof *g);
  grace_ticket first, second;
  grace_period before, between, after;

  (void) state;
  assert_non_null (g);
  grace_init (g);
  before = grace_begin (g);
  first = grace_enter (g);
  assert_true (grace_ended (g, before));
  between = grace_begin (g);
  assert_false (grace_ended (g, between));
  second = grace_enter (g);
  after = grace_begin (g);
  assert_true (after > between);
  assert_int_equal (grace_begin (g), after);
  assert_false (grace_ended (g, after));
  grace_leave (g, second);
  /* The second section was not in the way of the first period, but the
   * first is still in the way of both.
   */
  assert_false (grace_ended (g, between));
  assert_false (grace_ended (g, after));
  second = grace_enter (g);
  grace_leave (g, first);
  assert_true (grace_ended (g, between));
  assert_false (grace_ended (g, after));
  grace_leave (g, second);
  assert_true (grace_ended (g, after));
  grace_synchronize (g);
  grace_free (g);
  free (g);
}

/* Waiters replace what readers look at, and spoil the old one after a
 * period: no reader sees it spoilt.
 */
#define NR_READERS 2
#define NR_WAITERS 3

struct shared;

struct waiter {
  struct shared *shared;
  pthread_t thread;
  atomic_int thing[2];          /* 1, or 0 when it is spoilt */
  atomic_uint current;
};

struct shared {
  struct grace *grace;
  struct waiter waiter[NR_WAITERS];
  unsigned rounds;
  atomic_uint at_work;          /* waiters */
  atomic_uint failures;
};

static void *
read_things (void *opaque)
{
  struct shared *s = opaque;

  while (atomic_load (&s->at_work) > 0) {
    const grace_ticket ticket = grace_enter (s->grace);

    for (unsigned i = 0; i < NR_WAITERS; ++i) {
      struct waiter *w = &s->waiter[i];
      const atomic_int *thing = &w->thing[atomic_load (&w->current)];

      for (unsigned tries = 0; tries < 100; ++tries)
        if (atomic_load (thing) != 1)
          atomic_fetch_add (&s->failures, 1);
    }
    grace_leave (s->grace, ticket);
  }
  return NULL;
}

static void *
replace_things (void *opaque)
{
  struct waiter *w = opaque;

  for (unsigned i = 0; i < w->shared->rounds; ++i) {
    const unsigned old = atomic_load (&w->current);

    atomic_store (&w->thing[!old], 1);
    atomic_store (&w->current, !old);
    grace_synchronize (w->shared->grace);
    atomic_store (&w->thing[old], 0);
  }
  atomic_fetch_sub (&w->shared->at_work, 1);
  return NULL;
}

static void
test_many_waiters (void **state)
{
  static struct grace grace;
  static struct shared s = { .grace = &grace };
  pthread_t reader[NR_READERS];

  (void) state;
  grace_init (&grace);
  s.rounds = how_often (60, 40, 20);
  s.at_work = NR_WAITERS;
  for (unsigned i = 0; i < NR_WAITERS; ++i) {
    s.waiter[i].shared = &s;
    s.waiter[i].thing[0] = 1;
  }
  for (unsigned i = 0; i < NR_READERS; ++i)
    assert_int_equal (thread_create (&reader[i], read_things, &s), 0);
  for (unsigned i = 0; i < NR_WAITERS; ++i)
    assert_int_equal (thread_create (&s.waiter[i].thread, replace_things,
                                     &s.waiter[i]), 0);
  for (unsigned i = 0; i < NR_WAITERS; ++i)
    pthread_join (s.waiter[i].thread, NULL);
  for (unsigned i = 0; i < NR_READERS; ++i)
    pthread_join (reader[i], NULL);
  assert_int_equal (s.failures, 0);
  grace_free (&grace);
}

/* Locks that two threads look at. */
struct locks {
  pthread_mutex_t mutex;
  pthread_rwlock_t rwlock;
  pthread_cond_t changed;
  bool is_set;
  bool other_has[2];            /* what the other thread sees */
};

static void *
look_at_locks (void *opaque)
{
  struct locks *l = opaque;

  l->other_has[0] = lock_is_mine (&l->mutex);
  l->other_has[1] = write_lock_is_mine (&l->rwlock);
  return NULL;
}

static void *
set_under_lock (void *opaque)
{
  struct locks *l = opaque;

  pthread_mutex_lock (&l->mutex);
  l->other_has[0] = lock_is_mine (&l->mutex);
  l->is_set = true;
  pthread_cond_signal (&l->changed);
  pthread_mutex_unlock (&l->mutex);
  return NULL;
}

static void
run_other (struct locks *l)
{
  pthread_t thread;

  l->other_has[0] = l->other_has[1] = true;
  assert_int_equal (thread_create (&thread, look_at_locks, l), 0);
  assert_int_equal (pthread_join (thread, NULL), 0);
}

static void
test_lock_is_mine (void **state)
{
  struct locks l = {
    .mutex = PTHREAD_MUTEX_INITIALIZER, .rwlock = PTHREAD_RWLOCK_INITIALIZER,
  };

  (void) state;
  if (!LOCKS_ARE_KNOWN)
    skip ();
  assert_false (lock_is_mine (&l.mutex));
  assert_int_equal (pthread_mutex_lock (&l.mutex), 0);
  assert_true (lock_is_mine (&l.mutex));
  run_other (&l);
  assert_false (l.other_has[0]);
  pthread_mutex_unlock (&l.mutex);
  assert_false (lock_is_mine (&l.mutex));
  assert_int_equal (pthread_mutex_trylock (&l.mutex), 0);
  assert_true (lock_is_mine (&l.mutex));
  pthread_mutex_unlock (&l.mutex);
  assert_false (lock_is_mine (&l.mutex));
  pthread_mutex_destroy (&l.mutex);

  assert_false (write_lock_is_mine (&l.rwlock));
  pthread_rwlock_rdlock (&l.rwlock);
  assert_false (write_lock_is_mine (&l.rwlock));
  pthread_rwlock_unlock (&l.rwlock);
  pthread_rwlock_wrlock (&l.rwlock);
  assert_true (write_lock_is_mine (&l.rwlock));
  run_other (&l);
  assert_false (l.other_has[1]);
  pthread_rwlock_unlock (&l.rwlock);
  assert_false (write_lock_is_mine (&l.rwlock));
  pthread_rwlock_destroy (&l.rwlock);
}

static void *
post_later (void *semaphore)
{
  usleep (20000);
  sem_post (semaphore);
  return NULL;
}

static void
test_semaphore (void **state)
{
  pthread_t thread;
  sem_t s;

  (void) state;
  assert_int_equal (sem_init (&s, 0, 1), 0);
  assert_true (semaphore_wait (&s, 0));
  assert_false (semaphore_wait (&s, 0));
  assert_int_equal (thread_create (&thread, post_later, &s), 0);
  assert_true (semaphore_wait (&s, 60));
  pthread_join (thread, NULL);
  assert_false (semaphore_wait (&s, 1));
  sem_destroy (&s);
}

/* A wait lets the lock go, and takes it again, whether it times out or not. */
static void
test_lock_after_wait (void **state)
{
  const struct timespec past = { 0 };
  struct locks l = { .mutex = PTHREAD_MUTEX_INITIALIZER };
  pthread_t thread;

  (void) state;
  if (!LOCKS_ARE_KNOWN)
    skip ();
  assert_int_equal (monotonic_cond_init (&l.changed), 0);
  pthread_mutex_lock (&l.mutex);
  assert_int_equal (thread_create (&thread, set_under_lock, &l), 0);
  while (!l.is_set)
    pthread_cond_wait (&l.changed, &l.mutex);
  assert_true (l.other_has[0]);
  assert_true (lock_is_mine (&l.mutex));
  assert_int_equal (pthread_cond_timedwait (&l.changed, &l.mutex, &past),
                    ETIMEDOUT);
  assert_true (lock_is_mine (&l.mutex));
  pthread_mutex_unlock (&l.mutex);
  assert_int_equal (pthread_join (thread, NULL), 0);
  assert_false (lock_is_mine (&l.mutex));
  pthread_cond_destroy (&l.changed);
  pthread_mutex_destroy (&l.mutex);
}

static void *
take_shard (void *opaque)
{
  unsigned *shard = opaque;

  *shard = shard_of_thread ();
  if (*shard != shard_of_thread ())
    *shard = NR_SHARDS;         /* it must not change */
  return NULL;
}

/* Threads that begin one after the other are spread over all shards. */
static void
test_shards (void **state)
{
  bool used[NR_SHARDS] = { false };

  (void) state;
  for (unsigned i = 0; i < NR_SHARDS; ++i) {
    unsigned shard;
    pthread_t thread;

    assert_int_equal (pthread_create (&thread, NULL, take_shard, &shard), 0);
    pthread_join (thread, NULL);
    assert_true (shard < NR_SHARDS);
    assert_false (used[shard]);
    used[shard] = true;
  }
}

static void
test_vector (void **state)
{
  uint16_t *numbers = NULL;
  size_t nr = 0, max = 0;

  (void) state;
  for (unsigned i = 0; i < 1000; ++i) {
    assert_int_equal (vector_reserve (numbers, nr, max, 1), 0);
    assert_true (max > nr);
    numbers[nr++] = i;
  }
  for (unsigned i = 0; i < 1000; ++i)
    assert_int_equal (numbers[i], i);
  assert_int_equal (vector_reserve (numbers, nr, max, 5000), 0);
  assert_true (max >= 6000);
  assert_int_equal (numbers[999], 999);

  /* More than there is, and more than can be counted: all stays. */
  const size_t before = max;
  const uint16_t *const old = numbers;
  const size_t far_too_many[] = { SIZE_MAX - nr, SIZE_MAX, SIZE_MAX / 2 + 1 };
  for (unsigned i = 0; i < 3; ++i) {
    errno = 0;
    assert_int_equal (vector_reserve (numbers, nr, max, far_too_many[i]), -1);
    assert_int_equal (errno, ENOMEM);
    assert_int_equal (max, before);
    assert_ptr_equal (numbers, old);
  }
  free (numbers);
}

int
main (void)
{
  const struct CMUnitTest tests[] = {
    cmocka_unit_test (test_stack),
    cmocka_unit_test (test_lock_is_mine),
    cmocka_unit_test (test_lock_after_wait),
    cmocka_unit_test (test_shards),
    cmocka_unit_test (test_vector),
    cmocka_unit_test (test_periods),
    cmocka_unit_test (test_many_waiters),
    cmocka_unit_test (test_semaphore),
  };

  return cmocka_run_group_tests (tests, NULL, NULL);
}
