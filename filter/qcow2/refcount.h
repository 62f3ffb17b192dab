/* nbdkit-dirty-bitmap-filter
 * SPDX-License-Identifier: BSD-3-Clause
 * Copyright the nbdkit-dirty-bitmap-filter authors
 */

#ifndef DIRTY_BITMAP_QCOW2_REFCOUNT_H
#define DIRTY_BITMAP_QCOW2_REFCOUNT_H

/* Refcount blocks and their cache (refcount.c). */

#include <pthread.h>
#include <stdatomic.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "common/meter.h"
#include "qcow2/qcow2.h"

struct qcow2;

struct refcount_slice {
  uint64_t index;               /* UINT64_MAX if unused */
  uint8_t *data;
  uint8_t holes;                /* in this slice of the container (holes.c) */
  bool dirty, pinned, referenced;
  uint64_t written;             /* in which epoch; 0 if the slice is durable */
  struct refcount_slice *next;  /* in its hash chain */
};

struct refcounts {
  pthread_mutex_t lock;         /* protects what follows */
  tally lookups, misses, evictions, slices_loaded;
  tally allocated, freed;       /* clusters */
  unsigned slice_bytes;
  unsigned slice_entries_bits;  /* log2 of entries in a slice */
  unsigned block_entries_bits;  /* log2 of entries in a refcount block */
  uint64_t *table;              /* host offsets of refcount blocks */
  uint64_t table_entries;
  uint64_t table_offset;        /* on disk */
  uint8_t *table_holes;         /* of the table on disk (holes.c) */
  bool growing;                 /* a larger table is being made */
  uint64_t abandoned, nr_abandoned; /* clusters of a table that failed, kept
                                       while reftable_unknown */
  unsigned long tables;         /* how often the table was replaced */
  uint64_t *dirty_table;        /* indices of entries to write */
  size_t nr_dirty_table, max_dirty_table;
  size_t nr_written_table;      /* the first of those, which are written */
  uint64_t epoch;               /* counts barriers, from 1 on */
  unsigned long lost;           /* qcow2_lost at the last check */
  struct refcount_slice *slices;
  size_t nr_slices, hand, nr_pinned;
  size_t nr_written_slices;     /* written and not durable */
  atomic_size_t nr_dirty;       /* changed under rc.lock */
  pthread_cond_t unpinned;      /* nr_pinned has fallen to 0 */
  struct refcount_slice **hash;
  size_t hash_mask;
  uint64_t cursor;              /* no cluster below this is free */
  uint64_t opened;              /* clusters when the image was opened */
  uint64_t fresh;               /* clusters from here on were never used,
                                   and read as zeroes */
};

/* No other thread has the image. */
extern int refcounts_open (struct qcow2 *, uint64_t cache_bytes);
extern void refcounts_free (struct qcow2 *);

/* With the lock held, or while the image is opened. */
extern bool refcount_block_exists (struct qcow2 *, uint64_t block_index);

/* All that follow, with the lock held. */
extern int refcount_get (struct qcow2 *, uint64_t cluster, uint64_t *count);
/* The refcount block must exist. */
extern int refcount_set (struct qcow2 *, uint64_t cluster, uint64_t count);
/* Find the first free cluster from *cluster on.  Clusters whose refcount
 * block does not exist are free.
 */
extern int refcount_find_free (struct qcow2 *, uint64_t *cluster);
/* Forget cached slices of refcount block index and beyond. */
extern void refcount_forget (struct qcow2 *, uint64_t block_index);
/* Set an entry of the refcount table.  The next flush writes it. */
extern int refcount_set_table_entry (struct qcow2 *, uint64_t block_index,
                                     uint64_t host_offset);
/* Write all dirty slices except pinned ones. */
extern int refcounts_write_all (struct qcow2 *);

/* Write everything that is dirty, and make it durable. */
extern int refcounts_write_durably (struct qcow2 *);

/* This one without rc.lock. */
extern void refcounts_get_numbers (const struct qcow2 *,
                                   struct qcow2_cache_numbers *);

/* Without rc.lock, under flush.lock. */
extern int refcounts_flush (struct qcow2 *, unsigned long lost);
/* Around a barrier that follows refcounts_flush.  The second only if the
 * barrier succeeds.
 */
extern uint64_t refcounts_barrier_begins (struct qcow2 *);
extern void refcounts_barrier_done (struct qcow2 *, uint64_t epoch);
/* Make dirty again what a failed barrier may have lost. */
extern void refcounts_redo_lost (struct qcow2 *);

#endif /* DIRTY_BITMAP_QCOW2_REFCOUNT_H */
