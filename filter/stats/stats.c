/* nbdkit-dirty-bitmap-filter
 * SPDX-License-Identifier: BSD-3-Clause
 * Copyright the nbdkit-dirty-bitmap-filter authors
 */

/* Counting requests and connections.
 *
 * Requests are counted in shards, over which threads are spread: so an
 * addition hardly ever waits for another processor's cache.  A request costs
 * three additions and two readings of the clock.  Only the parts of a
 * histogram in which durations fall take memory.
 *
 * The number of requests is the number of durations, and the requests that
 * did not fail are the successes.  So a failed request is counted as a
 * duration first (release), and a thread that sums reads the failures first
 * (acquire): it never finds more failures than requests.
 */

#include <config.h>

#include <errno.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>

#include "stats/internal.h"

struct stats *
stats_new (void)
{
  struct stats *s = mmap (NULL, sizeof *s, PROT_READ | PROT_WRITE,
                          MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);

  if (s == MAP_FAILED)
    return NULL;
  clock_gettime (CLOCK_REALTIME, &s->started);
  return s;
}

void
stats_free (struct stats *s)
{
  if (s != NULL)
    munmap (s, sizeof *s);
}

static enum stats_result
result_of (int err)
{
  switch (err) {
  case 0:
    return STATS_SUCCESS;
  case EPERM:
  case EROFS:
    return STATS_EPERM;
  case EIO:
    return STATS_EIO;
  case ENOMEM:
    return STATS_ENOMEM;
  case ENOSPC:
  case EFBIG:
  case EDQUOT:
    return STATS_ENOSPC;
  case EOVERFLOW:
    return STATS_EOVERFLOW;
  case ENOTSUP:
#if EOPNOTSUPP != ENOTSUP
  case EOPNOTSUPP:
#endif
    return STATS_ENOTSUP;
  case ESHUTDOWN:
    return STATS_ESHUTDOWN;
  default:
    return STATS_EINVAL;
  }
}

static void
add (_Atomic uint64_t *counter, uint64_t n)
{
  atomic_fetch_add_explicit (counter, n, memory_order_relaxed);
}

void
stats_count_request (struct stats *s, uint64_t began,
                     enum stats_command command, uint64_t bytes, int err)
{
  struct stats_requests *r = &s->shard[shard_of_thread ()].requests[command];
  const uint64_t ns = meter_clock () - began;

  add (&r->duration[histogram_bucket (ns)], 1);
  add (&r->sum_ns, ns);
  if (__builtin_expect (err == 0, 1))
    add (&r->bytes, bytes);
  else
    atomic_fetch_add_explicit (&r->failed[result_of (err)], 1,
                               memory_order_release);
}

void
stats_sum (const struct stats *s, enum stats_command command,
           struct stats_totals *t)
{
  uint64_t failed = 0;

  memset (t, 0, sizeof *t);
  for (unsigned i = 0; i < NR_SHARDS; ++i) {
    const struct stats_requests *r = &s->shard[i].requests[command];

    for (unsigned j = STATS_SUCCESS + 1; j < STATS_NR_RESULTS; ++j)
      t->count[j] += atomic_load_explicit (&r->failed[j],
                                           memory_order_acquire);
    for (unsigned j = 0; j < HISTOGRAM_BUCKETS; ++j)
      t->duration[j] += tally_get (&r->duration[j]);
    t->sum_ns += tally_get (&r->sum_ns);
    t->bytes += tally_get (&r->bytes);
  }
  for (unsigned j = STATS_SUCCESS + 1; j < STATS_NR_RESULTS; ++j)
    failed += t->count[j];
  for (unsigned j = 0; j < HISTOGRAM_BUCKETS; ++j)
    t->all += t->duration[j];
  t->count[STATS_SUCCESS] = t->all - failed;
}

void
stats_connection_opened (struct stats *s)
{
  if (s == NULL)
    return;
  atomic_fetch_add (&s->connections, 1);
  add (&s->accepted, 1);
}

void
stats_connection_closed (struct stats *s)
{
  if (s != NULL)
    atomic_fetch_sub (&s->connections, 1);
}

void
stats_connection_refused (struct stats *s)
{
  if (s != NULL)
    add (&s->refused, 1);
}
