/* nbdkit-dirty-bitmap-filter
 * SPDX-License-Identifier: BSD-3-Clause
 * Copyright the nbdkit-dirty-bitmap-filter authors
 */

#ifndef DIRTY_BITMAP_PROBE_H
#define DIRTY_BITMAP_PROBE_H

/* The format of a file, judged by its first bytes as in QEMU. */

#include <stdint.h>

#define PROBE_BYTES 512

/* QEMU's name for the format: "raw" if it looks like no other.  If the file
 * is shorter than first[], the rest of first[] is zeroes.
 */
extern const char *probe_format (const uint8_t first[PROBE_BYTES],
                                 uint64_t size, const char *path);

#endif /* DIRTY_BITMAP_PROBE_H */
