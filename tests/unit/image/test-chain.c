/* nbdkit-dirty-bitmap-filter
 * SPDX-License-Identifier: BSD-3-Clause
 * Copyright the nbdkit-dirty-bitmap-filter authors
 */

/* Files that change their place while the chain is opened: what is used
 * is what was judged.  How it is judged, test-backing-confined.py shows.
 */

#include <config.h>

#include <errno.h>
#include <fcntl.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <cmocka.h>

#include "image/chain.h"
#include "common/report.h"
#include "container/container.h"
#include "disk/disk.h"
#include "image.h"

/* Somebody who is always just in time: called when a place is asked for,
 * before and after the answer.
 */
static void (*before_answer) (void), (*after_answer) (void);

ssize_t
readlink (const char *path, char *buf, size_t size)
{
  ssize_t r;

  if (before_answer != NULL)
    before_answer ();
  r = syscall (SYS_readlinkat, AT_FDCWD, path, buf, size);
  if (after_answer != NULL)
    after_answer ();
  return r;
}

static char inside[256], outside[256], name[256];

static void
point_to (const char *target)
{
  if (unlink (name) == -1 && errno != ENOENT)
    abort ();
  if (symlink (target, name) == -1)
    abort ();
}

static void
point_inside (void)
{
  point_to (inside);
}

static void
point_outside (void)
{
  point_to (outside);
}

static void
be_silent (enum report_level level, const char *fmt, va_list args)
{
  (void) level; (void) fmt; (void) args;
}

static void
write_text (const char *path, const char *text)
{
  FILE *fp = fopen (path, "w");

  assert_non_null (fp);
  assert_true (fputs (text, fp) >= 0);
  assert_int_equal (fclose (fp), 0);
}

static int image_fd;
static char image_path[256];

static int
setup (void **state)
{
  const char *folder = temp_file ("folder");

  (void) state;
  report_sink = be_silent;
  assert_int_equal (mkdir (folder, 0777), 0);
  snprintf (image_path, sizeof image_path, "%s/image", folder);
  snprintf (name, sizeof name, "%s/name", folder);
  snprintf (inside, sizeof inside, "%s/inside", folder);
  snprintf (outside, sizeof outside, "%s", temp_file ("outside"));
  write_text (inside, "inside");
  write_text (outside, "outside");
  point_inside ();
  assert_int_equal (run_command ("qemu-img create -q -f qcow2 -b name -F raw "
                                 "%s 1M", image_path), 0);
  image_fd = open (image_path, O_RDONLY | O_CLOEXEC);
  assert_true (image_fd >= 0);
  return 0;
}

static struct chain *
open_it (void)
{
  struct container *c = container_open_file (image_fd);
  const struct chain_options options = {
    .readonly = true, .path = image_path, .fd = image_fd,
    .cache_size = 1 << 20,
  };
  struct chain *chain;

  assert_non_null (c);
  chain = chain_open (c, &options);
  container_close (c);
  return chain;
}

static void
assert_is_inside (struct chain *chain)
{
  struct disk_options o = { .readonly = true };
  char text[8] = "";

  assert_non_null (chain);
  chain_give (chain, &o);
  assert_non_null (o.below.raw);
  assert_int_equal (container_pread (o.below.raw, text, 7, 0), 0);
  assert_string_equal (text, "inside");
  chain_close (chain);
}

static void
test_still (void **state)
{
  (void) state;
  point_inside ();
  assert_is_inside (open_it ());
  point_outside ();
  errno = 0;
  assert_null (open_it ());
  assert_int_equal (errno, EACCES);
}

static void
test_moves_out_when_judged (void **state)
{
  (void) state;
  point_inside ();
  after_answer = point_outside;
  assert_is_inside (open_it ());
  after_answer = NULL;
}

static void
test_moves_in_to_be_judged (void **state)
{
  (void) state;
  point_outside ();
  before_answer = point_inside;
  after_answer = point_outside;
  errno = 0;
  assert_null (open_it ());
  assert_int_equal (errno, EACCES);
  before_answer = after_answer = NULL;
}

int
main (void)
{
  const struct CMUnitTest tests[] = {
    cmocka_unit_test (test_still),
    cmocka_unit_test (test_moves_out_when_judged),
    cmocka_unit_test (test_moves_in_to_be_judged),
  };

  return cmocka_run_group_tests (tests, setup, NULL);
}
