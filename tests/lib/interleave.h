/* nbdkit-dirty-bitmap-filter
 * SPDX-License-Identifier: BSD-3-Clause
 * Copyright the nbdkit-dirty-bitmap-filter authors
 */

#ifndef DIRTY_BITMAP_TEST_INTERLEAVE_H
#define DIRTY_BITMAP_TEST_INTERLEAVE_H

/* Two threads, each stopped at a chosen place, so that their requests
 * meet in a chosen way.
 *
 * A place is a moment before or after a call of the container.  An actor
 * that is not stopped runs as far as it can: to its end, or until it
 * sleeps because of what the other one holds.
 */

#include <pthread.h>
#include <stdbool.h>
#include <sys/types.h>

struct container;

/* A container whose calls are the places.  It closes the one below. */
extern struct container *gate_open (struct container *below);

#define NEVER (-1)

struct actor {
  void (*act) (void *opaque);
  void *opaque;
  int stop_at;                  /* the place, from 0 on, or NEVER */

  pthread_t id;
  _Atomic pid_t tid;            /* 0 until it runs */
  int places;                   /* passed so far */
  bool stopped, go, done;
};

/* Start it, and wait until it has come as far as it can. */
extern void actor_start (struct actor *);

/* Has it been stopped at its place, or ended before? */
extern bool actor_is_stopped (struct actor *);
extern bool actor_is_done (struct actor *);

/* Let it go on from its place, as far as it can; and to its end. */
extern void actor_go_on (struct actor *);
extern void actor_join (struct actor *);

/* Let two actors meet in all ways.  First the one is stopped at some
 * place of its own; the other one runs from its beginning to some place,
 * as far as it can; then the one, then the other one.  prepare is called
 * before each meeting, and check after it.  Of the places of each every
 * stride-th is chosen.  Returns how many meetings there were.
 */
struct meeting {
  void (*prepare) (void *opaque);
  void (*act[2]) (void *opaque);
  void (*check) (void *opaque, int first_place, int second_place);
  void *opaque;
};
extern unsigned meet_in_all_ways (const struct meeting *, unsigned first_stride,
                                  unsigned second_stride);

#endif /* DIRTY_BITMAP_TEST_INTERLEAVE_H */
