/* nbdkit-dirty-bitmap-filter
 * SPDX-License-Identifier: BSD-3-Clause
 * Copyright the nbdkit-dirty-bitmap-filter authors
 */

#ifndef DIRTY_BITMAP_BACKUP_CHECKSUM_H
#define DIRTY_BITMAP_BACKUP_CHECKSUM_H

/* Checksums of files.
 *
 * XXH128 finds damage.  It does not find forgery, and need not: an attacker
 * who can change a file can change the list with its checksum.  It is computed
 * of what is written while it is written, and is so fast that this takes no
 * time that could be noticed.
 *
 * The header of an image is written last.  So the first 4096 bytes of a file
 * come last in its checksum:
 *
 *   { tail -c +4097 FILE; head -c 4096 FILE; } | xxh128sum
 */

#include <stdint.h>

#define CHECKSUM_HEAD_BYTES 4096

/* In hexadecimal digits, as xxh128sum prints it, and the size of the file. */
#define CHECKSUM_CHARS 32

struct checksum {
  char text[CHECKSUM_CHARS + 1];
  uint64_t bytes;
};

struct checksum_state {
  struct XXH3_state_s *xxh;
  uint64_t bytes;
};

/* What is added is the file from CHECKSUM_HEAD_BYTES on, then those bytes.
 * checksum_end frees the state.
 */
extern int checksum_begin (struct checksum_state *);
extern void checksum_add (struct checksum_state *, const void *buf,
                          uint64_t count);
extern void checksum_end (struct checksum_state *, struct checksum *);

/* Read the file from its beginning to its end.  path is for messages. */
extern int checksum_of (int fd, const char *path, struct checksum *);

#endif /* DIRTY_BITMAP_BACKUP_CHECKSUM_H */
