/* nbdkit-dirty-bitmap-filter
 * SPDX-License-Identifier: BSD-3-Clause
 * Copyright the nbdkit-dirty-bitmap-filter authors
 */

#ifndef DIRTY_BITMAP_STATS_HISTOGRAM_H
#define DIRTY_BITMAP_STATS_HISTOGRAM_H

/* A histogram of durations, in nanoseconds: every power of two is split into
 * HISTOGRAM_STEPS buckets of the same width, so that the relative error of a
 * duration is at most 1/64.  Durations of less than HISTOGRAM_STEPS
 * nanoseconds have a bucket each, and those of more than 18 minutes share
 * the last.
 */

#include <stdatomic.h>
#include <stdint.h>

#define HISTOGRAM_STEP_BITS 5
#define HISTOGRAM_STEPS (1 << HISTOGRAM_STEP_BITS)
#define HISTOGRAM_MAX_BITS 40
#define HISTOGRAM_BUCKETS                                               \
  ((HISTOGRAM_MAX_BITS - HISTOGRAM_STEP_BITS + 1) * HISTOGRAM_STEPS)

static inline unsigned
histogram_bucket (uint64_t ns)
{
  unsigned octave;

  if (ns >= UINT64_C (1) << HISTOGRAM_MAX_BITS)
    return HISTOGRAM_BUCKETS - 1;
  if (ns < HISTOGRAM_STEPS)
    return ns;
  octave = 63 - __builtin_clzll (ns) - HISTOGRAM_STEP_BITS;
  return (octave + 1) * HISTOGRAM_STEPS
    + (ns >> octave) % HISTOGRAM_STEPS;
}

/* The middle of a bucket. */
extern double histogram_middle_ns (unsigned bucket);

/* Of the total durations counted in buckets: the duration that so many
 * thousandths of them do not exceed.  total is not 0.
 */
extern double histogram_quantile_ns (const uint64_t *buckets, uint64_t total,
                                     unsigned thousandths);

#endif /* DIRTY_BITMAP_STATS_HISTOGRAM_H */
