/* nbdkit-dirty-bitmap-filter
 * SPDX-License-Identifier: BSD-3-Clause
 * Copyright the nbdkit-dirty-bitmap-filter authors
 */

/* Images whose L2 entries lead into metadata, a refcount table that can
 * be replaced only in part, and flushes that need the space which only a
 * flush can free.
 */

#include <config.h>

#include <errno.h>
#include <limits.h>
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
#include "disk/disk.h"
#include "image.h"
#include "qcow2/qcow2.h"

#define MIB (UINT64_C (1) << 20)
#define GIB (UINT64_C (1) << 30)
#define CLUSTER 65536
#define COPIED (UINT64_C (1) << 63)
#define COMPRESSED (UINT64_C (1) << 62)
#define OFFSET_MASK UINT64_C (0x00fffffffffffe00)

static struct qcow2 *
open_image (struct container *c)
{
  const struct qcow2_options options = { .cache_size = 65536 };
  struct qcow2 *q = qcow2_open (c, &options);

  assert_non_null (q);
  return q;
}

static uint64_t
read_be64 (struct container *c, uint64_t offset)
{
  uint8_t be[8];

  assert_int_equal (container_pread (c, be, 8, offset), 0);
  return get_be64 (be);
}

static int
trim (struct qcow2 *q)
{
  return qcow2_trim (q, 4 * CLUSTER, 0);
}

static int
zero (struct qcow2 *q)
{
  return qcow2_zero (q, 4 * CLUSTER, 0, 0);
}

static int
zero_keep (struct qcow2 *q)
{
  return qcow2_zero (q, 4 * CLUSTER, 0, QCOW2_ZERO_KEEP);
}

static int
write_over (struct qcow2 *q)
{
  static const uint8_t data[4 * CLUSTER];

  return qcow2_write (q, data, sizeof data, 0);
}

/* A change of a cluster whose L2 entry is wrong: it is refused, nothing
 * of what the entry leads to is changed, and the image is marked.
 */
static void
check_refused (int (*change) (struct qcow2 *), uint64_t flags,
               uint64_t field, uint64_t distance)
{
  struct container *c = image_create ("", "64M", GIB);
  struct qcow2 *q = open_image (c);
  uint8_t data[512] = { 1 }, be[8];
  static uint8_t before[CLUSTER], after[CLUSTER];
  uint64_t l2_offset, victim, entry;

  assert_int_equal (qcow2_write (q, data, sizeof data, 2 * CLUSTER), 0);
  assert_int_equal (qcow2_stop (q), 0);
  qcow2_close (q);

  l2_offset = read_be64 (c, read_be64 (c, 40)) & OFFSET_MASK;
  victim = field == 0 ? l2_offset : read_be64 (c, field);
  entry = flags | (victim + distance);
  put_be64 (be, entry);
  assert_int_equal (container_pwrite (c, be, 8, l2_offset + 16), 0);
  assert_int_equal (container_pread (c, before, CLUSTER, victim), 0);

  q = open_image (c);
  assert_int_equal (change (q), -1);
  assert_int_equal (errno, EIO);
  qcow2_flush (q);
  qcow2_stop (q);
  qcow2_close (q);
  assert_int_equal (container_pread (c, after, CLUSTER, victim), 0);
  assert_memory_equal (before, after, CLUSTER);
  assert_int_equal (read_be64 (c, 72) & 2, 2);
  container_close (c);
}

static void
test_entries_into_metadata (void **state)
{
  int (*const changes[]) (struct qcow2 *) = {
    trim, zero, zero_keep, write_over,
  };
  const uint64_t fields[] = { 40, 48, 0 }; /* L1, refcount table, L2 */

  (void) state;
  for (unsigned i = 0; i < 4; ++i)
    for (unsigned j = 0; j < 3; ++j) {
      check_refused (changes[i], COPIED, fields[j], 0);
      check_refused (changes[i], 0, fields[j], 0);
      check_refused (changes[i], COMPRESSED, fields[j], 512);
    }
}

