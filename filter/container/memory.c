/* nbdkit-dirty-bitmap-filter
 * SPDX-License-Identifier: BSD-3-Clause
 * Copyright the nbdkit-dirty-bitmap-filter authors
 */

/* A container in memory, for tests.
 *
 * How this works
 *
 * It is sparse: a page is allocated by the first write into it and freed by
 * punching it as a whole, and pages hang in leaves of a two-level table, so
 * that a large and mostly empty image costs next to nothing.  A missing page
 * reads as zeroes.
 *
 * A hook sees every operation that changes or flushes before it happens, and
 * may fail it.  A failed operation has changed nothing.
 *
 * lock protects the table and the bytes of the pages.  It is taken for
 * the duration of one operation, never while the hook runs, and after
 * the container's grow_lock.
 */

#include <config.h>

#include <assert.h>
#include <errno.h>
#include <stdlib.h>
#include <string.h>

#include "common/bytes.h"
#include "common/cleanup.h"
#include "common/lock.h"
#include "container/container.h"

#define PAGE_BYTES ((uint64_t) 65536)
#define LEAF_PAGES 512
#define LEAF_BYTES (PAGE_BYTES * LEAF_PAGES)

struct leaf {
  char *page[LEAF_PAGES];
};

struct memory {
  struct container c;
  uint64_t limit;               /* the container never becomes larger */
  const struct container_memory_hook *_Atomic hook;
  pthread_mutex_t lock;         /* see above */
  struct leaf **leaves;
  size_t nr_leaves;
};

static int
call_hook (struct memory *m, const char *operation,
           uint64_t offset, uint64_t count)
{
  const struct container_memory_hook *hook = atomic_load (&m->hook);
  int err;

  if (hook == NULL || hook->before == NULL)
    return 0;
  err = hook->before (hook->opaque, operation, offset, count);
  if (err != 0) {
    errno = err;
    return -1;
  }
  return 0;
}

/* The slot of the page that holds offset, or NULL if its leaf does not exist
 * (and, with allocate, cannot be allocated).
 */
static char **
find_slot (struct memory *m, uint64_t offset, bool allocate)
{
  const size_t i = offset / LEAF_BYTES;

  if (i >= m->nr_leaves) {
    struct leaf **leaves;

    if (!allocate)
      return NULL;
    leaves = realloc (m->leaves, (i + 1) * sizeof *leaves);
    if (leaves == NULL)
      return NULL;
    memset (leaves + m->nr_leaves, 0,
            (i + 1 - m->nr_leaves) * sizeof *leaves);
    m->leaves = leaves;
    m->nr_leaves = i + 1;
  }
  if (m->leaves[i] == NULL) {
    if (!allocate)
      return NULL;
    m->leaves[i] = calloc (1, sizeof *m->leaves[i]);
    if (m->leaves[i] == NULL)
      return NULL;
  }
  return &m->leaves[i]->page[offset % LEAF_BYTES / PAGE_BYTES];
}

/* How much of [offset, offset + count) lies in the page of offset? */
static size_t
in_page (uint64_t count, uint64_t offset)
{
  return min_u64 (count, PAGE_BYTES - offset % PAGE_BYTES);
}

static int
memory_pread (struct container *c, void *buf, size_t count, uint64_t offset)
{
  struct memory *m = (struct memory *) c;
  char *p = buf;

  ACQUIRE_LOCK_FOR_CURRENT_SCOPE (&m->lock);
  while (count > 0) {
    const size_t n = in_page (count, offset);
    char **slot = find_slot (m, offset, false);

    if (slot != NULL && *slot != NULL)
      memcpy (p, *slot + offset % PAGE_BYTES, n);
    else
      memset (p, 0, n);
    p += n;
    offset += n;
    count -= n;
  }
  return 0;
}

