/* nbdkit-dirty-bitmap-filter
 * SPDX-License-Identifier: BSD-3-Clause
 * Copyright the nbdkit-dirty-bitmap-filter authors
 */

/* The monitor: one thread of a server that looks at the role words of all
 * connections every TICK, and steals the role of a worker that executes
 * for too long (role.c).
 *
 * The monitor sleeps after QUIET_TICKS without activity.  It says so
 * (monitor_asleep), then looks at all role words once more; a holder
 * sets EXECUTING, then looks whether the monitor sleeps.  Both are
 * sequentially consistent, so one of them sees the other.
 */

#include <config.h>

#include <time.h>

#include "common/cleanup.h"
#include "common/threads.h"
#include "nbd/connection.h"
#include "nbd/monitor.h"
#include "nbd/server.h"

#define TICK_NS (1000 * 1000)
#define QUIET_TICKS 100

/* Look at every connection.  True if something is going on. */
static bool
tick (struct nbd_server *server)
{
  bool active = false;

  ACQUIRE_LOCK_FOR_CURRENT_SCOPE (&server->lock);
  for (struct connection *c = server->live; c != NULL; c = c->next) {
    uint_fast64_t word = atomic_load (&c->team.role);

    if (ROLE_STATE (word) == ROLE_EXECUTING) {
      active = true;
      if (word == c->team.seen_role)
        role_steal (&c->team, word);
    }
    active = active || word != c->team.seen_role;
    c->team.seen_role = word;
  }
  return active;
}

/* Sleep until a request is executed again. */
static void
sleep_while_quiet (struct nbd_server *server)
{
  atomic_store (&server->teams.monitor_asleep, true);
  if (tick (server))
    atomic_store (&server->teams.monitor_asleep, false);

  ACQUIRE_LOCK_FOR_CURRENT_SCOPE (&server->teams.monitor_lock);
  while (atomic_load (&server->teams.monitor_asleep) &&
         !atomic_load (&server->teams.monitor_stop))
    pthread_cond_wait (&server->teams.monitor_wake,
                       &server->teams.monitor_lock);
  atomic_store (&server->teams.monitor_asleep, false);
}

static void *
monitor_main (void *vp)
{
  struct nbd_server *server = vp;
  const struct timespec ts = { .tv_nsec = TICK_NS };
  unsigned quiet = 0;

  while (!atomic_load (&server->teams.monitor_stop)) {
    if (tick (server))
      quiet = 0;
    else if (++quiet >= QUIET_TICKS) {
      sleep_while_quiet (server);
      quiet = 0;
    }
    nanosleep (&ts, NULL);
  }
  return NULL;
}

int
monitor_start (struct nbd_server *server)
{
  return thread_create (&server->monitor_thread, monitor_main, server);
}

void
monitor_quit (struct nbd_server *server)
{
  atomic_store (&server->teams.monitor_stop, true);
  monitor_wake (&server->teams);
  pthread_join (server->monitor_thread, NULL);
}
