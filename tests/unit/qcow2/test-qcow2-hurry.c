/* nbdkit-dirty-bitmap-filter
 * SPDX-License-Identifier: BSD-3-Clause
 * Copyright the nbdkit-dirty-bitmap-filter authors
 */

/* The end of a server does not wait for requests that are long by nature:
 * qcow2_hurry ends them between two pieces, and leaves an image that is
 * right.  And image_settle leaves nothing for the end to write.
 */

#include <config.h>

#include <errno.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

#include <cmocka.h>

#include "common/bytes.h"
#include "common/report.h"
#include "container/container.h"
#include "disk/flush.h"
#include "image.h"
#include "qcow2/qcow2.h"

#define MIB (UINT64_C (1) << 20)
#define GIB (UINT64_C (1) << 30)
#define CACHE 65536

/* A container over another one that counts, and hurries the image at one
 * of its calls.
 */
struct counting {
  struct container c;
  struct container *below;
  struct qcow2 *image;
  unsigned calls_left;          /* until then; 0: never */
  unsigned calls, changes;      /* since; or since count */
  uint64_t data_bytes, zero_bytes;
};

static void
count (struct counting *n)
{
  n->calls = n->changes = 0;
  n->data_bytes = n->zero_bytes = 0;
}

static void
called (struct counting *n, uint64_t data_bytes, uint64_t zero_bytes)
{
  n->calls++;
  n->data_bytes += data_bytes;
  n->zero_bytes += zero_bytes;
  if (n->calls_left > 0 && --n->calls_left == 0) {
    qcow2_hurry (n->image, 0);
    count (n);
  }
}

static int
counting_pread (struct container *c, void *buf, size_t nr, uint64_t offset)
{
  struct counting *n = (struct counting *) c;

  called (n, nr, 0);
  return container_pread (n->below, buf, nr, offset);
}

static int
counting_pwrite (struct container *c, const void *buf, size_t nr,
                 uint64_t offset)
{
  struct counting *n = (struct counting *) c;

  n->changes++;
  called (n, nr, 0);
  return container_pwrite (n->below, buf, nr, offset);
}

static int
counting_zero (struct container *c, uint64_t nr, uint64_t offset, bool punch)
{
  struct counting *n = (struct counting *) c;

  n->changes++;
  called (n, 0, nr);
  return container_zero (n->below, nr, offset, punch);
}

static int
counting_cache (struct container *c, uint64_t nr, uint64_t offset)
{
  (void) offset;
  called ((struct counting *) c, 0, nr);
  return 0;
}

static int
counting_flush (struct container *c)
{
  return container_flush (((struct counting *) c)->below);
}

static int
counting_grow (struct container *c, uint64_t size)
{
  struct counting *n = (struct counting *) c;

  if (container_reserve (n->below, size) == -1)
    return -1;
  atomic_store (&c->size, container_size (n->below));
  return 0;
}

static int
counting_truncate (struct container *c, uint64_t size)
{
  atomic_store (&c->size, size);
  return container_truncate (((struct counting *) c)->below, size);
}

static void
counting_close (struct container *c)
{
  free (c);
}

static const struct container_ops counting_ops = {
  .pread = counting_pread,
  .pwrite = counting_pwrite,
  .zero = counting_zero,
  .cache = counting_cache,
  .flush = counting_flush,
  .grow = counting_grow,
  .truncate = counting_truncate,
  .close = counting_close,
};

static struct counting *
open_counting (struct container *below)
{
  const struct qcow2_options options = { .cache_size = CACHE };
  struct counting *n = calloc (1, sizeof *n);

  assert_non_null (n);
  container_init (&n->c, &counting_ops, container_size (below), false);
  n->below = below;
  n->image = qcow2_open (&n->c, &options);
  assert_non_null (n->image);
  return n;
}

static unsigned nr_errors;

static void
count_errors (enum report_level level, const char *fmt, va_list args)
{
  if (level != REPORT_DEBUG)
    nr_errors++;
  report_if_verbose (level, fmt, args);
}

