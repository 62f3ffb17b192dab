/* nbdkit-dirty-bitmap-filter
 * SPDX-License-Identifier: BSD-3-Clause
 * Copyright the nbdkit-dirty-bitmap-filter authors
 */

/* Loading what is not as it should be: every way in which the extension,
 * the directory and the tables can be damaged, stale bitmaps, bitmaps in
 * use, and options that ask for what is not there.  Whatever it is, the
 * disk is served (I7).
 */

#include <config.h>

#include <errno.h>
#include <inttypes.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include <cmocka.h>

#include "common/bytes.h"
#include "disk/flush.h"
#include "qcow2/bitmap-directory.h"
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

static uint64_t
autoclear (struct container *c)
{
  return get_be64 (recorder_image (c).p + AUTOCLEAR_OFFSET);
}

/* Open damaged bitmaps, and see that the disk is none the worse. */
static void
assert_damaged (struct crafted *crafted, const char *message, bool distrust)
{
  const struct bitmap_options check = { .check_only = true };
  const char *name = "new";
  const struct bitmap_options require = {
    .require = &name, .nr_require = 1, .check_only = true,
  };
  struct container *c = recorder_open (&crafted->bytes, LIMIT);
  struct qcow2 *q = open_image (c, false);
  struct bitmap_set *set;
  char byte = 'x';

  /* A check says nothing, but for what it was asked for. */
  messages_clear ();
  set = bitmap_set_open (q, &check);
  assert_non_null (set);
  assert_int_equal (messages_warnings () + messages_errors (), 0);
  bitmap_set_close (set);
  assert_null (bitmap_set_open (q, &require));
  assert_int_equal (messages_errors (), 1);
  assert_message ("cannot be created: the bitmaps that the image has are "
                  "damaged");
  assert_message (message);

  messages_clear ();
  set = open_set (q);
  assert_message ("the image's bitmaps cannot be used");
  assert_message (message);
  assert_int_equal (messages_warnings (), 1);
  assert_int_equal (messages_errors (), 0);
  assert_int_equal (bitmap_set_nr_exposed (set), 0);
  assert_int_equal (recorder_writes (c), 0);

  /* The first write marks what would go stale; the disk works. */
  assert_int_equal (bitmap_set_mark (set, 0, 64 * MIB), 0);
  assert_int_equal (recorder_writes (c), 0);
  assert_int_equal (qcow2_write (q, &byte, 1, 1234567), 0);
  assert_int_equal (autoclear (c), distrust ? 0 : 1);
  assert_int_equal (image_flush (q, set), 0);
  byte = 0;
  assert_int_equal (qcow2_read (q, &byte, 1, 1234567), 0);
  assert_int_equal (byte, 'x');
  bitmap_set_close (set);
  qcow2_close (q);
  container_close (c);
}

/* Nothing is left registered: each part can be registered once more. */
static void
assert_nothing_registered (struct crafted *crafted)
{
  struct container *c = recorder_open (&crafted->bytes, LIMIT);
  struct qcow2 *q = open_image (c, false);
  struct bitmap_set *set = open_set (q);

  for (uint64_t at = 4 * crafted->cluster_size; at < crafted->bytes.n;
       at += crafted->cluster_size)
    assert_int_equal (qcow2_register (q, QCOW2_BITMAP_DATA, at, 1), 0);
  bitmap_set_close (set);
  qcow2_close (q);
  container_close (c);
}

enum part { HEADER, EXTENSION, ENTRY_0, ENTRY_1, TABLE_0, TABLE_1 };

struct damage_case {
  enum part part;
  unsigned offset, width;
  uint64_t value;
  const char *message;
};

