/* nbdkit-dirty-bitmap-filter
 * SPDX-License-Identifier: BSD-3-Clause
 * Copyright the nbdkit-dirty-bitmap-filter authors
 */

/* Grace periods.
 *
 * Sections are counted under the phase in which they were entered, 0
 * or 1.  grace_begin turns the phase, so that new sections are counted
 * under the other one, and the period ends when the count of the old
 * phase has fallen to zero.
 *
 * Why a section cannot slip through: grace_enter counts itself under
 * the phase that it read, then reads the phase again, and starts over
 * if it has turned.  All of these are sequentially consistent.  If the
 * second read still saw the old phase, the count was raised before the
 * phase turned, so whoever turned it sees the count.
 *
 * Why the count that a new phase starts with is zero: the period that
 * emptied it has ended before the next one may begin.  (A section that
 * lost the race above raises and lowers the count of a past phase for a
 * moment; this can only make a period seem longer.)
 */

#include <config.h>

#include <sched.h>
#include <time.h>

#include "grace.h"

static atomic_uint next_shard;
static _Thread_local unsigned my_shard; /* 1 + shard, or 0 if not chosen */

void
grace_init (struct grace *g)
{
  for (unsigned i = 0; i < GRACE_SHARDS; ++i) {
    atomic_init (&g->shard[i].sections[0], 0);
    atomic_init (&g->shard[i].sections[1], 0);
  }
  atomic_init (&g->phase, 0);
}

grace_ticket
grace_enter (struct grace *g)
{
  if (my_shard == 0)
    my_shard = 1 + atomic_fetch_add (&next_shard, 1) % GRACE_SHARDS;

  struct grace_counter *c = &g->shard[my_shard - 1];
  for (;;) {
    unsigned phase = atomic_load (&g->phase) & 1;

    atomic_fetch_add (&c->sections[phase], 1);
    if ((atomic_load (&g->phase) & 1) == phase)
      return phase;
    atomic_fetch_sub (&c->sections[phase], 1);
  }
}

void
grace_leave (struct grace *g, grace_ticket phase)
{
  /* A section is entered and left by one thread. */
  atomic_fetch_sub_explicit (&g->shard[my_shard - 1].sections[phase], 1,
                             memory_order_release);
}

void
grace_begin (struct grace *g)
{
  atomic_fetch_add (&g->phase, 1);
}

bool
grace_ended (struct grace *g)
{
  unsigned old = (atomic_load (&g->phase) & 1) ^ 1;

  for (unsigned i = 0; i < GRACE_SHARDS; ++i)
    if (atomic_load (&g->shard[i].sections[old]) != 0)
      return false;
  return true;
}

void
grace_synchronize (struct grace *g)
{
  grace_begin (g);
  for (unsigned tries = 0; !grace_ended (g); ++tries) {
    const struct timespec ts = { .tv_nsec = 50000 };

    if (tries < 100)
      sched_yield ();
    else
      nanosleep (&ts, NULL);
  }
}
