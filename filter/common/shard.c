/* nbdkit-dirty-bitmap-filter
 * SPDX-License-Identifier: BSD-3-Clause
 * Copyright the nbdkit-dirty-bitmap-filter authors
 */

/* The part of a shared counter that a thread adds to. */

#include <config.h>

#include <stdatomic.h>

#include "common/shard.h"

_Thread_local unsigned chosen_shard;

unsigned
choose_shard (void)
{
  static atomic_uint next;

  chosen_shard = 1 + atomic_fetch_add (&next, 1) % NR_SHARDS;
  return chosen_shard - 1;
}
