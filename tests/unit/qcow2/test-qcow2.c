/* nbdkit-dirty-bitmap-filter
 * SPDX-License-Identifier: BSD-3-Clause
 * Copyright the nbdkit-dirty-bitmap-filter authors
 */

/* The format over memory: random requests against a plain array, with
 * one thread and with several, with faults from below, and when there is
 * no space.  The image is judged by qemu-img.
 */

#include <config.h>

#include <errno.h>
#include <inttypes.h>
#include <pthread.h>
#include <semaphore.h>
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

#define MIB (UINT64_C (1) << 20)
#define GIB (UINT64_C (1) << 30)

static uint64_t first_seed = 1;

static struct qcow2 *
open_image (struct container *c, uint64_t cache)
{
  const struct qcow2_options options = { .cache_size = cache };
  struct qcow2 *q = qcow2_open (c, &options);

  assert_non_null (q);
  return q;
}

static void
random_run (const char *options, uint64_t size, uint64_t cache,
            unsigned requests, uint64_t max)
{
  /* Of what happens under valgrind the most is comparing bytes. */
  char text[32];
  const unsigned parts = how_often (1, 2, 8);
  const unsigned reopen = how_often (3, 3, 1);

  snprintf (text, sizeof text, "%" PRIu64, size / parts / 512 * 512);
  struct container *c = image_create (options, text, 64 * GIB);
  struct qcow2 *q = open_image (c, cache);
  const uint64_t bytes = qcow2_size (q);
  uint8_t *model = calloc (1, bytes);
  struct random_requests r = {
    .model = model, .high = bytes, .max = max, .seed = first_seed++,
  };

  assert_non_null (model);
  requests /= how_often (1, 3, 10);
  for (unsigned i = 0; i < requests; ++i) {
    r.q = q;
    assert_int_equal (random_request (&r), 0);
    if (i % (requests / reopen) == 0) {
      compare_all (q, model);
      assert_int_equal (qcow2_stop (q), 0);
      qcow2_close (q);
      compare_with_qemu (c, model, bytes);
      q = open_image (c, cache);
    }
  }
  compare_all (q, model);
  assert_int_equal (qcow2_stop (q), 0);
  qcow2_close (q);
  compare_with_qemu (c, model, bytes);
  container_close (c);
  free (model);
}

static void
test_random (void **state)
{
  (void) state;
  if (getenv ("THREADS_ONLY") != NULL)
    skip ();
  random_run ("-o cluster_size=512", 3 * MIB, 65536, 3000, 20000);
  random_run ("-o cluster_size=512,refcount_bits=64", 3 * MIB, 1 << 20, 3000,
              20000);
  random_run ("-o cluster_size=4k,refcount_bits=1", 20 * MIB, 1 << 20, 3000,
              100000);
  random_run ("-o cluster_size=4k,refcount_bits=2", 20000000, 65536, 3000,
              100000);
  random_run ("-o cluster_size=4k,refcount_bits=4", 20 * MIB, 65536, 1000,
              100000);
  random_run ("-o cluster_size=4k,refcount_bits=8", 20 * MIB, 65536, 1000,
              100000);
  random_run ("-o cluster_size=64k", 64 * MIB, 1 << 20, 3000, 1000000);
  random_run ("-o cluster_size=64k,compat=0.10", 33333760, 1 << 20, 3000,
              1000000);
  random_run ("-o cluster_size=64k,preallocation=metadata", 64 * MIB, 1 << 20,
              1000, 1000000);
  random_run ("-o cluster_size=64k,preallocation=full", 32 * MIB, 1 << 20,
              1000, 1000000);
  random_run ("-o cluster_size=2M,refcount_bits=32", 100 * MIB, 4 << 20, 600,
              5000000);
}

/* Each thread has a part of the disk whose borders lie inside clusters,
 * so that neighbours meet in one cluster.
 */
struct worker {
  struct random_requests r;
  unsigned requests;
  pthread_t thread;
};

