/* nbdkit-dirty-bitmap-filter
 * SPDX-License-Identifier: BSD-3-Clause
 * Copyright the nbdkit-dirty-bitmap-filter authors
 */

/* The formats that QEMU recognises, each by its magic, and two of them by
 * other signs.  We are less strict than QEMU about what comes after the
 * magic: a file that only nearly has another format is not raw to us.
 */

#include <config.h>

#include <stdbool.h>
#include <string.h>

#include "common/bytes.h"
#include "image/probe.h"

#define MAGIC(format, at, text) { format, at, sizeof text - 1, text }

static const struct {
  const char *format;
  unsigned at, length;
  const char *text;
} magics[] = {
  MAGIC ("qcow", 0, "QFI\xfb\0\0\0\1"),
  MAGIC ("qcow2", 0, "QFI\xfb"),
  MAGIC ("qed", 0, "QED\0"),
  MAGIC ("vmdk", 0, "KDMV"),
  MAGIC ("vmdk", 0, "COWD"),
  MAGIC ("vdi", 64, "\x7f\x10\xda\xbe"),
  MAGIC ("vhdx", 0, "vhdxfile"),
  MAGIC ("vpc", 0, "conectix"),
  MAGIC ("luks", 0, "LUKS\xba\xbe"),
  MAGIC ("parallels", 0, "WithoutFreeSpace"),
  MAGIC ("parallels", 0, "WithouFreSpacExt"),
  MAGIC ("bochs", 0, "Bochs Virtual HD Image"),
  MAGIC ("cloop", 0, "#!/bin/sh\n#V2.0 Format\n"),
};

/* A VMDK descriptor is a text with the version after comments and empty
 * lines.
 */
static bool
is_vmdk_descriptor (const char *p, const char *end)
{
  while (p < end) {
    const char *line = p, *newline = memchr (p, '\n', end - p);
    size_t length;

    if (newline == NULL)
      newline = end;
    p = newline + 1;
    length = newline - line;
    while (length > 0 && (*line == ' ' || *line == '\t' || *line == '\r'))
      line++, length--;
    if (length > 0 && *line != '#')
      return length > 8 && memcmp (line, "version=", 8) == 0;
  }
  return false;
}

/* QEMU recognises this format by the name. */
static bool
is_dmg (const char *path)
{
  const size_t n = strlen (path);

  return n > 4 && strcmp (path + n - 4, ".dmg") == 0;
}

const char *
probe_format (const uint8_t first[PROBE_BYTES], uint64_t size,
              const char *path)
{
  if (size == 0)
    return "raw";
  for (size_t i = 0; i < sizeof magics / sizeof magics[0]; ++i)
    if (memcmp (first + magics[i].at, magics[i].text, magics[i].length) == 0)
      return magics[i].format;
  if (is_vmdk_descriptor ((const char *) first,
                          (const char *) first + min_u64 (size, PROBE_BYTES)))
    return "vmdk";
  return is_dmg (path) ? "dmg" : "raw";
}
