/* nbdkit-dirty-bitmap-filter
 * SPDX-License-Identifier: BSD-3-Clause
 * Copyright the nbdkit-dirty-bitmap-filter authors
 */

#ifndef DIRTY_BITMAP_NEXT_H
#define DIRTY_BITMAP_NEXT_H

/* A container over nbdkit's plugin, and the filters in front of it.
 * Include <nbdkit-filter.h> first.
 */

#include <stdbool.h>

struct container;

struct container_next_options {
  nbdkit_backend *backend;
  bool readonly;

  /* One call at a time below: the thread model is less than parallel. */
  bool serialize;

  /* The file that the plugin is to open: open for us, and the caller's;
   * and the path that it opens, with no symbolic links.  Or -1 and NULL.
   */
  int fd;
  const char *path;

  /* What is served will be the file's bytes, but for an end that is no
   * whole block, perhaps.
   */
  bool same_bytes;
};

/* Open a context of the plugin that all connections share.  The
 * container is read-only if that was asked for or if the plugin is.
 * NULL, with the reason reported, on error; one is that the plugin has
 * opened another file.
 */
extern struct container *
container_open_next (const struct container_next_options *);

/* The container may grow by extending the file; or may not, for the
 * reason in why_not (else NULL), a static string.  Before that it may not.
 * Call it before others know the container.
 */
extern void container_next_set_growth (struct container *,
                                       const char *why_not);

/* Does the plugin say that it is a rotating disk? */
extern bool container_next_is_rotational (struct container *);

#endif /* DIRTY_BITMAP_NEXT_H */
