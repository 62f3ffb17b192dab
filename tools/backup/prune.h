/* nbdkit-dirty-bitmap-filter
 * SPDX-License-Identifier: BSD-3-Clause
 * Copyright the nbdkit-dirty-bitmap-filter authors
 */

#ifndef DIRTY_BITMAP_BACKUP_PRUNE_H
#define DIRTY_BITMAP_BACKUP_PRUNE_H

#include <stdbool.h>

struct repository;

/* Go on with a merge that was interrupted, or undo it: in the list that was
 * read, and if change is set in the repository.  0, or -1 with the reason
 * reported.
 */
extern int prune_complete (struct repository *, bool change);

#endif /* DIRTY_BITMAP_BACKUP_PRUNE_H */
