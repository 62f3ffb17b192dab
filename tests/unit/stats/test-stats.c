/* nbdkit-dirty-bitmap-filter
 * SPDX-License-Identifier: BSD-3-Clause
 * Copyright the nbdkit-dirty-bitmap-filter authors
 */

/* Counting, durations by their size, and the values of labels. */

#include <config.h>

#include <errno.h>
#include <pthread.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include <cmocka.h>

#include "common/meter.h"
#include "stats/histogram.h"
#include "stats/internal.h"
#include "stats/stats.h"

/* Every duration has a bucket, whose middle is within 1/64 of it, and
 * longer ones have no lower one.
 */
static void
test_buckets (void **state)
{
  unsigned last = 0;

  (void) state;
  for (uint64_t ns = 0; ns < UINT64_C (1) << HISTOGRAM_MAX_BITS;
       ns += 1 + ns / 997) {
    const unsigned bucket = histogram_bucket (ns);
    const double off = histogram_middle_ns (bucket) - ns;

    assert_true (bucket < HISTOGRAM_BUCKETS);
    assert_true (bucket == last || bucket == last + 1);
    assert_true ((off < 0 ? -off : off) <= ns / 64.0);
    last = bucket;
  }
  assert_int_equal (last, HISTOGRAM_BUCKETS - 1);
  assert_int_equal (histogram_bucket (UINT64_MAX), HISTOGRAM_BUCKETS - 1);
  for (unsigned bits = HISTOGRAM_STEP_BITS; bits < HISTOGRAM_MAX_BITS; ++bits)
    assert_int_equal (histogram_bucket (UINT64_C (1) << bits),
                      histogram_bucket ((UINT64_C (1) << bits) - 1) + 1);
}

static void
test_quantiles (void **state)
{
  uint64_t buckets[HISTOGRAM_BUCKETS] = { 0 };

  (void) state;
  /* 1000 durations of 1 to 1000 us. */
  for (unsigned i = 1; i <= 1000; ++i)
    buckets[histogram_bucket (i * 1000)]++;
  const unsigned thousandths[] = { 1, 500, 900, 990, 999, 1000 };
  for (size_t i = 0; i < sizeof thousandths / sizeof thousandths[0]; ++i) {
    const double want = thousandths[i] * 1e3;
    const double got = histogram_quantile_ns (buckets, 1000, thousandths[i]);

    /* Its bucket's middle, wherever in the bucket it is. */
    assert_true (got >= want * 63 / 64 - 1 && got <= want * 65 / 64 + 1);
  }

  memset (buckets, 0, sizeof buckets);
  buckets[histogram_bucket (7)] = 1;
  assert_true (histogram_quantile_ns (buckets, 1, 500) == 7);
  assert_true (histogram_quantile_ns (buckets, 1, 999) == 7);
}

static void
check_label (const char *value, const char *want)
{
  char *text;
  size_t size;
  FILE *f = open_memstream (&text, &size);

  assert_non_null (f);
  stats_write_label (f, value);
  assert_int_equal (fclose (f), 0);
  assert_string_equal (text, want);
  free (text);
}

