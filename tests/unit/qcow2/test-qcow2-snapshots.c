/* nbdkit-dirty-bitmap-filter
 * SPDX-License-Identifier: BSD-3-Clause
 * Copyright the nbdkit-dirty-bitmap-filter authors
 */

/* Images that have internal snapshots: the disk can be written, and the
 * snapshots stay what they were.
 *
 * SEED is the seed of the random requests.
 */

#include <config.h>

#include <errno.h>
#include <inttypes.h>
#include <pthread.h>
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
#include "image.h"
#include "qcow2/qcow2.h"

#define MIB (UINT64_C (1) << 20)
#define GIB (UINT64_C (1) << 30)
#define COPIED (UINT64_C (1) << 63)
#define OFFSET_MASK UINT64_C (0x00fffffffffffe00)

#define MAX_SNAPSHOTS 8
#define NR_THREADS 2

static uint64_t first_seed = 1;
static char last_report[512];

static void
keep_report (enum report_level level, const char *fmt, va_list args)
{
  if (level != REPORT_DEBUG)
    vsnprintf (last_report, sizeof last_report, fmt, args);
}

static struct qcow2 *
try_open (struct container *c, bool readonly, const char *snapshot)
{
  const struct qcow2_options options = {
    .readonly = readonly, .cache_size = 65536, .snapshot = snapshot,
  };

  return qcow2_open (c, &options);
}

static struct qcow2 *
open_image (struct container *c, bool readonly, const char *snapshot)
{
  struct qcow2 *q = try_open (c, readonly, snapshot);

  if (q == NULL)
    fail_msg ("%s", last_report);
  return q;
}

static void
stop_image (struct qcow2 *q)
{
  assert_int_equal (qcow2_stop (q), 0);
  qcow2_close (q);
}

static uint8_t *
read_all (struct qcow2 *q)
{
  uint8_t *buf = malloc (qcow2_size (q));

  assert_non_null (buf);
  assert_int_equal (qcow2_read (q, buf, qcow2_size (q), 0), 0);
  return buf;
}

static uint8_t *
read_snapshot (struct container *c, const char *name, uint64_t *size)
{
  struct qcow2 *q = open_image (c, false, name);
  uint8_t *buf = read_all (q);

  assert_true (qcow2_is_readonly (q));
  *size = qcow2_size (q);
  qcow2_close (q);
  return buf;
}

/* Compare a file as QEMU reads it: the disk, or the snapshot that is
 * named by the options of qemu-img convert.
 */
static void
compare_by_qemu (const char *file, const char *options, const uint8_t *bytes,
                 uint64_t size)
{
  char raw[512];
  uint8_t *buf = malloc (size);
  FILE *fp;

  assert_non_null (buf);
  snprintf (raw, sizeof raw, "%s", temp_file ("compare.raw"));
  assert_int_equal (run_command ("qemu-img convert -f qcow2 %s -O raw '%s' "
                                 "'%s'", options, file, raw), 0);
  fp = fopen (raw, "re");
  assert_non_null (fp);
  assert_int_equal (fread (buf, 1, size, fp), size);
  fclose (fp);
  assert_memory_equal (buf, bytes, size);
  free (buf);
}

/* An image, its disk and its snapshots s0, s1... */
struct subject {
  struct container *c;
  char file[512];
  uint64_t size;
  bool subclusters;
  uint8_t *disk;
  uint8_t *snapshot[MAX_SNAPSHOTS]; /* NULL if deleted */
  unsigned nr_snapshots;
};

static void
load_subject (struct subject *s)
{
  s->c = image_load (s->file, 4 * GIB);
}

/* Is all in memory what it should be?  And for QEMU, too? */
static void
check_subject (struct subject *s)
{
  char option[64], name[16];
  struct qcow2 *q = open_image (s->c, true, NULL);
  uint8_t *buf = read_all (q);

  assert_memory_equal (buf, s->disk, s->size);
  free (buf);
  qcow2_close (q);
  image_check (s->c, 1);
  image_save (s->c, s->file);
  compare_by_qemu (s->file, "", s->disk, s->size);
  for (unsigned i = 0; i < s->nr_snapshots; ++i) {
    uint64_t size;

    if (s->snapshot[i] == NULL)
      continue;
    snprintf (name, sizeof name, "s%u", i);
    snprintf (option, sizeof option, "-l snapshot.name=%s", name);
    buf = read_snapshot (s->c, name, &size);
    assert_int_equal (size, s->size);
    assert_memory_equal (buf, s->snapshot[i], size);
    compare_by_qemu (s->file, option, buf, size);
    free (buf);
  }
}

