/* nbdkit-dirty-bitmap-filter
 * SPDX-License-Identifier: BSD-3-Clause
 * Copyright the nbdkit-dirty-bitmap-filter authors
 */

#ifndef DIRTY_BITMAP_QCOW2_LEAKS_H
#define DIRTY_BITMAP_QCOW2_LEAKS_H

/* Leaks that a crash has left (leaks.c). */

#include <stdatomic.h>
#include <stdbool.h>
#include <stddef.h>

struct qcow2;

struct leak;
struct leaks {
  struct leak *ranges;
  size_t nr;
  bool corrupt;                 /* refcounts are too low: no leaks are
                                   reclaimed */
  atomic_bool released;
};

/* Look for leaks before anything is changed, and give them to
 * release.c at the first change.
 */
extern void leaks_find (struct qcow2 *);
extern void leaks_release (struct qcow2 *);
extern void leaks_free (struct qcow2 *);

#endif /* DIRTY_BITMAP_QCOW2_LEAKS_H */
