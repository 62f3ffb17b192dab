/* nbdkit-dirty-bitmap-filter
 * SPDX-License-Identifier: BSD-3-Clause
 * Copyright the nbdkit-dirty-bitmap-filter authors
 */

#ifndef DIRTY_BITMAP_DISK_INTERNAL_H
#define DIRTY_BITMAP_DISK_INTERNAL_H

/* What the files of disk/ share.
 *
 *   disk.c      open and close; requests; lists of bitmaps
 *   data.c      the guest's data: in the image, or beside it
 *   delta.c     the disk as seen through one bitmap
 *   offers.c    the bitmaps that clients are offered
 *   view.c      the disk as it was when a backup began
 *   kept.c      what a view has to show and the disk has no longer
 *   chunk.c     putting chunks together
 *   gate.c      the gate that each change of the disk passes
 *   change.c    changing the set of bitmaps
 *   flush.c     the order of writes of the image and its bitmaps
 *
 * Locks, in the order in which they are taken.  Those of the rooms below have
 * their places among them.
 *
 *   the gate (gate.h)     a change of the disk is in a section of it.  It is
 *                         closed with no lock held
 *   bitmap_set_pause      a change of the set of bitmaps pauses tidying.  A
 *                         mark takes the locks of bitmap/, and holds none of
 *                         them when it has ended
 *   kept.locks            for a unit of a view.  One is held while the unit
 *                         is read from the image, which takes locks of qcow2/
 *   the flush lock        qcow2's (qcow2/steps.h).  The steps of a flush take
 *                         the locks of bitmap/ inside it
 *   lists_lock            the lists of bitmaps and views
 *   disk_view.lock        why a view is broken.  No lock is taken inside it
 *   offers.lock           the current list of offers.  No lock is taken
 *                         inside it
 */

#include <pthread.h>
#include <stdatomic.h>
#include <stddef.h>
#include <stdint.h>

#include "disk/disk.h"
#include "disk/gate.h"
#include "disk/offers.h"
#include "disk/view.h"

struct disk {
  struct disk_gate gate;
  bool gate_is_held;            /* by disk_close_gate */
  pthread_rwlock_t lists_lock;  /* protects the lists of `bitmaps`, and views,
                                   for threads that are not in a section of
                                   the gate */
  struct container *container;
  struct qcow2 *qcow2;
  struct container *beside;     /* the guest's disk, if the image has only its
                                   bitmaps; else NULL.  The caller's */
  struct disk_abilities abilities;
  enum disk_zeroes detect_zeroes;
  struct bitmap_set *bitmaps;   /* the image's, sets[0] */
  struct bitmap_set **sets;     /* and those of its backing files */
  uint64_t *sizes;              /* how much of the disk each set covers */
  size_t nr_sets;
  struct offers offers;
  struct views views;
  struct {
    const char *scratch;        /* as in struct disk_options */
    uint64_t scratch_max, memory;
  } view_options;
  uint64_t size;

  /* Failed barriers are counted (qcow2_lost).  This is the count at the last
   * failure that was reported to any client.
   */
  atomic_ulong told;
};

/* For a thread that reads the lists. */
extern void disk_lock_lists (const struct disk *);
extern void disk_unlock_lists (const struct disk *);

/* Does the range lie inside the disk, or [offset, limit), which must not be
 * empty?  -1 with EINVAL, reported, if not.
 */
extern int disk_check_range (const struct disk *, uint64_t count,
                             uint64_t offset);
extern int disk_check_extent (const struct disk *, uint64_t offset,
                              uint64_t limit);

#endif /* DIRTY_BITMAP_DISK_INTERNAL_H */
