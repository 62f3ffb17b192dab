/* nbdkit-dirty-bitmap-filter
 * SPDX-License-Identifier: BSD-3-Clause
 * Copyright the nbdkit-dirty-bitmap-filter authors
 */

/* Errors that come with every request do not fill the log, and none is
 * forgotten.
 */

#include <config.h>

#include <errno.h>
#include <pthread.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <string.h>
#include <time.h>

#include <cmocka.h>

#include "common/cleanup.h"
#include "common/limit.h"
#include "common/report.h"

static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
static unsigned nr_shown[3];    /* by level */
static char last[300];

static void
sink (enum report_level level, const char *fmt, va_list args)
{
  ACQUIRE_LOCK_FOR_CURRENT_SCOPE (&lock);
  nr_shown[level]++;
  vsnprintf (last, sizeof last, fmt, args);
}

static int
setup (void **state)
{
  (void) state;
  report_limits_end ();
  memset (nr_shown, 0, sizeof nr_shown);
  limit_period_ms = 60 * 1000;
  return 0;
}

static void
in_thread (void *(*f) (void *), void *arg)
{
  pthread_t thread;

  assert_int_equal (pthread_create (&thread, NULL, f, arg), 0);
  pthread_join (thread, NULL);
}

static void *
fail_to_write (void *nr)
{
  report_limit_thread ();
  for (unsigned i = 0; i < *(unsigned *) nr; ++i) {
    errno = ENOSPC;
    report_error ("cannot write request %u: %m", i);
    if (errno != ENOSPC)
      return "errno";
  }
  return NULL;
}

static void
test_limit (void **state)
{
  unsigned nr = 1000;

  (void) state;
  in_thread (fail_to_write, &nr);
  assert_int_equal (nr_shown[REPORT_ERROR], 10);
  assert_string_equal (last, "cannot write request 9: "
                       "No space left on device");
  in_thread (fail_to_write, &nr);       /* they are counted together */
  assert_int_equal (nr_shown[REPORT_ERROR], 10);
  report_limits_end ();
  assert_int_equal (nr_shown[REPORT_ERROR], 11);
  assert_string_equal (last, "1990 more errors like this one were not shown: "
                       "cannot write request 9: No space left on device");
  report_limits_end ();
  assert_int_equal (nr_shown[REPORT_ERROR], 11);
}

/* Up to the limit there is nothing to tell. */
static void
test_few (void **state)
{
  unsigned nr = 10;

  (void) state;
  in_thread (fail_to_write, &nr);
  report_limits_end ();
  assert_int_equal (nr_shown[REPORT_ERROR], 10);
}

static void
test_period (void **state)
{
  const struct timespec longer = { .tv_nsec = 300 * 1000000 };
  unsigned nr = 25;

  (void) state;
  limit_period_ms = 60 * 1000;
  in_thread (fail_to_write, &nr);
  assert_int_equal (nr_shown[REPORT_ERROR], 10);
  limit_period_ms = 200;
  nanosleep (&longer, NULL);
  nr = 1;
  in_thread (fail_to_write, &nr);
  assert_int_equal (nr_shown[REPORT_ERROR], 12);
  assert_string_equal (last, "cannot write request 0: "
                       "No space left on device");
}

static void *
warn_and_hold (void *unused)
{
  (void) unused;
  report_limit_thread ();
  for (unsigned i = 0; i < 30; ++i) {
    struct report_hold hold;

    report_warning ("a warning");
    report_debug ("not limited");
    report_limited_error ("nor this");
    report_hold_begin (&hold);
    report_error ("cannot read %u", i);
    report_error ("and so this failed");
    report_hold_end (&hold);
    report_held (&hold);

    /* Another kind, held. */
    report_hold_begin (&hold);
    report_error ("no memory");
    report_hold_end (&hold);
    report_held (&hold);
  }
  return NULL;
}

/* What was held counts as what it is, and when it is shown. */
static void
test_kinds (void **state)
{
  (void) state;
  in_thread (warn_and_hold, NULL);
  assert_int_equal (nr_shown[REPORT_WARNING], 10);
  assert_int_equal (nr_shown[REPORT_DEBUG], 30);
  assert_int_equal (nr_shown[REPORT_ERROR], 30 + 10 + 10);
  report_limits_end ();
  assert_int_equal (nr_shown[REPORT_ERROR], 50 + 3);
}

/* Other threads, as that which opens the image, show all. */
static void
test_unlimited (void **state)
{
  (void) state;
  for (unsigned i = 0; i < 100; ++i)
    report_error ("bitmap %u is damaged", i);
  assert_int_equal (nr_shown[REPORT_ERROR], 100);
}

#define KIND(n) "kind " #n " %u"
#define KINDS(n) KIND (n##0), KIND (n##1), KIND (n##2), KIND (n##3),    \
    KIND (n##4), KIND (n##5), KIND (n##6), KIND (n##7)

/* More kinds than there are places for: the limit holds still. */
static void *
many_kinds (void *unused)
{
  static const char *const fmt[] = {
    KINDS (0), KINDS (1), KINDS (2), KINDS (3), KINDS (4), KINDS (5),
    KINDS (6), KINDS (7), KINDS (8), KINDS (9),
  };

  (void) unused;
  report_limit_thread ();
#pragma GCC diagnostic push
#pragma GCC diagnostic ignored "-Wformat-nonliteral"
  for (size_t k = 0; k < sizeof fmt / sizeof fmt[0]; ++k)
    for (unsigned i = 0; i < 1000; ++i)
      report_error (fmt[k], i);
#pragma GCC diagnostic pop
  return NULL;
}

static void
test_many_kinds (void **state)
{
  (void) state;
  in_thread (many_kinds, NULL);
  assert_in_range (nr_shown[REPORT_ERROR], 100, 64 * 10);
}

static void *
forever (void *stop)
{
  unsigned nr = 100;

  while (!__atomic_load_n ((bool *) stop, __ATOMIC_RELAXED))
    fail_to_write (&nr);
  return NULL;
}

/* From several threads at once, with the end in between. */
static void
test_threads (void **state)
{
  const struct timespec ms = { .tv_nsec = 1000000 };
  pthread_t threads[4];
  bool stop = false;

  (void) state;
  for (int i = 0; i < 4; ++i)
    pthread_create (&threads[i], NULL, forever, &stop);
  for (int i = 0; i < 50; ++i) {
    nanosleep (&ms, NULL);
    report_limits_end ();
  }
  __atomic_store_n (&stop, true, __ATOMIC_RELAXED);
  for (int i = 0; i < 4; ++i)
    pthread_join (threads[i], NULL);
  assert_in_range (nr_shown[REPORT_ERROR], 10, 51 * 12);
}

int
main (void)
{
#define TEST(name) cmocka_unit_test_setup (name, setup)
  const struct CMUnitTest tests[] = {
    TEST (test_limit),
    TEST (test_few),
    TEST (test_period),
    TEST (test_kinds),
    TEST (test_unlimited),
    TEST (test_threads),
    TEST (test_many_kinds),
  };

  report_sink = sink;
  return cmocka_run_group_tests (tests, NULL, NULL);
}
