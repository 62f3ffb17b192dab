/* nbdkit-dirty-bitmap-filter
 * SPDX-License-Identifier: BSD-3-Clause
 * Copyright the nbdkit-dirty-bitmap-filter authors
 */

#ifndef DIRTY_BITMAP_CLOCK_H
#define DIRTY_BITMAP_CLOCK_H

/* A monotonic clock with an arbitrary start, for deadlines and durations. */

#include <stdint.h>
#include <time.h>

static inline int64_t
now_ns (void)
{
  struct timespec ts;

  clock_gettime (CLOCK_MONOTONIC, &ts);
  return ts.tv_sec * INT64_C (1000000000) + ts.tv_nsec;
}

static inline int64_t
now_ms (void)
{
  return now_ns () / 1000000;
}

#endif /* DIRTY_BITMAP_CLOCK_H */
