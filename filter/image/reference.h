/* nbdkit-dirty-bitmap-filter
 * SPDX-License-Identifier: BSD-3-Clause
 * Copyright the nbdkit-dirty-bitmap-filter authors
 */

#ifndef DIRTY_BITMAP_REFERENCE_H
#define DIRTY_BITMAP_REFERENCE_H

/* From a file name in the header of an image, which is untrusted, to a
 * descriptor.  Only files that the image may refer to are opened.
 *
 * `of` is the absolute path of the image that has the name, or NULL if that
 * is not a local file; role is "backing file" or "data file".  All functions
 * report errors and set errno.
 */

#include <stdbool.h>
#include <stddef.h>
#include <sys/stat.h>

/* Where files may be: true paths of folders, as from realpath. */
struct reference_rules {
  const char *own_folder;       /* files, not block devices; or NULL */
  const char *const *allowed;
  size_t nr_allowed;
};

/* The image's name in messages. */
extern const char *reference_name (const char *of);

/* The absolute path that a name means, for the caller to free. */
extern char *reference_resolve (const char *of, const char *name,
                                const char *role, bool from_current_folder);

/* Find what is at a path: returns a descriptor that can only be passed to
 * reference_open, and the status.  -1 on error, or if it may not be opened.
 */
extern int reference_find (const struct reference_rules *, const char *of,
                           const char *path, const char *role,
                           struct stat *);

/* Open what reference_find found. */
extern int reference_open (int place, const char *path, const char *role,
                           bool writable);

#endif /* DIRTY_BITMAP_REFERENCE_H */
