/* nbdkit-dirty-bitmap-filter
 * SPDX-License-Identifier: BSD-3-Clause
 * Copyright the nbdkit-dirty-bitmap-filter authors
 */

#ifndef DIRTY_BITMAP_LIMIT_H
#define DIRTY_BITMAP_LIMIT_H

/* Limits how many messages of one kind are shown: LIMIT_AT_ONCE of them
 * within limit_period_ms.  The number of suppressed messages is reported
 * with the next message after that period, and at the end.
 */

#include <pthread.h>
#include <stdbool.h>
#include <stdint.h>

#define LIMIT_AT_ONCE 10

/* A minute.  Variable for the unit tests. */
extern unsigned limit_period_ms;

struct limit {
  pthread_mutex_t lock;         /* protects the others, taken last of all */
  int64_t since;                /* when the period began */
  unsigned nr;                  /* messages in it */
};

#define LIMIT_INITIALIZER { .lock = PTHREAD_MUTEX_INITIALIZER }

extern void limit_init (struct limit *);
extern void limit_destroy (struct limit *);

/* May one more message be shown?  If so, *nr_hidden is the number of
 * messages that were suppressed in the period that has just ended, or 0.
 */
extern bool limit_admits (struct limit *, unsigned *nr_hidden);

/* End the current period.  Returns how many messages it suppressed. */
extern unsigned limit_end (struct limit *);

#endif /* DIRTY_BITMAP_LIMIT_H */
