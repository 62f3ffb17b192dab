/* nbdkit-dirty-bitmap-filter
 * SPDX-License-Identifier: BSD-3-Clause
 * Copyright the nbdkit-dirty-bitmap-filter authors
 */

#ifndef DIRTY_BITMAP_CONTAINER_H
#define DIRTY_BITMAP_CONTAINER_H

/* The bytes of the image: what qcow2/ reads and writes.
 *
 * One table of operations, one file an implementation:
 *   next.c     over nbdkit's plugin, of which context.c opens contexts (the
 *              only two files here that know nbdkit)
 *   file.c     over a file descriptor: the image where its file is used
 *              directly, backing files, data files
 *   memory.c   in memory, for tests
 * The functions below are the door.  They handle the end of the container
 * for all implementations, so an implementation sees only ranges inside its
 * size.
 *
 * All functions may be called from any thread at any time, return 0 or -1
 * with errno set, and report nothing: the caller knows what the bytes mean.
 * Completed writes may be lost by a power cut, in any order and torn at 512
 * bytes, until a container_flush that began after them has returned 0: that
 * is the barrier of the design.
 */

#include <pthread.h>
#include <stdatomic.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "common/meter.h"

struct container;

/* The door asks an implementation only for ranges inside its size.  If it
 * takes only whole blocks (block_bytes), the ranges are of whole blocks, and
 * the last block may end beyond the size.  An implementation that has no
 * room may return EDQUOT or EFBIG; the caller sees ENOSPC.
 */
struct container_ops {
  int (*pread) (struct container *, void *buf, size_t count, uint64_t offset);
  int (*pwrite) (struct container *,
                 const void *buf, size_t count, uint64_t offset);

  /* The same, and the bytes are durable on return.  1 if that cannot be done,
   * and nothing was written.  NULL if it never can.
   */
  int (*pwrite_durable) (struct container *,
                         const void *buf, size_t count, uint64_t offset);

  /* Make the range read as zeroes.  If punch, give storage back where
   * possible; the range reads as zeroes either way.
   */
  int (*zero) (struct container *, uint64_t count, uint64_t offset,
               bool punch);

  /* The same, if that is faster than to write zeroes.  1 if it is not: parts
   * of the range may be zeroed then.  NULL if it never is.
   */
  int (*zero_fast) (struct container *, uint64_t count, uint64_t offset,
                    bool punch);

  /* The range is not needed any more, and may read as anything.  NULL if
   * that is the same as to punch it.
   */
  int (*trim) (struct container *, uint64_t count, uint64_t offset);

  /* Bring the range into the cache of the storage.  May do nothing. */
  int (*cache) (struct container *, uint64_t count, uint64_t offset);

  /* Called under flush_lock, and only if there was a change since the
   * last one that succeeded.
   */
  int (*flush) (struct container *);

  /* What is known of the range from offset on (CONTAINER_HOLE, and
   * CONTAINER_ZERO; 0 for data).  *length says how far the answer holds, at
   * least 1 and at most count.  NULL if all is data.
   */
  int (*extent) (struct container *, uint64_t offset, uint64_t count,
                 uint64_t *length, unsigned *flags);

  /* The bytes of storage that the container takes, which may be fewer than
   * its size.  -1 with ENOTSUP, or NULL, if that cannot be known.
   */
  int (*allocated) (struct container *, uint64_t *bytes);

  /* Make the container at least size bytes large and store the new size in
   * container->size; the new part reads as zeroes.  The container may grow
   * by more.  ENOSPC if it cannot grow.  Called under container->grow_lock.
   */
  int (*grow) (struct container *, uint64_t size);

  /* Cut the container to size bytes, less than its size.  Called once at the
   * end, when nothing else is under way.  May do nothing.
   */
  int (*truncate) (struct container *, uint64_t size);

  void (*close) (struct container *);
};

/* Flags of an extent, with NBD's values: it has no storage; it reads as
 * zeroes.
 */
enum {
  CONTAINER_HOLE = 1,
  CONTAINER_ZERO = 2,
};

/* What the storage can do, for a caller that tells its own clients.  Every
 * function may be called all the same.  Where the storage cannot zero, zeroes
 * are written, and container_zero_fast returns 1.  Where it cannot trim or
 * cache, nothing happens.  Where it cannot flush, container_flush succeeds and
 * makes nothing durable.
 */
struct container_abilities {
  bool zero, zero_fast, trim, cache, flush;
  bool is_rotational;
  uint32_t preferred_bytes;     /* of a request, or 0 */
};

/* A counter that has a cache line to itself. */
struct container_counter {
  _Atomic uint64_t count;
  char padding[56];
};

