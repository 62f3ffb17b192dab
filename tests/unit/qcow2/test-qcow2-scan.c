/* nbdkit-dirty-bitmap-filter
 * SPDX-License-Identifier: BSD-3-Clause
 * Copyright the nbdkit-dirty-bitmap-filter authors
 */

/* Counting references, reclaiming leaks, and repairing dirty images.
 *
 * Images are made by QEMU and damaged here, and qemu-img check is the
 * judge of what is left.
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

#include "common/bytes.h"
#include "common/report.h"
#include "container/container.h"
#include "crash-check.h"
#include "crash-container.h"
#include "image.h"
#include "qcow2/internal.h"

#define MIB (UINT64_C (1) << 20)
#define GIB (UINT64_C (1) << 30)

enum {                          /* offsets of fields */
  F_L1_ENTRIES = 36,
  F_L1_OFFSET = 40,
  F_REFTABLE_OFFSET = 48,
  F_REFTABLE_CLUSTERS = 56,
  F_INCOMPATIBLE = 72,
  F_AUTOCLEAR = 88,
  F_REFCOUNT_ORDER = 96,
};

static char last_error[1024], last_warning[1024];

static void
keep_report (enum report_level level, const char *fmt, va_list args)
{
  char text[1024];

  vsnprintf (text, sizeof text, fmt, args);
  if (level == REPORT_ERROR)
    strcpy (last_error, text);
  if (level == REPORT_WARNING)
    strcpy (last_warning, text);
  if (getenv ("VERBOSE") != NULL)
    fprintf (stderr, "%d: %s\n", level, text);
}

/* ------------------------------------------------------------------ */
/* Images. */

static uint64_t
read_be (struct container *c, uint64_t offset, unsigned bytes)
{
  uint8_t be[8] = { 0 };

  assert_int_equal (container_pread (c, be + 8 - bytes, bytes, offset), 0);
  return get_be64 (be);
}

static void
write_be (struct container *c, uint64_t offset, unsigned bytes, uint64_t v)
{
  uint8_t be[8];

  put_be64 (be, v);
  assert_int_equal (container_pwrite (c, be + 8 - bytes, bytes, offset), 0);
}

static uint64_t
cluster_size (struct container *c)
{
  return UINT64_C (1) << read_be (c, 20, 4);
}

static uint64_t
nr_clusters (struct container *c)
{
  return div_round_up (container_size (c), cluster_size (c));
}

/* Where the refcount of a cluster is; its width is at least a byte. */
static uint64_t
refcount_at (struct container *c, uint64_t cluster, unsigned *bytes)
{
  const unsigned order = read_be (c, F_REFCOUNT_ORDER, 4);
  const uint64_t in_block = cluster_size (c) * 8 >> order;
  const uint64_t table = read_be (c, F_REFTABLE_OFFSET, 8);
  const uint64_t block = read_be (c, table + cluster / in_block * 8, 8);

  *bytes = (1U << order) / 8;
  assert_int_not_equal (block, 0);
  return block + cluster % in_block * *bytes;
}

static void
set_refcount (struct container *c, uint64_t cluster, uint64_t count)
{
  unsigned bytes;
  const uint64_t at = refcount_at (c, cluster, &bytes);

  write_be (c, at, bytes, count);
}

static uint64_t
get_refcount (struct container *c, uint64_t cluster)
{
  unsigned bytes;
  const uint64_t at = refcount_at (c, cluster, &bytes);

  return read_be (c, at, bytes);
}

static void
mark_dirty (struct container *c)
{
  write_be (c, F_INCOMPATIBLE, 8, read_be (c, F_INCOMPATIBLE, 8) | 1);
}

static bool
is_marked_dirty (struct container *c)
{
  return read_be (c, F_INCOMPATIBLE, 8) & 1;
}

