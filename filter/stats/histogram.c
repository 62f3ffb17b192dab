/* nbdkit-dirty-bitmap-filter
 * SPDX-License-Identifier: BSD-3-Clause
 * Copyright the nbdkit-dirty-bitmap-filter authors
 */

/* A histogram of durations: what its buckets say. */

#include <config.h>

#include "stats/histogram.h"

double
histogram_middle_ns (unsigned bucket)
{
  const unsigned step = bucket % HISTOGRAM_STEPS;
  unsigned octave;

  if (bucket < HISTOGRAM_STEPS)
    return bucket;
  octave = bucket / HISTOGRAM_STEPS - 1;
  return ((double) (HISTOGRAM_STEPS + step) + 0.5)
    * (UINT64_C (1) << octave);
}

double
histogram_quantile_ns (const uint64_t *buckets, uint64_t total,
                       unsigned thousandths)
{
  uint64_t below = 0;
  unsigned i;

  for (i = 0; i < HISTOGRAM_BUCKETS - 1; ++i) {
    below += buckets[i];
    if (below > 0 && below * 1000 >= thousandths * total)
      break;
  }
  return histogram_middle_ns (i);
}
