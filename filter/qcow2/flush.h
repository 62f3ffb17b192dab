/* nbdkit-dirty-bitmap-filter
 * SPDX-License-Identifier: BSD-3-Clause
 * Copyright the nbdkit-dirty-bitmap-filter authors
 */

#ifndef DIRTY_BITMAP_QCOW2_FLUSH_H
#define DIRTY_BITMAP_QCOW2_FLUSH_H

/* Flushing the image alone (flush.c). */

#include <pthread.h>
#include <stdatomic.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "common/meter.h"

struct qcow2;

struct flush_state {
  pthread_mutex_t lock;         /* one flush at a time; protects what
                                   follows */
  unsigned long lost_redone;    /* the value of qcow2_lost up to which all
                                   losses were redone */
  atomic_ulong begun;
  unsigned long succeeded[2];   /* without hooks; with hooks, which may have
                                   failed */
  tally flushes[2], ns[2];      /* that have failed, succeeded */
};

extern int flush_metadata (struct qcow2 *);
/* Flush, and wait until released clusters are free.  Outside sections, with
 * no range lock held.
 */
extern int qcow2_reclaim (struct qcow2 *);
/* The same, but a failure is not reported as an error: the caller that needs
 * the space reports it.
 */
extern int reclaim_quietly (struct qcow2 *);

#endif /* DIRTY_BITMAP_QCOW2_FLUSH_H */
