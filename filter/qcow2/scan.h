/* nbdkit-dirty-bitmap-filter
 * SPDX-License-Identifier: BSD-3-Clause
 * Copyright the nbdkit-dirty-bitmap-filter authors
 */

#ifndef DIRTY_BITMAP_QCOW2_SCAN_H
#define DIRTY_BITMAP_QCOW2_SCAN_H

/* What refers to each cluster (scan.c). */

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

struct qcow2;

/* For an image that is being opened, with its tables loaded and
 * nothing changed yet.
 */
struct scan_limits {
  uint64_t bytes;               /* of metadata to be read */
  uint64_t clusters;            /* of the container */
  unsigned ms;                  /* 0 for no limit of time */
};

enum scan_result {
  SCAN_DONE, SCAN_TOO_MUCH, SCAN_INCONSISTENT, SCAN_FAILED,
};

struct scan {
  uint32_t *references;         /* by cluster */
  uint64_t nr;                  /* clusters of the container */
  uint64_t end;                 /* the end of the last cluster that is
                                   referred to */
  bool complete;                /* nothing else can refer to a cluster */
  bool crashed;                 /* a bitmap is in use */
  char why[600];                /* why it was not done, or is not complete */

  struct scan_limits limits;
  uint64_t spent, reads, began;
  uint64_t nr_trees, nr_blocks, max_count;
};

/* First scan everything except mappings; then the mappings of the disk and
 * of its snapshots, perhaps with other limits.  Call scan_free whatever they
 * return.
 */
extern enum scan_result scan_begin (struct qcow2 *, struct scan *,
                                    struct scan_limits);
extern enum scan_result scan_finish (struct qcow2 *, struct scan *);
extern void scan_free (struct scan *);
extern uint64_t scan_count (const struct scan *, uint64_t cluster);
/* Does the disk use it as an L2 table or data, so that its entry has the
 * COPIED flag if its refcount is 1?
 */
extern bool scan_wants_copied (const struct scan *, uint64_t cluster);
/* The size of an L2 entry in bytes. */
extern unsigned scan_entry_bytes (const struct qcow2 *);
/* Call differs for each cluster whose refcount on disk is not the counted
 * one, in ascending order.  It returns 0, or -1 with errno to end.
 */
typedef int (*scan_differs) (void *opaque, uint64_t cluster,
                             uint64_t stored, uint64_t counted);
extern enum scan_result scan_compare (struct qcow2 *, struct scan *,
                                      scan_differs, void *opaque);

#endif /* DIRTY_BITMAP_QCOW2_SCAN_H */
