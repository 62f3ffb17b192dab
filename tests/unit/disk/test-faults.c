/* nbdkit-dirty-bitmap-filter
 * SPDX-License-Identifier: BSD-3-Clause
 * Copyright the nbdkit-dirty-bitmap-filter authors
 */

/* Faults from below, at every call of many workloads in turn: see
 * fault-run.c.  FAULT_RUN=WORKLOAD:MODE:CALL runs one of them, with its
 * messages.
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

#include "container/container.h"
#include "disk/disk.h"
#include "fault-run.h"
#include "image.h"

static const struct mode modes[] = {
  { .name = "eio", .plan = { .kinds = FAULT_ALL, .error = EIO } },
  { .name = "eio-half",
    .plan = { .kinds = FAULT_WRITE | FAULT_ZERO, .error = EIO,
              .done = DONE_HALF } },
  { .name = "eio-whole",
    .plan = { .kinds = FAULT_WRITE | FAULT_ZERO, .error = EIO,
              .done = DONE_WHOLE } },
  { .name = "eio-all",
    .plan = { .kinds = FAULT_ALL, .error = EIO, .for_good = true } },
  { .name = "eio-reads",
    .plan = { .kinds = FAULT_READ, .error = EIO, .for_good = true } },
  { .name = "eio-below", .below = true,
    .plan = { .kinds = FAULT_READ_BELOW, .error = EIO, .for_good = true } },
  { .name = "eio-changes",
    .plan = { .kinds = FAULT_CHANGES, .error = EIO, .for_good = true,
              .done = DONE_WHOLE } },
  { .name = "eio-for-ever", .never_ends = true,
    .plan = { .kinds = FAULT_CHANGES, .error = EIO, .for_good = true,
              .done = DONE_WHOLE } },
  { .name = "eio-all-for-ever", .never_ends = true,
    .plan = { .kinds = FAULT_ALL, .error = EIO, .for_good = true } },
  { .name = "enospc",
    .plan = { .kinds = FAULT_WRITE | FAULT_ZERO | FAULT_GROW,
              .error = ENOSPC } },
  { .name = "enospc-thin",
    .plan = { .kinds = FAULT_WRITE | FAULT_GROW, .error = ENOSPC,
              .for_good = true, .thin = true } },
  { .name = "enospc-for-ever", .never_ends = true,
    .plan = { .kinds = FAULT_WRITE | FAULT_GROW, .error = ENOSPC,
              .for_good = true, .thin = true } },
  { .name = "limit", .limits = true },
  { .name = "limit-for-ever", .limits = true, .never_ends = true },
  { .name = "lost",
    .plan = { .kinds = FAULT_FLUSH, .error = EIO, .loses = true } },
  { .name = "lost-for-a-while",
    .plan = { .kinds = FAULT_FLUSH, .error = EIO, .for_good = true,
              .loses = true } },
};
#define NR_MODES (sizeof modes / sizeof modes[0])

static void
test_faults (void **state)
{
  const bool one = getenv ("FAULT_RUN") != NULL;
  bool found = false;

  (void) state;
  fault_runs_begin ();
  for (size_t i = 0; i < nr_workloads; ++i) {
    make_workload (&workloads[i]);
    if (one)
      found |= fault_run_chosen (&workloads[i], modes, NR_MODES);
    else
      fault_runs (&workloads[i], modes, NR_MODES);
    free_workload (&workloads[i]);
  }
  fault_runs_end ();
  assert_true (found == one);
}

struct meanwhile {
  struct fault_store *store;
  struct disk *disk;
};

static void
fail_a_flush (void *vp)
{
  const struct meanwhile *m = vp;
  uint8_t data[512] = { 3 };

  m->store->written = NULL;
  /* The request's own write has not ended, and no flush is for it. */
  assert_int_equal (disk_write (m->disk, data, 512, 1024, false), 0);
  m->store->plan = (struct fault_plan) {
    .kinds = FAULT_FLUSH, .error = EIO, .loses = true,
  };
  m->store->counted = 0;
  assert_int_equal (disk_sync (m->disk), -1);
  fault_store_heal (m->store);
}

/* Another client's flush fails between the write of a request with FUA
 * and its barrier, which succeeds.  What was written is lost, so the
 * request fails; it says nothing of others, so the next flush fails too.
 */
static void
test_fua_meanwhile (void **state)
{
  static const struct fault_plan none = { .kinds = 0 };
  const struct disk_options options = { .cache_size = 1 };
  struct fault_store *store = fault_store_new (FAULT_ROOM, NULL);
  struct workload *w = &workloads[0];
  struct disk_client client;
  struct meanwhile m = { .store = store };
  uint8_t data[512];

  (void) state;
  memset (data, 1, sizeof data);
  make_workload (w);
  fault_store_reset (store, &w->image, &none);
  m.disk = disk_open (fault_container_open (store), &options);
  assert_non_null (m.disk);
  disk_client_begin (m.disk, &client);
  /* So that bitmaps are marked. */
  assert_int_equal (disk_write (m.disk, data, 512, 0, true), 0);
  store->opaque = &m;
  store->written = fail_a_flush;
  memset (data, 2, sizeof data);
  assert_int_equal (disk_write (m.disk, data, 512, 0, true), -1);
  assert_null (store->written);
  assert_int_equal (errno, EIO);
  assert_int_equal (disk_flush (m.disk, &client), -1);
  assert_int_equal (disk_write (m.disk, data, 512, 0, true), 0);
  assert_int_equal (disk_flush (m.disk, &client), 0);
  assert_int_equal (disk_stop (m.disk), 0);
  disk_close (m.disk);
  free_workload (w);
  fault_store_free (store);
}

int
main (void)
{
  const struct CMUnitTest tests[] = {
    cmocka_unit_test (test_fua_meanwhile),
    cmocka_unit_test (test_faults),
  };

  if (run_command ("qemu-img --version >/dev/null 2>&1 && "
                   "qemu-io --version >/dev/null 2>&1") != 0)
    return 77;
  fault_every = how_often (1, 7, 397);
  report_sink = report_if_verbose;
  return cmocka_run_group_tests (tests, NULL, NULL);
}