/* An image in which there is some of everything.  Each is made once. */
static struct container *
make_image (const char *options, const char *more)
{
  static const char *made[64][2];
  char name[32], raw[512], file[512];
  unsigned i = 0;

  while (made[i][0] != NULL && (strcmp (made[i][0], options) != 0 ||
                                strcmp (made[i][1], more) != 0))
    i++;
  snprintf (name, sizeof name, "some%u.qcow2", i);
  strcpy (file, temp_file (name));
  strcpy (raw, temp_file ("some.raw"));
  if (made[i][0] != NULL)
    return image_load (file, 4 * GIB);
  assert_true (i < 63);
  made[i][0] = options;
  made[i][1] = more;
  assert_int_equal (run_command ("rm -f '%s' && truncate -s 8M '%s' && "
                                 "seq 100000 200000 | head -c 700000 | "
                                 "dd of='%s' bs=1M seek=1 conv=notrunc "
                                 "2>/dev/null", raw, raw, raw), 0);
  assert_int_equal (run_command ("qemu-img convert -t unsafe -c -f raw "
                                 "-O qcow2 %s '%s' '%s'", options, raw, file),
                    0);
  assert_int_equal (run_command ("qemu-io -t unsafe -f qcow2 "
                                 "-c 'write -q -P 1 2M 900k' "
                                 "-c 'write -q -P 2 1200k 10k' "
                                 "-c 'write -q -z 5M 64k' "
                                 "-c 'write -q -z 2M 128k' '%s'", file), 0);
  assert_int_equal (run_command ("f='%s'; %s", file, more), 0);
  return image_load (file, 4 * GIB);
}

static struct qcow2 *
try_open (struct container *c)
{
  const struct qcow2_options options = { .cache_size = 1 };

  last_error[0] = last_warning[0] = '\0';
  return qcow2_open (c, &options);
}

static struct qcow2 *
open_image (struct container *c)
{
  struct qcow2 *q = try_open (c);

  assert_non_null (q);
  return q;
}

static uint8_t *
contents (struct container *c)
{
  const struct qcow2_options options = { .readonly = true, .cache_size = 1 };
  struct qcow2 *q = qcow2_open (c, &options);
  uint8_t *buf;

  assert_non_null (q);
  buf = malloc (qcow2_size (q));
  assert_non_null (buf);
  assert_int_equal (qcow2_read (q, buf, qcow2_size (q), 0), 0);
  qcow2_close (q);
  return buf;
}

static uint8_t *
bytes_of (struct container *c)
{
  uint8_t *buf = malloc (container_size (c));

  assert_non_null (buf);
  assert_int_equal (container_pread (c, buf, container_size (c), 0), 0);
  return buf;
}

/* Open it, write a little where there is something, and stop. */
static void
serve_and_write (struct container *c)
{
  struct qcow2 *q = open_image (c);

  assert_int_equal (qcow2_write (q, "x", 1, 7 * MIB), 0);
  assert_int_equal (qcow2_stop (q), 0);
  qcow2_close (q);
}

/* ------------------------------------------------------------------ */
/* Counting. */

static int
differ (void *opaque, uint64_t cluster, uint64_t stored, uint64_t counted)
{
  (void) opaque;
  fail_msg ("cluster %" PRIu64 ": refcount %" PRIu64 ", counted %" PRIu64,
            cluster, stored, counted);
  return 0;
}

static const struct scan_limits no_limits = {
  .bytes = UINT64_MAX, .clusters = UINT64_MAX / 8,
};

/* What QEMU has made has the refcounts that we count. */
static void
check_counts (const char *options, const char *more)
{
  struct container *c = make_image (options, more);
  struct qcow2 *q = open_image (c);
  struct scan s;

  assert_int_equal (scan_begin (q, &s, no_limits), SCAN_DONE);
  assert_int_equal (scan_finish (q, &s), SCAN_DONE);
  assert_true (s.complete);
  assert_int_equal (scan_compare (q, &s, differ, NULL), SCAN_DONE);
  scan_free (&s);
  qcow2_close (q);
  container_close (c);
}

#define BITMAPS "qemu-img bitmap --add -g 512 $f a && " \
  "qemu-img bitmap --add $f b && " \
  "qemu-io -t unsafe -f qcow2 -c 'write -q 3M 9k' -c 'write -q 7M 1M' $f"
#define SNAPSHOTS "qemu-img snapshot -c one $f && " \
  "qemu-io -t unsafe -f qcow2 -c 'write -q 1M 5k' " \
  "-c 'write -q 2500k 100k' $f && " \
  "qemu-img snapshot -c two $f && " \
  "qemu-io -t unsafe -f qcow2 -c 'write -q 2500k 1k' " \
  "-c 'write -q 7M 1k' $f"