static const struct damage_case damage_cases[] = {
  { EXTENSION, 4, 4, 16, "16 bytes long, not 24" },
  { EXTENSION, 12, 4, 1, "reserved field is not zero" },
  { EXTENSION, 8, 4, 0, "has no bitmaps" },
  { EXTENSION, 8, 4, 65536, "more than the maximum of 65535" },
  { EXTENSION, 24, 8, 0x4200, "not that of a cluster" },
  { EXTENSION, 24, 8, 0, "not that of a cluster" },
  { EXTENSION, 24, 8, 0x100000, "beyond the end of the image" },
  { EXTENSION, 24, 8, 0x1000, "bitmap directory at 0x1000 overlaps" },
  { EXTENSION, 16, 8, 0, "directory's size is zero" },
  { EXTENSION, 16, 8, 67107841, "maximum of 67107840" },
  { EXTENSION, 16, 8, 72, "more than the 2 bitmaps" },
  { EXTENSION, 16, 8, 96, "more than the 2 bitmaps" },
  { EXTENSION, 16, 8, 32, "has 1 bitmaps, the header says 2" },
  { EXTENSION, 16, 8, 56, "ends inside of an entry" },
  { EXTENSION, 8, 4, 1, "more than the 1 bitmaps" },
  { EXTENSION, 8, 4, 3, "has 2 bitmaps, the header says 3" },
  { ENTRY_0, 20, 4, 8, "extra data" },
  { ENTRY_0, 0, 8, 0, "not the offset of a cluster" },
  { ENTRY_0, 0, 8, 0x5800, "not the offset of a cluster" },
  { ENTRY_0, 0, 8, 0x4000, "the table of bitmap 'b0' at 0x4000 overlaps" },
  { ENTRY_0, 0, 8, 0x80000, "'b0' at 0x80000 is not inside" },
  { ENTRY_0, 8, 4, 0, "has 0 entries" },
  { ENTRY_0, 8, 4, 0x8000001, "has 134217729 entries" },
  { ENTRY_0, 8, 4, 0x20001, "has 131073 entries" },
  { ENTRY_0, 8, 4, 2, "asks for 1" },
  { ENTRY_1, 8, 4, 3, "asks for 4" },
  { ENTRY_0, 12, 4, 4, "unknown flags 0x4" },
  { ENTRY_0, 12, 4, 8, "unknown flags 0x8" },
  { ENTRY_0, 12, 4, 0x80000002, "unknown flags 0x80000002" },
  { ENTRY_0, 16, 1, 0, "unknown type 0" },
  { ENTRY_0, 16, 1, 2, "unknown type 2" },
  { ENTRY_0, 17, 1, 8, "granularity of 2^8" },
  { ENTRY_0, 17, 1, 32, "granularity of 2^32" },
  { ENTRY_0, 18, 2, 0, "0 bytes long" },
  { ENTRY_0, 18, 2, 1024, "1024 bytes long" },
  { ENTRY_0, 24, 1, 0, "has a NUL inside" },
  { ENTRY_0, 25, 1, '1', "two bitmaps have the name 'b1'" },
  { TABLE_0, 0, 8, 2, "invalid entry 0x2" },
  { TABLE_0, 0, 8, 0x100, "invalid entry 0x100" },
  { TABLE_0, 0, 8, UINT64_C (1) << 63, "invalid entry 0x8000000000000000" },
  { TABLE_0, 0, 8, 0x6001, "invalid entry 0x6001" },
  { TABLE_0, 0, 8, 0x6200, "invalid entry 0x6200" },
  { TABLE_1, 24, 8, 0x6200, "invalid entry 0x6200" },
  { TABLE_1, 24, 8, 0x90000, "data cluster of bitmap 'b1' at 0x90000 is not "
    "inside" },
  { TABLE_1, 24, 8, 0x3000, "data cluster of bitmap 'b1' at 0x3000 overlaps" },
  { TABLE_1, 24, 8, 0x5000, "data cluster of bitmap 'b1' at 0x5000 overlaps" },
  { TABLE_1, 24, 8, 0x6000, "data cluster of bitmap 'b1' at 0x6000 overlaps" },
  { TABLE_1, 24, 8, 0x8000, "data cluster of bitmap 'b1' at 0x8000 overlaps" },
};

static uint8_t *
part_at (struct crafted *c, enum part part)
{
  switch (part) {
  case HEADER:    return c->bytes.p;
  case EXTENSION: return c->bytes.p + c->extension;
  case ENTRY_0:   return c->bytes.p + c->entry[0];
  case ENTRY_1:   return c->bytes.p + c->entry[1];
  case TABLE_0:   return c->bytes.p + c->table[0];
  default:        return c->bytes.p + c->table[1];
  }
}

static void
put (uint8_t *p, unsigned width, uint64_t value)
{
  while (width-- > 0) {
    p[width] = value;
    value >>= 8;
  }
}

