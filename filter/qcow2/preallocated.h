/* nbdkit-dirty-bitmap-filter
 * SPDX-License-Identifier: BSD-3-Clause
 * Copyright the nbdkit-dirty-bitmap-filter authors
 */

#ifndef DIRTY_BITMAP_QCOW2_PREALLOCATED_H
#define DIRTY_BITMAP_QCOW2_PREALLOCATED_H

/* Was the image preallocated without its data (preallocated.c)? */

#include <pthread.h>
#include <stdatomic.h>
#include <stdbool.h>

struct qcow2;

struct preallocated {
  pthread_mutex_t lock;         /* held while finding this out */
  atomic_int known;
};

/* Does the image have far more clusters than storage for
 * them, so that asking the storage which of them are zeroes is worthwhile?
 */
extern bool is_preallocated (struct qcow2 *);

#endif /* DIRTY_BITMAP_QCOW2_PREALLOCATED_H */