static const char *const all_options[] = {
  "", "-o cluster_size=512", "-o cluster_size=2M",
  "-o cluster_size=4k,refcount_bits=64", "-o refcount_bits=1",
  "-o cluster_size=1k,refcount_bits=2", "-o compat=0.10",
  "-o extended_l2=on", "-o compression_type=zstd",
  "-o cluster_size=512,refcount_bits=32",
};
#define NR_OPTIONS (sizeof all_options / sizeof all_options[0])

/* Bitmaps and snapshots, where they can be: the latter need counts that
 * are higher than some images can have.
 */
static const char *
more_for (const char *options)
{
  if (strstr (options, "compat") != NULL)
    return SNAPSHOTS;
  return strstr (options, "refcount_bits=1") != NULL ||
    strstr (options, "refcount_bits=2") != NULL
    ? BITMAPS : BITMAPS " && " SNAPSHOTS;
}

static void
test_counts (void **state)
{
  (void) state;
  for (unsigned i = 0; i < NR_OPTIONS; ++i) {
    check_counts (all_options[i], ":");
    check_counts (all_options[i], more_for (all_options[i]));
  }
}

static void
test_limits (void **state)
{
  const struct scan_limits few_bytes = { .bytes = 1000, .clusters = 1000000 };
  const struct scan_limits few_clusters = { .bytes = MIB, .clusters = 20 };
  struct container *c = make_image ("-o cluster_size=1k", ":");
  struct qcow2 *q = open_image (c);
  struct scan s;

  (void) state;
  assert_int_equal (scan_begin (q, &s, few_clusters), SCAN_TOO_MUCH);
  scan_free (&s);
  assert_int_equal (scan_begin (q, &s, few_bytes), SCAN_DONE);
  assert_int_equal (scan_finish (q, &s), SCAN_TOO_MUCH);
  scan_free (&s);
  qcow2_close (q);
  container_close (c);
}

/* ------------------------------------------------------------------ */
/* Leaks. */

/* Leak some clusters of an image. */
static void
leak (struct container *c)
{
  const uint64_t end = nr_clusters (c);

  /* New clusters, at the end and beyond it; one several times. */
  assert_int_equal (container_reserve (c, (end + 4) * cluster_size (c)), 0);
  set_refcount (c, end, 1);
  set_refcount (c, end + 1, 1);
  set_refcount (c, end + 2, 200);
  set_refcount (c, end + 9, 1);
  /* The bytes there are of no use. */
  assert_int_equal (container_pwrite (c, "leak", 4, end * cluster_size (c)),
                    0);
  /* The header, too often. */
  set_refcount (c, 0, 3);
}

static void
check_leaks (const char *options)
{
  struct container *c = make_image (options, BITMAPS);
  CLEANUP_FREE uint8_t *before, *after, *disk = contents (c), *disk_after;
  uint64_t size;
  struct qcow2 *q;

  leak (c);
  size = container_size (c);
  before = bytes_of (c);
  q = open_image (c);
  assert_string_equal (last_warning, "");
  assert_int_equal (qcow2_flush (q), 0);
  assert_int_equal (qcow2_stop (q), 0);
  qcow2_close (q);
  assert_int_equal (container_size (c), size);
  after = bytes_of (c);
  assert_memory_equal (before, after, size);

  serve_and_write (c);
  image_check (c, true);
  disk_after = contents (c);
  disk[7 * MIB] = 'x';
  assert_memory_equal (disk, disk_after, 8 * MIB);
  container_close (c);
}

static void
test_leaks (void **state)
{
  (void) state;
  check_leaks ("");
  check_leaks ("-o cluster_size=2k,refcount_bits=8");
  check_leaks ("-o cluster_size=16k,refcount_bits=64");
  check_leaks ("-o extended_l2=on");
}

