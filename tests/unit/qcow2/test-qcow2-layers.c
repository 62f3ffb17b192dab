/* nbdkit-dirty-bitmap-filter
 * SPDX-License-Identifier: BSD-3-Clause
 * Copyright the nbdkit-dirty-bitmap-filter authors
 */

/* Images whose bytes are in more than one place: over backing files, in
 * subclusters, in an external data file.  Random requests against a
 * plain array, with one thread and with several; QEMU says what the
 * image holds at first and at last.
 */

#include <config.h>

#include <errno.h>
#include <inttypes.h>
#include <pthread.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stdatomic.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include <cmocka.h>

#include "common/bytes.h"
#include "common/report.h"
#include "container/container.h"
#include "image.h"
#include "qcow2/qcow2.h"
#include "random-requests.h"

#define LIMIT (UINT64_C (1) << 32)
#define CACHE 65536

static uint64_t first_seed = 1;

struct kind {
  const char *name;
  const char *options;          /* of qemu-img create */
  const char *size;
  const char *raw;              /* size of the backing file at the bottom */
  const char *middle;           /* size of a qcow2 file over it */
  uint64_t trim_from;           /* bytes that cannot be trimmed */
  bool compress;                /* begin with some compressed clusters */
  bool data_file;
};

static const struct kind kinds[] = {
  { .name = "raw below", .options = "-o cluster_size=4k", .size = "2M",
    .raw = "2M" },
  { .name = "shorter raw below", .options = "-o cluster_size=512",
    .size = "1000448", .raw = "333333" },
  { .name = "longer raw below", .options = "", .size = "4000256",
    .raw = "5M", .compress = true },
  { .name = "qcow2 below, shorter", .options = "-o cluster_size=4k",
    .size = "3M", .raw = "2500000", .middle = "2M", .compress = true },
  { .name = "qcow2 below, longer", .options = "", .size = "3M", .raw = "4M",
    .middle = "3500032" },
  { .name = "version 2", .options = "-o compat=0.10,cluster_size=4k",
    .size = "2M", .raw = "1M", .trim_from = 1 << 20, .compress = true },
  { .name = "version 2, shorter below",
    .options = "-o compat=0.10,cluster_size=64k",
    .size = "2500096", .raw = "1000000", .trim_from = 1 << 20 },
  { .name = "subclusters", .options = "-o extended_l2=on,cluster_size=16k",
    .size = "4000256", .compress = true },
  { .name = "subclusters over raw",
    .options = "-o extended_l2=on,cluster_size=64k", .size = "4M",
    .raw = "3333333", .compress = true },
  { .name = "subclusters over qcow2",
    .options = "-o extended_l2=on,cluster_size=64k", .size = "4M",
    .raw = "4M", .middle = "5M" },
  { .name = "subclusters over qcow2 alone",
    .options = "-o extended_l2=on,cluster_size=16k", .size = "3M",
    .middle = "2500096" },
  { .name = "large subclusters",
    .options = "-o extended_l2=on,cluster_size=2M", .size = "20M",
    .raw = "19M", .compress = true },
  { .name = "subclusters, preallocated",
    .options = "-o extended_l2=on,cluster_size=64k,preallocation=metadata",
    .size = "4M" },
  { .name = "data file", .options = "-o data_file=%s,cluster_size=4k",
    .size = "2000384", .data_file = true },
  { .name = "data file and subclusters",
    .options = "-o data_file=%s,extended_l2=on,cluster_size=16k",
    .size = "2M", .data_file = true },
  { .name = "data file over raw", .options = "-o data_file=%s", .size = "4M",
    .raw = "3M", .data_file = true },
  { .name = "raw data file",
    .options = "-o data_file=%s,data_file_raw=on,cluster_size=4k",
    .size = "2000384", .data_file = true },
};

/* Memory into a raw file, with data and holes. */
static void
make_raw (const char *size)
{
  const char *const file = temp_file ("base.raw");

  assert_int_equal (run_command ("rm -f '%s'; truncate -s %s '%s'", file, size,
                                 file), 0);
  for (unsigned i = 0; i < 12; ++i)
    assert_int_equal
      (run_command ("yes base%u | head -c %u | dd of='%s' conv=notrunc "
                    "bs=64k iflag=fullblock oflag=seek_bytes seek=%u "
                    "2>/dev/null", i, 3000 + 2000 * i, file,
                    23456 + 70000 * i), 0);
  assert_int_equal (run_command ("truncate -s %s '%s'", size, file), 0);
}

