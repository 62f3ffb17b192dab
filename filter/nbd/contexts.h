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
};

/* Sort the names of the bitmaps.  -1 with errno. */
extern int contexts_index (struct service *);

/* LIST_META_CONTEXT and SET_META_CONTEXT.  0, or -1 if the connection
 * ends.
 */
extern int contexts_list (struct option *);
extern int contexts_set (struct option *, struct selection *);

/* Select nothing. */
extern void contexts_drop (struct session *);

/* Are contexts selected, and for this export? */
extern bool contexts_selected (const struct session *,
                               const struct selection *,
                               const char *name, uint32_t length);

/* The client opens this export: drop what was selected for another one, and
 * hold the bitmaps that it has from now on, before it learns that it has them;
 * and release them at its end.
 */
extern void contexts_bind (struct disk *, struct session *,
                           const struct selection *,
                           const char *name, uint32_t length);
extern void contexts_release (struct disk *, struct session *);

#endif /* DIRTY_BITMAP_NBD_CONTEXTS_H */
