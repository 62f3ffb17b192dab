/* nbdkit-dirty-bitmap-filter
 * SPDX-License-Identifier: BSD-3-Clause
 * Copyright the nbdkit-dirty-bitmap-filter authors
 */

/* The file of dirty-bitmap-image: it is created whole or not at all, with
 * files that have no name at first and without; nothing but a file that is
 * ours alone is opened; and a disk that was changed behind our back is told
 * from one that was not.
 */

#include <config.h>

#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <setjmp.h>
#include <signal.h>
#include <stdarg.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/resource.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <unistd.h>

#include <cmocka.h>

#include "container/container.h"
#include "image/bitmaps-file.h"
#include "image/image-file.h"
#include "image.h"

#define MiB ((uint64_t) 1 << 20)

static unsigned nr_errors, nr_warnings;
static char last_report[1024];

static void
keep_report (enum report_level level, const char *fmt, va_list args)
{
  if (level == REPORT_DEBUG)
    return;
  if (level == REPORT_ERROR)
    nr_errors++;
  else
    nr_warnings++;
  vsnprintf (last_report, sizeof last_report, fmt, args);
}

/* What the kernel is asked for on the way to a new file.  It says no to one
 * of these calls, or to all that ask for a file without a name; and another
 * program may be there just before the file gets its name.
 */
static unsigned nr_calls, nr_syncs, nr_links;
static unsigned fails_at;       /* 0: none */
static bool no_tmpfile;
static void (*before_name) (void);

static bool
is_refused (void)
{
  if (++nr_calls != fails_at)
    return false;
  errno = EIO;
  return true;
}

int
open (const char *path, int flags, ...)
{
  mode_t mode = 0;
  va_list args;

  if (flags & (O_CREAT | O_TMPFILE)) {
    va_start (args, flags);
    mode = va_arg (args, mode_t);
    va_end (args);
  }
  if ((flags & O_TMPFILE) == O_TMPFILE && no_tmpfile) {
    errno = EOPNOTSUPP;
    return -1;
  }
  if (flags & O_EXCL && before_name != NULL)
    before_name ();
  return syscall (SYS_openat, AT_FDCWD, path, flags, mode);
}

int
linkat (int from_fd, const char *from, int to_fd, const char *to, int flags)
{
  if (before_name != NULL)
    before_name ();
  nr_links++;
  return is_refused () ? -1
    : syscall (SYS_linkat, from_fd, from, to_fd, to, flags);
}

int
ftruncate (int fd, off_t size)
{
  return is_refused () ? -1 : syscall (SYS_ftruncate, fd, size);
}

ssize_t
pwrite (int fd, const void *buf, size_t count, off_t offset)
{
  return is_refused () ? -1 : syscall (SYS_pwrite64, fd, buf, count, offset);
}

int
fdatasync (int fd)
{
  return is_refused () ? -1 : syscall (SYS_fdatasync, fd);
}

int
fsync (int fd)
{
  nr_syncs++;
  return is_refused () ? -1 : syscall (SYS_fsync, fd);
}

static char folder[256], path[300];

static unsigned
count_names (const char *in)
{
  DIR *dir = opendir (in);
  struct dirent *entry;
  unsigned n = 0;

  assert_non_null (dir);
  while ((entry = readdir (dir)) != NULL)
    n += entry->d_name[0] != '.';
  closedir (dir);
  return n;
}

static unsigned nr_open;

/* An empty folder, and the path of a file in it. */
static int
setup (void **state)
{
  (void) state;
  snprintf (folder, sizeof folder, "%s", temp_file ("folder"));
  snprintf (path, sizeof path, "%s/bitmaps", folder);
  run_command ("rm -rf '%s'", folder);
  nr_errors = nr_warnings = nr_calls = fails_at = 0;
  no_tmpfile = false;
  before_name = NULL;
  report_sink = keep_report;
  nr_open = count_names ("/proc/self/fd");
  return mkdir (folder, 0777) == 0 && chmod (temp_folder (), 0755) == 0
    ? 0 : -1;
}

/* Nothing is open any more. */
static int
teardown (void **state)
{
  (void) state;
  return count_names ("/proc/self/fd") == nr_open ? 0 : -1;
}

static struct bitmaps_file
a_file (void)
{
  return (struct bitmaps_file) { .path = path, .fd = -1 };
}

static void
assert_error (int r, const char *why)
{
  assert_int_equal (r, -1);
  assert_int_equal (nr_errors, 1);
  assert_non_null (strstr (last_report, why));
  assert_non_null (strstr (last_report, path));
  nr_errors = 0;
}

