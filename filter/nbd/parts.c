/* nbdkit-dirty-bitmap-filter
 * SPDX-License-Identifier: BSD-3-Clause
 * Copyright the nbdkit-dirty-bitmap-filter authors
 */

/* Large data, part by part.
 *
 * Up to a limit, data are read whole before they are sent, so that the
 * threads of a connection copy the data of several requests at once.  Above it
 * they are moved in parts that stay in the CPU's cache between the two copies,
 * and a small buffer is enough.
 *
 * A READ with structured replies is answered by a chunk a part.  If one
 * cannot be read, an error with its offset ends the reply, and the chunks
 * before it stand.  With simple replies, and where the client wants it in
 * one chunk (DF), it must be known that all can be read before the first
 * byte is sent.
 *
 * Of such a READ a part ends, too, where a hole begins, and a hole is a
 * part of its own, however long: a chunk without data, for which nothing is
 * read and no memory is taken.  A chunk costs the client something, and us
 * a look at the mapping.  So:
 * - a READ that fits into the output buffer, SMALL_CHUNKS of them at most.
 *   The last one has all that is left, as data unless all of it is a hole.
 *   A hole is told from SMALL_HOLE bytes on, the smallest cluster, and
 *   found in the look-up that says where the data are;
 * - of a longer one any number, but a hole has LARGE_HOLE bytes at least.
 *   It is looked for before a buffer is taken.
 * All of a READ that is a hole is told as one, whatever its length.
 *
 * A WRITE is received whole, and then written, so what is on the disk of one
 * that did not come whole is nothing.
 */

#include <config.h>

#include "common/bytes.h"
#include "disk/disk.h"
#include "nbd/contents.h"
#include "nbd/parts.h"
#include "nbd/reply.h"
#include "nbd/team.h"

/* Large data are moved in parts of this size. */
#define PART_SIZE (128 * 1024)

uint32_t parts_above = 1024 * 1024;

/* A multiple of this is beyond any part. */
#define WHOLE (UINT64_C (1) << 62)

#define SMALL_CHUNKS 4
#define SMALL_HOLE 512
#define LARGE_HOLE (32 * 1024)

/* The chunks of holes that wait for data to be sent with fit into the
 * output buffer: there are no more than that of a LARGE_HOLE each.
 */
_Static_assert (NBD_MAX_PAYLOAD / LARGE_HOLE * 48 <= REPLY_ROOM,
                "no room for the headers of holes");

void
part_whole (struct worker *w)
{
  w->part = (struct part) {
    .offset = w->request.offset, .length = w->request.length,
    .is_whole = true, .is_last = true,
  };
}

/* The part that begins at offset and ends at a multiple of size, or where
 * the request does.
 */
static void
part_from (struct worker *w, uint64_t offset, uint64_t size)
{
  const uint64_t end = w->request.offset + w->request.length;
  const uint64_t until = min_u64 (round_down (offset, size) + size, end);

  w->part = (struct part) {
    .offset = offset, .length = until - offset, .is_last = until == end,
  };
}

static bool
is_in_chunks (const struct worker *w)
{
  return w->session->structured && w->request.length > 0 &&
    (w->request.flags & NBD_CMD_FLAG_DF) == 0;
}

void
part_first_read (struct worker *w)
{
  const struct request *r = &w->request;

  if (r->length <= parts_above || !is_in_chunks (w))
    part_whole (w);
  else
    part_from (w, r->offset, PART_SIZE);
  w->part.chunks_left = SMALL_CHUNKS;
}

void
part_next_read (struct worker *w)
{
  const unsigned left = w->part.chunks_left;

  part_from (w, w->part.offset + w->part.length,
             w->request.length > parts_above ? PART_SIZE : WHOLE);
  w->part.chunks_left = left > 1 ? left - 1 : 1;
}

static int
read_chunk (struct worker *w, struct qcow2_chunk *chunk)
{
  return contents_read_chunk (w->service->disk, &w->session->export,
                              w->part.offset, chunk);
}

/* A chunk of a READ that fits into the output buffer. */
static int
read_small_chunk (struct worker *w, struct qcow2_chunk *chunk)
{
  chunk->buf = reply_read_place (w);
  chunk->min_hole = w->part.chunks_left > 1 ? SMALL_HOLE : UINT64_MAX;
  return read_chunk (w, chunk);
}

static int
read_large_chunk (struct worker *w, struct qcow2_chunk *chunk)
{
  chunk->min_hole = LARGE_HOLE;
  if (read_chunk (w, chunk) == -1)
    return -1;
  if (chunk->is_hole)
    return 0;
  chunk->buf = worker_payload (w, w->part.length);
  return chunk->buf == NULL ? -1 : read_chunk (w, chunk);
}

static int
read_part_chunk (struct worker *w)
{
  struct part *p = &w->part;
  const uint64_t end = w->request.offset + w->request.length;
  struct qcow2_chunk chunk = {
    .count = p->length, .limit = end - p->offset,
  };
  const int r = w->request.length <= REPLY_ROOM
    ? read_small_chunk (w, &chunk) : read_large_chunk (w, &chunk);

  if (r == -1)
    return -1;
  p->length = chunk.length;
  p->is_hole = chunk.is_hole;
  p->is_last = p->offset + p->length == end;
  if (!p->is_last)
    p->is_whole = false;
  return 0;
}

int
part_read (struct worker *w)
{
  const struct part *p = &w->part;
  uint8_t *data;

  if (is_in_chunks (w))
    return read_part_chunk (w);
  data = p->length <= REPLY_ROOM ? reply_read_place (w)
                                 : worker_payload (w, p->length);
  if (data == NULL)
    return -1;
  return contents_read (w->service->disk, &w->session->export, data,
                        p->length, p->offset);
}