/* A snapshot by QEMU, of the file as it is. */
static void
take_snapshot (struct subject *s)
{
  assert_int_equal (run_command ("qemu-img snapshot -c s%u '%s'",
                                 s->nr_snapshots, s->file), 0);
  s->snapshot[s->nr_snapshots] = malloc (s->size);
  assert_non_null (s->snapshot[s->nr_snapshots]);
  memcpy (s->snapshot[s->nr_snapshots++], s->disk, s->size);
}

static void
delete_snapshot (struct subject *s, unsigned i)
{
  assert_int_equal (run_command ("qemu-img snapshot -d s%u '%s'", i, s->file),
                    0);
  free (s->snapshot[i]);
  s->snapshot[i] = NULL;
}

/* QEMU writes to the file, too. */
static void
qemu_write (struct subject *s, uint8_t pattern, uint64_t offset,
            uint64_t count)
{
  assert_int_equal (run_command ("qemu-io -f qcow2 -c 'write -q -P %u %" PRIu64
                                 " %" PRIu64 "' '%s' >/dev/null", pattern,
                                 offset, count, s->file), 0);
  memset (s->disk + offset, pattern, count);
}

static void
qemu_zero (struct subject *s, const char *command, uint64_t offset,
           uint64_t count)
{
  assert_int_equal (run_command ("qemu-io -d unmap -f qcow2 -c '%s %" PRIu64
                                 " %" PRIu64 "' '%s' >/dev/null", command,
                                 offset, count, s->file), 0);
  memset (s->disk + offset, 0, count);
}

/* Requests of a thread, in its part of the disk, whose borders lie inside
 * of clusters.
 */
struct worker {
  struct qcow2 *q;
  struct subject *s;
  uint64_t low, high, max, seed;
  unsigned nr_requests;
};

/* Whole clusters become zero; a whole subcluster may, but stays what it
 * is in a compressed cluster.
 */
static int
trim (struct worker *w, uint64_t offset, uint64_t count)
{
  const uint64_t cs = qcow2_cluster_size (w->q);
  const uint64_t first = round_up (offset, cs);
  const uint64_t end = offset + count == w->s->size ? w->s->size
    : round_down (offset + count, cs);
  uint8_t *disk = w->s->disk, *is;

  if (first < end)
    memset (disk + first, 0, end - first);
  if (qcow2_trim (w->q, count, offset) == -1)
    return -1;
  if (!w->s->subclusters)
    return 0;
  is = malloc (count);
  if (is == NULL || qcow2_read (w->q, is, count, offset) == -1) {
    free (is);
    return -1;
  }
  for (uint64_t i = 0; i < count; ++i)
    if (is[i] == 0)
      disk[offset + i] = 0;
  free (is);
  return 0;
}

static int
random_change (struct worker *w, uint64_t r, uint64_t offset, uint64_t count)
{
  uint8_t *disk = w->s->disk;

  switch (r % 8) {
  case 0: case 1: case 2: case 3:
    memset (disk + offset, 1 + (r >> 16) % 255, count);
    return qcow2_write (w->q, disk + offset, count, offset);
  case 4: case 5:
    memset (disk + offset, 0, count);
    return qcow2_zero (w->q, count, offset, r >> 20 & 1 ? QCOW2_ZERO_KEEP : 0);
  case 6:
    return trim (w, offset, count);
  default:
    return qcow2_flush (w->q);
  }
}

static void *
work (void *opaque)
{
  struct worker *w = opaque;
  uint8_t *buf = malloc (w->max + 65536);

  for (unsigned i = 0; buf != NULL && i < w->nr_requests; ++i) {
    const uint64_t r = random_next (&w->seed);
    const uint64_t align = (r >> 8) % 3 == 0 ? 1
      : (r >> 8) % 3 == 1 ? 512 : qcow2_cluster_size (w->q);
    uint64_t offset = w->low + random_next (&w->seed) % (w->high - w->low);
    uint64_t count = 1 + random_next (&w->seed) % w->max;

    offset = max_u64 (w->low, round_down (offset, align));
    count = min_u64 (round_up (count, align), w->high - offset);
    if (random_change (w, r, offset, count) == -1 ||
        qcow2_read (w->q, buf, count, offset) == -1 ||
        memcmp (buf, w->s->disk + offset, count) != 0) {
      free (buf);
      return w;
    }
  }
  free (buf);
  return NULL;
}

