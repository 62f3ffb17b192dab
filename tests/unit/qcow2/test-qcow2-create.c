/* nbdkit-dirty-bitmap-filter
 * SPDX-License-Identifier: BSD-3-Clause
 * Copyright the nbdkit-dirty-bitmap-filter authors
 */

/* Images that we make, of every size: QEMU finds nothing wrong with them, and
 * they take bitmaps of a disk beside them.
 */

#include <config.h>

#include <errno.h>
#include <inttypes.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include <cmocka.h>

#include "bitmap-image.h"
#include "common/bytes.h"
#include "disk/disk.h"
#include "image.h"
#include "kept-reports.h"

#define KiB (UINT64_C (1) << 10)
#define MiB (UINT64_C (1) << 20)
#define TiB (UINT64_C (1) << 40)
#define LIMIT (2048 * TiB)      /* of a disk: 2 PiB */
#define ROOM (100 * MiB)

static const uint64_t sizes[] = {
  0, 1, 511, 512, MiB - 1, MiB, 512 * MiB, 512 * MiB + 1, 100 * KiB * MiB,
  16 * TiB + 512, LIMIT - 1, LIMIT,
};
#define NR_SIZES (sizeof sizes / sizeof sizes[0])

static int
setup (void **state)
{
  (void) state;
  keep_reports ();
  return 0;
}

/* What qemu-img info says of the image that image_check has saved. */
static void
assert_info (const char *fmt, ...)
{
  char text[200];
  va_list args;

  va_start (args, fmt);
  vsnprintf (text, sizeof text, fmt, args);
  va_end (args);
  print_message ("%s\n", text);
  assert_int_equal (run_command ("qemu-img info --output=json '%s' | "
                                 "grep '%s' >/dev/null",
                                 temp_file ("check.qcow2"), text), 0);
}

static void
assert_image (struct container *c, uint64_t size)
{
  image_check (c, 1);
  assert_info ("\"virtual-size\": %" PRIu64 ",", round_up (size, 512));
  assert_info ("\"cluster-size\": 65536,");
  assert_info ("\"compat\": \"1.1\"");
  assert_info ("\"refcount-bits\": 16");
  assert_info ("\"corrupt\": false");
}

/* A disk beside the image, of a size: what is written to it is lost. */
static int
lose (struct container *c, const void *buf, size_t count, uint64_t offset)
{
  (void) c; (void) buf; (void) count; (void) offset;
  return 0;
}

static int
flush_nothing (struct container *c)
{
  (void) c;
  return 0;
}

static void
free_it (struct container *c)
{
  free (c);
}

static const struct container_ops null_ops = {
  .pwrite = lose, .flush = flush_nothing, .close = free_it,
};

static struct container *
open_null (uint64_t size)
{
  struct container *c = calloc (1, sizeof *c);

  assert_non_null (c);
  container_init (c, &null_ops, size, false);
  return c;
}

static void
test_sizes (void **state)
{
  (void) state;
  for (size_t i = 0; i < NR_SIZES; ++i) {
    struct container *c = container_open_memory (ROOM);
    struct qcow2 *q;
    uint64_t size, flushes;

    print_message ("%" PRIu64 "\n", sizes[i]);
    assert_int_equal (qcow2_create (c, sizes[i]), 0);
    size = container_size (c);
    assert_int_equal (size % (64 * KiB), 0);
    assert_in_range (size, 3 * 64 * KiB, 34 * MiB);
    /* Nothing is left to be made durable. */
    flushes = tally_get (&c->flushes);
    assert_true (flushes > 0);
    assert_int_equal (container_flush (c), 0);
    assert_int_equal (tally_get (&c->flushes), flushes);
    assert_image (c, sizes[i]);

    q = open_image (c, false);
    assert_int_equal (qcow2_size (q), round_up (sizes[i], 512));
    assert_int_equal (qcow2_version (q), 3);
    qcow2_close (q);
    assert_int_equal (container_size (c), size);
    container_close (c);
  }
  assert_int_equal (nr_reports, 0);
}

