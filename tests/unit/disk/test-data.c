/* nbdkit-dirty-bitmap-filter
 * SPDX-License-Identifier: BSD-3-Clause
 * Copyright the nbdkit-dirty-bitmap-filter authors
 */

/* A disk beside its bitmaps: what its storage is asked for, and what is told
 * of it.  The storage and the image fail each without the other.
 */

#include <config.h>

#include <errno.h>
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
#include "container/container.h"
#include "disk/disk.h"
#include "image.h"

#define KiB (UINT64_C (1) << 10)
#define MiB (UINT64_C (1) << 20)
#define SIZE (3 * MiB + 777)

/* The storage of the disk. */
static struct {
  int durable, fast;            /* what these operations return */
  unsigned nr_writes, nr_durable, nr_zeroes, nr_fast, nr_trims, nr_flushes;
  unsigned extent_flags;
  int err;                      /* flushes and extents fail with it */
} storage;

static void
assert_inside (struct container *c, uint64_t count, uint64_t offset)
{
  assert_true (count > 0 && !range_exceeds (offset, count, SIZE));
  assert_int_equal (container_size (c), SIZE);
}

static int
storage_pwrite (struct container *c, const void *buf, size_t count,
                uint64_t offset)
{
  (void) buf;
  assert_inside (c, count, offset);
  storage.nr_writes++;
  return 0;
}

static int
storage_pwrite_durable (struct container *c, const void *buf, size_t count,
                        uint64_t offset)
{
  (void) buf;
  assert_inside (c, count, offset);
  storage.nr_durable++;
  return storage.durable;
}

static int
storage_zero (struct container *c, uint64_t count, uint64_t offset, bool punch)
{
  (void) punch;
  assert_inside (c, count, offset);
  storage.nr_zeroes++;
  return 0;
}

static int
storage_zero_fast (struct container *c, uint64_t count, uint64_t offset,
                   bool punch)
{
  (void) punch;
  assert_inside (c, count, offset);
  storage.nr_fast++;
  return storage.fast;
}

static int
storage_trim (struct container *c, uint64_t count, uint64_t offset)
{
  assert_inside (c, count, offset);
  storage.nr_trims++;
  return 0;
}

static int
fail_if_told (void)
{
  errno = storage.err;
  return storage.err != 0 ? -1 : 0;
}

static int
storage_flush (struct container *c)
{
  (void) c;
  storage.nr_flushes++;
  return fail_if_told ();
}

static int
storage_extent (struct container *c, uint64_t offset, uint64_t count,
                uint64_t *length, unsigned *flags)
{
  assert_inside (c, count, offset);
  *length = count;
  *flags = storage.extent_flags;
  return fail_if_told ();
}

static int
storage_grow (struct container *c, uint64_t size)
{
  (void) c; (void) size;
  fail_msg ("a disk was asked to grow");
  return -1;
}

static void
storage_close (struct container *c)
{
  free (c);
}

static const struct container_ops storage_ops = {
  .pwrite = storage_pwrite, .pwrite_durable = storage_pwrite_durable,
  .zero = storage_zero, .zero_fast = storage_zero_fast,
  .trim = storage_trim, .flush = storage_flush, .extent = storage_extent,
  .grow = storage_grow, .close = storage_close,
};

static struct container *
open_storage (uint64_t size)
{
  struct container *c = calloc (1, sizeof *c);

  assert_non_null (c);
  container_init (c, &storage_ops, size, false);
  return c;
}

/* The image, of which flushes and writes can be made to fail. */
static int image_err;

static int
fail_image (void *opaque, const char *operation, uint64_t offset,
            uint64_t count)
{
  (void) opaque; (void) operation; (void) offset; (void) count;
  return image_err;
}

static struct container *beside;
static bool keeps;

/* A disk over an image, which it closes.  NULL if it is refused. */
static struct disk *
open_with (struct container *image, uint64_t size)
{
  static const struct container_memory_hook hook = { fail_image, NULL };
  static const char *const names[] = { "b" };
  struct disk_options options = {
    .cache_size = MiB, .granularity = 65536, .require = names,
    .nr_require = 1, .keep = keeps, .is_beside = true,
  };
  struct disk *d;

  assert_non_null (image);
  options.beside = beside = open_storage (size);
  messages_clear ();
  image_err = 0;
  d = disk_open (image, &options);
  if (d == NULL) {
    container_close (image);
    container_close (beside);
    return NULL;
  }
  container_memory_set_hook (image, &hook);
  memset (&storage, 0, sizeof storage);
  return d;
}