/* Random requests by nr threads, and a clean stop. */
static void
write_subject (struct subject *s, unsigned nr_threads, unsigned nr_requests,
               uint64_t max, uint64_t *seed)
{
  struct worker workers[NR_THREADS];
  pthread_t threads[NR_THREADS];
  struct qcow2 *q = open_image (s->c, false, NULL);

  for (unsigned i = 0; i < nr_threads; ++i) {
    workers[i] = (struct worker) {
      .q = q, .s = s, .max = max, .nr_requests = nr_requests / nr_threads,
      .low = s->size * i / nr_threads + (i == 0 ? 0 : 100),
      .high = s->size * (i + 1) / nr_threads
        + (i == nr_threads - 1 ? 0 : 100),
      .seed = random_next (seed),
    };
    assert_int_equal (pthread_create (&threads[i], NULL, work, &workers[i]),
                      0);
  }
  for (unsigned i = 0; i < nr_threads; ++i) {
    void *wrong;

    assert_int_equal (pthread_join (threads[i], &wrong), 0);
    if (wrong != NULL)
      fail_msg ("%s", last_report);
  }
  stop_image (q);
}

/* Data, zero clusters, compressed ones, some of them in one host cluster,
 * and three snapshots of which one is deleted.  The disk has all L2 tables
 * in common with the last.
 */
static void
make_subject (struct subject *s, const char *options, uint64_t size,
              bool zeroes)
{
  char raw[512];

  memset (s, 0, sizeof *s);
  s->size = size;
  s->subclusters = strstr (options, "extended_l2") != NULL;
  s->disk = calloc (1, size);
  assert_non_null (s->disk);
  snprintf (s->file, sizeof s->file, "%s", temp_file ("subject.qcow2"));
  snprintf (raw, sizeof raw, "%s", temp_file ("subject.raw"));
  assert_int_equal (run_command ("qemu-img create -q -f raw '%s' %" PRIu64
                                 " && qemu-io -f raw -c 'write -q -P 3 0 %"
                                 PRIu64 "' '%s' && qemu-img convert -c -O qcow2 "
                                 "-o %s '%s' '%s'", raw, size, size / 4, raw,
                                 options, raw, s->file), 0);
  memset (s->disk, 3, size / 4);
  qemu_write (s, 4, size / 3, size / 5 + 700);
  take_snapshot (s);
  qemu_write (s, 5, size / 8 + 300, size / 3);
  if (zeroes) {
    qemu_zero (s, "write -q -z", size / 2, size / 16);
    qemu_zero (s, "write -q -z -u", size / 4, size / 16);
  }
  take_snapshot (s);
  qemu_write (s, 6, size / 5, 100);
  take_snapshot (s);
  delete_snapshot (s, 1);
  load_subject (s);
}

static void
free_subject (struct subject *s)
{
  for (unsigned i = 0; i < s->nr_snapshots; ++i)
    free (s->snapshot[i]);
  free (s->disk);
  container_close (s->c);
}

static void
random_run (const char *options, uint64_t size, bool zeroes,
            unsigned nr_requests, uint64_t max)
{
  uint64_t seed = first_seed++;
  struct subject s;

  print_message ("%s\n", options);
  make_subject (&s, options, size, zeroes);
  check_subject (&s);
  write_subject (&s, 1, nr_requests, max, &seed);
  check_subject (&s);

  /* QEMU's turn. */
  container_close (s.c);
  qemu_write (&s, 7, size / 7, size / 9);
  take_snapshot (&s);
  qemu_write (&s, 8, size / 6 + 1, 5000);
  delete_snapshot (&s, 0);
  load_subject (&s);

  write_subject (&s, NR_THREADS, nr_requests, max, &seed);
  check_subject (&s);

  /* Nothing is left of snapshots but what the disk has. */
  container_close (s.c);
  delete_snapshot (&s, 2);
  delete_snapshot (&s, 3);
  load_subject (&s);
  write_subject (&s, NR_THREADS, nr_requests / 4, max, &seed);
  check_subject (&s);
  free_subject (&s);
}

