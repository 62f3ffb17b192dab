/* nbdkit-dirty-bitmap-filter
 * SPDX-License-Identifier: BSD-3-Clause
 * Copyright the nbdkit-dirty-bitmap-filter authors
 */

#ifndef DIRTY_BITMAP_NBD_EXPORTS_H
#define DIRTY_BITMAP_NBD_EXPORTS_H

/* What the names of exports stand for.
 *
 * The disk has the name that it was given, and no other, not even the
 * empty one; or every name, if it was given none.  Besides it there are,
 * read-only,
 *
 * - delta:BITMAP for each bitmap that clients are offered: the disk as the
 *   bitmap has it (disk_delta_read);
 * - backup:BITMAP for each view: the disk as it was when a backup of the
 *   bitmap began (disk_view_read).
 *
 * These names are never the disk's.  A client that knows one can open it,
 * whether a list of the exports has it or not.
 *
 * nbd/ uses this, and so do the callbacks of nbdkit's own server.
 */

#include <stdbool.h>
#include <stddef.h>

struct disk;
struct disk_offer;
struct disk_offers;
struct disk_view;

#define EXPORT_DELTA_PREFIX "delta:"
#define EXPORT_VIEW_PREFIX "backup:"

/* What an export shows, with a reference; or nothing: the disk itself. */
struct export {
  struct disk_offer *delta;     /* the bitmap of a delta, or NULL */
  struct disk_view *view;       /* or NULL */
};

struct export_options {
  const char *name;             /* the disk's, or NULL: every name */
  const char *description;      /* the disk's, or NULL or "": none */
  bool list_deltas;             /* among the exports, to clients that ask */
};

/* The export of this name, which needs no NUL behind it.  False if there
 * is none.  The caller puts what was found.
 */
extern bool export_find (const struct disk *, const struct export_options *,
                         const char *name, size_t length, struct export *);

/* The same export, with a reference of its own. */
extern struct export export_get (const struct export *);

/* Put the reference, if it has one. */
extern void export_put (struct export *);

#define CLEANUP_EXPORT_PUT __attribute__ ((cleanup (export_put)))

/* A client has it open, from the first call to the second. */
extern void export_hold (const struct export *);
extern void export_release (const struct export *);

/* The disk itself is the only export that can be changed. */
static inline bool
export_is_disk (const struct export *e)
{
  return e->delta == NULL && e->view == NULL;
}

/* The bitmaps whose contexts the export has now: a reference, for
 * disk_offers_put.  NULL if it never has any.
 */
extern struct disk_offers *export_offers (const struct disk *,
                                          const struct export *);

/* The description of an export: a string to be freed, or NULL if there is
 * none.  -1 if there is no memory.
 */
extern int export_describe (const struct export_options *,
                            const struct export *, char **description);

/* Call fn for each export of a list: the disk, the views, the deltas.  Clients
 * take a list of 10000 (libnbd's limit, and nbdkit's).  If there are more, the
 * deltas are left out, and if there are still too many, the views.  Stops if
 * fn returns -1, and returns that.
 */
extern int exports_list (const struct disk *, const struct export_options *,
                         int (*fn) (void *opaque, const char *name,
                                    const char *description),
                         void *opaque);

/* The longest list.  Variable for the unit tests. */
extern size_t exports_list_max;

#endif /* DIRTY_BITMAP_NBD_EXPORTS_H */
