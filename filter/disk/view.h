/* nbdkit-dirty-bitmap-filter
 * SPDX-License-Identifier: BSD-3-Clause
 * Copyright the nbdkit-dirty-bitmap-filter authors
 */

#ifndef DIRTY_BITMAP_DISK_VIEW_H
#define DIRTY_BITMAP_DISK_VIEW_H

/* Views, for disk/ alone.  disk.h has what the rooms above may call.
 *
 * The list of a disk's views is read by the threads that change the disk, in
 * a section of the gate, and by others with lists_lock.  So it changes with
 * the gate closed and lists_lock held for writing.
 */

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

struct bitmap;
struct disk;
struct disk_view;

struct views {
  struct disk_view **view;      /* a reference to each */
  size_t nr, max;
};

/* A view that is not on the list yet, for disk_view_put.  NULL with the
 * reason reported.
 */
extern struct disk_view *view_new (struct disk *, const char *name);

/* With the gate closed: the view's bitmap, which nothing changes any more.
 * With dirty_only the view shows only what is dirty in it.  0, or -1 with the
 * reason reported.
 */
extern int view_freeze (struct disk_view *, const struct bitmap *,
                        bool dirty_only);

/* Make room on the list, for so many calls of view_add.  0, or -1 with the
 * reason reported.
 */
extern int views_reserve (struct disk *, size_t more);

/* Put it on the list, which gets the caller's reference.  Take the view of
 * this name off the list, if there is one: clients that read it get EIO from
 * now on.
 */
extern void view_add (struct disk_view *);
extern void view_end (struct disk *, const char *name);

/* 0 if the disk has no view of this name that is broken.  Otherwise -1 with
 * EIO, and the reason reported.
 */
extern int view_check_whole (const struct disk *, const char *name);

/* Keep what a change of [offset, offset + count) would take from the views.
 * In a section of the gate.
 */
extern void views_keep_all (struct disk *, uint64_t offset, uint64_t count);

static inline void
views_keep (struct disk *d, const struct views *views, uint64_t offset,
            uint64_t count)
{
  if (views->nr > 0)
    views_keep_all (d, offset, count);
}

/* End all views, for the end of the disk. */
extern void views_free (struct disk *);

#endif /* DIRTY_BITMAP_DISK_VIEW_H */