static void
test_random (void **state)
{
  (void) state;
  random_run ("cluster_size=512", MIB, true, 600, 20000);
  random_run ("cluster_size=4k", 9 * MIB, true, 600, 100000);
  random_run ("cluster_size=4k,refcount_bits=32", 9 * MIB, true, 300, 100000);
  random_run ("cluster_size=4k,compat=0.10", 5 * MIB, false, 300, 100000);
  random_run ("cluster_size=64k", 16 * MIB + 512, true, 600, 1000000);
  /* Several slices of one L2 table. */
  random_run ("cluster_size=16k,refcount_bits=64", 20 * MIB, true, 200,
              100000);
  random_run ("cluster_size=16k,extended_l2=on", 18 * MIB, true, 300, 60000);
}

/* A small image: one L2 table, 12 KiB of data, and perhaps a snapshot of
 * the ID 1.
 */
static struct container *
small_image (const char *snapshot)
{
  char file[512];

  snprintf (file, sizeof file, "%s", temp_file ("small.qcow2"));
  assert_int_equal (run_command ("qemu-img create -q -f qcow2 -o "
                                 "cluster_size=4k '%s' 1M && qemu-io -f qcow2 "
                                 "-c 'write -q -P 1 0 12k' '%s' >/dev/null && "
                                 "test -z '%s' || qemu-img snapshot -c '%s' "
                                 "'%s'", file, file, snapshot, snapshot, file),
                    0);
  return image_load (file, 4 * GIB);
}

static uint64_t
get_bytes (struct container *c, uint64_t offset, unsigned bytes)
{
  uint8_t buf[8] = { 0 };

  assert_int_equal (container_pread (c, buf + 8 - bytes, bytes, offset), 0);
  return get_be64 (buf);
}

static void
put_bytes (struct container *c, uint64_t offset, unsigned bytes,
           uint64_t value)
{
  uint8_t buf[8];

  put_be64 (buf, value);
  assert_int_equal (container_pwrite (c, buf + 8 - bytes, bytes, offset), 0);
}

/* Where the 16 bit refcount of the cluster at an offset is. */
static uint64_t
refcount_at (struct container *c, uint64_t offset)
{
  return get_bytes (c, get_bytes (c, 48, 8), 8) + offset / 4096 * 2;
}

/* Refcounts of 2 bits can be 3 at most. */
static void
test_narrow_refcounts (void **state)
{
  uint64_t seed = first_seed++;
  struct subject s = { .size = 2 * MIB };

  (void) state;
  s.disk = calloc (1, s.size);
  assert_non_null (s.disk);
  snprintf (s.file, sizeof s.file, "%s", temp_file ("narrow.qcow2"));
  assert_int_equal (run_command ("qemu-img create -q -f qcow2 -o "
                                 "cluster_size=4k,refcount_bits=2 '%s' 2M",
                                 s.file), 0);
  qemu_write (&s, 1, 0, MIB);
  take_snapshot (&s);
  take_snapshot (&s);
  load_subject (&s);
  write_subject (&s, 1, 100, 50000, &seed);
  check_subject (&s);
  free_subject (&s);
}

/* The flag of the L1 entry and the refcount of the table contradict each
 * other.  Whichever is wrong, nobody's data are harmed.
 */
static void
contradict (const char *snapshot, bool copied, uint64_t refcount,
            bool same_table, uint64_t refcount_after)
{
  struct container *c = small_image (snapshot);
  const uint64_t l1 = get_bytes (c, 40, 8);
  const uint64_t table = get_bytes (c, l1, 8) & OFFSET_MASK;
  uint8_t before[4096], after[4096], data[4096];
  struct qcow2 *q;

  put_bytes (c, l1, 8, table | (copied ? COPIED : 0));
  put_bytes (c, refcount_at (c, table), 2, refcount);
  assert_int_equal (container_pread (c, before, sizeof before, table), 0);
  q = open_image (c, false, NULL);
  memset (data, 9, sizeof data);
  assert_int_equal (qcow2_write (q, data, sizeof data, 8192), 0);
  assert_int_equal (qcow2_write (q, data, sizeof data, 65536), 0);
  stop_image (q);

  assert_int_equal (container_pread (c, after, sizeof after, table), 0);
  if (same_table)
    assert_int_equal (get_bytes (c, l1, 8), table | COPIED);
  else {
    assert_int_not_equal (get_bytes (c, l1, 8) & OFFSET_MASK, table);
    assert_true (get_bytes (c, l1, 8) & COPIED);
    assert_memory_equal (before, after, sizeof before);
  }
  assert_int_equal (get_bytes (c, refcount_at (c, table), 2),
                    refcount_after);
  if (*snapshot != '\0') {
    uint64_t size;
    uint8_t *buf = read_snapshot (c, snapshot, &size);

    for (unsigned i = 0; i < 12288; ++i)
      assert_int_equal (buf[i], 1);
    free (buf);
  }
  container_close (c);
}

