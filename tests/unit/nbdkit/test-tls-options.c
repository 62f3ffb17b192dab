/* nbdkit-dirty-bitmap-filter
 * SPDX-License-Identifier: BSD-3-Clause
 * Copyright the nbdkit-dirty-bitmap-filter authors
 */

/* What is made of nbdkit's --tls options: when there is TLS, from which
 * files, and what is said of bad ones.
 */

#include <config.h>

#include <errno.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

#include <cmocka.h>

#include "nbdkit/command-line.h"
#include "common/report.h"
#include "nbd/nbd.h"
#include "nbdkit/tls-options.h"

#define KEY "0123456789abcdef0123456789abcdef"

static char dir[] = "/tmp/dirty-bitmap.XXXXXX";
static char report[1024];
static enum report_level level;

static void
keep_report (enum report_level l, const char *fmt, va_list args)
{
  if (l == REPORT_DEBUG)
    return;
  level = l;
  vsnprintf (report, sizeof report, fmt, args);
}

static int
setup (void **state)
{
  (void) state;
  strcpy (dir + strlen (dir) - 6, "XXXXXX");
  assert_non_null (mkdtemp (dir));
  assert_int_equal (chdir (dir), 0);
  report[0] = '\0';
  report_sink = keep_report;
  setenv ("HOME", dir, 1);
  return 0;
}

static int
teardown (void **state)
{
  char command[100];

  (void) state;
  assert_int_equal (chdir ("/"), 0);
  snprintf (command, sizeof command, "rm -rf '%s'", dir);
  return system (command);
}

static void
write_file (const char *name, const char *text)
{
  FILE *fp = fopen (name, "w");

  assert_non_null (fp);
  fputs (text, fp);
  assert_int_equal (fclose (fp), 0);
}

static void
write_certificates (const char *where)
{
  static const char *const names[] = {
    "ca-cert.pem", "server-cert.pem", "server-key.pem"
  };
  char path[200];

  for (int i = 0; i < 3; ++i) {
    snprintf (path, sizeof path, "%s/%s", where, names[i]);
    write_file (path, "not a certificate\n");
  }
}

/* Nothing is said, and there is TLS or not. */
static void
expect (const struct command_line_tls *cl, bool is_on)
{
  struct nbd_tls *tls;

  report[0] = '\0';
  assert_int_equal (tls_options_load (cl, &tls), 0);
  assert_string_equal (report, "");
  assert_true ((tls != NULL) == is_on);
  nbd_tls_free (tls);
}

/* It fails, and the error has this in it. */
static void
expect_error (const struct command_line_tls *cl, const char *part)
{
  struct nbd_tls *tls;

  report[0] = '\0';
  assert_int_equal (tls_options_load (cl, &tls), -1);
  print_message ("%s\n", report);
  assert_int_equal (level, REPORT_ERROR);
  assert_non_null (strstr (report, part));
}

static void
test_off (void **state)
{
  (void) state;
  write_certificates (".");
  expect (&(struct command_line_tls) {
      .mode = TLS_OFF, .psk = "missing", .certificates = "."
    }, false);
}

static void
test_psk (void **state)
{
  struct command_line_tls cl = { .psk = "keys" };

  (void) state;
  expect_error (&cl, "keys: No such file");
  write_file ("keys", "alice:" KEY "\n");
  expect (&cl, true);
  /* It counts before certificates. */
  cl.certificates = ".";
  cl.mode = TLS_REQUIRE;
  expect (&cl, true);
}

static void
test_priority (void **state)
{
  struct command_line_tls cl = { .psk = "keys" };

  (void) state;
  write_file ("keys", "alice:" KEY "\n");
  cl.priority = "SECURE256:-VERS-ALL:+VERS-TLS1.3";
  expect (&cl, true);
  cl.priority = "NORMAL:+NONSENSE";
  expect_error (&cl, "'NORMAL:+NONSENSE': not understood at '+NONSENSE");
  cl.priority = "@NO_SUCH_POLICY";
  expect_error (&cl, "@NO_SUCH_POLICY");
}

static void
test_missing_certificates (void **state)
{
  struct command_line_tls cl = { .certificates = "." };
  struct nbd_tls *tls;

  (void) state;
  assert_int_equal (tls_options_load (&cl, &tls), 0);
  assert_null (tls);
  assert_int_equal (level, REPORT_WARNING);
  assert_non_null (strstr (report, "--tls-certificates=.: "));
  cl.mode = TLS_REQUIRE;
  expect_error (&cl, "no certificates in .");
}

static void
test_bad_certificates (void **state)
{
  struct command_line_tls cl = { .certificates = dir };

  (void) state;
  write_certificates (".");
  expect_error (&cl, "/ca-cert.pem: ");
}

/* Others than root have them at home, if they have any. */
static void
test_certificates_at_home (void **state)
{
  static const char *const places[] = { ".config/pki/nbdkit", ".pki/nbdkit" };
  const struct command_line_tls cl = { .mode = TLS_ON };
  const struct command_line_tls off = { .mode = TLS_OFF };

  (void) state;
  /* root's place is not ours to write: be somebody else. */
  if (getuid () == 0) {
    assert_int_equal (chown (dir, 65534, -1), 0);
    assert_int_equal (seteuid (65534), 0);
  }
  expect (&cl, false);
  mkdir (".config", 0700);
  mkdir (".config/pki", 0700);
  mkdir (".pki", 0700);
  for (int i = 0; i < 2; ++i) {
    assert_int_equal (mkdir (places[i], 0700), 0);
    write_certificates (places[i]);
    expect_error (&cl, places[i]);
    expect (&off, false);
  }
  assert_int_equal (remove (".pki/nbdkit/server-key.pem"), 0);
  expect_error (&cl, places[0]);
  unsetenv ("HOME");
  expect (&cl, false);
  assert_int_equal (seteuid (getuid ()), 0);
}

int
main (void)
{
#define TEST(name) cmocka_unit_test_setup_teardown (name, setup, teardown)
  const struct CMUnitTest tests[] = {
    TEST (test_off),
    TEST (test_psk),
    TEST (test_priority),
    TEST (test_missing_certificates),
    TEST (test_bad_certificates),
    TEST (test_certificates_at_home),
  };

  return cmocka_run_group_tests (tests, NULL, NULL);
}
