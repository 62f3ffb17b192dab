/* nbdkit-dirty-bitmap-filter
 * SPDX-License-Identifier: BSD-3-Clause
 * Copyright the nbdkit-dirty-bitmap-filter authors
 */

#ifndef DIRTY_BITMAP_NBD_BUDGET_H
#define DIRTY_BITMAP_NBD_BUDGET_H

/* The pool of memory for large requests of all connections: see budget.c.
 * A connection has an account of it.
 */

#include <pthread.h>
#include <stdatomic.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

/* From twice SMALL_PAYLOAD to NBD_MAX_PAYLOAD. */
#define BUDGET_CLASSES 8

/* A payload up to this is in a buffer of the worker's own. */
#define SMALL_PAYLOAD (128 * 1024)

/* Free buffers of one size. */
struct budget_class {
  void *free;                   /* the first; each points to the next */
  unsigned nr;
  unsigned nr_spare;            /* the least nr since the last look */
};

struct budget_waiter;

struct budget {
  uint64_t size;                /* constant, in bytes */
  int wake_fd;                  /* constant: an eventfd that is written to
                                   when memory gets short, or budget_trim
                                   has something to look at again */
  atomic_uint waiting;          /* workers; changed under lock */

  /* Protects what follows, and what accounts hold.  Taken inside any
   * other lock, and none inside it.
   */
  pthread_mutex_t lock;
  pthread_cond_t freed;
  uint64_t used, cached;
  struct budget_waiter *line;   /* the workers that wait */
  bool watched;                 /* budget_trim will be called */
  struct budget_class class[BUDGET_CLASSES];
};

struct account {
  struct budget *budget;        /* constant */
  const atomic_bool *dead;      /* constant: waiting is of no use */

  /* budget->lock */
  size_t held;                  /* out of the budget */
  unsigned waiting;             /* workers that wait for memory */
};

/* -1 with errno. */
extern int budget_init (struct budget *, uint64_t size, int wake_fd);
extern void budget_free (struct budget *);

/* A buffer of at least length bytes, and its capacity.  Waits until there
 * is room.  NULL with errno, ESHUTDOWN if the connection is cut.
 */
extern uint8_t *budget_take (struct account *, size_t length,
                             size_t *capacity);
extern void budget_give (struct account *, uint8_t *buffer,
                         size_t capacity);

/* Count memory that the caller allocates, or has freed.  False if there
 * is no room for so long.
 */
extern bool budget_reserve (struct account *, size_t count,
                            unsigned patience_ms);
extern void budget_unreserve (struct account *, size_t count);

/* Does any worker wait? */
static inline bool
budget_is_short (const struct budget *b)
{
  return atomic_load_explicit (&b->waiting, memory_order_relaxed) > 0;
}

/* Wake those that wait, because a connection was cut. */
extern void budget_wake (struct budget *);

/* Give buffers that were not needed since the last call to the system.
 * False if there is nothing more to look at.
 */
extern bool budget_trim (struct budget *);

#endif /* DIRTY_BITMAP_NBD_BUDGET_H */
