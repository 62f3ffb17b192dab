/* nbdkit-dirty-bitmap-filter
 * SPDX-License-Identifier: BSD-3-Clause
 * Copyright the nbdkit-dirty-bitmap-filter authors
 */

#ifndef DIRTY_BITMAP_DISK_CHANGE_H
#define DIRTY_BITMAP_DISK_CHANGE_H

/* Changing the set of the image's bitmaps while the disk is served
 * (change.c).
 */

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "bitmap/change.h"

struct disk;

enum disk_action_type {
  DISK_BITMAP_ADD,
  DISK_BITMAP_REMOVE,
  DISK_BITMAP_CLEAR,
  DISK_BITMAP_ENABLE,
  DISK_BITMAP_DISABLE,
  DISK_BITMAP_MERGE,
  DISK_BACKUP_BEGIN,
  DISK_BACKUP_END,
};

struct disk_action {
  enum disk_action_type type;
  const char *name;             /* of the bitmap; for a merge the target */

  /* Of a backup that begins: as bitmap_change_begin_backup.  done is set by
   * disk_change_bitmaps.
   */
  bool create;
  enum bitmap_backup_action done;
  bool view;                    /* with a view (disk.h) of that moment, */
  bool dirty_only;              /* of what is dirty then */

  /* Of a backup that ends: it has copied all, which is refused if it has a
   * view that is broken; and as bitmap_change_end_backup.
   */
  bool success, clear;

  /* Of both: the bytes that are dirty in the bitmap when that is done, before
   * any other change of the disk.  Set by disk_change_bitmaps.
   */
  uint64_t dirty_bytes;

  /* Of a bitmap that is added. */
  bool has_granularity;         /* if not, QEMU's rule decides */
  uint32_t granularity;         /* bytes */
  bool persistent;              /* if not, it lives in RAM alone */
  bool disabled;

  /* Of a merge. */
  const char *const *sources;
  size_t nr_sources;

  /* Clients that read the bitmap do not prevent this: from then on they get
   * the error EIO for its extents.
   */
  bool force;
};

/* Carry out actions in this order: all of them, or none if one cannot be.
 * When this returns 0, the image durably has the new set.  Changes and flushes
 * of the disk wait meanwhile.  Returns -1 with errno set and the reason
 * reported, in QEMU's words where QEMU has any; then the set is as it was.
 * image is a name for the image, for messages.  One thread at a time.
 */
extern int disk_change_bitmaps (struct disk *, const char *image,
                                struct disk_action *, size_t nr_actions);

/* Close the gate, so that no change of the disk is under way, and those that
 * come wait, until the second is called.  In between, the disk's set can be
 * changed as usual.  So several disks can be stopped at one moment.  -1 with
 * the reason reported.  By the thread that changes the set.
 */
extern int disk_close_gate (struct disk *);
extern void disk_open_gate (struct disk *);

#endif /* DIRTY_BITMAP_DISK_CHANGE_H */
