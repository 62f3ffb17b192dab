/* nbdkit-dirty-bitmap-filter
 * SPDX-License-Identifier: BSD-3-Clause
 * Copyright the nbdkit-dirty-bitmap-filter authors
 */

#ifndef DIRTY_BITMAP_BITMAPS_FILE_H
#define DIRTY_BITMAP_BITMAPS_FILE_H

/* The image of dirty-bitmap-image: it has the bitmaps of a disk that is
 * served by the plugin itself.
 *
 * Functions return 0, or -1 with the reason reported.
 */

#include <stdbool.h>
#include <stdint.h>
#include <time.h>

struct container;
struct image_file;

struct bitmaps_file {
  const char *path;             /* absolute, the caller's; NULL: no such
                                   parameter */
  int fd;                       /* open and locked; -1 if it does not exist
                                   yet */
  bool readonly;

  /* The disk's time of change when it was opened, if it is a file. */
  bool has_time;
  struct timespec disk_time;
};

/* In get_ready: open and lock the file, if it exists. */
extern int bitmaps_file_open (struct bitmaps_file *, bool readonly);

/* Create it, for a disk of size bytes, and lock it.  It appears whole or not
 * at all, where the file system can do that.
 */
extern int bitmaps_file_create (struct bitmaps_file *, uint64_t size);

/* A container of the file, which exists.  NULL, with the reason reported, on
 * error.
 */
extern struct container *
bitmaps_file_container (const struct bitmaps_file *, bool readonly);

/* Before the disk is served: warn if its file was changed after the bitmaps'
 * file was.  Then another program may have written it, and the bitmaps do not
 * know of that.
 */
extern void bitmaps_file_compare_times (struct bitmaps_file *,
                                        const struct image_file *disk);

/* All is stored: if the disk was changed, set the time of change of the
 * bitmaps' file, so that the function above does not warn.
 */
extern void bitmaps_file_set_time (const struct bitmaps_file *,
                                   const struct image_file *disk);

extern void bitmaps_file_close (struct bitmaps_file *);

#endif /* DIRTY_BITMAP_BITMAPS_FILE_H */