/* The head of every implementation's own struct. */
struct container {
  const struct container_ops *ops;
  _Atomic uint64_t size;        /* bytes; only grows, until truncate */
  bool readonly;
  struct container_abilities abilities; /* constant once it is open */
  tally grown_bytes;            /* in all; changed under grow_lock */
  pthread_mutex_t grow_lock;    /* protects growth, taken last of all */

  /* Held during a flush, and protects what follows.  Taken before the
   * locks of implementations.
   */
  pthread_mutex_t flush_lock;
  bool is_flushed;              /* the last flush succeeded, and */
  uint64_t flushed;             /* covers this many changes */
  tally flushes, flush_ns;      /* of flushes that succeeded */
  atomic_ulong failed_flushes;  /* changed under flush_lock */

  /* Changes that have succeeded or failed, counted by many threads. */
  struct container_counter changes[NR_SHARDS];

  /* Blocks: see blocks.c.  1 if any range will do. */
  uint32_t block_bytes;         /* a power of two; set by the open function */
  pthread_mutex_t blocks_lock;  /* protects the list; taken alone */
  pthread_cond_t blocks_cond;
  struct blocks_range *blocks_under_way;
};

/* Called by the implementations' open functions.  The abilities are all that
 * a file has.
 */
extern void container_init (struct container *, const struct container_ops *,
                            uint64_t size, bool readonly);

static inline uint64_t
container_size (struct container *c)
{
  return atomic_load_explicit (&c->size, memory_order_acquire);
}

/* Read.  Bytes beyond the end read as zeroes. */
extern int container_pread (struct container *, void *buf, size_t count,
                            uint64_t offset);

/* Write, growing the container where needed.  EROFS if read-only. */
extern int container_pwrite (struct container *, const void *buf, size_t count,
                             uint64_t offset);

/* Write, and if possible make that durable by itself: 0.  1 if it is written
 * and needs a flush.
 */
extern int container_pwrite_durable (struct container *, const void *buf,
                                     size_t count, uint64_t offset);

/* Zero.  The part beyond the end reads as zeroes already: the container does
 * not grow.
 */
extern int container_zero (struct container *, uint64_t count, uint64_t offset,
                           bool punch);

/* As the operations above.  zero_fast returns 1, too, if the range is not of
 * whole blocks.  trim leaves parts of blocks as they are.
 */
extern int container_zero_fast (struct container *, uint64_t count,
                                uint64_t offset, bool punch);
extern int container_trim (struct container *, uint64_t count,
                           uint64_t offset);

extern int container_cache (struct container *, uint64_t count,
                            uint64_t offset);

/* As the operation above.  The part beyond the end is a hole. */
extern int container_extent (struct container *, uint64_t offset,
                             uint64_t count, uint64_t *length,
                             unsigned *flags);

/* As the operation above, of the same name. */
extern int container_allocated (struct container *, uint64_t *bytes);

/* The barrier.  It costs nothing if nothing has changed since the last flush
 * that succeeded.
 */
extern int container_flush (struct container *);

/* How many flushes have failed.  What was written before one of them may be
 * lost, and no later flush will report it.  So a caller that flushes must
 * compare the number before the writes with the number after the flush.
 */
extern unsigned long container_failed_flushes (struct container *);

/* Make sure that [0, end) can be written without growing. */
extern int container_reserve (struct container *, uint64_t end);
extern int container_truncate (struct container *, uint64_t size);
extern void container_close (struct container *);

/* Containers over fd, of a file or a block device.  fd stays the caller's.
 * NULL with errno.
 *
 * container_open_file opens it read-only.
 */
extern struct container *container_open_file (int fd);

/* It can be written, grows to exactly the size that is needed, and is never
 * cut.
 */
extern struct container *container_open_file_writable (int fd);

/* It is the image itself: it can be written, grows in large steps, and can be
 * cut to its original size.
 */
extern struct container *container_open_file_image (int fd);

/* It is a disk: it can be written, and its size never changes. */
extern struct container *container_open_file_disk (int fd);

/* In memory, growing up to limit bytes (then ENOSPC), sparse.  A hook, if
 * set, is called before each operation that changes or flushes.  It fails
 * the operation by returning an errno value.
 */
struct container_memory_hook {
  int (*before) (void *opaque, const char *operation,
                 uint64_t offset, uint64_t count);
  void *opaque;
};
extern struct container *container_open_memory (uint64_t limit);
extern void container_memory_set_hook (struct container *,
                                       const struct container_memory_hook *);

#endif /* DIRTY_BITMAP_CONTAINER_H */