static void
write_text (const char *at, const char *text)
{
  FILE *fp = fopen (at, "w");

  assert_non_null (fp);
  assert_true (fputs (text, fp) >= 0);
  assert_int_equal (fclose (fp), 0);
}

static void
assert_text (const char *at, const char *text)
{
  char buf[100] = "";
  FILE *fp = fopen (at, "r");

  assert_non_null (fp);
  assert_non_null (fgets (buf, sizeof buf, fp));
  assert_string_equal (buf, text);
  fclose (fp);
}

/* It is whole, locked, and has the user's permissions. */
static void
test_create (void **state)
{
  (void) state;
  for (int named = 0; named <= 1; ++named) {
    struct bitmaps_file f = a_file (), other = a_file ();
    const mode_t old = umask (027);
    struct container *c;
    struct stat statbuf;

    no_tmpfile = named;
    assert_int_equal (bitmaps_file_open (&f, false), 0);
    assert_int_equal (f.fd, -1);
    assert_int_equal (count_names (folder), 0);
    assert_int_equal (bitmaps_file_create (&f, 3 * MiB + 1), 0);
    umask (old);
    assert_true (f.fd != -1);
    assert_int_equal (count_names (folder), 1);
    assert_int_equal (stat (path, &statbuf), 0);
    assert_true (S_ISREG (statbuf.st_mode));
    assert_int_equal (statbuf.st_mode & 07777, 0640);
    assert_int_equal (statbuf.st_nlink, 1);

    assert_error (bitmaps_file_open (&other, false), "lock");
    bitmaps_file_close (&other);
    assert_error (bitmaps_file_open (&other, true), "lock");
    bitmaps_file_close (&other);

    c = bitmaps_file_container (&f, false);
    assert_non_null (c);
    assert_false (c->readonly);
    assert_int_equal (container_size (c), statbuf.st_size);
    container_close (c);
    c = bitmaps_file_container (&f, true);
    assert_non_null (c);
    assert_true (c->readonly);
    container_close (c);
    bitmaps_file_close (&f);
    assert_int_equal (f.fd, -1);

    assert_int_equal (run_command ("qemu-img check -q '%s' >/dev/null", path),
                      0);
    assert_int_equal (run_command ("qemu-img info '%s' | grep -q "
                                   "'(3146240 bytes)'", path), 0);

    /* And it is opened from then on. */
    assert_int_equal (bitmaps_file_open (&f, false), 0);
    assert_true (f.fd != -1);
    bitmaps_file_close (&f);
    assert_int_equal (unlink (path), 0);
    assert_int_equal (nr_errors, 0);
    assert_int_equal (nr_warnings, 0);
  }
}

/* Whichever of the calls fails, nothing is left. */
static void
test_create_fails (void **state)
{
  (void) state;
  for (int named = 0; named <= 1; ++named) {
    struct bitmaps_file f = a_file ();
    int r;

    no_tmpfile = named;
    fails_at = 0;
    do {
      fails_at++;
      nr_calls = nr_syncs = nr_links = nr_errors = 0;
      f.fd = -1;
      r = bitmaps_file_create (&f, MiB);
      if (r == -1) {
        print_message ("%s\n", last_report);
        assert_error (r, strerror (EIO));
        assert_int_equal (count_names (folder), 0);
        assert_int_equal (f.fd, -1);
      }
    } while (r == -1);

    /* At last all went well: it was filled and flushed, got its name, and
     * the file and its folder were synced.
     */
    assert_int_equal (fails_at, nr_calls + 1);
    assert_int_equal (nr_links, !named);
    assert_int_equal (nr_syncs, 2);
    assert_true (nr_calls >= nr_links + nr_syncs + 3);
    assert_int_equal (count_names (folder), 1);
    bitmaps_file_close (&f);
    assert_int_equal (unlink (path), 0);
  }
}

/* No space: a file may have no more than this. */
static void
test_no_space (void **state)
{
  struct bitmaps_file f = a_file ();
  struct rlimit old, limit;

  (void) state;
  signal (SIGXFSZ, SIG_IGN);
  assert_int_equal (getrlimit (RLIMIT_FSIZE, &old), 0);
  limit = old;
  limit.rlim_cur = 100000;
  for (int named = 0; named <= 1; ++named) {
    int r;

    no_tmpfile = named;
    assert_int_equal (setrlimit (RLIMIT_FSIZE, &limit), 0);
    r = bitmaps_file_create (&f, MiB);
    assert_int_equal (setrlimit (RLIMIT_FSIZE, &old), 0);
    assert_error (r, strerror (ENOSPC));
    assert_int_equal (count_names (folder), 0);

    /* And a disk that is too large for an image. */
    assert_error (bitmaps_file_create (&f, INT64_MAX), "too large");
    assert_int_equal (count_names (folder), 0);
  }
  signal (SIGXFSZ, SIG_DFL);
}