static void
test_damage (void **state)
{
  (void) state;
  for (size_t i = 0; i < sizeof damage_cases / sizeof damage_cases[0]; ++i) {
    const struct damage_case *d = &damage_cases[i];
    struct crafted crafted;

    craft_two (&crafted);
    assert_int_equal (crafted.table[0], 0x5000);
    assert_int_equal (crafted.table[1], 0x7000);
    put (part_at (&crafted, d->part) + d->offset, d->width, d->value);
    assert_damaged (&crafted, d->message, true);
    assert_nothing_registered (&crafted);
    free (crafted.bytes.p);
  }
}

static void
test_extension_twice (void **state)
{
  struct crafted crafted;
  uint8_t *p;

  (void) state;
  craft_two (&crafted);
  p = crafted.bytes.p + crafted.extension;
  memcpy (p + 32, p, 32);
  assert_damaged (&crafted, "2 bitmaps extensions", true);
  free (crafted.bytes.p);
}

/* Where no bitmap could go stale, none is given up. */
static void
test_damage_without_auto (void **state)
{
  static const uint32_t flags[] = { 0, 1, 3 };

  (void) state;
  for (unsigned i = 0; i < 3; ++i) {
    struct bitmap_spec specs[2] = { two[0], two[1] };
    struct crafted crafted;

    specs[0].flags = flags[i];
    craft (&crafted, 12, 64 * MIB, specs, 2);
    put (crafted.bytes.p + crafted.table[1], 8, 2);
    assert_damaged (&crafted, "invalid entry 0x2", false);
    free (crafted.bytes.p);

    /* But who cannot read the flags must expect the worst. */
    craft (&crafted, 12, 64 * MIB, specs, 2);
    put (crafted.bytes.p + crafted.entry[1] + 16, 1, 9);
    assert_damaged (&crafted, "unknown type 9", true);
    free (crafted.bytes.p);
  }
}

static void
assert_stale (struct crafted *crafted, const char *message)
{
  struct container *c = recorder_open (&crafted->bytes, LIMIT);
  struct qcow2 *q = open_image (c, false);
  struct bitmap_set *set;

  messages_clear ();
  set = open_set (q);
  assert_int_equal (messages_warnings (), 1);
  assert_message (message);
  assert_int_equal (bitmap_set_nr_exposed (set), 0);
  assert_int_equal (recorder_writes (c), 0);
  bitmap_set_close (set);
  qcow2_close (q);
  container_close (c);
}

static void
test_stale (void **state)
{
  struct crafted crafted;

  (void) state;
  craft_two (&crafted);
  put (crafted.bytes.p + AUTOCLEAR_OFFSET, 8, 0);
  assert_stale (&crafted, "changed by a program that does not know them");

  /* What a stale directory says does not matter. */
  put (crafted.bytes.p + crafted.entry[0], 8, 1);
  assert_stale (&crafted, "changed by a program that does not know them");
  free (crafted.bytes.p);

  craft_two (&crafted);
  put (crafted.bytes.p + 4, 4, 2);
  memmove (crafted.bytes.p + 72, crafted.bytes.p + crafted.extension, 32);
  memset (crafted.bytes.p + 104, 0, 32);
  assert_stale (&crafted, "a version 2 image cannot say");
  free (crafted.bytes.p);
}

static void
test_read_only (void **state)
{
  static const enum part parts[] = { ENTRY_0, TABLE_1 };
  struct crafted crafted;

  (void) state;
  for (unsigned i = 0; i < 3; ++i) {
    struct container *c;
    struct bitmap_set *set;
    struct qcow2 *q;

    craft_two (&crafted);
    if (i < 2)
      put (part_at (&crafted, parts[i]), 8, 2);
    c = recorder_open (&crafted.bytes, LIMIT);
    q = open_image (c, true);
    set = open_set (q);
    assert_int_equal (bitmap_set_nr_exposed (set), i < 2 ? 0 : 2);
    assert_int_equal (image_flush (q, set), 0);
    assert_int_equal (recorder_writes (c) + recorder_flushes (c), 0);
    bitmap_set_close (set);
    qcow2_close (q);
    container_close (c);
    free (crafted.bytes.p);
  }
}

