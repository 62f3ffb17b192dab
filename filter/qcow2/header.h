/* nbdkit-dirty-bitmap-filter
 * SPDX-License-Identifier: BSD-3-Clause
 * Copyright the nbdkit-dirty-bitmap-filter authors
 */

#ifndef DIRTY_BITMAP_QCOW2_HEADER_H
#define DIRTY_BITMAP_QCOW2_HEADER_H

/* Reading the header (header.c). */

#include <stdbool.h>

struct qcow2;

/* Read and parse the header.  header_read also checks whether we support it. */
extern int header_load (struct qcow2 *);
extern int header_read (struct qcow2 *);
extern void header_free (struct qcow2 *);

/* references.c: does the header name a backing file, validly or not? */
extern bool references_backing (const struct qcow2 *);

#endif /* DIRTY_BITMAP_QCOW2_HEADER_H */
