/* nbdkit-dirty-bitmap-filter
 * SPDX-License-Identifier: BSD-3-Clause
 * Copyright the nbdkit-dirty-bitmap-filter authors
 */

/* A barrier that fails may lose what another thread has written.  That
 * thread's own barrier comes a moment later and succeeds, since the kernel
 * tells an error once.  It must not be taken for a success, however soon it
 * comes: the thread whose barrier has failed is held back here.
 */

#include <config.h>

#include <errno.h>
#include <pthread.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stdatomic.h>
#include <stddef.h>
#include <stdint.h>
#include <string.h>
#include <time.h>

#include <cmocka.h>

#include "container/container.h"
#include "image.h"
#include "qcow2/qcow2.h"

static atomic_bool fails;       /* the next flush of the container */
static atomic_bool has_failed;
static atomic_bool may_go_on;   /* the thread whose flush it was */

static void
nap (void)
{
  const struct timespec ts = { .tv_nsec = 1000000 };

  nanosleep (&ts, NULL);
}

static int
fail_once (void *opaque, const char *operation, uint64_t offset,
           uint64_t count)
{
  (void) opaque;
  (void) offset;
  (void) count;
  return strcmp (operation, "flush") == 0 && atomic_exchange (&fails, false)
    ? EIO : 0;
}

/* The linker puts these two between qcow2/ and container/. */
extern int __real_container_flush (struct container *);
extern int __wrap_container_flush (struct container *);

int
__wrap_container_flush (struct container *c)
{
  const int r = __real_container_flush (c);
  const int err = errno;

  if (r == -1) {
    atomic_store (&has_failed, true);
    while (!atomic_load (&may_go_on))
      nap ();
  }
  errno = err;
  return r;
}

static void *
flush_in_vain (void *q)
{
  assert_int_equal (qcow2_flush (q), -1);
  return NULL;
}

static void
test_lost_by_another (void **state)
{
  struct container *c = image_create ("", "1M", 8 << 20);
  const struct container_memory_hook hook = { .before = fail_once };
  const struct qcow2_options options = { .readonly = false };
  struct qcow2 *q = qcow2_open (c, &options);
  static const char data[65536] = "data";
  pthread_t thread;
  unsigned long lost;
  int r;

  (void) state;
  assert_non_null (q);
  container_memory_set_hook (c, &hook);
  assert_int_equal (qcow2_write (q, data, sizeof data, 0), 0);
  lost = qcow2_lost (q);
  assert_int_equal (qcow2_write (q, data, sizeof data, 0), 0);

  atomic_store (&fails, true);
  assert_int_equal (pthread_create (&thread, NULL, flush_in_vain, q), 0);
  while (!atomic_load (&has_failed))
    nap ();
  r = qcow2_barrier_since (q, lost);
  atomic_store (&may_go_on, true);
  assert_int_equal (pthread_join (thread, NULL), 0);
  assert_int_equal (r, -1);
  assert_int_equal (qcow2_lost (q), lost + 1);

  /* What is written from now on is not lost. */
  lost = qcow2_lost (q);
  assert_int_equal (qcow2_write (q, data, sizeof data, 0), 0);
  assert_int_equal (qcow2_barrier_since (q, lost), 0);
  assert_int_equal (qcow2_stop (q), 0);
  qcow2_close (q);

  /* Nor is the past that of an image that is opened anew. */
  q = qcow2_open (c, &options);
  assert_non_null (q);
  assert_int_equal (qcow2_lost (q), 0);
  qcow2_close (q);
  image_check (c, 1);
  container_close (c);
}

int
main (void)
{
  const struct CMUnitTest tests[] = {
    cmocka_unit_test (test_lost_by_another),
  };

  report_sink = report_if_verbose;
  if (run_command ("qemu-img --version >/dev/null 2>&1") != 0)
    return 77;
  return cmocka_run_group_tests (tests, NULL, NULL);
}
