/* nbdkit-dirty-bitmap-filter
 * SPDX-License-Identifier: BSD-3-Clause
 * Copyright the nbdkit-dirty-bitmap-filter authors
 */

#ifndef DIRTY_BITMAP_BACKUP_H
#define DIRTY_BITMAP_BACKUP_H

/* The parts of dirty-bitmap-backup that a command is made of:
 *
 *   main.c         the command line
 *   commands.h     one function for each command
 *   repository.h   a folder of points, and what is said of them
 *   stack.h        the disk of a point, as its images have it together
 *   source.h       an NBD server, and what is to be copied from it
 *   copy.h         copying with several connections
 *   progress.h     telling how far that is
 *   checksum.h     of a file
 *   new-file.h     a file that gets its name when it is whole
 *   cells.h        a disk as a grid of cells
 *   picture.h      drawing that
 *   svg.h          text in a picture
 *
 * Functions return 0, or -1 with the reason reported (common/report.h), unless
 * they say otherwise.
 */

#include <stdatomic.h>
#include <stdbool.h>

#define PROGRAM "dirty-bitmap-backup"

/* A signal asked to end: long work returns -1 soon, and reports nothing. */
extern atomic_bool is_interrupted;

/* What the command line says, for all commands. */
struct settings {
  const char *bitmap;           /* --bitmap, or NULL */
  const char *control;          /* --control, or NULL */
  const char *format;           /* --format, or NULL */
  unsigned keep;                /* --keep */
  bool compress, force, quiet, json;
};

#endif /* DIRTY_BITMAP_BACKUP_H */
