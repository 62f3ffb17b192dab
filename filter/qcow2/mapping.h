/* nbdkit-dirty-bitmap-filter
 * SPDX-License-Identifier: BSD-3-Clause
 * Copyright the nbdkit-dirty-bitmap-filter authors
 */

#ifndef DIRTY_BITMAP_QCOW2_MAPPING_H
#define DIRTY_BITMAP_QCOW2_MAPPING_H

/* Guest offset to host offset (mapping.c). */

#include <pthread.h>
#include <stdatomic.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "qcow2/entry.h"

struct qcow2;

/* A change of mapping under way. */
struct range_lock {
  uint64_t first, last;         /* guest clusters */
  struct range_lock *next;
};

struct range_locks {
  pthread_mutex_t mutex;        /* protects the list */
  pthread_cond_t cond;
  struct range_lock *first;
};

/* The L1 table. */
struct l1_table {
  _Atomic uint64_t *entries;
  atomic_bool *proven;          /* COPIED flags of the entries that are known
                                   to be true, or NULL if all are trusted */
  pthread_mutex_t lock;         /* protects what follows */
  uint8_t *holes;               /* of the table on disk (holes.c) */
  uint32_t *dirty;
  size_t nr_dirty, max_dirty;
};

/* A unit is what has one kind: a cluster or, with extended L2
 * entries, a subcluster.
 */
enum mapping_kind {
  MAPPING_UNALLOCATED,          /* the backing file provides it */
  MAPPING_ZERO,                 /* explicit zeroes, no host cluster */
  MAPPING_ZERO_ALLOCATED,       /* explicit zeroes, host cluster kept */
  MAPPING_DATA,
  MAPPING_COMPRESSED,
  MAPPING_INVALID,              /* an entry that is not well formed */
};

struct mapping {
  enum mapping_kind kind;
  bool copied;                  /* only this image uses the host cluster */
  uint64_t host;                /* of the first byte, if it has a host offset */
  uint64_t length;              /* bytes from the guest offset asked for */
  uint64_t descriptor;          /* of the first cluster */
};
extern int mapping_open (struct qcow2 *);
extern void mapping_free (struct qcow2 *);
/* Does the entry have a host cluster that only this image uses, and whose
 * units it can use?
 */
extern bool mapping_owns_cluster (const struct qcow2 *, uint64_t descriptor);
/* The mapping at guest offset, up to count bytes: one kind, and for data
 * one contiguous host range.
 */
extern int mapping_lookup (struct qcow2 *, uint64_t offset, uint64_t count,
                           struct mapping *);
/* The same, without regard to host offsets. */
extern int mapping_lookup_kind (struct qcow2 *, uint64_t offset,
                                uint64_t count, struct mapping *);
/* Make sure that a guest cluster has an L2 table, and that only the disk
 * uses that table.  Call it before an entry in the table is changed.
 */
extern int mapping_need_l2 (struct qcow2 *, uint64_t guest_cluster);
/* The number of guest clusters from guest_cluster to the end of its slice. */
extern uint64_t mapping_slice_left (const struct qcow2 *,
                                    uint64_t guest_cluster);
extern void range_lock_take (struct qcow2 *, struct range_lock *,
                             uint64_t first, uint64_t last);
extern void range_lock_drop (struct qcow2 *, struct range_lock *);
/* The dirty L1 entries, added to those that the flush has taken already.
 * The flush writes them, then calls mapping_l1_done.
 */
struct l1_copies {
  uint32_t *indices;
  size_t nr, max;
};
extern int mapping_take_dirty_l1 (struct qcow2 *, struct l1_copies *);
extern int mapping_write_l1 (struct qcow2 *, const struct l1_copies *);
extern void mapping_l1_done (struct qcow2 *, struct l1_copies *,
                             bool written);
/* Zero the new L2 tables once more, where no entry was set. */
extern int mapping_zero_again (struct qcow2 *);

#endif /* DIRTY_BITMAP_QCOW2_MAPPING_H */
