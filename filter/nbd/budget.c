/* nbdkit-dirty-bitmap-filter
 * SPDX-License-Identifier: BSD-3-Clause
 * Copyright the nbdkit-dirty-bitmap-filter authors
 */

/* Memory for all connections, within a bound.
 *
 * What every connection and thread has (its stack, and the buffers that
 * small requests use) is counted once, when the server starts: so many
 * connections and threads may there be (bounds_divide).  The rest of the
 * memory is for what requests take for a while: buffers for payloads
 * above SMALL_PAYLOAD, and long arrays of extents.  Every byte of it
 * is counted here, and a worker that does not get it waits.  So small
 * requests never come here.
 *
 * What a connection gets (fits): a connection that holds something may
 * hold no more than is left afterwards.  So one connection can have half
 * of all, each of two a third, each of n one part of n + 1, and one such
 * part remains for those that hold nothing.  They get what they ask for
 * unless that leaves less than an eighth, which is kept for those that ask
 * for little.  As long as one that holds nothing has to wait, those that
 * do hold something get nothing more; and if it has waited for OVERDUE_MS,
 * nor does any that comes behind it, but for little.  What the others hold
 * comes back sooner or later, since bounds.c disconnects clients that hold
 * memory without making progress.
 *
 * Invariants:
 * - used is the sum of what connections hold; used + cached is what is
 *   there, and at most size.
 * - The largest payload is not above seven eighths of size: a connection
 *   alone is never refused for ever.
 *
 * Buffers that come back are kept, by size, the last one on top because
 * the CPU's cache has it.  Those that were not needed since the last look
 * (budget_trim) are given back to the system, and so is any when there is
 * no room for one of another size.  They are mapped, not malloc'ed, so
 * that this is certain.
 */

#include <config.h>

#include <assert.h>
#include <errno.h>
#include <sys/eventfd.h>
#include <sys/mman.h>
#include <time.h>

#include "common/bytes.h"
#include "common/cleanup.h"
#include "common/clock.h"
#include "common/lock.h"
#include "common/threads.h"
#include "nbd/budget.h"
#include "nbd/debug.h"

/* How long others may go first. */
#define OVERDUE_MS 1000

static size_t
class_size (unsigned class)
{
  return (size_t) 2 * SMALL_PAYLOAD << class;
}

int
budget_init (struct budget *b, uint64_t size, int wake_fd)
{
  b->size = size;
  b->wake_fd = wake_fd;
  if (monotonic_cond_init (&b->freed) == -1)
    return -1;
  pthread_mutex_init (&b->lock, NULL);
  return 0;
}

/* Wake the thread that looks after the budget. */
static void
wake_watcher (const struct budget *b)
{
  eventfd_write (b->wake_fd, 1);
}

/* One that waits.  The line begins with the one that came first. */
struct budget_waiter {
  const struct account *account;
  int64_t since;
  struct budget_waiter *next;
};

/* Does another in the line come first?  This one is me in it, or NULL if
 * it is not in it.
 */
static bool
must_stand_back (const struct budget *b, const struct account *a,
                 size_t count, const struct budget_waiter *me)
{
  const int64_t now = b->line != NULL ? now_ms () : 0;
  bool ahead = true;

  for (const struct budget_waiter *w = b->line; w != NULL; w = w->next) {
    if (w == me)
      ahead = false;
    if (w->account == a || w->account->held > 0)
      continue;
    if (a->held > 0)
      return true;
    if (ahead && count > b->size / 64 && now - w->since >= OVERDUE_MS)
      return true;
  }
  return false;
}

static bool
fits (const struct budget *b, const struct account *a, size_t count,
      const struct budget_waiter *me)
{
  size_t left;

  if (count > b->size - b->used || must_stand_back (b, a, count, me))
    return false;
  left = b->size - b->used - count;
  if (a->held == 0)
    return left >= b->size / 8 || count <= left;
  return a->held + count <= left;
}

/* Wait to be woken, but not beyond the deadline (0: there is none).
 * Called with b->lock.  False if it has passed.
 */
static bool
wait_to_be_woken (struct budget *b, int64_t deadline)
{
  const struct timespec ts = {
    .tv_sec = deadline / 1000,
    .tv_nsec = deadline % 1000 * 1000000,
  };

  assert (lock_is_mine (&b->lock));
  if (deadline == 0) {
    pthread_cond_wait (&b->freed, &b->lock);
    return true;
  }
  return pthread_cond_timedwait (&b->freed, &b->lock, &ts) != ETIMEDOUT;
}

/* Stand in line until there is room.  False if the connection is cut, or
 * it is too late.  Called with b->lock.
 */
static bool
wait_for_room (struct account *a, size_t count, int64_t deadline)
{
  struct budget *b = a->budget;
  struct budget_waiter me = { .account = a, .since = now_ms () };
  struct budget_waiter **p = &b->line;
  bool in_time = true, is_room = false;

  assert (lock_is_mine (&b->lock));
  debug_request ("nbd: waiting for %zu bytes of memory", count);
  while (*p != NULL)
    p = &(*p)->next;
  *p = &me;
  a->waiting++;
  if (atomic_fetch_add (&b->waiting, 1) == 0)
    wake_watcher (b);

  /* First of all: is it of use?  When many are cut there is room. */
  while (!atomic_load (a->dead) &&
         !(is_room = fits (b, a, count, &me)) && in_time)
    in_time = wait_to_be_woken (b, deadline);

  atomic_fetch_sub (&b->waiting, 1);
  a->waiting--;
  for (p = &b->line; *p != &me; p = &(*p)->next)
    ;
  *p = me.next;
  /* Others may have stood back for this one. */
  pthread_cond_broadcast (&b->freed);
  return is_room;
}

