/* nbdkit-dirty-bitmap-filter
 * SPDX-License-Identifier: BSD-3-Clause
 * Copyright the nbdkit-dirty-bitmap-filter authors
 */

/* The door of the container room, and the implementations that need no
 * nbdkit.
 */

#include <config.h>

#include <errno.h>
#include <fcntl.h>
#include <linux/falloc.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/uio.h>
#include <unistd.h>

#include <cmocka.h>

#include "common/bytes.h"
#include "container/container.h"

#define MiB ((uint64_t) 1 << 20)

static void
assert_bytes (struct container *c, uint64_t offset, size_t count,
              unsigned char value)
{
  unsigned char *buf = malloc (count);
  size_t i;

  assert_non_null (buf);
  memset (buf, ~value, count);
  assert_int_equal (container_pread (c, buf, count, offset), 0);
  for (i = 0; i < count; ++i)
    assert_int_equal (buf[i], value);
  free (buf);
}

static void
fill (struct container *c, uint64_t offset, size_t count, unsigned char value)
{
  unsigned char *buf = malloc (count);

  assert_non_null (buf);
  memset (buf, value, count);
  assert_int_equal (container_pwrite (c, buf, count, offset), 0);
  free (buf);
}

static void
test_end (void **state)
{
  struct container *c = container_open_memory (MiB);

  (void) state;
  assert_int_equal (container_size (c), 0);
  assert_bytes (c, 0, 1000, 0);
  assert_bytes (c, UINT64_MAX - 1000, 1000, 0);

  fill (c, 100, 50, 7);
  assert_int_equal (container_size (c), 150);
  assert_bytes (c, 0, 100, 0);
  assert_bytes (c, 100, 50, 7);
  assert_bytes (c, 150, 5000, 0);

  /* A read across the end, and a write across the end. */
  fill (c, 140, 20, 8);
  assert_int_equal (container_size (c), 160);
  assert_bytes (c, 100, 40, 7);
  assert_bytes (c, 140, 20, 8);
  assert_bytes (c, 160, 1, 0);

  /* Writing nothing beyond the end does not grow it. */
  assert_int_equal (container_pwrite (c, "", 0, 5000), 0);
  assert_int_equal (container_size (c), 160);

  /* Nor does zeroing, whatever the range. */
  assert_int_equal (container_zero (c, UINT64_MAX, 150, false), 0);
  assert_int_equal (container_zero (c, 10, UINT64_MAX, true), 0);
  assert_int_equal (container_size (c), 160);
  assert_bytes (c, 140, 10, 8);
  assert_bytes (c, 150, 10, 0);

  assert_int_equal (container_cache (c, UINT64_MAX, 10), 0);
  assert_int_equal (container_flush (c), 0);
  container_close (c);
}

static void
test_limit (void **state)
{
  struct container *c = container_open_memory (MiB);
  char byte = 1;

  (void) state;
  assert_int_equal (container_reserve (c, MiB), 0);
  assert_int_equal (container_size (c), MiB);
  assert_int_equal (container_reserve (c, 5), 0);
  assert_int_equal (container_size (c), MiB);
  errno = 0;
  assert_int_equal (container_reserve (c, MiB + 1), -1);
  assert_int_equal (errno, ENOSPC);
  errno = 0;
  assert_int_equal (container_pwrite (c, &byte, 1, MiB), -1);
  assert_int_equal (errno, ENOSPC);
  errno = 0;
  assert_int_equal (container_pwrite (c, &byte, 1, INT64_MAX), -1);
  assert_int_equal (errno, EFBIG);
  errno = 0;
  assert_int_equal (container_pwrite (c, &byte, 1, UINT64_MAX), -1);
  assert_int_equal (errno, EFBIG);
  assert_int_equal (container_size (c), MiB);
  fill (c, MiB - 1, 1, 9);
  assert_bytes (c, MiB - 1, 1, 9);
  container_close (c);
}

static void
test_zero_and_punch (void **state)
{
  struct container *c = container_open_memory (1024 * MiB);
  int punch;

  (void) state;
  for (punch = 0; punch <= 1; ++punch) {
    fill (c, 0, MiB, 5);
    assert_int_equal (container_zero (c, 300000, 100, punch), 0);
    assert_bytes (c, 0, 100, 5);
    assert_bytes (c, 100, 300000, 0);
    assert_bytes (c, 300100, MiB - 300100, 5);
  }

  /* Far away, across leaves of the table. */
  fill (c, 1000 * MiB - 3, 7, 6);
  assert_bytes (c, 1000 * MiB - 3, 7, 6);
  fill (c, 512 * MiB - 100000, 200000, 4);
  assert_bytes (c, 512 * MiB - 100000, 200000, 4);
  assert_int_equal (container_zero (c, 1000 * MiB, 2, true), 0);
  assert_bytes (c, 2, 98, 0);
  assert_bytes (c, 512 * MiB - 100000, 200000, 0);
  assert_bytes (c, 1000 * MiB - 3, 5, 0);
  assert_bytes (c, 1000 * MiB + 2, 2, 6);
  container_close (c);
}

static void
test_truncate (void **state)
{
  struct container *c = container_open_memory (4 * MiB);

  (void) state;
  fill (c, 0, 2 * MiB, 3);
  assert_int_equal (container_truncate (c, 3 * MiB), 0);
  assert_int_equal (container_size (c), 2 * MiB);
  assert_int_equal (container_truncate (c, 1000), 0);
  assert_int_equal (container_size (c), 1000);
  assert_bytes (c, 0, 1000, 3);

  /* What grows back is zero. */
  assert_int_equal (container_reserve (c, 2 * MiB), 0);
  assert_bytes (c, 0, 1000, 3);
  assert_bytes (c, 1000, 2 * MiB - 1000, 0);
  container_close (c);
}

/* A hook that notes the last operation and fails when told to. */
struct note {
  char operation[16];
  uint64_t offset, count;
  int err;
};

