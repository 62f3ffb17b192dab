/* nbdkit-dirty-bitmap-filter
 * SPDX-License-Identifier: BSD-3-Clause
 * Copyright the nbdkit-dirty-bitmap-filter authors
 */

/* Storage that is full, at every point of many workloads: the first k
 * blocks that are needed can be had, or the image can have k bytes, and
 * then there are no more.  In the end there is a stop, or a power cut
 * after a flush, or space again (fault-run.c).
 *
 * The images are those of the faults test, and they are sparse: what is
 * zero in them has no storage.  The requests are theirs, and after that
 * random ones.
 *
 * FAULT_RUN=WORKLOAD:MODE:K, with WORKLOAD as it is printed, runs one of
 * them, with its messages.
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
#include "disk/disk.h"
#include "fault-run.h"
#include "image.h"

#define FULL(bytes) .keeps = true, \
  .plan = { .space = true, .sparse = true, .block = (bytes) }
#define FULL_PROVISIONED(bytes) .keeps = true, \
  .plan = { .space = true, .sparse = true, .block = (bytes), \
            .provisions = true }

static const struct mode modes[] = {
  { .name = "full", FULL (4096), .never_ends = true },
  { .name = "full-cut-off", FULL_PROVISIONED (4096), .never_ends = true,
    .cut_off = true },
  { .name = "full-for-a-while", FULL_PROVISIONED (4096) },
  { .name = "small-blocks", FULL (512), .never_ends = true },
  { .name = "small-blocks-cut-off", FULL_PROVISIONED (1024),
    .never_ends = true, .cut_off = true },
  { .name = "large-blocks", FULL (65536), .never_ends = true },
  { .name = "fixed", .limits = true, .keeps = true, .never_ends = true },
  { .name = "fixed-cut-off", .limits = true, .keeps = true,
    .never_ends = true, .cut_off = true },
};
#define NR_MODES (sizeof modes / sizeof modes[0])

/* A random request in one of the windows of the disk. */
static struct step
random_step (const struct workload *w, uint64_t *seed)
{
  static const enum step_kind kinds[] = {
    STEP_WRITE, STEP_WRITE, STEP_WRITE, STEP_WRITE, STEP_WRITE, STEP_WRITE,
    STEP_ZERO, STEP_ZERO_KEEP, STEP_TRIM, STEP_TRIM, STEP_READ, STEP_FLUSH,
    STEP_FLUSH,
  };
  static const uint64_t aligns[] = { 1, 512, 4096, 65536 };
  const enum step_kind kind =
    kinds[random_next (seed) % (sizeof kinds / sizeof kinds[0])];
  /* Where the model does not know what a trim leaves alone it has nothing
   * to leave.
   */
  const uint64_t align = kind == STEP_TRIM && w->by_qemu
    ? 4096 : aligns[random_next (seed) % 4];
  const uint64_t window = random_next (seed) % w->windows.nr;
  const uint64_t size = w->windows.size;
  const uint64_t in_window = round_down (random_next (seed) % size, align);
  const uint64_t most = random_next (seed) % 4 == 0 ? size : 8192;
  struct step s = {
    .kind = kind,
    .offset = window * w->windows.apart + in_window,
    .count = round_up (1 + random_next (seed) % most, align),
    .fua = random_next (seed) % 8 == 0,
  };

  s.count = min_u64 (s.count, size - in_window);
  if (s.kind == STEP_READ || s.kind == STEP_FLUSH)
    s.fua = false;
  return s;
}

/* The same image, and other requests. */
static struct workload
random_workload (const struct workload *w, uint64_t seed, char name[64])
{
  const unsigned nr = sizeof w->steps / sizeof w->steps[0] - 1;
  struct workload other = *w;

  snprintf (name, 64, "%s-%" PRIu64, w->name, seed);
  other.name = name;
  other.changes_first = true;
  for (unsigned i = 0; i < nr; ++i)
    other.steps[i] = random_step (w, &seed);
  other.steps[nr].kind = STEP_END;
  return other;
}

/* Returns whether the run that was asked for was found. */
static bool
run_or_find (const struct workload *w)
{
  if (getenv ("FAULT_RUN") != NULL)
    return fault_run_chosen (w, modes, NR_MODES);
  fault_runs (w, modes, NR_MODES);
  return false;
}