/* A file that was made meanwhile is another's. */
static void
make_another (void)
{
  write_text (path, "another's");
}

static void
test_made_meanwhile (void **state)
{
  (void) state;
  for (int named = 0; named <= 1; ++named) {
    struct bitmaps_file f = a_file ();

    no_tmpfile = named;
    assert_int_equal (bitmaps_file_open (&f, false), 0);
    before_name = make_another;
    assert_error (bitmaps_file_create (&f, MiB), strerror (EEXIST));
    before_name = NULL;
    assert_int_equal (f.fd, -1);
    assert_text (path, "another's");
    assert_int_equal (count_names (folder), 1);
    assert_int_equal (unlink (path), 0);
  }
}

static void
test_no_folder (void **state)
{
  struct bitmaps_file f = a_file ();

  (void) state;
  assert_int_equal (rmdir (folder), 0);
  for (int named = 0; named <= 1; ++named) {
    no_tmpfile = named;
    assert_int_equal (bitmaps_file_open (&f, false), 0);
    assert_int_equal (f.fd, -1);
    assert_error (bitmaps_file_create (&f, MiB), strerror (ENOENT));
    assert_error (bitmaps_file_open (&f, true), strerror (ENOENT));
  }
  /* The folder is a file. */
  write_text (folder, "x");
  assert_error (bitmaps_file_open (&f, false), strerror (ENOTDIR));
  assert_error (bitmaps_file_create (&f, MiB), strerror (ENOTDIR));
  assert_text (folder, "x");
  assert_int_equal (unlink (folder), 0);
}

/* What is at the path is no file, or no file yet. */
static void
test_no_file (void **state)
{
  struct bitmaps_file f = a_file ();
  char target[320];

  (void) state;
  assert_int_equal (mkdir (path, 0777), 0);
  assert_error (bitmaps_file_open (&f, false), strerror (EISDIR));
  assert_error (bitmaps_file_open (&f, true), "neither a file");
  bitmaps_file_close (&f);
  assert_int_equal (rmdir (path), 0);

  /* Nobody has the other end. */
  assert_int_equal (mkfifo (path, 0666), 0);
  for (int readonly = 0; readonly <= 1; ++readonly) {
    assert_error (bitmaps_file_open (&f, readonly), "neither a file");
    bitmaps_file_close (&f);
  }
  assert_int_equal (unlink (path), 0);

  assert_int_equal (symlink ("/dev/null", path), 0);
  assert_error (bitmaps_file_open (&f, false), "neither a file");
  bitmaps_file_close (&f);
  assert_int_equal (unlink (path), 0);

  /* A link that leads nowhere: nothing is made where it leads. */
  snprintf (target, sizeof target, "%s/target", folder);
  assert_int_equal (symlink ("target", path), 0);
  assert_error (bitmaps_file_open (&f, true), strerror (ENOENT));
  for (int named = 0; named <= 1; ++named) {
    no_tmpfile = named;
    assert_int_equal (bitmaps_file_open (&f, false), 0);
    assert_int_equal (f.fd, -1);
    assert_error (bitmaps_file_create (&f, MiB), strerror (EEXIST));
    assert_int_equal (access (target, F_OK), -1);
    assert_int_equal (count_names (folder), 1);
  }

  /* A link that leads to a file is as good as the file. */
  write_text (target, "x");
  assert_int_equal (bitmaps_file_open (&f, false), 0);
  assert_true (f.fd != -1);
  bitmaps_file_close (&f);
}

/* Run a test as a user that is not root. */
static void
as_nobody (void (*test) (void))
{
  int status;
  pid_t pid;

  if (geteuid () != 0) {
    test ();
    return;
  }
  pid = fork ();
  assert_true (pid != -1);
  if (pid == 0) {
    if (setresgid (65534, 65534, 65534) == -1 ||
        setresuid (65534, 65534, 65534) == -1)
      _exit (2);
    test ();
    /* A test that fails does not come back. */
    _exit (0);
  }
  assert_int_equal (waitpid (pid, &status, 0), pid);
  assert_true (WIFEXITED (status));
  assert_int_equal (WEXITSTATUS (status), 0);
}

