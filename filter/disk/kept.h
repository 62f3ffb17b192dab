/* nbdkit-dirty-bitmap-filter
 * SPDX-License-Identifier: BSD-3-Clause
 * Copyright the nbdkit-dirty-bitmap-filter authors
 */

#ifndef DIRTY_BITMAP_DISK_KEPT_H
#define DIRTY_BITMAP_DISK_KEPT_H

/* What a view has to show and the disk has no longer: units of the disk, of
 * UNIT_BYTES each, as they were before the first change since the view began.
 * They are kept in a scratch file, which has no name, at their offset on the
 * disk.  A unit that reads as zeroes takes no room there.
 *
 * A unit is kept once, and stays as it is.  What was not kept is still on the
 * disk: the caller keeps a unit before it is changed, and a caller that has
 * read from the disk looks afterwards whether the unit was kept meanwhile
 * (kept_run).  If it was not, what was read is from before the change.
 *
 * Functions that return int return 0, or -1 with errno set and the reason
 * reported.
 */

#include <pthread.h>
#include <stdatomic.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "disk/chunk.h"

#define UNIT_BYTES 65536
#define KEPT_LOCKS 64

enum kept_state { KEPT_NOT, KEPT_ZERO, KEPT_DATA };

struct kept {
  int fd;                       /* the scratch file */
  uint64_t size;                /* of the disk */
  uint64_t max_bytes;           /* of the scratch file; 0: no limit */
  uint64_t max_memory;          /* of the states */
  atomic_ullong bytes, memory;

  /* The states of units, many to a block.  A block is allocated when the
   * first of its units is kept, and then stays.
   */
  _Atomic (_Atomic uint8_t *) *blocks;
  size_t nr_blocks;

  /* Unit i is kept under locks[i % KEPT_LOCKS]. */
  pthread_mutex_t locks[KEPT_LOCKS];
};

/* folder: where the scratch file is made. */
extern int kept_open (struct kept *, const char *folder, uint64_t size,
                      uint64_t max_bytes, uint64_t max_memory);
extern void kept_close (struct kept *);

/* Keep all units that have a byte of [offset, offset + count) and are not
 * kept yet; the function reads the disk.  The calling thread is one of those
 * that change the disk; any number of them may do this at once.
 */
extern int kept_keep (struct kept *, uint64_t offset, uint64_t count,
                      chunk_read_fn, void *opaque);

/* Are all units of [offset, offset + count) kept? */
extern bool kept_has (const struct kept *, uint64_t offset, uint64_t count);

/* The state of the unit at offset, and *length: up to where, at most limit,
 * the bytes have that state.  What the thread that kept a unit has done
 * before is seen by the caller.
 */
extern enum kept_state kept_run (const struct kept *, uint64_t offset,
                                 uint64_t limit, uint64_t *length);

/* Read bytes of kept units. */
extern int kept_read (const struct kept *, void *buf, size_t count,
                      uint64_t offset);

/* Give back the room of the scratch file.  From now on what is read is not
 * what was kept.
 */
extern void kept_drop (struct kept *);

#endif /* DIRTY_BITMAP_DISK_KEPT_H */