/* A bitmap in use is kept as it is; its table may even be damaged. */
static void
test_in_use (void **state)
{
  static const struct {
    uint64_t entry;
    uint32_t table_entries;
  } cases[] = {
    { 0x6000, 1 }, { 2, 1 }, { 0x90000, 1 }, { 0x8000, 1 }, { 0x6000, 5 },
  };

  (void) state;
  for (size_t i = 0; i < sizeof cases / sizeof cases[0]; ++i) {
    struct bitmap_spec specs[2] = { two[0], two[1] };
    struct crafted crafted;
    struct container *c;
    struct bitmap_set *set;
    struct qcow2 *q;
    struct bytes now;

    specs[0].flags = 3;
    specs[1].flags = 2;
    craft (&crafted, 12, 64 * MIB, specs, 2);
    put (crafted.bytes.p + crafted.table[0], 8, cases[i].entry);
    put (crafted.bytes.p + crafted.entry[0] + 8, 4, cases[i].table_entries);
    c = recorder_open (&crafted.bytes, LIMIT);
    q = open_image (c, false);
    messages_clear ();
    set = open_set (q);
    assert_int_equal (messages_warnings (), 1);
    assert_message ("bitmap 'b0' is inconsistent");
    assert_int_equal (bitmap_set_nr_exposed (set), 1);
    assert_string_equal (bitmap_name (bitmap_set_exposed (set, 0)), "b1");

    assert_int_equal (bitmap_set_mark (set, 0, 64 * MIB), 0);
    assert_int_equal (image_flush (q, set), 0);
    assert_true (bitmap_set_all_stored (set));
    now = recorder_image (c);
    assert_memory_equal (now.p + crafted.entry[0],
                         crafted.bytes.p + crafted.entry[0], 32);
    assert_memory_equal (now.p + crafted.table[0],
                         crafted.bytes.p + crafted.table[0], 4096);
    assert_memory_equal (now.p + crafted.first_data[0],
                         crafted.bytes.p + crafted.first_data[0], 4096);
    assert_int_equal (get_be32 (now.p + crafted.entry[1] + 12), 2);
    bitmap_set_close (set);
    qcow2_close (q);
    container_close (c);
    free (crafted.bytes.p);
  }
}

static void
assert_options_fail (struct qcow2 *q, const char *require, const char *expose,
                     const char *message)
{
  for (unsigned check_only = 0; check_only < 2; ++check_only) {
    const struct bitmap_options options = {
      .require = &require, .nr_require = require != NULL,
      .expose = &expose, .nr_expose = expose != NULL,
      .check_only = check_only,
    };

    messages_clear ();
    assert_null (bitmap_set_open (q, &options));
    assert_int_equal (messages_errors (), 1);
    assert_message (message);

    /* The next try would find its own registrations. */
    for (uint64_t at = 4 * 4096; at < container_size (qcow2_container (q));
         at += 4096)
      qcow2_unregister (q, at, 4096);
  }
}

static void
test_options (void **state)
{
  const struct bitmap_spec specs[] = {
    two[0], two[1],
    { .name = "bad", .granularity_bits = 16, .flags = 3 },
    { .name = "late", .granularity_bits = 16, .flags = 2 },
  };
  const char *expose[] = { "late", "b1", "late" }, *require[] = { "b0" };
  const struct bitmap_options options = {
    .expose = expose, .nr_expose = 3, .require = require, .nr_require = 1,
  };
  struct crafted crafted;
  struct container *c;
  struct bitmap_set *set;
  struct qcow2 *q;

  (void) state;
  craft (&crafted, 12, 64 * MIB, specs, 4);
  c = recorder_open (&crafted.bytes, LIMIT);
  q = open_image (c, false);
  assert_options_fail (q, "bad", NULL, "qemu-img bitmap --remove IMAGE 'bad'");
  assert_options_fail (q, "b1", NULL, "qemu-img bitmap --enable IMAGE 'b1'");
  assert_options_fail (q, NULL, "bad", "'bad' is inconsistent");
  assert_options_fail (q, NULL, "none", "has no bitmap of this name");

  set = bitmap_set_open (q, &options);
  assert_non_null (set);
  assert_int_equal (bitmap_set_nr_exposed (set), 2);
  assert_string_equal (bitmap_name (bitmap_set_exposed (set, 0)), "b1");
  assert_string_equal (bitmap_name (bitmap_set_exposed (set, 1)), "late");
  assert_int_equal (recorder_writes (c), 0);

  /* All that are enabled record, offered or not; no other does (I4). */
  assert_int_equal (bitmap_set_mark (set, MIB, 1), 0);
  assert_int_equal (get_be32 (recorder_image (c).p + crafted.entry[1] + 12),
                    0);
  assert_int_equal (get_be32 (recorder_image (c).p + crafted.entry[3] + 12),
                    3);
  assert_int_equal (bitmap_set_mark (set, MIB + 4096, 1), 0);
  assert_int_equal (get_be32 (recorder_image (c).p + crafted.entry[0] + 12),
                    3);
  bitmap_set_close (set);
  qcow2_close (q);
  container_close (c);
  free (crafted.bytes.p);
}

