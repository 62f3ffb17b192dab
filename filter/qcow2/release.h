/* nbdkit-dirty-bitmap-filter
 * SPDX-License-Identifier: BSD-3-Clause
 * Copyright the nbdkit-dirty-bitmap-filter authors
 */

#ifndef DIRTY_BITMAP_QCOW2_RELEASE_H
#define DIRTY_BITMAP_QCOW2_RELEASE_H

/* Clusters on their way from used to free (release.c). */

#include <pthread.h>
#include <stdatomic.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "common/grace.h"

struct qcow2;

struct release_range {
  uint64_t cluster, nr;
};

struct release_list {
  struct release_range *ranges;
  size_t nr, max;
  uint64_t nr_clusters;
};

struct releases {
  pthread_mutex_t lock;         /* protects the lists that follow */
  struct release_list released; /* no longer referred to, in RAM */
  struct release_list flushing; /* the flush under way makes it durable */
  struct release_list durable;  /* no longer referred to, on disk */
  struct release_list waiting;  /* for the requests that might use them */
  bool grace_under_way;
  grace_period retiring;        /* the period that waiting waits for */
  atomic_size_t pending_ranges;         /* in all lists */
  _Atomic uint64_t pending_clusters;
};

extern void release_clusters (struct qcow2 *, uint64_t cluster, uint64_t nr);
/* Call before an L2 entry is replaced.  -1 with EIO if it refers to
 * something that cannot be guest data.
 */
extern int release_check_entry (struct qcow2 *, uint64_t entry);
/* An L2 entry no longer refers to its clusters. */
extern void release_entry (struct qcow2 *, uint64_t entry);
extern void release_flush_begins (struct qcow2 *);
extern void release_flush_ends (struct qcow2 *, bool success);
/* Free the clusters that can be freed now, or (wait) once the requests that
 * might use them are done.  -1, with a warning, if some could not be freed:
 * these are kept.  Under flush.lock.
 */
extern int release_retire (struct qcow2 *, bool wait);
/* Forget the clusters that could not be freed. */
extern void release_forget (struct qcow2 *);
/* Should the caller, outside any section, call qcow2_reclaim? */
extern bool release_wants_reclaim (struct qcow2 *);
extern bool release_is_empty (struct qcow2 *);
extern void release_free (struct qcow2 *);

#endif /* DIRTY_BITMAP_QCOW2_RELEASE_H */
