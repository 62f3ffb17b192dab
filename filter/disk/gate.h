/* nbdkit-dirty-bitmap-filter
 * SPDX-License-Identifier: BSD-3-Clause
 * Copyright the nbdkit-dirty-bitmap-filter authors
 */

#ifndef DIRTY_BITMAP_DISK_GATE_H
#define DIRTY_BITMAP_DISK_GATE_H

/* The gate that each change of the disk passes: a write, a zero or a trim.
 *
 * A change goes through a section: it enters, marks the bitmaps, changes the
 * image, and leaves.  While the gate is closed, no section is under way, and
 * those that come wait.  Reads and flushes do not pass the gate.
 *
 * A thread in a section may take any lock, and may flush.  So the thread that
 * closes the gate holds none.
 */

#include <pthread.h>
#include <stdatomic.h>
#include <stdbool.h>

#include "common/grace.h"

struct disk_gate {
  struct grace grace;
  atomic_bool closed;           /* changed under lock */
  pthread_mutex_t lock;
  pthread_cond_t opened;
};

extern void disk_gate_init (struct disk_gate *);
extern void disk_gate_free (struct disk_gate *);

/* The ticket is for disk_gate_leave, which the same thread calls. */
extern grace_ticket disk_gate_enter (struct disk_gate *);
extern void disk_gate_leave (struct disk_gate *, grace_ticket);

/* Close it, and wait until the sections under way have been left.  If that
 * takes longer than timeout_ms, the gate is open again, and this returns -1
 * with ETIMEDOUT, not reported.  One thread at a time closes it.
 */
extern int disk_gate_close (struct disk_gate *, unsigned timeout_ms);
extern void disk_gate_open (struct disk_gate *);

#endif /* DIRTY_BITMAP_DISK_GATE_H */
