/* nbdkit-dirty-bitmap-filter
 * SPDX-License-Identifier: BSD-3-Clause
 * Copyright the nbdkit-dirty-bitmap-filter authors
 */

#ifndef DIRTY_BITMAP_BACKUP_REPOSITORY_H
#define DIRTY_BITMAP_BACKUP_REPOSITORY_H

/* A repository: a folder with one qcow2 image for each point in time, and
 * repository.json, which lists them (repository.c).
 *
 * Functions return 0, or -1 with the reason reported.
 */

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include <jansson.h>

#include "backup/checksum.h"

#define POINT_FILE_CHARS 16
#define POINT_TIME_CHARS 24

struct point {
  unsigned number;              /* from 1 on, ascending */
  char file[POINT_FILE_CHARS];  /* in the folder */
  bool is_full;                 /* or else the point before is below it */
  char time[POINT_TIME_CHARS];  /* when it was begun, UTC, ISO 8601 */
  uint64_t disk_bytes;          /* the size of the disk */
  uint64_t copied_bytes;        /* of the disk, that were read for it */
  struct checksum sum;          /* of the file */
};

enum repository_mode {
  REPOSITORY_LIST,              /* read the list, beside whatever runs */
  REPOSITORY_READ,              /* read images, beside other readers */
  REPOSITORY_CHANGE,            /* alone */
  REPOSITORY_CREATE,            /* the same, and make it if it is not there */
};

#define REPOSITORY_ID_CHARS 8

struct repository {
  const char *path;             /* the caller's */
  int fd;                       /* of the folder, locked */
  bool is_new;                  /* we made the folder, and it has no list */
  char id[REPOSITORY_ID_CHARS + 1]; /* random; kept for ever */
  char *bitmap;                 /* whose changes the next point has; or NULL */
  struct point *points;
  size_t nr_points;

  /* The file of this point is about to be replaced by an image with this
   * checksum; 0: none.  See prune.c.
   */
  unsigned merging;
  struct checksum merged;
};

extern int repository_open (struct repository *, const char *path,
                            enum repository_mode);

/* Remove the folder, too, if it was made by repository_open and nothing was
 * saved.
 */
extern void repository_close (struct repository *);

/* Put the list into the place of the old one, durably. */
extern int repository_save (struct repository *);

/* Can the list have this name of a bitmap? */
extern bool repository_takes_name (const char *bitmap);

/* Set the bitmap's name, or NULL. */
extern int repository_set_bitmap (struct repository *, const char *name);

/* Add a point at the end, with its number and file name and all else zero. */
extern struct point *repository_add (struct repository *);

/* The name of the file of a point. */
extern void repository_name_point (char file[POINT_FILE_CHARS],
                                   unsigned number);

/* What the list has of a point.  NULL if there is no memory. */
extern json_t *repository_point_to_json (const struct point *);

/* Remove the first nr points from the list, and not their files. */
extern void repository_drop (struct repository *, size_t nr);

/* The index of a point, or of the last one if number is 0.  -1, reported, if
 * there is none.
 */
extern int repository_find (const struct repository *, unsigned number,
                            size_t *i);

/* A new file beside the points, of which nothing stays if it is not renamed
 * to a point's file: its descriptor.  The name is that of the point's file
 * and an ending.
 */
extern int repository_new_file (const struct repository *,
                                const struct point *);

/* Give it the name of the point's file, durably, in place of what is there.
 * The file is durable already.
 */
extern int repository_name_file (const struct repository *,
                                 const struct point *);
extern void repository_remove_new (const struct repository *,
                                   const struct point *);

/* Saving has failed: remove the files of points that the list on disk does not
 * have, which may be the old one or the new one.  If it cannot be read,
 * nothing is removed.
 */
extern void repository_remove_unlisted (const struct repository *);

/* The time now, as points have it. */
extern void repository_time_now (char time[POINT_TIME_CHARS]);

#endif /* DIRTY_BITMAP_BACKUP_REPOSITORY_H */
