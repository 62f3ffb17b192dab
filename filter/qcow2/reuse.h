/* nbdkit-dirty-bitmap-filter
 * SPDX-License-Identifier: BSD-3-Clause
 * Copyright the nbdkit-dirty-bitmap-filter authors
 */

#ifndef DIRTY_BITMAP_QCOW2_REUSE_H
#define DIRTY_BITMAP_QCOW2_REUSE_H

/* Places that lost their data and stay the guest's (reuse.c). */

#include <stdbool.h>

struct l2_entry;
struct mapping;
struct qcow2;

/* All with a range lock held that covers the clusters: */
/* L2 entries were replaced.  The new entries have no data that the old ones
 * did not have.
 */
extern void reuse_entries_changed (struct qcow2 *, unsigned nr,
                                   const struct l2_entry *old,
                                   const struct l2_entry *new);
/* The caller is about to fill the place of a mapping that is not data.  May
 * a request be under way that takes the place for data?  Then the caller
 * must wait for it, outside any section.
 */
extern bool reuse_must_wait (struct qcow2 *, const struct mapping *);
extern void reuse_wait (struct qcow2 *);

#endif /* DIRTY_BITMAP_QCOW2_REUSE_H */
