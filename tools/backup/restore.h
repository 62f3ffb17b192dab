/* nbdkit-dirty-bitmap-filter
 * SPDX-License-Identifier: BSD-3-Clause
 * Copyright the nbdkit-dirty-bitmap-filter authors
 */

#ifndef DIRTY_BITMAP_BACKUP_RESTORE_H
#define DIRTY_BITMAP_BACKUP_RESTORE_H

/* Reading the disk of a point, for --restore and --prune.  Functions return
 * 0, or -1 with the reason reported (none if it was interrupted).
 */

#include <stdbool.h>
#include <stdint.h>

#include "backup/checksum.h"
#include "backup/stack.h"

struct progress;

/* Make an image of the disk, durably, in an empty file, and its checksum
 * unless that is NULL.
 */
extern int restore_to_qcow2 (const struct stack *, uint64_t size, int fd,
                             bool compress, struct progress *,
                             struct checksum *);

#endif /* DIRTY_BITMAP_BACKUP_RESTORE_H */
