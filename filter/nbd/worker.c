/* nbdkit-dirty-bitmap-filter
 * SPDX-License-Identifier: BSD-3-Clause
 * Copyright the nbdkit-dirty-bitmap-filter authors
 */

/* A worker's memory.
 *
 * A worker keeps the buffers of small requests until it has been idle for
 * a while.  Those of large ones are taken out of the server's budget for
 * the time of the request.
 */

#include <config.h>

#include <stdlib.h>
#include <sys/mman.h>

#include "common/buffer.h"
#include "common/bytes.h"
#include "nbd/worker.h"

/* An array of extents of so many bytes is kept for the next request by the
 * holder of the role.  Others may have to wait long for one.
 */
#define KEPT_EXTENTS (1024 * 1024)

static uint8_t *
small_payload (struct worker *w)
{
  if (w->small == NULL) {
    void *p = mmap (NULL, SMALL_PAYLOAD, PROT_READ | PROT_WRITE,
                    MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);

    if (p != MAP_FAILED)
      w->small = p;
  }
  return w->small;
}

static void
free_large (struct worker *w)
{
  if (w->large != NULL)
    budget_give (w->account, w->large, w->large_capacity);
  w->large = NULL;
  w->large_capacity = 0;
}

static void
free_extents (struct extents *e)
{
  free (e->wire);
  e->wire = NULL;
  e->capacity = 0;
  if (e->reserved > 0)
    budget_unreserve (e->account, e->reserved);
  e->reserved = 0;
}

void
worker_give_extents (struct worker *w)
{
  if (w->extents.reserved > 0)
    free_extents (&w->extents);
}

void
worker_share (struct worker *w)
{
  if (budget_is_short (w->account->budget))
    worker_give_extents (w);
}

uint8_t *
worker_payload (struct worker *w, uint32_t length)
{
  if (length <= SMALL_PAYLOAD)
    w->payload = small_payload (w);
  else if (length <= w->large_capacity)
    w->payload = w->large;
  else {
    free_large (w);
    worker_give_extents (w);
    w->large = budget_take (w->account, length, &w->large_capacity);
    if (w->large == NULL)
      w->large_capacity = 0;
    w->payload = w->large;
  }
  return w->payload;
}

/* How long to wait before less is told. */
#define EXTENTS_PATIENCE_MS (10 * 1000)

bool
worker_extents_room (struct extents *e, size_t size)
{
  if (size <= SMALL_EXTENTS || size <= e->reserved)
    return true;
  if (!budget_reserve (e->account, size - e->reserved,
                       EXTENTS_PATIENCE_MS))
    return false;
  e->reserved = size;
  return true;
}

void
worker_end_request (struct worker *w)
{
  if (w->large != NULL)
    free_large (w);
  if (!w->has_role || w->extents.reserved > KEPT_EXTENTS ||
      budget_is_short (w->account->budget))
    worker_give_extents (w);
}

void
worker_trim (struct worker *w)
{
  free_large (w);
  free_extents (&w->extents);
  if (w->small != NULL)
    munmap (w->small, SMALL_PAYLOAD);
  w->small = NULL;
}

void
worker_free (struct worker *w)
{
  if (w == NULL)
    return;
  worker_trim (w);
  sem_destroy (&w->called);
  buffer_free (w->output, OUTPUT_SIZE);
  free (w);
}

struct worker *
worker_new (const struct worker *like)
{
  struct worker *w = calloc (1, sizeof *w);

  if (w == NULL)
    return NULL;
  w->connection = like->connection;
  w->service = like->service;
  w->session = like->session;
  w->stream = like->stream;
  w->team = like->team;
  w->account = w->extents.account = like->account;
  w->output = buffer_new (OUTPUT_SIZE);
  if (w->output == NULL) {
    free (w);
    return NULL;
  }
  sem_init (&w->called, 0, 0);
  return w;
}