static void
test_entries_not_aligned (void **state)
{
  (void) state;
  check_refused (trim, COPIED, 48, 512);
  check_refused (zero, COPIED, 48, 512);
  check_refused (zero_keep, COPIED, 48, 512);
}

/* Fail the first barrier after a change of the refcount table's offset in
 * the header; then, after so many more operations, everything.
 */
struct header_fault {
  bool armed, failed;
  unsigned nr_left;
};

static int
fail_header (void *opaque, const char *operation, uint64_t offset,
             uint64_t count)
{
  struct header_fault *f = opaque;

  (void) count;
  if (f->failed)
    return f->nr_left == 0 ? EIO : (f->nr_left--, 0);
  if (strcmp (operation, "pwrite") == 0 && offset == 48)
    f->armed = true;
  f->failed = strcmp (operation, "flush") == 0 && f->armed;
  return f->failed ? EIO : 0;
}

/* Write pieces until something fails; returns how many were written. */
#define NR_PIECES 64
static unsigned
fill (struct qcow2 *q, unsigned from)
{
  static uint8_t data[CLUSTER];

  for (unsigned i = from; i < NR_PIECES; ++i) {
    memset (data, i + 1, sizeof data);
    if (qcow2_write (q, data, sizeof data, i * sizeof data) == -1)
      return i;
  }
  return NR_PIECES;
}

/* After the failure single clusters are allocated, for which there may be
 * room where the table was, and the next try is made and cut off.
 */
static void
check_table_fault (unsigned nr_left)
{
  struct container *c =
    image_create ("-o cluster_size=512,refcount_bits=64", "4M", GIB);
  struct qcow2 *q = open_image (c);
  struct header_fault fault = { .nr_left = nr_left };
  const struct container_memory_hook hook = { fail_header, &fault };
  const uint8_t data[512] = { 0xff };
  unsigned done;

  container_memory_set_hook (c, &hook);
  done = fill (q, 0);
  assert_true (done < NR_PIECES);
  assert_true (fault.failed);
  for (unsigned i = 0; i < 8; ++i)
    qcow2_write (q, data, sizeof data,
                 NR_PIECES * (uint64_t) CLUSTER - (i + 1) * sizeof data);
  if (nr_left == UINT_MAX)
    assert_int_equal (fill (q, done), NR_PIECES);
  else
    assert_true (fill (q, done) < NR_PIECES);
  qcow2_close (q);
  container_memory_set_hook (c, NULL);
  image_check (c, 0);

  q = open_image (c);
  assert_int_equal (fill (q, 0), NR_PIECES);
  assert_int_equal (qcow2_stop (q), 0);
  qcow2_close (q);
  image_check (c, 0);
  container_close (c);
}

static void
test_refcount_table_faults (void **state)
{
  (void) state;
  for (unsigned nr_left = 0; nr_left < 16; ++nr_left)
    check_table_fault (nr_left);
  check_table_fault (UINT_MAX);
}

/* Fill the image.  The first write has reserved the bitmap's cluster, so a
 * flush, the next one or the stop find it.
 */
static void
check_space_for_bitmap (int (*finish) (struct disk *))
{
  static const char *const names[] = { "monday" };
  const struct disk_options options = {
    .cache_size = 65536, .require = names, .nr_require = 1,
  };
  struct disk *d = disk_open (image_create ("", "64M", 2 * MIB), &options);
  static uint8_t data[CLUSTER];
  uint64_t at = 0;

  assert_non_null (d);
  memset (data, 1, sizeof data);
  while (disk_write (d, data, sizeof data, at, false) == 0)
    at += CLUSTER;
  assert_int_equal (errno, ENOSPC);
  assert_true (at > 0);
  assert_int_equal (disk_sync (d), 0);
  assert_int_equal (disk_trim (d, at, 0, false), 0);
  assert_int_equal (finish (d), 0);
  disk_close (d);
}

