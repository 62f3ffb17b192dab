/* nbdkit-dirty-bitmap-filter
 * SPDX-License-Identifier: BSD-3-Clause
 * Copyright the nbdkit-dirty-bitmap-filter authors
 */

#ifndef DIRTY_BITMAP_SOAK_LIVES_H
#define DIRTY_BITMAP_SOAK_LIVES_H

#include <stdbool.h>

#include "peer.h"

/* One connection from birth to end.  False if the server has ended,
 * which it may only if the model says that it stops.
 */
extern bool live (struct peer *, const struct address *);

#endif /* DIRTY_BITMAP_SOAK_LIVES_H */