#define REQUIRE(what)                                           \
  do {                                                          \
    if (!(what)) {                                              \
      print_error ("%s: %s\n", #what, last_report);             \
      if (geteuid () == 65534)                                  \
        _exit (1);                                              \
      fail ();                                                  \
    }                                                           \
  } while (0)

static bool
says (const char *words)
{
  return strstr (last_report, words) != NULL;
}

static void
open_forbidden (void)
{
  struct bitmaps_file f = a_file ();

  REQUIRE (bitmaps_file_open (&f, false) == -1);
  REQUIRE (says (strerror (EACCES)) && says ("-r"));
  last_report[0] = '\0';
  REQUIRE (bitmaps_file_open (&f, true) == -1);
  REQUIRE (says (strerror (EACCES)) && !says ("-r"));
  REQUIRE (f.fd == -1);
}

static void
open_readable (void)
{
  struct bitmaps_file f = a_file ();

  REQUIRE (bitmaps_file_open (&f, false) == -1);
  REQUIRE (says (strerror (EACCES)));
  REQUIRE (bitmaps_file_open (&f, true) == 0);
  REQUIRE (f.fd != -1);
  bitmaps_file_close (&f);
}

static void
create_forbidden (void)
{
  for (int named = 0; named <= 1; ++named) {
    struct bitmaps_file f = a_file ();

    no_tmpfile = named;
    REQUIRE (bitmaps_file_open (&f, false) == 0);
    REQUIRE (bitmaps_file_create (&f, MiB) == -1);
    REQUIRE (says (strerror (EACCES)) && says (path));
    REQUIRE (f.fd == -1);
  }
}

static void
test_permission (void **state)
{
  (void) state;
  write_text (path, "x");
  assert_int_equal (chmod (path, 0000), 0);
  as_nobody (open_forbidden);
  assert_int_equal (chmod (path, 0444), 0);
  as_nobody (open_readable);
  assert_int_equal (unlink (path), 0);

  assert_int_equal (chmod (folder, 0555), 0);
  as_nobody (create_forbidden);
  assert_int_equal (count_names (folder), 0);

  /* A folder that cannot be read cannot be made durable: nothing is left. */
  assert_int_equal (chmod (folder, 0333), 0);
  as_nobody (create_forbidden);
  assert_int_equal (chmod (folder, 0777), 0);
  assert_int_equal (count_names (folder), 0);
}

static void
test_locks (void **state)
{
  struct bitmaps_file f = a_file (), other = a_file ();

  (void) state;
  write_text (path, "x");
  assert_int_equal (bitmaps_file_open (&f, true), 0);
  assert_int_equal (bitmaps_file_open (&other, true), 0);
  bitmaps_file_close (&other);
  assert_error (bitmaps_file_open (&other, false), "lock");
  bitmaps_file_close (&other);
  bitmaps_file_close (&f);

  assert_int_equal (bitmaps_file_open (&f, false), 0);
  for (int readonly = 0; readonly <= 1; ++readonly) {
    assert_error (bitmaps_file_open (&other, readonly), "lock");
    bitmaps_file_close (&other);
  }
  bitmaps_file_close (&f);
}

/* Times of change, in nanoseconds since long ago. */
#define LONG_AGO 1000000000

static void
set_times (int fd, uint64_t ns)
{
  const struct timespec t = {
    .tv_sec = LONG_AGO + ns / 1000000000, .tv_nsec = ns % 1000000000
  };
  const struct timespec both[2] = { t, t };

  assert_int_equal (futimens (fd, both), 0);
}

static struct stat
get_status (int fd)
{
  struct stat statbuf;

  assert_int_equal (fstat (fd, &statbuf), 0);
  return statbuf;
}

static struct bitmaps_file
open_file_of_times (void)
{
  struct bitmaps_file f = a_file ();

  assert_int_equal (bitmaps_file_open (&f, false), 0);
  nr_warnings = 0;
  return f;
}

static void
test_warning (void **state)
{
  static const struct { uint64_t disk, bitmaps; bool warns; } rows[] = {
    { 0, 0, false }, { 0, 1, false }, { 1, 0, true },
    { 999999999, 1000000000, false }, { 1000000000, 999999999, true },
    { 1999999999, 2000000000, false }, { 3000000000, 2999999999, true },
    { 60000000000, 5, true }, { 5, 60000000000, false },
  };
  struct image_file disk = { .path = strdup (temp_file ("disk")) };
  struct bitmaps_file f;

  (void) state;
  write_text (path, "bitmaps");
  disk.fd = open (disk.path, O_RDWR | O_CREAT | O_CLOEXEC, 0666);
  assert_true (disk.fd != -1);
  for (size_t i = 0; i < sizeof rows / sizeof rows[0]; ++i) {
    f = open_file_of_times ();
    set_times (disk.fd, rows[i].disk);
    set_times (f.fd, rows[i].bitmaps);
    bitmaps_file_compare_times (&f, &disk);
    assert_true (f.has_time);
    assert_int_equal (nr_warnings, rows[i].warns);
    if (rows[i].warns) {
      assert_true (says (disk.path));
      assert_true (says (path));
    }
    bitmaps_file_close (&f);
  }

  /* Of a block device nothing is known, nor of what is no file. */
  f = open_file_of_times ();
  set_times (disk.fd, 1);
  set_times (f.fd, 0);
  disk.is_block_device = true;
  bitmaps_file_compare_times (&f, &disk);
  assert_false (f.has_time);
  disk.is_block_device = false;
  close (disk.fd);
  disk.fd = -1;
  bitmaps_file_compare_times (&f, &disk);
  assert_false (f.has_time);
  bitmaps_file_set_time (&f, &disk);
  assert_int_equal (get_status (f.fd).st_mtime, LONG_AGO);
  bitmaps_file_close (&f);
  bitmaps_file_compare_times (&f, &disk);
  assert_int_equal (nr_warnings, 0);
  assert_int_equal (nr_errors, 0);
  free (disk.path);
}

static void
test_set_time (void **state)
{
  /* 0: the disk is not changed. */
  static const struct { uint64_t change; bool readonly, sets; } rows[] = {
    { 0, false, false }, { 11, false, true }, { 9, false, true },
    { 2000000000, false, true }, { 11, true, false },
  };
  struct image_file disk = { .path = strdup (temp_file ("disk")) };
  struct bitmaps_file f;

  (void) state;
  write_text (path, "bitmaps");
  disk.fd = open (disk.path, O_RDWR | O_CREAT | O_CLOEXEC, 0666);
  assert_true (disk.fd != -1);
  for (size_t i = 0; i < sizeof rows / sizeof rows[0]; ++i) {
    struct stat statbuf;

    f = open_file_of_times ();
    f.readonly = rows[i].readonly;
    set_times (disk.fd, 10);
    set_times (f.fd, 10);
    bitmaps_file_compare_times (&f, &disk);
    if (rows[i].change != 0)
      set_times (disk.fd, rows[i].change);
    bitmaps_file_set_time (&f, &disk);
    statbuf = get_status (f.fd);
    assert_int_equal (statbuf.st_mtime != LONG_AGO, rows[i].sets);
    assert_int_equal (statbuf.st_atime, LONG_AGO);
    bitmaps_file_close (&f);

    /* The next start has nothing to warn of, unless we changed nothing. */
    f = open_file_of_times ();
    bitmaps_file_compare_times (&f, &disk);
    assert_int_equal (nr_warnings, rows[i].readonly);
    bitmaps_file_close (&f);
  }

  /* A disk that another program changed is not hidden by a run that changed
   * nothing; nor is anything set if no time was compared.
   */
  f = open_file_of_times ();
  set_times (disk.fd, 20);
  set_times (f.fd, 10);
  bitmaps_file_compare_times (&f, &disk);
  assert_int_equal (nr_warnings, 1);
  bitmaps_file_set_time (&f, &disk);
  bitmaps_file_close (&f);
  f = open_file_of_times ();
  set_times (disk.fd, 30);
  bitmaps_file_set_time (&f, &disk);
  assert_int_equal (get_status (f.fd).st_mtime, LONG_AGO);
  bitmaps_file_close (&f);
  close (disk.fd);
  free (disk.path);
}

#define TEST(f) cmocka_unit_test_setup_teardown (f, setup, teardown)

int
main (void)
{
  const struct CMUnitTest tests[] = {
    TEST (test_create),
    TEST (test_create_fails),
    TEST (test_no_space),
    TEST (test_made_meanwhile),
    TEST (test_no_folder),
    TEST (test_no_file),
    TEST (test_permission),
    TEST (test_locks),
    TEST (test_warning),
    TEST (test_set_time),
  };

  if (run_command ("qemu-img --version >/dev/null 2>&1") != 0) {
    print_message ("skipped: there is no qemu-img\n");
    return 77;
  }
  return cmocka_run_group_tests (tests, NULL, NULL);
}
