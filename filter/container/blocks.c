/* nbdkit-dirty-bitmap-filter
 * SPDX-License-Identifier: BSD-3-Clause
 * Copyright the nbdkit-dirty-bitmap-filter authors
 */

/* Requests of any range, over storage that takes only whole blocks.
 *
 * How this works
 *
 * Some storage takes only whole blocks: multiples of the minimum block size,
 * which NBD servers and some plugins have.  The qcow2 format and the guest
 * do not know of blocks.  So a read reads the blocks around it, and a write
 * that covers a block in part reads, modifies and writes it.
 *
 * Until that write has ended, no other write may change the block, in whole
 * or in part: the old bytes would overwrite the new ones.  So each write
 * announces which blocks it will change.  If it covers some of them in part,
 * it waits until no other write to any of its blocks is under way, and other
 * writes wait for it.  Writes of whole blocks do not wait for each other: if
 * they overlap, their order is the guest's own affair.
 *
 * blocks_lock is held for a moment only, to enter the list of the writes
 * under way and to leave it.  Nothing here is called for storage that takes
 * any range.
 */

#include <config.h>

#include <stdlib.h>
#include <string.h>

#include "common/bytes.h"
#include "common/cleanup.h"
#include "container/blocks.h"
#include "container/container.h"

/* A write under way. */
struct blocks_range {
  uint64_t first, end;          /* bytes, of whole blocks */
  bool in_part;                 /* some of them are covered in part */
  struct blocks_range *next;
};

void
blocks_init (struct container *c)
{
  c->block_bytes = 1;
  pthread_mutex_init (&c->blocks_lock, NULL);
  pthread_cond_init (&c->blocks_cond, NULL);
}

void
blocks_free (struct container *c)
{
  pthread_mutex_destroy (&c->blocks_lock);
  pthread_cond_destroy (&c->blocks_cond);
}

static bool
must_wait (const struct container *c, const struct blocks_range *r)
{
  for (const struct blocks_range *p = c->blocks_under_way; p; p = p->next)
    if (p->first < r->end && r->first < p->end && (p->in_part || r->in_part))
      return true;
  return false;
}

static void
begin_write (struct container *c, struct blocks_range *r, uint64_t count,
             uint64_t offset)
{
  r->first = round_down (offset, c->block_bytes);
  r->end = round_up (offset + count, c->block_bytes);
  r->in_part = r->first != offset || r->end != offset + count;

  ACQUIRE_LOCK_FOR_CURRENT_SCOPE (&c->blocks_lock);
  while (must_wait (c, r))
    pthread_cond_wait (&c->blocks_cond, &c->blocks_lock);
  r->next = c->blocks_under_way;
  c->blocks_under_way = r;
}

static void
end_write (struct container *c, struct blocks_range *r)
{
  ACQUIRE_LOCK_FOR_CURRENT_SCOPE (&c->blocks_lock);
  struct blocks_range **p = &c->blocks_under_way;

  while (*p != r)
    p = &(*p)->next;
  *p = r->next;
  pthread_cond_broadcast (&c->blocks_cond);
}

/* A range is processed piece by piece: whole blocks, or a part of one. */
struct piece {
  uint64_t count;
  uint32_t skip;                /* bytes of the block before the part */
  bool is_part;
};

static struct piece
next_piece (const struct container *c, uint64_t count, uint64_t offset)
{
  struct piece p = { .skip = offset & (c->block_bytes - 1) };

  p.is_part = p.skip != 0 || count < c->block_bytes;
  p.count = p.is_part ? min_u64 (count, c->block_bytes - p.skip)
    : round_down (count, c->block_bytes);
  return p;
}

/* Read the block that contains a part into *block, which is allocated once. */
static int
read_block (struct container *c, uint8_t **block, const struct piece *p,
            uint64_t offset)
{
  if (*block == NULL)
    *block = malloc (c->block_bytes);
  if (*block == NULL)
    return -1;
  return c->ops->pread (c, *block, c->block_bytes, offset - p->skip);
}

int
blocks_pread (struct container *c, void *buf, size_t count, uint64_t offset)
{
  CLEANUP_FREE uint8_t *block = NULL;
  uint8_t *to = buf;

  while (count > 0) {
    const struct piece p = next_piece (c, count, offset);

    if (p.is_part) {
      if (read_block (c, &block, &p, offset) == -1)
        return -1;
      memcpy (to, block + p.skip, p.count);
    }
    else if (c->ops->pread (c, to, p.count, offset) == -1)
      return -1;
    to += p.count;
    offset += p.count;
    count -= p.count;
  }
  return 0;
}

/* Write from a buffer, or zeroes if there is none. */
static int
write_pieces (struct container *c, const uint8_t *from, uint64_t count,
              uint64_t offset, bool punch)
{
  CLEANUP_FREE uint8_t *block = NULL;
  int r;

  while (count > 0) {
    const struct piece p = next_piece (c, count, offset);

    if (p.is_part) {
      if (read_block (c, &block, &p, offset) == -1)
        return -1;
      if (from != NULL)
        memcpy (block + p.skip, from, p.count);
      else
        memset (block + p.skip, 0, p.count);
      r = c->ops->pwrite (c, block, c->block_bytes, offset - p.skip);
    }
    else if (from != NULL)
      r = c->ops->pwrite (c, from, p.count, offset);
    else
      r = c->ops->zero (c, p.count, offset, punch);
    if (r == -1)
      return -1;
    if (from != NULL)
      from += p.count;
    offset += p.count;
    count -= p.count;
  }
  return 0;
}

static int
write_range (struct container *c, const void *from, uint64_t count,
             uint64_t offset, bool punch)
{
  struct blocks_range range;
  int r;

  begin_write (c, &range, count, offset);
  r = write_pieces (c, from, count, offset, punch);
  end_write (c, &range);
  return r;
}

int
blocks_pwrite (struct container *c, const void *buf, size_t count,
               uint64_t offset)
{
  return write_range (c, buf, count, offset, false);
}

int
blocks_zero (struct container *c, uint64_t count, uint64_t offset, bool punch)
{
  return write_range (c, NULL, count, offset, punch);
}
