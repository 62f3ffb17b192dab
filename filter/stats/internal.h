/* nbdkit-dirty-bitmap-filter
 * SPDX-License-Identifier: BSD-3-Clause
 * Copyright the nbdkit-dirty-bitmap-filter authors
 */

#ifndef DIRTY_BITMAP_STATS_INTERNAL_H
#define DIRTY_BITMAP_STATS_INTERNAL_H

/* What the files of this room share.
 *
 *   stats.c       counting requests and connections
 *   histogram.c   durations by their size
 *   numbers.c     all that is told
 *   exposition.c  writing it in Prometheus's format
 */

#include <stdatomic.h>
#include <stdint.h>
#include <time.h>

#include "common/meter.h"
#include "stats/histogram.h"
#include "stats/stats.h"

/* The protocol's error values, and success. */
enum stats_result {
  STATS_SUCCESS,
  STATS_EPERM,
  STATS_EIO,
  STATS_ENOMEM,
  STATS_EINVAL,
  STATS_ENOSPC,
  STATS_EOVERFLOW,
  STATS_ENOTSUP,
  STATS_ESHUTDOWN,
  STATS_NR_RESULTS,
};

struct stats_requests {
  _Atomic uint64_t duration[HISTOGRAM_BUCKETS];
  _Atomic uint64_t sum_ns;
  _Atomic uint64_t bytes;
  _Atomic uint64_t failed[STATS_NR_RESULTS]; /* unused for STATS_SUCCESS */
};

/* The counters of some of the threads. */
struct stats_shard {
  _Alignas (64) struct stats_requests requests[STATS_NR_COMMANDS];
};

struct stats {
  struct timespec started;      /* CLOCK_REALTIME */
  atomic_long connections;      /* open */
  _Atomic uint64_t accepted;
  _Atomic uint64_t refused;
  struct stats_shard shard[NR_SHARDS];
};

/* The sum over the shards. */
struct stats_totals {
  uint64_t duration[HISTOGRAM_BUCKETS];
  uint64_t sum_ns;
  uint64_t bytes;
  uint64_t count[STATS_NR_RESULTS];
  uint64_t all;                 /* whatever the result */
};
extern void stats_sum (const struct stats *, enum stats_command,
                       struct stats_totals *);

#endif /* DIRTY_BITMAP_STATS_INTERNAL_H */
