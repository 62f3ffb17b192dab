/* nbdkit-dirty-bitmap-filter
 * SPDX-License-Identifier: BSD-3-Clause
 * Copyright the nbdkit-dirty-bitmap-filter authors
 */

/* The parameters of the filter, and where dirty-bitmap-listen listens. */

#include <config.h>

#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include <cmocka.h>

#include "kept-reports.h"
#include "nbdkit/listen.h"
#include "parameters.h"

static int
setup (void **state)
{
  (void) state;
  keep_reports ();
  return 0;
}

static int
parse (const char *address, struct listen_address *a)
{
  return listen_parse ("dirty-bitmap-listen", address, a);
}

static void
test_listen_addresses (void **state)
{
  static const struct {
    const char *address;
    const char *path, *host, *port;
  } good[] = {
    { "/run/s", "/run/s", NULL, NULL },
    { "/run/a:1", "/run/a:1", NULL, NULL },
    { "localhost:10809", NULL, "localhost", "10809" },
    { "127.0.0.1:1", NULL, "127.0.0.1", "1" },
    { "[::1]:65535", NULL, "::1", "65535" },
    { "[localhost]:5", NULL, "localhost", "5" },
    { ":10809", NULL, NULL, "10809" },
    { "host:nbd", NULL, "host", "nbd" },
  };
  static const char *const bad[] = {
    "host:", ":", "::1:5", "[::1:5", "::1]:5", "host:0", "host:65536",
    "host:99999999999999999999",
  };
  struct listen_address a;
  char cwd[1024], expected[1100], longest[201];
  size_t i;

  (void) state;
  for (i = 0; i < sizeof good / sizeof good[0]; ++i) {
    print_message ("%s\n", good[i].address);
    assert_int_equal (parse (good[i].address, &a), 0);
    assert_int_equal (a.path == NULL, good[i].path == NULL);
    assert_int_equal (a.host == NULL, good[i].host == NULL);
    assert_int_equal (a.port == NULL, good[i].port == NULL);
    if (a.path != NULL)
      assert_string_equal (a.path, good[i].path);
    if (a.host != NULL)
      assert_string_equal (a.host, good[i].host);
    if (a.port != NULL)
      assert_string_equal (a.port, good[i].port);
    listen_address_free (&a);
  }
  for (i = 0; i < sizeof bad / sizeof bad[0]; ++i) {
    print_message ("%s\n", bad[i]);
    nr_reports = 0;
    assert_int_equal (parse (bad[i], &a), -1);
    assert_int_equal (nr_reports, 1);
    assert_non_null (strstr (last_report, "dirty-bitmap-listen"));
  }

  assert_int_equal (chdir ("/"), 0);
  assert_non_null (getcwd (cwd, sizeof cwd));
  assert_int_equal (parse ("relative", &a), 0);
  snprintf (expected, sizeof expected, "%s/relative", cwd);
  assert_string_equal (a.path, expected);
  listen_address_free (&a);

  memset (longest, 'x', 200);
  longest[0] = '/';
  longest[200] = '\0';
  assert_int_equal (parse (longest, &a), -1);
  assert_non_null (strstr (last_report, "too long"));
}

static void
test_listen_unix (void **state)
{
  char dir[] = "/tmp/dirty-bitmap.XXXXXX", path[100];
  struct listen_address a;
  struct listen_sockets s1, s2;
  FILE *fp;

  (void) state;
  assert_non_null (mkdtemp (dir));
  snprintf (path, sizeof path, "%s/s", dir);
  assert_int_equal (parse (path, &a), 0);
  assert_int_equal (listen_open (&a, NULL, &s1), 0);
  assert_int_equal (s1.nr, 1);

  /* In use. */
  assert_int_equal (listen_open (&a, NULL, &s2), -1);
  assert_int_equal (nr_reports, 1);
  assert_int_equal (access (path, F_OK), 0);

  /* Left behind by a process that was killed. */
  listen_close (&s1);
  assert_int_equal (access (path, F_OK), 0);
  assert_int_equal (listen_open (&a, NULL, &s2), 0);
  listen_unlink (&s2);
  assert_int_equal (access (path, F_OK), -1);
  listen_close (&s2);

  /* Not a socket. */
  fp = fopen (path, "w");
  assert_non_null (fp);
  fclose (fp);
  assert_int_equal (listen_open (&a, NULL, &s2), -1);
  assert_int_equal (access (path, F_OK), 0);
  assert_int_equal (unlink (path), 0);

  /* Another's in our place is left alone. */
  assert_int_equal (listen_open (&a, NULL, &s1), 0);
  assert_int_equal (unlink (path), 0);
  fp = fopen (path, "w");
  assert_non_null (fp);
  fclose (fp);
  listen_unlink (&s1);
  listen_close (&s1);
  assert_int_equal (unlink (path), 0);
  listen_address_free (&a);
  assert_int_equal (rmdir (dir), 0);
}

