/* nbdkit-dirty-bitmap-filter
 * SPDX-License-Identifier: BSD-3-Clause
 * Copyright the nbdkit-dirty-bitmap-filter authors
 */

/* The door of the room: what all implementations of a container share.
 *
 * How this works
 *
 * This is the door to every implementation of a container.  It handles for
 * all of them the end of the container and needless barriers.
 *
 * - The size only grows while requests are under way.  An implementation
 *   makes the new range usable first and stores the new size last, with
 *   release order.  A request loads the size once, with acquire order, so it
 *   never asks an implementation for more than it can serve.
 * - Bytes beyond the end read as zeroes, and zeroing them needs nothing:
 *   a write that grows the container later finds zeroes there.
 * - Growing is rare and is serialised by grow_lock.
 *
 * Needless barriers: each change is counted when it has ended, before its
 * caller knows, whether it succeeded or not (a failed change, or a refused
 * fast zero, may be there in part).  A flush notes the count, and then
 * flushes.  If it succeeds, it has covered at least as many changes as it
 * noted.  So a flush that finds the same count again has nothing to do.  The
 * first flush is always made: other processes may have written the file.
 * Flushes are serialised by flush_lock.  The kernel reports an error once, so
 * the next flush succeeds whatever the previous one lost.  Failed flushes are
 * counted before the lock is released: a caller whose flush succeeded sees in
 * the count whether one failed before it.  Reads and writes take no lock
 * here, unless an implementation takes only whole blocks (blocks.c).
 */

#include <config.h>

#include <errno.h>
#include <stdlib.h>
#include <string.h>

#include "common/bytes.h"
#include "common/cleanup.h"
#include "container/blocks.h"
#include "container/container.h"

/* File offsets are signed wherever the bytes end up being stored. */
#define MAX_SIZE ((uint64_t) INT64_MAX)

void
container_init (struct container *c, const struct container_ops *ops,
                uint64_t size, bool readonly)
{
  c->ops = ops;
  atomic_init (&c->size, size);
  atomic_init (&c->failed_flushes, 0);
  c->readonly = readonly;
  c->abilities = (struct container_abilities) {
    .zero = true, .zero_fast = true, .trim = true, .cache = true,
    .flush = true,
  };
  pthread_mutex_init (&c->grow_lock, NULL);
  pthread_mutex_init (&c->flush_lock, NULL);
  blocks_init (c);
}

/* A change has ended.  Release order: a thread that counts it sees it done. */
static int
changed (struct container *c, int r)
{
  atomic_fetch_add_explicit (&c->changes[shard_of_thread ()].count, 1,
                             memory_order_release);
  if (r == -1 && (errno == EDQUOT || errno == EFBIG))
    errno = ENOSPC;
  return r;
}

static uint64_t
count_changes (struct container *c)
{
  uint64_t n = 0;

  for (unsigned i = 0; i < NR_SHARDS; ++i)
    n += atomic_load_explicit (&c->changes[i].count, memory_order_acquire);
  return n;
}

/* How much of [offset, offset + count) lies before the end? */
static uint64_t
clip (struct container *c, uint64_t count, uint64_t offset)
{
  const uint64_t size = container_size (c);

  if (offset >= size)
    return 0;
  return min_u64 (count, size - offset);
}

static int
check_writable (const struct container *c)
{
  if (!c->readonly)
    return 0;
  errno = EROFS;
  return -1;
}

int
container_pread (struct container *c, void *buf, size_t count, uint64_t offset)
{
  const size_t n = clip (c, count, offset);

  if (n > 0 &&
      (c->block_bytes == 1 ? c->ops->pread (c, buf, n, offset)
       : blocks_pread (c, buf, n, offset)) == -1)
    return -1;
  if (n < count)
    memset ((char *) buf + n, 0, count - n);
  return 0;
}

int
container_pwrite (struct container *c, const void *buf, size_t count,
                  uint64_t offset)
{
  if (check_writable (c) == -1)
    return -1;
  if (count == 0)
    return 0;
  if (range_exceeds (offset, count, MAX_SIZE)) {
    errno = EFBIG;
    return -1;
  }
  if (container_reserve (c, offset + count) == -1)
    return -1;
  return changed (c, c->block_bytes == 1
                  ? c->ops->pwrite (c, buf, count, offset)
                  : blocks_pwrite (c, buf, count, offset));
}

static int
try_durable (struct container *c, const void *buf, size_t count,
             uint64_t offset)
{
  if (c->ops->pwrite_durable == NULL || c->readonly || count == 0 ||
      c->block_bytes != 1 || clip (c, count, offset) < count)
    return 1;
  return c->ops->pwrite_durable (c, buf, count, offset);
}

