/* nbdkit-dirty-bitmap-filter
 * SPDX-License-Identifier: BSD-3-Clause
 * Copyright the nbdkit-dirty-bitmap-filter authors
 */

#ifndef DIRTY_BITMAP_QCOW2_CHANGE_H
#define DIRTY_BITMAP_QCOW2_CHANGE_H

/* What write.c and discard.c share (change.c). */

#include <stdbool.h>
#include <stdint.h>

#include "qcow2/entry.h"
#include "qcow2/mapping.h"

struct qcow2;
struct report_hold;

/* Set the entries of guest clusters that belong to one L2 slice. */
extern int change_entries (struct qcow2 *, uint64_t guest_cluster,
                           unsigned nr, const struct l2_entry *entries);

/* Check a host range that is about to be changed in place. */
extern int change_check_host (struct qcow2 *, uint64_t host, uint64_t count);

/* Does a run of a kind read as zeroes, from offset on?  *length is cut to
 * how far the answer holds.
 */
extern bool reads_as_zeroes (const struct qcow2 *, enum mapping_kind,
                             uint64_t offset, uint64_t *length);

/* Call after a request failed.  Frees what can be freed and returns true if
 * the request can be tried once more; else reports why it failed.
 */
extern bool change_may_retry (struct qcow2 *, const struct report_hold *,
                              bool *retried);

#endif /* DIRTY_BITMAP_QCOW2_CHANGE_H */
