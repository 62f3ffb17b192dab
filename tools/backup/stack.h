/* nbdkit-dirty-bitmap-filter
 * SPDX-License-Identifier: BSD-3-Clause
 * Copyright the nbdkit-dirty-bitmap-filter authors
 */

#ifndef DIRTY_BITMAP_BACKUP_STACK_H
#define DIRTY_BITMAP_BACKUP_STACK_H

/* The disk of a point: its image over those of the points before it, down to
 * the full one (stack.c).
 */

#include <stddef.h>

#include "backup/repository.h"

struct qcow2;
struct stack_image;

struct stack {
  struct stack_image *images;   /* the full one first */
  size_t nr;
  struct qcow2 *top;            /* the disk; closed by stack_close */
};

/* Open the images of points[i], and check that each has the backing file that
 * it should have.  Nothing else than the files of the list is opened.
 */
extern int stack_open (struct stack *, const struct repository *, size_t i);
extern void stack_close (struct stack *);

/* Compare the checksum of the file of a point.  -1 also if it differs. */
extern int stack_verify_file (const struct repository *,
                              const struct point *);

/* The same for all files that points[i] needs. */
extern int stack_verify (const struct repository *, size_t i);

#endif /* DIRTY_BITMAP_BACKUP_STACK_H */
