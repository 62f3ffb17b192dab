/* nbdkit-dirty-bitmap-filter
 * SPDX-License-Identifier: BSD-3-Clause
 * Copyright the nbdkit-dirty-bitmap-filter authors
 */

#include <config.h>

#include <fcntl.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/wait.h>
#include <unistd.h>

#include <cmocka.h>

#include "container/container.h"
#include "image.h"

static char folder[256];

static void
remove_folder (void)
{
  run_command ("rm -rf '%s'", folder);
}

int
run_command (const char *fmt, ...)
{
  char command[2048];
  va_list args;
  int r;

  va_start (args, fmt);
  vsnprintf (command, sizeof command, fmt, args);
  va_end (args);
  r = system (command);
  return WIFEXITED (r) ? WEXITSTATUS (r) : -1;
}

const char *
temp_folder (void)
{
  if (folder[0] == '\0') {
    const char *tmp = getenv ("TMPDIR");

    snprintf (folder, sizeof folder, "%s/unit.XXXXXX", tmp ? tmp : "/var/tmp");
    assert_non_null (mkdtemp (folder));
    atexit (remove_folder);
  }
  return folder;
}

const char *
temp_file (const char *name)
{
  static char path[512];

  snprintf (path, sizeof path, "%s/%s", temp_folder (), name);
  return path;
}

struct container *
image_load (const char *file, uint64_t limit)
{
  static char buf[65536];
  struct container *c = container_open_memory (limit);
  const int fd = open (file, O_RDONLY | O_CLOEXEC);
  struct stat st;

  assert_true (fd >= 0);
  assert_non_null (c);
  assert_int_equal (fstat (fd, &st), 0);
  assert_int_equal (container_reserve (c, st.st_size), 0);
  for (off_t at = 0; at < st.st_size;) {
    const off_t data = lseek (fd, at, SEEK_DATA);
    ssize_t n;

    if (data < 0)
      break;
    n = pread (fd, buf, sizeof buf, data);
    assert_true (n > 0);
    assert_int_equal (container_pwrite (c, buf, n, data), 0);
    at = data + n;
  }
  close (fd);
  return c;
}

struct container *
image_create (const char *options, const char *size, uint64_t limit)
{
  const char *file = temp_file ("created.qcow2");

  assert_int_equal (run_command ("qemu-img create -q -f qcow2 %s '%s' %s",
                                 options, file, size), 0);
  return image_load (file, limit);
}

void
image_save (struct container *c, const char *file)
{
  static char buf[65536], zeroes[65536];
  const int fd = open (file, O_RDWR | O_CREAT | O_TRUNC | O_CLOEXEC, 0600);
  const uint64_t size = container_size (c);

  assert_true (fd >= 0);
  assert_int_equal (ftruncate (fd, size), 0);
  for (uint64_t at = 0; at < size; at += sizeof buf) {
    const size_t n = size - at < sizeof buf ? size - at : sizeof buf;

    assert_int_equal (container_pread (c, buf, n, at), 0);
    if (memcmp (buf, zeroes, n) != 0)
      assert_int_equal (pwrite (fd, buf, n, at), n);
  }
  close (fd);
}

void
image_check (struct container *c, int leaks_too)
{
  const char *file = temp_file ("check.qcow2");
  int r;

  image_save (c, file);
  r = run_command ("qemu-img check -q '%s' >'%s.out' 2>&1", file, file);
  if (r != 0 && (leaks_too || r != 3)) {
    run_command ("cat '%s.out' >&2", file);
    fail_msg ("qemu-img check found errors (%d)", r);
  }
}

void
report_if_verbose (enum report_level level, const char *fmt, va_list args)
{
  if (getenv ("VERBOSE") != NULL) {
    fprintf (stderr, "%d: ", level);
    vfprintf (stderr, fmt, args);
    fputc ('\n', stderr);
  }
}

void
get_number (const char *name, uint64_t *value)
{
  const char *s = getenv (name);

  if (s != NULL)
    *value = strtoull (s, NULL, 0);
}

bool
is_thorough (void)
{
  return getenv ("THOROUGH") != NULL;
}

unsigned
how_often (unsigned thorough, unsigned with_sanitizers,
           unsigned under_valgrind)
{
  if (getenv ("UNDER_VALGRIND") != NULL)
    return under_valgrind;
  if (getenv ("UNDER_SANITIZERS") != NULL)
    return with_sanitizers;
  return is_thorough () ? thorough : (thorough + 1) / 2;
}

uint64_t
random_next (uint64_t *state)
{
  uint64_t z = *state += UINT64_C (0x9e3779b97f4a7c15);

  z = (z ^ z >> 30) * UINT64_C (0xbf58476d1ce4e5b9);
  z = (z ^ z >> 27) * UINT64_C (0x94d049bb133111eb);
  return z ^ z >> 31;
}
