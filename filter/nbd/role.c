/* nbdkit-dirty-bitmap-filter
 * SPDX-License-Identifier: BSD-3-Clause
 * Copyright the nbdkit-dirty-bitmap-filter authors
 */

/* Who receives: the role, stealing it, and the pace.
 *
 * One worker of a connection at a time has the role: it alone touches
 * the input buffer.  The role word says in which state the role is:
 *
 *   FREE       nobody has it; the next worker that wants it takes it
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
 * becomes eager.  While it is eager every request is measured, and after
 * QUICK_RUN without a sleep it is eager no more.  What counts is sleep
 * and not time: parallel threads shorten what waits for a disk.  They
 * only lengthen what copies from the page cache, or what is late because
 * the machine is busy.
 */

#include <config.h>

#include <errno.h>
#include <sys/resource.h>
#include <time.h>

#include "common/cleanup.h"
#include "nbd/internal.h"

#define SAMPLE_EVERY 32
#define SAMPLES_TO_EAGER 4
#define QUICK_RUN 256

/* Sleep until the role may be free or input has ended, and not so long
 * that large buffers are kept for nothing.  Called with c->lock.
 */
static void
wait_for_role (struct worker *w)
{
  struct connection *c = w->connection;
  struct timespec ts;

  clock_gettime (CLOCK_MONOTONIC, &ts);
  ts.tv_sec += IDLE_SECONDS;
  c->waiting++;
  if (pthread_cond_timedwait (&c->role_freed, &c->lock, &ts) == ETIMEDOUT)
    worker_trim (w);
  c->waiting--;
}

/* Wait for the role.  False if there is nothing more to receive. */
bool
role_acquire (struct worker *w, struct robbed *robbed)
{
  struct connection *c = w->connection;

  ACQUIRE_LOCK_FOR_CURRENT_SCOPE (&c->lock);
  while (!c->input_ended && ROLE_STATE (atomic_load (&c->role)) != ROLE_FREE)
    wait_for_role (w);
  if (c->input_ended)
    return false;
  atomic_store (&c->role, c->seq << ROLE_STATE_BITS | ROLE_OWNED);
  c->holder = w;
  *robbed = c->robbed;
  c->robbed.worker = NULL;
  w->has_role = true;
  return true;
}

/* Start another worker.  Called with c->lock; failing is no error as long
 * as another worker lives.
 */
static void
add_worker (struct connection *c)
{
  atomic_uint *count = &c->server->nr_extra_threads;
  struct worker *w = NULL;

  /* As with memory: no more of one connection than are left for others. */
  if (atomic_fetch_add (count, 1) + c->nr_workers <=
      c->server->max_extra_threads)
    w = worker_new (c);
  if (w == NULL || thread_create (&w->thread, c->worker_main, w) != 0) {
    worker_free (w);
    atomic_fetch_sub (count, 1);
    return;
  }
  c->workers[c->nr_workers++] = w;
}

/* Another worker may receive.  Called with c->lock. */
static void
offer_role (struct connection *c)
{
  if (c->waiting > 0)
    pthread_cond_signal (&c->role_freed);
  else if (c->nr_workers < c->server->limits.requests)
    add_worker (c);
}

void
role_release (struct worker *w)
{
  struct connection *c = w->connection;

  ACQUIRE_LOCK_FOR_CURRENT_SCOPE (&c->lock);
  w->has_role = false;
  atomic_store (&c->role, c->seq << ROLE_STATE_BITS | ROLE_FREE);
  offer_role (c);
}

/* There is nothing more to receive.  The role is owned for ever. */
void
role_end_input (struct worker *w)
{
  struct connection *c = w->connection;

  ACQUIRE_LOCK_FOR_CURRENT_SCOPE (&c->lock);
  w->has_role = false;
  c->input_ended = true;
  pthread_cond_broadcast (&c->role_freed);
}

