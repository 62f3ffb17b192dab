/* nbdkit-dirty-bitmap-filter
 * SPDX-License-Identifier: BSD-3-Clause
 * Copyright the nbdkit-dirty-bitmap-filter authors
 */

/* Counters for the statistics, and their clock. */

#include <config.h>

#include "common/clock.h"
#include "common/meter.h"

bool meter_is_on;

uint64_t
meter_clock (void)
{
  return meter_wanted () ? now_ns () : 0;
}

void
meter_add (struct meter *m, uint64_t n)
{
  atomic_fetch_add_explicit (&m->shard[shard_of_thread ()].count, n,
                             memory_order_relaxed);
}

uint64_t
meter_total (const struct meter *m)
{
  uint64_t n = 0;

  for (unsigned i = 0; i < NR_SHARDS; ++i)
    n += atomic_load_explicit (&m->shard[i].count, memory_order_relaxed);
  return n;
}
