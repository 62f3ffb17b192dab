/* nbdkit-dirty-bitmap-filter
 * SPDX-License-Identifier: BSD-3-Clause
 * Copyright the nbdkit-dirty-bitmap-filter authors
 */

/* The backing file provides the bytes that the image does not have.  It is
 * another image or raw bytes.  It is not changed while we use it, and it may
 * be shorter or longer than the disk.
 */

#include <config.h>

#include <errno.h>
#include <inttypes.h>

#include "qcow2/internal.h"

int
layer_open (struct qcow2 *q, const struct qcow2_options *options)
{
  const bool opened =
    options->backing.image != NULL || options->backing.raw != NULL;

  if (!opened) {
    if (!references_backing (q))
      return 0;
    report_error ("the image has a backing file, which was not opened");
    errno = EINVAL;
    return -1;
  }
  q->backing = options->backing;
  q->backing_size = q->backing.image != NULL
    ? qcow2_size (q->backing.image) : container_size (q->backing.raw);
  return 0;
}

int
layer_read (struct qcow2 *q, void *buf, uint64_t count, uint64_t offset)
{
  const uint64_t inside =
    offset < q->backing_size ? min_u64 (count, q->backing_size - offset) : 0;

  memset ((char *) buf + inside, 0, count - inside);
  if (inside == 0)
    return 0;
  if (q->backing.image != NULL)
    return qcow2_read (q->backing.image, buf, inside, offset);
  if (container_pread (q->backing.raw, buf, inside, offset) == -1) {
    report_error ("cannot read %" PRIu64 " bytes at offset %#" PRIx64
                  " of the backing file: %m", inside, offset);
    return -1;
  }
  return 0;
}

static int
raw_extent (struct qcow2 *q, uint64_t offset, uint64_t count,
            uint64_t *length, enum qcow2_extent_type *type)
{
  bool hole;

  if (container_extent (q->backing.raw, offset, count, length, &hole) == -1) {
    report_error ("cannot tell what is data at offset %#" PRIx64 " of the "
                  "backing file: %m", offset);
    return -1;
  }
  /* Report them as explicit zeroes, since the backing file has them. */
  *type = hole ? QCOW2_EXTENT_ZERO : QCOW2_EXTENT_DATA;
  return 0;
}

int
layer_extent (struct qcow2 *q, uint64_t offset, uint64_t limit,
              uint64_t *length, enum qcow2_extent_type *type,
              unsigned *depth)
{
  const bool none = q->backing.image == NULL && q->backing.raw == NULL;

  if (offset >= q->backing_size) {
    *length = limit - offset;
    if (type != NULL)
      *type = QCOW2_EXTENT_UNALLOCATED;
    *depth = none ? 0 : 2;
    return 0;
  }
  limit = min_u64 (limit, q->backing_size);
  if (q->backing.image == NULL) {
    *depth = 2;
    *length = limit - offset;
    return type == NULL ? 0
      : raw_extent (q, offset, limit - offset, length, type);
  }
  if (qcow2_extent (q->backing.image, offset, limit, length, type,
                    depth) == -1)
    return -1;
  if (*depth != 0)
    ++*depth;
  return 0;
}
