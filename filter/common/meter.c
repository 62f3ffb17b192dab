/* nbdkit-dirty-bitmap-filter
 * SPDX-License-Identifier: BSD-3-Clause
 * Copyright the nbdkit-dirty-bitmap-filter authors
 */

#include <config.h>

#include <time.h>

#include "common/meter.h"

bool meter_is_on;

static atomic_uint next_shard;
static _Thread_local unsigned my_shard; /* 1 + shard, or 0 if not chosen */

uint64_t
meter_clock (void)
{
  struct timespec ts;

  if (!meter_wanted ())
    return 0;
  clock_gettime (CLOCK_MONOTONIC, &ts);
  return (uint64_t) ts.tv_sec * 1000000000 + ts.tv_nsec;
}

unsigned
meter_shard (void)
{
  if (my_shard == 0)
    my_shard = 1 + atomic_fetch_add (&next_shard, 1) % METER_SHARDS;
  return my_shard - 1;
}

void
meter_add (struct meter *m, uint64_t n)
{
  atomic_fetch_add_explicit (&m->shard[meter_shard ()].count, n,
                             memory_order_relaxed);
}

uint64_t
meter_total (const struct meter *m)
{
  uint64_t n = 0;

  for (unsigned i = 0; i < METER_SHARDS; ++i)
    n += atomic_load_explicit (&m->shard[i].count, memory_order_relaxed);
  return n;
}
