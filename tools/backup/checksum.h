/* nbdkit-dirty-bitmap-filter
 * SPDX-License-Identifier: BSD-3-Clause
 * Copyright the nbdkit-dirty-bitmap-filter authors
 */

#ifndef DIRTY_BITMAP_BACKUP_CHECKSUM_H
#define DIRTY_BITMAP_BACKUP_CHECKSUM_H

#include <stdint.h>

/* SHA-256 of a file, in hexadecimal digits, and its size. */
#define CHECKSUM_CHARS 64

struct checksum {
  char text[CHECKSUM_CHARS + 1];
  uint64_t bytes;
};

/* Read the file from its beginning to its end.  path is for messages. */
extern int checksum_of (int fd, const char *path, struct checksum *);

#endif /* DIRTY_BITMAP_BACKUP_CHECKSUM_H */
