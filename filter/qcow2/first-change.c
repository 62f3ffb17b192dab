/* nbdkit-dirty-bitmap-filter
 * SPDX-License-Identifier: BSD-3-Clause
 * Copyright the nbdkit-dirty-bitmap-filter authors
 */

/* Before the first change of an image.
 *
 * The gate is opened (gate.c), and the leaks that were found when the image
 * was opened are given back (leaks.c).  Every function that begins a change
 * of guest data, or allocates, or writes metadata for another room, comes
 * through here.  Once the gate is open, that costs two loads.
 */

#include <config.h>

#include <errno.h>

#include "qcow2/internal.h"

int
qcow2_begin_writing (struct qcow2 *q)
{
  if (gate_is_open (q))
    return 0;
  if (gate_pass (q) == -1)
    return -1;
  leaks_release (q);
  if (!atomic_load (&q->gate.corrupt))
    return 0;
  errno = EIO;                  /* leaks_release has reported why */
  return -1;
}

int
qcow2_write_metadata (struct qcow2 *q, enum qcow2_class class,
                      const void *buf, size_t count, uint64_t host_offset)
{
  return qcow2_begin_writing (q) == -1 ? -1
    : gate_write (q, class, buf, count, host_offset);
}

int
qcow2_write_metadata_durable (struct qcow2 *q, enum qcow2_class class,
                              const void *buf, size_t count,
                              uint64_t host_offset)
{
  return qcow2_begin_writing (q) == -1 ? -1
    : gate_write_durable (q, class, buf, count, host_offset);
}