/* Over it, if there is one. */
static void
make_middle (const char *size, bool over_raw)
{
  char raw[600] = "";

  if (over_raw)
    snprintf (raw, sizeof raw, "-b '%s' -F raw", temp_file ("base.raw"));
  const char *const file = temp_file ("middle.qcow2");
  assert_int_equal
    (run_command ("qemu-img create -q -f qcow2 %s '%s' %s && "
                  "qemu-io -f qcow2 -c 'write -q -P 7 100k 50k' "
                  "-c 'write -q -z 400k 200k' -c 'write -q -P 8 900k 100k' "
                  "'%s'", raw, file, size, file), 0);
}

/* What belongs to one image while it is open. */
struct files {
  struct container *top, *raw, *middle, *data;
  struct qcow2 *middle_image;
  struct qcow2 *q;
};

static void
make_files (const struct kind *k, struct files *f)
{
  char data[512], options[1024], middle[512], top[512], backing[1200] = "";

  memset (f, 0, sizeof *f);
  snprintf (data, sizeof data, "%s", temp_file ("data.raw"));
  snprintf (middle, sizeof middle, "%s", temp_file ("middle.qcow2"));
  snprintf (top, sizeof top, "%s", temp_file ("check.qcow2"));
  run_command ("rm -f '%s' '%s'", top, data);
  if (k->raw != NULL) {
    make_raw (k->raw);
    f->raw = image_load (temp_file ("base.raw"), LIMIT);
    snprintf (backing, sizeof backing, "-b '%s' -F raw",
              temp_file ("base.raw"));
  }
  if (k->middle != NULL) {
    make_middle (k->middle, k->raw != NULL);
    f->middle = image_load (middle, LIMIT);
    snprintf (backing, sizeof backing, "-b '%s' -F qcow2", middle);
  }
#pragma GCC diagnostic push
#pragma GCC diagnostic ignored "-Wformat-nonliteral"
  snprintf (options, sizeof options, k->options, data);
#pragma GCC diagnostic pop
  assert_int_equal (run_command ("qemu-img create -q -f qcow2 %s %s '%s' %s",
                                 options, backing, top, k->size), 0);
  if (k->compress) {
    const unsigned kib = strstr (options, "2M") != NULL ? 2048 : 64;

    for (unsigned i = 0; i < 4; ++i)
      assert_int_equal
        (run_command ("qemu-io -f qcow2 -c 'write -q -c -P %u %uk %uk' '%s'",
                      50 + i, i * 2 * kib, kib, top), 0);
  }
  f->top = image_load (top, LIMIT);
  if (k->data_file)
    f->data = image_load (data, LIMIT);
}

static void
open_files (struct files *f)
{
  const struct qcow2_options middle = {
    .readonly = true, .cache_size = CACHE, .backing.raw = f->raw,
  };
  struct qcow2_options top = { .cache_size = CACHE, .data_file = f->data };

  if (f->middle != NULL) {
    f->middle->readonly = true;
    f->middle_image = qcow2_open (f->middle, &middle);
    assert_non_null (f->middle_image);
    top.backing.image = f->middle_image;
  }
  else
    top.backing.raw = f->raw;
  f->q = qcow2_open (f->top, &top);
  assert_non_null (f->q);
}

static void
close_files (struct files *f)
{
  qcow2_close (f->q);
  qcow2_close (f->middle_image);
  f->q = f->middle_image = NULL;
}

static void
free_files (struct files *f)
{
  container_close (f->top);
  container_close (f->raw);
  container_close (f->middle);
  container_close (f->data);
}

static void
stop_and_compare (const struct kind *k, struct files *f, const uint8_t *model)
{
  const uint64_t size = qcow2_size (f->q);

  compare_all (f->q, model);
  assert_int_equal (qcow2_stop (f->q), 0);
  close_files (f);
  if (f->data != NULL)
    image_save (f->data, temp_file ("data.raw"));
  compare_with_qemu (f->top, model, size);
  if (strstr (k->options, "data_file_raw") != NULL) {
    uint8_t *buf = malloc (size);

    assert_non_null (buf);
    assert_int_equal (container_pread (f->data, buf, size, 0), 0);
    assert_memory_equal (buf, model, size);
    free (buf);
  }
}