static struct container *
new_image (uint64_t size)
{
  struct container *c = container_open_memory (100 * MiB);

  assert_int_equal (qcow2_create (c, size), 0);
  return c;
}

static struct disk *
open_it (void)
{
  struct disk *d = open_with (new_image (SIZE), SIZE);

  assert_non_null (d);
  assert_int_equal (disk_size (d), SIZE);
  assert_true (disk_is_beside (d));
  return d;
}

static void
close_it (struct disk *d)
{
  disk_close (d);
  container_close (beside);
}

static int
setup (void **state)
{
  (void) state;
  messages_install ();
  keeps = true;
  return 0;
}

/* R6, whatever the storage says. */
static void
test_extents (void **state)
{
  static const uint32_t rows[][2] = {
    { 0, 0 },
    { CONTAINER_HOLE, 0 },
    { CONTAINER_ZERO, DISK_EXTENT_ZERO },
    { CONTAINER_HOLE | CONTAINER_ZERO, DISK_EXTENT_HOLE | DISK_EXTENT_ZERO },
  };
  struct disk *d = open_it ();
  uint64_t length;
  uint32_t flags;

  (void) state;
  for (size_t i = 0; i < sizeof rows / sizeof rows[0]; ++i) {
    storage.extent_flags = rows[i][0];
    assert_int_equal (disk_extent (d, 5, SIZE, &length, &flags), 0);
    assert_int_equal (length, SIZE - 5);
    assert_int_equal (flags, rows[i][1]);
  }
  storage.err = EIO;
  assert_int_equal (disk_extent (d, 5, SIZE, &length, &flags), -1);
  storage.err = 0;
  assert_message ("find the extents of");
  assert_int_equal (disk_extent (d, SIZE, SIZE, &length, &flags), -1);
  assert_int_equal (disk_extent (d, 0, SIZE + 1, &length, &flags), -1);
  assert_int_equal (disk_extent_depth (d, 0, SIZE, &length, &flags), 0);
  assert_int_equal (length, SIZE);
  assert_int_equal (flags, 1);
  close_it (d);
}

/* Nothing beyond the end, and all of what is inside. */
static void
test_end (void **state)
{
  static const uint64_t outside[][2] = {
    { SIZE, 1 }, { SIZE - 1, 2 }, { 0, SIZE + 1 }, { UINT64_MAX, 1 },
    { SIZE + 235, 1 },
  };
  struct disk *d = open_it ();
  static char buf[SIZE + 1];

  (void) state;
  for (size_t i = 0; i < sizeof outside / sizeof outside[0]; ++i) {
    const uint64_t offset = outside[i][0], count = outside[i][1];

    assert_int_equal (disk_write (d, buf, count, offset, false), -1);
    assert_int_equal (disk_write (d, buf, count, offset, true), -1);
    assert_int_equal (disk_zero (d, count, offset, false, false, false), -1);
    assert_int_equal (disk_zero (d, count, offset, true, true, true), -1);
    assert_int_equal (disk_trim (d, count, offset, false), -1);
    assert_int_equal (disk_read (d, buf, count, offset), -1);
    assert_int_equal (disk_cache (d, count, offset), -1);
  }
  assert_int_equal (storage.nr_writes + storage.nr_durable +
                    storage.nr_zeroes + storage.nr_fast + storage.nr_trims, 0);
  assert_int_equal (disk_write (d, buf, SIZE, 0, false), 0);
  assert_int_equal (disk_zero (d, SIZE, 0, false, false, false), 0);
  assert_int_equal (disk_trim (d, 777, 3 * MiB, false), 0);
  assert_int_equal (storage.nr_writes, 1);
  assert_int_equal (storage.nr_trims, 1);
  assert_int_equal (storage.nr_fast, 0);
  close_it (d);
}

