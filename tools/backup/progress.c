/* nbdkit-dirty-bitmap-filter
 * SPDX-License-Identifier: BSD-3-Clause
 * Copyright the nbdkit-dirty-bitmap-filter authors
 */

/* Telling how far some work is. */

#include <config.h>

#include <inttypes.h>
#include <stdio.h>
#include <string.h>
#include <sys/ioctl.h>
#include <unistd.h>

#include "backup/backup.h"
#include "backup/progress.h"
#include "common/bytes.h"
#include "common/clock.h"

#define DRAW_EVERY_NS INT64_C (100000000)
#define LINE_EVERY_NS INT64_C (10000000000)

/* Is there a bar in the terminal's last line? */
static atomic_bool is_drawn;

#define NARROWEST 40
#define MAX_BAR 200

const char *
progress_size (char text[PROGRESS_SIZE_CHARS], uint64_t bytes)
{
  static const char units[][4] = { "KiB", "MiB", "GiB", "TiB", "PiB", "EiB" };
  double n = bytes;
  unsigned unit = 0;

  if (bytes < 1024)
    snprintf (text, PROGRESS_SIZE_CHARS, "%" PRIu64 " B", bytes);
  else {
    for (n /= 1024; n >= 1000 && unit < 5; ++unit)
      n /= 1024;
    snprintf (text, PROGRESS_SIZE_CHARS, n < 10 ? "%.1f %s" : "%.0f %s", n,
              units[unit]);
  }
  return text;
}

void
progress_begin (struct progress *p, const char *verb, uint64_t total,
                bool quiet)
{
  memset (p, 0, sizeof *p);
  p->verb = verb;
  p->total = total;
  p->is_quiet = quiet;
  p->is_terminal = isatty (STDERR_FILENO);
  p->began_ns = p->told_ns = now_ns ();
}

/* "1.5 GiB of 10 GiB, 800 MiB/s" and how long it will take, if asked. */
static void
describe (const struct progress *p, int64_t now, bool with_rest,
          char *text, size_t size)
{
  char done_text[PROGRESS_SIZE_CHARS], total_text[PROGRESS_SIZE_CHARS];
  char rate_text[PROGRESS_SIZE_CHARS];
  const uint64_t done = min_u64 (p->done, p->total);
  const double seconds = (now - p->began_ns) / 1e9 + 1e-9;
  const double rate = done / seconds;
  int n = snprintf (text, size, "%s of %s, %s/s",
                    progress_size (done_text, done),
                    progress_size (total_text, p->total),
                    progress_size (rate_text, rate));

  if (with_rest && rate > 0 && (size_t) n < size) {
    const uint64_t rest = (p->total - done) / rate + 0.5;

    snprintf (text + n, size - n, ", %" PRIu64 ":%02u left", rest / 60,
              (unsigned) (rest % 60));
  }
}

static unsigned
terminal_columns (void)
{
  struct winsize w;

  return ioctl (STDERR_FILENO, TIOCGWINSZ, &w) == 0 && w.ws_col > 0
    ? w.ws_col : 80;
}

static void
draw (struct progress *p, int64_t now)
{
  const unsigned columns = terminal_columns ();
  const double part = p->total == 0 ? 1
    : (double) min_u64 (p->done, p->total) / p->total;
  char text[160], bar[MAX_BAR + 1];
  unsigned width, filled;

  describe (p, now, true, text, sizeof text);
  width = strlen (text) + 10 < columns ? columns - strlen (text) - 10 : 0;
  width = min_u64 (width, 40);
  filled = width * part;
  for (unsigned i = 0; i < width; ++i)
    bar[i] = i < filled ? '#' : '.';
  bar[width] = '\0';
  if (columns < NARROWEST || width < 5)
    fprintf (stderr, "\r%3.0f %%\033[K", part * 100);
  else
    fprintf (stderr, "\r%3.0f %% [%s] %s\033[K", part * 100, bar, text);
  fflush (stderr);
  is_drawn = true;
}

void
progress_erase (void)
{
  if (atomic_exchange (&is_drawn, false))
    fputs ("\r\033[K", stderr);
}

void
progress_tell (struct progress *p)
{
  const int64_t now = now_ns ();
  char text[160];

  if (p->is_quiet ||
      now - p->told_ns < (p->is_terminal ? DRAW_EVERY_NS : LINE_EVERY_NS))
    return;
  p->told_ns = now;
  if (p->is_terminal) {
    draw (p, now);
    return;
  }
  describe (p, now, true, text, sizeof text);
  fprintf (stderr, "%s: %s %s\n", PROGRAM, p->verb, text);
}

void
progress_end (struct progress *p, bool success)
{
  const int64_t now = now_ns ();
  char text[160];

  progress_erase ();
  if (p->is_quiet || !success || p->total == 0)
    return;
  describe (p, now, false, text, sizeof text);
  fprintf (stderr, "%s: %s %s, %.1f s\n", PROGRAM, p->verb, text,
           (now - p->began_ns) / 1e9);
}