static void *
work (void *arg)
{
  struct worker *w = arg;

  for (unsigned i = 0; i < w->requests; ++i)
    assert_int_equal (random_request (&w->r), 0);
  return NULL;
}

static void
threads_run (const char *options, const char *size, uint64_t cache,
             unsigned requests, uint64_t max)
{
  struct container *c = image_create (options, size, 64 * GIB);
  struct qcow2 *q = open_image (c, cache);
  const uint64_t bytes = qcow2_size (q);
  uint8_t *model = calloc (1, bytes);
  struct worker w[6];
  uint64_t seed = first_seed++;

  assert_non_null (model);
  if (getenv ("THREADS_ONLY") != NULL || getenv ("UNDER_VALGRIND") != NULL)
    requests /= 10;
  for (unsigned i = 0; i < 6; ++i) {
    /* Not a multiple of anything, but trims must not reach into the
     * neighbour's part: those are of whole clusters inside the range.
     */
    w[i] = (struct worker) {
      .r = {
        .q = q, .model = model, .max = max, .seed = random_next (&seed),
        .low = bytes / 6 * i + (i ? 77 : 0),
        .high = i == 5 ? bytes : bytes / 6 * (i + 1) + 77,
      },
      .requests = requests,
    };
    assert_int_equal (pthread_create (&w[i].thread, NULL, work, &w[i]), 0);
  }
  for (unsigned i = 0; i < 6; ++i)
    pthread_join (w[i].thread, NULL);
  compare_all (q, model);
  assert_int_equal (qcow2_stop (q), 0);
  qcow2_close (q);
  compare_with_qemu (c, model, bytes);
  container_close (c);
  free (model);
}

static void
test_threads (void **state)
{
  (void) state;
  threads_run ("-o cluster_size=512", "3M", 65536, 1000, 10000);
  threads_run ("-o cluster_size=4k", "20M", 65536, 1000, 50000);
  threads_run ("-o cluster_size=64k", "20M", 1 << 20, 1000, 200000);
  threads_run ("-o cluster_size=2M", "40M", 1 << 20, 200, 3000000);
}

/* Many threads write small pieces into the same few unallocated clusters
 * at once, again and again; no piece may be lost.
 */
struct piece_worker {
  struct qcow2 *q;
  unsigned number;
  pthread_barrier_t *barrier;
  pthread_t thread;
};

#define ROUNDS 60

static void *
write_pieces (void *arg)
{
  struct piece_worker *w = arg;
  uint8_t buf[512];

  for (unsigned round = 0; round < ROUNDS; ++round) {
    memset (buf, round + 1, sizeof buf);
    pthread_barrier_wait (w->barrier);
    assert_int_equal (qcow2_write (w->q, buf, sizeof buf,
                                   round * 65536 + w->number * 512), 0);
    if (w->number == 0)
      assert_int_equal (qcow2_flush (w->q), 0);
  }
  return NULL;
}

static void
test_one_cluster_many_writers (void **state)
{
  struct container *c = image_create ("", "16M", GIB);
  struct qcow2 *q = open_image (c, 1 << 20);
  struct piece_worker w[8];
  pthread_barrier_t barrier;
  uint8_t buf[8 * 512], want[8 * 512];

  (void) state;
  pthread_barrier_init (&barrier, NULL, 8);
  for (unsigned i = 0; i < 8; ++i) {
    w[i] = (struct piece_worker) { .q = q, .number = i, .barrier = &barrier };
    assert_int_equal (pthread_create (&w[i].thread, NULL, write_pieces, &w[i]),
                      0);
  }
  for (unsigned i = 0; i < 8; ++i)
    pthread_join (w[i].thread, NULL);
  for (unsigned round = 0; round < ROUNDS; ++round) {
    memset (want, round + 1, sizeof want);
    assert_int_equal (qcow2_read (q, buf, sizeof buf, round * 65536), 0);
    assert_memory_equal (buf, want, sizeof want);
  }
  assert_int_equal (qcow2_stop (q), 0);
  qcow2_close (q);
  image_check (c, 1);
  container_close (c);
  pthread_barrier_destroy (&barrier);
}

