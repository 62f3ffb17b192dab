/* nbdkit-dirty-bitmap-filter
 * SPDX-License-Identifier: BSD-3-Clause
 * Copyright the nbdkit-dirty-bitmap-filter authors
 */

#ifndef DIRTY_BITMAP_METER_H
#define DIRTY_BITMAP_METER_H

/* Counters for statistics that the user requested.
 *
 * A counter that has one writer at a time (one thread, or the holders of a
 * lock that is taken anyway) is incremented by a plain addition (tally_add),
 * always.  A counter of the fast path, which many threads increment at once,
 * is incremented only while meter_is_on, in a part that few other threads
 * share (struct meter).  The clock is read only while meter_is_on.
 *
 * Counters may be read at any time.  Counters that belong together are not
 * read at one moment.
 */

#include <stdatomic.h>
#include <stdbool.h>
#include <stdint.h>

#include "common/shard.h"

/* Set before other threads begin, and never changed by them. */
extern bool meter_is_on;

static inline bool
meter_wanted (void)
{
  return __builtin_expect (meter_is_on, 0);
}

/* Nanoseconds since some moment, or 0 if not meter_is_on. */
extern uint64_t meter_clock (void);

/* Has one writer at a time. */
typedef _Atomic uint64_t tally;

static inline uint64_t
tally_get (const tally *t)
{
  return atomic_load_explicit (t, memory_order_relaxed);
}

static inline void
tally_add (tally *t, uint64_t n)
{
  atomic_store_explicit (t, tally_get (t) + n, memory_order_relaxed);
}

/* Has many writers. */
struct meter {
  struct {
    _Alignas (64) _Atomic uint64_t count;
  } shard[NR_SHARDS];
};

extern void meter_add (struct meter *, uint64_t n);
extern uint64_t meter_total (const struct meter *);

#endif /* DIRTY_BITMAP_METER_H */
