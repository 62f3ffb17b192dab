/* nbdkit-dirty-bitmap-filter
 * SPDX-License-Identifier: BSD-3-Clause
 * Copyright the nbdkit-dirty-bitmap-filter authors
 */

/* The container over nbdkit's plugin, over a fake of nbdkit.  The source
 * is included, since the fake takes the place of functions that only
 * nbdkit has.
 */

#include <config.h>

#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <string.h>

#include <cmocka.h>

#include "container/next.c"
#include "fake-nbdkit.h"

#define MiB ((uint64_t) 1 << 20)

static unsigned nr_reports;
static char last_report[512];

static void
keep_report (enum report_level level, const char *fmt, va_list args)
{
  if (level == REPORT_DEBUG)
    return;
  nr_reports++;
  vsnprintf (last_report, sizeof last_report, fmt, args);
}

static FILE *fp;

static int
setup (void **state)
{
  (void) state;
  fp = tmpfile ();
  if (fp == NULL)
    return -1;
  memset (&fake, 0, sizeof fake);
  fake.fd = fileno (fp);
  fake.minimum = 1;
  fake.maximum = UINT32_MAX;
  fake.write = fake.flush = 1;
  fake.zero = NBDKIT_ZERO_NATIVE;
  fake.cache = NBDKIT_CACHE_NATIVE;
  fake.first_size = -1;
  nr_reports = 0;
  last_report[0] = '\0';
  report_sink = keep_report;
  return ftruncate (fake.fd, MiB);
}

static int
teardown (void **state)
{
  (void) state;
  fclose (fp);
  return fake.nr_open == 0 ? 0 : -1;
}

static struct container *
open_fake (bool readonly, bool one_at_a_time)
{
  const struct container_next_options options = {
    .backend = (nbdkit_backend *) &fake,
    .readonly = readonly,
    .serialize = one_at_a_time,
  };

  return container_open_next (&options);
}

static off_t
file_size (void)
{
  struct stat statbuf;

  assert_int_equal (fstat (fake.fd, &statbuf), 0);
  return statbuf.st_size;
}

static void
test_requests (void **state)
{
  struct container *c = open_fake (false, false);
  char buf[1000], expected[1000];

  (void) state;
  assert_non_null (c);
  assert_int_equal (container_size (c), MiB);
  assert_true (container_next_is_rotational (c));
  memset (expected, 5, sizeof expected);
  assert_int_equal (container_pwrite (c, expected, 1000, MiB - 1000), 0);
  assert_int_equal (container_pread (c, buf, 1000, MiB - 1000), 0);
  assert_memory_equal (buf, expected, 1000);

  assert_int_equal (container_zero (c, 500, MiB - 500, true), 0);
  assert_int_equal (fake.zero_flags, NBDKIT_FLAG_MAY_TRIM);
  assert_int_equal (container_zero (c, 500, MiB - 600, false), 0);
  assert_int_equal (fake.zero_flags, 0);
  assert_int_equal (container_pread (c, buf, 1000, MiB - 1000), 0);
  memset (expected + 400, 0, 600);
  assert_memory_equal (buf, expected, 1000);

  assert_int_equal (container_flush (c), 0);
  assert_int_equal (fake.nr_flushes, 1);
  assert_int_equal (container_cache (c, MiB, 0), 0);
  assert_int_equal (fake.nr_caches, 1);
  container_close (c);
  assert_int_equal (nr_reports, 0);
}

static void
test_errors (void **state)
{
  struct container *c = open_fake (false, false);
  const int errs[] = { EIO, ENOSPC, EROFS, ESHUTDOWN };
  char buf[512] = { 0 };
  size_t i;

  (void) state;
  for (i = 0; i < sizeof errs / sizeof errs[0]; ++i) {
    fake.err = errs[i];
    errno = 0;
    assert_int_equal (container_pread (c, buf, 512, 0), -1);
    assert_int_equal (errno, errs[i]);
    errno = 0;
    assert_int_equal (container_pwrite (c, buf, 512, 0), -1);
    assert_int_equal (errno, errs[i]);
    errno = 0;
    assert_int_equal (container_zero (c, 512, 0, true), -1);
    assert_int_equal (errno, errs[i]);
    errno = 0;
    assert_int_equal (container_cache (c, 512, 0), -1);
    assert_int_equal (errno, errs[i]);
    errno = 0;
    assert_int_equal (container_flush (c), -1);
    assert_int_equal (errno, errs[i]);
  }
  container_close (c);
}