static void
run_kind (const struct kind *k)
{
  struct files f;
  const unsigned nr = how_often (900, 300, 90);
  const unsigned reopen = how_often (3, 3, 1);

  if (getenv ("VERBOSE") != NULL)
    fprintf (stderr, "--- %s\n", k->name);
  make_files (k, &f);
  open_files (&f);

  const uint64_t size = qcow2_size (f.q);
  const uint64_t cs = qcow2_cluster_size (f.q);
  struct random_requests r = {
    .model = read_by_qemu (size), .high = size, .trim_from = k->trim_from,
    .max = min_u64 (size / 8, cs * 6), .seed = first_seed++,
    .all_told = k->raw == NULL &&
      strstr (k->options, "preallocation") == NULL,
  };
  compare_all (f.q, r.model);
  for (unsigned i = 0; i < nr; ++i) {
    r.q = f.q;
    assert_int_equal (random_request (&r), 0);
    if (i % (nr / reopen) == nr / reopen - 1) {
      stop_and_compare (k, &f, r.model);
      open_files (&f);
    }
  }
  close_files (&f);
  free_files (&f);
  free (r.model);
}

static void
test_random (void **state)
{
  (void) state;
  if (getenv ("THREADS_ONLY") != NULL)
    skip ();
  for (unsigned i = 0; i < sizeof kinds / sizeof kinds[0]; ++i)
    run_kind (&kinds[i]);
}

#define NR_THREADS 4

struct worker {
  struct random_requests r;
  pthread_t thread;
};

static void *
work (void *arg)
{
  struct worker *w = arg;

  const unsigned nr =
    getenv ("THREADS_ONLY") != NULL ? 60 : how_often (500, 200, 50);

  for (unsigned i = 0; i < nr; ++i)
    assert_int_equal (random_request (&w->r), 0);
  return NULL;
}

/* Neighbours meet in one cluster, and in one subcluster. */
static void
run_threads (const struct kind *k)
{
  struct files f;
  struct worker w[NR_THREADS];

  make_files (k, &f);
  open_files (&f);
  const uint64_t size = qcow2_size (f.q);
  uint8_t *model = read_by_qemu (size);

  for (unsigned i = 0; i < NR_THREADS; ++i) {
    w[i].r = (struct random_requests) {
      .q = f.q, .model = model, .trim_from = k->trim_from,
      .low = size / NR_THREADS * i + (i == 0 ? 0 : 77),
      .high = i == NR_THREADS - 1 ? size : size / NR_THREADS * (i + 1) + 77,
      .max = min_u64 (size / 8, qcow2_cluster_size (f.q) * 4),
      .seed = first_seed++,
    };
    assert_int_equal (pthread_create (&w[i].thread, NULL, work, &w[i]), 0);
  }
  for (unsigned i = 0; i < NR_THREADS; ++i)
    pthread_join (w[i].thread, NULL);
  stop_and_compare (k, &f, model);
  free_files (&f);
  free (model);
}

static void
test_threads (void **state)
{
  (void) state;
  for (unsigned i = 0; i < sizeof kinds / sizeof kinds[0]; ++i)
    run_threads (&kinds[i]);
}

/* Where an image refers to files that were not opened, it is refused. */
static void
test_not_opened (void **state)
{
  (void) state;
  for (unsigned i = 0; i < sizeof kinds / sizeof kinds[0]; ++i) {
    const struct qcow2_options none = { .cache_size = CACHE };
    struct files f;

    if (kinds[i].raw == NULL && !kinds[i].data_file)
      continue;
    make_files (&kinds[i], &f);
    assert_null (qcow2_open (f.top, &none));
    assert_int_equal (errno, EINVAL);
    free_files (&f);
  }
}

struct expected {
  uint64_t offset, length;
  enum qcow2_extent_type type;
  unsigned depth;
};

static void
check_extent (struct qcow2 *q, const struct expected *e)
{
  enum qcow2_extent_type type;
  uint64_t length;
  unsigned depth;

  assert_int_equal (qcow2_extent (q, e->offset, qcow2_size (q), &length,
                                  &type, &depth), 0);
  assert_int_equal (length, e->length);
  assert_int_equal (type, e->type);
  assert_int_equal (depth, e->depth);
}

