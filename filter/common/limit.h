/* nbdkit-dirty-bitmap-filter
 * SPDX-License-Identifier: BSD-3-Clause
 * Copyright the nbdkit-dirty-bitmap-filter authors
 */

#ifndef DIRTY_BITMAP_LIMIT_H
#define DIRTY_BITMAP_LIMIT_H

/* How many messages of one kind are shown: LIMIT_AT_ONCE of them within
 * limit_period_ms.  The next that is shown after that period comes with the
 * number of those that were not, and so does the end.
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

/* Is one more to be shown?  If so, *nr_hidden is how many were not, in the
 * period that has ended now, or 0.
 */
extern bool limit_admits (struct limit *, unsigned *nr_hidden);

/* How many were not shown in the period at hand?  It ends. */
extern unsigned limit_end (struct limit *);

#endif /* DIRTY_BITMAP_LIMIT_H */
