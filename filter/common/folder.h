/* nbdkit-dirty-bitmap-filter
 * SPDX-License-Identifier: BSD-3-Clause
 * Copyright the nbdkit-dirty-bitmap-filter authors
 */

#ifndef DIRTY_BITMAP_FOLDER_H
#define DIRTY_BITMAP_FOLDER_H

/* The folder of a file. */

#include <string.h>

/* The folder part of a path, to be freed: "/" if that is all, "." if there is
 * none.  NULL with errno.
 */
static inline char *
folder_of (const char *path)
{
  const char *slash = strrchr (path, '/');

  return slash == NULL ? strdup (".")
    : strndup (path, slash == path ? 1 : slash - path);
}

#endif /* DIRTY_BITMAP_FOLDER_H */