void
monitor_wake (struct nbd_server *server)
{
  ACQUIRE_LOCK_FOR_CURRENT_SCOPE (&server->monitor_lock);
  atomic_store (&server->monitor_asleep, false);
  pthread_cond_signal (&server->monitor_wake);
}

static void
publish_executing (struct worker *w)
{
  struct connection *c = w->connection;
  uint_fast64_t word = ++c->seq << ROLE_STATE_BITS | ROLE_EXECUTING;

  c->has_gathered = w->gathered > 0;
  atomic_store_explicit (&w->ticket, word, memory_order_relaxed);
  atomic_store (&c->role, word);
  if (atomic_load (&c->server->monitor_asleep))
    monitor_wake (c->server);
}

/* About to call disk_*, with the role kept. */
void
role_begin_executing (struct worker *w, bool slow_by_nature)
{
  w->connection->slow_by_nature = slow_by_nature;
  w->connection->sending = false;
  publish_executing (w);
}

/* About to send, with the role kept. */
void
role_begin_sending (struct worker *w)
{
  w->connection->sending = true;
  publish_executing (w);
}

/* Done.  w->has_role says whether we have the role still. */
void
role_end_executing (struct worker *w)
{
  uint_fast64_t word = atomic_load_explicit (&w->ticket,
                                             memory_order_relaxed);

  w->has_role =
    atomic_compare_exchange_strong (&w->connection->role, &word,
                                    word - ROLE_EXECUTING + ROLE_OWNED);
}

void
role_steal (struct connection *c, uint_fast64_t word)
{
  uint_fast64_t ticket = word;

  ACQUIRE_LOCK_FOR_CURRENT_SCOPE (&c->lock);
  if (!atomic_compare_exchange_strong (&c->role, &word,
                                       word - ROLE_EXECUTING + ROLE_FREE))
    return;
  debug_request ("nbd: request takes long, another thread receives");
  if (!c->sending) {
    c->robbed = (struct robbed) {
      .worker = c->has_gathered ? c->holder : NULL, .ticket = ticket,
    };
    if (!c->slow_by_nature)
      c->until_sample = 0;
  }
  offer_role (c);
}

static long
sleeps_of_this_thread (void)
{
  struct rusage usage;

  getrusage (RUSAGE_THREAD, &usage);
  return usage.ru_nvcsw;
}

/* Called by the holder of the role before it executes or gives it up.
 * Requests that are slow by nature say nothing of the disk.
 */
void
pace_begin (struct worker *w, bool slow_by_nature)
{
  struct connection *c = w->connection;

  w->measured = false;
  if (slow_by_nature)
    return;
  w->measured_eager = atomic_load_explicit (&c->eager, memory_order_relaxed);
  if (w->measured_eager || c->until_sample == 0) {
    w->measured = true;
    w->sleeps = sleeps_of_this_thread ();
  }
  else
    c->until_sample--;
}

/* A request that was measured slept. */
static void
count_wait (struct connection *c)
{
  if (atomic_fetch_add (&c->sampled_waits, 1) + 1 < SAMPLES_TO_EAGER)
    return;
  atomic_store (&c->sampled_waits, 0);
  atomic_store (&c->quick_run, 0);
  atomic_store (&c->eager, true);
}

/* Called when the request was executed. */
void
pace_end (struct worker *w)
{
  struct connection *c = w->connection;
  bool slept;

  if (!w->measured)
    return;
  slept = sleeps_of_this_thread () != w->sleeps;

  if (w->measured_eager) {
    if (slept)
      atomic_store (&c->quick_run, 0);
    else if (atomic_fetch_add (&c->quick_run, 1) + 1 >= QUICK_RUN)
      atomic_store (&c->eager, false);
    return;
  }
  if (slept)
    count_wait (c);
  if (w->has_role) {
    /* One that slept is followed up at once. */
    c->until_sample = slept ? 0 : SAMPLE_EVERY;
    if (!slept)
      atomic_store (&c->sampled_waits, 0);
  }
}
