/* nbdkit-dirty-bitmap-filter
 * SPDX-License-Identifier: BSD-3-Clause
 * Copyright the nbdkit-dirty-bitmap-filter authors
 */

/* The bitmaps extension on disk: what is accepted, what is not, and the
 * limits of what can be made.
 */

#include <config.h>

#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include <cmocka.h>

#include "common/bytes.h"
#include "image.h"
#include "qcow2/bitmap-directory.h"
#include "qcow2/qcow2.h"

#define GIB (UINT64_C (1) << 30)
#define TIB (UINT64_C (1) << 40)

static const struct bitmap_geometry geometry = {
  .disk_size_bytes = 10 * GIB,
  .container_size_bytes = 1 << 24,
  .cluster_size_bytes = 65536,
};

static struct bitmap_damage damage;

static void
assert_damage (const char *part)
{
  if (strstr (damage.what, part) == NULL)
    fail_msg ("\"%s\" is not in \"%s\"", part, damage.what);
  damage.what[0] = '\0';
}

static struct bitmap_directory_entry
entry_named (const char *name)
{
  return (struct bitmap_directory_entry) {
    .table_offset = 0x50000,
    .table_entries = 1,
    .flags = BITMAP_FLAG_AUTO,
    .granularity_bits = 16,
    .name = name,
    .name_bytes = strlen (name),
  };
}

static void
test_extension (void **state)
{
  const struct qcow2_bitmaps_extension good = {
    .count = 1, .length = 24, .nr_bitmaps = 2,
    .directory_size_bytes = 64, .directory_offset = 0x40000,
    .autoclear = true,
  };
  struct qcow2_bitmaps_extension ext;

  (void) state;
  assert_int_equal (bitmap_extension_check (&good, &geometry, &damage), 0);

#define BAD(field, value, message)                                      \
  ext = good;                                                           \
  ext.field = value;                                                    \
  assert_int_equal (bitmap_extension_check (&ext, &geometry, &damage), -1); \
  assert_damage (message)

  BAD (count, 2, "2 bitmaps extensions");
  BAD (length, 23, "23 bytes long");
  BAD (length, 32, "32 bytes long");
  BAD (reserved, 1, "reserved field");
  BAD (nr_bitmaps, 0, "no bitmaps");
  BAD (nr_bitmaps, 65536, "more than the maximum of 65535");
  BAD (directory_size_bytes, 0, "size is zero");
  BAD (directory_size_bytes, 67107841, "more than the maximum of 67107840");
  BAD (directory_offset, 0, "not that of a cluster");
  BAD (directory_offset, 0x40200, "not that of a cluster");
  BAD (directory_offset, 1 << 24, "beyond the end");
  BAD (directory_offset, UINT64_MAX - 65535, "beyond the end");
  BAD (directory_size_bytes, (1 << 24) - 0x40000 + 1, "beyond the end");
#undef BAD

  ext = good;
  ext.directory_size_bytes = (1 << 24) - 0x40000;
  assert_int_equal (bitmap_extension_check (&ext, &geometry, &damage), 0);
}

