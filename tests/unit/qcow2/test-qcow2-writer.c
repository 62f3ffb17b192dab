/* nbdkit-dirty-bitmap-filter
 * SPDX-License-Identifier: BSD-3-Clause
 * Copyright the nbdkit-dirty-bitmap-filter authors
 */

/* Writing an image once.
 *
 * Random clusters of data, zeroes, and nothing, from several threads, of all
 * sizes of clusters.  What the image is to have is in a raw file, with which
 * qemu-img compares it; qemu-img check finds neither an error nor a leak; and
 * our own qcow2_open reads the same.  A call of the container that fails is an
 * error, and leaves no image.
 */

#include <config.h>

#include <errno.h>
#include <fcntl.h>
#include <inttypes.h>
#include <pthread.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stdatomic.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include <cmocka.h>

#include "common/bytes.h"
#include "common/cleanup.h"
#include "common/report.h"
#include "container/container.h"
#include "image.h"
#include "qcow2/qcow2.h"
#include "qcow2/writer.h"

#define MAX_THREADS 4
#define LIMIT (UINT64_C (256) << 20)

static pthread_mutex_t reports_lock = PTHREAD_MUTEX_INITIALIZER;
static char last_error[1024];
static unsigned nr_errors;
static unsigned nr_threads = MAX_THREADS;

static void
keep_report (enum report_level level, const char *fmt, va_list args)
{
  if (level != REPORT_ERROR)
    return;
  ACQUIRE_LOCK_FOR_CURRENT_SCOPE (&reports_lock);
  vsnprintf (last_error, sizeof last_error, fmt, args);
  nr_errors++;
}

/* ------------------------------------------------------------------ */
/* What a disk is to be, and the threads that write it. */

enum kind { NOTHING, ZERO, RANDOM, TEXT, SAME, NR_KINDS };

struct job {
  struct qcow2_writer *writer;
  uint8_t *disk;                /* what it has in the end, and had */
  uint64_t size;                /* in the backing file before */
  unsigned cluster_bits;
  uint64_t seed;
  pthread_mutex_t lock;         /* protects the next cluster */
  uint64_t next;
  atomic_bool failed;
};

static void
fill (uint8_t *p, uint64_t count, enum kind kind, uint64_t *seed)
{
  const uint8_t byte = 1 + random_next (seed) % 255;

  if (kind == ZERO)
    memset (p, 0, count);
  for (uint64_t i = 0; i < count && kind >= RANDOM; ++i)
    p[i] = kind == RANDOM ? (uint8_t) (random_next (seed) >> 32)
      : kind == TEXT ? (uint8_t) ("disk of a guest "[i % 16] +
                                  (i % 1000 == byte))
      : byte;
}

/* The next run of 1 to 5 clusters.  False if there is none. */
static bool
take (struct job *j, uint64_t *offset, uint64_t *count, uint64_t *seed)
{
  const uint64_t cluster = UINT64_C (1) << j->cluster_bits;
  bool any;

  pthread_mutex_lock (&j->lock);
  *offset = j->next;
  any = *offset < j->size;
  if (any) {
    *count = min_u64 ((1 + random_next (&j->seed) % 5) * cluster,
                      j->size - *offset);
    j->next += *count;
    *seed = random_next (&j->seed);
  }
  pthread_mutex_unlock (&j->lock);
  return any;
}

static void *
write_some (void *opaque)
{
  struct job *j = opaque;
  uint64_t offset, count, seed;

  while (take (j, &offset, &count, &seed)) {
    const enum kind kind = random_next (&seed) % NR_KINDS;
    int r = 0;

    fill (j->disk + offset, count, kind, &seed);
    if (kind == ZERO)
      r = qcow2_writer_zero (j->writer, count, offset);
    else if (kind != NOTHING)
      r = qcow2_writer_data (j->writer, j->disk + offset, count, offset);
    if (r == -1) {
      assert_true (errno != 0);
      j->failed = true;
    }
  }
  return NULL;
}