/* 2M over 1M over 512K: who provides what. */
static void
test_depth (void **state)
{
  const struct kind k = {
    .options = "", .size = "2M", .raw = "512k", .middle = "1M",
  };
  const unsigned c = 65536;
  const struct expected expected[] = {
    { 0, c, QCOW2_EXTENT_DATA, 1 },
    { c, 2 * c, QCOW2_EXTENT_DATA, 2 },
    { 3 * c, 3 * c, QCOW2_EXTENT_DATA, 3 },
    { 6 * c, 4 * c, QCOW2_EXTENT_ZERO, 2 },
    { 10 * c, 4 * c, QCOW2_EXTENT_UNALLOCATED, 3 },
    { 14 * c, 2 * c, QCOW2_EXTENT_DATA, 2 },
    { 16 * c, 16 * c, QCOW2_EXTENT_UNALLOCATED, 2 },
  };
  struct files f;
  uint8_t byte = 1;

  (void) state;
  make_files (&k, &f);
  open_files (&f);
  assert_int_equal (qcow2_write (f.q, &byte, 1, 0), 0);
  for (unsigned i = 0; i < sizeof expected / sizeof expected[0]; ++i)
    check_extent (f.q, &expected[i]);
  close_files (&f);
  free_files (&f);
}

/* An image of subclusters of 2 KiB, whose first cluster is compressed. */
static const struct kind subclusters = {
  .options = "-o extended_l2=on", .size = "1M", .compress = true,
};

static void
check_bytes (struct qcow2 *q, uint64_t offset, uint64_t count, uint8_t byte)
{
  uint8_t *buf = malloc (count);

  assert_non_null (buf);
  assert_int_equal (qcow2_read (q, buf, count, offset), 0);
  for (uint64_t i = 0; i < count; ++i)
    assert_int_equal (buf[i], byte);
  free (buf);
}

/* Parts of compressed clusters, which have no subclusters to flag. */
static void
test_compressed_parts (void **state)
{
  struct files f;

  (void) state;
  make_files (&subclusters, &f);
  open_files (&f);
  /* The end of one, and the beginning of the next. */
  assert_int_equal (qcow2_zero (f.q, 65536 + 4096, 61440, 0), 0);
  check_bytes (f.q, 0, 61440, 50);
  check_bytes (f.q, 61440, 65536 + 4096, 0);
  assert_int_equal (qcow2_zero (f.q, 4096, 2 * 65536, 0), 0);
  check_bytes (f.q, 2 * 65536, 4096, 0);
  check_bytes (f.q, 2 * 65536 + 4096, 61440, 51);
  assert_int_equal (qcow2_trim (f.q, 4096, 4 * 65536), 0);
  check_bytes (f.q, 4 * 65536 + 4096, 61440, 52);
  assert_int_equal (qcow2_stop (f.q), 0);
  close_files (&f);
  image_check (f.top, 1);
  free_files (&f);
}

/* A cluster whose subclusters are zeroed one by one is given up with the
 * last of them.
 */
static void
test_last_subcluster (void **state)
{
  static uint8_t buf[65536] = { 1 };
  struct files f;

  (void) state;
  make_files (&subclusters, &f);
  open_files (&f);
  assert_int_equal (qcow2_write (f.q, buf, sizeof buf, 9 * 65536), 0);
  assert_int_equal (qcow2_stop (f.q), 0);
  const uint64_t size = container_size (f.top);
  for (unsigned i = 0; i < 32; ++i)
    assert_int_equal ((i % 2 == 0 ? qcow2_trim (f.q, 2048, 9 * 65536 + i * 2048)
                       : qcow2_zero (f.q, 2048, 9 * 65536 + i * 2048, 0)), 0);
  check_bytes (f.q, 9 * 65536, 65536, 0);
  assert_int_equal (qcow2_stop (f.q), 0);
  assert_int_equal (container_size (f.top), size - 65536);
  close_files (&f);
  image_check (f.top, 1);
  free_files (&f);
}

/* The two words of an entry are read as they were at one time. */
struct toggle {
  struct qcow2 *q;
  atomic_bool stop;
};

static void *
write_and_trim (void *arg)
{
  struct toggle *t = arg;
  static uint8_t buf[65536];

  memset (buf, 7, sizeof buf);
  while (!atomic_load (&t->stop)) {
    assert_int_equal (qcow2_write (t->q, buf, sizeof buf, 9 * 65536), 0);
    assert_int_equal (qcow2_trim (t->q, sizeof buf, 9 * 65536), 0);
  }
  return NULL;
}

