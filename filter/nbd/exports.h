/* nbdkit-dirty-bitmap-filter
 * SPDX-License-Identifier: BSD-3-Clause
 * Copyright the nbdkit-dirty-bitmap-filter authors
 */

#ifndef DIRTY_BITMAP_NBD_EXPORTS_H
#define DIRTY_BITMAP_NBD_EXPORTS_H

/* What the names of exports stand for.
 *
 * The disk has the name that it was given, and no other, not even the
 * empty one; or every name, if it was given none.  delta:BITMAP is the
 * disk as one bitmap has it (disk_delta_read), read-only, for each bitmap
 * that clients are offered.  These names are never the disk's.  A client
 * that knows one can open it, whether a list of the exports has it or not.
 *
 * nbd/ uses this, and so do the callbacks of nbdkit's own server.
 */

#include <stdbool.h>
#include <stddef.h>

struct disk;

#define EXPORT_DELTA_PREFIX "delta:"

struct export {
  bool is_delta;
  size_t bitmap;                /* of a delta, as disk.h numbers them */
};

struct export_options {
  const char *name;             /* the disk's, or NULL: every name */
  const char *description;      /* the disk's, or NULL or "": none */
  bool list_deltas;             /* among the exports, to clients that ask */
};

/* The export of this name, which needs no NUL behind it.  False if there
 * is none.
 */
extern bool export_find (const struct disk *, const struct export_options *,
                         const char *name, size_t length, struct export *);

/* The description of an export: a string to be freed, or NULL if there is
 * none.  -1 if there is no memory.
 */
extern int export_describe (const struct disk *,
                            const struct export_options *,
                            const struct export *, char **description);

/* Call fn for each export of a list, the disk first.  Clients take a list of
 * 10000 (libnbd's limit, and nbdkit's).  If there are more, the deltas are
 * left out.  Stops if fn returns -1, and returns that.
 */
extern int exports_list (const struct disk *, const struct export_options *,
                         int (*fn) (void *opaque, const char *name,
                                    const char *description),
                         void *opaque);

/* The longest list.  Variable for the unit tests. */
extern size_t exports_list_max;

#endif /* DIRTY_BITMAP_NBD_EXPORTS_H */