/* Write all of the disk: 0, or -1 if any call failed. */
static int
write_all (struct container *c, const struct qcow2_writer_options *o,
           uint8_t *disk, uint64_t seed)
{
  struct job j = {
    .disk = disk, .size = o->size, .cluster_bits = o->cluster_bits,
    .seed = seed, .lock = PTHREAD_MUTEX_INITIALIZER,
  };
  pthread_t threads[MAX_THREADS];
  int r;

  j.writer = qcow2_writer_new (c, o);
  if (j.writer == NULL)
    return -1;
  for (unsigned i = 0; i < nr_threads; ++i)
    assert_int_equal (pthread_create (&threads[i], NULL, write_some, &j), 0);
  for (unsigned i = 0; i < nr_threads; ++i)
    pthread_join (threads[i], NULL);
  r = j.failed ? -1 : qcow2_writer_finish (j.writer);
  qcow2_writer_free (j.writer);
  return r;
}

/* ------------------------------------------------------------------ */
/* The judges. */

static void
save (const uint8_t *disk, uint64_t size, const char *file)
{
  const int fd = open (file, O_WRONLY | O_CREAT | O_TRUNC, 0600);

  assert_true (fd != -1);
  for (uint64_t at = 0; at < size; ) {
    const ssize_t n = write (fd, disk + at, size - at);

    assert_true (n > 0);
    at += n;
  }
  assert_int_equal (ftruncate (fd, round_up (size, 512)), 0);
  close (fd);
}

static void
qemu_reads (struct container *c, const uint8_t *disk, uint64_t size,
            const char *file)
{
  char raw[256];

  snprintf (raw, sizeof raw, "%s", temp_file ("disk.raw"));
  save (disk, size, raw);
  image_save (c, file);
  assert_int_equal (run_command ("qemu-img check -q -f qcow2 %s", file), 0);
  assert_int_equal (run_command ("qemu-img compare -q -f qcow2 -F raw %s %s",
                                 file, raw), 0);
}

static void
we_read (struct container *c, struct container *below, const uint8_t *disk,
         uint64_t size)
{
  const struct qcow2_options plain = { .readonly = true,
                                       .cache_size = 1 << 20 };
  struct qcow2 *backing = below != NULL ? qcow2_open (below, &plain) : NULL;
  const struct qcow2_options options = {
    .readonly = true, .cache_size = 1 << 20, .backing.image = backing,
  };
  struct qcow2 *q = qcow2_open (c, &options);
  uint8_t *buf = malloc (size + 1);

  assert_non_null (q);
  assert_true (qcow2_size (q) == round_up (size, 512));
  if (size > 0)
    assert_int_equal (qcow2_read (q, buf, size, 0), 0);
  assert_memory_equal (buf, disk, size);
  free (buf);
  qcow2_close (q);
  qcow2_close (backing);
}

/* ------------------------------------------------------------------ */

/* A disk with one image, and another over it. */
static void
write_two (unsigned cluster_bits, uint64_t size, bool compress, uint64_t seed)
{
  const char *name[2] = { "below.qcow2", "above.qcow2" };
  struct container *c[2];
  uint8_t *disk = calloc (1, size + 1);
  char file[2][256];

  for (unsigned i = 0; i < 2; ++i) {
    const struct qcow2_writer_options o = {
      .size = size, .cluster_bits = cluster_bits, .compress = compress,
      .backing_name = i == 0 ? NULL : name[0],
      .backing_format = i == 0 ? NULL : "qcow2",
    };

    snprintf (file[i], sizeof file[i], "%s", temp_file (name[i]));
    c[i] = container_open_memory (LIMIT);
    if (write_all (c[i], &o, disk, seed + i) == -1)
      fail_msg ("%s", last_error);
    qemu_reads (c[i], disk, size, file[i]);
    we_read (c[i], i == 0 ? NULL : c[0], disk, size);
  }
  container_close (c[0]);
  container_close (c[1]);
  free (disk);
}