static void
test_entry_at_once (void **state)
{
  struct files f;
  struct toggle t = { 0 };
  pthread_t thread;
  uint8_t byte;

  (void) state;
  make_files (&subclusters, &f);
  open_files (&f);
  t.q = f.q;
  assert_int_equal (pthread_create (&thread, NULL, write_and_trim, &t), 0);
  const unsigned nr =
    getenv ("THREADS_ONLY") != NULL ? 20000 : how_often (200000, 50000, 2000);

  for (unsigned i = 0; i < nr; ++i) {
    assert_int_equal (qcow2_read (f.q, &byte, 1, 9 * 65536 + i % 65536), 0);
    assert_true (byte == 0 || byte == 7);
  }
  atomic_store (&t.stop, true);
  pthread_join (thread, NULL);
  close_files (&f);
  free_files (&f);
}

static int
count_flushes (void *opaque, const char *operation, uint64_t offset,
               uint64_t count)
{
  unsigned *const nr = opaque;

  (void) offset;
  (void) count;
  *nr += strcmp (operation, "flush") == 0;
  return 0;
}

/* A flush is one of the data file, too, and a trim gives its storage
 * back.
 */
static void
test_data_file (void **state)
{
  const struct kind k = {
    .options = "-o data_file=%s", .size = "1M", .data_file = true,
  };
  unsigned nr = 0;
  const struct container_memory_hook hook = { count_flushes, &nr };
  static uint8_t buf[3 * 65536], zeroes[3 * 65536];
  struct files f;

  (void) state;
  make_files (&k, &f);
  open_files (&f);
  memset (buf, 5, sizeof buf);
  container_memory_set_hook (f.data, &hook);
  assert_int_equal (qcow2_write (f.q, buf, sizeof buf, 0), 0);
  assert_int_equal (nr, 0);
  assert_int_equal (qcow2_flush (f.q), 0);
  assert_true (nr > 0);
  nr = 0;
  assert_int_equal (qcow2_write (f.q, buf, sizeof buf, 0), 0);
  assert_int_equal (qcow2_flush (f.q), 0);
  assert_true (nr > 0);
  assert_int_equal (qcow2_trim (f.q, sizeof buf, 0), 0);
  assert_int_equal (container_pread (f.data, buf, sizeof buf, 0), 0);
  assert_memory_equal (buf, zeroes, sizeof buf);
  assert_int_equal (qcow2_stop (f.q), 0);
  close_files (&f);
  free_files (&f);
}

/* Zeroes that have to have a place get one. */
static void
test_zero_keep (void **state)
{
  static const char *const options[] = {
    "-o compat=0.10", "", "-o extended_l2=on", "-o data_file=%s",
  };

  (void) state;
  for (unsigned i = 0; i < sizeof options / sizeof options[0]; ++i) {
    const struct kind k = {
      .options = options[i], .size = "1M", .data_file = i == 3,
    };
    enum qcow2_extent_type type;
    struct files f;
    uint64_t length;
    unsigned depth;

    make_files (&k, &f);
    open_files (&f);
    for (unsigned again = 0; again < 2; ++again) {
      assert_int_equal (qcow2_zero (f.q, 4096, 512,
                                    again ? QCOW2_ZERO_KEEP : 0), 0);
      assert_int_equal (qcow2_zero (f.q, 65536, 5 * 65536,
                                    again ? QCOW2_ZERO_KEEP : 0), 0);
    }
    assert_int_equal (qcow2_extent (f.q, 512, 4608, &length, &type, &depth),
                      0);
    assert_int_equal (type, QCOW2_EXTENT_DATA);
    assert_int_equal (qcow2_stop (f.q), 0);
    close_files (&f);
    image_save (f.top, temp_file ("check.qcow2"));
    if (k.data_file)
      image_save (f.data, temp_file ("data.raw"));
    /* QEMU tells the place of what has one. */
    assert_int_equal
      (run_command ("qemu-img map --output=json '%s' | grep -q "
                    "'\"start\": 327680, .*\"offset\"'",
                    temp_file ("check.qcow2")), 0);
    free_files (&f);
  }
}

int
main (void)
{
  const struct CMUnitTest tests[] = {
    cmocka_unit_test (test_random),
    cmocka_unit_test (test_threads),
    cmocka_unit_test (test_not_opened),
    cmocka_unit_test (test_depth),
    cmocka_unit_test (test_compressed_parts),
    cmocka_unit_test (test_last_subcluster),
    cmocka_unit_test (test_entry_at_once),
    cmocka_unit_test (test_data_file),
    cmocka_unit_test (test_zero_keep),
  };

  if (run_command ("qemu-img --version >/dev/null 2>&1") != 0)
    return 77;
  get_number ("SEED", &first_seed);
  report_sink = report_if_verbose;
  return cmocka_run_group_tests (tests, NULL, NULL);
}
