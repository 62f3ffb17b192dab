/* nbdkit-dirty-bitmap-filter
 * SPDX-License-Identifier: BSD-3-Clause
 * Copyright the nbdkit-dirty-bitmap-filter authors
 */

#include <config.h>

#include <stdatomic.h>

#include "common/shard.h"

static atomic_uint next_shard;
static _Thread_local unsigned my_shard; /* 1 + shard, or 0 if not chosen */

unsigned
shard_of_thread (void)
{
  if (my_shard == 0)
    my_shard = 1 + atomic_fetch_add (&next_shard, 1) % NR_SHARDS;
  return my_shard - 1;
}
