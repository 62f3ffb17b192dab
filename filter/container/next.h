/* nbdkit-dirty-bitmap-filter
 * SPDX-License-Identifier: BSD-3-Clause
 * Copyright the nbdkit-dirty-bitmap-filter authors
 */

#ifndef DIRTY_BITMAP_NEXT_H
#define DIRTY_BITMAP_NEXT_H

/* A container over nbdkit's plugin and the filters between it and ours.
 * Include <nbdkit-filter.h> first.
 */

#include <stdbool.h>

struct container;

struct container_next_options {
  nbdkit_backend *backend;
  bool readonly;

  /* The layers below take one call at a time: the thread model is less than
   * parallel.
   */
  bool serialize;

  /* The file that the plugin will open: an open descriptor, which stays the
   * caller's, and the path that the plugin opens, with no symbolic links.
   * Or -1 and NULL.
   */
  int fd;
  const char *path;

  /* The bytes served are the file's, except perhaps for an end that is not a
   * whole block.
   */
  bool same_bytes;

  /* The plugin's bytes are the guest's disk: it has just the plugin's size,
   * can do what the plugin can (container_abilities), and has its extents.
   */
  bool is_disk;
};

/* Open a context of the plugin that all connections share.  The container is
 * read-only if the caller asks for it or if the plugin is.  NULL, with the
 * reason reported, on error, for example if the plugin has opened another
 * file.
 */
extern struct container *
container_open_next (const struct container_next_options *);

/* Allow the container to grow by extending the file; or forbid it, for the
 * reason in why_not (else NULL), a static string.  Before this call it
 * cannot grow.  Call it before other threads know the container.
 */
extern void container_next_set_growth (struct container *,
                                       const char *why_not);

#endif /* DIRTY_BITMAP_NEXT_H */
