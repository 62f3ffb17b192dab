/* nbdkit-dirty-bitmap-filter
 * SPDX-License-Identifier: BSD-3-Clause
 * Copyright the nbdkit-dirty-bitmap-filter authors
 */

#ifndef DIRTY_BITMAP_QCOW2_GATE_H
#define DIRTY_BITMAP_QCOW2_GATE_H

/* What all that writes needs (gate.c): the gate, the copy of the header,
 * barriers.  The barriers themselves are in qcow2.h.
 */

#include <pthread.h>
#include <stdatomic.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "qcow2/header-format.h"
#include "qcow2/qcow2.h"

struct qcow2;

/* The raw first cluster is kept as it is on disk, and every change goes
 * through that copy.
 */
struct header_state {
  pthread_mutex_t lock;         /* protects what follows */
  uint8_t *cluster;
  struct header_extensions ext;
  bool distrust_bitmaps;
};

struct gate {
  atomic_bool writing;          /* it is open: the first change was allowed */
  atomic_bool corrupt;          /* no more writes are allowed */
  atomic_bool reftable_unknown; /* see gate_set_reftable */
  unsigned long lost_before;    /* failed barriers when the image was
                                   opened */
};

/* Call before every change.  EROFS; EIO if the image is corrupt.  The first
 * change must come through qcow2_begin_writing.
 */
extern int gate_pass (struct qcow2 *);

/* The image is damaged, or about to be: allow no more writes. */
extern void gate_set_corrupt (struct qcow2 *);

/* Refuse a write that would touch clusters of another class: EIO. */
extern int gate_check (struct qcow2 *, enum qcow2_class,
                       uint64_t offset, uint64_t count);

/* Check and write; the gate is open.  gate_write_durable returns what
 * qcow2_write_metadata_durable does.  gate_write_metadata calls gate_pass
 * first.
 */
extern int gate_write (struct qcow2 *, enum qcow2_class, const void *buf,
                       size_t count, uint64_t host_offset);
extern int gate_write_durable (struct qcow2 *, enum qcow2_class,
                               const void *buf, size_t count,
                               uint64_t host_offset);
extern int gate_write_metadata (struct qcow2 *, enum qcow2_class,
                                const void *buf, size_t count,
                                uint64_t host_offset);

/* With hs.lock held: write [offset, offset + count) of the copy of the
 * header to the container; and durably.
 */
extern int gate_write_header (struct qcow2 *, uint64_t offset, size_t count);
extern int gate_write_header_durably (struct qcow2 *, uint64_t offset,
                                      size_t count);

/* With hs.lock held: set the autoclear bits durably, if they differ. */
extern int gate_set_autoclear (struct qcow2 *, uint64_t bits);

/* Point the header at another refcount table, durably. */
extern int gate_set_reftable (struct qcow2 *, uint64_t offset,
                              uint32_t clusters);

/* For a dirty image.  The first is called before the repair, which does not
 * change the disk; the second after it, and removes the mark durably.
 */
extern int gate_begin_repair (struct qcow2 *);
extern int gate_end_repair (struct qcow2 *);

#endif /* DIRTY_BITMAP_QCOW2_GATE_H */