static uint8_t buf[32 * MIB];

static int
do_zero (struct qcow2 *q, uint64_t size)
{
  return qcow2_zero (q, size - 1000, 500, 0);
}

static int
do_zero_keep (struct qcow2 *q, uint64_t size)
{
  return qcow2_zero (q, size - 1000, 500, QCOW2_ZERO_KEEP);
}

static int
do_fast_zero (struct qcow2 *q, uint64_t size)
{
  return qcow2_zero (q, size - 1000, 500, QCOW2_ZERO_KEEP | QCOW2_ZERO_FAST);
}

static int
do_trim (struct qcow2 *q, uint64_t size)
{
  return qcow2_trim (q, size - 1000, 500);
}

static int
do_cache (struct qcow2 *q, uint64_t size)
{
  return qcow2_cache (q, size, 0);
}

static int
do_read (struct qcow2 *q, uint64_t size)
{
  return qcow2_read (q, buf, min_u64 (size, sizeof buf) - 700, 300);
}

static int
do_write (struct qcow2 *q, uint64_t size)
{
  return qcow2_write (q, buf, min_u64 (size, sizeof buf) - 700, 300);
}

static int
do_extent (struct qcow2 *q, uint64_t size)
{
  enum qcow2_extent_type type;
  unsigned depth;
  uint64_t length, offset = 0;

  for (; offset < size; offset += length)
    if (qcow2_extent (q, offset, size, &length, &type, &depth) == -1)
      return -1;
  return 0;
}

/* What a request meets. */
enum content { EMPTY, DATA, SCATTERED };

static const struct {
  const char *name, *options;
  int (*run) (struct qcow2 *, uint64_t size);
  enum content content;
  unsigned at;                  /* call of the container */
} cases[] = {
  { "zeroes that keep, small clusters", "-o cluster_size=512",
    do_zero_keep, EMPTY, 5 },
  { "zeroes that keep, version 2", "-o compat=0.10,cluster_size=512",
    do_zero_keep, EMPTY, 5 },
  { "zeroes that keep, version 2 with data",
    "-o compat=0.10,preallocation=metadata", do_zero_keep, EMPTY, 3 },
  { "zeroes, version 2 with data", "-o compat=0.10", do_zero, DATA, 2 },
  { "zeroes, small clusters", "-o cluster_size=512", do_zero, SCATTERED, 5 },
  { "fast zeroes, version 2", "-o compat=0.10,cluster_size=512",
    do_fast_zero, EMPTY, 0 },
  { "zeroes, subclusters", "-o extended_l2=on", do_zero, DATA, 1 },
  { "trim", "-o cluster_size=512", do_trim, SCATTERED, 5 },
  { "cache", "-o preallocation=metadata", do_cache, EMPTY, 3 },
  { "cache, small clusters", "-o cluster_size=512", do_cache, SCATTERED, 5 },
  { "read", "", do_read, DATA, 2 },
  { "read, small clusters", "-o cluster_size=512", do_read, SCATTERED, 5 },
  { "write", "", do_write, EMPTY, 2 },
  { "overwrite", "", do_write, DATA, 2 },
  { "write, small clusters", "-o cluster_size=512", do_write, EMPTY, 5 },
  { "extents", "-o cluster_size=512,preallocation=metadata", do_extent,
    EMPTY, 5 },
};

#define SIZE (64 * MIB)
#define SCATTERED_END (12 * MIB)

static void
fill (struct counting *n, enum content content)
{
  switch (content) {
  case EMPTY:
    break;
  case DATA:
    assert_int_equal (qcow2_write (n->image, buf, sizeof buf, 0), 0);
    break;
  case SCATTERED:
    for (uint64_t at = SCATTERED_END; at > 0; at -= 1024)
      assert_int_equal (qcow2_write (n->image, buf, 512, at - 1024), 0);
  }
  assert_int_equal (qcow2_flush (n->image), 0);
}

