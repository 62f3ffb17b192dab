/* nbdkit-dirty-bitmap-filter
 * SPDX-License-Identifier: BSD-3-Clause
 * Copyright the nbdkit-dirty-bitmap-filter authors
 */

#ifndef DIRTY_BITMAP_QCOW2_COMPRESSED_H
#define DIRTY_BITMAP_QCOW2_COMPRESSED_H

/* Compressed clusters (compressed.c). */

#include <stdint.h>

struct qcow2;

/* Read a whole compressed cluster into buf. */
extern int compressed_read (struct qcow2 *, uint64_t descriptor, void *buf);
extern void compressed_location (const struct qcow2 *, uint64_t descriptor,
                                 uint64_t *host, uint64_t *bytes);

#endif /* DIRTY_BITMAP_QCOW2_COMPRESSED_H */
