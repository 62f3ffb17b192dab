/* nbdkit-dirty-bitmap-filter
 * SPDX-License-Identifier: BSD-3-Clause
 * Copyright the nbdkit-dirty-bitmap-filter authors
 */

#ifndef DIRTY_BITMAP_NBD_TEAM_H
#define DIRTY_BITMAP_NBD_TEAM_H

/* The workers of a connection.  One of them at a time leads: it has the
 * receive role.  The others follow: they execute requests, or wait for the
 * role.  See role.c.
 */

#include <pthread.h>
#include <stdatomic.h>
#include <stdbool.h>
#include <stdint.h>

#include "nbd/nbd.h"
#include "nbd/worker.h"

#define MAX_WORKERS NBD_MAX_REQUESTS

/* The state of the receive role, in the low bits of team->role.
 * The bits above are a number that grows with each request that is
 * executed with the role kept.
 */
enum role_state { ROLE_FREE = 0, ROLE_OWNED = 1, ROLE_EXECUTING = 2 };
#define ROLE_STATE_BITS 2
#define ROLE_STATE(word) ((word) & ((1 << ROLE_STATE_BITS) - 1))

/* A worker that the role was taken from, or NULL: the next holder sends
 * its gathered replies, if its ticket is still this one.
 */
struct robbed {
  struct worker *worker;
  uint64_t ticket;
};

/* What the teams of a server share. */
struct teams {
  unsigned max_workers;         /* of a team: constant, and so is */
  unsigned max_extra_threads;   /* of all, besides one each */
  atomic_uint nr_extra_threads;

  /* The monitor sleeps when nothing has happened for a while.
   * monitor_lock protects going to sleep and being woken, and is taken
   * with no other lock held.
   */
  pthread_mutex_t monitor_lock;
  pthread_cond_t monitor_wake;
  atomic_bool monitor_asleep;
  atomic_bool monitor_stop;
};

struct team {
  struct teams *teams;          /* constant, and so is */
  void *(*worker_main) (void *); /* in which threads begin */

  /* What the holder of the role owns. */
  uint64_t seq;                 /* of the request executed last */
  bool slow_by_nature;          /* the request that is executing */
  bool sending;                 /* or what it executes is sendmsg */
  bool has_gathered;            /* replies that were not sent before it */
  unsigned until_sample;

  _Alignas (64) atomic_uint_fast64_t role;
  uint64_t seen_role;           /* the monitor's */

  /* Protects the fields below, and every change of role from and to
   * ROLE_FREE.
   */
  pthread_mutex_t lock;
  struct worker *idle;          /* those that wait for the role: the first
                                   is called first */
  unsigned nr_idle;
  unsigned nr_workers;
  struct worker *workers[MAX_WORKERS];
  struct worker *holder;        /* of the role, now or last: it may read
                                   this without the lock */
  struct robbed robbed;         /* for the next holder */
  bool input_ended;             /* no more requests will come */

  atomic_bool eager;            /* see role.c */
  atomic_uint quick_run, sampled_waits;
};

/* first is the worker that exists from the beginning. */
extern void team_init (struct team *, struct teams *, struct worker *first,
                       void *(*worker_main) (void *));

/* Free the team and its workers, whose threads have ended. */
extern void team_free (struct team *);

/* Input has ended, so no worker is added any more: join all but the
 * first.
 */
extern void team_join (struct team *);

/* Has another worker than the one that asks a request in flight? */
extern bool team_is_busy (struct team *);

/* Wait for the role.  False if there is nothing more to receive.  The
 * caller sends the replies of the robbed worker, if there is one, and may
 * lose the role meanwhile.
 */
extern bool role_acquire (struct worker *, struct robbed *);

/* Another worker may receive.  The caller sends what it has gathered. */
extern void role_release (struct worker *);

/* There is nothing more to receive: no worker gets the role any more, and
 * those that wait for it return.  By the holder, which loses it.
 */
extern void role_end_input (struct worker *);

/* The holder is about to call disk_*, or to send, and keeps the role,
 * which may be stolen meanwhile.  slow_by_nature: that the request takes
 * long says nothing of the disk.
 */
extern void role_begin_executing (struct worker *, bool slow_by_nature);
extern void role_begin_sending (struct worker *);

/* Either is done.  w->has_role says whether the worker still has the
 * role.
 */
extern void role_end_executing (struct worker *);

/* Take the role from a holder that executes for too long, if the word is
 * still this one.  Called with server->lock.
 */
extern void role_steal (struct team *, uint_fast64_t word);

/* Measure whether a request sleeps: before it is executed, by the holder of
 * the role, which may give it up then; and when it was executed.  Where
 * many do, the team becomes eager.
 */
extern void pace_begin (struct worker *, bool slow_by_nature);
extern void pace_end (struct worker *);

/* Wake the monitor. */
extern void monitor_wake (struct teams *);

#endif /* DIRTY_BITMAP_NBD_TEAM_H */