static void
test_contradictions (void **state)
{
  (void) state;
  contradict ("s", false, 2, false, 1);
  contradict ("s", true, 2, false, 1);
  contradict ("s", false, 1, false, 1);
  /* Once too often is a leak, which is reclaimed. */
  contradict ("s", true, 3, false, 1);
  contradict ("", true, 1, true, 1);
  contradict ("", false, 1, true, 1);
  contradict ("", false, 2, false, 1);
}

/* A table in common that counts as free is not handed out.  (With a
 * compatible feature that is unknown refcounts are not seen to be too
 * low.)
 */
static void
test_table_not_counted (void **state)
{
  struct container *c = small_image ("s");
  const uint64_t l1 = get_bytes (c, 40, 8);
  const uint64_t table = get_bytes (c, l1, 8) & OFFSET_MASK;
  uint8_t before[4096], after[4096], data[4096] = { 0 };

  (void) state;
  put_bytes (c, refcount_at (c, table), 2, 0);
  put_bytes (c, 80, 8, 2);
  assert_int_equal (container_pread (c, before, sizeof before, table), 0);
  struct qcow2 *q = open_image (c, false, NULL);
  assert_int_equal (qcow2_write (q, data, sizeof data, 8192), -1);
  assert_int_equal (errno, EIO);
  qcow2_stop (q);
  qcow2_close (q);
  assert_int_equal (container_pread (c, after, sizeof after, table), 0);
  assert_memory_equal (before, after, sizeof before);
  container_close (c);
}

static unsigned nr_writes;

static int
count_writes (void *opaque, const char *operation, uint64_t offset,
              uint64_t count)
{
  (void) opaque;
  (void) offset;
  (void) count;
  nr_writes += strcmp (operation, "flush") != 0;
  return 0;
}

/* What changes nothing copies no L2 table. */
static void
test_nothing_to_do (void **state)
{
  const struct container_memory_hook hook = { .before = count_writes };
  struct container *c = small_image ("s");
  struct qcow2 *q = open_image (c, false, NULL);
  uint8_t data[4096];

  (void) state;
  container_memory_set_hook (c, &hook);
  nr_writes = 0;
  memset (data, 0, sizeof data);
  assert_int_equal (qcow2_trim (q, 65536, 65536), 0);
  assert_int_equal (qcow2_read (q, data, sizeof data, 0), 0);
  assert_int_equal (qcow2_flush (q), 0);
  assert_int_equal (nr_writes, 0);
  assert_int_equal (qcow2_trim (q, 4096, 0), 0);
  assert_int_equal (qcow2_flush (q), 0);
  assert_true (nr_writes > 0);
  container_memory_set_hook (c, NULL);
  stop_image (q);
  image_check (c, 1);
  container_close (c);
}

/* Of the small image: the snapshot table, the L1 table of the disk, and
 * fields of entry 0.
 */
enum {
  HEADER_NR = 60, HEADER_TABLE = 64,
  TABLE = 1 << 20,              /* to be added: offset in the table */
  L1 = 1 << 21,                 /* and in the snapshot's L1 table */
  COUNT_TABLE = 1 << 22,        /* the refcount of the table */
  COUNT_L1 = 1 << 23,           /* and of the snapshot's L1 table */
};

struct damage {
  const char *what;             /* in the message */
  uint64_t at;
  unsigned bytes;
  uint64_t value;
};

static uint64_t
place (struct container *c, uint64_t at)
{
  const uint64_t table = get_bytes (c, HEADER_TABLE, 8);

  switch (at & ~UINT64_C (0xfffff)) {
  case TABLE: return table + (at - TABLE);
  case L1: return get_bytes (c, table, 8) + (at - L1);
  case COUNT_TABLE: return refcount_at (c, table);
  case COUNT_L1: return refcount_at (c, get_bytes (c, table, 8));
  default: return at;
  }
}