/* Is there something still at the end of what was scattered? */
static bool
end_is_there (struct container *c)
{
  const struct qcow2_options options = { .cache_size = CACHE };
  struct qcow2 *q = qcow2_open (c, &options);
  uint8_t last[512];

  assert_non_null (q);
  assert_int_equal (qcow2_read (q, last, sizeof last, SCATTERED_END - 1024),
                    0);
  qcow2_close (q);
  return last[0] != 0;
}

/* In the middle of a request: it ends soon, and says so; the image is
 * right, and can be stopped.
 */
static void
test_hurry (void **state)
{
  (void) state;
  for (size_t i = 0; i < sizeof cases / sizeof cases[0]; ++i) {
    struct container *c = image_create (cases[i].options, "64M", GIB);
    struct counting *n = open_counting (c);

    print_message ("%s\n", cases[i].name);
    memset (buf, i + 1, sizeof buf);
    fill (n, cases[i].content);
    count (n);
    n->calls_left = cases[i].at;
    if (cases[i].at == 0)
      qcow2_hurry (n->image, 0);
    nr_errors = 0;
    errno = 0;
    assert_int_equal (cases[i].run (n->image, SIZE), -1);
    assert_int_equal (errno, ESHUTDOWN);
    assert_int_equal (n->calls_left, 0);
    assert_int_equal (nr_errors, 0);
    /* What has been given up goes home in a flush, by many calls. */
    if (cases[i].content != SCATTERED || cases[i].run == do_read)
      assert_true (n->calls < 100);
    assert_true (n->data_bytes <= 4 * MIB);
    assert_true (n->zero_bytes <= 32 * MIB);

    assert_int_equal (qcow2_flush (n->image), 0);
    assert_int_equal (qcow2_stop (n->image), 0);
    qcow2_close (n->image);
    container_close (&n->c);
    image_check (c, 1);
    if (cases[i].content == SCATTERED)
      assert_true (end_is_there (c));
    container_close (c);
  }
}

/* Before the time has come nothing is hurried. */
static void
test_grace (void **state)
{
  struct container *c = image_create ("-o cluster_size=512", "64M", GIB);
  struct counting *n = open_counting (c);
  const struct timespec tick = { .tv_nsec = 10 * 1000000 };
  unsigned nr = 0;

  (void) state;
  qcow2_hurry (n->image, 60 * 1000);
  assert_int_equal (do_write (n->image, 2 * MIB), 0);
  qcow2_hurry (n->image, 100);
  while (do_write (n->image, 2 * MIB) == 0 && ++nr < 1000)
    nanosleep (&tick, NULL);
  assert_int_equal (errno, ESHUTDOWN);
  assert_int_equal (qcow2_stop (n->image), 0);
  qcow2_close (n->image);
  container_close (&n->c);
  image_check (c, 1);
  container_close (c);
}

/* Nothing is left for the end, whatever was done before. */
static void
test_settle (void **state)
{
  struct container *c = image_create ("", "64M", GIB);
  struct counting *n = open_counting (c);

  (void) state;
  for (unsigned round = 0; round < 3; ++round) {
    assert_int_equal (qcow2_write (n->image, buf, 8 * MIB, round * MIB), 0);
    assert_int_equal (qcow2_trim (n->image, 3 * MIB, 2 * MIB), 0);
    assert_int_equal (qcow2_zero (n->image, 3 * MIB, 6 * MIB, 0), 0);
    assert_int_equal (image_settle (n->image, NULL), 0);
    count (n);
    assert_int_equal (image_settle (n->image, NULL), 0);
    assert_int_equal (n->changes, 0);
  }
  assert_int_equal (qcow2_stop (n->image), 0);
  assert_int_equal (n->changes, 0);
  qcow2_close (n->image);
  container_close (&n->c);
  image_check (c, 1);
  container_close (c);
}

int
main (void)
{
  const struct CMUnitTest tests[] = {
    cmocka_unit_test (test_hurry),
    cmocka_unit_test (test_grace),
    cmocka_unit_test (test_settle),
  };

  report_sink = count_errors;
  return cmocka_run_group_tests (tests, NULL, NULL);
}
