/* nbdkit-dirty-bitmap-filter
 * SPDX-License-Identifier: BSD-3-Clause
 * Copyright the nbdkit-dirty-bitmap-filter authors
 */

/* Putting the bitmaps extension into the header.
 *
 * A program that reads the header between two of our writes must not be
 * misled.  So every change is either one atomic write (gate.c), or several
 * with barriers between them, of which only the last makes a difference to a
 * reader:
 *
 *   - when there was no extension: it goes where the END marker is, so
 *     nothing behind the marker counts for a reader.  Everything behind its
 *     first eight bytes is written first; barrier; then the eight bytes.
 *   - when there is one: its 24 bytes of data are patched, in one write if
 *     they do not cross a multiple of 512.  If they do, the autoclear bit is
 *     cleared first and set after, so that a crash in between leaves bitmaps
 *     that no program trusts.
 */

#include <config.h>

#include <errno.h>
#include <stdlib.h>

#include "qcow2/internal.h"

static int
invalid (int err)
{
  errno = err;
  return -1;
}

/* The size of the bitmaps extension with the END marker. */
#define END_MARKER_SIZE 8
#define BITMAPS_EXTENSION_ROOM (32 + END_MARKER_SIZE)

/* The backing file's name usually follows the extensions, and then has to
 * make room for a new extension.  It moves to right behind itself, so that
 * the name is whole in one of the two places whenever a crash comes.
 * Its old bytes then lie behind the END marker.  Returns the new offset, or
 * 0 if the name cannot move or is not in the way.
 */
static uint64_t
backing_name_can_move (const struct qcow2 *q)
{
  const struct header_state *hs = &q->hs;
  const uint64_t name = get_be64 (hs->cluster + HEADER_BACKING_OFFSET);
  const uint64_t size = get_be32 (hs->cluster + HEADER_BACKING_SIZE);
  uint64_t to;

  if (name == 0 || name != hs->ext.limit ||
      hs->ext.end + END_MARKER_SIZE > name ||
      size > q->cluster_size - name)
    return 0;
  to = round_up (max_u64 (name + size,
                          hs->ext.end + BITMAPS_EXTENSION_ROOM), 8);
  return to <= q->cluster_size && size <= q->cluster_size - to ? to : 0;
}

/* With hs.lock held: is there room for another extension, or can room be
 * made?
 */
static bool
has_room (const struct qcow2 *q)
{
  const struct header_state *hs = &q->hs;

  return hs->ext.end <= hs->ext.limit &&
    hs->ext.limit - hs->ext.end >= 32;
}

/* Write what must be durable before what follows it, as `order` says. */
static int
write_first (struct qcow2 *q, bool order, uint64_t offset, size_t count)
{
  return (order ? gate_write_header_durably : gate_write_header)
    (q, offset, count);
}

static int
move_backing_name (struct qcow2 *q)
{
  struct header_state *hs = &q->hs;
  const uint64_t name = hs->ext.limit, to = backing_name_can_move (q);
  const uint32_t size = get_be32 (hs->cluster + HEADER_BACKING_SIZE);

  memcpy (hs->cluster + to, hs->cluster + name, size);
  if (write_first (q, ORDER (NAME_BEFORE_OFFSET), to, size) == -1)
    return -1;
  put_be64 (hs->cluster + HEADER_BACKING_OFFSET, to);
  if (gate_write_header_durably (q, HEADER_BACKING_OFFSET, 8) == -1) {
    /* Either offset may be on disk, and both are valid. */
    put_be64 (hs->cluster + HEADER_BACKING_OFFSET, name);
    return -1;
  }
  hs->ext.limit = to;
  return 0;
}