/* Discards against writes to the same clusters: what is read back is the
 * one or the other, never something else.
 */
struct race {
  struct qcow2 *q;
  atomic_bool stop;
};

static void *
discard_and_flush (void *arg)
{
  struct race *race = arg;
  uint64_t seed = 99;

  while (!atomic_load (&race->stop)) {
    const uint64_t r = random_next (&seed);

    if (r % 3 == 0)
      assert_int_equal (qcow2_zero (race->q, 65536, (r >> 8) % 32 * 65536,
                                    r >> 7 & 1 ? QCOW2_ZERO_KEEP : 0), 0);
    else
      assert_int_equal (qcow2_trim (race->q, 65536, (r >> 8) % 32 * 65536), 0);
    if (r % 5 == 0)
      assert_int_equal (qcow2_flush (race->q), 0);
  }
  return NULL;
}

static void
test_discard_races (void **state)
{
  struct container *c = image_create ("", "2M", GIB);
  struct race race = { .q = open_image (c, 1 << 20) };
  pthread_t thread;
  uint64_t seed = 5;
  uint8_t buf[65536];

  (void) state;
  assert_int_equal (pthread_create (&thread, NULL, discard_and_flush, &race),
                    0);
  const unsigned nr =
    getenv ("THREADS_ONLY") != NULL ? 2000 : how_often (20000, 8000, 1000);

  for (unsigned i = 0; i < nr; ++i) {
    const unsigned cluster = random_next (&seed) % 32;

    /* Every cluster has its own byte. */
    if (i % 2 == 0) {
      memset (buf, cluster + 1, 4096);
      assert_int_equal (qcow2_write (race.q, buf, 4096, cluster * 65536 +
                                     random_next (&seed) % 15 * 4096), 0);
    }
    else {
      assert_int_equal (qcow2_read (race.q, buf, 65536, cluster * 65536), 0);
      for (unsigned j = 0; j < 65536; ++j)
        if (buf[j] != 0 && buf[j] != cluster + 1)
          fail_msg ("cluster %u shows %u", cluster, buf[j]);
    }
  }
  atomic_store (&race.stop, true);
  pthread_join (thread, NULL);
  assert_int_equal (qcow2_stop (race.q), 0);
  qcow2_close (race.q);
  image_check (c, 1);
  container_close (c);
}

/* A write of SLOW_BYTES waits in the container until it is let go, or
 * fails if the test wants that.
 */
#define SLOW_BYTES 777

struct slow {
  sem_t arrived, go;
  int err;
};

static int
hold_slow_write (void *opaque, const char *operation, uint64_t offset,
                 uint64_t count)
{
  struct slow *slow = opaque;

  (void) offset;
  if (strcmp (operation, "pwrite") != 0 || count != SLOW_BYTES)
    return 0;
  if (slow->err != 0)
    return slow->err;
  sem_post (&slow->arrived);
  sem_wait (&slow->go);
  return 0;
}

static void *
write_slowly (void *arg)
{
  uint8_t buf[SLOW_BYTES];

  memset (buf, 99, sizeof buf);
  assert_int_equal (qcow2_write (arg, buf, sizeof buf, 0), 0);
  return NULL;
}

/* A write is on its way to a cluster that is discarded meanwhile.  The
 * cluster must not be used for something else before the write is done,
 * however often the image is flushed.
 */