static int
note_operation (void *opaque, const char *operation,
                uint64_t offset, uint64_t count)
{
  struct note *note = opaque;

  snprintf (note->operation, sizeof note->operation, "%s", operation);
  note->offset = offset;
  note->count = count;
  return note->err;
}

#define assert_note(o, off, n)                          \
  do {                                                  \
    assert_string_equal (note.operation, o);            \
    assert_int_equal (note.offset, off);                \
    assert_int_equal (note.count, n);                   \
  } while (0)

static void
test_hook (void **state)
{
  struct container *c = container_open_memory (MiB);
  struct note note = { .err = 0 };
  const struct container_memory_hook hook = { note_operation, &note };

  (void) state;
  fill (c, 0, 1000, 1);
  container_memory_set_hook (c, &hook);
  fill (c, 10, 20, 2);
  assert_note ("pwrite", 10, 20);
  assert_int_equal (container_reserve (c, 2000), 0);
  assert_note ("grow", 1000, 1000);
  assert_int_equal (container_zero (c, 5, 6, false), 0);
  assert_note ("zero", 6, 5);
  assert_int_equal (container_zero (c, 5000, 6, true), 0);
  assert_note ("punch", 6, 1994);
  assert_int_equal (container_flush (c), 0);
  assert_note ("flush", 0, 0);
  assert_int_equal (container_truncate (c, 1500), 0);
  assert_note ("truncate", 1500, 500);

  /* What fails has not happened. */
  note.err = EIO;
  errno = 0;
  assert_int_equal (container_pwrite (c, "x", 1, 0), -1);
  assert_int_equal (errno, EIO);
  assert_int_equal (container_zero (c, 6, 0, true), -1);
  assert_int_equal (container_flush (c), -1);
  assert_int_equal (container_reserve (c, 1501), -1);
  assert_int_equal (container_truncate (c, 0), -1);
  assert_int_equal (container_size (c), 1500);
  assert_bytes (c, 0, 6, 1);

  container_memory_set_hook (c, NULL);
  fill (c, 0, 1, 9);
  assert_bytes (c, 0, 1, 9);
  container_close (c);
}

/* No space, whatever the storage calls it. */
static void
test_no_space (void **state)
{
  static const int errs[][2] = {
    { ENOSPC, ENOSPC }, { EDQUOT, ENOSPC }, { EFBIG, ENOSPC }, { EIO, EIO },
  };
  struct container *c = container_open_memory (MiB);
  struct note note = { .err = 0 };
  const struct container_memory_hook hook = { note_operation, &note };

  (void) state;
  fill (c, 0, 1000, 1);
  container_memory_set_hook (c, &hook);
  for (size_t i = 0; i < sizeof errs / sizeof errs[0]; ++i) {
    note.err = errs[i][0];
    errno = 0;
    assert_int_equal (container_pwrite (c, "x", 1, 0), -1);
    assert_int_equal (errno, errs[i][1]);
    errno = 0;
    assert_int_equal (container_zero (c, 1, 0, false), -1);
    assert_int_equal (errno, errs[i][1]);
    errno = 0;
    assert_int_equal (container_pwrite (c, "x", 1, 1000), -1);
    assert_int_equal (errno, errs[i][1]);
  }
  container_close (c);
}

/* Which calls have to be followed by a barrier. */
struct barriers {
  unsigned nr;
  int err;
};

static int
count_barriers (void *opaque, const char *operation, uint64_t offset,
                uint64_t count)
{
  struct barriers *b = opaque;

  (void) offset; (void) count;
  if (strcmp (operation, "flush") == 0)
    b->nr++;
  return b->err;
}

static void
test_barriers (void **state)
{
  struct container *c = container_open_memory (MiB);
  struct barriers b = { 0 };
  const struct container_memory_hook hook = { count_barriers, &b };
  char buf[10];

  (void) state;
#define assert_needed(n)                                        \
  do {                                                          \
    b.nr = 0;                                                   \
    for (int i_ = 0; i_ < 3; ++i_)                              \
      assert_int_equal (container_flush (c), 0);                \
    assert_int_equal (b.nr, n);                                 \
  } while (0)

  /* The first one: nobody knows what was written before. */
  container_memory_set_hook (c, &hook);
  assert_needed (1);
  assert_int_equal (container_pwrite (c, "x", 1, 5000), 0);
  assert_needed (1);
  assert_int_equal (container_zero (c, 10, 10, false), 0);
  assert_needed (1);
  assert_int_equal (container_zero (c, 10, 10, true), 0);
  assert_needed (1);
  assert_int_equal (container_reserve (c, 9000), 0);
  assert_needed (1);
  assert_int_equal (container_truncate (c, 8000), 0);
  assert_needed (1);
  assert_int_equal (container_pread (c, buf, 10, 0), 0);
  assert_int_equal (container_cache (c, 10, 0), 0);
  assert_int_equal (container_reserve (c, 8000), 0);
  assert_int_equal (container_zero (c, 10, 9000, false), 0);
  assert_needed (0);
  assert_int_equal (tally_get (&c->flushes), 6);

  /* What fails may have been done. */
  b.err = EIO;
  assert_int_equal (container_pwrite (c, "x", 1, 0), -1);
  b.err = 0;
  assert_needed (1);
  b.err = EIO;
  assert_int_equal (container_zero (c, 1, 0, false), -1);
  b.err = 0;
  assert_needed (1);

  /* A flush that fails has covered nothing. */
  assert_int_equal (container_pwrite (c, "x", 1, 0), 0);
  b.err = EIO;
  b.nr = 0;
  assert_int_equal (container_flush (c), -1);
  assert_int_equal (container_flush (c), -1);
  assert_int_equal (b.nr, 2);
  b.err = 0;
  assert_needed (1);
  container_close (c);
}

/* Threads that write and flush: what was written before a flush that
 * succeeds is durable, though another's flush may be what made it so.
 * Some flushes fail, after a while.
 */