static void
test_chunks (void **state)
{
  struct container *c;
  char *buf = calloc (1, 4 * MiB);

  (void) state;
  fake.maximum = MiB;
  assert_int_equal (ftruncate (fake.fd, 16 * MiB), 0);
  c = open_fake (false, false);
  assert_int_equal (container_pread (c, buf, 4 * MiB, 1), 0);
  assert_int_equal (container_pwrite (c, buf, 4 * MiB, 1), 0);
  assert_int_equal (fake.nr_pwrites, 4);
  assert_int_equal (fake.largest_data, MiB);
  assert_int_equal (container_zero (c, 10 * MiB, 3, false), 0);
  assert_int_equal (fake.nr_zeroes, 10);
  assert_int_equal (fake.largest_zero, MiB);
  assert_int_equal (container_cache (c, 10 * MiB, 3), 0);
  assert_int_equal (fake.nr_caches, 10);
  container_close (c);

  /* Without a limit, nbdkit's own is the limit. */
  fake.maximum = UINT32_MAX;
  fake.largest_data = 0;
  c = open_fake (false, false);
  assert_int_equal (current_view ((struct next *) c)->max_data_bytes,
                    64 * MiB);
  container_close (c);
  free (buf);
}

static void
test_no_zero_no_flush_no_cache (void **state)
{
  struct container *c;
  char buf[4096], expected[4096];

  (void) state;
  fake.zero = NBDKIT_ZERO_NONE;
  fake.flush = 0;
  fake.cache = NBDKIT_CACHE_EMULATE;
  assert_int_equal (ftruncate (fake.fd, 4 * MiB), 0);
  c = open_fake (false, false);
  assert_int_equal (nr_reports, 1);
  assert_non_null (strstr (last_report, "cannot flush"));

  memset (expected, 1, sizeof expected);
  assert_int_equal (container_pwrite (c, expected, 4096, 0), 0);
  assert_int_equal (container_zero (c, 3 * MiB, 100, true), 0);
  assert_int_equal (fake.nr_zeroes, 0);
  assert_int_equal (container_pread (c, buf, 4096, 0), 0);
  memset (expected + 100, 0, 4096 - 100);
  assert_memory_equal (buf, expected, 4096);
  assert_int_equal (container_flush (c), 0);
  assert_int_equal (fake.nr_flushes, 0);
  assert_int_equal (container_cache (c, 4096, 0), 0);
  assert_int_equal (fake.nr_caches, 0);
  container_close (c);
}

static void
test_readonly (void **state)
{
  struct container *c = open_fake (true, false);

  (void) state;
  assert_true (c->readonly);
  assert_int_equal (nr_reports, 0);
  errno = 0;
  assert_int_equal (container_pwrite (c, "x", 1, 0), -1);
  assert_int_equal (errno, EROFS);
  container_close (c);

  /* A plugin that cannot write makes it read-only, with a word. */
  fake.write = 0;
  c = open_fake (false, false);
  assert_true (c->readonly);
  assert_int_equal (nr_reports, 1);
  assert_non_null (strstr (last_report, "read-only"));
  container_close (c);
  assert_int_equal (fake.nr_pwrites, 0);
}

static void
test_refused (void **state)
{
  (void) state;
  fake.minimum = 512;
  assert_null (open_fake (false, false));
  assert_int_equal (nr_reports, 1);
  assert_non_null (strstr (last_report, "--filter=blocksize"));
  assert_int_equal (fake.nr_open, 0);
  fake.minimum = 1;
  fake.write = -1;
  assert_null (open_fake (false, false));
  assert_int_equal (fake.nr_open, 0);
  fake.fail_open = true;
  assert_null (open_fake (false, false));
}

static void
test_growth (void **state)
{
  struct container *c = open_fake (false, false);
  uint64_t size;
  char buf[3] = { 'a', 'b', 'c' };

  (void) state;
  container_next_set_growth (c, fake.fd, NULL);
  assert_int_equal (container_pwrite (c, buf, 3, MiB - 1), 0);
  size = container_size (c);
  assert_int_equal (size, file_size ());
  assert_int_equal (size, 17 * MiB);
  assert_int_equal (fake.nr_open, 2);

  /* Within the step nothing is opened again. */
  assert_int_equal (container_pwrite (c, buf, 3, size - 3), 0);
  assert_int_equal (fake.nr_open, 2);
  /* Steps are an eighth, between 16 MiB and 1 GiB. */
  assert_int_equal (container_reserve (c, 800 * MiB), 0);
  assert_int_equal (container_size (c), 800 * MiB);
  assert_int_equal (container_reserve (c, 800 * MiB + 1), 0);
  assert_int_equal (container_size (c), 900 * MiB);
  assert_int_equal (fake.nr_open, 4);
  memset (buf, 0, 3);
  assert_int_equal (container_pread (c, buf, 3, MiB - 1), 0);
  assert_memory_equal (buf, "abc", 3);

  /* Cutting leaves what was there at first. */
  assert_int_equal (container_truncate (c, 5 * MiB), 0);
  assert_int_equal (file_size (), 5 * MiB);
  assert_int_equal (container_size (c), 5 * MiB);
  assert_int_equal (container_truncate (c, 10), 0);
  assert_int_equal (file_size (), MiB);

  /* And growing again works. */
  assert_int_equal (container_pwrite (c, buf, 3, 2 * MiB), 0);
  assert_int_equal (file_size (), 17 * MiB);
  container_close (c);
  assert_int_equal (fake.nr_finalized, 5);
  assert_int_equal (nr_reports, 0);
}