static uint8_t *
copy_container (struct container *c)
{
  uint8_t *bytes = malloc (container_size (c));

  assert_non_null (bytes);
  assert_int_equal (container_pread (c, bytes, container_size (c), 0), 0);
  return bytes;
}

/* The image is not opened for writing, for the reason given, and the disk
 * can be read.  Nothing is written.
 */
static void
check_damaged (struct container *c, const char *what)
{
  uint8_t *before = copy_container (c), *after, data[12288];
  const uint64_t size = container_size (c);
  struct qcow2 *q;

  print_message ("%s\n", what);
  last_report[0] = '\0';
  q = try_open (c, false, NULL);
  assert_null (q);
  assert_int_equal (errno, EINVAL);
  if (strstr (last_report, what) == NULL ||
      strstr (last_report, "read-only (-r)") == NULL)
    fail_msg ("not '%s', but '%s'", what, last_report);

  q = open_image (c, true, NULL);
  assert_int_equal (qcow2_read (q, data, sizeof data, 0), 0);
  for (unsigned i = 0; i < sizeof data; ++i)
    assert_int_equal (data[i], 1);
  qcow2_close (q);
  assert_int_equal (container_size (c), size);
  after = copy_container (c);
  assert_memory_equal (before, after, size);
  free (before);
  free (after);
}

static void
test_damaged (void **state)
{
  static const struct damage damages[] = {
    { "maximum of 65536", HEADER_NR, 4, 65537 },
    { "maximum of 65536", HEADER_NR, 4, UINT32_MAX },
    { "beyond the end", HEADER_NR, 4, 65536 },
    { "offset of the snapshot table", HEADER_TABLE, 8, 0 },
    { "offset of the snapshot table", HEADER_TABLE, 8, 4097 },
    { "beyond the end", HEADER_TABLE, 8, UINT64_C (1) << 40 },
    { "beyond the end", HEADER_TABLE, 8, UINT64_MAX - 4095 },
    { "overlaps", HEADER_TABLE, 8, 4096 },
    { "beyond the end", TABLE + 12, 2, 65535 },
    { "beyond the end", TABLE + 14, 2, 65535 },
    { "extra data", TABLE + 36, 4, 1025 },
    { "extra data", TABLE + 36, 4, UINT32_MAX },
    { "not inside", TABLE + 0, 8, 0 },
    { "not inside", TABLE + 0, 8, 512 },
    { "not inside", TABLE + 0, 8, UINT64_C (1) << 50 },
    { "not inside", TABLE + 0, 8, UINT64_MAX - 4095 },
    { "overlaps", TABLE + 0, 8, 4096 },
    { "not inside", TABLE + 8, 4, 4 << 20 },
    { "too large", TABLE + 8, 4, (4 << 20) + 1 },
    { "too large", TABLE + 8, 4, UINT32_MAX },
    { "refcount 0", COUNT_TABLE, 2, 0 },
    { "refcount 0", COUNT_L1, 2, 0 },
    { "L1 entry", L1, 8, 1 },
    { "overlaps", L1, 8, 512 },
    { "overlaps", L1, 8, 4096 },
    { "overlaps", L1, 8, UINT64_C (1) << 50 },
  };

  (void) state;
  for (size_t i = 0; i < sizeof damages / sizeof damages[0]; ++i) {
    struct container *c = small_image ("s");

    put_bytes (c, place (c, damages[i].at), damages[i].bytes,
               damages[i].value);
    check_damaged (c, damages[i].what);
    container_close (c);
  }
}

/* Two snapshots with one L1 table: only one of them has it counted. */
static void
test_one_l1_twice (void **state)
{
  struct container *c = small_image ("s");
  const uint64_t table = get_bytes (c, HEADER_TABLE, 8);
  const uint64_t l1 = get_bytes (c, table, 8);
  char file[512];

  (void) state;
  snprintf (file, sizeof file, "%s", temp_file ("small.qcow2"));
  container_close (c);
  assert_int_equal (run_command ("qemu-img snapshot -c t '%s'", file), 0);
  c = image_load (file, 4 * GIB);
  put_bytes (c, get_bytes (c, HEADER_TABLE, 8) + 72, 8, l1);
  check_damaged (c, "overlaps");
  container_close (c);
}