#define NR_FLUSHERS 6

struct durable {
  struct container *c;
  _Atomic uint64_t value[NR_FLUSHERS];
  atomic_uint nr;
};

static int
make_durable (void *opaque, const char *operation, uint64_t offset,
              uint64_t count)
{
  const struct timespec moment = { .tv_nsec = 30000 };
  struct durable *d = opaque;
  uint64_t value[NR_FLUSHERS];

  (void) offset; (void) count;
  if (strcmp (operation, "flush") != 0)
    return 0;
  assert_int_equal (container_pread (d->c, value, sizeof value, 0), 0);
  nanosleep (&moment, NULL);
  if (atomic_fetch_add (&d->nr, 1) % 3 == 2)
    return EIO;
  for (unsigned i = 0; i < NR_FLUSHERS; ++i)
    atomic_store (&d->value[i], value[i]);
  return 0;
}

static void *
write_and_flush (void *opaque)
{
  struct durable *d = opaque;
  static atomic_uint next_id;
  const unsigned id = next_id++;

  for (uint64_t v = 1; v <= 300; ++v) {
    if (container_pwrite (d->c, &v, sizeof v, id * sizeof v) == -1)
      return d;
    while (container_flush (d->c) == -1)
      if (v % 2 == 0)
        break;                  /* The next one is for it, too. */
    if (v % 2 == 1 && atomic_load (&d->value[id]) < v)
      return d;
  }
  return NULL;
}

static void
test_barriers_threads (void **state)
{
  struct durable d = { .c = container_open_memory (MiB) };
  const struct container_memory_hook hook = { make_durable, &d };
  pthread_t threads[NR_FLUSHERS];
  void *failed;

  (void) state;
  assert_int_equal (container_reserve (d.c, 4096), 0);
  container_memory_set_hook (d.c, &hook);
  for (int i = 0; i < NR_FLUSHERS; ++i)
    assert_int_equal (pthread_create (&threads[i], NULL, write_and_flush, &d),
                      0);
  for (int i = 0; i < NR_FLUSHERS; ++i) {
    assert_int_equal (pthread_join (threads[i], &failed), 0);
    assert_null (failed);
  }
  container_memory_set_hook (d.c, NULL);
  container_close (d.c);
}

/* Storage that takes whole blocks only: requests of any range, and what the
 * storage is asked for.
 */
static int
check_block (void *opaque, const char *operation, uint64_t offset,
             uint64_t count)
{
  const uint32_t block = *(uint32_t *) opaque;

  if (strcmp (operation, "flush") == 0 || strcmp (operation, "grow") == 0)
    return 0;
  return offset % block != 0 || count % block != 0 ? EINVAL : 0;
}

static void
test_blocks (void **state)
{
  const unsigned size = 3 * 65536 + 777;
  uint8_t *model = malloc (size), *buf = malloc (size);
  unsigned seed = 1;

  (void) state;
  for (uint32_t block = 512; block <= 65536; block *= 2) {
    const struct container_memory_hook hook = { check_block, &block };
    struct container *c = container_open_memory (MiB);

    memset (model, block / 512, size);
    assert_int_equal (container_pwrite (c, model, size, 0), 0);
    container_memory_set_hook (c, &hook);
    c->block_bytes = block;
    for (unsigned i = 0; i < 500; ++i) {
      const unsigned offset = rand_r (&seed) % size;
      const unsigned most = min_u64 (size - offset, i % 2 ? 3000 : 150000);
      const unsigned count = 1 + rand_r (&seed) % most;

      switch (i % 4) {
      case 0:
        assert_int_equal (container_zero (c, count, offset, i % 8 == 0), 0);
        memset (model + offset, 0, count);
        break;
      case 1:
        assert_int_equal (container_pread (c, buf, count, offset), 0);
        assert_memory_equal (buf, model + offset, count);
        break;
      default:
        memset (buf, i, count);
        assert_int_equal (container_pwrite (c, buf, count, offset), 0);
        memset (model + offset, i, count);
      }
    }
    assert_int_equal (container_pread (c, buf, size, 0), 0);
    assert_memory_equal (buf, model, size);
    assert_bytes (c, size, 5000, 0);
    assert_int_equal (container_size (c), size);
    container_close (c);
  }
  free (model);
  free (buf);
}

static void
test_file (void **state)
{
  FILE *fp = tmpfile ();
  struct container *c;
  char buf[100];

  (void) state;
  assert_non_null (fp);
  assert_int_equal (fputs ("hello", fp) >= 0 && fflush (fp) == 0, 1);
  c = container_open_file (fileno (fp));
  assert_non_null (c);
  assert_true (c->readonly);
  assert_int_equal (container_size (c), 5);
  memset (buf, 'x', sizeof buf);
  assert_int_equal (container_pread (c, buf, 10, 1), 0);
  assert_memory_equal (buf, "ello\0\0\0\0\0\0x", 11);

  errno = 0;
  assert_int_equal (container_pwrite (c, "x", 1, 0), -1);
  assert_int_equal (errno, EROFS);
  errno = 0;
  assert_int_equal (container_zero (c, 1, 0, false), -1);
  assert_int_equal (errno, EROFS);
  errno = 0;
  assert_int_equal (container_reserve (c, 6), -1);
  assert_int_equal (errno, EROFS);
  assert_int_equal (container_reserve (c, 5), 0);
  errno = 0;
  assert_int_equal (container_truncate (c, 0), -1);
  assert_int_equal (errno, EROFS);
  assert_int_equal (container_flush (c), 0);
  assert_int_equal (container_cache (c, 5, 0), 0);

  /* A file that somebody cuts is an error, not zeroes. */
  assert_int_equal (ftruncate (fileno (fp), 2), 0);
  errno = 0;
  assert_int_equal (container_pread (c, buf, 5, 0), -1);
  assert_int_equal (errno, EIO);
  assert_int_equal (container_pread (c, buf, 2, 0), 0);
  container_close (c);
  fclose (fp);

  errno = 0;
  assert_null (container_open_file (-1));
  assert_int_equal (errno, EBADF);
}

