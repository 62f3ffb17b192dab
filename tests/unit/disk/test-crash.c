/* nbdkit-dirty-bitmap-filter
 * SPDX-License-Identifier: BSD-3-Clause
 * Copyright the nbdkit-dirty-bitmap-filter authors
 */

/* Crashes.
 *
 * A universe is an image, a random workload on the disk that it holds,
 * by one thread or several, perhaps with faults from below or too little
 * space, and the log of all that this did to the container.  From the
 * log come the states in which a crash may leave the image, at random
 * points.  Each must be sound (I1), hold the data that it must (I2), and
 * have bitmaps that are marked or know all changes (I3); the disk must
 * open and serve it.  A universe may begin with what a crash left of
 * another.  test-crash-order shows that this finds a broken order.
 *
 * Where the disk is beside the image, which has only its bitmaps, each of
 * the two has losses of its own.  Nothing but the bitmaps may be in the image
 * then.
 *
 * CRASH_SEED is the seed, CRASH_STATES how many states to look at, and
 * CRASH_KIND, a number, the only kind of image (crash-kinds.c).  What fails
 * says the seed of its universe, to be given as CRASH_UNIVERSE (unless it
 * began with what was left of another: then give CRASH_SEED).
 */

#include <config.h>

#include <errno.h>
#include <inttypes.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include <cmocka.h>

#include "common/bytes.h"
#include "common/report.h"
#include "container/container.h"
#include "crash-universe.h"
#include "disk/disk.h"
#include "image.h"

#define STATES_PER_UNIVERSE 120

static uint64_t first_seed = 1, nr_states, only_universe;
static uint64_t only_kind = UINT64_MAX;
static uint64_t nr_checked_states, nr_beside, nr_opened, nr_reclaimed,
  nr_by_qemu;

/* The dirty extents of what is offered are those of the image. */
static void
compare_bitmaps (const struct universe *u, struct disk *d, struct checked *k)
{
  struct disk_offers *offers = disk_offers_get (d);

  for (size_t i = 0; i < disk_offers_nr (offers); ++i) {
    const struct disk_offer *o = disk_offers_at (offers, i);
    const struct checked_bitmap *b = checked_find (k, disk_bitmap_name (o));
    uint64_t at = 0;

    if (b == NULL || (b->flags & 1) != 0)
      give_up (u, "bitmap %s is offered", disk_bitmap_name (o));
    while (at < disk_size (d)) {
      bool dirty;
      const uint64_t bit = at >> b->granularity_bits;
      const uint64_t run = disk_bitmap_run (o, at, disk_size (d), &dirty);

      if (run == 0 || dirty != (b->bits[bit / 8] >> bit % 8 & 1))
        give_up (u, "bitmap %s is served wrong", b->name);
      at += run;
    }
  }
  disk_offers_put (offers);
}

/* Serve the image after the crash: read all of it, write something, and
 * stop cleanly.  Leaks are gone then, if they could be proven.
 */
static void
serve_state (struct universe *u, const struct crash_image *state,
             struct checked *k)
{
  struct crash_log *log = crash_log_new (state, u->seed);
  const struct disk_options options = { .cache_size = 1 };
  struct container *data;
  struct disk *d = open_logged_disk (u, log, &options, &data);
  uint8_t buf[700];
  struct checked after;

  if (d == NULL)
    give_up (u, "the disk cannot be opened after the crash: %s",
             strerror (errno));
  compare_served (u, d, k);
  compare_bitmaps (u, d, k);
  memset (buf, 0x55, sizeof buf);
  for (unsigned i = 0; i < 8; ++i) {
    const uint64_t at = model_window (u->model, any (&u->seed, 6))
      + any (&u->seed, u->model->window_size - sizeof buf);

    if (disk_write (d, buf, sizeof buf, at, i == 4) == -1)
      give_up (u, "no write after the crash: %s", strerror (errno));
  }
  if (disk_stop (d) == -1)
    give_up (u, "no clean stop after the crash");
  close_logged_disk (d, data);
  if (!check_image (&after, crash_log_live (log)))
    give_up (u, "served after the crash: %s", after.error);
  if (leaks_are_provable (u, k)) {
    nr_reclaimed += k->nr_leaked;
    if (after.nr_leaked != 0)
      give_up (u, "%" PRIu64 " leaked clusters of %" PRIu64
               " are left after the crash", after.nr_leaked, k->nr_leaked);
  }
  for (size_t i = 0; i < after.nr_bitmaps; ++i)
    if (after.bitmaps[i].flags != k->bitmaps[i].flags)
      give_up (u, "bitmap %s has changed its flags", after.bitmaps[i].name);
  checked_free (&after);
  crash_log_free (log);
  nr_opened++;
}

static void
save_image (const struct crash_image *image, const char *file)
{
  FILE *fp = fopen (file, "we");

  assert_non_null (fp);
  assert_int_equal (fwrite (image->bytes, 1, image->size, fp), image->size);
  assert_int_equal (fclose (fp), 0);
}

/* Let QEMU judge it, where its backing file is, too.  It has nothing good to
 * say of damaged bitmaps.
 */
