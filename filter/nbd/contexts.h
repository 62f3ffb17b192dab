/* nbdkit-dirty-bitmap-filter
 * SPDX-License-Identifier: BSD-3-Clause
 * Copyright the nbdkit-dirty-bitmap-filter authors
 */

#ifndef DIRTY_BITMAP_NBD_CONTEXTS_H
#define DIRTY_BITMAP_NBD_CONTEXTS_H

/* Metadata contexts: their names, and which a client selects. */

#include <stdbool.h>
#include <stdint.h>

#include "nbd/option.h"

/* What SET_META_CONTEXT said last, kept during the handshake. */
struct selection {
  char *export_name;            /* NULL if nothing is selected */
  uint32_t export_name_length;
  struct export export;         /* that had this name then, with a reference */
};

/* Free what it has.  It is as before the first SET_META_CONTEXT. */
extern void contexts_forget (struct selection *);

/* LIST_META_CONTEXT and SET_META_CONTEXT.  0, or -1 if the connection
 * ends.
 */
extern int contexts_list (struct option *);
extern int contexts_set (struct option *, struct selection *);

/* Select nothing.  Nothing is held. */
extern void contexts_drop (struct session *);

/* Are contexts selected, and for this export of this name? */
extern bool contexts_selected (const struct session *,
                               const struct selection *,
                               const struct export *,
                               const char *name, uint32_t length);

/* The client opens the session's export by this name: drop what was selected
 * for another one, and hold the export and the bitmaps that it has from now
 * on, before it learns that it has them.
 */
extern void contexts_bind (struct session *, const struct selection *,
                           const char *name, uint32_t length);

/* At its end, however far it came: release them, and drop the export and what
 * was selected.
 */
extern void contexts_release (struct session *);

/* The bitmap of a context that the session has, or NULL if the context is not
 * a bitmap's.  The reference is the session's.
 */
extern struct disk_offer *contexts_bitmap (const struct session *,
                                           uint32_t id);

#endif /* DIRTY_BITMAP_NBD_CONTEXTS_H */
