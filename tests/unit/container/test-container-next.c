/* nbdkit-dirty-bitmap-filter
 * SPDX-License-Identifier: BSD-3-Clause
 * Copyright the nbdkit-dirty-bitmap-filter authors
 */

/* The container over nbdkit's plugin, over a fake of nbdkit.  The source
 * is included, since the fake takes the place of functions that only
 * nbdkit has.
 */

#include <config.h>

#include <fcntl.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <string.h>

#include <cmocka.h>

#include "container/context.c"
#include "container/next.c"
#include "fake-nbdkit.h"
#include "kept-reports.h"

#define MiB ((uint64_t) 1 << 20)

static char path[] = "/tmp/container-next.XXXXXX";
static int fd;

static int
setup (void **state)
{
  (void) state;
  strcpy (path + strlen (path) - 6, "XXXXXX");
  fd = mkstemp (path);
  if (fd == -1)
    return -1;
  memset (&fake, 0, sizeof fake);
  fake.fd = fd;
  fake.minimum = 1;
  fake.maximum = UINT32_MAX;
  fake.write = fake.flush = 1;
  fake.zero = NBDKIT_ZERO_NATIVE;
  fake.cache = NBDKIT_CACHE_NATIVE;
  fake.trim = fake.fast_zero = fake.extents = 1;
  fake.fua = NBDKIT_FUA_NATIVE;
  fake.first_size = -1;
  keep_reports ();
  return ftruncate (fake.fd, MiB);
}

static int
teardown (void **state)
{
  (void) state;
  close (fd);
  unlink (path);
  return fake.nr_open == 0 && nr_extents_lists == 0 ? 0 : -1;
}

static struct container *
open_fake (bool readonly, bool one_at_a_time)
{
  const struct container_next_options options = {
    .backend = (nbdkit_backend *) &fake,
    .readonly = readonly,
    .serialize = one_at_a_time,
    .fd = -1,
  };

  return container_open_next (&options);
}

/* A plugin whose bytes are the guest's disk. */
static struct container *
open_disk (bool readonly)
{
  const struct container_next_options options = {
    .backend = (nbdkit_backend *) &fake,
    .readonly = readonly,
    .fd = fd,
    .path = path,
    .same_bytes = true,
    .is_disk = true,
  };

  return container_open_next (&options);
}

