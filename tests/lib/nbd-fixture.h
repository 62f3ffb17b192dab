/* nbdkit-dirty-bitmap-filter
 * SPDX-License-Identifier: BSD-3-Clause
 * Copyright the nbdkit-dirty-bitmap-filter authors
 */

#ifndef DIRTY_BITMAP_TEST_NBD_FIXTURE_H
#define DIRTY_BITMAP_TEST_NBD_FIXTURE_H

/* What each unit test of nbd/ has: one server, which its setup makes by
 * fixture_init and fixture_start, and which is stopped afterwards.
 */

#include "nbd-client.h"

static struct fixture f;

static inline int
teardown (void **state)
{
  (void) state;
  fixture_stop (&f);
  return 0;
}

/* With the test's own setup. */
#define TEST(name) cmocka_unit_test_setup_teardown (name, setup, teardown)

#endif /* DIRTY_BITMAP_TEST_NBD_FIXTURE_H */