/* Where something may be in use that we do not know, leaks stay. */
static void
check_left (void (*change) (struct container *))
{
  struct container *c = make_image ("", BITMAPS);
  const uint64_t end = nr_clusters (c);

  leak (c);
  change (c);
  serve_and_write (c);
  assert_int_equal (get_refcount (c, end), 1);
  assert_int_equal (get_refcount (c, end + 2), 200);
  assert_int_equal (read_be (c, end * cluster_size (c), 4),
                    get_be32 ("leak"));
  container_close (c);
}

static void
clear_autoclear (struct container *c)
{
  write_be (c, F_AUTOCLEAR, 8, 0);
}

static void
unknown_autoclear (struct container *c)
{
  write_be (c, F_AUTOCLEAR, 8, 5);
}

static void
unknown_compatible (struct container *c)
{
  write_be (c, 80, 8, 2);
}

/* The feature table becomes something else. */
static void
unknown_extension (struct container *c)
{
  const uint64_t at = read_be (c, 100, 4);

  assert_int_equal (read_be (c, at, 4), 0x6803f857);
  write_be (c, at, 4, 0x12345678);
}

static uint64_t
directory_of (struct container *c)
{
  uint64_t at = read_be (c, 100, 4);

  while (read_be (c, at, 4) != 0x23852875)
    at += 8 + round_up (read_be (c, at + 4, 4), 8);
  return read_be (c, at + 24, 8);
}

static void
damage_directory (struct container *c)
{
  write_be (c, directory_of (c) + 16, 1, 7);
}

static void
damage_bitmap_table (struct container *c)
{
  write_be (c, read_be (c, directory_of (c), 8), 8, 2);
}

static uint64_t
l2_table (struct container *c)
{
  return read_be (c, read_be (c, F_L1_OFFSET, 8), 8) & ENTRY_OFFSET_MASK;
}

/* The L2 entry of a guest offset, in an image without options. */
static uint64_t
l2_entry_at (struct container *c, uint64_t offset)
{
  return l2_table (c) + offset / 65536 * 8;
}

static void
entry_beyond_end (struct container *c)
{
  write_be (c, l2_entry_at (c, 2 * MIB + 512 * 1024), 8,
            container_size (c) | OFLAG_COPIED);
}

static void
entry_not_aligned (struct container *c)
{
  const uint64_t at = l2_entry_at (c, 2 * MIB + 512 * 1024);

  write_be (c, at, 8, read_be (c, at, 8) + 512);
}

static void
entry_used_twice (struct container *c)
{
  const uint64_t at = l2_entry_at (c, 2 * MIB + 512 * 1024);

  write_be (c, at + 8, 8, read_be (c, at, 8));
}

static void
entry_is_metadata (struct container *c)
{
  write_be (c, l2_entry_at (c, 2 * MIB + 512 * 1024), 8,
            l2_table (c) | OFLAG_COPIED);
}

static void
entry_is_bitmap (struct container *c)
{
  write_be (c, l2_entry_at (c, 2 * MIB + 512 * 1024), 8,
            directory_of (c) | OFLAG_COPIED);
}

static void
entry_reserved_bits (struct container *c)
{
  const uint64_t at = l2_entry_at (c, 2 * MIB + 512 * 1024);

  write_be (c, at, 8, read_be (c, at, 8) | 4);
}

static void (*const unknowns[]) (struct container *) = {
  clear_autoclear, unknown_autoclear, unknown_compatible, unknown_extension,
  damage_directory, damage_bitmap_table,
};
#define NR_UNKNOWNS (sizeof unknowns / sizeof unknowns[0])

static void (*const inconsistencies[]) (struct container *) = {
  entry_beyond_end, entry_not_aligned, entry_used_twice, entry_is_metadata,
  entry_is_bitmap, entry_reserved_bits,
};
#define NR_INCONSISTENCIES (sizeof inconsistencies / sizeof inconsistencies[0])

static void
test_left (void **state)
{
  (void) state;
  for (unsigned i = 0; i < NR_UNKNOWNS; ++i)
    check_left (unknowns[i]);
  for (unsigned i = 0; i < NR_INCONSISTENCIES; ++i)
    check_left (inconsistencies[i]);
}

/* A refcount that is too low: the image is served, nothing is reclaimed,
 * and the cluster is not taken for a free one.
 */