/* The same over a file that can be written. */
static void
test_file_writable (void **state)
{
  FILE *fp = tmpfile ();
  const int fd = fileno (fp);
  struct container *c;
  struct stat statbuf;
  int punch;

  (void) state;
  assert_non_null (fp);
  c = container_open_file_writable (fd);
  assert_non_null (c);
  assert_false (c->readonly);
  assert_int_equal (container_size (c), 0);

  fill (c, 100, 50, 7);
  assert_int_equal (container_size (c), 150);
  assert_int_equal (fstat (fd, &statbuf), 0);
  assert_int_equal (statbuf.st_size, 150);
  assert_bytes (c, 0, 100, 0);
  assert_bytes (c, 100, 50, 7);
  assert_bytes (c, 150, 50, 0);

  for (punch = 0; punch <= 1; ++punch) {
    fill (c, 0, 3 * MiB + 1, 5);
    assert_int_equal (container_zero (c, 2 * MiB + 77, 300, punch), 0);
    assert_bytes (c, 0, 300, 5);
    assert_bytes (c, 300, 2 * MiB + 77, 0);
    assert_bytes (c, 2 * MiB + 377, MiB - 376, 5);
    assert_int_equal (container_zero (c, UINT64_MAX, 3 * MiB, punch), 0);
    assert_bytes (c, 3 * MiB, 1, 0);
    assert_int_equal (container_size (c), 3 * MiB + 1);
  }

  /* Just as large as it must be, and never smaller. */
  assert_int_equal (container_reserve (c, 5 * MiB + 3), 0);
  assert_int_equal (fstat (fd, &statbuf), 0);
  assert_int_equal (statbuf.st_size, 5 * MiB + 3);
  assert_int_equal (container_truncate (c, MiB), 0);
  assert_int_equal (container_size (c), 5 * MiB + 3);
  assert_int_equal (ftruncate (fd, 8 * MiB), 0);
  assert_int_equal (container_reserve (c, 6 * MiB), 0);
  assert_int_equal (fstat (fd, &statbuf), 0);
  assert_int_equal (statbuf.st_size, 8 * MiB);

  assert_int_equal (container_cache (c, MiB, 0), 0);
  assert_int_equal (container_flush (c), 0);
  container_close (c);
  fclose (fp);
}

/* Zeroes where the file system cannot make them: a range at a time, and
 * at all.  The kernel's answer is played by fallocate, below.
 */
static int fallocate_errno, nr_fallocate;

/* Modes that a file system has not. */
enum { NO_PUNCH = 1, NO_ZERO_RANGE = 2, NO_ALLOCATE = 4 };
static unsigned lacks;

static bool
is_lacking (int mode)
{
  if (mode & FALLOC_FL_PUNCH_HOLE)
    return lacks & NO_PUNCH;
  return lacks & (mode & FALLOC_FL_ZERO_RANGE ? NO_ZERO_RANGE : NO_ALLOCATE);
}

int
fallocate (int fd, int mode, off_t offset, off_t count)
{
  nr_fallocate++;
  assert_true (mode & FALLOC_FL_KEEP_SIZE);
  if (is_lacking (mode)) {
    errno = EOPNOTSUPP;
    return -1;
  }
  if (fallocate_errno != 0) {
    errno = fallocate_errno;
    return -1;
  }
  return syscall (SYS_fallocate, fd, mode, offset, count);
}

static void
test_file_zero_fallback (void **state)
{
  FILE *fp = tmpfile ();
  struct container *c = container_open_file_writable (fileno (fp));
  static const struct {
    int err, result;
    int again;                  /* fallocate is called the second time */
  } rows[] = {
    { EOPNOTSUPP, 0, 0 }, { EINVAL, 0, 1 }, { EIO, -1, 1 }, { ENOSPC, -1, 1 },
  };

  (void) state;
  for (size_t i = 0; i < sizeof rows / sizeof rows[0]; ++i)
    for (int punch = 0; punch <= 1; ++punch) {
      container_close (c);
      c = container_open_file_writable (fileno (fp));
      fallocate_errno = rows[i].err;
      fill (c, 0, 300000, 3);
      errno = 0;
      assert_int_equal (container_zero (c, 200001, 9, punch), rows[i].result);
      if (rows[i].result == -1) {
        assert_int_equal (errno, rows[i].err);
        continue;
      }
      assert_bytes (c, 0, 9, 3);
      assert_bytes (c, 9, 200001, 0);
      assert_bytes (c, 200010, 300000 - 200010, 3);
      nr_fallocate = 0;
      assert_int_equal (container_zero (c, 1, 9, punch), 0);
      assert_int_equal (nr_fallocate != 0, rows[i].again);
    }
  fallocate_errno = 0;
  container_close (c);
  fclose (fp);
}

/* The image itself: it grows in steps, and is cut to what it was. */
static void
test_file_image (void **state)
{
  FILE *fp = tmpfile ();
  const int fd = fileno (fp);
  struct container *c;
  struct stat statbuf;
  uint64_t bytes;

  (void) state;
  assert_int_equal (ftruncate (fd, 3 * MiB + 5), 0);
  c = container_open_file_image (fd);
  assert_int_equal (container_allocated (c, &bytes), 0);
  assert_int_equal (bytes, 0);
  fill (c, 3 * MiB, 6, 7);
  assert_int_equal (container_size (c), 19 * MiB + 65536);
  assert_int_equal (fstat (fd, &statbuf), 0);
  assert_int_equal (statbuf.st_size, container_size (c));
  assert_int_equal (container_allocated (c, &bytes), 0);
  assert_in_range (bytes, 1, MiB);
  fill (c, container_size (c), 1, 8);
  assert_int_equal (container_size (c), 35 * MiB + 65536);

  assert_int_equal (container_truncate (c, 20 * MiB), 0);
  assert_int_equal (container_size (c), 20 * MiB);
  assert_int_equal (container_truncate (c, 5), 0);
  assert_int_equal (fstat (fd, &statbuf), 0);
  assert_int_equal (statbuf.st_size, 3 * MiB + 5);
  assert_bytes (c, 3 * MiB, 5, 7);
  assert_bytes (c, 3 * MiB + 5, 100, 0);
  container_close (c);
  fclose (fp);

  c = container_open_memory (MiB);
  errno = 0;
  assert_int_equal (container_allocated (c, &bytes), -1);
  assert_int_equal (errno, ENOTSUP);
  container_close (c);
}

