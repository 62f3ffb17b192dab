/* nbdkit-dirty-bitmap-filter
 * SPDX-License-Identifier: BSD-3-Clause
 * Copyright the nbdkit-dirty-bitmap-filter authors
 */

/* The team of a connection: the receive role, stealing it, and the pace.
 *
 * One worker of a connection at a time has the role: it alone touches
 * the input buffer.  The role word says in which state the role is:
 *
 *   FREE       no worker has it; the next one that wants it takes it
 *   OWNED      its holder receives, or makes a reply
 *   EXECUTING  its holder is inside disk_* or sendmsg, with the role kept
 *
 * A small request on a disk that answers at once is served fastest by
 * keeping the role: no other thread is woken, and the replies to many
 * pipelined requests leave in one call.  That would let one slow request
 * hold up those behind it, so:
 *
 * - The monitor, one thread a server, looks at the role words every
 *   TICK.  A word that is EXECUTING with the same number at two ticks is
 *   a request that takes long; its role is stolen, by compare-and-swap
 *   to FREE, and another worker woken or started.  The holder finds out
 *   when it is done: its own compare-and-swap back to OWNED fails.
 * - The same happens to a holder that sends to a client which does not
 *   read yet, because it sends its own requests first: nearly as many
 *   of these as it may have requests in flight are taken from it.
 * - A connection whose requests sleep becomes eager: its workers give
 *   the role up before they execute, so that as many requests run in
 *   parallel as the connection may have threads.
 * - Requests that are slow by nature (a flush) give it up at once if
 *   there are other requests to receive, eager or not.
 *
 * The pace.  One request in SAMPLE_EVERY is measured, and the next one
 * after a theft: did its thread sleep while it executed?  After
 * SAMPLES_TO_EAGER that did and none that did not, the connection
 * becomes eager.  While it is eager one in EAGER_EVERY of each worker is
 * measured, and every one after a request that did not sleep; after QUICK_RUN
 * of these in a row it is eager no more.  What counts is sleep and not time:
 * parallel threads shorten what waits for a disk.  They only lengthen what
 * copies from the page cache, or what is late because the machine is busy.
 */

#include <config.h>

#include <assert.h>
#include <sys/resource.h>

#include "common/cleanup.h"
#include "common/lock.h"
#include "common/threads.h"
#include "nbd/debug.h"
#include "nbd/team.h"

#define SAMPLE_EVERY 32
#define SAMPLES_TO_EAGER 4
#define EAGER_EVERY 8
#define QUICK_RUN 256

void
team_init (struct team *team, struct teams *teams, struct worker *first,
           void *(*worker_main) (void *))
{
  pthread_mutex_init (&team->lock, NULL);
  team->teams = teams;
  team->worker_main = worker_main;
  team->workers[team->nr_workers++] = first;
}

void
team_free (struct team *team)
{
  for (unsigned i = 0; i < team->nr_workers; ++i)
    worker_free (team->workers[i]);
  pthread_mutex_destroy (&team->lock);
}

void
team_join (struct team *team)
{
  for (unsigned i = 1; i < team->nr_workers; ++i)
    pthread_join (team->workers[i]->thread, NULL);
}

bool
team_is_busy (struct team *team)
{
  ACQUIRE_LOCK_FOR_CURRENT_SCOPE (&team->lock);
  return team->nr_idle + 1 < team->nr_workers;
}

/* The link that leads to an idle worker, or the last one. */
static struct worker **
find_idle (struct team *team, const struct worker *w)
{
  struct worker **link = &team->idle;

  assert (lock_is_mine (&team->lock));
  while (*link != NULL && *link != w)
    link = &(*link)->next_idle;
  return link;
}

static void
become_idle (struct worker *w)
{
  w->next_idle = NULL;
  *find_idle (w->team, NULL) = w;
  w->team->nr_idle++;
}