/* Over a file that is known, and with growth if it can be written. */
static struct container *
open_file (bool readonly, bool one_at_a_time)
{
  const struct container_next_options options = {
    .backend = (nbdkit_backend *) &fake,
    .readonly = readonly,
    .serialize = one_at_a_time,
    .fd = fd,
    .path = path,
    .same_bytes = true,
  };
  struct container *c = container_open_next (&options);

  if (c != NULL)
    container_next_set_growth (c, readonly ? "it is read-only" : NULL);
  return c;
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
  assert_true (c->abilities.is_rotational);
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
  assert_int_equal (current_context ((struct next *) c)->max_data_bytes,
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
  static const uint32_t blocks[][2] = {
    { 3, UINT32_MAX }, { 128 * 1024, UINT32_MAX }, { 4096, 512 },
  };

  (void) state;
  for (size_t i = 0; i < sizeof blocks / sizeof blocks[0]; ++i) {
    nr_reports = 0;
    fake.minimum = blocks[i][0];
    fake.maximum = blocks[i][1];
    assert_null (open_fake (false, false));
    assert_int_equal (nr_reports, 1);
    assert_non_null (strstr (last_report, "blocks of"));
    assert_int_equal (fake.nr_open, 0);
  }
  fake.minimum = 1;
  fake.maximum = UINT32_MAX;
  fake.write = -1;
  assert_null (open_fake (false, false));
  assert_int_equal (fake.nr_open, 0);
  fake.fail_open = true;
  assert_null (open_fake (false, false));
}

static void
test_growth (void **state)
{
  struct container *c = open_file (false, false);
  uint64_t size;
  char buf[3] = { 'a', 'b', 'c' };

  (void) state;
  assert_int_equal (container_pwrite (c, buf, 3, MiB - 1), 0);
  size = container_size (c);
  assert_int_equal (size, file_size ());
  assert_int_equal (size, 17 * MiB);
  assert_int_equal (fake.nr_opened, 2);

  /* Within the step nothing is opened again. */
  assert_int_equal (container_pwrite (c, buf, 3, size - 3), 0);
  assert_int_equal (fake.nr_opened, 2);
  /* Steps are an eighth, between 16 MiB and 1 GiB. */
  assert_int_equal (container_reserve (c, 800 * MiB), 0);
  assert_int_equal (container_size (c), 800 * MiB);
  assert_int_equal (container_reserve (c, 800 * MiB + 1), 0);
  assert_int_equal (container_size (c), 900 * MiB);
  assert_int_equal (fake.nr_opened, 4);
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

/* Contexts that no request is inside of any more are closed. */
static void
test_old_contexts (void **state)
{
  for (int serial = 0; serial <= 1; ++serial) {
    struct container *c = open_file (false, serial);

    (void) state;
    for (unsigned i = 1; i <= 300; ++i) {
      assert_int_equal (container_pwrite (c, "x", 1, i * 64 * MiB), 0);
      assert_in_range (fake.nr_open, 1, 3);
    }
    assert_true (fake.nr_opened > 15);
    assert_int_equal (container_flush (c), 0);
    assert_int_equal (container_pwrite (c, "x", 1, 0), 0);
    assert_int_equal (container_flush (c), 0);
    assert_int_equal (fake.nr_open, 1);
    assert_int_equal (container_truncate (c, MiB), 0);
    container_close (c);
    assert_int_equal (fake.nr_open, 0);
    assert_int_equal (fake.nr_finalized, fake.nr_opened);
  }
}

static void *
read_one (void *opaque)
{
  char byte = 1;

  return container_pread (opaque, &byte, 1, 5) == 0 && byte == 7
    ? NULL : opaque;
}

/* But not one that a request is inside of. */
static void
test_context_in_use (void **state)
{
  struct container *c = open_file (false, false);
  const struct timespec moment = { .tv_nsec = 100000 };
  pthread_t thread;
  void *failed;

  (void) state;
  assert_int_equal (container_pwrite (c, "\7", 1, 5), 0);
  atomic_store (&fake.hold_reads, true);
  assert_int_equal (pthread_create (&thread, NULL, read_one, c), 0);
  while (atomic_load (&fake.inside) == 0)
    nanosleep (&moment, NULL);
  for (unsigned i = 1; i <= 20; ++i) {
    assert_int_equal (container_pwrite (c, "x", 1, i * 200 * MiB), 0);
    assert_int_equal (container_flush (c), 0);
  }
  assert_true (fake.nr_open >= 2);
  assert_true (fake.nr_finalized == 0);

  atomic_store (&fake.hold_reads, false);
  assert_int_equal (pthread_join (thread, &failed), 0);
  assert_null (failed);
  for (unsigned i = 0; i < 3; ++i) {
    assert_int_equal (container_pwrite (c, "x", 1, 0), 0);
    assert_int_equal (container_flush (c), 0);
  }
  assert_int_equal (fake.nr_open, 1);
  container_close (c);
}

/* A file of 1 MiB at a path that is not there, of a's. */
static int
make_other (const char *at)
{
  const int other = open (at, O_RDWR | O_CREAT | O_EXCL, 0600);

  assert_true (other >= 0);
  assert_int_equal (ftruncate (other, MiB), 0);
  return other;
}

/* The name leads to no file, or to another one: what is there is served
 * on, and that it cannot grow is said.
 */
static void
test_name_has_moved (void **state)
{
  char away[sizeof path + 5];

  (void) state;
  snprintf (away, sizeof away, "%s.away", path);
  for (int replaced = 0; replaced <= 1; ++replaced) {
    struct container *c = open_file (false, false);
    int other = -1;

    assert_int_equal (container_pwrite (c, "x", 1, MiB), 0);
    nr_reports = 0;
    assert_int_equal (rename (path, away), 0);
    if (replaced)
      other = make_other (path);
    for (int i = 0; i < 3; ++i) {
      errno = 0;
      assert_int_equal (container_pwrite (c, "y", 1, 17 * MiB), -1);
      assert_int_equal (errno, ENOSPC);
    }
    assert_int_equal (nr_reports, 3);
    assert_non_null (strstr (last_report, path));
    assert_int_equal (file_size (), 17 * MiB);
    assert_int_equal (fake.nr_open, 2);
    assert_int_equal (container_pwrite (c, "z", 1, MiB - 1), 0);
    assert_int_equal (container_flush (c), 0);

    /* And it grows again when the name is back. */
    assert_int_equal (rename (away, path), 0);
    assert_int_equal (container_pwrite (c, "y", 1, 17 * MiB), 0);
    if (other != -1) {
      struct stat statbuf;

      assert_int_equal (fstat (other, &statbuf), 0);
      assert_int_equal (statbuf.st_size, MiB);
      assert_int_equal (statbuf.st_blocks, 0);
      close (other);
    }
    assert_int_equal (container_truncate (c, MiB), 0);
    container_close (c);
  }
}

/* The name is in place when it is looked at, and yet the plugin opens
 * another file.
 */
static void
test_plugin_opens_another_file (void **state)
{
  struct container *c = open_file (false, false);
  struct stat statbuf;
  FILE *other = tmpfile ();

  (void) state;
  fake.opens = fileno (other);
  assert_int_equal (ftruncate (fake.opens, 100 * MiB), 0);
  errno = 0;
  assert_int_equal (container_pwrite (c, "y", 1, MiB), -1);
  assert_int_equal (errno, ENOSPC);
  assert_int_equal (nr_reports, 1);
  assert_non_null (strstr (last_report, "no longer leads"));
  assert_int_equal (fake.nr_open, 1);
  assert_int_equal (file_size (), MiB);
  assert_int_equal (container_pwrite (c, "y", 1, 5), 0);
  container_close (c);

  /* At the start it is an error, if the name leads elsewhere. */
  nr_reports = 0;
  c = open_file (false, false);
  assert_int_equal (fake.nr_open, 1);
  container_close (c);
  assert_int_equal (unlink (path), 0);
  assert_null (open_file (false, false));
  assert_int_equal (nr_reports, 1);
  assert_non_null (strstr (last_report, "renamed or replaced"));
  assert_int_equal (fstat (fake.opens, &statbuf), 0);
  assert_int_equal (statbuf.st_blocks, 0);
  fclose (other);
}

static void
test_cannot_grow (void **state)
{
  struct container *c = open_fake (false, false);

  (void) state;
  container_next_set_growth (c, "of the moon");
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
  c = open_file (false, false);
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
  struct container *c = open_file (false, false);

  (void) state;
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
  struct container *c = open_file (false, false);

  (void) state;
  assert_int_equal (ftruncate (fake.fd, 100 * MiB), 0);
  assert_int_equal (container_reserve (c, 2 * MiB), 0);
  assert_int_equal (file_size (), 100 * MiB);
  assert_int_equal (container_size (c), 100 * MiB);
  container_close (c);
}

/* Random requests, of any range, and a model of what is there. */
static void
random_changes (struct container *c, uint8_t *model, unsigned size,
                unsigned rounds)
{
  uint8_t *buf = malloc (size);
  static unsigned seed = 1;

  for (unsigned i = 0; i < rounds; ++i) {
    const unsigned offset = rand_r (&seed) % size;
    const unsigned most = min_u64 (rand_r (&seed) % 2 ? 20000 : 600,
                                   size - offset);
    const unsigned count = 1 + rand_r (&seed) % most;

    switch (rand_r (&seed) % 4) {
    case 0:
      memset (buf, i, count);
      assert_int_equal (container_pwrite (c, buf, count, offset), 0);
      memset (model + offset, i, count);
      break;
    case 1:
      assert_int_equal (container_zero (c, count, offset, i & 1), 0);
      memset (model + offset, 0, count);
      break;
    case 2:
      assert_int_equal (container_cache (c, count, offset), 0);
      break;
    default:
      assert_int_equal (container_pread (c, buf, count, offset), 0);
      assert_memory_equal (buf, model + offset, count);
    }
  }
  free (buf);
}

/* Of the container, beyond its end, and of the file. */
static void
check_model (struct container *c, const uint8_t *model, unsigned size)
{
  uint8_t *buf = malloc (size + 10000);

  assert_int_equal (container_pread (c, buf, size + 10000, 0), 0);
  assert_memory_equal (buf, model, size);
  for (unsigned i = 0; i < 10000; ++i)
    assert_int_equal (buf[size + i], 0);
  memset (buf, 0, size);
  assert_true (pread (fd, buf, size, 0) > 0);
  assert_memory_equal (buf, model, size);
  free (buf);
}

/* A plugin that takes whole blocks only, and a filter that cuts the size
 * to them: of a file that has a part of one at its end.
 */
static void
test_blocks (void **state)
{
  static const struct { uint32_t minimum, cut; } rows[] = {
    { 512, 0 }, { 4096, 0 }, { 65536, 0 }, { 1, 512 }, { 1, 4096 },
    { 1, 65536 }, { 4096, 4096 }, { 512, 4096 },
  };
  const unsigned size = 3 * 65536 + 5000 + 8;
  uint8_t *model = malloc (size);

  (void) state;
  for (size_t i = 0; i < sizeof rows / sizeof rows[0]; ++i) {
    struct container *c;

    memset (model, i + 1, size);
    assert_int_equal (ftruncate (fd, 0), 0);
    assert_int_equal (pwrite (fd, model, size, 0), size);
    fake.minimum = rows[i].minimum;
    fake.cut = rows[i].cut;

    /* For a reader the file stays what it is. */
    c = open_file (true, false);
    assert_int_equal (container_size (c), size);
    check_model (c, model, size);
    container_close (c);
    assert_int_equal (file_size (), size);

    c = open_file (false, false);
    assert_int_equal (container_size (c), size);
    check_model (c, model, size);
    random_changes (c, model, size, 300);
    assert_int_equal (container_pwrite (c, "end", 3, size - 3), 0);
    memcpy (model + size - 3, "end", 3);
    check_model (c, model, size);
    random_changes (c, model, size, 100);
    check_model (c, model, size);
    assert_int_equal (container_truncate (c, 0), 0);
    assert_int_equal (file_size (), size);
    container_close (c);
    assert_int_equal (nr_reports, 0);
  }
  free (model);
}

/* The same where no file is known: the tail is read as it can be, and
 * cannot be written.
 */
static void
test_blocks_without_file (void **state)
{
  const unsigned size = 3 * 4096 + 8;
  uint8_t *model = malloc (size), *buf = malloc (size);
  struct container *c;

  (void) state;
  memset (model, 9, size);
  assert_int_equal (ftruncate (fd, 0), 0);
  assert_int_equal (pwrite (fd, model, size, 0), size);
  fake.minimum = 4096;
  assert_null (open_fake (false, false));
  assert_int_equal (nr_reports, 1);
  assert_non_null (strstr (last_report, "its last 8 bytes"));

  assert_int_equal (ftruncate (fd, 3 * 4096), 0);
  c = open_fake (false, false);
  assert_int_equal (container_size (c), 3 * 4096);
  random_changes (c, model, 3 * 4096, 300);
  check_model (c, model, 3 * 4096);
  container_close (c);
  free (model);
  free (buf);
}

/* Zeroes that the storage wants to be aligned are asked for aligned, once
 * that is known, and the rest is written.
 */
static void
test_zero_alignment (void **state)
{
  static const uint32_t rows[] = { 512, 4096, 65536, 1 << 20 };
  const unsigned size = 4 * MiB;
  uint8_t *model = malloc (size);

  (void) state;
  for (size_t i = 0; i < sizeof rows / sizeof rows[0]; ++i) {
    struct container *c;

    memset (model, i + 1, size);
    assert_int_equal (pwrite (fd, model, size, 0), size);
    fake.zero_block = rows[i];
    fake.nr_refused_zeroes = fake.nr_zeroes = 0;
    c = open_fake (false, false);
    assert_int_equal (container_zero (c, 3 * MiB, 100, false), 0);
    memset (model + 100, 0, 3 * MiB);
    check_model (c, model, size);
    random_changes (c, model, size, 200);
    check_model (c, model, size);
    assert_in_range (fake.nr_refused_zeroes, 1, 3);
    assert_int_equal (fake.nr_zeroes > 0, rows[i] <= 65536);
    container_close (c);
  }
  free (model);
}

/* Threads that write parts of the same blocks, each its own bytes, by
 * requests of all kinds; now and then one writes all that is its own.
 */
#define PART 200
#define PARTS 64

static void *
write_parts (void *opaque)
{
  struct container *c = opaque;
  static atomic_int next_id;
  const unsigned id = next_id++ % 4;
  uint8_t part[PART], got[PART];

  for (unsigned i = 0; i < 100; ++i) {
    const unsigned at = (i % PARTS * 4 + id) * PART;
    int r;

    memset (part, i % 7 == 0 ? 0 : i, PART);
    r = i % 7 == 0 ? container_zero (c, PART, at, false)
      : container_pwrite (c, part, PART, at);
    if (r == -1 || container_pread (c, got, PART, at) == -1 ||
        memcmp (part, got, PART) != 0)
      return c;
  }
  return NULL;
}

/* And writes of whole blocks, which no part that is written at the same
 * time may bring back the old bytes of.
 */
static void *
write_blocks (void *opaque)
{
  struct container *c = opaque;
  uint8_t block[4096], got[4096];
  const unsigned at = 20 * 4096;

  for (unsigned i = 0; i < 100; ++i) {
    memset (block, i, sizeof block);
    if (container_pwrite (c, block, sizeof block, at) == -1 ||
        container_pread (c, got, sizeof got, at) == -1 ||
        memcmp (block + 4, got + 4, sizeof block - 4) != 0)
      return c;
  }
  return NULL;
}

static void *
write_in_block (void *opaque)
{
  for (unsigned i = 0; i < 100; ++i)
    if (container_pwrite (opaque, "abcd", 4, 20 * 4096) == -1)
      return opaque;
  return NULL;
}

static void
test_blocks_threads (void **state)
{
  static void *(*const work[]) (void *) = {
    write_parts, write_parts, write_parts, write_parts, write_blocks,
    write_in_block,
  };
  pthread_t threads[6];
  struct container *c;
  void *failed;

  (void) state;
  fake.minimum = 4096;
  c = open_file (false, false);
  for (unsigned i = 0; i < 6; ++i)
    assert_int_equal (pthread_create (&threads[i], NULL, work[i], c), 0);
  for (unsigned i = 0; i < 6; ++i) {
    assert_int_equal (pthread_join (threads[i], &failed), 0);
    assert_null (failed);
  }
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
    struct container *c = open_file (false, serial);

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

/* The size of a disk is the plugin's, and stays so. */
static void
test_disk_size (void **state)
{
  static const struct { uint64_t size; uint32_t minimum, cut; } rows[] = {
    { 0, 1, 0 }, { 1, 1, 0 }, { 511, 1, 0 }, { 513, 1, 0 }, { MiB - 1, 1, 0 },
    { 3 * 4096, 4096, 0 }, { 3 * 4096 + 8, 1, 4096 },
  };
  struct container *c;

  (void) state;
  for (size_t i = 0; i < sizeof rows / sizeof rows[0]; ++i) {
    const uint64_t size = rows[i].cut == 0 ? rows[i].size
      : round_down (rows[i].size, rows[i].cut);

    assert_int_equal (ftruncate (fd, rows[i].size), 0);
    fake.minimum = rows[i].minimum;
    fake.cut = rows[i].cut;
    c = open_disk (false);
    assert_non_null (c);
    assert_int_equal (container_size (c), size);
    if (size > 0) {
      char byte = 0;

      assert_int_equal (container_pwrite (c, "e", 1, size - 1), 0);
      assert_int_equal (container_pread (c, &byte, 1, size - 1), 0);
      assert_int_equal (byte, 'e');
    }
    nr_reports = 0;
    errno = 0;
    assert_int_equal (container_pwrite (c, "xx", 2, size - (size > 0)), -1);
    assert_int_equal (errno, ENOSPC);
    errno = 0;
    assert_int_equal (container_reserve (c, size + 1), -1);
    assert_int_equal (errno, ENOSPC);
    assert_int_equal (nr_reports, 2);
    assert_non_null (strstr (last_report, "it is a disk"));
    assert_int_equal (container_truncate (c, 0), 0);
    assert_int_equal (container_size (c), size);
    assert_int_equal (file_size (), rows[i].size);
    assert_int_equal (fake.nr_open, 1);
    container_close (c);
  }

  /* The last block is cut off by the end: a plugin may take it or not. */
  fake.minimum = 4096;
  fake.cut = 0;
  assert_int_equal (ftruncate (fd, 3 * 4096 + 8), 0);
  for (int takes = 0; takes <= 1; ++takes) {
    char bytes[8] = "";

    fake.takes_parts = takes;
    c = open_disk (false);
    assert_non_null (c);
    assert_int_equal (container_size (c), 3 * 4096 + 8);
    assert_int_equal (container_pwrite (c, "first", 5, 3), 0);
    assert_int_equal (container_pread (c, bytes, 5, 3), 0);
    assert_memory_equal (bytes, "first", 5);
    if (takes) {
      assert_int_equal (container_pwrite (c, "last", 4, 3 * 4096 + 4), 0);
      assert_int_equal (container_pread (c, bytes, 8, 3 * 4096), 0);
      assert_memory_equal (bytes, "\0\0\0\0last", 8);
      assert_int_equal (container_zero (c, 8, 3 * 4096, true), 0);
      assert_int_equal (container_pread (c, bytes, 8, 3 * 4096), 0);
      assert_memory_equal (bytes, "\0\0\0\0\0\0\0\0", 8);
    }
    else {
      assert_int_equal (container_pwrite (c, "last", 4, 3 * 4096 + 4), -1);
      assert_int_equal (errno, EINVAL);
      assert_int_equal (container_pread (c, bytes, 8, 3 * 4096), -1);
      assert_int_equal (errno, EINVAL);
    }
    assert_int_equal (file_size (), 3 * 4096 + 8);
    container_close (c);
  }
}

/* What a disk can do is what the plugin says it can. */
static void
test_disk_abilities (void **state)
{
  (void) state;
  for (unsigned bits = 0; bits < 32; ++bits) {
    struct container *c;
    uint64_t bytes;

    fake.zero = bits & 1 ? NBDKIT_ZERO_NATIVE : NBDKIT_ZERO_NONE;
    fake.fast_zero = (bits & 2) != 0;
    fake.trim = (bits & 4) != 0;
    fake.flush = (bits & 8) != 0;
    fake.cache = bits & 16 ? NBDKIT_CACHE_NATIVE : NBDKIT_CACHE_EMULATE;
    c = open_disk (false);
    assert_non_null (c);
    assert_int_equal (c->abilities.zero, (bits & 1) != 0);
    assert_int_equal (c->abilities.zero_fast, (bits & 3) == 3);
    assert_int_equal (c->abilities.trim, (bits & 4) != 0);
    assert_int_equal (c->abilities.flush, (bits & 8) != 0);
    assert_int_equal (c->abilities.cache, (bits & 16) != 0);
    assert_true (c->abilities.is_rotational);
    assert_int_equal (c->abilities.preferred_bytes, 4096);

    /* Whatever it cannot do may be asked for. */
    assert_int_equal (container_zero (c, 100, 5, true), 0);
    assert_int_equal (container_zero_fast (c, 100, 5, true),
                      (bits & 3) == 3 ? 0 : 1);
    assert_int_equal (container_trim (c, 100, 5), 0);
    assert_int_equal (container_cache (c, 100, 5), 0);
    assert_int_equal (container_flush (c), 0);
    assert_int_equal (fake.nr_trims, (bits & 4) != 0);
    errno = 0;
    assert_int_equal (container_allocated (c, &bytes), -1);
    assert_int_equal (errno, ENOTSUP);
    container_close (c);
    fake.nr_trims = 0;
  }
}

static void
test_disk_trim (void **state)
{
  struct container *c;
  uint8_t *buf = malloc (4 * MiB);

  (void) state;
  fake.minimum = 4096;
  fake.maximum = MiB;
  assert_int_equal (ftruncate (fd, 4 * MiB), 0);
  c = open_disk (false);

  /* Whole blocks, in parts of at most the maximum. */
  assert_int_equal (container_trim (c, 3 * MiB, 4095), 0);
  assert_int_equal (fake.nr_trims, 3);
  assert_int_equal (fake.largest_trim, MiB);
  assert_int_equal (container_pread (c, buf, 4 * MiB, 0), 0);
  for (unsigned i = 0; i < 4 * MiB; ++i)
    assert_int_equal (buf[i], i < 4096 || i >= 3 * MiB ? 0 : TRIMMED);

  /* No whole block; nothing beyond the end. */
  fake.nr_trims = 0;
  assert_int_equal (container_trim (c, 8190, 4097), 0);
  assert_int_equal (container_trim (c, 4095, 0), 0);
  assert_int_equal (container_trim (c, 4095, 4096), 0);
  assert_int_equal (container_trim (c, 5 * MiB, 4 * MiB), 0);
  assert_int_equal (container_trim (c, UINT64_MAX, UINT64_MAX), 0);
  assert_int_equal (fake.nr_trims, 0);
  assert_int_equal (container_trim (c, UINT64_MAX, 4 * MiB - 5000), 0);
  assert_int_equal (fake.nr_trims, 1);
  assert_int_equal (file_size (), 4 * MiB);

  fake.err = EIO;
  errno = 0;
  assert_int_equal (container_trim (c, MiB, 0), -1);
  assert_int_equal (errno, EIO);
  fake.err = 0;
  container_close (c);

  /* No plugin that can: nothing happens. */
  fake.trim = 0;
  fake.nr_trims = fake.nr_zeroes = fake.nr_pwrites = 0;
  c = open_disk (false);
  assert_int_equal (container_trim (c, 4 * MiB, 0), 0);
  assert_int_equal (fake.nr_trims + fake.nr_zeroes + fake.nr_pwrites, 0);
  container_close (c);

  c = open_disk (true);
  errno = 0;
  assert_int_equal (container_trim (c, 4096, 0), -1);
  assert_int_equal (errno, EROFS);
  errno = 0;
  assert_int_equal (container_zero_fast (c, 4096, 0, true), -1);
  assert_int_equal (errno, EROFS);
  errno = 0;
  assert_int_equal (container_pwrite_durable (c, "x", 1, 0), -1);
  assert_int_equal (errno, EROFS);
  container_close (c);
  free (buf);
}

static void
test_disk_zero_fast (void **state)
{
  static const struct { int err, result; } rows[] = {
    { ENOTSUP, 1 }, { EOPNOTSUPP, 1 }, { EIO, -1 }, { ENOSPC, -1 },
    { EINVAL, -1 },
  };
  struct container *c;
  char buf[8192], expected[8192];

  (void) state;
  fake.minimum = 4096;
  fake.maximum = MiB;
  assert_int_equal (ftruncate (fd, 4 * MiB), 0);
  c = open_disk (false);
  memset (expected, 3, sizeof expected);
  assert_int_equal (container_pwrite (c, expected, 8192, 0), 0);

  for (int punch = 0; punch <= 1; ++punch) {
    assert_int_equal (container_zero_fast (c, 4096, 4096, punch), 0);
    assert_int_equal (fake.zero_flags, NBDKIT_FLAG_FAST_ZERO |
                      (punch ? NBDKIT_FLAG_MAY_TRIM : 0));
  }
  memset (expected + 4096, 0, 4096);
  assert_int_equal (container_pread (c, buf, 8192, 0), 0);
  assert_memory_equal (buf, expected, 8192);

  /* In parts, and up to the end. */
  fake.nr_zeroes = fake.largest_zero = 0;
  assert_int_equal (container_zero_fast (c, 3 * MiB, 4096, true), 0);
  assert_int_equal (fake.nr_zeroes, 3);
  assert_int_equal (fake.largest_zero, MiB);
  assert_int_equal (container_zero_fast (c, UINT64_MAX, 3 * MiB, true), 0);
  assert_int_equal (fake.nr_zeroes, 4);
  assert_int_equal (container_zero_fast (c, 4096, 4 * MiB, true), 0);
  assert_int_equal (fake.nr_zeroes, 4);

  /* Parts of blocks are not asked for. */
  assert_int_equal (container_zero_fast (c, 4096, 1, true), 1);
  assert_int_equal (container_zero_fast (c, 4095, 0, true), 1);
  assert_int_equal (container_zero_fast (c, 8192, 8191, true), 1);
  assert_int_equal (fake.nr_zeroes, 4);
  assert_int_equal (container_pread (c, buf, 8192, 0), 0);
  assert_memory_equal (buf, expected, 8192);

  for (size_t i = 0; i < sizeof rows / sizeof rows[0]; ++i) {
    fake.fast_err = rows[i].err;
    fake.nr_fast = 0;
    errno = 0;
    assert_int_equal (container_zero_fast (c, 4096, 0, true), rows[i].result);
    if (rows[i].result == -1)
      assert_int_equal (errno, rows[i].err);
    assert_int_equal (container_pread (c, buf, 8192, 0), 0);
    assert_memory_equal (buf, expected, 8192);
  }
  assert_int_equal (fake.nr_pwrites, 1);
  container_close (c);

  fake.fast_zero = 0;
  fake.nr_zeroes = 0;
  c = open_disk (false);
  assert_int_equal (container_zero_fast (c, 4096, 0, true), 1);
  assert_int_equal (fake.nr_zeroes, 0);
  container_close (c);
}

/* A fast zero that is refused after a part of it was done is a change that a
 * flush must not leave out.
 */
static void
test_disk_zero_fast_in_part (void **state)
{
  struct container *c;
  char buf[1] = { 0 };

  (void) state;
  fake.maximum = MiB;
  assert_int_equal (ftruncate (fd, 4 * MiB), 0);
  c = open_disk (false);
  assert_int_equal (container_pwrite (c, "x", 1, 0), 0);
  assert_int_equal (container_flush (c), 0);
  assert_int_equal (fake.nr_flushes, 1);
  fake.fast_err = ENOTSUP;
  fake.nr_fast = 2;
  assert_int_equal (container_zero_fast (c, 4 * MiB, 0, true), 1);
  assert_int_equal (fake.nr_zeroes, 2);
  assert_int_equal (container_pread (c, buf, 1, 0), 0);
  assert_int_equal (buf[0], 0);
  assert_int_equal (container_flush (c), 0);
  assert_int_equal (fake.nr_flushes, 2);
  container_close (c);
}

/* Durable by itself only if the plugin has FUA, not if nbdkit would flush. */
static void
test_disk_durable (void **state)
{
  static const int rows[] = {
    NBDKIT_FUA_NONE, NBDKIT_FUA_EMULATE, NBDKIT_FUA_NATIVE,
  };
  struct container *c;
  char *data = malloc (3 * MiB), byte;

  (void) state;
  memset (data, 'd', 3 * MiB);
  fake.maximum = MiB;
  assert_int_equal (ftruncate (fd, 4 * MiB), 0);
  for (size_t i = 0; i < sizeof rows / sizeof rows[0]; ++i) {
    const bool native = rows[i] == NBDKIT_FUA_NATIVE;

    fake.fua = rows[i];
    c = open_disk (false);
    data[0] = '0' + i;
    assert_int_equal (container_pwrite_durable (c, data, 10, 100), !native);
    assert_int_equal (fake.pwrite_flags, native ? NBDKIT_FLAG_FUA : 0);
    assert_int_equal (container_pread (c, &byte, 1, 100), 0);
    assert_int_equal (byte, data[0]);
    assert_int_equal (fake.nr_flushes, 0);

    /* In parts, each of them durable. */
    fake.nr_pwrites = 0;
    assert_int_equal (container_pwrite_durable (c, data, 3 * MiB, 7),
                      !native);
    assert_int_equal (fake.nr_pwrites, 3);
    assert_int_equal (fake.pwrite_flags, native ? NBDKIT_FLAG_FUA : 0);

    fake.err = EIO;
    errno = 0;
    assert_int_equal (container_pwrite_durable (c, data, 10, 100), -1);
    assert_int_equal (errno, EIO);
    fake.err = 0;
    assert_int_equal (container_pwrite_durable (c, "", 0, 100), 1);
    errno = 0;
    assert_int_equal (container_pwrite_durable (c, data, 2, 4 * MiB - 1), -1);
    assert_int_equal (errno, ENOSPC);
    container_close (c);
  }

  /* Parts of blocks have to be read first, and others wait meanwhile. */
  fake.minimum = 4096;
  c = open_disk (false);
  assert_int_equal (container_pwrite_durable (c, data, 4096, 4096), 1);
  assert_int_equal (container_pwrite_durable (c, data, 1, 100), 1);
  assert_int_equal (fake.pwrite_flags, 0);
  container_close (c);

  /* An image's writes are made durable by its flushes alone. */
  fake.minimum = 1;
  c = open_file (false, false);
  assert_int_equal (container_pwrite_durable (c, data, 10, 100), 1);
  assert_int_equal (fake.pwrite_flags, 0);
  container_close (c);
  free (data);
}

#define assert_extent(c, at, count, l, f)                               \
  do {                                                                  \
    uint64_t length_ = 0;                                               \
    unsigned flags_ = 99;                                               \
                                                                        \
    assert_int_equal (container_extent (c, at, count, &length_, &flags_), \
                      0);                                               \
    assert_int_equal (length_, l);                                      \
    assert_int_equal (flags_, f);                                       \
  } while (0)

static void
test_disk_extents (void **state)
{
  const unsigned none = CONTAINER_HOLE | CONTAINER_ZERO;
  struct container *c;
  uint64_t length;
  unsigned flags;

  (void) state;
  fake.maximum = MiB;
  fake.extent[0].length = 3 * MiB / 2;
  fake.extent[1].length = 3 * MiB / 2;
  fake.extent[1].type = NBDKIT_EXTENT_ZERO;
  fake.extent[2].length = MiB;
  fake.extent[2].type = NBDKIT_EXTENT_HOLE | NBDKIT_EXTENT_ZERO;
  assert_int_equal (ftruncate (fd, 4 * MiB), 0);
  c = open_disk (false);

  /* The plugin's, clipped to what was asked for, and asked for by the
   * maximum at once.
   */
  assert_extent (c, 0, 100, 100, 0);
  assert_extent (c, 0, 4 * MiB, MiB, 0);
  assert_int_equal (fake.largest_extents, MiB);
  assert_extent (c, MiB, 3 * MiB, MiB / 2, 0);
  assert_extent (c, 3 * MiB / 2, 1, 1, CONTAINER_ZERO);
  assert_extent (c, 5 * MiB / 2, MiB, MiB / 2, CONTAINER_ZERO);
  assert_extent (c, 3 * MiB, MiB, MiB, none);
  assert_extent (c, 3 * MiB + 5, MiB, MiB - 5, none);
  assert_extent (c, 4 * MiB - 1, 1, 1, none);
  assert_extent (c, 4 * MiB, 7, 7, none);

  fake.err = EIO;
  errno = 0;
  assert_int_equal (container_extent (c, 0, 100, &length, &flags), -1);
  assert_int_equal (errno, EIO);
  fake.err = 0;
  container_close (c);

  /* Blocks that the request covers in part are data. */
  fake.minimum = 4096;
  c = open_disk (false);
  assert_extent (c, 3 * MiB, MiB, MiB, none);
  assert_extent (c, 3 * MiB, 4095, 4095, 0);
  assert_extent (c, 3 * MiB, 4097, 4096, none);
  assert_extent (c, 3 * MiB + 4096, 1, 1, 0);
  assert_extent (c, 3 * MiB + 1, MiB, 4095, 0);
  assert_extent (c, 3 * MiB + 1, 10, 10, 0);
  assert_extent (c, 3 * MiB + 4095, 4097, 1, 0);
  container_close (c);
  fake.minimum = 1;

  /* For all of nbdkit's largest request, without a limit of the plugin's. */
  fake.maximum = UINT32_MAX;
  assert_int_equal (ftruncate (fd, 5000 * MiB), 0);
  fake.extent[2].length = 4997 * MiB;
  c = open_disk (true);
  assert_extent (c, 3 * MiB, 4997 * MiB, 1024 * MiB, none);
  container_close (c);

  /* What is not known is data. */
  fake.extents = 0;
  fake.nr_extents = 0;
  c = open_disk (false);
  assert_extent (c, 3 * MiB, MiB, MiB, 0);
  assert_int_equal (fake.nr_extents, 0);
  container_close (c);
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
    TEST (test_old_contexts),
    TEST (test_context_in_use),
    TEST (test_name_has_moved),
    TEST (test_plugin_opens_another_file),
    TEST (test_cannot_grow),
    TEST (test_plugin_does_not_see_growth),
    TEST (test_growth_that_fails_for_once),
    TEST (test_growth_never_cuts),
    TEST (test_blocks),
    TEST (test_blocks_without_file),
    TEST (test_zero_alignment),
    TEST (test_blocks_threads),
    TEST (test_disk_size),
    TEST (test_disk_abilities),
    TEST (test_disk_trim),
    TEST (test_disk_zero_fast),
    TEST (test_disk_zero_fast_in_part),
    TEST (test_disk_durable),
    TEST (test_disk_extents),
    TEST (test_threads),
  };

  return cmocka_run_group_tests (tests, NULL, NULL);
}