static void
test_space (void **state)
{
  uint64_t rounds = 1, first = 1;
  bool found = false;

  (void) state;
  get_number ("ROUNDS", &rounds);
  get_number ("SEED", &first);
  fault_runs_begin ();
  for (size_t i = 0; i < nr_workloads; ++i) {
    make_workload (&workloads[i]);
    found |= run_or_find (&workloads[i]);
    for (uint64_t seed = first; seed < first + rounds; ++seed) {
      char name[64];
      const struct workload w = random_workload (&workloads[i], seed, name);

      found |= run_or_find (&w);
    }
    free_workload (&workloads[i]);
  }
  fault_runs_end ();
  assert_true (found == (getenv ("FAULT_RUN") != NULL));
}

/* What a mark has found space for is stored, though there is none after
 * it: bits in a new cluster, in one that has a hole, in the same piece.
 */
static void
test_reserved (void **state)
{
  static const uint64_t offsets[] = { 0, 64 << 10, 3 << 20 };
  const struct fault_plan plan = modes[0].plan;
  struct workload *w = &workloads[0];
  struct fault_store *store;
  uint8_t data[512] = { 1 };

  (void) state;
  report_sink = report_if_verbose;
  store = fault_store_new (FAULT_ROOM, NULL);
  make_workload (w);
  fault_store_reset (store, &w->image, &plan);
  store->plan.first = SIZE_MAX;
  for (size_t i = 0; i < sizeof offsets / sizeof offsets[0]; ++i) {
    const struct disk_options options = { .cache_size = 1 };
    struct disk *d = disk_open (fault_container_open (store), &options);

    assert_non_null (d);
    assert_int_equal (disk_write (d, data, 512, offsets[i], false), 0);
    store->plan.first = store->taken;
    assert_int_equal (disk_write (d, data, 512, offsets[i], false), 0);
    assert_int_equal (disk_stop (d), 0);
    assert_int_equal (store->nr_failed, 0);
    disk_close (d);
    store->plan.first = SIZE_MAX;
  }
  free_workload (w);
  fault_store_free (store);
}

/* Write sectors that were never written, until the image has that many
 * bytes or a write fails.  Returns the next offset.
 */
static uint64_t
write_up_to (struct disk *d, const struct fault_store *store, uint64_t size,
             uint64_t offset)
{
  uint8_t data[512] = { 2 };

  while (store->live.size < size &&
         disk_write (d, data, sizeof data, offset, false) == 0)
    offset += sizeof data;
  return offset;
}

/* The entry of a new refcount block, in a part of the table that is a hole:
 * the first of its third sector, that of a block for what is at 4 MiB.
 */
static void
test_refcount_table (void **state)
{
  const uint64_t middle = (4 << 20) - (32 << 10), end = (4 << 20) + 4096;
  const struct disk_options options = { .cache_size = 1 };
  const char *file = temp_file ("table.qcow2");
  const struct fault_plan none = { .kinds = 0 };
  struct fault_plan plan = { .space = true, .sparse = true, .block = 512 };
  struct crash_image image = crash_image_new (FAULT_ROOM);
  struct fault_store *store = fault_store_new (FAULT_ROOM, NULL);
  struct disk_client client;
  struct disk *d;
  uint64_t at;
  FILE *fp;

  (void) state;
  assert_int_equal (run_command ("qemu-img create -q -f qcow2 -o cluster_size="
                                 "512,refcount_bits=64 '%s' 8M", file), 0);
  fp = fopen (file, "re");
  assert_non_null (fp);
  image.size = fread (image.bytes, 1, image.room, fp);
  fclose (fp);
  fault_store_reset (store, &image, &none);
  d = disk_open (fault_container_open (store), &options);
  assert_non_null (d);
  at = write_up_to (d, store, middle, 0);
  assert_int_equal (disk_stop (d), 0);
  disk_close (d);
  image.size = store->live.size;
  memcpy (image.bytes, store->live.bytes, image.size);

  for (plan.first = 0; store->live.size < end; ++plan.first) {
    fault_store_reset (store, &image, &plan);
    d = disk_open (fault_container_open (store), &options);
    assert_non_null (d);
    disk_client_begin (d, &client);
    write_up_to (d, store, end, at);
    assert_int_equal (disk_flush (d, &client), 0);
    assert_int_equal (disk_stop (d), 0);
    disk_close (d);
  }
  crash_image_free (&image);
  fault_store_free (store);
}

int
main (void)
{
  const struct CMUnitTest tests[] = {
    cmocka_unit_test (test_reserved),
    cmocka_unit_test (test_refcount_table),
    cmocka_unit_test (test_space),
  };

  if (run_command ("qemu-img --version >/dev/null 2>&1 && "
                   "qemu-io --version >/dev/null 2>&1") != 0)
    return 77;
  fault_every = how_often (5, 29, 997);
  return cmocka_run_group_tests (tests, NULL, NULL);
}
