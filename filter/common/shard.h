/* nbdkit-dirty-bitmap-filter
 * SPDX-License-Identifier: BSD-3-Clause
 * Copyright the nbdkit-dirty-bitmap-filter authors
 */

#ifndef DIRTY_BITMAP_SHARD_H
#define DIRTY_BITMAP_SHARD_H

/* Counters that many threads add to are kept in NR_SHARDS parts, each on
 * a cache line of its own.  A thread always uses the same part, and few
 * other threads share it.
 */

#define NR_SHARDS 32

/* 1 + the part of the calling thread, or 0 if none is chosen yet. */
extern _Thread_local unsigned chosen_shard;
extern unsigned choose_shard (void);

/* The part of the calling thread, below NR_SHARDS.  Each request asks for
 * it several times.
 */
static inline unsigned
shard_of_thread (void)
{
  return chosen_shard != 0 ? chosen_shard - 1 : choose_shard ();
}

#endif /* DIRTY_BITMAP_SHARD_H */
