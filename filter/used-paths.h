/* nbdkit-dirty-bitmap-filter
 * SPDX-License-Identifier: BSD-3-Clause
 * Copyright the nbdkit-dirty-bitmap-filter authors
 */

#ifndef DIRTY_BITMAP_USED_PATHS_H
#define DIRTY_BITMAP_USED_PATHS_H

/* The files that nbdkit and this filter were given for various uses. */

#include <stddef.h>

struct used_path {
  const char *use;              /* as the user said it: "-P" */
  const char *path;             /* or NULL: not used */
};

/* -1, with the reason reported, if one file is to serve for two uses.
 * Call it before any of these files is made or written.
 */
extern int used_paths_check (const struct used_path *, size_t nr);

/* -1, with the reason reported, if the path is a file that is locked, as
 * this filter and QEMU lock the files of images.
 */
extern int used_paths_check_unlocked (const struct used_path *);

/* The path as it is found from any folder: nbdkit leaves the one that it
 * was started in.  The file need not exist, its folder has to.  To be
 * freed; NULL with errno.
 */
extern char *used_paths_absolute (const char *path);

#endif /* DIRTY_BITMAP_USED_PATHS_H */
