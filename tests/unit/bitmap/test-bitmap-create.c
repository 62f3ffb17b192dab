/* nbdkit-dirty-bitmap-filter
 * SPDX-License-Identifier: BSD-3-Clause
 * Copyright the nbdkit-dirty-bitmap-filter authors
 */

/* Creating what is required and absent, and the crash and the error at
 * every point of it.
 */

#include <config.h>

#include <errno.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include <cmocka.h>

#include "common/bytes.h"
#include "disk/flush.h"
#include "image.h"
#include "bitmap-image.h"

#define MIB (UINT64_C (1) << 20)
#define LIMIT (1 << 20)

static const struct bitmap_spec old[] = {
  { .name = "b0", .granularity_bits = 12, .flags = 2, .table = "d",
    .fill = 0x05 },
  { .name = "off", .granularity_bits = 16, .flags = 0, .table = "1" },
  { .name = "bad", .granularity_bits = 16, .flags = 3 },
};

/* Into an image without an extension, at every cluster size. */
static void
test_first (void **state)
{
  static const uint64_t granularity[] = {
    4096, 4096, 4096, 4096, 8192, 16384, 32768, 65536, 65536, 65536,
    65536, 65536, 65536,
  };

  (void) state;
  for (unsigned bits = 9; bits <= 21; ++bits) {
    char options[64];
    struct container *c;
    struct bitmap_set *set;
    struct qcow2 *q;

    snprintf (options, sizeof options, "-o cluster_size=%u", 1U << bits);
    c = image_create (options, "33M", 1 << 30);
    q = open_image (c, false);
    set = open_set_requiring (q, "monday", 0);
    assert_non_null (set);
    assert_int_equal (bitmap_set_nr_exposed (set), 1);
    assert_int_equal (bitmap_granularity (bitmap_set_exposed (set, 0)),
                      granularity[bits - 9]);
    assert_int_equal (bitmap_set_mark (set, MIB, 1), 0);
    assert_int_equal (image_flush (q, set), 0);
    assert_true (bitmap_set_all_stored (set));
    assert_int_equal (image_stop (q, set), 0);
    bitmap_set_close (set);
    qcow2_close (q);

    /* QEMU finds it sound, and so do we. */
    image_check (c, 1);
    q = open_image (c, false);
    set = open_set (q);
    assert_true (ram_bit (bitmap_set_exposed (set, 0),
                          MIB / granularity[bits - 9]));
    bitmap_set_close (set);
    qcow2_close (q);
    container_close (c);
  }
}

static void
test_append (void **state)
{
  const char *names[] = { "new", "b0", "newer", "new" };
  const struct bitmap_options options = {
    .granularity = 512, .require = names, .nr_require = 4,
  };
  struct crafted crafted;
  struct container *c;
  struct bitmap_set *set;
  struct qcow2 *q;
  struct bytes now;
  uint64_t directory;

  (void) state;
  craft (&crafted, 12, 64 * MIB, old, 3);
  crafted.bytes.p[crafted.entry[0] + 31] = 0x77; /* padding */
  c = recorder_open (&crafted.bytes, LIMIT);
  q = open_image (c, false);
  messages_clear ();
  set = bitmap_set_open (q, &options);
  assert_non_null (set);
  assert_int_equal (bitmap_set_nr_exposed (set), 4);
  assert_string_equal (bitmap_name (bitmap_set_exposed (set, 0)), "b0");
  assert_string_equal (bitmap_name (bitmap_set_exposed (set, 1)), "off");
  assert_string_equal (bitmap_name (bitmap_set_exposed (set, 2)), "new");
  assert_string_equal (bitmap_name (bitmap_set_exposed (set, 3)), "newer");

  /* One directory for both, the old entries with padding that is zeroes. */
  now = recorder_image (c);
  assert_int_equal (get_be32 (now.p + crafted.extension + 8), 5);
  assert_int_equal (get_be64 (now.p + crafted.extension + 16),
                    crafted.directory_bytes + 64);
  directory = get_be64 (now.p + crafted.extension + 24);
  assert_int_not_equal (directory, crafted.directory);
  crafted.bytes.p[crafted.entry[0] + 31] = 0;
  assert_memory_equal (now.p + directory, crafted.bytes.p + crafted.directory,
                       crafted.directory_bytes);

  /* The flags are found in the new place. */
  mark_and_note (set, c, 5 * MIB + 4096, 512);
  now = recorder_image (c);
  assert_int_equal (get_be32 (now.p + directory + 12), 3);
  assert_int_equal (get_be32 (now.p + directory + 32 + 12), 0);
  assert_int_equal (get_be32 (now.p + directory + 96 + 12), 3);
  assert_int_equal (get_be32 (now.p + crafted.entry[0] + 12), 2);
  assert_int_equal (image_stop (q, set), 0);
  assert_true (bitmap_set_all_stored (set));
  assert_int_equal (get_be32 (now.p + directory + 12), 2);

  bitmap_set_close (set);
  qcow2_close (q);

  /* Nothing leaked but what was in use, nothing lost. */
  image_check (c, 1);
  q = open_image (c, false);
  set = open_set (q);
  assert_int_equal (bitmap_set_nr_exposed (set), 4);
  assert_true (ram_bit (find_exposed (set, "new"), 5 * MIB / 512 + 8));
  assert_false (ram_bit (find_exposed (set, "new"), 5 * MIB / 512 + 9));
  assert_true (ram_bit (find_exposed (set, "b0"), 2));
  bitmap_set_close (set);
  qcow2_close (q);
  container_close (c);
  free (crafted.bytes.p);
}

