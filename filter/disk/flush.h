/* nbdkit-dirty-bitmap-filter
 * SPDX-License-Identifier: BSD-3-Clause
 * Copyright the nbdkit-dirty-bitmap-filter authors
 */

#ifndef DIRTY_BITMAP_DISK_FLUSH_H
#define DIRTY_BITMAP_DISK_FLUSH_H

/* Flushing an image together with its bitmaps, and stopping it (flush.c).
 *
 * Functions return 0, or -1 with errno set and the reason reported.  The
 * bitmaps may be NULL: then the image is flushed alone.  They never make a
 * flush fail (bitmap_set_tell_unstored).  The caller holds no lock.
 */

struct bitmap_set;
struct qcow2;

/* If another flush began after this one was called, and succeeded, this one
 * succeeds, too.  If the bitmaps lacked space, and the clusters released so
 * far may help, it flushes again.
 */
extern int image_flush (struct qcow2 *, struct bitmap_set *);

/* With the flush lock (qcow2/steps.h) held: flush, whatever was flushed
 * before, and do not try again if the bitmaps lacked space.
 */
extern int image_flush_locked (struct qcow2 *, struct bitmap_set *);

/* Flush, and free the released clusters, so that image_stop has nothing to
 * write if no change comes in between.
 */
extern int image_settle (struct qcow2 *, struct bitmap_set *);

/* A clean stop: flush, free the released clusters so that nothing is leaked,
 * and cut the container to the used part.  No request is under way.  If
 * nothing was ever written, this writes nothing.
 */
extern int image_stop (struct qcow2 *, struct bitmap_set *);

#endif /* DIRTY_BITMAP_DISK_FLUSH_H */
