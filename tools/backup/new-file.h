/* nbdkit-dirty-bitmap-filter
 * SPDX-License-Identifier: BSD-3-Clause
 * Copyright the nbdkit-dirty-bitmap-filter authors
 */

#ifndef DIRTY_BITMAP_BACKUP_NEW_FILE_H
#define DIRTY_BITMAP_BACKUP_NEW_FILE_H

/* A file that gets its name when it is whole (new-file.c).
 *
 * Functions return 0, or -1 with the reason reported.
 */

#include <stdbool.h>

struct new_file {
  const char *target;           /* the name that it will have */
  char *name;                   /* while it is written */
  int fd;                       /* for reading and writing, and empty */
};

/* Fail if there is such a file already, and force is false, or if it is not a
 * file.
 */
extern int new_file_check (const char *target, bool force);

/* target is kept, not copied. */
extern int new_file_create (struct new_file *, const char *target);

/* Give it its name, if success is true: in place of another file only if
 * force is.  Else, and if that fails, remove it.
 */
extern int new_file_end (struct new_file *, bool success, bool force);

#endif /* DIRTY_BITMAP_BACKUP_NEW_FILE_H */