/* With bitmaps, and a write of the last byte, which they record. */
static void
test_bitmaps (void **state)
{
  static const char *const names[] = { "monday", "tuesday" };

  (void) state;
  /* The first has no bytes, and so no bitmaps. */
  for (size_t i = 1; i < NR_SIZES; ++i) {
    const uint64_t size = sizes[i];
    const uint32_t granularity = size > TiB ? UINT32_C (1) << 31 : 65536;
    const struct disk_options options = {
      .cache_size = MiB, .granularity = granularity, .keep = i % 2,
      .require = names, .nr_require = 2, .is_beside = true,
      .beside = open_null (size),
    };
    struct container *c = container_open_memory (ROOM);
    struct bitmap_set *set;
    struct disk *d;
    struct qcow2 *q;

    print_message ("%" PRIu64 "\n", size);
    assert_int_equal (qcow2_create (c, size), 0);
    assert_int_equal (disk_check (c, &options), 0);
    d = disk_open (c, &options);
    assert_non_null (d);
    assert_int_equal (disk_size (d), size);
    assert_int_equal (disk_write (d, "x", 1, size - 1, false), 0);
    assert_int_equal (nr_reports, 0);
    errno = 0;
    assert_int_equal (disk_write (d, "xx", 2, size - 1, false), -1);
    assert_int_equal (errno, EINVAL);
    assert_int_equal (nr_reports, 1);
    nr_reports = 0;
    assert_int_equal (disk_stop (d), 0);
    assert_image (c, size);
    assert_info ("\"name\": \"monday\"");
    assert_info ("\"granularity\": %" PRIu32, granularity);
    disk_close (d);
    container_close (options.beside);
    assert_int_equal (nr_reports, 0);

    c = image_load (temp_file ("check.qcow2"), ROOM);
    q = open_image (c, true);
    set = open_set (q);
    assert_int_equal (bitmap_set_nr_exposed (set), 2);
    assert_true (ram_bit (find_exposed (set, "tuesday"),
                          (size - 1) / granularity));
    if (size > granularity)
      assert_false (ram_bit (find_exposed (set, "tuesday"), 0));
    bitmap_set_close (set);
    qcow2_close (q);
    container_close (c);
  }
}

static void
test_too_large (void **state)
{
  static const uint64_t too_large[] = {
    LIMIT + 1, LIMIT + 512, 2 * LIMIT, INT64_MAX, UINT64_MAX - 511,
    UINT64_MAX - 510, UINT64_MAX,
  };

  (void) state;
  for (size_t i = 0; i < sizeof too_large / sizeof too_large[0]; ++i) {
    struct container *c = container_open_memory (ROOM);

    nr_reports = 0;
    errno = 0;
    assert_int_equal (qcow2_create (c, too_large[i]), -1);
    assert_int_equal (errno, EFBIG);
    assert_int_equal (nr_reports, 1);
    assert_non_null (strstr (last_report, "too large"));
    assert_int_equal (container_size (c), 0);
    container_close (c);
  }
}

/* Just enough room, and less. */
static void
test_no_room (void **state)
{
  (void) state;
  for (size_t i = 0; i < NR_SIZES; ++i) {
    struct container *c = container_open_memory (ROOM);
    uint64_t size;

    assert_int_equal (qcow2_create (c, sizes[i]), 0);
    size = container_size (c);
    container_close (c);

    c = container_open_memory (size);
    assert_int_equal (qcow2_create (c, sizes[i]), 0);
    container_close (c);
    assert_int_equal (nr_reports, 0);

    /* Nine of the lesser rooms, the last of them one byte too small. */
    for (unsigned n = 0; n <= 8; ++n) {
      const uint64_t room = n == 8 ? size - 1 : n * size / 8;

      c = container_open_memory (room);
      nr_reports = 0;
      errno = 0;
      assert_int_equal (qcow2_create (c, sizes[i]), -1);
      assert_int_equal (errno, ENOSPC);
      assert_int_equal (nr_reports, 1);
      assert_non_null (strstr (last_report, "new image"));
      container_close (c);
    }
    nr_reports = 0;
  }
}

/* Each of the calls fails once. */
struct failure {
  unsigned at, nr;
  int err;
};

static int
fail_one (void *opaque, const char *operation, uint64_t offset, uint64_t count)
{
  struct failure *f = opaque;

  (void) operation; (void) offset; (void) count;
  return f->nr++ == f->at ? f->err : 0;
}

static void
test_failures (void **state)
{
  struct failure f = { .err = EIO };
  const struct container_memory_hook hook = { fail_one, &f };
  int r = -1;

  (void) state;
  for (; r == -1; f.at++) {
    struct container *c = container_open_memory (ROOM);

    container_memory_set_hook (c, &hook);
    nr_reports = f.nr = 0;
    errno = 0;
    r = qcow2_create (c, MiB);
    if (r == -1) {
      assert_int_equal (errno, EIO);
      assert_int_equal (nr_reports, 1);
      assert_non_null (strstr (last_report, "new image"));
    }
    container_close (c);
  }
  /* At least to grow, to write and to flush. */
  assert_true (f.at >= 4);
  assert_int_equal (nr_reports, 0);
}

#define TEST(f) cmocka_unit_test_setup (f, setup)

int
main (void)
{
  const struct CMUnitTest tests[] = {
    TEST (test_sizes),
    TEST (test_bitmaps),
    TEST (test_too_large),
    TEST (test_no_room),
    TEST (test_failures),
  };

  if (run_command ("qemu-img --version >/dev/null 2>&1") != 0) {
    print_message ("skipped: there is no qemu-img\n");
    return 77;
  }
  return cmocka_run_group_tests (tests, NULL, NULL);
}
