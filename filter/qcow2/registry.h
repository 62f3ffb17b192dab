/* nbdkit-dirty-bitmap-filter
 * SPDX-License-Identifier: BSD-3-Clause
 * Copyright the nbdkit-dirty-bitmap-filter authors
 */

#ifndef DIRTY_BITMAP_QCOW2_REGISTRY_H
#define DIRTY_BITMAP_QCOW2_REGISTRY_H

/* Which clusters hold metadata (registry.c). */

#include <pthread.h>
#include <stdatomic.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "qcow2/qcow2.h"

struct qcow2;

struct registry_table;
struct registry {
  pthread_mutex_t lock;         /* protects changes */
  _Atomic (struct registry_table *) table;
};

extern int registry_init (struct qcow2 *);
extern void registry_free (struct qcow2 *);
extern enum qcow2_class registry_class (struct qcow2 *, uint64_t cluster);
/* -1 with ENOMEM. */
extern int registry_set (struct qcow2 *, enum qcow2_class,
                         uint64_t cluster, uint64_t nr_clusters);
extern const char *registry_class_name (enum qcow2_class);

#endif /* DIRTY_BITMAP_QCOW2_REGISTRY_H */