static void
test_good_parameters (void **state)
{
  struct parameters p = { .granularity = 0 };
  static const struct {
    const char *value;
    uint64_t size;
  } sizes[] = {
    { "1M", 1 << 20 }, { "1m", 1 << 20 }, { "1024k", 1 << 20 },
    { "1048576", 1 << 20 }, { "2048s", 1 << 20 }, { "1048576b", 1 << 20 },
    { "64G", (uint64_t) 64 << 30 },
  };
  size_t i;

  (void) state;
  assert_int_equal (parameters_take (&p, "file", "x"), 0);
  assert_int_equal (parameters_take (&p, "dirty", "x"), 0);
  assert_int_equal (parameters_take (&p, "dirty-bitmaps", "x"), 0);
  assert_int_equal (parameters_take (&p, "dirty-bitmap", "a"), 1);
  assert_int_equal (parameters_take (&p, "dirty-bitmap", "b"), 1);
  assert_int_equal (parameters_take (&p, "dirty-bitmap", "a"), 1);
  assert_int_equal (p.require.nr, 2);
  assert_string_equal (p.require.name[0], "a");
  assert_string_equal (p.require.name[1], "b");
  assert_int_equal (parameters_take (&p, "dirty-bitmap-expose", "b c"), 1);
  assert_int_equal (p.expose.nr, 1);
  assert_string_equal (p.expose.name[0], "b c");
  assert_int_equal (parameters_take (&p, "dirty-bitmap-granularity", "2G"), 1);
  assert_int_equal (p.granularity, (uint32_t) 1 << 31);
  assert_int_equal (parameters_take (&p, "dirty-bitmap-server", "off"), 1);
  assert_int_equal (p.server, SERVER_OFF);
  assert_int_equal (parameters_take (&p, "dirty-bitmap-listen", "a:5"), 1);
  assert_true (p.listens);
  assert_int_equal (parameters_complete (&p), 0);
  assert_int_equal (p.cache_size, PARAMETERS_DEFAULT_CACHE_SIZE);
  parameters_free (&p);

  assert_false (p.keep);
  assert_int_equal (parameters_take (&p, "dirty-bitmap-crash", "keep"), 1);
  assert_true (p.keep);
  parameters_free (&p);
  assert_int_equal (parameters_take (&p, "dirty-bitmap-crash", "mark"), 1);
  assert_false (p.keep);
  parameters_free (&p);
  assert_false (p.list_deltas);
  assert_int_equal (parameters_take (&p, "dirty-bitmap-delta", "on"), 1);
  assert_true (p.list_deltas);
  parameters_free (&p);
  assert_int_equal (parameters_take (&p, "dirty-bitmap-delta", "off"), 1);
  assert_false (p.list_deltas);
  parameters_free (&p);

  assert_int_equal (parameters_take (&p, "dirty-bitmap-snapshot", "1"), 1);
  assert_int_equal (parameters_complete (&p), 0);
  assert_string_equal (p.snapshot, "1");
  parameters_free (&p);

  for (i = 0; i < sizeof sizes / sizeof sizes[0]; ++i) {
    assert_int_equal (parameters_take (&p, "dirty-bitmap-cache-size",
                                       sizes[i].value), 1);
    assert_int_equal (parameters_complete (&p), 0);
    assert_int_equal (p.cache_size, sizes[i].size);
    parameters_free (&p);
  }
  assert_int_equal (p.server, SERVER_AUTO);
  assert_int_equal (nr_reports, 0);
}