/* Put an extension where the END marker is. */
static int
append_extension (struct qcow2 *q, const uint8_t data[24])
{
  struct header_state *hs = &q->hs;
  const uint64_t at = hs->ext.end;
  bool room_for_end;

  if (!has_room (q) && move_backing_name (q) == -1)
    return -1;
  room_for_end = hs->ext.limit - at >= BITMAPS_EXTENSION_ROOM;

  /* No program trusts it yet. */
  if (gate_set_autoclear (q, q->header.autoclear & ~AUTOCLEAR_BITMAPS) == -1)
    return -1;

  memcpy (hs->cluster + at + 8, data, 24);
  if (room_for_end)
    memset (hs->cluster + at + 32, 0, 8);
  if (write_first (q, ORDER (EXTENSION_BEFORE_MAGIC), at + 8,
                   room_for_end ? 32 : 24) == -1)
    return -1;
  put_be32 (hs->cluster + at, HEADER_EXT_BITMAPS);
  put_be32 (hs->cluster + at + 4, 24);
  if (write_first (q, ORDER (EXTENSION_BEFORE_AUTOCLEAR), at, 8) == -1) {
    /* The marker may or may not be gone: another attempt must put the
     * extension in the same place.
     */
    memset (hs->cluster + at, 0, 8);
    return -1;
  }
  hs->ext.end = at + 32;
  hs->ext.bitmaps_offset = at + 8;
  hs->ext.bitmaps.count = 1;
  return 0;
}

static int
patch_extension (struct qcow2 *q, const uint8_t data[24])
{
  const uint64_t at = q->hs.ext.bitmaps_offset;
  const bool crosses =
    at / HEADER_SECTOR_BYTES != (at + 23) / HEADER_SECTOR_BYTES;

  if (crosses && ORDER (DISTRUST_WHILE_PATCHING) &&
      gate_set_autoclear (q, q->header.autoclear & ~AUTOCLEAR_BITMAPS) == -1)
    return -1;
  memcpy (q->hs.cluster + at, data, 24);
  if (write_first (q, ORDER (EXTENSION_BEFORE_AUTOCLEAR), at, 24) == -1)
    return -1;
  return 0;
}

int
qcow2_check_bitmaps_extension (struct qcow2 *q)
{
  const struct header_state *hs = &q->hs;

  if (q->header.version < 3) {
    report_error ("a qcow2 image of version 2 cannot keep dirty bitmaps; "
                  "qemu-img amend -o compat=1.1 makes it version 3");
    return invalid (ENOTSUP);
  }
  ACQUIRE_LOCK_FOR_CURRENT_SCOPE (&q->hs.lock);
  if (hs->ext.bitmaps.count > 1 ||
      (hs->ext.bitmaps.count == 1 && hs->ext.bitmaps.length != 24)) {
    report_error ("the bitmaps extension of the image is damaged");
    return invalid (EINVAL);
  }
  if (hs->ext.bitmaps.count == 0 && !has_room (q) &&
      backing_name_can_move (q) == 0) {
    report_error ("the header of the image has no room for the bitmaps "
                  "extension");
    return invalid (ENOSPC);
  }
  return 0;
}

int
qcow2_set_bitmaps_extension (struct qcow2 *q, uint32_t nr_bitmaps,
                             uint64_t directory_size_bytes,
                             uint64_t directory_offset)
{
  uint8_t data[24] = { 0 };

  if (qcow2_check_bitmaps_extension (q) == -1)
    return -1;
  if (qcow2_begin_writing (q) == -1)
    return -1;

  ACQUIRE_LOCK_FOR_CURRENT_SCOPE (&q->hs.lock);
  put_be32 (data, nr_bitmaps);
  put_be64 (data + 8, directory_size_bytes);
  put_be64 (data + 16, directory_offset);
  if ((q->hs.ext.bitmaps.count == 0 ? append_extension (q, data)
                                : patch_extension (q, data)) == -1)
    return -1;
  q->hs.ext.bitmaps.length = 24;
  q->hs.ext.bitmaps.reserved = 0;
  q->hs.ext.bitmaps.nr_bitmaps = nr_bitmaps;
  q->hs.ext.bitmaps.directory_size_bytes = directory_size_bytes;
  q->hs.ext.bitmaps.directory_offset = directory_offset;
  return gate_set_autoclear (q, q->header.autoclear | AUTOCLEAR_BITMAPS);
}
