/* nbdkit-dirty-bitmap-filter
 * SPDX-License-Identifier: BSD-3-Clause
 * Copyright the nbdkit-dirty-bitmap-filter authors
 */

#ifndef DIRTY_BITMAP_GRACE_H
#define DIRTY_BITMAP_GRACE_H

/* Grace periods: a way to know that every section that was under way at some
 * moment has ended.  Sections take no lock.
 *
 * A section is entered and left with one atomic addition each, on a counter
 * that few other threads share.  grace_begin requests a grace period.  The
 * period has ended when grace_ended says so: every section that was entered
 * before grace_begin has then been left.
 *
 * Any thread may request periods and wait for them at any time.  A grace has
 * one lock, which is taken last of all and held for a moment; no section
 * takes it.  Sections may nest if they are of different graces, not of the
 * same one.
 */

#include <pthread.h>
#include <stdatomic.h>
#include <stdbool.h>
#include <stdint.h>

#include "common/shard.h"

struct grace_counter {
  _Alignas (64) atomic_long sections[2];
};

/* Grace periods are numbered, from 1 on. */
typedef uint64_t grace_period;

struct grace {
  struct grace_counter shard[NR_SHARDS];
  _Alignas (64) _Atomic grace_period begun; /* the last, under lock */
  pthread_mutex_t lock;         /* protects what follows */
  grace_period ended;           /* the last: begun, or the one before it */
  grace_period wanted;          /* the last that was requested */
};

/* Returned by grace_enter, passed to grace_leave. */
typedef unsigned grace_ticket;

extern void grace_init (struct grace *);
extern void grace_free (struct grace *);
extern grace_ticket grace_enter (struct grace *);
extern void grace_leave (struct grace *, grace_ticket);

/* Request a grace period.  It begins at once; or, if another one is under
 * way, with the next call of any of these functions after that one has
 * ended.
 */
extern grace_period grace_begin (struct grace *);

/* Has it ended? */
extern bool grace_ended (struct grace *, grace_period);

/* Sleep until the period ends.  Never call it from inside a section of the
 * same grace.
 */
extern void grace_wait (struct grace *, grace_period);

/* Begin a period and wait until it ends. */
static inline void
grace_synchronize (struct grace *g)
{
  grace_wait (g, grace_begin (g));
}

#endif /* DIRTY_BITMAP_GRACE_H */