/* Folders are kept by their true paths, each once. */
static void
test_allowed_folders (void **state)
{
  struct parameters p = { .granularity = 0 };
  char dir[] = "/tmp/dirty-bitmap.XXXXXX", link[100], *path;

  (void) state;
  assert_non_null (mkdtemp (dir));
  snprintf (link, sizeof link, "%s/link", dir);
  assert_int_equal (symlink ("..", link), 0);
  path = realpath (link, NULL);
  assert_non_null (path);

  assert_int_equal (parameters_take (&p, "dirty-bitmap-allow-path", "/"), 1);
  assert_int_equal (parameters_take (&p, "dirty-bitmap-allow-path", link), 1);
  assert_int_equal (parameters_take (&p, "dirty-bitmap-allow-path", path), 1);
  assert_int_equal (parameters_take (&p, "dirty-bitmap-allow-path", "/."), 1);
  assert_int_equal (nr_reports, 0);
  assert_int_equal (p.allow.nr, 2);
  assert_string_equal (p.allow.name[0], "/");
  assert_string_equal (p.allow.name[1], path);

  free (path);
  parameters_free (&p);
  assert_int_equal (unlink (link), 0);
  assert_int_equal (rmdir (dir), 0);
}

/* Where views keep what they need, and how much. */
static void
test_views (void **state)
{
  static const struct {
    const char *key, *value;
  } control_needed[] = {
    { "dirty-bitmap-node", "disk" },
    { "dirty-bitmap-scratch", "/" },
    { "dirty-bitmap-scratch-size", "1M" },
    { "dirty-bitmap-view-memory", "1M" },
  };
  struct parameters p = { .granularity = 0 };

  (void) state;
  for (size_t i = 0; i < sizeof control_needed / sizeof control_needed[0];
       ++i) {
    nr_reports = 0;
    assert_int_equal (parameters_take (&p, control_needed[i].key,
                                       control_needed[i].value), 1);
    assert_int_equal (parameters_complete (&p), -1);
    assert_int_equal (nr_reports, 1);
    assert_non_null (strstr (last_report, control_needed[i].key));
    assert_non_null (strstr (last_report, "dirty-bitmap-control"));
    parameters_free (&p);
  }

  nr_reports = 0;
  assert_int_equal (parameters_take (&p, "dirty-bitmap-control", "/c"), 1);
  assert_int_equal (parameters_complete (&p), 0);
  assert_null (p.scratch);
  assert_int_equal (p.scratch_size, 0);
  assert_int_equal (p.view_memory, PARAMETERS_DEFAULT_VIEW_MEMORY);
  parameters_free (&p);

  assert_int_equal (chdir ("/"), 0);
  assert_int_equal (parameters_take (&p, "dirty-bitmap-control", "/c"), 1);
  assert_int_equal (parameters_take (&p, "dirty-bitmap-scratch", "tmp/.."), 1);
  assert_int_equal (parameters_take (&p, "dirty-bitmap-scratch-size", "7G"),
                    1);
  assert_int_equal (parameters_take (&p, "dirty-bitmap-view-memory", "2M"),
                    1);
  assert_int_equal (parameters_complete (&p), 0);
  assert_string_equal (p.scratch, "/");
  assert_int_equal (p.scratch_size, (uint64_t) 7 << 30);
  assert_int_equal (p.view_memory, 2 << 20);
  parameters_free (&p);
  assert_int_equal (nr_reports, 0);
}