static void
test_too_low (void **state)
{
  struct container *c = make_image ("", ":");
  const uint64_t end = nr_clusters (c);
  uint8_t *disk = contents (c), *after;
  static uint8_t data[4 * MIB];
  uint64_t data_cluster;
  struct qcow2 *q;

  (void) state;
  data_cluster = (read_be (c, l2_entry_at (c, 2 * MIB + 512 * 1024), 8)
                  & ENTRY_OFFSET_MASK) >> 16;
  leak (c);
  set_refcount (c, data_cluster, 0);
  q = open_image (c);
  assert_non_null (strstr (last_warning, "qemu-img check -r all"));
  memset (data, 'y', sizeof data);
  assert_int_equal (qcow2_write (q, data, sizeof data, 4 * MIB), 0);
  assert_int_equal (qcow2_stop (q), 0);
  qcow2_close (q);
  assert_int_equal (get_refcount (c, data_cluster), 1);
  assert_int_equal (get_refcount (c, end), 1);
  after = contents (c);
  assert_memory_equal (disk, after, 4 * MIB);
  free (after);
  free (disk);
  container_close (c);
}

/* A cluster of the disk with a refcount that is too high and no COPIED
 * flag: either both are mended or none.
 */
static void
test_not_copied (void **state)
{
  struct container *c = make_image ("", ":");
  const uint64_t at = l2_entry_at (c, 2 * MIB + 512 * 1024);
  const uint64_t entry = read_be (c, at, 8);
  const uint64_t cluster = (entry & ENTRY_OFFSET_MASK) >> 16;

  (void) state;
  write_be (c, at, 8, entry & ~OFLAG_COPIED);
  set_refcount (c, cluster, 2);
  serve_and_write (c);
  image_check (c, false);
  assert_int_equal (get_refcount (c, cluster), 2);

  mark_dirty (c);
  qcow2_close (open_image (c));
  image_check (c, true);
  assert_int_equal (read_be (c, at, 8), entry);
  assert_int_equal (get_refcount (c, cluster), 1);
  container_close (c);
}

/* ------------------------------------------------------------------ */
/* Repair. */

/* Open the image, which must be clean and the same disk after that. */
static void
check_repair (struct container *c)
{
  uint8_t *before = contents (c), *after;

  assert_true (is_marked_dirty (c));
  qcow2_close (open_image (c));
  assert_non_null (strstr (last_warning, "repaired"));
  assert_false (is_marked_dirty (c));
  image_check (c, true);
  after = contents (c);
  assert_memory_equal (before, after, 8 * MIB);
  free (before);
  free (after);
}

/* QEMU's repair of the same image ends with the same disk. */
static void
check_repair_by_qemu (struct container *c)
{
  uint8_t *before = contents (c), *after;
  const char *file = temp_file ("repaired.qcow2");

  image_save (c, file);
  assert_int_equal (run_command ("qemu-img check -q -r all '%s' >/dev/null "
                                 "2>&1; qemu-img check -q '%s' >/dev/null "
                                 "2>&1", file, file), 0);
  c = image_load (file, 4 * GIB);
  after = contents (c);
  assert_memory_equal (before, after, 8 * MIB);
  free (before);
  free (after);
  container_close (c);
}

/* All bytes of refcount blocks become what they may. */
static void
scramble (struct container *c, uint64_t *seed, unsigned one_in)
{
  const uint64_t table = read_be (c, F_REFTABLE_OFFSET, 8);
  const uint64_t entries =
    read_be (c, F_REFTABLE_CLUSTERS, 4) * cluster_size (c) / 8;

  for (uint64_t i = 0; i < entries; ++i) {
    const uint64_t block = read_be (c, table + 8 * i, 8);
    const uint64_t bytes = min_u64 (cluster_size (c), 4096);

    if (block == 0)
      continue;
    for (uint64_t j = 0; j < bytes; ++j)
      if (random_next (seed) % one_in == 0)
        write_be (c, block + j, 1, random_next (seed) % 4 == 0 ? 0
                  : random_next (seed));
  }
}

/* Clear COPIED flags, and set some that are to be clear; on compressed
 * clusters too, which QEMU finds but does not repair.
 */