static void
test_labels (void **state)
{
  (void) state;
  check_label ("", "\"\"");
  check_label ("monday", "\"monday\"");
  check_label ("a\"b", "\"a\\\"b\"");
  check_label ("a\\b", "\"a\\\\b\"");
  check_label ("a\nb", "\"a\\nb\"");
  /* A byte that is not UTF-8, and what it is written as. */
  check_label ("\xff", "\"\\\\xff\"");
  check_label ("\\xff", "\"\\\\x5cxff\"");
  check_label ("\\x5cxff", "\"\\\\x5cx5cxff\"");
  check_label ("\x01\x1f\x7f\r", "\"\\\\x01\\\\x1f\\\\x7f\\\\x0d\"");
  /* Cut short at the end, overlong, surrogates, beyond the last. */
  check_label ("\xe2\x82", "\"\\\\xe2\\\\x82\"");
  check_label ("\xf0\x9f\x98", "\"\\\\xf0\\\\x9f\\\\x98\"");
  check_label ("\xc1\xbf", "\"\\\\xc1\\\\xbf\"");
  check_label ("\xe0\x9f\xbf", "\"\\\\xe0\\\\x9f\\\\xbf\"");
  check_label ("\xed\xa0\x80", "\"\\\\xed\\\\xa0\\\\x80\"");
  check_label ("\xf0\x8f\xbf\xbf", "\"\\\\xf0\\\\x8f\\\\xbf\\\\xbf\"");
  check_label ("\xf4\x90\x80\x80", "\"\\\\xf4\\\\x90\\\\x80\\\\x80\"");
  check_label ("\xf5\x80\x80\x80", "\"\\\\xf5\\\\x80\\\\x80\\\\x80\"");
  check_label ("\xe2\x28\xa1", "\"\\\\xe2(\\\\xa1\"");
  check_label ("\xc2\x80\xdf\xbf\xe0\xa0\x80\xed\x9f\xbf\xef\xbf\xbf",
               "\"\xc2\x80\xdf\xbf\xe0\xa0\x80\xed\x9f\xbf\xef\xbf\xbf\"");
  check_label ("\xf0\x90\x80\x80\xf4\x8f\xbf\xbf",
               "\"\xf0\x90\x80\x80\xf4\x8f\xbf\xbf\"");
}

#define NR_THREADS 24
#define EACH 20000

static struct stats *stats;
static struct meter meter;

static void *
count (void *unused)
{
  (void) unused;
  for (unsigned i = 0; i < EACH; ++i) {
    const uint64_t began = stats_begin (stats);

    stats_end (stats, began, STATS_READ, 3, i % 4 == 0 ? EIO : 0);
    stats_end (stats, began, STATS_WRITE, 1, 0);
    meter_add (&meter, 2);
  }
  return NULL;
}

/* Nothing is lost between threads, and there are never more failures than
 * requests while they count.
 */
static void
test_threads (void **state)
{
  const uint64_t each = (uint64_t) NR_THREADS * EACH;
  struct stats_totals t;
  pthread_t threads[NR_THREADS];

  (void) state;
  meter_is_on = true;
  stats = stats_new ();
  assert_non_null (stats);
  for (unsigned i = 0; i < NR_THREADS; ++i)
    assert_int_equal (pthread_create (&threads[i], NULL, count, NULL), 0);
  do {
    stats_sum (stats, STATS_READ, &t);
    assert_true (t.count[STATS_EIO] <= t.all);
    assert_int_equal (t.count[STATS_EIO] + t.count[STATS_SUCCESS], t.all);
  } while (t.all < each / 2);
  for (unsigned i = 0; i < NR_THREADS; ++i)
    pthread_join (threads[i], NULL);

  stats_sum (stats, STATS_READ, &t);
  assert_int_equal (t.all, each);
  assert_int_equal (t.count[STATS_EIO], each / 4);
  assert_int_equal (t.count[STATS_SUCCESS], each / 4 * 3);
  assert_int_equal (t.bytes, each / 4 * 3 * 3);
  assert_true (t.sum_ns > 0);
  stats_sum (stats, STATS_WRITE, &t);
  assert_int_equal (t.count[STATS_SUCCESS], each);
  assert_int_equal (t.bytes, each);
  stats_sum (stats, STATS_TRIM, &t);
  assert_int_equal (t.all, 0);
  assert_int_equal (meter_total (&meter), 2 * each);
  stats_free (stats);
}

/* Nobody wants them. */
static void
test_none (void **state)
{
  (void) state;
  meter_is_on = false;
  assert_int_equal (meter_clock (), 0);
  assert_int_equal (stats_begin (NULL), 0);
  stats_end (NULL, 0, STATS_READ, 1, 0);
  stats_connection_opened (NULL);
  stats_connection_closed (NULL);
  stats_connection_refused (NULL);
  stats_free (NULL);
}

int
main (void)
{
  const struct CMUnitTest tests[] = {
    cmocka_unit_test (test_buckets),
    cmocka_unit_test (test_quantiles),
    cmocka_unit_test (test_labels),
    cmocka_unit_test (test_threads),
    cmocka_unit_test (test_none),
  };

  return cmocka_run_group_tests (tests, NULL, NULL);
}