static void
test_space_for_bitmap (void **state)
{
  (void) state;
  check_space_for_bitmap (disk_sync);
  check_space_for_bitmap (disk_stop);
}

/* Make the refcounts of an image wrong: of all clusters from the one at
 * offset on it says that they are free.
 */
static void
forget_refcounts (struct container *c, uint64_t offset)
{
  static const uint8_t zeroes[CLUSTER];
  const uint64_t block = read_be64 (c, read_be64 (c, 48)) & OFFSET_MASK;
  const uint64_t i = offset / CLUSTER;

  assert_int_equal (container_pwrite (c, zeroes, CLUSTER - 2 * i,
                                      block + 2 * i), 0);
}

/* A clean stop cuts nothing off that is in use, or may be, whatever the
 * refcounts say: neither metadata, in an image that is found corrupt, nor
 * guest data, in one where nobody noticed.
 */
static void
test_stop_with_wrong_refcounts (void **state)
{
  static uint8_t data[CLUSTER], read[CLUSTER];
  /* With a feature that we do not know, references cannot be counted,
   * and what is known to be in use is not told to be.
   */
  const uint64_t unknown_compatible = htobe64 (2);
  struct container *c = image_create ("", "64M", GIB);
  struct qcow2 *q;
  uint64_t size, last, l2_offset;

  (void) state;
  assert_int_equal (container_pwrite (c, &unknown_compatible, 8, 80), 0);
  q = open_image (c);
  memset (data, 7, sizeof data);
  assert_int_equal (qcow2_write (q, data, CLUSTER, 0), 0);
  assert_int_equal (qcow2_write (q, data, CLUSTER, CLUSTER), 0);
  assert_int_equal (qcow2_stop (q), 0);
  qcow2_close (q);
  size = container_size (c);
  l2_offset = read_be64 (c, read_be64 (c, 40)) & OFFSET_MASK;
  last = read_be64 (c, l2_offset + 8) & OFFSET_MASK;
  assert_int_equal (last, size - CLUSTER);

  forget_refcounts (c, last);
  q = open_image (c);
  assert_int_equal (qcow2_trim (q, CLUSTER, 0), 0);
  assert_int_equal (qcow2_stop (q), 0);
  assert_int_equal (container_size (c), size);
  assert_int_equal (qcow2_read (q, read, CLUSTER, CLUSTER), 0);
  assert_memory_equal (read, data, CLUSTER);
  qcow2_close (q);

  forget_refcounts (c, 0);
  q = open_image (c);
  /* The first free cluster would be the header. */
  assert_int_equal (qcow2_write (q, data, CLUSTER, 9 * CLUSTER), -1);
  assert_int_equal (errno, EIO);
  assert_int_equal (qcow2_stop (q), 0);
  qcow2_close (q);
  assert_true (container_size (c) >= size);
  q = qcow2_open (c, &(struct qcow2_options) {
      .readonly = true, .cache_size = 65536 });
  assert_non_null (q);
  assert_int_equal (qcow2_read (q, read, CLUSTER, CLUSTER), 0);
  assert_memory_equal (read, data, CLUSTER);
  qcow2_close (q);
  container_close (c);
}

int
main (void)
{
  const struct CMUnitTest tests[] = {
    cmocka_unit_test (test_entries_into_metadata),
    cmocka_unit_test (test_entries_not_aligned),
    cmocka_unit_test (test_refcount_table_faults),
    cmocka_unit_test (test_stop_with_wrong_refcounts),
    cmocka_unit_test (test_space_for_bitmap),
  };

  if (run_command ("qemu-img --version >/dev/null 2>&1") != 0)
    return 77;
  report_sink = report_if_verbose;
  return cmocka_run_group_tests (tests, NULL, NULL);
}
