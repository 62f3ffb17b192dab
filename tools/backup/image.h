/* nbdkit-dirty-bitmap-filter
 * SPDX-License-Identifier: BSD-3-Clause
 * Copyright the nbdkit-dirty-bitmap-filter authors
 */

#ifndef DIRTY_BITMAP_BACKUP_IMAGE_H
#define DIRTY_BITMAP_BACKUP_IMAGE_H

/* Writing an image into a new file (image.c). */

#include "backup/checksum.h"
#include "backup/copy.h"
#include "qcow2/writer.h"

/* Give all that the image has to the sink, whose unit is a cluster.  0, or -1
 * with the reason reported (none if it was interrupted).
 */
typedef int image_fill (void *opaque, const struct copy_sink *);

/* The file is empty.  0 if all of the image is in it, durably; else -1, as
 * fill.  The file's checksum, too, unless that is NULL.
 */
extern int image_write (int fd, const struct qcow2_writer_options *,
                        image_fill *, void *opaque, struct checksum *);

#endif /* DIRTY_BITMAP_BACKUP_IMAGE_H */
