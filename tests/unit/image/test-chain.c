/* nbdkit-dirty-bitmap-filter
 * SPDX-License-Identifier: BSD-3-Clause
 * Copyright the nbdkit-dirty-bitmap-filter authors
 */

/* Files that change their place while the chain is opened: what is used
 * is what was judged.  How it is judged, test-backing-confined.py shows.
 *
 * And what an image beside a disk may refer to: nothing but that disk.
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

static unsigned nr_errors;
static char errors[2048];

static void
keep_error (enum report_level level, const char *fmt, va_list args)
{
  if (level != REPORT_ERROR)
    return;
  if (nr_errors++ == 0)
    errors[0] = '\0';
  vsnprintf (errors + strlen (errors), sizeof errors - strlen (errors), fmt,
             args);
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
  report_sink = keep_error;
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

/* An image beside a disk. */
static char beside_path[256];

static void
create_beside (const char *options)
{
  snprintf (beside_path, sizeof beside_path, "%s", temp_file ("folder/beside"));
  unlink (beside_path);
  assert_int_equal (run_command ("cd '%s/folder' && qemu-img create -q -f "
                                 "qcow2 %s beside 1M", temp_folder (),
                                 options), 0);
}

/* The chain of that image, if the disk is the file at disk_path, or it is
 * not known which it is.
 */
static struct chain *
open_beside (const char *disk_path, const char *allowed, bool readonly)
{
  const int fd = open (beside_path, O_RDONLY | O_CLOEXEC);
  struct container *c = container_open_file (fd);
  struct stat disk;
  const struct chain_options options = {
    .readonly = readonly, .path = beside_path, .fd = fd,
    .cache_size = 1 << 20, .allowed = &allowed,
    .nr_allowed = allowed != NULL, .is_beside = true,
    .disk = disk_path != NULL ? &disk : NULL,
  };
  struct chain *chain;

  assert_non_null (c);
  if (disk_path != NULL)
    assert_int_equal (stat (disk_path, &disk), 0);
  nr_errors = 0;
  errno = 0;
  chain = chain_open (c, &options);
  container_close (c);
  close (fd);
  return chain;
}

static void
assert_refused (struct chain *chain, int err, const char *why)
{
  assert_null (chain);
  assert_int_equal (errno, err);
  assert_int_not_equal (nr_errors, 0);
  assert_non_null (strstr (errors, why));
}

/* The chain opens nothing: the disk is the caller's. */
static void
assert_accepted (struct chain *chain, bool has_disk)
{
  struct disk_options o = { .readonly = true };

  assert_non_null (chain);
  assert_int_equal (nr_errors, 0);
  assert_int_equal (chain_has_disk (chain), has_disk);
  chain_give (chain, &o);
  assert_null (o.data_file);
  assert_null (o.below.raw);
  assert_null (o.below.image);
  assert_int_equal (o.nr_backing, 0);
  chain_close (chain);
}

static void
test_beside_nothing (void **state)
{
  (void) state;
  create_beside ("");
  assert_accepted (open_beside (NULL, NULL, false), false);
  assert_accepted (open_beside (inside, NULL, false), false);
  assert_accepted (open_beside (inside, NULL, true), false);
}

static void
test_beside_backing (void **state)
{
  (void) state;
  point_inside ();
  create_beside ("-b name -F raw");
  for (int readonly = 0; readonly <= 1; ++readonly) {
    assert_refused (open_beside (inside, NULL, readonly), EINVAL,
                    "backing file");
    assert_refused (open_beside (NULL, NULL, readonly), EINVAL,
                    "backing file");
  }

  /* Nor with a data file that would do. */
  create_beside ("-b name -F raw -o data_file=data,data_file_raw=off");
  assert_int_equal (truncate (temp_file ("folder/data"), 1 << 20), 0);
  assert_null (open_beside (temp_file ("folder/data"), NULL, false));
}

static void
test_beside_data_file (void **state)
{
  char data[256], other[256], link[256], option[400];

  (void) state;
  snprintf (data, sizeof data, "%s", temp_file ("folder/data"));
  snprintf (other, sizeof other, "%s", temp_file ("folder/other"));
  snprintf (link, sizeof link, "%s", temp_file ("folder/link"));
  write_text (other, "other");
  assert_int_equal (symlink ("data", link), 0);

  create_beside ("-o data_file=data");
  assert_refused (open_beside (data, NULL, false), EINVAL, "not raw");
  assert_refused (open_beside (NULL, NULL, true), EINVAL, "not raw");

  /* By its name, by another one, and by a link to it. */
  for (unsigned i = 0; i < 4; ++i) {
    const char *const names[] = { "data", "./../folder/data", "link", data };

    snprintf (option, sizeof option, "-o data_file=%s,data_file_raw=on",
              names[i]);
    create_beside (option);
    for (int readonly = 0; readonly <= 1; ++readonly) {
      assert_accepted (open_beside (data, NULL, readonly), true);
      assert_accepted (open_beside (link, NULL, readonly), true);
      assert_refused (open_beside (other, NULL, readonly), EINVAL,
                      "not the disk");
      assert_refused (open_beside (NULL, NULL, readonly), EINVAL,
                      "cannot be known");
    }
  }

  /* No such file, any more. */
  assert_int_equal (unlink (data), 0);
  assert_null (open_beside (other, NULL, false));
  assert_int_equal (errno, ENOENT);
  assert_int_equal (nr_errors, 1);
}

/* The name in the header leads to where it may lead only, even to the disk
 * that the user named.
 */
static void
test_beside_folders (void **state)
{
  char data[256], moved[256], option[400], *allowed;

  (void) state;
  snprintf (data, sizeof data, "%s", temp_file ("far"));
  snprintf (moved, sizeof moved, "%s", temp_file ("folder/near"));
  snprintf (option, sizeof option, "-o data_file=%s,data_file_raw=on", data);
  create_beside (option);
  assert_refused (open_beside (data, NULL, false), EACCES, "far");
  assert_refused (open_beside (data, "/nonexistent", true), EACCES, "far");
  allowed = realpath (temp_folder (), NULL);
  assert_non_null (allowed);
  assert_accepted (open_beside (data, allowed, false), true);

  /* A link inside that leads outside. */
  create_beside ("-o data_file=near,data_file_raw=on");
  assert_int_equal (unlink (moved), 0);
  assert_int_equal (symlink (data, moved), 0);
  assert_refused (open_beside (data, NULL, false), EACCES, "near");
  assert_accepted (open_beside (data, allowed, false), true);
  free (allowed);

  /* Not beside a disk, all of this is the image's own. */
  {
    const int fd = open (beside_path, O_RDONLY | O_CLOEXEC);
    struct container *c = container_open_file (fd);
    const struct chain_options options = {
      .readonly = true, .path = beside_path, .fd = fd,
      .cache_size = 1 << 20,
    };

    errno = 0;
    assert_null (chain_open (c, &options));
    assert_int_equal (errno, EACCES);
    container_close (c);
    close (fd);
  }
}

int
main (void)
{
  const struct CMUnitTest tests[] = {
    cmocka_unit_test (test_still),
    cmocka_unit_test (test_moves_out_when_judged),
    cmocka_unit_test (test_moves_in_to_be_judged),
    cmocka_unit_test (test_beside_nothing),
    cmocka_unit_test (test_beside_backing),
    cmocka_unit_test (test_beside_data_file),
    cmocka_unit_test (test_beside_folders),
  };

  return cmocka_run_group_tests (tests, setup, NULL);
}
