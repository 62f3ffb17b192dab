/* nbdkit-dirty-bitmap-filter
 * SPDX-License-Identifier: BSD-3-Clause
 * Copyright the nbdkit-dirty-bitmap-filter authors
 */

/* How many messages of one kind are shown within a period. */

#include <config.h>

#include <assert.h>

#include "common/cleanup.h"
#include "common/clock.h"
#include "common/limit.h"
#include "common/lock.h"

unsigned limit_period_ms = 60 * 1000;

void
limit_init (struct limit *l)
{
  *l = (struct limit) LIMIT_INITIALIZER;
}

void
limit_destroy (struct limit *l)
{
  pthread_mutex_destroy (&l->lock);
}

/* Called with the lock. */
static unsigned
end_period (struct limit *l)
{
  const unsigned hidden = l->nr > LIMIT_AT_ONCE ? l->nr - LIMIT_AT_ONCE : 0;

  assert (lock_is_mine (&l->lock));
  l->nr = 0;
  return hidden;
}

bool
limit_admits (struct limit *l, unsigned *nr_hidden)
{
  const int64_t now = now_ms ();

  *nr_hidden = 0;
  ACQUIRE_LOCK_FOR_CURRENT_SCOPE (&l->lock);
  if (l->nr == 0 || now - l->since >= limit_period_ms) {
    *nr_hidden = end_period (l);
    l->since = now;
  }
  return ++l->nr <= LIMIT_AT_ONCE;
}

unsigned
limit_end (struct limit *l)
{
  ACQUIRE_LOCK_FOR_CURRENT_SCOPE (&l->lock);
  return end_period (l);
}
