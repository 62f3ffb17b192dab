/* nbdkit-dirty-bitmap-filter
 * SPDX-License-Identifier: BSD-3-Clause
 * Copyright the nbdkit-dirty-bitmap-filter authors
 */

#ifndef DIRTY_BITMAP_GRACE_H
#define DIRTY_BITMAP_GRACE_H

/* Grace periods: a way to know that every section that was under way
 * at some moment has ended, without a lock on the way of the sections.
 *
 * A section is entered and left with one atomic addition each, on a
 * counter that few other threads share.  A grace period is begun with
 * grace_begin and has ended when grace_ended says so: then every
 * section that was entered before grace_begin has been left.
 *
 * One grace period is under way at a time; the callers of grace_begin,
 * grace_ended and grace_synchronize hold a lock of their own between
 * them.  Sections may nest in different graces, not in the same one.
 */

#include <stdatomic.h>
#include <stdbool.h>

#define GRACE_SHARDS 32

struct grace_counter {
  _Alignas (64) atomic_long sections[2];
};

struct grace {
  struct grace_counter shard[GRACE_SHARDS];
  _Alignas (64) atomic_uint phase;
};

/* What grace_enter returns and grace_leave wants back. */
typedef unsigned grace_ticket;

extern void grace_init (struct grace *);
extern grace_ticket grace_enter (struct grace *);
extern void grace_leave (struct grace *, grace_ticket);

/* Begin a grace period.  The one before it must have ended. */
extern void grace_begin (struct grace *);

/* Has the grace period begun last ended? */
extern bool grace_ended (struct grace *);

/* Begin a grace period and sleep until it ends.  Never call it from
 * inside a section of the same grace.
 */
extern void grace_synchronize (struct grace *);

#endif /* DIRTY_BITMAP_GRACE_H */
