/* nbdkit-dirty-bitmap-filter
 * SPDX-License-Identifier: BSD-3-Clause
 * Copyright the nbdkit-dirty-bitmap-filter authors
 */

/* Which format the first bytes of a file are taken for. */

#include <config.h>

#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <string.h>

#include <cmocka.h>

#include "image/probe.h"

struct row {
  const char *format;
  unsigned at;
  const char *bytes;
  unsigned length;
};

#define ROW(format, at, text) { format, at, text, sizeof text - 1 }

static void
test_formats (void **state)
{
  static const struct row rows[] = {
    ROW ("raw", 0, ""),
    ROW ("raw", 0, "hello"),
    ROW ("raw", 1, "QFI\xfb"),
    ROW ("raw", 0, "QFI"),
    ROW ("raw", 0, "#!/bin/sh\n#V3"),
    ROW ("raw", 0, "# a comment\n"),
    ROW ("raw", 0, "# a comment\nversion\n"),
    ROW ("raw", 0, "#\n\nnoversion=1"),
    ROW ("raw", 65, "\x7f\x10\xda\xbe"),
    ROW ("qcow", 0, "QFI\xfb\0\0\0\1"),
    ROW ("qcow2", 0, "QFI\xfb\0\0\0\2"),
    ROW ("qcow2", 0, "QFI\xfb\0\0\0\3"),
    ROW ("qcow2", 0, "QFI\xfb\0\0\1\1"),
    ROW ("qed", 0, "QED\0"),
    ROW ("vmdk", 0, "KDMV"),
    ROW ("vmdk", 0, "COWD"),
    ROW ("vmdk", 0, "# Disk DescriptorFile\nversion=1\n"),
    ROW ("vmdk", 0, "# Disk\r\n\r\n \t# x\n  version=3"),
    ROW ("vmdk", 0, "version=2"),
    ROW ("vdi", 64, "\x7f\x10\xda\xbe"),
    ROW ("vhdx", 0, "vhdxfile"),
    ROW ("vpc", 0, "conectix"),
    ROW ("luks", 0, "LUKS\xba\xbe\0\1"),
    ROW ("parallels", 0, "WithoutFreeSpace"),
    ROW ("parallels", 0, "WithouFreSpacExt"),
    ROW ("bochs", 0, "Bochs Virtual HD Image"),
    ROW ("cloop", 0, "#!/bin/sh\n#V2.0 Format\nmodprobe"),
  };
  uint8_t first[PROBE_BYTES];

  (void) state;
  for (size_t i = 0; i < sizeof rows / sizeof rows[0]; ++i) {
    memset (first, 0, sizeof first);
    memcpy (first + rows[i].at, rows[i].bytes, rows[i].length);
    print_message ("%s\n", rows[i].format);
    assert_string_equal (probe_format (first, 1 << 20, "/a/disk"),
                         rows[i].format);
  }

  /* All of it one line, and one that ends with the bytes. */
  memset (first, '#', sizeof first);
  assert_string_equal (probe_format (first, sizeof first, "d"), "raw");
  memset (first, '\n', sizeof first);
  assert_string_equal (probe_format (first, sizeof first, "d"), "raw");
  memcpy (first + sizeof first - 8, "version=", 8);
  assert_string_equal (probe_format (first, sizeof first, "d"), "raw");
}

static void
test_by_name (void **state)
{
  const uint8_t zeroes[PROBE_BYTES] = { 0 };

  (void) state;
  assert_string_equal (probe_format (zeroes, 512, "/x/disk.dmg"), "dmg");
  assert_string_equal (probe_format (zeroes, 512, "disk.dmgx"), "raw");
  assert_string_equal (probe_format (zeroes, 512, ".dmg"), "raw");
  assert_string_equal (probe_format (zeroes, 0, "/x/disk.dmg"), "raw");
}

int
main (void)
{
  const struct CMUnitTest tests[] = {
    cmocka_unit_test (test_formats),
    cmocka_unit_test (test_by_name),
  };

  return cmocka_run_group_tests (tests, NULL, NULL);
}