static void
test_replaces_stale (void **state)
{
  struct crafted crafted;
  struct container *c;
  struct bitmap_set *set;
  struct qcow2 *q;
  struct bytes now;

  (void) state;
  craft (&crafted, 12, 64 * MIB, old, 3);
  put_be64 (crafted.bytes.p + AUTOCLEAR_OFFSET, 0);
  c = recorder_open (&crafted.bytes, LIMIT);
  q = open_image (c, false);
  messages_clear ();
  set = open_set_requiring (q, "b0", 65536);
  assert_non_null (set);
  assert_message ("qemu-img check -r leaks");
  assert_int_equal (bitmap_set_nr_exposed (set), 1);
  assert_false (ram_bit (bitmap_set_exposed (set, 0), 0));
  now = recorder_image (c);
  assert_int_equal (get_be64 (now.p + AUTOCLEAR_OFFSET), 1);
  assert_int_equal (get_be32 (now.p + crafted.extension + 8), 1);
  bitmap_set_close (set);
  qcow2_close (q);
  container_close (c);
  free (crafted.bytes.p);
}

static void
assert_refused (const struct bytes *bytes, bool readonly, const char *name,
                uint32_t granularity, const char *message)
{
  for (unsigned check_only = 0; check_only < 2; ++check_only) {
    const struct bitmap_options options = {
      .granularity = granularity, .require = &name, .nr_require = 1,
      .check_only = check_only,
    };
    struct container *c = recorder_open (bytes, LIMIT);
    struct qcow2 *q = open_image (c, readonly);

    messages_clear ();
    assert_null (bitmap_set_open (q, &options));
    assert_message (message);
    assert_int_equal (messages_errors (), 1);
    assert_int_equal (recorder_writes (c), 0);
    qcow2_close (q);
    container_close (c);
  }
}

static void
test_refused (void **state)
{
  char long_name[1025];
  struct crafted crafted;

  (void) state;
  memset (long_name, 'n', 1024);
  long_name[1024] = '\0';

  craft (&crafted, 12, 64 * MIB, NULL, 0);
  assert_refused (&crafted.bytes, true, "n", 0, "read-only");
  assert_refused (&crafted.bytes, false, "n", 256, "power of 2");
  assert_refused (&crafted.bytes, false, "n", 1000, "power of 2");
  assert_refused (&crafted.bytes, false, "", 0, "cannot be empty");
  assert_refused (&crafted.bytes, false, long_name, 0, "1023 characters");
  put_be64 (crafted.bytes.p + 24, 0);
  assert_refused (&crafted.bytes, false, "n", 0, "size is zero");
  put_be64 (crafted.bytes.p + 24, 64 * MIB);
  put_be32 (crafted.bytes.p + 4, 2);
  assert_refused (&crafted.bytes, false, "n", 0, "version 2");
  free (crafted.bytes.p);

  craft (&crafted, 16, UINT64_C (1) << 42, NULL, 0);
  assert_refused (&crafted.bytes, false, "n", 512, "too much space");
  free (crafted.bytes.p);
}

