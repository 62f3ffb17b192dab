/* nbdkit-dirty-bitmap-filter
 * SPDX-License-Identifier: BSD-3-Clause
 * Copyright the nbdkit-dirty-bitmap-filter authors
 */

#ifndef DIRTY_BITMAP_QCOW2_SNAPSHOTS_H
#define DIRTY_BITMAP_QCOW2_SNAPSHOTS_H

/* Internal snapshots (snapshots.c). */

#include <stdint.h>

struct qcow2;

/* Serve a snapshot's L1 table and disk size.  Call before mapping_open.
 * ENOENT if no snapshot has that ID or name.
 */
extern int snapshots_select (struct qcow2 *, const char *id_or_name);
/* Call before anything is written, and after mapping_open: makes sure that
 * nothing of the snapshots can be written or freed.
 */
extern int snapshots_register (struct qcow2 *);
/* Read the entry of snapshot i at *offset, which says where its L1 table is,
 * and move *offset on to the next entry.
 */
extern int snapshots_next (struct qcow2 *, uint32_t i, uint64_t *offset,
                           uint64_t *l1_offset, uint32_t *l1_entries);

#endif /* DIRTY_BITMAP_QCOW2_SNAPSHOTS_H */