static void
test_discard_under_write (void **state)
{
  struct container *c = image_create ("", "64M", GIB);
  struct qcow2 *q = open_image (c, 1 << 20);
  struct slow slow = { .err = 0 };
  const struct container_memory_hook hook = { hold_slow_write, &slow };
  static uint8_t buf[65536], back[65536];
  pthread_t thread;

  (void) state;
  sem_init (&slow.arrived, 0, 0);
  sem_init (&slow.go, 0, 0);
  memset (buf, 1, sizeof buf);
  assert_int_equal (qcow2_write (q, buf, sizeof buf, 0), 0);
  assert_int_equal (qcow2_flush (q), 0);
  container_memory_set_hook (c, &hook);
  assert_int_equal (pthread_create (&thread, NULL, write_slowly, q), 0);
  sem_wait (&slow.arrived);

  assert_int_equal (qcow2_trim (q, sizeof buf, 0), 0);
  for (unsigned i = 1; i < 100; ++i) {
    assert_int_equal (qcow2_flush (q), 0);
    assert_int_equal (qcow2_write (q, buf, sizeof buf, i * 65536), 0);
  }
  sem_post (&slow.go);
  pthread_join (thread, NULL);

  for (unsigned i = 1; i < 100; ++i) {
    assert_int_equal (qcow2_read (q, back, sizeof back, i * 65536), 0);
    assert_memory_equal (back, buf, sizeof back);
  }
  assert_int_equal (qcow2_stop (q), 0);
  qcow2_close (q);
  container_memory_set_hook (c, NULL);
  image_check (c, 1);
  container_close (c);
}

/* A write to a new cluster fails: the cluster is not leaked. */
static void
test_no_leak_after_failed_write (void **state)
{
  struct container *c = image_create ("", "64M", GIB);
  struct qcow2 *q = open_image (c, 1 << 20);
  struct slow slow = { .err = EIO };
  const struct container_memory_hook hook = { hold_slow_write, &slow };
  uint8_t buf[SLOW_BYTES] = { 1 }, back[SLOW_BYTES];

  (void) state;
  assert_int_equal (qcow2_write (q, buf, 1, 1 << 20), 0);
  container_memory_set_hook (c, &hook);
  assert_int_equal (qcow2_write (q, buf, sizeof buf, 0), -1);
  assert_int_equal (errno, EIO);
  container_memory_set_hook (c, NULL);
  assert_int_equal (qcow2_read (q, back, sizeof back, 0), 0);
  memset (buf, 0, sizeof buf);
  assert_memory_equal (back, buf, sizeof buf);
  assert_int_equal (qcow2_stop (q), 0);
  qcow2_close (q);
  image_check (c, 1);
  container_close (c);
}

/* Fail the k-th operation of the container, for every k in turn. */
struct fault {
  atomic_long left;
  int err;
  bool lasting;                 /* all after it fail too */
};

static int
fail_one (void *opaque, const char *operation, uint64_t offset, uint64_t count)
{
  struct fault *f = opaque;
  const long left = atomic_fetch_sub (&f->left, 1);

  (void) operation;
  (void) offset;
  (void) count;
  return left == 0 || (f->lasting && left < 0) ? f->err : 0;
}

static void
one_fault (const char *options, long k, int err, bool lasting,
           bool *happened)
{
  struct container *c = image_create (options, "4M", GIB);
  struct qcow2 *q = open_image (c, 65536);
  const uint64_t size = qcow2_size (q);
  struct fault fault = { .err = err, .lasting = lasting };
  struct container_memory_hook hook = { fail_one, &fault };
  uint8_t buf[3000], back[3000];
  uint64_t seed = 7;
  bool known[64] = { false };

  atomic_init (&fault.left, k);
  container_memory_set_hook (c, &hook);
  /* 64 places far apart; a failed write may leave anything in its own. */
  for (unsigned i = 0; i < 64; ++i) {
    const uint64_t offset = i * (size / 64) + 100;

    memset (buf, i + 1, sizeof buf);
    known[i] = qcow2_write (q, buf, sizeof buf, offset) == 0;
    if (random_next (&seed) % 4 == 0)
      qcow2_flush (q);
    if (i % 8 == 7) {
      /* What is discarded may be there or not, from now on. */
      qcow2_trim (q, size / 64, (i - 3) * (size / 64));
      known[i - 3] = false;
    }
  }
  *happened = atomic_load (&fault.left) < 0;

  /* The fault is over: what was acknowledged reads back, the image can
   * be written and stopped, and QEMU finds nothing but leaks.
   */
  container_memory_set_hook (c, NULL);
  for (unsigned i = 0; i < 64; ++i) {
    memset (buf, i + 1, sizeof buf);
    if (known[i]) {
      assert_int_equal (qcow2_read (q, back, sizeof back,
                                    i * (size / 64) + 100), 0);
      assert_memory_equal (back, buf, sizeof buf);
    }
  }
  assert_int_equal (qcow2_write (q, buf, sizeof buf, size / 2 + 50000), 0);
  assert_int_equal (qcow2_flush (q), 0);
  assert_int_equal (qcow2_stop (q), 0);
  qcow2_close (q);
  image_check (c, 0);
  container_close (c);
}

