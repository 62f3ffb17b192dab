/* nbdkit-dirty-bitmap-filter
 * SPDX-License-Identifier: BSD-3-Clause
 * Copyright the nbdkit-dirty-bitmap-filter authors
 */

/* A qcow2 image as a sink. */

#include <config.h>

#include "backup/image.h"
#include "common/report.h"
#include "container/container.h"

static int
write_data (void *opaque, const void *buf, uint64_t count, uint64_t offset)
{
  return qcow2_writer_data (opaque, buf, count, offset);
}

static int
write_zero (void *opaque, uint64_t count, uint64_t offset)
{
  return qcow2_writer_zero (opaque, count, offset);
}

static int
fill_image (struct container *c, const struct qcow2_writer_options *o,
            image_fill *fill, void *opaque)
{
  struct qcow2_writer *w = qcow2_writer_new (c, o);
  const struct copy_sink sink = {
    .opaque = w, .unit = UINT32_C (1) << o->cluster_bits,
    .data = write_data, .zero = write_zero,
  };
  int r;

  if (w == NULL)
    return -1;
  r = fill (opaque, &sink);
  if (r == 0)
    r = qcow2_writer_finish (w);
  qcow2_writer_free (w);
  return r;
}

static void
add_to_checksum (void *opaque, const void *buf, uint64_t count)
{
  checksum_add (opaque, buf, count);
}

_Static_assert (CHECKSUM_HEAD_BYTES == WRITER_HEAD_BYTES,
                "the checksum is of what the writer tells");

int
image_write (int fd, const struct qcow2_writer_options *options,
             image_fill *fill, void *opaque, struct checksum *sum)
{
  struct container *c = container_open_file_image (fd);
  struct qcow2_writer_options o = *options;
  struct checksum_state state;
  int r = 0;

  if (c == NULL) {
    report_error ("fstat: %m");
    return -1;
  }
  if (sum != NULL) {
    r = checksum_begin (&state);
    o.tell = add_to_checksum;
    o.opaque = &state;
  }
  if (r == 0) {
    r = fill_image (c, &o, fill, opaque);
    if (sum != NULL)
      checksum_end (&state, sum);
  }
  container_close (c);
  return r;
}
