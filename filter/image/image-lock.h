/* nbdkit-dirty-bitmap-filter
 * SPDX-License-Identifier: BSD-3-Clause
 * Copyright the nbdkit-dirty-bitmap-filter authors
 */

#ifndef DIRTY_BITMAP_IMAGE_LOCK_H
#define DIRTY_BITMAP_IMAGE_LOCK_H

/* QEMU's locks on an image. */

#include <stdbool.h>

/* Lock the image for reading and writing, or for reading alone, until the
 * last copy of fd is closed.  path is for messages.  -1, with the reason
 * reported, if another process uses the image in a way that excludes this.
 */
extern int image_lock (int fd, const char *path, bool readonly);

#endif /* DIRTY_BITMAP_IMAGE_LOCK_H */
