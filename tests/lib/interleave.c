/* nbdkit-dirty-bitmap-filter
 * SPDX-License-Identifier: BSD-3-Clause
 * Copyright the nbdkit-dirty-bitmap-filter authors
 */

/* How this works
 *
 * A thread that is not an actor passes all places.  Whether an actor can
 * go no further is read from the system: it sleeps, and still does a
 * moment later.  Where that is wrong (the machine is slow) the two meet
 * in another way than meant, which must be right too.
 */

#include <config.h>

#include <errno.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

#include <cmocka.h>

#include "common/cleanup.h"
#include "container/container.h"
#include "interleave.h"

static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
static pthread_cond_t changed = PTHREAD_COND_INITIALIZER;
static _Thread_local struct actor *me;

struct gate {
  struct container c;
  struct container *below;
};

static void
pass (void)
{
  if (me == NULL)
    return;
  ACQUIRE_LOCK_FOR_CURRENT_SCOPE (&lock);
  if (me->places++ != me->stop_at)
    return;
  me->stopped = true;
  pthread_cond_broadcast (&changed);
  while (!me->go)
    pthread_cond_wait (&changed, &lock);
  me->stopped = false;
}

static struct container *
below (struct container *c)
{
  return ((struct gate *) c)->below;
}

static int
gate_pread (struct container *c, void *buf, size_t count, uint64_t offset)
{
  pass ();
  const int r = container_pread (below (c), buf, count, offset);

  pass ();
  return r;
}

static int
gate_pwrite (struct container *c, const void *buf, size_t count,
             uint64_t offset)
{
  pass ();
  const int r = container_pwrite (below (c), buf, count, offset);

  pass ();
  return r;
}

static int
gate_zero (struct container *c, uint64_t count, uint64_t offset, bool punch)
{
  pass ();
  const int r = container_zero (below (c), count, offset, punch);

  pass ();
  return r;
}

static int
gate_flush (struct container *c)
{
  pass ();
  const int r = container_flush (below (c));

  pass ();
  return r;
}

static void
take_size (struct container *c)
{
  atomic_store_explicit (&c->size, container_size (below (c)),
                         memory_order_release);
}

static int
gate_grow (struct container *c, uint64_t size)
{
  pass ();
  const int r = container_reserve (below (c), size);

  pass ();
  take_size (c);
  return r;
}

static int
gate_truncate (struct container *c, uint64_t size)
{
  const int r = container_truncate (below (c), size);

  take_size (c);
  return r;
}

static void
gate_close (struct container *c)
{
  container_close (below (c));
  free (c);
}

struct container *
gate_open (struct container *below_it)
{
  static const struct container_ops ops = {
    .pread = gate_pread, .pwrite = gate_pwrite, .zero = gate_zero,
    .flush = gate_flush, .grow = gate_grow, .truncate = gate_truncate,
    .close = gate_close,
  };
  struct gate *g = calloc (1, sizeof *g);

  assert_non_null (g);
  container_init (&g->c, &ops, container_size (below_it), false);
  g->below = below_it;
  return &g->c;
}

static void *
run_actor (void *opaque)
{
  me = opaque;
  me->tid = syscall (SYS_gettid);
  me->act (me->opaque);
  ACQUIRE_LOCK_FOR_CURRENT_SCOPE (&lock);
  me->done = true;
  pthread_cond_broadcast (&changed);
  return NULL;
}

bool
actor_is_stopped (struct actor *a)
{
  ACQUIRE_LOCK_FOR_CURRENT_SCOPE (&lock);
  return a->stopped;
}

bool
actor_is_done (struct actor *a)
{
  ACQUIRE_LOCK_FOR_CURRENT_SCOPE (&lock);
  return a->done;
}

/* Does the system say that the thread sleeps? */
static bool
sleeps (const struct actor *a)
{
  char path[64], line[256] = "";
  const char *state;
  FILE *fp;

  if (a->tid == 0)
    return false;
  snprintf (path, sizeof path, "/proc/self/task/%d/stat", (int) a->tid);
  fp = fopen (path, "re");
  if (fp == NULL)
    return false;
  if (fgets (line, sizeof line, fp) == NULL)
    line[0] = '\0';
  fclose (fp);
  state = strrchr (line, ')');
  return state != NULL && strncmp (state, ") S", 3) == 0;
}

static void
wait_as_far_as_it_can (struct actor *a)
{
  ACQUIRE_LOCK_FOR_CURRENT_SCOPE (&lock);
  for (unsigned asleep = 0; !a->stopped && !a->done && asleep < 3;) {
    struct timespec ts;

    clock_gettime (CLOCK_REALTIME, &ts);
    ts.tv_nsec += 150000;
    ts.tv_sec += ts.tv_nsec / 1000000000;
    ts.tv_nsec %= 1000000000;
    if (pthread_cond_timedwait (&changed, &lock, &ts) == ETIMEDOUT)
      asleep = sleeps (a) ? asleep + 1 : 0;
  }
}

void
actor_start (struct actor *a)
{
  assert_int_equal (pthread_create (&a->id, NULL, run_actor, a), 0);
  wait_as_far_as_it_can (a);
}

static void
let_go (struct actor *a)
{
  ACQUIRE_LOCK_FOR_CURRENT_SCOPE (&lock);
  a->go = true;
  a->stopped = false;
  pthread_cond_broadcast (&changed);
}

void
actor_go_on (struct actor *a)
{
  let_go (a);
  wait_as_far_as_it_can (a);
}

void
actor_join (struct actor *a)
{
  let_go (a);
  pthread_join (a->id, NULL);
}

/* Returns false if the second never came to its place. */
static bool
meet (const struct meeting *m, int first_place, int second_place,
      bool *first_came)
{
  struct actor a = {
    .act = m->act[0], .opaque = m->opaque, .stop_at = first_place,
  };
  struct actor b = {
    .act = m->act[1], .opaque = m->opaque, .stop_at = second_place,
  };
  bool second_came;

  m->prepare (m->opaque);
  actor_start (&a);
  *first_came = actor_is_stopped (&a);
  actor_start (&b);
  second_came = actor_is_stopped (&b);
  actor_go_on (&a);
  actor_join (&b);
  actor_join (&a);
  m->check (m->opaque, first_place, second_place);
  return second_came;
}

unsigned
meet_in_all_ways (const struct meeting *m, unsigned first_stride,
                  unsigned second_stride)
{
  unsigned n = 0;
  bool came;

  for (int first = 0; ; first += first_stride) {
    meet (m, first, NEVER, &came);
    n++;
    if (!came)
      return n;
    for (int second = first / first_stride % second_stride;
         meet (m, first, second, &came); second += second_stride)
      n++;
  }
}
