/* nbdkit-dirty-bitmap-filter
 * SPDX-License-Identifier: BSD-3-Clause
 * Copyright the nbdkit-dirty-bitmap-filter authors
 */

/* The order in which new refcount blocks and their table entries reach
 * the disk (crash-blocks.c).
 */

#include <config.h>

#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>

#include <cmocka.h>

#include "crash-universe.h"
#include "image.h"

static void
test_many_new_refcount_blocks (void **unused)
{
  unsigned nr_states;
  const char *error = crash_refcount_blocks (&nr_states);

  (void) unused;
  if (error != NULL)
    fail_msg ("state %u: %s", nr_states, error);
}

int
main (void)
{
  const struct CMUnitTest tests[] = {
    cmocka_unit_test (test_many_new_refcount_blocks),
  };

  if (run_command ("qemu-img --version >/dev/null 2>&1") != 0)
    return 77;
  return cmocka_run_group_tests (tests, NULL, NULL);
}
