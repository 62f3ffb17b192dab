/* nbdkit-dirty-bitmap-filter
 * SPDX-License-Identifier: BSD-3-Clause
 * Copyright the nbdkit-dirty-bitmap-filter authors
 */

/* Grace periods.
 *
 * Sections are counted under the phase in which they were entered, 0 or 1,
 * the parity of the number of the last period that has begun.  Beginning a
 * period switches the phase, so that new sections are counted under the
 * other one, and the period ends when the count of the old phase has fallen
 * to zero.
 *
 * Why a section cannot slip through: grace_enter counts itself under the
 * phase that it read, then reads the phase again, and starts over if it has
 * changed.  All of these are sequentially consistent.  If the second read
 * still saw the old phase, the count was raised before the phase switched,
 * so the thread that switched it sees the count.
 *
 * Why the count of a new phase starts at zero: the period that emptied it
 * has ended before the next one begins.  (A section that lost the race above
 * raises and lowers the count of a past phase for a moment; this can only
 * make a period seem longer.)
 *
 * A period that is requested while another one is under way is the next one,
 * since sections that were entered after the other one began must be left,
 * too.  All requests made meanwhile share it.
 */

#include <config.h>

#include <assert.h>
#include <sched.h>
#include <time.h>

#include "common/cleanup.h"
#include "common/grace.h"
#include "common/lock.h"

void
grace_init (struct grace *g)
{
  for (unsigned i = 0; i < NR_SHARDS; ++i) {
    atomic_init (&g->shard[i].sections[0], 0);
    atomic_init (&g->shard[i].sections[1], 0);
  }
  atomic_init (&g->begun, 0);
  pthread_mutex_init (&g->lock, NULL);
  g->ended = g->wanted = 0;
}

void
grace_free (struct grace *g)
{
  pthread_mutex_destroy (&g->lock);
}

grace_ticket
grace_enter (struct grace *g)
{
  struct grace_counter *c = &g->shard[shard_of_thread ()];

  for (;;) {
    unsigned phase = atomic_load (&g->begun) & 1;

    atomic_fetch_add (&c->sections[phase], 1);
    if ((atomic_load (&g->begun) & 1) == phase)
      return phase;
    atomic_fetch_sub (&c->sections[phase], 1);
  }
}

void
grace_leave (struct grace *g, grace_ticket phase)
{
  /* A section is entered and left by one thread. */
  atomic_fetch_sub_explicit (&g->shard[shard_of_thread ()].sections[phase], 1,
                             memory_order_release);
}

/* Have all sections of the phase before the last switch been left? */
static bool
old_phase_is_empty (struct grace *g)
{
  const unsigned old = (atomic_load (&g->begun) & 1) ^ 1;

  for (unsigned i = 0; i < NR_SHARDS; ++i)
    if (atomic_load (&g->shard[i].sections[old]) != 0)
      return false;
  return true;
}

/* With the lock held: end the period under way if it can end, and begin the
 * one that was requested meanwhile.
 */
static void
advance (struct grace *g)
{
  assert (lock_is_mine (&g->lock));
  if (g->ended != g->begun && old_phase_is_empty (g))
    g->ended = g->begun;
  if (g->ended == g->begun && g->wanted > g->begun)
    atomic_fetch_add (&g->begun, 1);
}

grace_period
grace_begin (struct grace *g)
{
  ACQUIRE_LOCK_FOR_CURRENT_SCOPE (&g->lock);
  const grace_period period = g->begun + 1;

  g->wanted = period;
  advance (g);
  return period;
}

bool
grace_ended (struct grace *g, grace_period period)
{
  ACQUIRE_LOCK_FOR_CURRENT_SCOPE (&g->lock);
  advance (g);
  return g->ended >= period;
}

void
grace_wait (struct grace *g, grace_period period)
{
  for (unsigned tries = 0; !grace_ended (g, period); ++tries) {
    const struct timespec ts = { .tv_nsec = 50000 };

    if (tries < 100)
      sched_yield ();
    else
      nanosleep (&ts, NULL);
  }
}