/* Count what the connection is to have, when there is room.  False if
 * there will be none.  Called with b->lock.
 */
static bool
acquire (struct account *a, size_t count, int64_t deadline)
{
  struct budget *b = a->budget;

  assert (lock_is_mine (&b->lock));
  if (!fits (b, a, count, NULL) && !wait_for_room (a, count, deadline))
    return false;
  b->used += count;
  a->held += count;
  return true;
}

/* Called with b->lock. */
static void
release (struct account *a, size_t count)
{
  struct budget *b = a->budget;

  assert (lock_is_mine (&b->lock));
  b->used -= count;
  a->held -= count;
  if (atomic_load_explicit (&b->waiting, memory_order_relaxed) > 0)
    pthread_cond_broadcast (&b->freed);
}

/* A free buffer begins with a pointer to the next one. */
static void *
pop (struct budget *b, unsigned class)
{
  struct budget_class *k = &b->class[class];
  void **buffer = k->free;

  if (buffer == NULL)
    return NULL;
  k->free = *buffer;
  k->nr--;
  k->nr_spare = min_u64 (k->nr_spare, k->nr);
  b->cached -= class_size (class);
  return buffer;
}

/* Give up to nr free buffers of a class to the system.  Called with b->lock,
 * or when no other thread uses the budget any more.
 */
static void
unmap (struct budget *b, unsigned class, unsigned nr)
{
  for (void *p; nr > 0 && (p = pop (b, class)) != NULL; --nr)
    munmap (p, class_size (class));
}

/* The largest first: fewest are lost.  Called with b->lock. */
static void
make_room (struct budget *b)
{
  assert (lock_is_mine (&b->lock));
  for (int class = BUDGET_CLASSES - 1; class >= 0; --class)
    while (b->used + b->cached > b->size && b->class[class].free != NULL)
      unmap (b, class, 1);
}

uint8_t *
budget_take (struct account *a, size_t length, size_t *capacity)
{
  struct budget *b = a->budget;
  unsigned class = 0;
  void *p;

  while (class_size (class) < length)
    class++;
  *capacity = class_size (class);
  {
    ACQUIRE_LOCK_FOR_CURRENT_SCOPE (&b->lock);

    if (!acquire (a, *capacity, 0)) {
      errno = ESHUTDOWN;
      return NULL;
    }
    p = pop (b, class);
    make_room (b);
  }
  if (p == NULL)
    p = mmap (NULL, *capacity, PROT_READ | PROT_WRITE,
              MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (p != MAP_FAILED)
    return p;

  ACQUIRE_LOCK_FOR_CURRENT_SCOPE (&b->lock);
  release (a, *capacity);
  return NULL;
}

void
budget_give (struct account *a, uint8_t *buffer, size_t capacity)
{
  struct budget *b = a->budget;
  struct budget_class *k = b->class;
  bool wake;

  while (class_size (k - b->class) < capacity)
    k++;

  ACQUIRE_LOCK_FOR_CURRENT_SCOPE (&b->lock);
  *(void **) buffer = k->free;
  k->free = buffer;
  k->nr++;
  b->cached += capacity;
  release (a, capacity);
  wake = !b->watched;
  b->watched = true;
  if (wake)
    wake_watcher (b);
}

bool
budget_reserve (struct account *a, size_t count, unsigned patience_ms)
{
  struct budget *b = a->budget;

  ACQUIRE_LOCK_FOR_CURRENT_SCOPE (&b->lock);
  if (!acquire (a, count, now_ms () + patience_ms))
    return false;
  make_room (b);
  return true;
}

void
budget_unreserve (struct account *a, size_t count)
{
  ACQUIRE_LOCK_FOR_CURRENT_SCOPE (&a->budget->lock);
  release (a, count);
}

void
budget_wake (struct budget *b)
{
  ACQUIRE_LOCK_FOR_CURRENT_SCOPE (&b->lock);
  pthread_cond_broadcast (&b->freed);
}

bool
budget_trim (struct budget *b)
{
  ACQUIRE_LOCK_FOR_CURRENT_SCOPE (&b->lock);
  for (unsigned class = 0; class < BUDGET_CLASSES; ++class) {
    struct budget_class *k = &b->class[class];

    unmap (b, class, k->nr_spare);
    k->nr_spare = k->nr;
  }
  b->watched = b->used + b->cached > 0;
  return b->watched;
}

void
budget_free (struct budget *b)
{
  for (unsigned class = 0; class < BUDGET_CLASSES; ++class)
    unmap (b, class, b->class[class].nr);
  pthread_mutex_destroy (&b->lock);
  pthread_cond_destroy (&b->freed);
}
