/* nbdkit-dirty-bitmap-filter
 * SPDX-License-Identifier: BSD-3-Clause
 * Copyright the nbdkit-dirty-bitmap-filter authors
 */

#ifndef DIRTY_BITMAP_STORAGE_H
#define DIRTY_BITMAP_STORAGE_H

/* What is served, and the files that it is in: the image that the plugin
 * serves, or the plugin's disk and the image beside it that has its bitmaps
 * (dirty-bitmap-image).  Include <nbdkit-filter.h> first.
 *
 * Functions return 0, or -1 with the reason reported.  nbdkit's main thread
 * calls them.
 */

#include <stdbool.h>

#include "image/bitmaps-file.h"
#include "image/image-file.h"

struct chain;
struct command_line;
struct container;
struct disk;
struct parameters;

struct storage {
  const struct parameters *parameters;
  const struct command_line *command_line;

  struct image_file file;       /* that the plugin serves */
  struct bitmaps_file bitmaps;
  struct chain *chain;          /* what the image refers to */
  struct container *beside;     /* the disk, if the image is beside it */
  char *default_scratch;        /* unless dirty-bitmap-scratch is given */
};

#define STORAGE_INITIAL { .file.fd = -1, .bitmaps.fd = -1 }

/* In get_ready: open and lock the files, and check what can be checked
 * before the plugin is opened.
 */
extern int storage_prepare (struct storage *);

/* In after_fork: open the plugin, unless its file is used directly, and the
 * disk.  serialize: the layers below take one call at a time.  NULL on
 * error.
 */
extern struct disk *storage_open (struct storage *, nbdkit_backend *,
                                  bool serialize);

/* The name of what is served, for messages.  Not NULL. */
extern const char *storage_name (const struct storage *);

/* Close what the disk used, after disk_close.  stored: all was written. */
extern void storage_close_disk (struct storage *, bool stored);

/* The rest, when no request is under way any more. */
extern void storage_free (struct storage *);

#endif /* DIRTY_BITMAP_STORAGE_H */
