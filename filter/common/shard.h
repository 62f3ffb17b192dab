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

/* The part of the calling thread, below NR_SHARDS. */
extern unsigned shard_of_thread (void);

#endif /* DIRTY_BITMAP_SHARD_H */
