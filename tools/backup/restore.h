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

#include "backup/copy.h"
#include "backup/stack.h"

/* Give all of the disk to a sink, from its beginning to its end. */
extern int restore_disk (const struct stack *, uint64_t size,
                         const struct copy_sink *, struct progress *);

/* Make an image of it, durably, in an empty file. */
extern int restore_to_qcow2 (const struct stack *, uint64_t size, int fd,
                             bool compress, struct progress *);

#endif /* DIRTY_BITMAP_BACKUP_RESTORE_H */
