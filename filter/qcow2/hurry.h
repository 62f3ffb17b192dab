/* nbdkit-dirty-bitmap-filter
 * SPDX-License-Identifier: BSD-3-Clause
 * Copyright the nbdkit-dirty-bitmap-filter authors
 */

#ifndef DIRTY_BITMAP_QCOW2_HURRY_H
#define DIRTY_BITMAP_QCOW2_HURRY_H

/* Ending long requests early (hurry.c). */

#include <stdatomic.h>
#include <stdbool.h>
#include <stdint.h>

struct qcow2;

struct hurry {
  atomic_bool begun;            /* long requests must end, from `at` on */
  _Atomic int64_t at;           /* now_ns */
};

extern bool is_time_up (const struct qcow2 *);

#endif /* DIRTY_BITMAP_QCOW2_HURRY_H */