static void
test_all_cluster_sizes (void **state)
{
  uint64_t seed = 1;

  (void) state;
  get_number ("SEED", &seed);
  for (unsigned bits = 9; bits <= 21; ++bits)
    for (unsigned compress = 0; compress < 2; ++compress) {
      const uint64_t cluster = UINT64_C (1) << bits;
      const uint64_t nr = bits <= 12 ? 700 : bits <= 16 ? 90 : 9;

      /* The last cluster is short, whole, or of some odd bytes. */
      write_two (bits, nr * cluster + (bits % 3 == 0 ? 0 : bits % 3 == 1
                                       ? 512 * (bits > 9) : 77),
                 compress, random_next (&seed));
    }
}

static void
test_small_disks (void **state)
{
  static const uint64_t sizes[] = { 0, 1, 511, 512, 513, 1536, 65535, 65536,
                                    65537 };

  (void) state;
  for (unsigned i = 0; i < sizeof sizes / sizeof sizes[0]; ++i)
    for (unsigned seed = 0; seed < 4; ++seed)
      write_two (seed % 2 ? 16 : 9, sizes[i], seed / 2, seed + 1);
}

/* ------------------------------------------------------------------ */
/* What is told of the file. */

struct told {
  uint8_t *bytes;
  uint64_t nr, max;
  atomic_int nr_callers;
};

static void
keep_told (void *opaque, const void *buf, uint64_t count)
{
  struct told *t = opaque;

  assert_int_equal (atomic_fetch_add (&t->nr_callers, 1), 0);
  assert_true (count <= t->max - t->nr);
  memcpy (t->bytes + t->nr, buf, count);
  t->nr += count;
  assert_int_equal (atomic_fetch_sub (&t->nr_callers, 1), 1);
}

/* It is the file, the head of which comes last. */
static void
tell_one (unsigned bits, uint64_t size, bool compress, uint64_t seed)
{
  struct told t = { .bytes = malloc (LIMIT), .max = LIMIT };
  const struct qcow2_writer_options o = {
    .size = size, .cluster_bits = bits, .compress = compress,
    .backing_name = "below", .backing_format = "qcow2",
    .tell = keep_told, .opaque = &t,
  };
  struct container *c = container_open_memory (LIMIT);
  uint8_t *disk = calloc (1, size + 1), *file;
  uint64_t bytes;

  if (write_all (c, &o, disk, seed) == -1)
    fail_msg ("%s", last_error);
  bytes = container_size (c);
  assert_true (bytes >= WRITER_HEAD_BYTES && bytes % (1 << bits) == 0);
  assert_true (t.nr == bytes);
  file = malloc (bytes);
  assert_int_equal (container_pread (c, file, bytes, 0), 0);
  assert_memory_equal (t.bytes, file + WRITER_HEAD_BYTES,
                       bytes - WRITER_HEAD_BYTES);
  assert_memory_equal (t.bytes + bytes - WRITER_HEAD_BYTES, file,
                       WRITER_HEAD_BYTES);
  container_close (c);
  free (t.bytes);
  free (disk);
  free (file);
}

static void
test_told (void **state)
{
  uint64_t seed = 2;

  (void) state;
  get_number ("SEED", &seed);
  for (unsigned bits = 12; bits <= 21; ++bits)
    for (unsigned compress = 0; compress < 2; ++compress)
      for (unsigned nr = 0; nr < 3; ++nr)
        tell_one (bits, (nr * (bits < 17 ? 60 : 5) << bits) + nr * 77,
                  compress, random_next (&seed));
}

/* ------------------------------------------------------------------ */
/* A container of which a call fails. */

struct failing {
  unsigned long nr, fails_at;   /* calls; from 1 on, 0: none */
};

static int
count_call (void *opaque, const char *operation, uint64_t offset,
            uint64_t count)
{
  struct failing *f = opaque;

  (void) operation;
  (void) offset;
  (void) count;
  return __atomic_add_fetch (&f->nr, 1, __ATOMIC_RELAXED) == f->fails_at
    ? EIO : 0;
}

/* What a crash leaves is no image, or a whole one: when the header is written,
 * nothing is not durable.
 */
struct order {
  unsigned long unflushed;      /* writes since the last flush */
  unsigned nr_headers;
};