#define LARGE_CLUSTER_BITS 21
#define LARGE_CLUSTER (UINT64_C (1) << LARGE_CLUSTER_BITS)

/* An image of 2 TiB with nr bitmaps of 512 MiB.  Their tables are full of
 * ones, or every second entry is, or they point to clusters that a sparse
 * file has for nothing, or are themselves nothing.
 */
enum large { ONES, SECOND_ONES, POINTERS, NO_TABLES };

static struct container *
make_large (uint64_t nr, enum large large)
{
  struct container *c = container_open_memory (UINT64_C (1) << 50);
  struct crafted crafted;
  uint8_t table[2048], directory[32], head[32];

  craft (&crafted, LARGE_CLUSTER_BITS, UINT64_C (1) << 41, NULL, 0);
  put (head, 4, 0x23852875);
  put (head + 4, 4, 24);
  put (head + 8, 8, nr << 32);
  put (head + 16, 8, nr * 32);
  put (head + 24, 8, 4 * LARGE_CLUSTER);
  memcpy (crafted.bytes.p + crafted.extension, head, 32);
  put (crafted.bytes.p + AUTOCLEAR_OFFSET, 8, 1);
  assert_int_equal (container_pwrite (c, crafted.bytes.p, crafted.bytes.n, 0),
                    0);
  for (uint64_t i = 0; i < nr; ++i) {
    char name[8];
    struct bitmap_directory_entry e = {
      .table_offset = (5 + i) * LARGE_CLUSTER, .table_entries = 256,
      .flags = 2, .granularity_bits = 9, .name = name,
      .name_bytes = snprintf (name, sizeof name, "%u", (unsigned) i),
    };

    for (unsigned j = 0; j < 256; ++j)
      put (table + 8 * j, 8,
           large == ONES ? 1 : large == SECOND_ONES ? j % 2
           : (5 + nr + 256 * i + j) * LARGE_CLUSTER);
    bitmap_directory_put (directory, &e);
    assert_int_equal (container_pwrite (c, directory, 32,
                                        4 * LARGE_CLUSTER + 32 * i), 0);
    if (large != NO_TABLES)
      assert_int_equal (container_pwrite (c, table, sizeof table,
                                          e.table_offset), 0);
  }
  assert_int_equal (container_reserve (c, (5 + (large == POINTERS ? 257 : 1)
                                           * nr) * LARGE_CLUSTER), 0);
  free (crafted.bytes.p);
  return c;
}

/* Bits that would not fit into half of the memory, or of what a pointer
 * reaches, are not even begun with.
 */
static void
test_too_large (void **state)
{
  const uint64_t memory =
    min_u64 ((uint64_t) sysconf (_SC_PHYS_PAGES) * sysconf (_SC_PAGESIZE),
             SIZE_MAX);
  struct container *c =
    make_large (memory / 2 / BITMAP_MAX_STORED_BYTES + 1, POINTERS);
  struct bitmap_set *set;
  struct qcow2 *q;

  (void) state;
  q = open_image (c, false);
  messages_clear ();
  set = open_set (q);
  assert_message ("more than half of the memory");
  assert_int_equal (bitmap_set_nr_exposed (set), 0);
  bitmap_set_close (set);
  qcow2_close (q);
  container_close (c);
}

