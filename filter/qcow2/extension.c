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
 *   - when it is removed: the autoclear bit is cleared first.  Then the END
 *     marker takes its place; or, if other extensions follow, its magic
 *     becomes one that programs skip.  The next extension is put there.
 */

#include <config.h>

#include <assert.h>
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

  assert (lock_is_mine (&q->hs.lock));
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

/* Write the magic of an extension whose data begin at offset `at`. */
static int
write_magic (struct qcow2 *q, uint64_t at, uint32_t magic, uint32_t length)
{
  put_be32 (q->hs.cluster + at - 8, magic);
  put_be32 (q->hs.cluster + at - 4, length);
  return write_first (q, ORDER (EXTENSION_BEFORE_AUTOCLEAR), at - 8, 8);
}

/* Put an extension where another one was removed. */
static int
reuse_extension (struct qcow2 *q, const uint8_t data[24])
{
  struct header_state *hs = &q->hs;
  const uint64_t at = hs->ext.removed_offset;

  if (gate_set_autoclear (q, q->header.autoclear & ~AUTOCLEAR_BITMAPS) == -1)
    return -1;
  memcpy (hs->cluster + at, data, 24);
  if (write_first (q, ORDER (EXTENSION_BEFORE_MAGIC), at, 24) == -1)
    return -1;
  if (write_magic (q, at, HEADER_EXT_BITMAPS, 24) == -1) {
    put_be32 (hs->cluster + at - 8, HEADER_EXT_REMOVED);
    return -1;
  }
  hs->ext.bitmaps_offset = at;
  hs->ext.bitmaps.count = 1;
  hs->ext.removed_offset = 0;
  return 0;
}

/* Do the data of the extension at this offset lie in two sectors? */
static bool
crosses_sectors (uint64_t at)
{
  return at / HEADER_SECTOR_BYTES != (at + 23) / HEADER_SECTOR_BYTES;
}

static int
patch_extension (struct qcow2 *q, const uint8_t data[24])
{
  const uint64_t at = q->hs.ext.bitmaps_offset;

  if (crosses_sectors (at) && ORDER (DISTRUST_WHILE_PATCHING) &&
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
  if (hs->ext.bitmaps.count == 0 && hs->ext.removed_offset == 0 &&
      !has_room (q) && backing_name_can_move (q) == 0) {
    report_error ("the header of the image has no room for the bitmaps "
                  "extension");
    return invalid (ENOSPC);
  }
  return 0;
}

static void
put_data (uint8_t data[24], uint32_t nr_bitmaps,
          uint64_t directory_size_bytes, uint64_t directory_offset)
{
  memset (data, 0, 24);
  put_be32 (data, nr_bitmaps);
  put_be64 (data + 8, directory_size_bytes);
  put_be64 (data + 16, directory_offset);
}

int
qcow2_set_bitmaps_extension (struct qcow2 *q, uint32_t nr_bitmaps,
                             uint64_t directory_size_bytes,
                             uint64_t directory_offset)
{
  uint8_t data[24];

  if (qcow2_check_bitmaps_extension (q) == -1)
    return -1;
  if (qcow2_begin_writing (q) == -1)
    return -1;

  put_data (data, nr_bitmaps, directory_size_bytes, directory_offset);
  ACQUIRE_LOCK_FOR_CURRENT_SCOPE (&q->hs.lock);
  if ((q->hs.ext.bitmaps.count != 0 ? patch_extension
       : q->hs.ext.removed_offset != 0 ? reuse_extension
       : append_extension) (q, data) == -1)
    return -1;
  q->hs.ext.bitmaps.length = 24;
  q->hs.ext.bitmaps.reserved = 0;
  q->hs.ext.bitmaps.nr_bitmaps = nr_bitmaps;
  q->hs.ext.bitmaps.directory_size_bytes = directory_size_bytes;
  q->hs.ext.bitmaps.directory_offset = directory_offset;
  return gate_set_autoclear (q, q->header.autoclear | AUTOCLEAR_BITMAPS);
}

/* Take the extension whose data begin at offset `at` out of the list. */
static int
take_out (struct qcow2 *q, uint64_t at)
{
  struct header_state *hs = &q->hs;
  const bool is_last = at + 24 >= hs->ext.end;

  if (write_magic (q, at, is_last ? HEADER_EXT_END : HEADER_EXT_REMOVED,
                   is_last ? 0 : 24) == -1) {
    put_be32 (hs->cluster + at - 8, HEADER_EXT_BITMAPS);
    put_be32 (hs->cluster + at - 4, 24);
    return -1;
  }
  if (is_last)
    hs->ext.end = at - 8;
  hs->ext.removed_offset = is_last ? 0 : at;
  hs->ext.bitmaps = (struct qcow2_bitmaps_extension) { 0 };
  hs->ext.bitmaps_offset = 0;
  return 0;
}

int
qcow2_remove_bitmaps_extension (struct qcow2 *q)
{
  if (qcow2_check_bitmaps_extension (q) == -1 ||
      qcow2_begin_writing (q) == -1)
    return -1;
  ACQUIRE_LOCK_FOR_CURRENT_SCOPE (&q->hs.lock);
  if (gate_set_autoclear (q, q->header.autoclear & ~AUTOCLEAR_BITMAPS) == -1)
    return -1;
  return q->hs.ext.bitmaps.count == 0 ? 0
    : take_out (q, q->hs.ext.bitmaps_offset);
}

/* As gate_set_autoclear, though the image may have other bits than those that
 * we know.
 */
static int
force_autoclear (struct qcow2 *q, bool bitmaps)
{
  const uint64_t known = q->header.autoclear;
  const uint64_t bits =
    bitmaps ? known | AUTOCLEAR_BITMAPS : known & ~AUTOCLEAR_BITMAPS;

  q->header.autoclear = ~bits;
  if (gate_set_autoclear (q, bits) == 0)
    return 0;
  q->header.autoclear = known;
  put_be64 (q->hs.cluster + HEADER_AUTOCLEAR, known);
  return -1;
}

/* There was none: what may have been put into the list is taken out. */
static int
restore_none (struct qcow2 *q)
{
  const struct header_extensions *ext = &q->hs.ext;

  return take_out (q, ext->bitmaps_offset != 0 ? ext->bitmaps_offset
                      : ext->removed_offset != 0 ? ext->removed_offset
                      : ext->end + 8);
}

static int
restore_old (struct qcow2 *q, const struct qcow2_bitmaps_extension *old)
{
  const uint64_t at = q->hs.ext.bitmaps_offset;

  put_data (q->hs.cluster + at, old->nr_bitmaps, old->directory_size_bytes,
            old->directory_offset);
  if (gate_write_header_durably (q, at, 24) == -1 ||
      write_magic (q, at, HEADER_EXT_BITMAPS, 24) == -1 ||
      (old->autoclear && force_autoclear (q, true) == -1))
    return -1;
  q->hs.ext.bitmaps = *old;
  return 0;
}

int
qcow2_restore_bitmaps_extension (struct qcow2 *q,
                                 const struct qcow2_bitmaps_extension *old)
{
  ACQUIRE_LOCK_FOR_CURRENT_SCOPE (&q->hs.lock);
  /* One sector is restored at once. */
  if ((old->count == 0 || !old->autoclear ||
       crosses_sectors (q->hs.ext.bitmaps_offset)) &&
      force_autoclear (q, false) == -1)
    return -1;
  return old->count == 0 ? restore_none (q) : restore_old (q, old);
}
