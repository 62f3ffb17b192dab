/* nbdkit-dirty-bitmap-filter
 * SPDX-License-Identifier: BSD-3-Clause
 * Copyright the nbdkit-dirty-bitmap-filter authors
 */

/* Large data, part by part.
 *
 * Up to a limit, data are received whole before they are written, and read
 * whole before they are sent, so that the threads of a connection copy
 * the data of several requests at once.  Above it they are moved in parts
 * that stay in the CPU's cache between the two copies, and a small buffer
 * is enough.
 *
 * A READ with structured replies is answered by a chunk a part.  If one
 * cannot be read, an error with its offset ends the reply, and the chunks
 * before it stand.  With simple replies, and where the client wants it in
 * one chunk (DF), it must be known that all can be read before the first
 * byte is sent.
 *
 * Of a WRITE each part is written when it has come, ending where clusters
 * end, so that no cluster is filled up with what is then overwritten.  If
 * one cannot be written, the rest is received and thrown away, and the
 * error is that of the request.  If the client vanishes, what has come is
 * written and was not acknowledged.  Received as a whole are still:
 *
 * - a WRITE with FUA: its barrier must know of any other that has failed
 *   since the first byte was written (disk.c);
 * - those of an eager connection (role.c).  The worker keeps the role
 *   until the payload has come, so a disk that sleeps would be asked for
 *   one part after the other, and not for many requests at once.
 *
 * No lock is held while a part is waited for, and the role is in a state
 * in which it cannot be stolen (OWNED): what comes next on the socket is
 * the rest of the payload, not a request.
 */

#include <config.h>

#include <errno.h>

#include "common/bytes.h"
#include "nbd/internal.h"

uint32_t parts_above = 1024 * 1024;

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

void
part_first_read (struct worker *w)
{
  const struct request *r = &w->request;

  if (r->length <= parts_above || !w->connection->structured ||
      (r->flags & NBD_CMD_FLAG_DF) != 0)
    part_whole (w);
  else
    part_from (w, r->offset, PART_SIZE);
}

void
part_next_read (struct worker *w)
{
  part_from (w, w->part.offset + w->part.length, PART_SIZE);
}

static uint64_t
write_size (const struct worker *w)
{
  return max_u64 (PART_SIZE, w->connection->server->preferred_block_size);
}

/* Of what is left of a WRITE, may a part be written before the rest? */
static bool
is_to_be_cut (const struct worker *w)
{
  return w->request.length > parts_above &&
    w->part.length > write_size (w) &&
    (w->request.flags & NBD_CMD_FLAG_FUA) == 0 &&
    !atomic_load_explicit (&w->connection->eager, memory_order_relaxed);
}

/* Each part is measured, so that the connection of a disk that sleeps is
 * soon eager.
 */
static int
write_part (struct worker *w)
{
  struct connection *c = w->connection;
  const uint64_t began = stats_begin (c->server->stats);
  int r, err;

  c->until_sample = 0;
  pace_begin (w, false);
  r = disk_write (c->server->disk, w->payload, w->part.length,
                  w->part.offset, false);
  err = errno;
  pace_end (w);
  w->spent += stats_begin (c->server->stats) - began;
  return r == 0 ? 0 : err;
}

int
part_receive (struct worker *w, int *err)
{
  struct connection *c = w->connection;
  const uint64_t end = w->request.offset + w->request.length;

  part_whole (w);
  while (is_to_be_cut (w)) {
    const uint64_t offset = w->part.offset;
    uint64_t until;

    part_from (w, offset, write_size (w));
    until = offset + w->part.length;
    if (worker_payload (w, w->part.length) == NULL) {
      *err = ENOMEM;
      return input_skip (c, end - offset);
    }
    if (input_read (c, w->payload, w->part.length) == -1)
      return -1;
    *err = write_part (w);
    if (*err != 0)
      return input_skip (c, end - until);
    w->part = (struct part) {
      .offset = until, .length = end - until, .is_last = true,
    };
  }
  if (w->part.length == 0)
    return 0;
  if (worker_payload (w, w->part.length) == NULL) {
    *err = ENOMEM;
    return input_skip (c, w->part.length);
  }
  return input_read (c, w->payload, w->part.length);
}