static void
test_cannot_grow (void **state)
{
  struct container *c = open_fake (false, false);

  (void) state;
  container_next_set_growth (c, -1, "of the moon");
  errno = 0;
  assert_int_equal (container_reserve (c, MiB + 1), -1);
  assert_int_equal (errno, ENOSPC);
  assert_int_equal (nr_reports, 1);
  assert_non_null (strstr (last_report, "of the moon"));
  /* Each time: it is report.h that has a limit. */
  errno = 0;
  assert_int_equal (container_pwrite (c, "x", 1, MiB), -1);
  assert_int_equal (errno, ENOSPC);
  assert_int_equal (nr_reports, 2);
  assert_int_equal (container_truncate (c, 0), 0);
  assert_int_equal (file_size (), MiB);
  container_close (c);
}

static void
test_plugin_does_not_see_growth (void **state)
{
  struct container *c;

  (void) state;
  fake.stale_size = true;
  c = open_fake (false, false);
  container_next_set_growth (c, fake.fd, NULL);
  errno = 0;
  assert_int_equal (container_reserve (c, MiB + 1), -1);
  assert_int_equal (errno, ENOSPC);
  assert_int_equal (nr_reports, 1);
  assert_int_equal (container_size (c), MiB);
  assert_int_equal (file_size (), MiB);
  assert_int_equal (fake.nr_open, 1);
  container_close (c);
}

static void
test_growth_that_fails_for_once (void **state)
{
  struct container *c = open_fake (false, false);

  (void) state;
  container_next_set_growth (c, fake.fd, NULL);
  fake.fail_open = true;
  assert_int_equal (container_reserve (c, MiB + 1), -1);
  assert_int_equal (file_size (), MiB);
  fake.fail_open = false;
  assert_int_equal (container_reserve (c, MiB + 1), 0);
  assert_int_equal (container_size (c), 17 * MiB);
  container_close (c);
}

/* A file that is larger than the container is never cut by growing. */
static void
test_growth_never_cuts (void **state)
{
  struct container *c = open_fake (false, false);

  (void) state;
  container_next_set_growth (c, fake.fd, NULL);
  assert_int_equal (ftruncate (fake.fd, 100 * MiB), 0);
  assert_int_equal (container_reserve (c, 2 * MiB), 0);
  assert_int_equal (file_size (), 100 * MiB);
  assert_int_equal (container_size (c), 100 * MiB);
  container_close (c);
}

static void *
write_and_read_back (void *opaque)
{
  struct container *c = opaque;
  static atomic_int next_id;
  const unsigned id = next_id++ % 4;
  unsigned i;

  for (i = 0; i < 50; ++i) {
    const uint64_t offset = (i * 4 + id) * MiB;
    const uint64_t value = offset + 1;
    uint64_t got;

    if (container_pwrite (c, &value, sizeof value, offset) == -1 ||
        container_pread (c, &got, sizeof got, offset) == -1 || got != value)
      return c;
  }
  return NULL;
}

static void
test_threads (void **state)
{
  pthread_t threads[4];
  void *ret;
  int serial, i;

  (void) state;
  for (serial = 0; serial <= 1; ++serial) {
    struct container *c = open_fake (false, serial);

    container_next_set_growth (c, fake.fd, NULL);
    fake.overlapped = false;
    for (i = 0; i < 4; ++i)
      assert_int_equal (pthread_create (&threads[i], NULL,
                                        write_and_read_back, c), 0);
    for (i = 0; i < 4; ++i) {
      assert_int_equal (pthread_join (threads[i], &ret), 0);
      assert_null (ret);
    }
    assert_int_equal (fake.overlapped, !serial);
    assert_int_equal (container_truncate (c, MiB), 0);
    container_close (c);
  }
}

#define TEST(f) cmocka_unit_test_setup_teardown (f, setup, teardown)

int
main (void)
{
  const struct CMUnitTest tests[] = {
    TEST (test_requests),
    TEST (test_errors),
    TEST (test_chunks),
    TEST (test_no_zero_no_flush_no_cache),
    TEST (test_readonly),
    TEST (test_refused),
    TEST (test_growth),
    TEST (test_cannot_grow),
    TEST (test_plugin_does_not_see_growth),
    TEST (test_growth_that_fails_for_once),
    TEST (test_growth_never_cuts),
    TEST (test_threads),
  };

  return cmocka_run_group_tests (tests, NULL, NULL);
}