static void
qemu_state (const struct universe *u, const struct crash_image *state,
            const struct checked *k, bool leaks_too)
{
  const char *file;
  int r;

  if (k->trusts_damaged)
    return;
  if (state->data != NULL && !state->beside)
    save_image (state->data, temp_file (data_file_name (u->kind)));
  file = temp_file ("state.qcow2");
  save_image (state, file);
  /* It looks for a data file where it is itself. */
  r = run_command ("cd \"$(dirname '%s')\" && "
                   "qemu-img check -q '%s' >'%s.out' 2>&1", file, file, file);
  if (r != 0 && (leaks_too || r != 3)) {
    run_command ("cat '%s.out' >&2", file);
    give_up (u, "qemu-img check says %d", r);
  }
  if (run_command ("cd \"$(dirname '%s')\" && "
                   "qemu-img info '%s' >/dev/null 2>&1", file, file) != 0)
    give_up (u, "qemu-img info fails");
  nr_by_qemu++;
}

static void
crashed_state (struct universe *u, const struct crash_image *state)
{
  struct checked k;
  const char *error = state_error (u, &k, state);

  if (error != NULL)
    give_up (u, "moment %zu: %s", u->model->moment, error);
  if (any (&u->seed, 16) == 0)
    serve_state (u, state, &k);
  if (any (&u->seed, 256) == 0)
    qemu_state (u, state, &k, false);
  checked_free (&k);
}

/* The image after a clean stop, or that and a power cut. */
static void
stopped_state (struct universe *u, const struct crash_image *state)
{
  struct checked k;
  const char *error = stopped_error (u, &k, state);

  if (error != NULL)
    give_up (u, "after a clean stop: %s", error);
  if (!u->may_fail && !u->leaks && k.nr_leaked != 0)
    give_up (u, "%" PRIu64 " clusters are leaked", k.nr_leaked);
  if (any (&u->seed, 8) == 0)
    qemu_state (u, state, &k, !u->may_fail && !u->leaks);
  checked_free (&k);
}

/* Leave one of the states in the image that the next universe of the
 * kind may begin with.
 */
static bool
visit_state (struct universe *u, const struct crash_image *state,
             bool stopped, void *opaque)
{
  struct crash_image *left = opaque;

  (stopped ? stopped_state : crashed_state) (u, state);
  nr_checked_states++;
  nr_beside += u->kind->beside;
  if (any (&u->seed, STATES_PER_UNIVERSE / 4) == 0)
    crash_image_copy (left, state);
  return true;
}

static void
choose_universe (struct universe *u)
{
  u->kind = &kinds[any (&u->seed, nr_kinds)];
  if (only_kind < nr_kinds)
    u->kind = &kinds[only_kind];
  u->nr_threads = any (&u->seed, 3) == 0 ? 2 + any (&u->seed, 2) : 1;
  u->nr_requests = (40 + any (&u->seed, 120)) / u->nr_threads;
  u->unit = 512 << any (&u->seed, 4);
  u->keep = any (&u->seed, 2) == 0;
}

/* Trouble from below. */
static void
choose_trouble (struct universe *u)
{
  switch (any (&u->seed, 6)) {
  case 0:
  case 1:
    u->may_fail = true;
    crash_log_set_faults (u->log, 8 << any (&u->seed, 5));
    break;
  case 2:
    u->may_fail = true;
    crash_log_set_limit (u->log, crash_log_live (u->log)->size
                         + any (&u->seed, 300000));
    break;
  }
}

static void
run_universe (struct universe *u, struct crash_image *image)
{
  const char *create = any (&u->seed, 2) == 0 ? "new" : "newer";

  universe_begin (u, image, any (&u->seed, 3) == 0 ? NULL : create);
  choose_trouble (u);
  run_workload (u);
  visit_states (u, STATES_PER_UNIVERSE, visit_state, image);
  universe_end (u);
}

static void
test_crashes (void **state)
{
  uint64_t seed = first_seed;

  (void) state;
  make_kinds ();
  while (nr_checked_states < nr_states) {
    struct universe u = { .number = only_universe ? only_universe
                                    : random_next (&seed) };
    struct crash_image *left;

    u.seed = u.number;
    choose_universe (&u);
    left = &u.kind->left;
    if (any (&u.seed, 2) == 0 || left->size == 0)
      crash_image_copy (left, &u.kind->image);
    run_universe (&u, left);
    if (only_universe)
      break;
  }
  free_kinds ();
  print_message ("%" PRIu64 " states, %" PRIu64 " of disks beside, %" PRIu64
                 " served, %" PRIu64 " leaks reclaimed, %" PRIu64 " by QEMU\n",
                 nr_checked_states, nr_beside, nr_opened, nr_reclaimed,
                 nr_by_qemu);
}

int
main (void)
{
  const struct CMUnitTest tests[] = {
    cmocka_unit_test (test_crashes),
  };

  if (run_command ("qemu-img --version >/dev/null 2>&1 && "
                   "qemu-io --version >/dev/null 2>&1") != 0)
    return 77;
  report_sink = report_if_verbose;
  get_number ("CRASH_SEED", &first_seed);
  nr_states = is_thorough () ? 24000 : 12000;
  get_number ("CRASH_STATES", &nr_states);
  get_number ("CRASH_UNIVERSE", &only_universe);
  get_number ("CRASH_KIND", &only_kind);
  print_message ("CRASH_SEED=%" PRIu64 "\n", first_seed);
  return cmocka_run_group_tests (tests, NULL, NULL);
}
