/* nbdkit-dirty-bitmap-filter
 * SPDX-License-Identifier: BSD-3-Clause
 * Copyright the nbdkit-dirty-bitmap-filter authors
 */

#ifndef DIRTY_BITMAP_QCOW2_REPAIR_H
#define DIRTY_BITMAP_QCOW2_REPAIR_H

/* Images that are marked dirty (repair.c). */

#include <stdbool.h>

struct qcow2;

/* If the image is marked dirty, repair it; or, if check_only,
 * check whether that is possible.
 */
extern int repair_dirty (struct qcow2 *, bool check_only);

#endif /* DIRTY_BITMAP_QCOW2_REPAIR_H */