static off_t
file_size (int fd)
{
  return lseek (fd, 0, SEEK_END);
}

/* A file without a name in a folder, or -1. */
static int
file_in (const char *folder)
{
  char path[100];
  int fd;

  snprintf (path, sizeof path, "%s/container.XXXXXX", folder);
  fd = mkstemp (path);
  if (fd != -1)
    unlink (path);
  return fd;
}

/* A disk: its size never changes. */
static void
test_file_disk (void **state)
{
  FILE *fp = tmpfile ();
  const int fd = fileno (fp);
  struct container *c;

  (void) state;
  for (unsigned size = 0; size <= MiB + 513; size += MiB + 513) {
    assert_int_equal (ftruncate (fd, size), 0);
    c = container_open_file_disk (fd);
    assert_non_null (c);
    assert_false (c->readonly);
    assert_int_equal (container_size (c), size);
    if (size > 0)
      fill (c, 0, size, 7);
    errno = 0;
    assert_int_equal (container_pwrite (c, "x", 1, size), -1);
    assert_int_equal (errno, ENOSPC);
    errno = 0;
    assert_int_equal (container_pwrite (c, "xx", 2, size - (size > 0)), -1);
    assert_int_equal (errno, ENOSPC);
    errno = 0;
    assert_int_equal (container_pwrite_durable (c, "x", 1, size), -1);
    assert_int_equal (errno, ENOSPC);
    errno = 0;
    assert_int_equal (container_reserve (c, size + 1), -1);
    assert_int_equal (errno, ENOSPC);
    if (size > 0)
      assert_bytes (c, 0, size, 7);
    assert_bytes (c, size, 100, 0);

    /* Whatever else reaches beyond the end stays inside. */
    assert_int_equal (container_zero (c, MiB, size / 2, false), 0);
    assert_int_equal (container_zero_fast (c, MiB, size, false), 0);
    assert_int_equal (container_trim (c, UINT64_MAX, size / 2), 0);
    assert_int_equal (container_cache (c, MiB, size / 2), 0);
    assert_int_equal (container_truncate (c, 0), 0);
    assert_int_equal (container_flush (c), 0);
    assert_bytes (c, size / 2, size - size / 2 + 1, 0);
    assert_int_equal (container_size (c), size);
    assert_int_equal (file_size (fd), size);
    container_close (c);
    assert_int_equal (file_size (fd), size);
  }
  fclose (fp);
}

/* Fast zeroes, with all that a file system may lack.  What it lacks it is
 * asked for once.
 */
static int
expected_fast (unsigned missing, bool punch)
{
  if (punch && !(missing & NO_PUNCH))
    return 0;
  if (!(missing & NO_ZERO_RANGE))
    return 0;
  return missing & (NO_PUNCH | NO_ALLOCATE) ? 1 : 0;
}

static void
check_fast (struct container *c, unsigned really_lacks, bool punch)
{
  const bool may_punch = !(lacks & NO_PUNCH);
  const int expected = expected_fast (lacks | really_lacks, punch);

  fill (c, 0, 300000, 3);
  for (unsigned i = 0; i < 3; ++i) {
    uint8_t byte;

    fill (c, 65536, 131072, 3);
    nr_fallocate = 0;
    assert_int_equal (container_zero_fast (c, 131072, 65536, punch), expected);
    if (expected == 0)
      assert_bytes (c, 65536, 131072, 0);
    else {
      /* As it was, or punched and then not allocated. */
      assert_int_equal (container_pread (c, &byte, 1, 65536), 0);
      assert_true (byte == 3 || (may_punch && i == 0));
      assert_bytes (c, 65536, 131072, byte);
      if (i > 0)
        assert_int_equal (nr_fallocate, 0);
    }
    assert_bytes (c, 0, 65536, 3);
    assert_bytes (c, 196608, 300000 - 196608, 3);
  }
}

static void
test_file_zero_fast (void **state)
{
  static const char *const folders[] = { "/var/tmp", "/dev/shm" };
  static const int modes[] = {
    FALLOC_FL_PUNCH_HOLE, FALLOC_FL_ZERO_RANGE, 0
  };

  (void) state;
  for (size_t i = 0; i < sizeof folders / sizeof folders[0]; ++i) {
    const int fd = file_in (folders[i]);
    unsigned really = 0;

    if (fd == -1) {
      print_message ("no files in %s\n", folders[i]);
      continue;
    }
    for (size_t m = 0; m < sizeof modes / sizeof modes[0]; ++m)
      if (fallocate (fd, modes[m] | FALLOC_FL_KEEP_SIZE, 0, 65536) == -1)
        really |= 1U << m;
    for (lacks = 0; lacks < 8; ++lacks)
      for (int punch = 0; punch <= 1; ++punch) {
        struct container *c;

        assert_int_equal (ftruncate (fd, 300000), 0);
        c = container_open_file_disk (fd);
        print_message ("%s lacks %u, and %u is said to, punch %d\n",
                       folders[i], really, lacks, punch);
        check_fast (c, really, punch);
        assert_int_equal (container_size (c), 300000);
        container_close (c);
        assert_int_equal (file_size (fd), 300000);
      }
    lacks = 0;
    close (fd);
  }
}

