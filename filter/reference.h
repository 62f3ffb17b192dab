/* nbdkit-dirty-bitmap-filter
 * SPDX-License-Identifier: BSD-3-Clause
 * Copyright the nbdkit-dirty-bitmap-filter authors
 */

#ifndef DIRTY_BITMAP_REFERENCE_H
#define DIRTY_BITMAP_REFERENCE_H

/* From the name of a file in the header of an image, which may be a
 * stranger's, to a descriptor: only of what the image may refer to.
 *
 * of is the absolute path of the image that has the name, or NULL if it
 * is not a local file; role is "backing file" or "data file".  All
 * functions report errors and set errno.
 */

#include <stdbool.h>
#include <stddef.h>
#include <sys/stat.h>

/* Where files may be: true paths of folders, as of realpath. */
struct reference_rules {
  const char *own_folder;       /* files, not block devices; or NULL */
  const char *const *allowed;
  size_t nr_allowed;
};

/* What the image is called in messages. */
extern const char *reference_name (const char *of);

/* The absolute path that is meant by a name, to be freed. */
extern char *reference_resolve (const char *of, const char *name,
                                const char *role, bool from_current_folder);

/* Find what is at a path: a descriptor which can be used for
 * reference_open alone, and its status; or -1, also if it may not be
 * opened.
 */
extern int reference_find (const struct reference_rules *, const char *of,
                           const char *path, const char *role,
                           struct stat *);

/* Open what reference_find has found. */
extern int reference_open (int place, const char *path, const char *role,
                           bool writable);

#endif /* DIRTY_BITMAP_REFERENCE_H */