static void
test_parse_what_put_makes (void **state)
{
  static uint8_t directory[4096];
  struct bitmap_directory_entry entries[3];
  char long_name[BITMAP_MAX_NAME_BYTES + 1] = { 0 };
  const char *names[] = { "a", "\xff\x80 b", long_name };
  size_t bytes = 0;

  (void) state;
  memset (long_name, 'x', BITMAP_MAX_NAME_BYTES);
  for (size_t i = 0; i < 3; ++i) {
    struct bitmap_directory_entry e = entry_named (names[i]);

    e.table_offset += i * 65536;
    e.flags = i;
    e.granularity_bits = 16 + i;
    bytes += bitmap_directory_put (directory + bytes, &e);
  }
  assert_int_equal (bytes, 32 + 32 + 1048);
  assert_int_equal (bitmap_directory_parse (directory, bytes, &geometry,
                                            entries, 3, &damage), 0);
  for (size_t i = 0; i < 3; ++i) {
    assert_int_equal (entries[i].offset, i * 32);
    assert_int_equal (entries[i].table_offset, 0x50000 + i * 65536);
    assert_int_equal (entries[i].table_entries, 1);
    assert_int_equal (entries[i].flags, i);
    assert_int_equal (entries[i].granularity_bits, 16 + i);
    assert_int_equal (entries[i].name_bytes, strlen (names[i]));
    assert_memory_equal (entries[i].name, names[i], strlen (names[i]));
  }

  /* Padding is not looked at; sizes and numbers must be exact. */
  directory[31] = 0xaa;
  assert_int_equal (bitmap_directory_parse (directory, bytes, &geometry,
                                            entries, 3, &damage), 0);
  assert_int_equal (bitmap_directory_parse (directory, bytes, &geometry,
                                            entries, 2, &damage), -1);
  assert_damage ("more than the 2 bitmaps");
  assert_int_equal (bitmap_directory_parse (directory, 64, &geometry,
                                            entries, 3, &damage), -1);
  assert_damage ("has 2 bitmaps, the header says 3");
  for (size_t n = 1; n < bytes; ++n)
    if (n != 32 && n != 64) {
      assert_int_equal (bitmap_directory_parse (directory, n, &geometry,
                                                entries, 3, &damage), -1);
      assert_damage ("ends inside of an entry");
    }
}

/* Parse one entry with some bytes changed. */
static int
parse_changed (size_t at, const void *bytes, size_t n, uint32_t flags)
{
  static uint8_t directory[2048];
  struct bitmap_directory_entry e = entry_named ("name"), parsed;
  size_t size;

  e.flags = flags;
  size = bitmap_directory_put (directory, &e);
  memcpy (directory + at, bytes, n);
  return bitmap_directory_parse (directory, size, &geometry, &parsed, 1,
                                 &damage);
}

static void
assert_refused (size_t at, const void *bytes, size_t n, const char *message)
{
  assert_int_equal (parse_changed (at, bytes, n, BITMAP_FLAG_AUTO), -1);
  assert_damage (message);
  /* Being in use excuses nothing of this. */
  if (at != 12) {
    assert_int_equal (parse_changed (at, bytes, n, BITMAP_FLAG_IN_USE), -1);
    assert_damage (message);
  }
}

static void
test_fields (void **state)
{
  uint8_t b[8] = { 0 };

  (void) state;
  assert_int_equal (parse_changed (0, b, 0, BITMAP_FLAG_AUTO), 0);

  put_be64 (b, 0);
  assert_refused (0, b, 8, "not the offset of a cluster");
  put_be64 (b, 0x50200);
  assert_refused (0, b, 8, "not the offset of a cluster");
  put_be32 (b, 0);
  assert_refused (8, b, 4, "has 0 entries");
  put_be32 (b, 0x8000001);
  assert_refused (8, b, 4, "has 134217729 entries");
  put_be32 (b, 512 * 1024 / 64 + 1);
  assert_refused (8, b, 4, "has 8193 entries");
  for (unsigned bit = 2; bit < 32; ++bit) {
    put_be32 (b, UINT32_C (1) << bit);
    assert_refused (12, b, 4, "unknown flags");
  }
  b[0] = 0;
  assert_refused (16, b, 1, "unknown type 0");
  b[0] = 2;
  assert_refused (16, b, 1, "unknown type 2");
  b[0] = 8;
  assert_refused (17, b, 1, "granularity of 2^8");
  b[0] = 32;
  assert_refused (17, b, 1, "granularity of 2^32");
  b[0] = 255;
  assert_refused (17, b, 1, "granularity of 2^255");
  put_be16 (b, 0);
  assert_refused (18, b, 2, "0 bytes long");
  put_be16 (b, 1024);
  assert_refused (18, b, 2, "1024 bytes long");
  put_be16 (b, 1023);
  assert_refused (18, b, 2, "ends inside of an entry");
  put_be32 (b, 8);
  assert_refused (20, b, 4, "extra data");
  assert_refused (25, "\0", 1, "has a NUL inside");

  /* The exact size, unless in use. */
  put_be32 (b, 2);
  assert_int_equal (parse_changed (8, b, 4, BITMAP_FLAG_AUTO), -1);
  assert_damage ("has 2 entries, but the disk's size asks for 1");
  assert_int_equal (parse_changed (8, b, 4, 0), -1);
  assert_int_equal (parse_changed (8, b, 4, BITMAP_FLAG_IN_USE), 0);
  put_be32 (b, 8192);
  assert_int_equal (parse_changed (8, b, 4, BITMAP_FLAG_IN_USE), 0);
}