/* A range that cannot be zeroed fast, and one that fails. */
static void
test_file_zero_fast_errors (void **state)
{
  static const struct { int err, result, again; } rows[] = {
    { EINVAL, 1, 1 }, { EOPNOTSUPP, 1, 0 }, { ENOSYS, 1, 0 },
    { ENODEV, 1, 0 }, { EIO, -1, 1 }, { ENOSPC, -1, 1 },
  };
  FILE *fp = tmpfile ();
  struct container *c;

  (void) state;
  assert_int_equal (ftruncate (fileno (fp), MiB), 0);
  for (size_t i = 0; i < sizeof rows / sizeof rows[0]; ++i)
    for (int punch = 0; punch <= 1; ++punch) {
      c = container_open_file_disk (fileno (fp));
      fill (c, 0, MiB, 3);
      fallocate_errno = rows[i].err;
      errno = 0;
      assert_int_equal (container_zero_fast (c, 8192, 4096, punch),
                        rows[i].result);
      if (rows[i].result == -1)
        assert_int_equal (errno, rows[i].err);
      nr_fallocate = 0;
      assert_int_equal (container_zero_fast (c, 8192, 4096, punch),
                        rows[i].result);
      assert_int_equal (nr_fallocate != 0, rows[i].again);
      assert_bytes (c, 0, MiB, 3);
      fallocate_errno = 0;
      container_close (c);
    }

  c = container_open_file (fileno (fp));
  errno = 0;
  assert_int_equal (container_zero_fast (c, 8192, 4096, true), -1);
  assert_int_equal (errno, EROFS);
  container_close (c);

  /* Memory never can. */
  c = container_open_memory (MiB);
  fill (c, 0, 8192, 3);
  assert_int_equal (container_zero_fast (c, 4096, 0, true), 1);
  assert_bytes (c, 0, 8192, 3);
  assert_int_equal (container_trim (c, 4096, 0), 0);
  assert_bytes (c, 0, 4096, 0);
  container_close (c);
  fclose (fp);
}

static uint64_t
allocated (struct container *c)
{
  uint64_t bytes;

  assert_int_equal (container_allocated (c, &bytes), 0);
  return bytes;
}

/* A trim gives space back, or does nothing: it never writes. */
static void
test_file_trim (void **state)
{
  FILE *fp = tmpfile ();
  struct container *c;
  uint64_t before;

  (void) state;
  assert_int_equal (ftruncate (fileno (fp), MiB), 0);
  c = container_open_file_disk (fileno (fp));
  fill (c, 0, MiB, 3);
  assert_int_equal (container_flush (c), 0);
  before = allocated (c);
  assert_int_equal (container_trim (c, 3 * MiB / 4, 65536), 0);
  assert_bytes (c, 0, 65536, 3);
  assert_bytes (c, 65536, 3 * MiB / 4, 0);
  assert_bytes (c, 65536 + 3 * MiB / 4, MiB / 4 - 65536, 3);
  assert_true (allocated (c) <= before - MiB / 2);
  assert_int_equal (container_trim (c, 0, 5), 0);
  assert_int_equal (container_trim (c, 5, MiB), 0);

  fallocate_errno = EIO;
  errno = 0;
  assert_int_equal (container_trim (c, 4096, 0), -1);
  assert_int_equal (errno, EIO);
  fallocate_errno = EINVAL;
  assert_int_equal (container_trim (c, 4096, 0), 0);
  fallocate_errno = 0;
  assert_bytes (c, 0, 65536, 3);

  before = allocated (c);
  lacks = NO_PUNCH;
  for (unsigned i = 0; i < 2; ++i) {
    nr_fallocate = 0;
    assert_int_equal (container_trim (c, MiB, 0), 0);
    assert_int_equal (nr_fallocate, i == 0);
  }
  lacks = 0;
  assert_bytes (c, 0, 65536, 3);
  assert_int_equal (allocated (c), before);
  container_close (c);
  fclose (fp);
}

/* A block device is what fstat says: zeroes and trims are aligned, and fast
 * only where the kernel does not write them.
 */
static bool is_block_device;

int
fstat (int fd, struct stat *statbuf)
{
  const int r = fstatat (fd, "", statbuf, AT_EMPTY_PATH);

  if (r == 0 && is_block_device)
    statbuf->st_mode = (statbuf->st_mode & ~S_IFMT) | S_IFBLK;
  return r;
}

static void
test_block_device (void **state)
{
  FILE *fp = tmpfile ();
  struct container *c;

  (void) state;
  assert_int_equal (ftruncate (fileno (fp), MiB), 0);
  is_block_device = true;
  c = container_open_file_disk (fileno (fp));
  is_block_device = false;
  fill (c, 0, MiB, 3);

  nr_fallocate = 0;
  assert_int_equal (container_zero_fast (c, 4096, 4096, false), 1);
  assert_int_equal (container_zero_fast (c, 4096, 100, true), 1);
  assert_int_equal (container_zero_fast (c, 100, 4096, true), 1);
  assert_int_equal (container_trim (c, 4095, 4096), 0);
  assert_int_equal (container_trim (c, 8190, 1), 0);
  assert_int_equal (nr_fallocate, 0);
  assert_bytes (c, 0, MiB, 3);

  assert_int_equal (container_zero_fast (c, 4096, 4096, true), 0);
  assert_int_equal (container_trim (c, 10000, 8191), 0);
  assert_int_equal (nr_fallocate, 2);
  assert_bytes (c, 0, 4096, 3);
  assert_bytes (c, 4096, 12288, 0);
  assert_bytes (c, 16384, MiB - 16384, 3);

  lacks = NO_PUNCH;
  nr_fallocate = 0;
  assert_int_equal (container_zero_fast (c, 4096, 0, true), 1);
  assert_int_equal (container_zero_fast (c, 4096, 0, true), 1);
  assert_int_equal (container_trim (c, 4096, 0), 0);
  assert_int_equal (nr_fallocate, 1);
  assert_bytes (c, 0, 4096, 3);
  lacks = 0;

  errno = 0;
  assert_int_equal (container_pwrite (c, "x", 1, MiB), -1);
  assert_int_equal (errno, ENOSPC);
  container_close (c);
  fclose (fp);
}