static void
faults_run (const char *options, int err, bool lasting)
{
  bool happened = true;
  long k;

  /* Every one of the first, then a sample of the rest. */
  for (k = 0; happened; k += 1 + k / how_often (12, 12, 3))
    one_fault (options, k, err, lasting, &happened);
  assert_true (k > 20);
}

static void
test_faults (void **state)
{
  (void) state;
  faults_run ("-o cluster_size=4k", EIO, false);
  faults_run ("-o cluster_size=512", EIO, false);
  faults_run ("-o cluster_size=64k", ENOSPC, true);
}

/* A container that cannot grow: ENOSPC and no damage; trimmed clusters
 * are used again without a flush in between.
 */
static void
test_no_space (void **state)
{
  struct container *c = image_create ("", "64M", 8 << 20);
  struct qcow2 *q = open_image (c, 1 << 20);
  static uint8_t buf[65536];
  unsigned written = 0;

  (void) state;
  memset (buf, 7, sizeof buf);
  while (qcow2_write (q, buf, sizeof buf, written * 65536) == 0)
    written++;
  assert_int_equal (errno, ENOSPC);
  assert_in_range (written, 100, 128);
  for (unsigned i = 0; i < 1000; ++i) {
    const unsigned from = i % written, to = 500 + i;

    assert_int_equal (qcow2_trim (q, 65536, from * 65536), 0);
    assert_int_equal (qcow2_write (q, buf, sizeof buf, to % 1000 * 65536), 0);
    assert_int_equal (qcow2_trim (q, 65536, to % 1000 * 65536), 0);
    assert_int_equal (qcow2_write (q, buf, sizeof buf, from * 65536), 0);
  }
  assert_int_equal (qcow2_write (q, buf, sizeof buf, 900 * 65536), -1);
  assert_int_equal (errno, ENOSPC);
  assert_int_equal (qcow2_flush (q), 0);
  assert_int_equal (qcow2_stop (q), 0);
  qcow2_close (q);
  image_check (c, 1);
  container_close (c);
}

/* The refcount table has to be replaced more than once. */
static void
test_refcount_table_growth (void **state)
{
  struct container *c =
    image_create ("-o cluster_size=512,refcount_bits=64", "96M", GIB);
  struct qcow2 *q = open_image (c, 65536);
  static uint8_t buf[1 << 20];

  (void) state;
  for (unsigned i = 0; i < 96; ++i) {
    memset (buf, i + 1, sizeof buf);
    assert_int_equal (qcow2_write (q, buf, sizeof buf, i * sizeof buf), 0);
  }
  assert_int_equal (qcow2_stop (q), 0);
  qcow2_close (q);
  image_check (c, 1);
  container_close (c);
}

/* Nothing is written into an image that nothing is written to. */
static int
no_operation (void *opaque, const char *operation, uint64_t offset,
              uint64_t count)
{
  (void) opaque;
  (void) offset;
  (void) count;
  if (strcmp (operation, "flush") != 0)
    fail_msg ("%s at %" PRIu64, operation, offset);
  return 0;
}