static int
see_order (void *opaque, const char *operation, uint64_t offset,
           uint64_t count)
{
  struct order *o = opaque;

  (void) count;
  if (strcmp (operation, "flush") == 0)
    o->unflushed = 0;
  else if (strcmp (operation, "pwrite") == 0) {
    if (offset == 0) {
      o->nr_headers++;
      assert_int_equal (o->unflushed, 0);
    }
    __atomic_add_fetch (&o->unflushed, 1, __ATOMIC_RELAXED);
  }
  return 0;
}

static void
test_order (void **state)
{
  const struct qcow2_writer_options o = { .size = 1 << 20, .cluster_bits = 12 };
  struct container *c = container_open_memory (LIMIT);
  struct order order = { 0, 0 };
  const struct container_memory_hook hook = { see_order, &order };
  uint8_t *disk = calloc (1, o.size);

  (void) state;
  container_memory_set_hook (c, &hook);
  assert_int_equal (write_all (c, &o, disk, 5), 0);
  assert_int_equal (order.nr_headers, 1);
  assert_int_equal (order.unflushed, 0);
  container_close (c);
  free (disk);
}

/* Each call in its turn.  With several threads the number of calls is not
 * always the same: one that writes far ahead grows the container for others.
 */
static void
fail_each_call (void)
{
  const uint64_t size = 120 * 512;
  uint8_t *disk = malloc (size);
  unsigned long nr = 1;

  for (unsigned long at = 0; at <= nr; ++at) {
    const struct qcow2_writer_options o = {
      .size = size, .cluster_bits = 9,
      .backing_name = "below", .backing_format = "qcow2",
    };
    struct container *c = container_open_memory (LIMIT);
    const struct qcow2_options options = { .readonly = true };
    struct failing failing = { 0, at };
    const struct container_memory_hook hook = { count_call, &failing };
    int r;

    container_memory_set_hook (c, &hook);
    nr_errors = 0;
    memset (disk, 0, size);
    r = write_all (c, &o, disk, 7);
    if (nr_threads == 1 || at == 0)
      assert_int_equal (r, at == 0 ? 0 : -1);
    else
      assert_int_equal (r, failing.nr >= at ? -1 : 0);
    if (at == 0)
      nr = failing.nr;
    else if (r == -1) {
      struct qcow2 *q;

      assert_int_equal (nr_errors, 1);
      assert_non_null (strstr (last_error, strerror (EIO)));
      /* The last call is the flush after the header. */
      q = qcow2_open (c, &options);
      if (nr_threads == 1 ? at < nr : at < failing.nr)
        assert_null (q);
      qcow2_close (q);
    }
    container_close (c);
  }
  assert_true (nr > 20);
  free (disk);
}

static void
test_failing_calls (void **state)
{
  (void) state;
  fail_each_call ();
  nr_threads = 1;
  fail_each_call ();
  nr_threads = MAX_THREADS;
}

/* Of a container that cannot grow. */
static void
test_full (void **state)
{
  const struct qcow2_writer_options o = { .size = 1 << 20, .cluster_bits = 16 };
  uint8_t *disk = calloc (1, o.size);

  (void) state;
  for (uint64_t limit = 0; limit < 1 << 20; limit += 65536) {
    struct container *c = container_open_memory (limit);

    nr_errors = 0;
    if (write_all (c, &o, disk, 3) == -1) {
      assert_true (nr_errors > 0);
      assert_non_null (strstr (last_error, strerror (ENOSPC)));
    }
    else
      assert_true (limit > 6 * 65536);
    container_close (c);
  }
  free (disk);
}

static struct qcow2_writer *
new_of (uint64_t size, unsigned bits)
{
  const struct qcow2_writer_options o = { .size = size, .cluster_bits = bits };
  struct container *c = container_open_memory (LIMIT);
  struct qcow2_writer *w;

  errno = 0;
  w = qcow2_writer_new (c, &o);
  if (w == NULL)
    assert_int_equal (errno, EFBIG);
  container_close (c);
  return w;
}

