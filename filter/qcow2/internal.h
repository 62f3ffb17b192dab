/* nbdkit-dirty-bitmap-filter
 * SPDX-License-Identifier: BSD-3-Clause
 * Copyright the nbdkit-dirty-bitmap-filter authors
 */

#ifndef DIRTY_BITMAP_QCOW2_INTERNAL_H
#define DIRTY_BITMAP_QCOW2_INTERNAL_H

/* An open image, and the files of qcow2/.  Each file calls only files that
 * stand below it in this list, and has a header of its own:
 *
 *   repair.c          images that are marked dirty
 *   discard.c, write.c
 *   change.c          what these two share
 *   read.c            guest data, here or in the backing file
 *   preallocated.c    was the image preallocated without its data?
 *   stop.c            freeing clusters at once; the clean stop
 *   flush.c           the steps of a flush; the image flushed alone
 *   reuse.c           places that lost their data and stay the guest's
 *   mapping.c         guest offset to host offset, L1 and L2 entries
 *   l2-cache.c        L2 tables in RAM
 *   extension.c       putting the bitmaps extension into the header
 *   allocate.c        finding free clusters; new refcount blocks and tables
 *   first-change.c    what comes before the first change
 *   leaks.c           leaks that a crash has left
 *   scan.c            what refers to each cluster
 *   snapshots.c       internal snapshots
 *   release.c         clusters on their way from used to free
 *   refcount.c        refcount blocks and their cache
 *   holes.c           space for metadata that is written later
 *   compressed.c      compressed clusters
 *   gate.c            what all that writes needs
 *   registry.c        which clusters hold metadata
 *   references.c      the files that the header names
 *   header.c          reading the header
 *   hurry.c           ending long requests early
 *
 * and open.c above them all, which puts them together.  The formats alone,
 * bytes in and values out, are in header-format.c, refcount-format.c,
 * snapshot-format.c, bitmap-directory.c and entry.h.
 *
 * Locks, in the order in which they are taken:
 *   range (mapping.c)   guest clusters whose mapping is being changed
 *   flush.lock          one flush at a time
 *   l2_set.lock         one set of the L2 cache
 *   l1.lock             new L2 tables, the list of dirty L1 entries
 *   rc.lock             refcounts, their cache, the refcount table
 *   release.lock        the lists of clusters on their way to free
 *   registry.lock       changes to the registry
 *   hs.lock             the copy of the header and its bits
 *   grace.lock          inside of grace.c, for a moment
 * A read, or a write to an allocated cluster, takes none of them unless it
 * has to load an L2 slice.
 *
 * No thread waits for a range lock inside a section of q->requests: a thread
 * that needs both takes the range lock first.  So the holder of a range lock
 * may wait for the end of all sections (reuse.c).
 */

#include <errno.h>
#include <pthread.h>
#include <stdatomic.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "common/bytes.h"
#include "common/cleanup.h"
#include "common/grace.h"
#include "common/lock.h"
#include "common/report.h"
#include "container/container.h"
#include "qcow2/allocate.h"
#include "qcow2/change.h"
#include "qcow2/compressed.h"
#include "qcow2/entry.h"
#include "qcow2/flush.h"
#include "qcow2/gate.h"
#include "qcow2/header-format.h"
#include "qcow2/header.h"
#include "qcow2/holes.h"
#include "qcow2/hurry.h"
#include "qcow2/l2-cache.h"
#include "qcow2/leaks.h"
#include "qcow2/mapping.h"
#include "qcow2/order.h"
#include "qcow2/preallocated.h"
#include "qcow2/qcow2.h"
#include "qcow2/refcount-format.h"
#include "qcow2/refcount.h"
#include "qcow2/registry.h"
#include "qcow2/release.h"
#include "qcow2/repair.h"
#include "qcow2/reuse.h"
#include "qcow2/scan.h"
#include "qcow2/snapshot-format.h"
#include "qcow2/snapshots.h"

struct qcow2 {
  /* Constant once the image is open. */
  struct container *container;
  struct container *data;       /* guest data: the container, or ... */
  bool has_data_file;           /* an external data file */
  bool data_file_raw;           /* which is a raw image of its own */
  struct qcow2_layer backing;
  uint64_t backing_size;        /* 0 if there is none */
  bool readonly;
  unsigned cluster_bits;
  uint64_t cluster_size;
  bool extended_l2;
  unsigned unit_bits;           /* of the units that have a kind of mapping
                                   each: clusters, or subclusters */
  unsigned l2_bits;             /* log2 of entries in an L2 table */
  uint64_t size;                /* of the guest's disk */

  /* Each of these belongs to one file. */
  struct header header;         /* gate.c */
  struct header_state hs;       /* gate.c */
  struct gate gate;
  struct registry registry;
  struct refcounts rc;          /* refcount.c, allocate.c */
  struct releases release;
  struct leaks leaks;
  struct l1_table l1;           /* mapping.c */
  struct l2_cache l2;
  struct range_locks ranges;    /* mapping.c */
  struct grace requests;        /* requests that use host offsets */
  _Atomic grace_period emptied; /* the period that reuse.c waits for, or 0 */
  struct flush_state flush;
  struct hurry hurry;
  struct preallocated preallocated;
};

static inline bool
gate_is_open (struct qcow2 *q)
{
  return !atomic_load_explicit (&q->gate.corrupt, memory_order_relaxed) &&
    atomic_load_explicit (&q->gate.writing, memory_order_acquire);
}

/* Do unallocated bytes from offset on certainly read as zeroes?  *length is
 * cut to how far the answer holds.
 */
static inline bool
layer_is_zero (const struct qcow2 *q, uint64_t offset, uint64_t *length)
{
  if (offset >= q->backing_size)
    return true;
  *length = min_u64 (*length, q->backing_size - offset);
  return false;
}

/* read.c: guest data, inside a section of q->requests.  Bytes beyond the end
 * of the disk read as zeroes.
 */
extern int read_range (struct qcow2 *, void *buf, uint64_t count,
                       uint64_t offset);

/* Call in each loop of a request that may be long: -1 with errno if the
 * request must end here.
 */
static inline int
request_goes_on (const struct qcow2 *q)
{
  if (!atomic_load_explicit (&q->hurry.begun, memory_order_acquire) ||
      !is_time_up (q))
    return 0;
  errno = ESHUTDOWN;
  return -1;
}

/* How many bytes of the guest's disk a request processes between two such
 * calls: with data to move, and without.  The first is no less than the
 * largest cluster.
 */
#define DATA_PIECE (UINT64_C (2) << 20)
#define ZERO_PIECE (UINT64_C (32) << 20)

/* The bytes from offset to the next multiple of piece, or count if that is
 * less.
 */
static inline uint64_t
piece_of (uint64_t count, uint64_t offset, uint64_t piece)
{
  return min_u64 (count, piece - (offset & (piece - 1)));
}

static inline uint64_t
guest_cluster_of (const struct qcow2 *q, uint64_t offset)
{
  return offset >> q->cluster_bits;
}

#endif /* DIRTY_BITMAP_QCOW2_INTERNAL_H */
