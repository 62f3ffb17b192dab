/* nbdkit-dirty-bitmap-filter
 * SPDX-License-Identifier: BSD-3-Clause
 * Copyright the nbdkit-dirty-bitmap-filter authors
 */

#ifndef DIRTY_BITMAP_PROBE_H
#define DIRTY_BITMAP_PROBE_H

/* Which format a file has, judged by its first bytes as QEMU does. */

#include <stdint.h>

#define PROBE_BYTES 512

/* The name that QEMU has for the format: "raw" if it looks like no
 * other.  first[] is filled up with zeroes where the file has less.
 */
extern const char *probe_format (const uint8_t first[PROBE_BYTES],
                                 uint64_t size, const char *path);

#endif /* DIRTY_BITMAP_PROBE_H */
