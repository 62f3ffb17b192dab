/* nbdkit-dirty-bitmap-filter
 * SPDX-License-Identifier: BSD-3-Clause
 * Copyright the nbdkit-dirty-bitmap-filter authors
 */

/* Many new refcount blocks that count each other.
 *
 * A refcount block counts 64 clusters of 512 bytes here.  Runs that have
 * to be contiguous are longer than that, so new blocks count each other;
 * there are so many that their table entries are in several sectors, of
 * which a crash may keep any.  After a crash no block may be found whose
 * own refcount is not.
 */

#include <config.h>

#include <setjmp.h>
#include <stdarg.h>
#include <stdio.h>
#include <string.h>

#include <cmocka.h>

#include "container/container.h"
#include "crash-universe.h"
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

static void
make_blocks (struct crash_log *log)
{
  const struct qcow2_options options = { .cache_size = 65536 };
  struct container *c = crash_container_open (log);
  struct qcow2 *q = qcow2_open (c, &options);
  uint8_t buf[5000] = { 5 };

  assert_non_null (q);
  for (unsigned i = 1; i <= 140; ++i) {
    uint64_t host;

    assert_int_equal (qcow2_alloc (q, QCOW2_BITMAP_DATA, 70, &host, NULL), 0);
    if (i % 2 == 0)
      assert_int_equal (qcow2_write (q, buf, sizeof buf, i * sizeof buf), 0);
    if (i % 7 == 0)
      assert_int_equal (qcow2_flush (q), 0);
  }
  qcow2_close (q);
  container_close (c);
}

const char *
crash_refcount_blocks (unsigned *nr_states)
{
  static char error[sizeof ((struct checked *) 0)->error];
  struct container *c =
    image_create ("-o cluster_size=512,refcount_bits=64", "4M", ROOM);
  struct crash_image base = image_of (c), state = crash_image_new (ROOM);
  struct crash_log *log = crash_log_new (&base, 3);
  struct crash_replay *replay;
  const unsigned states = how_often (STATES, STATES, STATES / 16);
  uint64_t seed = 3;
  size_t length;

  container_close (c);
  make_blocks (log);
  replay = crash_replay_new (log);
  length = crash_log_length (log);
  error[0] = '\0';
  for (unsigned i = 0; error[0] == '\0' && i < states; ++i) {
    struct checked checked;

    *nr_states = i + 1;
    crash_replay_advance (replay, length * i / states);
    crash_replay_state (replay, &state, &seed);
    if (!check_image (&checked, &state))
      strcpy (error, checked.error);
    checked_free (&checked);
  }
  crash_replay_free (replay);
  crash_log_free (log);
  crash_image_free (&state);
  crash_image_free (&base);
  return error[0] == '\0' ? NULL : error;
}
