/* nbdkit-dirty-bitmap-filter
 * SPDX-License-Identifier: BSD-3-Clause
 * Copyright the nbdkit-dirty-bitmap-filter authors
 */

#ifndef DIRTY_BITMAP_USED_PATHS_H
#define DIRTY_BITMAP_USED_PATHS_H

/* The files that nbdkit and this filter were given for various uses. */

#include <stddef.h>

struct used_path {
  const char *use;              /* as the user wrote it: "-P" */
  const char *path;             /* or NULL: not used */
};

/* -1, with the reason reported, if one file is given for two uses.  Call it
 * before any of these files is created or written.
 */
extern int used_paths_check (const struct used_path *, size_t nr);

/* -1, with the reason reported, if the path is a file that is locked in the
 * way that this filter and QEMU lock image files.
 */
extern int used_paths_check_unlocked (const struct used_path *);

/* The path made absolute, since nbdkit leaves the directory that it was
 * started in.  The file need not exist, but its folder must.  For the caller
 * to free; NULL with errno.
 */
extern char *used_paths_absolute (const char *path);

#endif /* DIRTY_BITMAP_USED_PATHS_H */
