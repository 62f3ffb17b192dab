/* nbdkit-dirty-bitmap-filter
 * SPDX-License-Identifier: BSD-3-Clause
 * Copyright the nbdkit-dirty-bitmap-filter authors
 */

#ifndef DIRTY_BITMAP_BACKUP_COMMANDS_H
#define DIRTY_BITMAP_BACKUP_COMMANDS_H

/* The commands.  They return 0, or -1 with the reason reported. */

#include "backup/backup.h"

extern int command_backup (const struct settings *, const char *uri,
                           const char *repository);
extern int command_list (const struct settings *, const char *repository);
extern int command_verify (const struct settings *, const char *repository);

/* place is REPOSITORY or REPOSITORY@N; target a file or an NBD URI. */
extern int command_restore (const struct settings *, const char *place,
                            const char *target);
extern int command_prune (const struct settings *, const char *repository);

/* target is an SVG file, or "-" for stdout. */
extern int command_map (const struct settings *, const char *uri,
                        const char *target);

#endif /* DIRTY_BITMAP_BACKUP_COMMANDS_H */
