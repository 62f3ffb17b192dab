/* nbdkit-dirty-bitmap-filter
 * SPDX-License-Identifier: BSD-3-Clause
 * Copyright the nbdkit-dirty-bitmap-filter authors
 */

/* Putting a chunk together from several pieces. */

#include <config.h>

#include <stddef.h>
#include <string.h>

#include "common/bytes.h"
#include "disk/chunk.h"
#include "disk/disk.h"

int
chunk_read_disk (void *disk, uint64_t offset, struct qcow2_chunk *c)
{
  return disk_read_chunk (disk, offset, c);
}

void
chunk_begin (struct qcow2_chunk *c)
{
  c->length = 0;
  c->is_hole = false;
}

/* A hole may reach further than data, but only if no data come before it. */
uint64_t
chunk_limit (const struct qcow2_chunk *c)
{
  return c->length == 0 ? c->limit : c->count - c->length;
}

bool
chunk_add_zeroes (struct qcow2_chunk *c, uint64_t length)
{
  const uint64_t done = c->length;

  if (length >= c->min_hole || (done == 0 && length == c->limit)) {
    if (done == 0) {
      c->is_hole = true;
      c->length = length;
    }
    return true;
  }
  if (c->buf == NULL)
    return true;
  length = min_u64 (length, c->count - done);
  memset ((uint8_t *) c->buf + done, 0, length);
  c->length += length;
  return false;
}

int
chunk_add_read (struct qcow2_chunk *c, uint64_t length,
                chunk_read_fn read_fn, void *opaque, uint64_t offset)
{
  const uint64_t done = c->length;
  struct qcow2_chunk piece = {
    .buf = c->buf == NULL ? NULL : (uint8_t *) c->buf + done,
    .count = min_u64 (length, c->count - done),
    .limit = done == 0 ? length : min_u64 (length, c->count - done),
    .min_hole = c->min_hole,
  };

  if (read_fn (opaque, offset, &piece) == -1)
    return -1;
  if (piece.is_hole)
    return chunk_add_zeroes (c, piece.length);
  c->length += piece.length;
  return c->buf == NULL;
}
