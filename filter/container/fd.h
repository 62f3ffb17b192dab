/* nbdkit-dirty-bitmap-filter
 * SPDX-License-Identifier: BSD-3-Clause
 * Copyright the nbdkit-dirty-bitmap-filter authors
 */

#ifndef DIRTY_BITMAP_FD_H
#define DIRTY_BITMAP_FD_H

/* Operations on the descriptor of the image's file, for both ways of serving
 * it: through the descriptor (file.c), or through a plugin that opens the
 * file again (next.c).  Those that read and write are for any file.  All
 * return 0, or -1 with errno.
 */

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <sys/stat.h>

/* Read up to count bytes, or to the end of the file: how many, or -1. */
extern ssize_t fd_pread (int fd, void *buf, size_t count, uint64_t offset);

/* Write all count bytes. */
extern int fd_pwrite (int fd, const void *buf, size_t count, uint64_t offset);

/* As the operation extent.  If the file system cannot tell, the range is
 * data.
 */
extern void fd_extent (int fd, uint64_t offset, uint64_t count,
                       uint64_t *length, unsigned *flags);

/* The bytes that the file system has allocated for the file.  ENOTSUP if
 * that cannot be known, as for a block device.
 */
extern int fd_allocated (int fd, uint64_t *bytes);

/* Extend the file to at least size bytes. */
extern int fd_extend (int fd, uint64_t size);

/* The alignment, in bytes, that a block device requires of zeroes. */
extern uint32_t fd_zero_alignment (int fd);

/* How many descriptors of this process refer to the file with this status. */
extern int fd_count_open (const struct stat *, unsigned *count);

/* Another open file of the same file, for writing, with errors of its own, or
 * -1.
 */
extern int fd_reopen (int fd);

#endif /* DIRTY_BITMAP_FD_H */
