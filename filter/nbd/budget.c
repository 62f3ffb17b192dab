/* nbdkit-dirty-bitmap-filter
 * SPDX-License-Identifier: BSD-3-Clause
 * Copyright the nbdkit-dirty-bitmap-filter authors
 */

/* Memory for all connections, within a bound.
 *
 * What every connection and thread has (its stack, and the buffers that
 * small requests use) is counted once, when the server starts: so many
 * connections and threads may there be (budget_divide).  The rest of the
 * memory is for what requests take for a while: buffers for payloads
 * above SMALL_PAYLOAD, and long arrays of extents.  Nobody takes any of
 * it without counting it here, and who does not get it waits.  So small
 * requests never come here.
 *
 * Who gets what (fits): a connection that holds something may hold no
 * more than is left afterwards.  So one connection can have half of all,
 * each of two a third, each of n one part of n + 1, and one such part
 * remains for those that hold nothing.  They get what they ask for
 * unless that leaves less than an eighth, which is kept for those that
 * ask for little.  As long as one that holds nothing has to wait, those
 * that do hold something get nothing more; and if it has waited for
 * OVERDUE_MS, nor does anybody who comes behind it, but for little.  What
 * the others hold comes back sooner or later, since bounds.c cuts clients
 * because of whom it does not.
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

#include <errno.h>
#include <sys/mman.h>
#include <time.h>

#include "common/bytes.h"
#include "common/cleanup.h"
#include "nbd/internal.h"

/* What threads have touched of their stacks; more than was measured. */
#define STACK_COST (64 * 1024)

/* Names, selected contexts, the structs themselves. */
#define HANDSHAKE_COST (48 * 1024)

/* How long others may go first. */
#define OVERDUE_MS 1000

#define WORKER_COST                                             \
  (STACK_COST + OUTPUT_SIZE + SMALL_PAYLOAD + SMALL_EXTENTS)

static size_t
class_size (unsigned class)
{
  return (size_t) 2 * SMALL_PAYLOAD << class;
}

static size_t
connection_cost (const struct nbd_server *server)
{
  return WORKER_COST + INPUT_SIZE + HANDSHAKE_COST +
    4 * server->nr_bitmaps + (server->tls != NULL ? TLS_COST : 0);
}

/* Connections get up to a half.  Threads besides one a connection get
 * what is left of five eighths.
 */
int
budget_divide (struct nbd_server *server)
{
  struct nbd_limits *limits = &server->limits;
  struct budget *b = &server->budget;
  const size_t cost = connection_cost (server);
  const uint64_t fixed = limits->memory / 8 * 5;

  if (limits->memory / 2 / cost == 0) {
    errno = EINVAL;
    return -1;
  }
  limits->connections = min_u64 (limits->connections,
                                 limits->memory / 2 / cost);
  server->max_extra_threads =
    min_u64 ((fixed - limits->connections * cost) / WORKER_COST,
             (uint64_t) limits->connections * (limits->requests - 1));
  b->size = limits->memory - fixed;

  if (monotonic_cond_init (&b->freed) == -1)
    return -1;
  pthread_mutex_init (&b->lock, NULL);
  return 0;
}

/* Who waits.  The line begins with who came first. */
struct budget_waiter {
  const struct connection *connection;
  int64_t since;
  struct budget_waiter *next;
};

/* Does somebody in the line come first?  This one is me in it, or NULL if
 * it is not in it.
 */
static bool
must_stand_back (const struct budget *b, const struct connection *c,
                 size_t count, const struct budget_waiter *me)
{
  const int64_t now = b->line != NULL ? now_ms () : 0;
  bool ahead = true;

  for (const struct budget_waiter *w = b->line; w != NULL; w = w->next) {
    if (w == me)
      ahead = false;
    if (w->connection == c || w->connection->held > 0)
      continue;
    if (c->held > 0)
      return true;
    if (ahead && count > b->size / 64 && now - w->since >= OVERDUE_MS)
      return true;
  }
  return false;
}

static bool
fits (const struct budget *b, const struct connection *c, size_t count,
      const struct budget_waiter *me)
{
  size_t left;

  if (count > b->size - b->used || must_stand_back (b, c, count, me))
    return false;
  left = b->size - b->used - count;
  if (c->held == 0)
    return left >= b->size / 8 || count <= left;
  return c->held + count <= left;
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
wait_for_room (struct connection *c, size_t count, int64_t deadline)
{
  struct budget *b = &c->server->budget;
  struct budget_waiter me = { .connection = c, .since = now_ms () };
  struct budget_waiter **p = &b->line;
  bool in_time = true, is_room = false;

  debug_request ("nbd: waiting for %zu bytes of memory", count);
  while (*p != NULL)
    p = &(*p)->next;
  *p = &me;
  c->waiting_for_memory++;
  if (atomic_fetch_add (&b->waiting, 1) == 0)
    server_wake (c->server);

  /* First of all: is it of use?  When many are cut there is room. */
  while (!atomic_load (&c->stream.socket.dead) &&
         !(is_room = fits (b, c, count, &me)) && in_time)
    in_time = wait_to_be_woken (b, deadline);

  atomic_fetch_sub (&b->waiting, 1);
  c->waiting_for_memory--;
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
acquire (struct connection *c, size_t count, int64_t deadline)
{
  struct budget *b = &c->server->budget;

  if (!fits (b, c, count, NULL) && !wait_for_room (c, count, deadline))
    return false;
  b->used += count;
  c->held += count;
  return true;
}

/* Called with b->lock. */
static void
release (struct connection *c, size_t count)
{
  struct budget *b = &c->server->budget;

  b->used -= count;
  c->held -= count;
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

/* Give up to nr free buffers of a class to the system.  Called with
 * b->lock.
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
  for (int class = BUDGET_CLASSES - 1; class >= 0; --class)
    while (b->used + b->cached > b->size && b->class[class].free != NULL)
      unmap (b, class, 1);
}

uint8_t *
budget_take (struct connection *c, size_t length, size_t *capacity)
{
  struct budget *b = &c->server->budget;
  unsigned class = 0;
  void *p;

  while (class_size (class) < length)
    class++;
  *capacity = class_size (class);
  {
    ACQUIRE_LOCK_FOR_CURRENT_SCOPE (&b->lock);

    if (!acquire (c, *capacity, 0)) {
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
  release (c, *capacity);
  return NULL;
}

void
budget_give (struct connection *c, uint8_t *buffer, size_t capacity)
{
  struct budget *b = &c->server->budget;
  struct budget_class *k = b->class;
  bool wake;

  while (class_size (k - b->class) < capacity)
    k++;

  ACQUIRE_LOCK_FOR_CURRENT_SCOPE (&b->lock);
  *(void **) buffer = k->free;
  k->free = buffer;
  k->nr++;
  b->cached += capacity;
  release (c, capacity);
  wake = !b->watched;
  b->watched = true;
  if (wake)
    server_wake (c->server);
}

bool
budget_reserve (struct connection *c, size_t count, unsigned patience_ms)
{
  struct budget *b = &c->server->budget;

  ACQUIRE_LOCK_FOR_CURRENT_SCOPE (&b->lock);
  if (!acquire (c, count, now_ms () + patience_ms))
    return false;
  make_room (b);
  return true;
}

void
budget_unreserve (struct connection *c, size_t count)
{
  ACQUIRE_LOCK_FOR_CURRENT_SCOPE (&c->server->budget.lock);
  release (c, count);
}

bool
budget_is_short (const struct budget *b)
{
  return atomic_load_explicit (&b->waiting, memory_order_relaxed) > 0;
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
