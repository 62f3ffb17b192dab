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

static void
quiet (enum report_level level, const char *fmt, va_list args)
{
  if (getenv ("VERBOSE") != NULL) {
    fprintf (stderr, "%d: ", level);
    vfprintf (stderr, fmt, args);
    fputc ('\n', stderr);
  }
}

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
      (run_command ("yes base%u | dd of='%s' conv=notrunc bs=1 count=%u "
                    "seek=%u 2>/dev/null iflag=fullblock", i, file,
                    3000 + 2000 * i, 23456 + 70000 * i), 0);
  assert_int_equal (run_command ("truncate -s %s '%s'", size, file), 0);
}

static void
make_middle (const char *size)
{
  char raw[512];

  snprintf (raw, sizeof raw, "%s", temp_file ("base.raw"));
  const char *const file = temp_file ("middle.qcow2");
  assert_int_equal
    (run_command ("qemu-img create -q -f qcow2 -b '%s' -F raw '%s' %s && "
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
    make_middle (k->middle);
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

/* What QEMU reads. */
static uint8_t *
read_by_qemu (uint64_t size)
{
  char raw[512];
  uint8_t *buf = malloc (size);
  FILE *fp;

  snprintf (raw, sizeof raw, "%s", temp_file ("check.raw"));
  assert_int_equal (run_command ("qemu-img convert -O raw '%s' '%s'",
                                 temp_file ("check.qcow2"), raw), 0);
  fp = fopen (raw, "re");
  assert_non_null (fp);
  assert_non_null (buf);
  assert_int_equal (fread (buf, 1, size, fp), size);
  fclose (fp);
  return buf;
}

static void
stop_and_compare (const struct kind *k, struct files *f, const uint8_t *model)
{
  const uint64_t size = qcow2_size (f->q);

  compare_all (f->q, model);
  assert_int_equal (qcow2_stop (f->q, NULL), 0);
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
  const unsigned nr = 900;

  if (getenv ("VERBOSE") != NULL)
    fprintf (stderr, "--- %s\n", k->name);
  make_files (k, &f);
  open_files (&f);

  const uint64_t size = qcow2_size (f.q);
  const uint64_t cs = qcow2_cluster_size (f.q);
  struct random_requests r = {
    .model = read_by_qemu (size), .high = size, .trim_from = k->trim_from,
    .max = min_u64 (size / 8, cs * 6), .seed = first_seed++,
  };
  compare_all (f.q, r.model);
  for (unsigned i = 0; i < nr; ++i) {
    r.q = f.q;
    assert_int_equal (random_request (&r), 0);
    if (i % (nr / 3) == nr / 3 - 1) {
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

  for (unsigned i = 0; i < 500; ++i)
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

int
main (void)
{
  const struct CMUnitTest tests[] = {
    cmocka_unit_test (test_random),
    cmocka_unit_test (test_threads),
    cmocka_unit_test (test_not_opened),
    cmocka_unit_test (test_depth),
  };

  if (run_command ("qemu-img --version >/dev/null 2>&1") != 0)
    return 77;
  if (getenv ("SEED") != NULL)
    first_seed = strtoull (getenv ("SEED"), NULL, 0);
  report_sink = quiet;
  return cmocka_run_group_tests (tests, NULL, NULL);
}