static void
scramble_flags (struct container *c, uint64_t *seed, bool compressed_too)
{
  const unsigned step = read_be (c, F_INCOMPATIBLE, 8) & 16 ? 16 : 8;
  const uint64_t l1 = read_be (c, F_L1_OFFSET, 8);

  for (uint64_t i = 0; i < read_be (c, F_L1_ENTRIES, 4); ++i) {
    const uint64_t table = read_be (c, l1 + 8 * i, 8) & ENTRY_OFFSET_MASK;

    if (table == 0)
      continue;
    for (uint64_t at = 0; at < min_u64 (cluster_size (c), 4096); at += step) {
      const uint64_t entry = read_be (c, table + at, 8);

      if (entry != 0 && random_next (seed) % 4 == 0 &&
          (compressed_too || (entry & OFLAG_COMPRESSED) == 0))
        write_be (c, table + at, 8, entry ^ OFLAG_COPIED);
    }
    if (random_next (seed) % 2 == 0)
      write_be (c, l1 + 8 * i, 8, read_be (c, l1 + 8 * i, 8) ^ OFLAG_COPIED);
  }
}

static void
test_repair (void **state)
{
  uint64_t seed = 1;

  (void) state;
  for (unsigned i = 0; i < NR_OPTIONS; ++i) {
    struct container *base;

    if (strstr (all_options[i], "compat") != NULL)
      continue;
    base = make_image (all_options[i], more_for (all_options[i]));
    for (unsigned round = 0; round < 3; ++round) {
      struct container *c = base;

      mark_dirty (c);
      scramble (c, &seed, 1 << 4 * round);
      scramble_flags (c, &seed, round != i % 3);
      if (round == i % 3)
        check_repair_by_qemu (c);
      check_repair (c);
    }
    container_close (base);
  }
}

/* Refcount blocks that are missing: some, or all. */
static void
drop_blocks (struct container *c, uint64_t *seed, unsigned one_in)
{
  const uint64_t table = read_be (c, F_REFTABLE_OFFSET, 8);
  const uint64_t entries =
    read_be (c, F_REFTABLE_CLUSTERS, 4) * cluster_size (c) / 8;

  for (uint64_t i = 0; i < entries; ++i)
    if (random_next (seed) % one_in == 0)
      write_be (c, table + 8 * i, 8, 0);
}

static void
test_missing_blocks (void **state)
{
  uint64_t seed = 2;

  (void) state;
  for (unsigned i = 0; i < NR_OPTIONS; ++i)
    for (unsigned one_in = 1; one_in < how_often (4, 4, 2); ++one_in) {
      struct container *c;

      if (strstr (all_options[i], "compat") != NULL)
        continue;
      c = make_image (all_options[i], more_for (all_options[i]));
      mark_dirty (c);
      drop_blocks (c, &seed, one_in);
      scramble (c, &seed, 8);
      check_repair (c);
      container_close (c);
    }
}

/* A refcount table that is too small for its file. */
static void
test_small_table (void **state)
{
  struct container *c =
    make_image ("-o cluster_size=512,refcount_bits=64", BITMAPS " && "
                "qemu-io -t unsafe -f qcow2 -c 'write -q 4M 2M' $f");
  uint64_t clusters = read_be (c, F_REFTABLE_CLUSTERS, 4);

  (void) state;
  /* A cluster of it counts 4096 clusters, and the image has more. */
  assert_true (clusters > 1);
  assert_true (nr_clusters (c) > 4096);
  mark_dirty (c);
  write_be (c, F_REFTABLE_CLUSTERS, 4, 1);
  check_repair (c);
  assert_true (read_be (c, F_REFTABLE_CLUSTERS, 4) > 1);

  mark_dirty (c);
  write_be (c, F_REFTABLE_CLUSTERS, 4, 1);
  for (unsigned i = 0; i < 64; ++i)
    write_be (c, read_be (c, F_REFTABLE_OFFSET, 8) + 8 * i, 8, 0);
  check_repair (c);
  container_close (c);
}

static int
no_change (void *opaque, const char *operation, uint64_t offset,
           uint64_t count)
{
  (void) opaque;
  (void) count;
  fail_msg ("%s at %#" PRIx64, operation, offset);
  return EIO;
}

static const struct container_memory_hook no_changes = { .before = no_change };

