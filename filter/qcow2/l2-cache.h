/* nbdkit-dirty-bitmap-filter
 * SPDX-License-Identifier: BSD-3-Clause
 * Copyright the nbdkit-dirty-bitmap-filter authors
 */

#ifndef DIRTY_BITMAP_QCOW2_L2_CACHE_H
#define DIRTY_BITMAP_QCOW2_L2_CACHE_H

/* L2 tables in RAM (l2-cache.c). */

#include <pthread.h>
#include <stdatomic.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "common/meter.h"
#include "qcow2/entry.h"
#include "qcow2/qcow2.h"

struct qcow2;

#define L2_WAYS 16
#define L2_MAX_SLICE_ENTRIES 512

struct l2_slot {
  _Atomic uint64_t tag;         /* (slice + 1) << 24 | version, or version */
  atomic_uint referenced;       /* since the clock hand passed */
  bool dirty, pinned;           /* protected by the set's lock, as is */
  uint8_t holes;                /* in this slice of the container (holes.c) */
};

struct l2_set {
  pthread_mutex_t lock;         /* protects all changes to the set */
  unsigned hand;
  atomic_uint nr_dirty;         /* changed under lock */
  struct l2_slot way[L2_WAYS];
};

struct l2_cache {
  struct meter lookups;         /* counted while meter_is_on */
  _Atomic uint64_t misses, evictions, slots_used;
  unsigned slice_bits;          /* log2 of entries in a slice */
  unsigned entry_bits;          /* log2 of 64-bit words in an entry */
  size_t nr_sets;               /* a power of two */
  struct l2_set *sets;
  _Atomic uint64_t *words;      /* big-endian, as on disk */
  atomic_size_t nr_dirty;
};

extern int l2_cache_open (struct qcow2 *, uint64_t cache_bytes);
extern void l2_cache_free (struct qcow2 *);
/* Read nr entries from guest cluster on, all of one slice. */
extern int l2_get (struct qcow2 *, uint64_t guest_cluster, unsigned nr,
                   struct l2_entry *entries);
extern void l2_get_numbers (const struct qcow2 *,
                            struct qcow2_cache_numbers *);
/* Set nr entries from guest cluster on, all of one slice, whose L2 table
 * exists.  EAGAIN if the cache has to be flushed first.  ENOSPC, and no
 * entry is set, if the table on disk has no space for them.
 */
extern int l2_set (struct qcow2 *, uint64_t guest_cluster, unsigned nr,
                   const struct l2_entry *entries);
/* For the flush: copy up to max_copies dirty slices, from *next_set on,
 * into data, and pin them.
 */
struct l2_copy {
  uint64_t slice;
  size_t slot;
  uint8_t holes;
};
extern size_t l2_copy_dirty (struct qcow2 *, size_t *next_set,
                             struct l2_copy *copies, uint8_t *data,
                             size_t max_copies);
extern int l2_write_copy (struct qcow2 *, const struct l2_copy *,
                          const uint8_t *data);
/* Unpin the slices.  If !written they are dirty again. */
extern void l2_copies_done (struct qcow2 *, const struct l2_copy *copies,
                            size_t nr, bool written);
extern unsigned l2_slice_bytes (const struct qcow2 *);
/* Zero the slices of an L2 table on disk in which no entry was set, under
 * flush.lock.  The table is new: no flush has written its L1 entry.
 */
extern int l2_zero_again (struct qcow2 *, uint32_t l1_index);

#endif /* DIRTY_BITMAP_QCOW2_L2_CACHE_H */