/* FUA costs a flush of the disk only if the write is not durable by itself. */
static void
test_fua (void **state)
{
  struct disk *d = open_it ();

  (void) state;
  assert_int_equal (disk_write (d, "x", 1, 5, true), 0);
  assert_int_equal (storage.nr_durable, 1);
  assert_int_equal (storage.nr_writes + storage.nr_flushes, 0);
  storage.durable = 1;
  assert_int_equal (disk_write (d, "x", 1, 5, true), 0);
  assert_int_equal (storage.nr_durable, 2);
  assert_int_equal (storage.nr_writes, 1);
  assert_int_equal (storage.nr_flushes, 1);
  assert_int_equal (disk_write (d, "x", 1, 5, false), 0);
  assert_int_equal (storage.nr_durable, 2);
  assert_int_equal (storage.nr_flushes, 1);
  assert_int_equal (disk_zero (d, 1, 5, false, false, true), 0);
  assert_int_equal (storage.nr_flushes, 2);

  storage.err = EIO;
  assert_int_equal (disk_write (d, "x", 1, 5, true), -1);
  assert_message ("cannot flush the disk");
  storage.err = 0;
  errno = 0;
  storage.durable = -1;
  assert_int_equal (disk_write (d, "x", 1, 5, true), -1);
  assert_message ("cannot write 1 bytes of the disk");
  close_it (d);
}

/* A fast zero that the storage refuses is not done at another price. */
static void
test_fast (void **state)
{
  struct disk *d = open_it ();

  (void) state;
  assert_int_equal (disk_zero (d, MiB, 5, false, true, false), 0);
  assert_int_equal (storage.nr_fast, 1);
  storage.fast = 1;
  errno = 0;
  assert_int_equal (disk_zero (d, MiB, 5, false, true, false), -1);
  assert_int_equal (errno, ENOTSUP);
  assert_int_equal (messages_errors (), 0);
  assert_int_equal (storage.nr_zeroes + storage.nr_writes, 0);
  close_it (d);
}

/* A failure of the one storage is no failure of the other.  Bits that are not
 * ahead of the changes are written by a flush.
 */
static void
test_failures (void **state)
{
  struct disk_client client;
  struct disk *d;

  (void) state;
  keeps = false;
  d = open_it ();
  disk_client_begin (d, &client);
  assert_int_equal (disk_write (d, "x", 1, 5, false), 0);
  image_err = EIO;
  assert_int_equal (disk_flush (d, &client), 0);
  assert_message ("bitmaps could not be stored");
  assert_int_equal (storage.nr_flushes, 1);
  image_err = 0;

  assert_int_equal (disk_write (d, "x", 1, 5, false), 0);
  storage.err = EIO;
  errno = 0;
  assert_int_equal (disk_flush (d, &client), -1);
  assert_int_equal (errno, EIO);
  storage.err = 0;
  assert_int_equal (disk_flush (d, &client), 0);
  close_it (d);
}

/* Which images are not those of such a disk. */
static void
test_refused (void **state)
{
  struct disk *d;

  (void) state;
  assert_null (open_with (new_image (SIZE + 512), SIZE));
  assert_message ("was made for");
  assert_null (open_with (new_image (SIZE), SIZE - 512));
  assert_message ("was made for");
  assert_null (open_with (image_create ("-o compat=0.10", "1M", 100 * MiB),
                          MiB));
  assert_message ("version 2");
  assert_null (open_with (image_create ("-o preallocation=metadata", "1M",
                                        100 * MiB), MiB));
  assert_message ("data of its own");
  d = open_with (image_create ("-o cluster_size=4k", "1M", 100 * MiB), MiB);
  assert_non_null (d);
  close_it (d);
}

#define TEST(f) cmocka_unit_test_setup (f, setup)

int
main (void)
{
  const struct CMUnitTest tests[] = {
    TEST (test_extents),
    TEST (test_end),
    TEST (test_fua),
    TEST (test_fast),
    TEST (test_failures),
    TEST (test_refused),
  };

  if (run_command ("qemu-img --version >/dev/null 2>&1") != 0) {
    print_message ("skipped: there is no qemu-img\n");
    return 77;
  }
  return cmocka_run_group_tests (tests, NULL, NULL);
}