static void
test_bad_parameters (void **state)
{
  static const struct {
    const char *key, *value;
  } bad[] = {
    { "dirty-bitmap", "" },
    { "dirty-bitmap-expose", "" },
    { "dirty-bitmap-allow-path", "" },
    { "dirty-bitmap-allow-path", "/nonexistent/folder" },
    { "dirty-bitmap-allow-path", "/dev/null" },
    { "dirty-bitmap-granularity", "" },
    { "dirty-bitmap-granularity", "0" },
    { "dirty-bitmap-granularity", "256" },
    { "dirty-bitmap-granularity", "513" },
    { "dirty-bitmap-granularity", "4G" },
    { "dirty-bitmap-granularity", "64kk" },
    { "dirty-bitmap-granularity", "64x" },
    { "dirty-bitmap-granularity", "-512" },
    { "dirty-bitmap-granularity", " 512" },
    { "dirty-bitmap-granularity", "512 " },
    { "dirty-bitmap-granularity", "0x200" },
    { "dirty-bitmap-granularity", "99999999999999999999" },
    { "dirty-bitmap-granularity", "9223372036854775807k" },
    { "dirty-bitmap-granularity", "16E" },
    { "dirty-bitmap-cache-size", "" },
    { "dirty-bitmap-cache-size", "1048575" },
    { "dirty-bitmap-cache-size", "65G" },
    { "dirty-bitmap-scratch", "" },
    { "dirty-bitmap-scratch", "/nonexistent/folder" },
    { "dirty-bitmap-scratch", "/dev/null" },
    { "dirty-bitmap-scratch-size", "" },
    { "dirty-bitmap-scratch-size", "0" },
    { "dirty-bitmap-scratch-size", "1048575" },
    { "dirty-bitmap-scratch-size", "16E" },
    { "dirty-bitmap-view-memory", "" },
    { "dirty-bitmap-view-memory", "1023k" },
    { "dirty-bitmap-view-memory", "2T" },
    { "dirty-bitmap-crash", "" },
    { "dirty-bitmap-crash", "on" },
    { "dirty-bitmap-delta", "" },
    { "dirty-bitmap-delta", "yes" },
    { "dirty-bitmap-delta", "ON" },
    { "dirty-bitmap-detect-zeroes", "" },
    { "dirty-bitmap-detect-zeroes", "yes" },
    { "dirty-bitmap-detect-zeroes", "UNMAP" },
    { "dirty-bitmap-backing", "" },
    { "dirty-bitmap-exit-last", "" },
    { "dirty-bitmap-exit-last", "yes" },
    { "dirty-bitmap-when-full", "" },
    { "dirty-bitmap-when-full", "refuse" },
    { "dirty-bitmap-backing", "null" },
    { "dirty-bitmap-exportname", "delta:b" },
    { "dirty-bitmap-exportname", "backup:b" },
    { "dirty-bitmap-exportname", "backup:" },
    { "dirty-bitmap-image", "" },
    { "dirty-bitmap-snapshot", "" },
    { "dirty-bitmap-server", "" },
    { "dirty-bitmap-server", "yes" },
    { "dirty-bitmap-server", "AUTO" },
    { "dirty-bitmap-listen", "" },
    { "dirty-bitmap-listen", "x:" },
  };
  static const struct {
    const char *key, *value;
  } once[] = {
    { "dirty-bitmap-granularity", "512" },
    { "dirty-bitmap-cache-size", "1M" },
    { "dirty-bitmap-server", "auto" },
    { "dirty-bitmap-listen", "/s" },
    { "dirty-bitmap-snapshot", "s" },
    { "dirty-bitmap-image", "/i" },
    { "dirty-bitmap-crash", "keep" },
    { "dirty-bitmap-delta", "off" },
    { "dirty-bitmap-detect-zeroes", "unmap" },
    { "dirty-bitmap-backing", "off" },
    { "dirty-bitmap-exit-last", "off" },
    { "dirty-bitmap-when-full", "close" },
    { "dirty-bitmap-node", "disk" },
    { "dirty-bitmap-scratch", "/" },
    { "dirty-bitmap-scratch-size", "1M" },
    { "dirty-bitmap-view-memory", "1M" },
  };
  struct parameters p = { .granularity = 0 };
  char name[1025];
  size_t i;

  (void) state;
  for (i = 0; i < sizeof bad / sizeof bad[0]; ++i) {
    print_message ("%s=%s\n", bad[i].key, bad[i].value);
    nr_reports = 0;
    assert_int_equal (parameters_take (&p, bad[i].key, bad[i].value), -1);
    assert_int_equal (nr_reports, 1);
    assert_non_null (strstr (last_report, bad[i].key));
  }
  for (i = 0; i < sizeof once / sizeof once[0]; ++i) {
    assert_int_equal (parameters_take (&p, once[i].key, once[i].value), 1);
    nr_reports = 0;
    assert_int_equal (parameters_take (&p, once[i].key, once[i].value), -1);
    assert_int_equal (nr_reports, 1);
    assert_non_null (strstr (last_report, once[i].key));
  }

  memset (name, 'n', sizeof name);
  name[1024] = '\0';
  assert_int_equal (parameters_take (&p, "dirty-bitmap", name), -1);
  name[1023] = '\0';
  assert_int_equal (parameters_take (&p, "dirty-bitmap", name), 1);
  parameters_free (&p);
}