/* What is more than wrong refcounts is refused, by a check too. */
static void
check_refused (struct container *c, int err)
{
  const struct qcow2_options check = {
    .check_only = true, .cache_size = 1,
  };

  mark_dirty (c);
  container_memory_set_hook (c, &no_changes);
  assert_null (try_open (c));
  assert_int_equal (errno, err);
  assert_non_null (strstr (last_error, "dirty"));
  assert_non_null (strstr (last_error, "qemu-img check -r all"));
  assert_null (qcow2_open (c, &check));
  assert_int_equal (errno, err);
  container_close (c);
}

static void
test_refused (void **state)
{
  struct container *c;

  (void) state;
  for (unsigned i = 0; i < NR_INCONSISTENCIES; ++i) {
    c = make_image ("", BITMAPS);
    inconsistencies[i] (c);
    check_refused (c, EIO);
  }
  /* Too large: it costs nothing to see that. */
  c = image_create ("-o cluster_size=512", "8M", 64 * GIB);
  assert_int_equal (container_reserve (c, 33 * GIB), 0);
  check_refused (c, EFBIG);
}

/* A check of a dirty image that can be repaired writes nothing, nor does
 * opening it for reading.
 */
static void
test_check_only (void **state)
{
  const struct qcow2_options check = { .check_only = true, .cache_size = 1 };
  struct container *c = make_image ("", BITMAPS);
  struct qcow2 *q;

  (void) state;
  mark_dirty (c);
  leak (c);
  container_memory_set_hook (c, &no_changes);
  q = qcow2_open (c, &check);
  assert_non_null (q);
  qcow2_close (q);
  free (contents (c));
  assert_true (is_marked_dirty (c));
  container_memory_set_hook (c, NULL);
  check_repair (c);
  container_close (c);
}

/* Where there may be more than we know, refcounts are raised only. */
static void
test_repair_unknown (void **state)
{
  (void) state;
  for (unsigned i = 0; i < NR_UNKNOWNS; ++i) {
    struct container *c = make_image ("", BITMAPS);
    const uint64_t end = nr_clusters (c);
    const uint64_t table = l2_table (c) >> 16;

    mark_dirty (c);
    leak (c);
    set_refcount (c, table, 0);
    unknowns[i] (c);
    qcow2_close (open_image (c));
    assert_false (is_marked_dirty (c));
    assert_int_equal (get_refcount (c, table), 1);
    assert_int_equal (get_refcount (c, end), 1);
    assert_int_equal (get_refcount (c, end + 2), 200);
    assert_int_equal (read_be (c, F_AUTOCLEAR, 8) & ~UINT64_C (1), 0);
    /* QEMU does not open an image with damaged bitmaps. */
    if (unknowns[i] != damage_directory && unknowns[i] != damage_bitmap_table)
      image_check (c, false);
    container_close (c);
  }
}

/* An image whose writes fail stays marked, and is repaired another time. */
struct failing {
  unsigned calls, fail_at;
};

static int
fail_once (void *opaque, const char *operation, uint64_t offset,
           uint64_t count)
{
  struct failing *f = opaque;

  (void) operation;
  (void) offset;
  (void) count;
  return f->calls++ == f->fail_at ? EIO : 0;
}

static void
test_repair_fails (void **state)
{
  uint64_t seed = 3;
  bool failed = true;

  (void) state;
  for (unsigned at = 0; failed; ++at) {
    struct container *c = make_image ("-o cluster_size=2k", BITMAPS);
    struct failing f = { .fail_at = at };
    const struct container_memory_hook hook = { fail_once, &f };
    struct qcow2 *q;

    mark_dirty (c);
    drop_blocks (c, &seed, 2);
    scramble (c, &seed, 8);
    scramble_flags (c, &seed, true);
    container_memory_set_hook (c, &hook);
    q = try_open (c);
    failed = f.calls > at;
    container_memory_set_hook (c, NULL);
    /* A punch that fails is no harm. */
    if (q == NULL) {
      assert_true (failed);
      mark_dirty (c);
      check_repair (c);
    }
    else {
      qcow2_close (q);
      image_check (c, true);
    }
    container_close (c);
    if (at > 12)
      at += 7;
  }
}