/* False if it was taken. */
static bool
leave_idle (struct worker *w)
{
  struct worker **link = find_idle (w->team, w);

  if (*link == NULL)
    return false;
  *link = w->next_idle;
  w->team->nr_idle--;
  return true;
}

/* The one that was idle for the longest time, or NULL. */
static struct worker *
take_idle (struct team *team)
{
  struct worker *w = team->idle;

  if (w != NULL)
    leave_idle (w);
  return w;
}

/* Sleep until the worker is called, and not so long that large buffers are
 * kept for nothing.  Called with team->lock, which is not held meanwhile.
 */
static void
wait_for_role (struct worker *w)
{
  struct team *team = w->team;
  bool called;

  become_idle (w);
  pthread_mutex_unlock (&team->lock);
  called = semaphore_wait (&w->called, IDLE_SECONDS);
  if (!called)
    worker_trim (w);
  pthread_mutex_lock (&team->lock);
  /* One that was taken just now is about to be called. */
  if (!called && !leave_idle (w))
    while (sem_wait (&w->called) == -1)
      ;
}

bool
role_acquire (struct worker *w, struct robbed *robbed)
{
  struct team *team = w->team;

  ACQUIRE_LOCK_FOR_CURRENT_SCOPE (&team->lock);
  while (!team->input_ended &&
         ROLE_STATE (atomic_load (&team->role)) != ROLE_FREE)
    wait_for_role (w);
  if (team->input_ended)
    return false;
  atomic_store (&team->role, team->seq << ROLE_STATE_BITS | ROLE_OWNED);
  team->holder = w;
  *robbed = team->robbed;
  team->robbed.worker = NULL;
  w->has_role = true;
  return true;
}

/* Start another worker.  Called with team->lock.  Failing is no error as
 * long as another worker lives.
 */
static void
add_worker (struct team *team)
{
  atomic_uint *count = &team->teams->nr_extra_threads;
  struct worker *w = NULL;

  assert (lock_is_mine (&team->lock));
  /* As with memory: no more of one connection than are left for others. */
  if (atomic_fetch_add (count, 1) + team->nr_workers <=
      team->teams->max_extra_threads)
    w = worker_new (team->workers[0]);
  if (w == NULL || thread_create (&w->thread, team->worker_main, w) != 0) {
    worker_free (w);
    atomic_fetch_sub (count, 1);
    return;
  }
  team->workers[team->nr_workers++] = w;
}

/* Another worker may receive: the one to call, once the lock is not held any
 * more, or NULL.  Called with team->lock.
 */
static struct worker *
offer_role (struct team *team)
{
  struct worker *w = take_idle (team);

  if (w == NULL && team->nr_workers < team->teams->max_workers)
    add_worker (team);
  return w;
}

static void
call (struct worker *w)
{
  if (w != NULL)
    sem_post (&w->called);
}

void
role_release (struct worker *w)
{
  struct team *team = w->team;
  struct worker *next;

  pthread_mutex_lock (&team->lock);
  w->has_role = false;
  atomic_store (&team->role, team->seq << ROLE_STATE_BITS | ROLE_FREE);
  next = offer_role (team);
  pthread_mutex_unlock (&team->lock);
  call (next);
}

void
role_end_input (struct worker *w)
{
  struct team *team = w->team;
  struct worker *idle;

  ACQUIRE_LOCK_FOR_CURRENT_SCOPE (&team->lock);
  w->has_role = false;          /* and none has: it stays OWNED for ever */
  team->input_ended = true;
  while ((idle = take_idle (team)) != NULL)
    call (idle);
}

void
monitor_wake (struct teams *teams)
{
  ACQUIRE_LOCK_FOR_CURRENT_SCOPE (&teams->monitor_lock);
  atomic_store (&teams->monitor_asleep, false);
  pthread_cond_signal (&teams->monitor_wake);
}