/* A table that is larger than can be, of entries that are sound. */
static void
test_huge_table (void **state)
{
  struct container *c = small_image ("s");
  const uint64_t table = round_up (container_size (c), 4096);

  (void) state;
  assert_int_equal (container_reserve (c, table + 70 * MIB), 0);
  put_bytes (c, HEADER_NR, 4, 1030);
  put_bytes (c, HEADER_TABLE, 8, table);
  for (uint64_t i = 0; i < 1030; ++i)
    put_bytes (c, table + i * 65576 + 14, 2, 65535);
  check_damaged (c, "larger than");
  container_close (c);
}

static void
check_pattern (struct container *c, const char *snapshot, uint8_t pattern,
               uint64_t size)
{
  uint64_t is;
  uint8_t *buf = read_snapshot (c, snapshot, &is);

  assert_int_equal (is, size);
  for (unsigned i = 0; i < 12288; ++i)
    assert_int_equal (buf[i], pattern);
  free (buf);
}

/* IDs go before names, and the first of two that have one name before the
 * second.  A snapshot has its own size.
 */
static void
test_select (void **state)
{
  char file[512];
  struct container *c;
  uint64_t table;

  (void) state;
  snprintf (file, sizeof file, "%s", temp_file ("select.qcow2"));
  assert_int_equal (
    run_command ("set -e; f='%s'; w () { "
                 "qemu-io -f qcow2 -c \"write -q -P $1 0 12k\" $f >/dev/null; "
                 "qemu-img snapshot -c $2 $f; }; "
                 "qemu-img create -q -f qcow2 -o cluster_size=4k $f 1M; "
                 "w 1 2; w 2 same; w 3 same; qemu-img resize -q $f 40M; "
                 "w 4 large; w 5 gone; qemu-img snapshot -d gone $f; "
                 "qemu-io -f qcow2 -c 'write -q -P 6 0 12k' $f >/dev/null",
                 file), 0);
  c = image_load (file, GIB);
  check_pattern (c, "1", 1, MIB);
  check_pattern (c, "2", 2, MIB);       /* not the name of the first */
  check_pattern (c, "same", 2, MIB);
  check_pattern (c, "3", 3, MIB);
  check_pattern (c, "large", 4, 40 * MIB);

  static const char *const absent[] = { "gone", "5", "", "sam", "same1", "0" };
  for (size_t i = 0; i < sizeof absent / sizeof absent[0]; ++i) {
    last_report[0] = '\0';
    assert_null (try_open (c, true, absent[i]));
    assert_int_equal (errno, ENOENT);
    assert_non_null (strstr (last_report, "no snapshot"));
    assert_non_null (strstr (last_report, absent[i]));
  }

  /* Without extra data the size is that of the disk, for which the L1
   * table of the first is too small.
   */
  table = get_bytes (c, HEADER_TABLE, 8);
  assert_int_equal (get_bytes (c, table + 36, 4), 24);
  put_bytes (c, table + 48, 8, 41 * MIB);
  assert_null (try_open (c, true, "1"));
  assert_int_equal (errno, EINVAL);
  assert_non_null (strstr (last_report, "too small"));
  put_bytes (c, table + 48, 8, UINT64_MAX);
  assert_null (try_open (c, true, "1"));
  assert_non_null (strstr (last_report, "too large"));
  /* Others are none the worse. */
  check_pattern (c, "large", 4, 40 * MIB);
  container_close (c);

  c = small_image ("");
  assert_null (try_open (c, true, "s"));
  assert_int_equal (errno, ENOENT);
  container_close (c);
}

int
main (void)
{
  const struct CMUnitTest tests[] = {
    cmocka_unit_test (test_random),
    cmocka_unit_test (test_narrow_refcounts),
    cmocka_unit_test (test_contradictions),
    cmocka_unit_test (test_table_not_counted),
    cmocka_unit_test (test_nothing_to_do),
    cmocka_unit_test (test_damaged),
    cmocka_unit_test (test_one_l1_twice),
    cmocka_unit_test (test_huge_table),
    cmocka_unit_test (test_select),
  };
  const char *seed = getenv ("SEED");

  if (run_command ("qemu-img --version >/dev/null 2>&1 && "
                   "qemu-io --version >/dev/null 2>&1") != 0)
    return 77;
  if (seed != NULL)
    first_seed = strtoull (seed, NULL, 0);
  print_message ("SEED=%" PRIu64 "\n", first_seed);
  report_sink = keep_report;
  return cmocka_run_group_tests (tests, NULL, NULL);
}
