/* nbdkit-dirty-bitmap-filter
 * SPDX-License-Identifier: BSD-3-Clause
 * Copyright the nbdkit-dirty-bitmap-filter authors
 */

/* What everything that writes needs: the gate, the copy of the header,
 * barriers.
 *
 * The gate is closed until the first change.  Opening it makes the header
 * say what is true from then on: autoclear bits that the change makes untrue
 * are durably clear.  An image that turns out to be corrupt is marked so,
 * and its gate stays shut.
 *
 * A copy of the first cluster as it is on disk is kept, and small changes
 * are patched into both.  A write of up to 512 bytes that does not cross a
 * multiple of 512 is atomic.  The autoclear bits, the incompatible bits and
 * the place of the refcount table are fields of the first 512 bytes, so each
 * of them changes in one write.  extension.c has the rest.
 *
 * When a barrier fails, in a flush or elsewhere, it is unknown which of the
 * writes before it are on disk, and no later barrier will tell: Linux drops
 * a page that it could not write, and reports it once.  So failed barriers
 * are counted (qcow2_lost), and whatever orders its writes compares.  flush.c
 * says what is done about the writes.
 */

#include <config.h>

#include <assert.h>
#include <errno.h>
#include <inttypes.h>
#include <stdlib.h>

#include "qcow2/internal.h"

int
qcow2_barrier (struct qcow2 *q)
{
  if (container_flush (q->container) == -1) {
    report_error ("cannot flush the image: %m");
    return -1;
  }
  return 0;
}

unsigned long
qcow2_lost (const struct qcow2 *q)
{
  unsigned long n = container_failed_flushes (q->container);

  if (q->data != NULL && q->data != q->container)
    n += container_failed_flushes (q->data);
  return n - q->gate.lost_before;
}

int
qcow2_barrier_since (struct qcow2 *q, unsigned long lost)
{
  if (qcow2_barrier (q) == -1)
    return -1;
  if (qcow2_lost (q) == lost)
    return 0;
  report_error ("cannot flush the image: another flush failed, and what was "
                "written before it may be lost");
  errno = EIO;
  return -1;
}

int
qcow2_read_metadata (struct qcow2 *q, void *buf, size_t count,
                     uint64_t host_offset)
{
  if (container_pread (q->container, buf, count, host_offset) == -1) {
    report_error ("cannot read %zu bytes at host offset %#" PRIx64 ": %m",
                  count, host_offset);
    return -1;
  }
  return 0;
}

int
gate_check (struct qcow2 *q, enum qcow2_class class,
            uint64_t offset, uint64_t count)
{
  const uint64_t last = (offset + count - 1) >> q->cluster_bits;

  if (count == 0)
    return 0;
  for (uint64_t c = offset >> q->cluster_bits; c <= last; ++c) {
    enum qcow2_class is = registry_class (q, c);

    if (is != class) {
      report_error ("a write of %s at host offset %#" PRIx64
                    " would overwrite %s: the image is corrupt "
                    "and takes no more writes",
                    registry_class_name (class), c << q->cluster_bits,
                    registry_class_name (is));
      gate_set_corrupt (q);
      errno = EIO;
      return -1;
    }
  }
  return 0;
}

static int
check_and_write (struct qcow2 *q, enum qcow2_class class, const void *buf,
                 size_t count, uint64_t host_offset,
                 int (*pwrite) (struct container *, const void *, size_t,
                                uint64_t))
{
  if (gate_check (q, class, host_offset, count) == -1)
    return -1;
  const int r = pwrite (q->container, buf, count, host_offset);

  if (r == -1)
    report_error ("cannot write %s at host offset %#" PRIx64 ": %m",
                  registry_class_name (class), host_offset);
  return r;
}

int
gate_write (struct qcow2 *q, enum qcow2_class class, const void *buf,
            size_t count, uint64_t host_offset)
{
  return check_and_write (q, class, buf, count, host_offset,
                          container_pwrite);
}

int
gate_write_durable (struct qcow2 *q, enum qcow2_class class, const void *buf,
                    size_t count, uint64_t host_offset)
{
  return check_and_write (q, class, buf, count, host_offset,
                          container_pwrite_durable);
}

int
gate_write_metadata (struct qcow2 *q, enum qcow2_class class,
                     const void *buf, size_t count, uint64_t host_offset)
{
  return gate_pass (q) == -1 ? -1
    : gate_write (q, class, buf, count, host_offset);
}

int
gate_write_header (struct qcow2 *q, uint64_t offset, size_t count)
{
  assert (lock_is_mine (&q->hs.lock));
  if (container_pwrite (q->container, q->hs.cluster + offset, count,
                        offset) == -1) {
    report_error ("cannot write the header of the image: %m");
    return -1;
  }
  return 0;
}

int
gate_write_header_durably (struct qcow2 *q, uint64_t offset, size_t count)
{
  const unsigned long lost = qcow2_lost (q);

  assert (lock_is_mine (&q->hs.lock));
  return gate_write_header (q, offset, count) == -1 ? -1
    : qcow2_barrier_since (q, lost);
}