/* ------------------------------------------------------------------ */
/* Crashes in the middle of a repair. */

static struct crash_image
flat_image (struct container *c, uint64_t spare)
{
  struct crash_image image =
    crash_image_new (container_size (c) + spare * cluster_size (c));

  image.size = container_size (c);
  assert_int_equal (container_pread (c, image.bytes, image.size, 0), 0);
  return image;
}

static void
open_and_close (struct crash_log *log)
{
  struct container *c = crash_container_open (log);
  struct qcow2 *q = open_image (c);

  qcow2_close (q);
  container_close (c);
}

/* A state after a crash: the next open makes it sound. */
static void
check_crashed (const struct crash_image *state, const uint8_t *disk,
               uint64_t *seed)
{
  struct crash_log *log = crash_log_new (state, random_next (seed));
  struct checked k;
  uint8_t *after;

  open_and_close (log);
  if (!check_image (&k, crash_log_live (log)))
    fail_msg ("%s", k.error);
  assert_int_equal (k.nr_leaked, 0);
  checked_free (&k);
  struct container *c = crash_container_open (log);
  after = contents (c);
  assert_memory_equal (disk, after, 2 * MIB);
  free (after);
  container_close (c);
  crash_log_free (log);
}

static void
crash_everywhere (struct container *c, uint64_t *seed)
{
  struct crash_image base = flat_image (c, 1000);
  struct crash_image crashed = crash_image_new (base.room);
  struct crash_log *log = crash_log_new (&base, random_next (seed));
  uint8_t *disk = contents (c);
  struct crash_replay *replay;

  open_and_close (log);
  replay = crash_replay_new (log);
  for (size_t point = 0; point <= crash_log_length (log);
       point += how_often (1, 3, 16)) {
    crash_replay_advance (replay, point);
    crash_replay_kill (replay, &crashed);
    check_crashed (&crashed, disk, seed);
    for (unsigned i = 0; i < 4; ++i) {
      crash_replay_state (replay, &crashed, seed);
      check_crashed (&crashed, disk, seed);
    }
  }
  crash_replay_free (replay);
  crash_log_free (log);
  crash_image_free (&base);
  crash_image_free (&crashed);
  free (disk);
}

static void
test_crashes (void **state)
{
  static const char *const options[] = {
    "-o cluster_size=512,refcount_bits=64", "-o cluster_size=1k", "",
  };
  uint64_t seed = 4;

  (void) state;
  for (unsigned i = 0; i < 6; ++i) {
    struct container *c = image_create (options[i % 3], "2M", GIB);
    static const uint8_t data[200000] = { 1, 2, 3 };
    struct qcow2 *q = open_image (c);

    for (unsigned j = 0; j < 5; ++j)
      assert_int_equal (qcow2_write (q, data + j, sizeof data - 5,
                                     random_next (&seed) % MIB), 0);
    assert_int_equal (qcow2_stop (q), 0);
    qcow2_close (q);
    mark_dirty (c);
    if (i < 3)
      drop_blocks (c, &seed, 2);
    scramble (c, &seed, i % 2 == 0 ? 3 : 40);
    scramble_flags (c, &seed, true);
    crash_everywhere (c, &seed);
    container_close (c);
  }
}

int
main (void)
{
  const struct CMUnitTest tests[] = {
    cmocka_unit_test (test_counts),
    cmocka_unit_test (test_limits),
    cmocka_unit_test (test_leaks),
    cmocka_unit_test (test_left),
    cmocka_unit_test (test_too_low),
    cmocka_unit_test (test_not_copied),
    cmocka_unit_test (test_repair),
    cmocka_unit_test (test_missing_blocks),
    cmocka_unit_test (test_small_table),
    cmocka_unit_test (test_refused),
    cmocka_unit_test (test_check_only),
    cmocka_unit_test (test_repair_unknown),
    cmocka_unit_test (test_repair_fails),
    cmocka_unit_test (test_crashes),
  };

  if (run_command ("qemu-img --version >/dev/null 2>&1 && "
                   "qemu-io --version >/dev/null 2>&1") != 0)
    return 77;
  report_sink = keep_report;
  return cmocka_run_group_tests (tests, NULL, NULL);
}
