/* nbdkit-dirty-bitmap-filter
 * SPDX-License-Identifier: BSD-3-Clause
 * Copyright the nbdkit-dirty-bitmap-filter authors
 */

/* The gate.
 *
 * Why no section slips through: a thread that enters counts its section, and
 * then reads the flag.  The thread that closes the gate sets the flag, and
 * then begins a grace period.  All of this is sequentially consistent.  If the
 * former read the flag before it was set, its section was counted before the
 * period began, and the period waits for it.
 */

#include <config.h>

#include <errno.h>
#include <time.h>

#include "common/cleanup.h"
#include "common/clock.h"
#include "disk/gate.h"

void
disk_gate_init (struct disk_gate *g)
{
  grace_init (&g->grace);
  atomic_init (&g->closed, false);
  pthread_mutex_init (&g->lock, NULL);
  pthread_cond_init (&g->opened, NULL);
}

void
disk_gate_free (struct disk_gate *g)
{
  grace_free (&g->grace);
  pthread_mutex_destroy (&g->lock);
  pthread_cond_destroy (&g->opened);
}

static void
wait_until_open (struct disk_gate *g)
{
  ACQUIRE_LOCK_FOR_CURRENT_SCOPE (&g->lock);
  while (atomic_load (&g->closed))
    pthread_cond_wait (&g->opened, &g->lock);
}

grace_ticket
disk_gate_enter (struct disk_gate *g)
{
  for (;;) {
    const grace_ticket ticket = grace_enter (&g->grace);

    if (!atomic_load (&g->closed))
      return ticket;
    grace_leave (&g->grace, ticket);
    wait_until_open (g);
  }
}

void
disk_gate_leave (struct disk_gate *g, grace_ticket ticket)
{
  grace_leave (&g->grace, ticket);
}

static void
set_closed (struct disk_gate *g, bool closed)
{
  ACQUIRE_LOCK_FOR_CURRENT_SCOPE (&g->lock);
  atomic_store (&g->closed, closed);
  if (!closed)
    pthread_cond_broadcast (&g->opened);
}

int
disk_gate_close (struct disk_gate *g, unsigned timeout_ms)
{
  const int64_t deadline = now_ms () + timeout_ms;

  set_closed (g, true);
  const grace_period period = grace_begin (&g->grace);

  while (!grace_ended (&g->grace, period)) {
    const struct timespec ts = { .tv_nsec = 50000 };

    if (now_ms () >= deadline) {
      disk_gate_open (g);
      errno = ETIMEDOUT;
      return -1;
    }
    nanosleep (&ts, NULL);
  }
  return 0;
}

void
disk_gate_open (struct disk_gate *g)
{
  set_closed (g, false);
}