static int
memory_pwrite (struct container *c, const void *buf, size_t count,
               uint64_t offset)
{
  struct memory *m = (struct memory *) c;
  const char *p = buf;

  if (call_hook (m, "pwrite", offset, count) == -1)
    return -1;

  ACQUIRE_LOCK_FOR_CURRENT_SCOPE (&m->lock);
  while (count > 0) {
    const size_t n = in_page (count, offset);
    char **slot = find_slot (m, offset, true);

    if (slot == NULL)
      return -1;
    if (*slot == NULL) {
      *slot = calloc (1, PAGE_BYTES);
      if (*slot == NULL)
        return -1;
    }
    memcpy (*slot + offset % PAGE_BYTES, p, n);
    p += n;
    offset += n;
    count -= n;
  }
  return 0;
}

/* Make the range read as zeroes.  Called with the lock held. */
static void
erase (struct memory *m, uint64_t count, uint64_t offset, bool punch)
{
  const uint64_t end = m->nr_leaves * LEAF_BYTES;

  assert (lock_is_mine (&m->lock));
  if (offset >= end)
    return;
  count = min_u64 (count, end - offset);
  while (count > 0) {
    const size_t n = in_page (count, offset);
    char **slot = find_slot (m, offset, false);

    if (slot != NULL && *slot != NULL) {
      if (punch && n == PAGE_BYTES) {
        free (*slot);
        *slot = NULL;
      }
      else
        memset (*slot + offset % PAGE_BYTES, 0, n);
    }
    offset += n;
    count -= n;
  }
}

static int
memory_zero (struct container *c, uint64_t count, uint64_t offset, bool punch)
{
  struct memory *m = (struct memory *) c;

  if (call_hook (m, punch ? "punch" : "zero", offset, count) == -1)
    return -1;

  ACQUIRE_LOCK_FOR_CURRENT_SCOPE (&m->lock);
  erase (m, count, offset, punch);
  return 0;
}

static int
memory_flush (struct container *c)
{
  assert (lock_is_mine (&c->flush_lock));
  return call_hook ((struct memory *) c, "flush", 0, 0);
}

static int
memory_grow (struct container *c, uint64_t size)
{
  struct memory *m = (struct memory *) c;
  const uint64_t old_size = container_size (c);

  assert (lock_is_mine (&c->grow_lock));
  if (size > m->limit) {
    errno = ENOSPC;
    return -1;
  }
  if (call_hook (m, "grow", old_size, size - old_size) == -1)
    return -1;
  atomic_store_explicit (&c->size, size, memory_order_release);
  return 0;
}

static int
memory_truncate (struct container *c, uint64_t size)
{
  struct memory *m = (struct memory *) c;
  const uint64_t old_size = container_size (c);

  if (call_hook (m, "truncate", size, old_size - size) == -1)
    return -1;

  /* The range that a later growth uncovers must read as zeroes. */
  ACQUIRE_LOCK_FOR_CURRENT_SCOPE (&m->lock);
  erase (m, old_size - size, size, true);
  atomic_store_explicit (&c->size, size, memory_order_release);
  return 0;
}

static void
memory_close (struct container *c)
{
  struct memory *m = (struct memory *) c;
  size_t i, j;

  for (i = 0; i < m->nr_leaves; ++i) {
    if (m->leaves[i] == NULL)
      continue;
    for (j = 0; j < LEAF_PAGES; ++j)
      free (m->leaves[i]->page[j]);
    free (m->leaves[i]);
  }
  free (m->leaves);
  pthread_mutex_destroy (&m->lock);
  free (m);
}

static const struct container_ops memory_ops = {
  .pread = memory_pread,
  .pwrite = memory_pwrite,
  .zero = memory_zero,
  .flush = memory_flush,
  .grow = memory_grow,
  .truncate = memory_truncate,
  .close = memory_close,
};

struct container *
container_open_memory (uint64_t limit)
{
  struct memory *m = calloc (1, sizeof *m);

  if (m == NULL)
    return NULL;
  container_init (&m->c, &memory_ops, 0, false);
  m->limit = limit;
  pthread_mutex_init (&m->lock, NULL);
  return &m->c;
}

void
container_memory_set_hook (struct container *c,
                           const struct container_memory_hook *hook)
{
  atomic_store (&((struct memory *) c)->hook, hook);
}
