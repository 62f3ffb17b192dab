/* nbdkit-dirty-bitmap-filter
 * SPDX-License-Identifier: BSD-3-Clause
 * Copyright the nbdkit-dirty-bitmap-filter authors
 */

/* Loading sound bitmaps: crafted ones, ones that go beyond the end, and
 * QEMU's.
 */

#include <config.h>

#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdlib.h>
#include <string.h>

#include <cmocka.h>

#include "disk/flush.h"
#include "image.h"
#include "bitmap-image.h"

#define MIB (UINT64_C (1) << 20)
#define LIMIT (1 << 20)

/* 16384 bits in one cluster, and 131072 in four. */
static const struct bitmap_spec two[] = {
  { .name = "b0", .granularity_bits = 12, .flags = 2, .table = "d",
    .fill = 0x05 },
  { .name = "b1", .granularity_bits = 9, .flags = 0, .table = "d10d",
    .fill = 0x80 },
};

static void
craft_two (struct crafted *c)
{
  craft (c, 12, 64 * MIB, two, 2);
}

static void
test_sound (void **state)
{
  const struct bitmap *b0, *b1;
  struct crafted crafted;
  struct container *c;
  struct bitmap_set *set;
  struct qcow2 *q;
  bool dirty;

  (void) state;
  craft_two (&crafted);
  c = recorder_open (&crafted.bytes, LIMIT);
  q = open_image (c, false);
  messages_clear ();
  set = open_set (q);

  assert_int_equal (messages_warnings () + messages_errors (), 0);
  assert_int_equal (bitmap_set_nr_exposed (set), 2);
  b0 = bitmap_set_exposed (set, 0);
  b1 = bitmap_set_exposed (set, 1);
  assert_string_equal (bitmap_name (b0), "b0");
  assert_string_equal (bitmap_name (b1), "b1");
  assert_int_equal (bitmap_granularity (b0), 4096);
  assert_int_equal (bitmap_granularity (b1), 512);
  for (uint64_t i = 0; i < 16384; ++i)
    assert_int_equal (ram_bit (b0, i), i % 8 == 0 || i % 8 == 2);
  for (uint64_t i = 0; i < 131072; ++i)
    assert_int_equal (ram_bit (b1, i),
                      i / 32768 == 1 || (i / 32768 != 2 && i % 8 == 7));

  /* Runs, in bytes, from and to the middle of granules. */
  assert_int_equal (bitmap_run (b0, 100, 64 * MIB, &dirty), 3996);
  assert_true (dirty);
  assert_int_equal (bitmap_run (b0, 4096, 64 * MIB, &dirty), 4096);
  assert_false (dirty);
  assert_int_equal (bitmap_run (b0, 5 * 4096 + 1, 6 * 4096 + 7, &dirty),
                    4096 + 6);
  assert_false (dirty);
  assert_int_equal (bitmap_run (b1, 32767 * 512, 64 * MIB, &dirty),
                    32769 * 512);
  assert_true (dirty);
  assert_int_equal (bitmap_run (b1, 65536 * 512, 64 * MIB, &dirty),
                    (32768 + 7) * 512);
  assert_false (dirty);

  /* Nothing is written for looking (I4). */
  assert_int_equal (image_flush (q, set), 0);
  assert_int_equal (recorder_writes (c), 0);
  assert_true (bitmap_set_all_stored (set));

  bitmap_set_close (set);
  qcow2_close (q);
  container_close (c);
  free (crafted.bytes.p);
}

/* Bits beyond the end are not seen, and not written for that alone. */
static void
test_tail (void **state)
{
  static const struct bitmap_spec spec = {
    .name = "b", .granularity_bits = 16, .flags = 2, .table = "d",
    .fill = 0xff,
  };
  static const struct bitmap_spec ones = {
    .name = "b", .granularity_bits = 16, .flags = 2, .table = "1",
  };
  const struct bitmap_spec *specs[] = { &spec, &ones };

  (void) state;
  for (unsigned i = 0; i < 2; ++i) {
    const uint64_t size = 3 * MIB + 512;
    struct crafted crafted;
    struct container *c;
    struct bitmap_set *set;
    struct qcow2 *q;
    bool dirty;

    craft (&crafted, 12, size, specs[i], 1);
    c = recorder_open (&crafted.bytes, LIMIT);
    q = open_image (c, false);
    set = open_set (q);
    assert_int_equal (bitmap_run (bitmap_set_exposed (set, 0), 0, size,
                                  &dirty), size);
    assert_true (dirty);
    assert_int_equal (bitmap_set_mark (set, 0, size), 0);
    assert_int_equal (image_flush (q, set), 0);
    assert_int_equal (recorder_writes (c), 0);
    bitmap_set_close (set);
    qcow2_close (q);
    container_close (c);
    free (crafted.bytes.p);
  }
}

/* What QEMU made, at its other cluster sizes, ends without padding. */
static void
test_from_qemu (void **state)
{
  static const char *const cluster_sizes[] = { "512", "4k", "64k", "2M" };

  (void) state;
  for (unsigned i = 0; i < 4; ++i) {
    const struct bitmap *b;
    struct container *c;
    struct bitmap_set *set;
    struct qcow2 *q;
    const char *file = temp_file ("qemu.qcow2");
    bool dirty;

    assert_int_equal (run_command ("qemu-img create -q -f qcow2 -o "
                                   "cluster_size=%s '%s' 20M && "
                                   "qemu-img bitmap --add -g 512 '%s' fine && "
                                   "qemu-img bitmap --add --disable '%s' off "
                                   "&& qemu-io -c 'write 1M 64k' -c 'write "
                                   "20970496 1k' '%s' >/dev/null",
                                   cluster_sizes[i], file, file, file, file),
                      0);
    c = image_load (file, 1 << 30);
    q = open_image (c, false);
    messages_clear ();
    set = open_set (q);
    assert_int_equal (messages_warnings (), 0);
    assert_int_equal (bitmap_set_nr_exposed (set), 2);
    b = find_exposed (set, "fine");
    assert_int_equal (bitmap_run (b, 0, 20 * MIB, &dirty), MIB);
    assert_false (dirty);
    assert_int_equal (bitmap_run (b, MIB, 20 * MIB, &dirty), 65536);
    assert_true (dirty);
    assert_int_equal (bitmap_run (b, MIB + 65536, 20 * MIB, &dirty),
                      20970496 - MIB - 65536);
    assert_false (dirty);
    assert_int_equal (bitmap_run (b, 20970496, 20 * MIB, &dirty), 1024);
    assert_true (dirty);
    b = find_exposed (set, "off");
    assert_int_equal (bitmap_run (b, 0, 20 * MIB, &dirty), 20 * MIB);
    assert_false (dirty);
    bitmap_set_close (set);
    qcow2_close (q);
    container_close (c);
  }
}

int
main (void)
{
  const struct CMUnitTest tests[] = {
    cmocka_unit_test (test_sound),
    cmocka_unit_test (test_tail),
    cmocka_unit_test (test_from_qemu),
  };

  messages_install ();
  return cmocka_run_group_tests (tests, NULL, NULL);
}