/* Bytes of memory that are ours alone. */
static uint64_t
private_bytes (void)
{
  FILE *fp = fopen ("/proc/self/status", "re");
  uint64_t kib = 0;
  char line[256];

  assert_non_null (fp);
  while (fgets (line, sizeof line, fp) != NULL)
    if (sscanf (line, "RssAnon: %" SCNu64, &kib) == 1)
      break;
  fclose (fp);
  return kib << 10;
}

/* A cluster of a bitmap that the container has. */
static void
assert_entries (struct container *c, uint64_t table_offset, uint64_t first,
                uint64_t second)
{
  uint64_t entries[256];

  assert_int_equal (container_pread (c, entries, sizeof entries,
                                     table_offset), 0);
  for (unsigned i = 0; i < 256; i += 2) {
    assert_int_equal (be64toh (entries[i]), first);
    assert_int_equal (be64toh (entries[i + 1]), second);
  }
}

/* All ones cost the image next to nothing, and so they do us: here end
 * is what lies in a cluster of ones.
 */
static void
ones_cost_nothing (uint64_t nr, enum large large, uint64_t end)
{
  struct container *c = make_large (nr, large);
  struct bitmap_set *set;
  struct qcow2 *q;
  uint64_t before;
  bool dirty;

  q = open_image (c, false);
  before = private_bytes ();
  set = open_set (q);
  assert_int_equal (bitmap_set_nr_exposed (set), nr);
  assert_int_equal (bitmap_set_mark (set, end - 5 * MIB, 123456), 0);
  for (size_t i = 0; i < nr; ++i) {
    const struct bitmap *b = bitmap_set_exposed (set, i);

    assert_int_equal (bitmap_run (b, end - MIB, end, &dirty), MIB);
    assert_true (dirty);
    assert_int_equal (bitmap_run (b, end - 6 * MIB, end, &dirty), 6 * MIB);
    assert_true (dirty);
  }
  if (getenv ("UNDER_VALGRIND") == NULL)
    assert_true (private_bytes () < before + 16 * MIB);
  assert_int_equal (image_stop (q, set), 0);
  assert_true (bitmap_set_all_stored (set));
  bitmap_set_close (set);
  qcow2_close (q);
  for (uint64_t i = 0; i < nr; ++i)
    assert_entries (c, (5 + i) * LARGE_CLUSTER, large == ONES, 1);
  container_close (c);
}

static void
test_all_ones (void **state)
{
  (void) state;
  ones_cost_nothing (4, ONES, UINT64_C (1) << 41);
  ones_cost_nothing (4, SECOND_ONES, UINT64_C (1) << 41);
}

/* Bitmaps of which a sparse file has but the directory: there are so many
 * that what is kept for each would be too much.
 */
static void
test_too_many (void **state)
{
  struct container *c = make_large (65535, NO_TABLES);
  struct bitmap_set *set;
  struct qcow2 *q;
  uint64_t before, bits;

  (void) state;
  q = open_image (c, false);
  messages_clear ();
  before = private_bytes ();
  set = open_set (q);
  if (getenv ("UNDER_VALGRIND") == NULL)
    assert_true (private_bytes () < before + 64 * MIB);
  assert_message ("more than an eighth of the memory");
  assert_int_equal (bitmap_set_nr_exposed (set), 0);
  /* They are not offered; what is written makes them go stale, openly. */
  assert_int_equal (bitmap_set_mark (set, 0, 1), 0);
  assert_int_equal (qcow2_trim (q, 0, 0), 0);
  assert_int_equal (container_pread (c, &bits, sizeof bits, AUTOCLEAR_OFFSET),
                    0);
  assert_int_equal (bits, 0);
  bitmap_set_close (set);
  qcow2_close (q);
  container_close (c);
}

int
main (void)
{
  const struct CMUnitTest tests[] = {
    cmocka_unit_test (test_damage),
    cmocka_unit_test (test_extension_twice),
    cmocka_unit_test (test_damage_without_auto),
    cmocka_unit_test (test_stale),
    cmocka_unit_test (test_read_only),
    cmocka_unit_test (test_in_use),
    cmocka_unit_test (test_options),
    cmocka_unit_test (test_too_large),
    cmocka_unit_test (test_all_ones),
    cmocka_unit_test (test_too_many),
  };

  messages_install ();
  return cmocka_run_group_tests (tests, NULL, NULL);
}
