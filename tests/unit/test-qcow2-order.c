/* nbdkit-dirty-bitmap-filter
 * SPDX-License-Identifier: BSD-3-Clause
 * Copyright the nbdkit-dirty-bitmap-filter authors
 */

/* The order in which new refcount blocks and their table entries reach
 * the disk: after a crash no block may be found whose own refcount is not.
 */

#include <config.h>

#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include <cmocka.h>

#include "common/bytes.h"
#include "common/report.h"
#include "container/container.h"
#include "crash-check.h"
#include "crash-container.h"
#include "image.h"
#include "qcow2/qcow2.h"

#define ROOM (8 << 20)
#define STATES 10000

/* The container's bytes as a crash image. */
static struct crash_image
image_of (struct container *c)
{
  struct crash_image image = crash_image_new (ROOM);

  image.size = container_size (c);
  assert_true (image.size <= ROOM);
  assert_int_equal (container_pread (c, image.bytes, image.size, 0), 0);
  return image;
}

/* Crash everywhere, and look at what is left. */
static void
check_states (struct crash_log *log, uint64_t *seed)
{
  struct crash_replay *replay = crash_replay_new (log);
  struct crash_image state = crash_image_new (ROOM);
  const size_t length = crash_log_length (log);

  for (unsigned i = 0; i < STATES; ++i) {
    struct checked checked;

    crash_replay_advance (replay, length * i / STATES);
    crash_replay_state (replay, &state, seed);
    if (!check_image (&checked, &state))
      fail_msg ("state %u: %s", i, checked.error);
    checked_free (&checked);
  }
  crash_image_free (&state);
  crash_replay_free (replay);
}

/* A refcount block counts 64 clusters of 512 bytes here.  Runs that have
 * to be contiguous are longer than that, so new blocks count each other;
 * there are so many that their table entries are in several sectors, of
 * which a crash may keep any.
 */
static void
test_many_new_refcount_blocks (void **unused)
{
  struct container *c =
    image_create ("-o cluster_size=512,refcount_bits=64", "4M", ROOM);
  const struct qcow2_options options = { .cache_size = 65536 };
  struct crash_image base = image_of (c);
  uint8_t buf[5000] = { 5 };
  uint64_t seed = 3;

  (void) unused;
  container_close (c);
  struct crash_log *log = crash_log_new (&base, seed);
  c = crash_container_open (log);
  struct qcow2 *q = qcow2_open (c, &options);
  assert_non_null (q);
  for (unsigned i = 1; i <= 140; ++i) {
    uint64_t host;

    assert_int_equal (qcow2_alloc (q, QCOW2_BITMAP_DATA, 70, &host, NULL), 0);
    if (i % 2 == 0)
      assert_int_equal (qcow2_write (q, buf, sizeof buf, i * sizeof buf), 0);
    if (i % 7 == 0)
      assert_int_equal (qcow2_flush (q, NULL), 0);
  }
  qcow2_close (q);
  container_close (c);

  check_states (log, &seed);
  crash_log_free (log);
  crash_image_free (&base);
}

int
main (void)
{
  const struct CMUnitTest tests[] = {
    cmocka_unit_test (test_many_new_refcount_blocks),
  };

  if (run_command ("qemu-img --version >/dev/null 2>&1") != 0)
    return 77;
  return cmocka_run_group_tests (tests, NULL, NULL);
}
