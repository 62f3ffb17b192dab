/* nbdkit-dirty-bitmap-filter
 * SPDX-License-Identifier: BSD-3-Clause
 * Copyright the nbdkit-dirty-bitmap-filter authors
 */

/* A universe from its beginning to its end, and the states in between. */

#include <config.h>

#include <setjmp.h>
#include <stdarg.h>
#include <stdlib.h>

#include <cmocka.h>

#include "common/bytes.h"
#include "crash-universe.h"

bool
leaks_are_provable (const struct universe *u, const struct checked *k)
{
  return u->kind->pad == 0 && !k->image->damaged && !k->stale &&
    (k->trusted || !k->has_extension);
}

void
universe_begin (struct universe *u, const struct crash_image *image,
                const char *create)
{
  struct checked base;

  if (!check_image (&base, image))
    give_up (u, "in the beginning: %s", base.error);
  u->leaks = base.nr_leaked != 0 && !leaks_are_provable (u, &base);
  u->log = crash_log_new (image, u->seed);
  u->model = model_new (&base, &u->kind->windows);
  if (create != NULL && (checked_find (&base, create) != NULL ||
                         base.version < 3 || image->damaged))
    create = NULL;
  u->create = create;
  if (create != NULL)
    model_expect_bitmap (u->model, create, 10);
  checked_free (&base);
}

void
universe_end (struct universe *u)
{
  model_free (u->model);
  crash_log_free (u->log);
}

const char *
state_error (struct universe *u, struct checked *k,
             const struct crash_image *state)
{
  return check_image (k, state) ? model_check (u->model, k) : k->error;
}

const char *
stopped_error (struct universe *u, struct checked *k,
               const struct crash_image *state)
{
  if (!check_image (k, state))
    return k->error;
  return u->may_fail ? model_check (u->model, k)
    : model_check_stopped (u->model, k);
}

static int
compare_points (const void *a, const void *b)
{
  const size_t *x = a, *y = b;

  return (*x > *y) - (*x < *y);
}

/* Some of them while the disk is being opened, and many where the most
 * is at stake.
 */
static void
choose_points (struct universe *u, size_t *points, size_t nr)
{
  const size_t length = crash_log_length (u->log);

  for (size_t i = 0; i < nr; ++i) {
    points[i] = any (&u->seed, (i % 4 == 0 ? u->model->opened : length) + 1);
    if (any (&u->seed, 2) == 0)
      points[i] = crash_log_next_barrier (u->log, points[i]);
  }
  qsort (points, nr, sizeof points[0], compare_points);
}

void
visit_states (struct universe *u, size_t nr, visit_fn *visit, void *opaque)
{
  struct crash_replay *replay = crash_replay_new (u->log);
  struct crash_image state =
    crash_image_new (crash_log_live (u->log)->room);
  const size_t length = crash_log_length (u->log);
  size_t *points = malloc (nr * sizeof points[0]);
  bool more = true;

  assert_non_null (points);
  choose_points (u, points, nr);
  model_sort (u->model);
  for (size_t i = 0; more && i < nr; ++i) {
    crash_replay_advance (replay, points[i]);
    model_advance (u->model, points[i]);
    if (any (&u->seed, 16) == 0)
      crash_replay_kill (replay, &state);
    else
      crash_replay_state (replay, &state, &u->seed);
    more = visit (u, &state, false, opaque);
  }

  crash_replay_advance (replay, length);
  model_advance (u->model, length);
  for (unsigned i = 0; more && u->stopped && i < 4; ++i) {
    if (i == 0)
      crash_replay_kill (replay, &state);
    else
      crash_replay_state (replay, &state, &u->seed);
    more = visit (u, &state, true, opaque);
  }
  free (points);
  crash_image_free (&state);
  crash_replay_free (replay);
}
