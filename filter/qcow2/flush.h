/* nbdkit-dirty-bitmap-filter
 * SPDX-License-Identifier: BSD-3-Clause
 * Copyright the nbdkit-dirty-bitmap-filter authors
 */

#ifndef DIRTY_BITMAP_QCOW2_FLUSH_H
#define DIRTY_BITMAP_QCOW2_FLUSH_H

/* The state of flushing (flush.c).  steps.h has what disk/ calls. */

#include <pthread.h>
#include <stdatomic.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "common/meter.h"
#include "qcow2/mapping.h"

struct l2_copy;
struct qcow2;

/* The flush under way. */
struct flush {
  uint64_t number;              /* how many had begun, with this one */
  uint64_t began;               /* meter_clock */
  unsigned long lost;           /* failed barriers, before it began */
  struct l1_copies l1;
  struct l2_copy *copies;       /* of all rounds: pinned until the end */
  size_t nr_copies, max_copies;
  size_t nr_unwritten;          /* the last of them, of this round */
  uint8_t *data;                /* of this round's copies */
  size_t round;                 /* how many fit into data */
  size_t next_set;
};

struct flush_state {
  pthread_mutex_t lock;         /* one flush at a time; protects what
                                   follows */
  struct flush now;
  unsigned long lost_redone;    /* the value of qcow2_lost up to which all
                                   losses were redone */
  _Atomic uint64_t begun;
  uint64_t succeeded[2];        /* the last flush that has: without bitmaps;
                                   with bitmaps, which may have failed */
  tally flushes[2], ns[2];      /* that have failed, succeeded */
};

/* With the lock held: flush the image without its bitmaps. */
extern int flush_alone (struct qcow2 *);

/* stop.c: flush, and wait until released clusters are free.  Outside
 * sections, with no range lock held.
 */
extern int qcow2_reclaim (struct qcow2 *);

#endif /* DIRTY_BITMAP_QCOW2_FLUSH_H */