/* A flush that fails is counted, and the next one is tried. */
static int fdatasync_errno;

int
fdatasync (int fd)
{
  (void) fd;
  if (fdatasync_errno == 0)
    return 0;
  errno = fdatasync_errno;
  return -1;
}

static void
test_file_flush_error (void **state)
{
  FILE *fp = tmpfile ();
  struct container *c = container_open_file_writable (fileno (fp));

  (void) state;
  fill (c, 0, 10, 1);
  assert_int_equal (container_flush (c), 0);
  fdatasync_errno = EIO;
  fill (c, 0, 10, 2);
  assert_int_equal (container_flush (c), -1);
  assert_int_equal (errno, EIO);
  assert_int_equal (container_failed_flushes (c), 1);
  fdatasync_errno = 0;
  assert_int_equal (container_flush (c), 0);
  assert_int_equal (container_failed_flushes (c), 1);
  container_close (c);

  /* Who only reads has nothing to flush. */
  fdatasync_errno = EIO;
  c = container_open_file (fileno (fp));
  assert_int_equal (container_flush (c), 0);
  fdatasync_errno = 0;
  container_close (c);
  fclose (fp);
}

#ifdef RWF_DSYNC
/* Writes that are durable by themselves.  The kernel's answer is played by
 * pwritev2.
 */
static int pwritev2_errno, pwritev2_fd, pwritev2_flags, nr_pwritev2;

ssize_t
pwritev2 (int fd, const struct iovec *iov, int nr, off_t offset, int flags)
{
  nr_pwritev2++;
  pwritev2_fd = fd;
  pwritev2_flags = flags;
  assert_int_equal (nr, 1);
  if (pwritev2_errno != 0) {
    errno = pwritev2_errno;
    return -1;
  }
  return pwrite (fd, iov->iov_base, iov->iov_len, offset);
}

static void
test_file_durable (void **state)
{
  FILE *fp = tmpfile ();
  struct container *c = container_open_file_image (fileno (fp));
  struct container *memory = container_open_memory (MiB);

  (void) state;
  /* What makes the container grow needs a flush. */
  assert_int_equal (container_pwrite_durable (c, "abcd", 4, 0), 1);
  assert_int_equal (nr_pwritev2, 0);
  assert_bytes (c, 0, 1, 'a');

  assert_int_equal (container_pwrite_durable (c, "eeee", 4, 0), 0);
  assert_int_equal (nr_pwritev2, 1);
  assert_int_equal (pwritev2_flags, RWF_DSYNC);
  /* A flush sees errors of its own. */
  assert_int_not_equal (pwritev2_fd, fileno (fp));
  assert_bytes (c, 0, 4, 'e');

  pwritev2_errno = EIO;
  assert_int_equal (container_pwrite_durable (c, "ffff", 4, 0), -1);
  assert_int_equal (errno, EIO);
  pwritev2_errno = EDQUOT;
  assert_int_equal (container_pwrite_durable (c, "ffff", 4, 0), -1);
  assert_int_equal (errno, ENOSPC);
  /* Nothing else is lost by it. */
  assert_int_equal (container_failed_flushes (c), 0);
  assert_bytes (c, 0, 4, 'e');

  /* A file system that does not know it is asked once. */
  pwritev2_errno = EOPNOTSUPP;
  nr_pwritev2 = 0;
  assert_int_equal (container_pwrite_durable (c, "gggg", 4, 0), 1);
  assert_int_equal (container_pwrite_durable (c, "hhhh", 4, 0), 1);
  assert_int_equal (nr_pwritev2, 1);
  assert_bytes (c, 0, 4, 'h');
  pwritev2_errno = 0;
  container_close (c);

  /* Who only reads cannot, and others need a flush. */
  c = container_open_file (fileno (fp));
  assert_int_equal (container_pwrite_durable (c, "i", 1, 0), -1);
  assert_int_equal (errno, EROFS);
  container_close (c);
  fill (memory, 0, 4, 1);
  assert_int_equal (container_pwrite_durable (memory, "jjjj", 4, 0), 1);
  assert_bytes (memory, 0, 4, 'j');
  container_close (memory);
  fclose (fp);
}

/* The same of a disk: inside it, at once, and by a descriptor of its own. */
static void
test_disk_durable (void **state)
{
  FILE *fp = tmpfile ();
  struct container *c;

  (void) state;
  assert_int_equal (ftruncate (fileno (fp), 1000), 0);
  c = container_open_file_disk (fileno (fp));
  nr_pwritev2 = 0;
  assert_int_equal (container_pwrite_durable (c, "abcd", 4, 996), 0);
  assert_int_equal (nr_pwritev2, 1);
  assert_int_equal (pwritev2_flags, RWF_DSYNC);
  assert_int_not_equal (pwritev2_fd, fileno (fp));
  assert_bytes (c, 996, 1, 'a');
  assert_bytes (c, 999, 1, 'd');

  errno = 0;
  assert_int_equal (container_pwrite_durable (c, "abcd", 4, 997), -1);
  assert_int_equal (errno, ENOSPC);
  assert_int_equal (container_pwrite_durable (c, "", 0, 0), 1);
  assert_int_equal (nr_pwritev2, 1);
  assert_int_equal (file_size (fileno (fp)), 1000);
  assert_bytes (c, 999, 1, 'd');

  /* A write that may be there in part has to be flushed. */
  assert_int_equal (container_flush (c), 0);
  assert_int_equal (tally_get (&c->flushes), 1);
  pwritev2_errno = EIO;
  assert_int_equal (container_pwrite_durable (c, "ffff", 4, 0), -1);
  assert_int_equal (errno, EIO);
  pwritev2_errno = 0;
  assert_int_equal (container_flush (c), 0);
  assert_int_equal (tally_get (&c->flushes), 2);
  container_close (c);

  /* A kernel that does not know it: the write needs a flush. */
  c = container_open_file_disk (fileno (fp));
  pwritev2_errno = ENOSYS;
  assert_int_equal (container_pwrite_durable (c, "gggg", 4, 0), 1);
  pwritev2_errno = 0;
  assert_bytes (c, 0, 4, 'g');
  container_close (c);
  fclose (fp);
}
#endif