static void
test_idle (void **state)
{
  struct container *c = image_create ("", "64M", GIB);
  const struct container_memory_hook hook = { no_operation, NULL };
  struct qcow2 *q;
  uint8_t buf[4096];

  (void) state;
  container_memory_set_hook (c, &hook);
  q = open_image (c, 1 << 20);
  assert_int_equal (qcow2_read (q, buf, sizeof buf, 12345), 0);
  assert_int_equal (qcow2_flush (q), 0);
  assert_int_equal (qcow2_stop (q), 0);
  qcow2_close (q);
  container_close (c);
}

/* An L2 entry that points to the L1 table: the write is refused, the
 * image gets its corrupt bit, and the L1 table stays as it was.
 */
static void
test_overlap (void **state)
{
  struct container *c = image_create ("-o cluster_size=64k", "64M", GIB);
  struct qcow2 *q = open_image (c, 1 << 20);
  uint8_t buf[512] = { 1 }, before[512], after[512], be[8];
  uint64_t l1_offset, l2_offset;

  (void) state;
  assert_int_equal (qcow2_write (q, buf, sizeof buf, 0), 0);
  assert_int_equal (qcow2_stop (q), 0);
  qcow2_close (q);

  assert_int_equal (container_pread (c, be, 8, 40), 0);
  l1_offset = get_be64 (be);
  assert_int_equal (container_pread (c, be, 8, l1_offset), 0);
  l2_offset = get_be64 (be) & UINT64_C (0x00fffffffffffe00);
  put_be64 (be, l1_offset | UINT64_C (1) << 63);
  assert_int_equal (container_pwrite (c, be, 8, l2_offset), 0);
  assert_int_equal (container_pread (c, before, 512, l1_offset), 0);

  q = open_image (c, 1 << 20);
  assert_int_equal (qcow2_write (q, buf, sizeof buf, 0), -1);
  assert_int_equal (errno, EIO);
  assert_int_equal (qcow2_write (q, buf, sizeof buf, 1 << 20), -1);
  assert_int_equal (errno, EIO);
  qcow2_close (q);
  assert_int_equal (container_pread (c, after, 512, l1_offset), 0);
  assert_memory_equal (before, after, 512);
  assert_int_equal (container_pread (c, be, 8, 72), 0);
  assert_int_equal (get_be64 (be) & 2, 2);
  container_close (c);
}

/* Bytes of a cache that a size_t of 32 bits cannot count. */
static void
test_cache_too_large (void **state)
{
  const struct qcow2_options options = { .cache_size = 8 * GIB };
  struct container *c;

  (void) state;
  if (sizeof (size_t) > 4)
    skip ();
  c = image_create ("", "64M", GIB);
  assert_null (qcow2_open (c, &options));
  container_close (c);
}

int
main (void)
{
  const struct CMUnitTest tests[] = {
    cmocka_unit_test (test_random),
    cmocka_unit_test (test_threads),
    cmocka_unit_test (test_one_cluster_many_writers),
    cmocka_unit_test (test_discard_races),
    cmocka_unit_test (test_discard_under_write),
    cmocka_unit_test (test_no_leak_after_failed_write),
    cmocka_unit_test (test_faults),
    cmocka_unit_test (test_no_space),
    cmocka_unit_test (test_refcount_table_growth),
    cmocka_unit_test (test_idle),
    cmocka_unit_test (test_overlap),
    cmocka_unit_test (test_cache_too_large),
  };

  if (run_command ("qemu-img --version >/dev/null 2>&1") != 0)
    return 77;
  report_sink = report_if_verbose;
  get_number ("SEED", &first_seed);
  print_message ("SEED=%" PRIu64 "\n", first_seed);
  return cmocka_run_group_tests (tests, NULL, NULL);
}