/* The image beside the disk: nbdkit may change folder later.  The image need
 * not exist, but its folder has to.
 */
static void
test_image (void **state)
{
  static const struct { const char *value, *path; } rows[] = {
    { "b.qcow2", "b.qcow2" }, { "./b", "b" }, { "link", "file" },
    { "link/", NULL }, { "no/b", NULL }, { "dangling", "dangling" },
  };
  struct parameters p = { .granularity = 0 };
  char made[] = "/tmp/dirty-bitmap.XXXXXX", expected[4200], *dir;
  FILE *fp;

  (void) state;
  assert_non_null (mkdtemp (made));
  dir = realpath (made, NULL);
  assert_int_equal (chdir (dir), 0);
  fp = fopen ("file", "w");
  assert_non_null (fp);
  fclose (fp);
  assert_int_equal (symlink ("file", "link"), 0);
  assert_int_equal (symlink ("nothing", "dangling"), 0);

  assert_int_equal (parameters_complete (&p), 0);
  assert_null (p.image);
  parameters_free (&p);
  for (size_t i = 0; i < sizeof rows / sizeof rows[0]; ++i) {
    const bool good = rows[i].path != NULL;

    print_message ("%s\n", rows[i].value);
    nr_reports = 0;
    assert_int_equal (parameters_take (&p, "dirty-bitmap-image",
                                       rows[i].value), good ? 1 : -1);
    assert_int_equal (nr_reports, !good);
    if (!good) {
      assert_non_null (strstr (last_report, "dirty-bitmap-image"));
      assert_non_null (strstr (last_report, rows[i].value));
      continue;
    }
    assert_int_equal (parameters_take (&p, "dirty-bitmap", "b"), 1);
    assert_int_equal (parameters_complete (&p), 0);
    snprintf (expected, sizeof expected, "%s/%s", dir, rows[i].path);
    assert_string_equal (p.image, expected);
    assert_null (p.stats);
    parameters_free (&p);
    assert_null (p.image);
  }

  assert_int_equal (unlink ("file"), 0);
  assert_int_equal (unlink ("link"), 0);
  assert_int_equal (unlink ("dangling"), 0);
  assert_int_equal (chdir ("/"), 0);
  assert_int_equal (rmdir (dir), 0);
  free (dir);
}

/* The bitmaps are the disk's, and so are the parameters that name them; and
 * an image of bitmaps has no snapshots of the disk.
 */
static void
test_contradiction (void **state)
{
  static const char *const keys[] = {
    "dirty-bitmap", "dirty-bitmap-expose", "dirty-bitmap-image",
  };
  struct parameters p = { .granularity = 0 };

  (void) state;
  for (size_t i = 0; i < sizeof keys / sizeof keys[0]; ++i) {
    nr_reports = 0;
    assert_int_equal (parameters_take (&p, keys[i], "b"), 1);
    assert_int_equal (parameters_take (&p, "dirty-bitmap-snapshot", "s"), 1);
    assert_int_equal (parameters_complete (&p), -1);
    assert_int_equal (nr_reports, 1);
    assert_non_null (strstr (last_report, keys[i]));
    assert_non_null (strstr (last_report, "dirty-bitmap-snapshot"));
    parameters_free (&p);
  }
}

#define TEST(f) cmocka_unit_test_setup (f, setup)

int
main (void)
{
  const struct CMUnitTest tests[] = {
    TEST (test_listen_addresses),
    TEST (test_listen_unix),
    TEST (test_good_parameters),
    TEST (test_allowed_folders),
    TEST (test_views),
    TEST (test_bad_parameters),
    TEST (test_image),
    TEST (test_contradiction),
  };

  return cmocka_run_group_tests (tests, NULL, NULL);
}