/* What a crash or an error leaves: the old bitmaps, sound, with or
 * without the new one.
 */
static void
assert_old_or_new (const struct bytes *image, bool must_be_new)
{
  struct disk_bitmap d = disk_bitmap_read (image, "b0");

  assert_int_equal (d.state, DISK_CLEAN);
  assert_int_equal (d.flags, 2);
  assert_int_equal (d.bits[0], 0x05);
  free (d.bits);
  d = disk_bitmap_read (image, "off");
  assert_int_equal (d.state, DISK_CLEAN);
  assert_int_equal (d.bits[0], 0xff);
  free (d.bits);
  d = disk_bitmap_read (image, "new");
  if (must_be_new)
    assert_int_equal (d.state, DISK_CLEAN);
  assert_int_not_equal (d.state, DISK_MARKED);
  free (d.bits);
}

static void
test_errors (void **state)
{
  unsigned n;

  (void) state;
  for (unsigned applied = 0; applied < 2; ++applied) {
    bool done = false;

    for (n = 0; !done; ++n) {
      struct crafted crafted;
      struct container *c;
      struct bitmap_set *set;
      struct qcow2 *q;
      struct bytes now;

      craft (&crafted, 12, 64 * MIB, old, 3);
      c = recorder_open (&crafted.bytes, LIMIT);
      q = open_image (c, false);
      recorder_fail (c, n, true, applied);
      messages_clear ();
      set = open_set_requiring (q, "new", 512);
      done = set != NULL;
      if (!done)
        assert_true (messages_errors () > 0);
      recorder_stop_failing (c);
      now = recorder_image (c);
      assert_old_or_new (&now, done);
      bitmap_set_close (set);
      qcow2_close (q);

      /* It can be tried again. */
      q = open_image (c, false);
      set = open_set_requiring (q, "new", 512);
      assert_non_null (set);
      now = recorder_image (c);
      assert_old_or_new (&now, true);
      assert_int_equal (image_stop (q, set), 0);
      bitmap_set_close (set);
      qcow2_close (q);
      image_check (c, 0);
      container_close (c);
      free (crafted.bytes.p);
    }
    assert_true (n > 5);
  }
}

/* A note of a granule that nobody ever sets would need the bitmap to be
 * marked: use it the other way round, for granules that the old bitmaps
 * have.  The recorder also fails if one of them is gone or points
 * nowhere.
 */
static void
test_crash (void **state)
{
  struct crafted crafted;
  struct container *c;
  struct bitmap_set *set;
  struct qcow2 *q;
  unsigned long n;

  (void) state;
  craft (&crafted, 12, 64 * MIB, old, 3);
  c = recorder_open (&crafted.bytes, LIMIT);
  recorder_note (c, "b0", 0, 0);
  recorder_note (c, "b0", 2, 2);
  recorder_note (c, "off", 0, 1023);
  q = open_image (c, false);
  set = open_set_requiring (q, "new", 512);
  assert_non_null (set);
  mark_and_note (set, c, 3 * MIB, 1024);
  assert_int_equal (image_stop (q, set), 0);
  bitmap_set_close (set);
  qcow2_close (q);
  n = recorder_crash (c, 256, 1);
  print_message ("%lu images\n", n);
  assert_true (n > 20);
  container_close (c);
  free (crafted.bytes.p);
}

int
main (void)
{
  const struct CMUnitTest tests[] = {
    cmocka_unit_test (test_first),
    cmocka_unit_test (test_append),
    cmocka_unit_test (test_replaces_stale),
    cmocka_unit_test (test_refused),
    cmocka_unit_test (test_errors),
    cmocka_unit_test (test_crash),
  };

  messages_install ();
  return cmocka_run_group_tests (tests, NULL, NULL);
}
