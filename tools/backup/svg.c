/* nbdkit-dirty-bitmap-filter
 * SPDX-License-Identifier: BSD-3-Clause
 * Copyright the nbdkit-dirty-bitmap-filter authors
 */

/* Text in an SVG file.
 *
 * The names of exports and bitmaps come from the server, and may be anything.
 */

#include <config.h>

#include <inttypes.h>
#include <stdbool.h>
#include <string.h>

#include "backup/svg.h"
#include "common/utf8.h"

#define REPLACEMENT 0xfffd

struct range {
  uint32_t first, last;
};

static bool
is_in (uint32_t c, const struct range *ranges, size_t nr)
{
  for (size_t i = 0; i < nr; ++i)
    if (c >= ranges[i].first && c <= ranges[i].last)
      return true;
  return false;
}

/* Controls, also of the direction, and what XML 1.0 does not allow. */
static bool
is_unwanted (uint32_t c)
{
  static const struct range ranges[] = {
    { 0, 0x1f }, { 0x7f, 0x9f }, { 0x61c, 0x61c }, { 0x200e, 0x200f },
    { 0x2028, 0x202e }, { 0x2066, 0x2069 }, { 0xfeff, 0xfeff },
    { 0xfff9, 0xfffb }, { 0xfffe, 0xffff }, { 0xe0000, 0xe0fff },
  };

  return is_in (c, ranges, sizeof ranges / sizeof ranges[0]);
}

/* Most of those that are as wide as two Latin letters. */
static unsigned
width (uint32_t c)
{
  static const struct range ranges[] = {
    { 0x1100, 0x115f }, { 0x2e80, 0xa4cf }, { 0xac00, 0xd7a3 },
    { 0xf900, 0xfaff }, { 0xfe30, 0xfe6f }, { 0xff00, 0xff60 },
    { 0xffe0, 0xffe6 }, { 0x1f000, 0x1faff }, { 0x20000, 0x3fffd },
  };

  return is_in (c, ranges, sizeof ranges / sizeof ranges[0]) ? 2 : 1;
}

/* The next character, and its length in bytes. */
static uint32_t
character (const unsigned char *s, unsigned *length)
{
  uint32_t c;

  *length = utf8_length (s);
  if (*length == 0) {
    *length = 1;
    return REPLACEMENT;
  }
  c = *length == 1 ? s[0] : s[0] & (0x7f >> *length);
  for (unsigned i = 1; i < *length; ++i)
    c = c << 6 | (s[i] & 0x3f);
  return is_unwanted (c) ? REPLACEMENT : c;
}

static size_t
columns (const unsigned char *s)
{
  size_t sum = 0;
  unsigned length;

  for (; *s != '\0'; s += length)
    sum += width (character (s, &length));
  return sum;
}

static void
put_character (FILE *f, uint32_t c, const unsigned char *s, unsigned length)
{
  if (c == REPLACEMENT)
    fputs ("\xef\xbf\xbd", f);
  else if (c < 0x80 && strchr ("&<>\"'", c) != NULL)
    fprintf (f, "&#%" PRIu32 ";", c);
  else
    fwrite (s, 1, length, f);
}

void
svg_text (FILE *f, const char *text, size_t max_columns)
{
  const unsigned char *s = (const unsigned char *) text;
  const size_t all = columns (s);
  const bool is_cut = max_columns > 0 && all > max_columns;
  const size_t tail = (max_columns - 1) / 3, head = max_columns - 1 - tail;
  bool has_ellipsis = false;
  unsigned length;

  for (size_t at = 0; *s != '\0'; s += length) {
    const uint32_t c = character (s, &length);
    const size_t end = at + width (c);

    if (!is_cut || end <= head || at >= all - tail)
      put_character (f, c, s, length);
    else if (!has_ellipsis) {
      fputs ("\xe2\x80\xa6", f);
      has_ellipsis = true;
    }
    at = end;
  }
}

const char *
svg_size (char text[SVG_NUMBER_CHARS], uint64_t bytes)
{
  static const char units[][4] = { "B", "KiB", "MiB", "GiB", "TiB", "PiB",
                                   "EiB" };
  double n = bytes;
  unsigned unit = 0;

  /* Not 999.5, which is 1e+03 in three digits. */
  for (; (unit == 0 && n >= 1024) || (unit > 0 && n >= 999.5); ++unit)
    n /= 1024;
  snprintf (text, SVG_NUMBER_CHARS, unit == 0 ? "%.0f %s" : "%.3g %s", n,
            units[unit]);
  return text;
}

const char *
svg_grouped (char text[SVG_NUMBER_CHARS], uint64_t n)
{
  char digits[SVG_NUMBER_CHARS];
  const size_t nr = snprintf (digits, sizeof digits, "%" PRIu64, n);
  size_t at = 0;

  for (size_t i = 0; i < nr; ++i) {
    if (i > 0 && (nr - i) % 3 == 0)
      text[at++] = ',';
    text[at++] = digits[i];
  }
  text[at] = '\0';
  return text;
}

const char *
svg_percent (char text[SVG_NUMBER_CHARS], uint64_t part, uint64_t whole)
{
  const double percent = whole == 0 ? 0 : 100.0 * part / whole;

  if (part == 0 || part == whole)
    return strcpy (text, part == 0 ? "0 %" : "100 %");
  if (percent < 0.1)
    return strcpy (text, "&lt;0.1 %");
  if (percent > 99.9)
    return strcpy (text, "&gt;99.9 %");
  snprintf (text, SVG_NUMBER_CHARS, "%.1f %%", percent);
  return text;
}
