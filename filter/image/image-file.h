/* nbdkit-dirty-bitmap-filter
 * SPDX-License-Identifier: BSD-3-Clause
 * Copyright the nbdkit-dirty-bitmap-filter authors
 */

#ifndef DIRTY_BITMAP_IMAGE_FILE_H
#define DIRTY_BITMAP_IMAGE_FILE_H

/* The file that the plugin serves, if we can know it. */

#include <stdbool.h>

struct command_line;
struct container;

struct image_file {
  bool is_disk;                 /* the file is the guest's disk, and no image:
                                   its size never changes; set by the caller */
  char *path;                   /* absolute; after image_file_open, NULL if
                                   there is no such file */
  char *true_path;              /* the same with no symbolic links: the
                                   plugin opens this */
  int fd;                       /* the file, open and locked, or -1 */
  bool readonly;
  bool is_unwritable;           /* hence readonly, though the user did not
                                   ask for it */
  bool is_block_device;
  bool has_options;             /* the plugin has options other than file= */
  bool is_direct;               /* used without the plugin, see below */

  /* Why the plugin's bytes cannot be the file's, or NULL. */
  const char *differs;
};

/* Remember a parameter that the filter passes on. */
extern int image_file_remember (struct image_file *, const char *key,
                                const char *value);

/* In get_ready: open and lock the file, and find out whether the plugin will
 * serve the file's bytes.  0 with fd -1 if there is no such file.  -1, with
 * the reason reported, if the file must not be served.
 */
extern int image_file_open (struct image_file *, const struct command_line *,
                            bool readonly);

/* In after_fork: a container of the file itself, if is_direct.  NULL, with
 * the reason reported, on error.
 */
extern struct container *image_file_container (struct image_file *);

/* In after_fork, if not is_direct: check that the container has the file's
 * bytes, if it should, and tell it whether it may grow by extending the
 * file.  -1, with the reason reported, if it has other bytes.
 */
extern int image_file_attach (struct image_file *, struct container *);

extern void image_file_close (struct image_file *);

#endif /* DIRTY_BITMAP_IMAGE_FILE_H */
