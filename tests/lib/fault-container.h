/* nbdkit-dirty-bitmap-filter
 * SPDX-License-Identifier: BSD-3-Clause
 * Copyright the nbdkit-dirty-bitmap-filter authors
 */

#ifndef DIRTY_BITMAP_TEST_FAULT_CONTAINER_H
#define DIRTY_BITMAP_TEST_FAULT_CONTAINER_H

/* A container in memory that counts its calls, fails those that it is
 * told to, or has only so much space, and knows what of it would outlive
 * a power cut.
 */

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "crash-container.h"

struct container;

/* Kinds of calls, as bits. */
enum {
  FAULT_READ = 1,
  FAULT_WRITE = 2,
  FAULT_ZERO = 4,
  FAULT_FLUSH = 8,
  FAULT_GROW = 16,
  FAULT_TRUNCATE = 32,
  FAULT_READ_BELOW = 64,        /* a read of a store for backing files */
  FAULT_CHANGES = FAULT_WRITE | FAULT_ZERO | FAULT_FLUSH | FAULT_GROW |
                  FAULT_TRUNCATE,
  FAULT_ALL = FAULT_READ | FAULT_READ_BELOW | FAULT_CHANGES,
};

enum fault_done { DONE_NOTHING, DONE_HALF, DONE_WHOLE };

/* Which calls fail, and how. */
struct fault_plan {
  unsigned kinds;               /* that are counted, and fail */
  size_t first;                 /* of those, from 0 on */
  bool for_good;                /* it, and all of them after it */
  bool thin;                    /* only those that need storage which is
                                   not there yet are counted */
  int error;
  enum fault_done done;         /* by the first that fails, if it writes
                                   or zeroes: half is a whole number of
                                   sectors */
  bool loses;                   /* a barrier that fails loses for ever what
                                   it was for: it reads back, but no
                                   barrier makes it durable */
  uint64_t limit;               /* the size of the first store can not
                                   exceed this, 0: none */

  /* A full file system: nothing else fails, but of the blocks of storage
   * that the stores do not have in the beginning they get no more than
   * `first`.  Punching gives blocks back.
   */
  bool space;
  unsigned block;               /* bytes of one, 0: 4096 */
  bool sparse;                  /* a block that is zero in the beginning is
                                   a hole */
  bool provisions;              /* zeroes that do not punch get blocks */
};

struct fault_store {
  struct fault_store *first;    /* whose plan it shares, and counters */
  bool is_below;
  struct crash_image live;      /* as it reads */
  struct crash_image durable;   /* what the last barrier left, at least */
  struct fault_plan plan;
  bool paused;                  /* nothing fails, nothing is counted */
  size_t counted;               /* calls, of the kinds of the plan; or the
                                   most blocks that were taken at once */
  size_t taken;                 /* blocks, now */
  size_t nr_failed;             /* calls that were made to fail */
  bool is_first;                /* the last of them was the first */
  size_t nr_lost;               /* barriers among them */
  size_t nr_own_failed;         /* calls of this store that failed, and */
  size_t nr_own_lost;           /* barriers */
  void (*written) (void *);     /* if not NULL, called after each write */
  void *opaque;                 /* what it is called with */
  uint8_t *pending;             /* by sector: no barrier since the write */
  uint8_t *backed;              /* by block: it has storage */
};

/* An image can grow to its room.  first is NULL, or another store: one
 * plan fails the calls of both, each in its turn.
 */
extern struct fault_store *fault_store_new (uint64_t room,
                                            struct fault_store *first);
extern void fault_store_free (struct fault_store *);

/* Begin with an image, durable, and a plan (the first store's counts). */
extern void fault_store_reset (struct fault_store *,
                               const struct crash_image *,
                               const struct fault_plan *);
/* The fault has ended. */
extern void fault_store_heal (struct fault_store *);

/* Closing it leaves the store, and it can be opened again after that. */
extern struct container *fault_container_open (struct fault_store *);

/* An image that is only looked at. */
extern struct container *fault_container_view (const struct crash_image *);

#endif /* DIRTY_BITMAP_TEST_FAULT_CONTAINER_H */