int
container_pwrite_durable (struct container *c, const void *buf, size_t count,
                          uint64_t offset)
{
  const int r = try_durable (c, buf, count, offset);

  if (r == 1)
    return container_pwrite (c, buf, count, offset) == -1 ? -1 : 1;
  return changed (c, r);
}

int
container_zero (struct container *c, uint64_t count, uint64_t offset,
                bool punch)
{
  if (check_writable (c) == -1)
    return -1;
  count = clip (c, count, offset);
  if (count == 0)
    return 0;
  return changed (c, c->block_bytes == 1
                  ? c->ops->zero (c, count, offset, punch)
                  : blocks_zero (c, count, offset, punch));
}

/* The whole blocks of a range: how many bytes. */
static uint64_t
whole_blocks (const struct container *c, uint64_t count, uint64_t *offset)
{
  const uint64_t first = round_up (*offset, c->block_bytes);
  const uint64_t end = round_down (*offset + count, c->block_bytes);

  *offset = first;
  return first < end ? end - first : 0;
}

int
container_zero_fast (struct container *c, uint64_t count, uint64_t offset,
                     bool punch)
{
  uint64_t first = offset;

  if (check_writable (c) == -1)
    return -1;
  count = clip (c, count, offset);
  if (count == 0)
    return 0;
  if (c->ops->zero_fast == NULL || whole_blocks (c, count, &first) != count)
    return 1;
  return changed (c, c->ops->zero_fast (c, count, offset, punch));
}

int
container_trim (struct container *c, uint64_t count, uint64_t offset)
{
  if (check_writable (c) == -1)
    return -1;
  count = clip (c, count, offset);
  if (count > 0)                /* or rounding offset up may wrap */
    count = whole_blocks (c, count, &offset);
  if (count == 0)
    return 0;
  return changed (c, c->ops->trim != NULL ? c->ops->trim (c, count, offset)
                  : c->ops->zero (c, count, offset, true));
}

int
container_cache (struct container *c, uint64_t count, uint64_t offset)
{
  count = clip (c, count, offset);
  if (count == 0 || c->ops->cache == NULL)
    return 0;
  return c->ops->cache (c, count, offset);
}

int
container_extent (struct container *c, uint64_t offset, uint64_t count,
                  uint64_t *length, unsigned *flags)
{
  const uint64_t inside = clip (c, count, offset);

  *flags = inside == 0 ? CONTAINER_HOLE | CONTAINER_ZERO : 0;
  *length = inside == 0 ? count : inside;
  if (inside == 0 || c->ops->extent == NULL)
    return 0;
  return c->ops->extent (c, offset, inside, length, flags);
}

int
container_allocated (struct container *c, uint64_t *bytes)
{
  if (c->ops->allocated != NULL)
    return c->ops->allocated (c, bytes);
  errno = ENOTSUP;
  return -1;
}

int
container_flush (struct container *c)
{
  if (c->readonly)
    return 0;
  ACQUIRE_LOCK_FOR_CURRENT_SCOPE (&c->flush_lock);
  const uint64_t done = count_changes (c);
  const uint64_t began = meter_clock ();

  if (c->is_flushed && c->flushed == done)
    return 0;
  c->is_flushed = c->ops->flush (c) == 0;
  if (!c->is_flushed) {
    atomic_fetch_add (&c->failed_flushes, 1);
    return -1;
  }
  c->flushed = done;
  tally_add (&c->flushes, 1);
  tally_add (&c->flush_ns, meter_clock () - began);
  return 0;
}

unsigned long
container_failed_flushes (struct container *c)
{
  return atomic_load (&c->failed_flushes);
}

int
container_reserve (struct container *c, uint64_t end)
{
  if (end <= container_size (c))
    return 0;
  if (check_writable (c) == -1)
    return -1;
  if (end > MAX_SIZE) {
    errno = EFBIG;
    return -1;
  }

  ACQUIRE_LOCK_FOR_CURRENT_SCOPE (&c->grow_lock);
  if (end <= container_size (c))
    return 0;                   /* Another thread was faster. */

  const uint64_t before = container_size (c);
  const int r = changed (c, c->ops->grow (c, end));

  tally_add (&c->grown_bytes, container_size (c) - before);
  return r;
}

int
container_truncate (struct container *c, uint64_t size)
{
  if (check_writable (c) == -1)
    return -1;
  ACQUIRE_LOCK_FOR_CURRENT_SCOPE (&c->grow_lock);
  if (size >= container_size (c))
    return 0;
  return changed (c, c->ops->truncate (c, size));
}

void
container_close (struct container *c)
{
  if (c == NULL)
    return;
  pthread_mutex_destroy (&c->grow_lock);
  pthread_mutex_destroy (&c->flush_lock);
  blocks_free (c);
  c->ops->close (c);
}