static void
publish_executing (struct worker *w)
{
  struct team *team = w->team;
  uint_fast64_t word = ++team->seq << ROLE_STATE_BITS | ROLE_EXECUTING;

  team->has_gathered = w->gathered > 0;
  atomic_store_explicit (&w->ticket, word, memory_order_relaxed);
  atomic_store (&team->role, word);
  if (atomic_load (&team->teams->monitor_asleep))
    monitor_wake (team->teams);
}

void
role_begin_executing (struct worker *w, bool slow_by_nature)
{
  w->team->slow_by_nature = slow_by_nature;
  w->team->sending = false;
  publish_executing (w);
}

void
role_begin_sending (struct worker *w)
{
  w->team->sending = true;
  publish_executing (w);
}

void
role_end_executing (struct worker *w)
{
  uint_fast64_t word = atomic_load_explicit (&w->ticket,
                                             memory_order_relaxed);

  w->has_role =
    atomic_compare_exchange_strong (&w->team->role, &word,
                                    word - ROLE_EXECUTING + ROLE_OWNED);
}

/* The worker to call, or NULL. */
static struct worker *
steal (struct team *team, uint_fast64_t word)
{
  uint_fast64_t ticket = word;

  ACQUIRE_LOCK_FOR_CURRENT_SCOPE (&team->lock);
  if (!atomic_compare_exchange_strong (&team->role, &word,
                                       word - ROLE_EXECUTING + ROLE_FREE))
    return NULL;
  debug_request ("nbd: request takes long, another thread receives");
  if (!team->sending) {
    team->robbed = (struct robbed) {
      .worker = team->has_gathered ? team->holder : NULL, .ticket = ticket,
    };
    if (!team->slow_by_nature)
      team->until_sample = 0;
  }
  return offer_role (team);
}

void
role_steal (struct team *team, uint_fast64_t word)
{
  call (steal (team, word));
}

static long
sleeps_of_this_thread (void)
{
  struct rusage usage;

  getrusage (RUSAGE_THREAD, &usage);
  return usage.ru_nvcsw;
}

/* Is the next request of this worker one that is measured? */
static bool
is_sample (struct worker *w)
{
  struct team *team = w->team;
  unsigned *left = w->measured_eager ? &w->until_measured
    : &team->until_sample;

  if (*left > 0 && !(w->measured_eager && team->quick_run > 0)) {
    --*left;
    return false;
  }
  if (w->measured_eager)
    *left = EAGER_EVERY - 1;
  return true;
}

/* Requests that are slow by nature say nothing of the disk. */
void
pace_begin (struct worker *w, bool slow_by_nature)
{
  w->measured = false;
  if (slow_by_nature)
    return;
  w->measured_eager = atomic_load_explicit (&w->team->eager,
                                            memory_order_relaxed);
  w->measured = is_sample (w);
  if (w->measured)
    w->sleeps = sleeps_of_this_thread ();
}

/* A request that was measured slept. */
static void
count_wait (struct team *team)
{
  if (atomic_fetch_add (&team->sampled_waits, 1) + 1 < SAMPLES_TO_EAGER)
    return;
  atomic_store (&team->sampled_waits, 0);
  atomic_store (&team->quick_run, 0);
  atomic_store (&team->eager, true);
}

void
pace_end (struct worker *w)
{
  struct team *team = w->team;
  bool slept;

  if (!w->measured)
    return;
  slept = sleeps_of_this_thread () != w->sleeps;

  if (w->measured_eager) {
    if (slept)
      atomic_store (&team->quick_run, 0);
    else if (atomic_fetch_add (&team->quick_run, 1) + 1 >= QUICK_RUN)
      atomic_store (&team->eager, false);
    return;
  }
  if (slept)
    count_wait (team);
  if (w->has_role) {
    /* One that slept is followed up at once. */
    team->until_sample = slept ? 0 : SAMPLE_EVERY;
    if (!slept)
      atomic_store (&team->sampled_waits, 0);
  }
}