static void
test_file_extent (void **state)
{
  FILE *fp = tmpfile ();
  struct container *c;
  uint64_t length;
  unsigned flags;

  (void) state;
  c = container_open_file_writable (fileno (fp));
  fill (c, 4 * MiB, MiB, 1);
  assert_int_equal (container_reserve (c, 16 * MiB), 0);
  assert_int_equal (container_extent (c, 0, 16 * MiB, &length, &flags), 0);
  if (flags == 0) {
    print_message ("no holes in %s\n", P_tmpdir);
    skip ();
  }
  assert_int_equal (length, 4 * MiB);
  assert_int_equal (container_extent (c, 5, 100, &length, &flags), 0);
  assert_int_equal (flags, CONTAINER_HOLE | CONTAINER_ZERO);
  assert_int_equal (length, 100);
  assert_int_equal (container_extent (c, 4 * MiB + 9, 8 * MiB, &length, &flags),
                    0);
  assert_int_equal (flags, 0);
  assert_int_equal (length, MiB - 9);
  assert_int_equal (container_extent (c, 5 * MiB, 8 * MiB, &length, &flags), 0);
  assert_int_equal (flags, CONTAINER_HOLE | CONTAINER_ZERO);
  assert_int_equal (length, 8 * MiB);
  assert_int_equal (container_extent (c, 6 * MiB, 99 * MiB, &length, &flags),
                    0);
  assert_int_equal (flags, CONTAINER_HOLE | CONTAINER_ZERO);
  assert_int_equal (length, 10 * MiB);
  assert_int_equal (container_extent (c, 16 * MiB, 9, &length, &flags), 0);
  assert_int_equal (flags, CONTAINER_HOLE | CONTAINER_ZERO);
  assert_int_equal (length, 9);

  /* Cut by somebody: what cannot be read is not a hole. */
  assert_int_equal (ftruncate (fileno (fp), 4 * MiB), 0);
  assert_int_equal (container_extent (c, 5 * MiB, 8 * MiB, &length, &flags), 0);
  assert_int_equal (flags, 0);
  container_close (c);
  fclose (fp);
}

/* Many threads write and grow at once. */
#define NR_THREADS 8
#define NR_ROUNDS 200

static void *
write_own_bytes (void *opaque)
{
  struct container *c = opaque;
  static atomic_int next_id;
  const int id = next_id++;
  unsigned char buf[777];
  int i;

  memset (buf, id + 1, sizeof buf);
  for (i = 0; i < NR_ROUNDS; ++i) {
    const uint64_t offset = ((uint64_t) i * NR_THREADS + id) * sizeof buf;
    const uint64_t size = container_size (c);

    if (container_pwrite (c, buf, sizeof buf, offset) == -1 ||
        container_size (c) < offset + sizeof buf ||
        container_size (c) < size)
      return c;
  }
  return NULL;
}

static void
test_threads (void **state)
{
  struct container *c = container_open_memory (8 * MiB);
  pthread_t threads[NR_THREADS];
  unsigned char buf[777];
  bool seen[NR_THREADS + 1] = { false };
  void *ret;
  int i, j;

  (void) state;
  for (i = 0; i < NR_THREADS; ++i)
    assert_int_equal (pthread_create (&threads[i], NULL, write_own_bytes, c),
                      0);
  for (i = 0; i < NR_THREADS; ++i) {
    assert_int_equal (pthread_join (threads[i], &ret), 0);
    assert_null (ret);
  }
  assert_int_equal (container_size (c), sizeof buf * NR_THREADS * NR_ROUNDS);
  for (i = 0; i < NR_THREADS * NR_ROUNDS; ++i) {
    assert_int_equal (container_pread (c, buf, sizeof buf, i * sizeof buf), 0);
    assert_in_range (buf[0], 1, NR_THREADS);
    seen[buf[0]] = true;
    for (j = 1; j < (int) sizeof buf; ++j)
      assert_int_equal (buf[j], buf[0]);
  }
  for (i = 1; i <= NR_THREADS; ++i)
    assert_true (seen[i]);
  container_close (c);
}

int
main (void)
{
  const struct CMUnitTest tests[] = {
    cmocka_unit_test (test_end),
    cmocka_unit_test (test_limit),
    cmocka_unit_test (test_zero_and_punch),
    cmocka_unit_test (test_truncate),
    cmocka_unit_test (test_hook),
    cmocka_unit_test (test_no_space),
    cmocka_unit_test (test_barriers),
    cmocka_unit_test (test_barriers_threads),
    cmocka_unit_test (test_blocks),
    cmocka_unit_test (test_file),
    cmocka_unit_test (test_file_writable),
    cmocka_unit_test (test_file_zero_fallback),
    cmocka_unit_test (test_file_image),
    cmocka_unit_test (test_file_disk),
    cmocka_unit_test (test_file_zero_fast),
    cmocka_unit_test (test_file_zero_fast_errors),
    cmocka_unit_test (test_file_trim),
    cmocka_unit_test (test_block_device),
    cmocka_unit_test (test_file_flush_error),
#ifdef RWF_DSYNC
    cmocka_unit_test (test_file_durable),
    cmocka_unit_test (test_disk_durable),
#endif
    cmocka_unit_test (test_file_extent),
    cmocka_unit_test (test_threads),
  };

  return cmocka_run_group_tests (tests, NULL, NULL);
}
