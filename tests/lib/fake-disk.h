/* nbdkit-dirty-bitmap-filter
 * SPDX-License-Identifier: BSD-3-Clause
 * Copyright the nbdkit-dirty-bitmap-filter authors
 */

#ifndef DIRTY_BITMAP_FAKE_DISK_H
#define DIRTY_BITMAP_FAKE_DISK_H

/* A disk in memory that implements disk/disk.h, for tests of what is
 * above it.  Memory is only used where it is written.
 */

#include <pthread.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "disk/disk.h"

enum fake_op {
  FAKE_READ, FAKE_WRITE, FAKE_ZERO, FAKE_TRIM, FAKE_FLUSH, FAKE_CACHE,
  FAKE_EXTENT, FAKE_DEPTH, FAKE_NR_OPS,
};

/* A bitmap, and the only offer of it. */
struct disk_offer {
  const char *name;
  uint64_t granularity;
  uint8_t *dirty;               /* a byte a granule */
  atomic_ulong references, holders;
  atomic_bool cut;              /* reads of it fail */
  bool removed;                 /* it is offered no more */
};

#define FAKE_MAX_BITMAPS 4096

/* A view: what it shows is a disk by itself, which has the hook and the
 * numbers of calls of its readers.
 */
struct disk_view {
  char name[64];
  struct disk *copy;
  struct disk_offer bitmap;     /* as it was, the only one of its list */
  atomic_ulong references, holders;
  atomic_bool broken;           /* reads of it fail */
  bool ended;                   /* it is not found any more */
};

#define FAKE_MAX_VIEWS 64

struct disk {
  uint64_t size;
  bool readonly;
  uint32_t block_size;          /* what it prefers, and a unit of flags */
  uint8_t *data;
  uint8_t *flags;               /* a byte a block, or NULL: all data.  What
                                   is zero is a hole to a reader */
  uint8_t *depths;              /* the same, or NULL: all 1 */
  struct disk_offer *bitmaps;   /* FAKE_MAX_BITMAPS */
  size_t nr_bitmaps;            /* under lock, as is what is offered */
  struct disk_view *views[FAKE_MAX_VIEWS]; /* also those that have ended */
  size_t nr_views;              /* the same */

  /* Called before each operation, with no lock held.  It may sleep, and
   * what it returns, if not 0, is the operation's errno.  It may be set
   * while operations run.
   */
  int (*_Atomic hook) (struct disk *, enum fake_op, uint64_t offset,
                       uint64_t count);
  void *opaque;                 /* the hook's; set before it */

  /* Protects data and what follows. */
  pthread_mutex_t lock;
  unsigned calls[FAKE_NR_OPS];
  unsigned long lost;           /* flushes that failed, for anybody */
  unsigned long told;           /* ... when a client begins, and then is
                                   told of those that come */
  unsigned under_way, most_under_way;
  bool last_fua, last_no_hole, last_fast;
  bool hurried;                 /* disk_hurry was called, with: */
  unsigned hurry_ms;
};

extern struct disk *fake_disk_new (uint64_t size);

/* Nothing refers to a bitmap or a view any more. */
extern void fake_disk_free (struct disk *);

/* Add a bitmap of which all granules are clean; and remove it, so that what
 * was offered is cut.  Both also while the disk is served.
 */
extern void fake_disk_add_bitmap (struct disk *, const char *name,
                                  uint64_t granularity);
extern void fake_disk_remove_bitmap (struct disk *, const char *name);

/* Begin a view of the disk and of this bitmap as they are, and end or break
 * it.  Then its readers get EIO, and if it has ended, those of its bitmap,
 * too.  All of them also while the disk is served.
 */
extern struct disk_view *fake_disk_begin_view (struct disk *,
                                               const char *bitmap);
extern void fake_disk_end_view (struct disk *, struct disk_view *);
extern void fake_disk_break_view (struct disk_view *);

/* Hooks.  One gate a program: operations op at offset wait at it from
 * gate_close, which makes it the disk's hook, to gate_open.
 */
extern void gate_close (struct disk *, enum fake_op op, uint64_t offset);
extern void gate_open (void);
extern void gate_wait (void);   /* until an operation has come to it */

/* Each operation takes *(unsigned *) opaque milliseconds. */
extern int hook_sleep (struct disk *, enum fake_op op,
                       uint64_t offset, uint64_t count);
extern void sleep_ms (unsigned ms);

#endif /* DIRTY_BITMAP_FAKE_DISK_H */