int
gate_set_autoclear (struct qcow2 *q, uint64_t bits)
{
  assert (lock_is_mine (&q->hs.lock));
  if (q->header.autoclear == bits)
    return 0;
  put_be64 (q->hs.cluster + HEADER_AUTOCLEAR, bits);
  if (gate_write_header_durably (q, HEADER_AUTOCLEAR, 8) == -1) {
    /* It is unknown whether they are on disk: the next call writes again. */
    put_be64 (q->hs.cluster + HEADER_AUTOCLEAR, q->header.autoclear);
    return -1;
  }
  q->header.autoclear = bits;
  q->hs.ext.bitmaps.autoclear = bits & AUTOCLEAR_BITMAPS;
  return 0;
}

/* With hs.lock held: clear the autoclear bits of unknown features. */
static int
clear_unknown (struct qcow2 *q)
{
  uint64_t bits = q->header.autoclear &
    (AUTOCLEAR_BITMAPS | AUTOCLEAR_RAW_EXTERNAL);

  assert (lock_is_mine (&q->hs.lock));
  if (q->hs.distrust_bitmaps)
    bits &= ~AUTOCLEAR_BITMAPS;
  return q->header.version < 3 ? 0 : gate_set_autoclear (q, bits);
}

/* With hs.lock held: make sure that the header on disk points to the
 * refcount table in RAM (gate_set_reftable).
 */
static int
restore_reftable (struct qcow2 *q)
{
  assert (lock_is_mine (&q->hs.lock));
  if (!atomic_load (&q->gate.reftable_unknown))
    return 0;
  if (gate_write_header_durably (q, HEADER_REFTABLE_OFFSET, 12) == -1)
    return -1;
  atomic_store (&q->gate.reftable_unknown, false);
  return 0;
}

static int
begin_writing (struct qcow2 *q)
{
  ACQUIRE_LOCK_FOR_CURRENT_SCOPE (&q->hs.lock);
  if (restore_reftable (q) == -1 ||
      (ORDER (AUTOCLEAR_BEFORE_CHANGE) && clear_unknown (q) == -1))
    return -1;
  atomic_store_explicit (&q->gate.writing, true, memory_order_release);
  return 0;
}

int
gate_pass (struct qcow2 *q)
{
  if (atomic_load_explicit (&q->gate.corrupt, memory_order_relaxed)) {
    report_error ("the image is corrupt and takes no more writes");
    errno = EIO;
    return -1;
  }
  if (atomic_load_explicit (&q->gate.writing, memory_order_acquire))
    return 0;
  if (q->readonly) {
    errno = EROFS;
    return -1;
  }
  return begin_writing (q);
}

int
gate_begin_repair (struct qcow2 *q)
{
  ACQUIRE_LOCK_FOR_CURRENT_SCOPE (&q->hs.lock);
  return clear_unknown (q);
}

int
gate_end_repair (struct qcow2 *q)
{
  ACQUIRE_LOCK_FOR_CURRENT_SCOPE (&q->hs.lock);
  q->header.incompatible &= ~INCOMPAT_DIRTY;
  put_be64 (q->hs.cluster + HEADER_INCOMPATIBLE, q->header.incompatible);
  return gate_write_header_durably (q, HEADER_INCOMPATIBLE, 8);
}

void
gate_set_corrupt (struct qcow2 *q)
{
  if (q->readonly || atomic_exchange (&q->gate.corrupt, true) ||
      q->header.version < 3)
    return;

  ACQUIRE_LOCK_FOR_CURRENT_SCOPE (&q->hs.lock);
  q->header.incompatible |= INCOMPAT_CORRUPT;
  put_be64 (q->hs.cluster + HEADER_INCOMPATIBLE, q->header.incompatible);
  gate_write_header_durably (q, HEADER_INCOMPATIBLE, 8);
}

/* If this fails, it is unknown which table the header on disk points to, and
 * later changes would be in one of the two only.  So the header is set back,
 * at the latest before the next change.
 */
int
gate_set_reftable (struct qcow2 *q, uint64_t offset, uint32_t clusters)
{
  ACQUIRE_LOCK_FOR_CURRENT_SCOPE (&q->hs.lock);
  uint8_t old[12];

  memcpy (old, q->hs.cluster + HEADER_REFTABLE_OFFSET, sizeof old);
  put_be64 (q->hs.cluster + HEADER_REFTABLE_OFFSET, offset);
  put_be32 (q->hs.cluster + HEADER_REFTABLE_CLUSTERS, clusters);
  if (gate_write_header_durably (q, HEADER_REFTABLE_OFFSET, 12) == -1) {
    const int err = errno;
    struct report_hold hold;

    memcpy (q->hs.cluster + HEADER_REFTABLE_OFFSET, old, sizeof old);
    report_hold_begin (&hold);
    if (gate_write_header_durably (q, HEADER_REFTABLE_OFFSET, 12) == -1) {
      atomic_store (&q->gate.reftable_unknown, true);
      atomic_store (&q->gate.writing, false);
    }
    report_hold_end (&hold);
    errno = err;
    return -1;
  }
  q->header.reftable_offset = offset;
  q->header.reftable_clusters = clusters;
  return 0;
}

void
qcow2_distrust_bitmaps (struct qcow2 *q)
{
  ACQUIRE_LOCK_FOR_CURRENT_SCOPE (&q->hs.lock);
  q->hs.distrust_bitmaps = true;
}
