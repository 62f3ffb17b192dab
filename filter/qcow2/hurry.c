/* nbdkit-dirty-bitmap-filter
 * SPDX-License-Identifier: BSD-3-Clause
 * Copyright the nbdkit-dirty-bitmap-filter authors
 */

/* Ending long requests early. */

#include <config.h>

#include "common/clock.h"
#include "qcow2/internal.h"

void
qcow2_hurry (struct qcow2 *q, unsigned grace_ms)
{
  const int64_t at = now_ns () + grace_ms * INT64_C (1000000);

  for (; q != NULL; q = q->backing.image) {
    atomic_store (&q->hurry.at, at);
    atomic_store (&q->hurry.begun, true);
  }
}

bool
is_time_up (const struct qcow2 *q)
{
  return now_ns () >= atomic_load (&q->hurry.at);
}

int
qcow2_goes_on (const struct qcow2 *q)
{
  return request_goes_on (q);
}