/* As many names as there can be, all alike but for the end: sorted, not
 * compared with each other.
 */
static void
test_unique_names (void **state)
{
  const uint32_t nr = BITMAP_MAX_BITMAPS;
  uint8_t *directory = malloc ((size_t) nr * 64);
  struct bitmap_directory_entry *entries = calloc (nr, sizeof *entries);
  size_t bytes = 0;

  (void) state;
  for (uint32_t i = 0; i < nr; ++i) {
    char name[40];
    struct bitmap_directory_entry e;

    snprintf (name, sizeof name, "%032u", i == nr - 1 ? 12345 : i);
    e = entry_named (name);
    bytes += bitmap_directory_put (directory + bytes, &e);
  }
  assert_int_equal (bitmap_directory_parse (directory, bytes, &geometry,
                                            entries, nr, &damage), -1);
  assert_damage ("two bitmaps have the name "
                 "'00000000000000000000000000012345'");
  assert_int_equal (bitmap_directory_parse (directory, bytes - 56, &geometry,
                                            entries, nr - 1, &damage), 0);
  free (directory);
  free (entries);
}

static void
test_table_entries (void **state)
{
  uint64_t table[2] = { 0x0102030405060708, 1 };
  uint8_t raw[16];

  (void) state;
  assert_true (bitmap_table_entry_is_valid (0, 65536));
  assert_true (bitmap_table_entry_is_valid (1, 65536));
  assert_true (bitmap_table_entry_is_valid (0x50000, 65536));
  assert_true (bitmap_table_entry_is_valid (0x50200, 512));
  assert_true (bitmap_table_entry_is_valid (UINT64_C (0xff) << 48, 512));
  assert_false (bitmap_table_entry_is_valid (0x50200, 65536));
  assert_false (bitmap_table_entry_is_valid (0x50001, 65536));
  for (unsigned bit = 1; bit <= 8; ++bit)
    assert_false (bitmap_table_entry_is_valid (UINT64_C (1) << bit, 512));
  for (unsigned bit = 56; bit < 64; ++bit)
    assert_false (bitmap_table_entry_is_valid (UINT64_C (1) << bit, 512));

  bitmap_table_put (raw, table, 2);
  assert_memory_equal (raw, "\1\2\3\4\5\6\7\10\0\0\0\0\0\0\0\1", 16);
  memcpy (table, raw, 16);
  bitmap_table_get (table, 2);
  assert_true (table[0] == 0x0102030405060708 && table[1] == 1);
}

static void
assert_new (uint64_t disk_size, uint64_t granularity, const char *message)
{
  const struct bitmap_geometry g = {
    .disk_size_bytes = disk_size, .cluster_size_bytes = 65536,
  };
  int r = bitmap_directory_check_new ("b", granularity, &g, 0, 0, &damage);

  assert_int_equal (r, message ? -1 : 0);
  if (message)
    assert_damage (message);
}