static void
test_too_large (void **state)
{
  (void) state;
  /* 4 Mi entries of the L1 table. */
  for (unsigned bits = 9; bits <= 16; ++bits) {
    const uint64_t most = UINT64_C (1) << (22 + 2 * bits - 3);
    struct qcow2_writer *w = new_of (most, bits);

    assert_non_null (w);
    qcow2_writer_free (w);
    assert_null (new_of (most + 1, bits));
  }
  assert_null (new_of (UINT64_MAX, 9));
  assert_null (new_of (UINT64_MAX, 21));
  assert_null (new_of (INT64_MAX, 21));
  assert_null (new_of (UINT64_C (1) << 63, 21));
}

/* A large disk with a little in it. */
static void
test_sparse (void **state)
{
  const uint64_t size = UINT64_C (1) << 40;
  const struct qcow2_writer_options o = { .size = size, .cluster_bits = 16 };
  const struct qcow2_options options = { .readonly = true };
  struct container *c = container_open_memory (LIMIT);
  struct qcow2_writer *w = qcow2_writer_new (c, &o);
  char file[256];
  uint8_t buf[65536], got[65536];
  struct qcow2 *q;

  (void) state;
  memset (buf, 's', sizeof buf);
  for (uint64_t at = size - 65536; at > 1 << 20; at /= 2)
    assert_int_equal (qcow2_writer_data (w, buf, 65536, round_down (at, 65536)),
                      0);
  assert_int_equal (qcow2_writer_finish (w), 0);
  qcow2_writer_free (w);
  snprintf (file, sizeof file, "%s", temp_file ("sparse.qcow2"));
  image_save (c, file);
  assert_int_equal (run_command ("qemu-img check -q -f qcow2 %s", file), 0);
  q = qcow2_open (c, &options);
  assert_non_null (q);
  for (uint64_t at = size - 65536; at > 1 << 20; at /= 2) {
    assert_int_equal (qcow2_read (q, got, 65536, round_down (at, 65536)), 0);
    assert_memory_equal (got, buf, 65536);
  }
  qcow2_close (q);
  container_close (c);
}

static void
test_long_names (void **state)
{
  static const struct { unsigned bits; size_t longest; } cases[] = {
    /* The header, the format, and the end of the extensions. */
    { 9, 512 - 112 - 16 - 8 }, { 12, 1023 }, { 16, 1023 },
  };
  char name[1100];

  (void) state;
  for (unsigned i = 0; i < 3; ++i)
    for (unsigned more = 0; more < 2; ++more) {
      const struct qcow2_writer_options o = {
        .size = 4096, .cluster_bits = cases[i].bits,
        .backing_name = name, .backing_format = "qcow2",
      };
      struct container *c = container_open_memory (LIMIT);
      struct qcow2_references references;
      uint8_t disk[4096] = { 0 };

      memset (name, 'n', sizeof name);
      name[cases[i].longest + more] = '\0';
      last_error[0] = '\0';
      errno = 0;
      if (write_all (c, &o, disk, 1) != (more ? -1 : 0))
        fail_msg ("%u: %s", cases[i].bits, last_error);
      if (more)
        assert_int_equal (errno, ENAMETOOLONG);
      else {
        assert_int_equal (qcow2_read_references (c, &references), 0);
        assert_string_equal (references.backing_name, name);
        assert_string_equal (references.backing_format, "qcow2");
        qcow2_free_references (&references);
      }
      container_close (c);
    }
}

int
main (void)
{
  const struct CMUnitTest tests[] = {
    cmocka_unit_test (test_all_cluster_sizes),
    cmocka_unit_test (test_small_disks),
    cmocka_unit_test (test_told),
    cmocka_unit_test (test_order),
    cmocka_unit_test (test_failing_calls),
    cmocka_unit_test (test_full),
    cmocka_unit_test (test_too_large),
    cmocka_unit_test (test_sparse),
    cmocka_unit_test (test_long_names),
  };

  report_sink = keep_report;
  return cmocka_run_group_tests (tests, NULL, NULL);
}