static void
test_limits_of_new (void **state)
{
  char name[1025];

  (void) state;
  assert_new (GIB, 512, NULL);
  assert_new (GIB, UINT64_C (1) << 31, NULL);
  assert_new (GIB, 256, "power of 2 and at least 512");
  assert_new (GIB, 1000, "power of 2 and at least 512");
  assert_new (GIB, 0, "power of 2 and at least 512");
  assert_new (GIB, UINT64_C (1) << 32, "exceeds maximum (2147483648 bytes)");
  assert_new (0, 65536, "size is zero");
  assert_new (2 * TIB, 512, NULL);
  assert_new (2 * TIB + 512, 512, "too much space");
  assert_new (4 * TIB, 1024, NULL);
  assert_new (4 * TIB, 512, "too much space");
  assert_new (256 * TIB, 65536, NULL);
  assert_new (256 * TIB + 512 * 65536, 65536, "too much space");
  assert_new (INT64_MAX, UINT64_C (1) << 31, NULL);

#define CHECK(nr, bytes)                                                \
  bitmap_directory_check_new (name, 65536, &geometry, nr, bytes, &damage)

  memset (name, 'n', sizeof name);
  name[1024] = '\0';
  assert_int_equal (CHECK (0, 0), -1);
  assert_damage ("exceeds maximum (1023 characters)");
  name[1023] = '\0';
  assert_int_equal (CHECK (0, 0), 0);
  assert_int_equal (CHECK (0, BITMAP_MAX_DIRECTORY_BYTES - 1048), 0);
  assert_int_equal (CHECK (0, BITMAP_MAX_DIRECTORY_BYTES - 1047), -1);
  assert_damage ("not enough space in the bitmap directory");
  assert_int_equal (CHECK (65534, 0), 0);
  assert_int_equal (CHECK (65535, 0), -1);
  assert_damage ("maximum number of persistent bitmaps");
  name[0] = '\0';
  assert_int_equal (CHECK (0, 0), -1);
  assert_damage ("cannot be empty");
#undef CHECK
}

static void
test_shown_names (void **state)
{
  char name[1023];

  (void) state;
  assert_string_equal (bitmap_show_name ("a\nb\x7f", 4).text, "a\\x0ab\\x7f");
  assert_string_equal (bitmap_show_name ("a\0b", 3).text, "a\\x00b");
  memset (name, 1, sizeof name);
  assert_true (strlen (bitmap_show_name (name, sizeof name).text) < 256);
  memset (name, 'x', sizeof name);
  assert_string_equal (bitmap_show_name (name, 1023).text + 249, "...");
}

/* Bytes at random, and bytes that are nearly right: nothing but yes or
 * no may come of it (the sanitizers watch).
 */
static void
test_random_bytes (void **state)
{
  struct bitmap_directory_entry entries[8];
  unsigned accepted = 0;
  uint64_t seed = 3;

  (void) state;
  for (unsigned round = 0; round < 200000; ++round) {
    size_t n = 1 + random_next (&seed) % 160;
    uint8_t *p = malloc (n);    /* exact, so that ASan sees its end */
    size_t used = 0;

    for (size_t i = 0; i < n; ++i)
      p[i] = random_next (&seed);
    while (n - used >= 32 && random_next (&seed) % 4) {
      char name[9];
      struct bitmap_directory_entry e;

      snprintf (name, sizeof name, "%u", (unsigned) (random_next (&seed) % 9));
      e = entry_named (name);
      used += bitmap_directory_put (p + used, &e);
    }
    for (unsigned i = random_next (&seed) % 3; i > 0; --i)
      p[random_next (&seed) % n] ^= 1 << random_next (&seed) % 8;
    if (used > 0 && random_next (&seed) % 2)
      p = realloc (p, n = used);
    if (bitmap_directory_parse (p, n, &geometry, entries,
                                1 + random_next (&seed) % 4, &damage) == 0)
      accepted++;
    free (p);
  }
  assert_true (accepted > 100);
}

int
main (void)
{
  const struct CMUnitTest tests[] = {
    cmocka_unit_test (test_extension),
    cmocka_unit_test (test_parse_what_put_makes),
    cmocka_unit_test (test_fields),
    cmocka_unit_test (test_unique_names),
    cmocka_unit_test (test_table_entries),
    cmocka_unit_test (test_limits_of_new),
    cmocka_unit_test (test_shown_names),
    cmocka_unit_test (test_random_bytes),
  };

  return cmocka_run_group_tests (tests, NULL, NULL);
}
