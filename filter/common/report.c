/* nbdkit-dirty-bitmap-filter
 * SPDX-License-Identifier: BSD-3-Clause
 * Copyright the nbdkit-dirty-bitmap-filter authors
 */

#include <config.h>

#include <errno.h>
#include <stdio.h>

#include "report.h"

report_sink_fn report_sink;

static _Thread_local struct report_hold *held;

static void
report (enum report_level level, const char *fmt, va_list args)
{
  int saved_errno = errno;

  if (level == REPORT_ERROR && held != NULL) {
    if (!held->any)
      vsnprintf (held->text, sizeof held->text, fmt, args);
    held->any = true;
  }
  else if (report_sink != NULL)
    report_sink (level, fmt, args);
  else if (level != REPORT_DEBUG) {
    if (level == REPORT_WARNING)
      fputs ("warning: ", stderr);
    vfprintf (stderr, fmt, args);
    fputc ('\n', stderr);
  }
  errno = saved_errno;
}

#define REPORT_AT(level)                        \
  va_list args;                                 \
                                                \
  va_start (args, fmt);                         \
  report (level, fmt, args);                    \
  va_end (args)

void
report_error (const char *fmt, ...)
{
  REPORT_AT (REPORT_ERROR);
}

void
report_warning (const char *fmt, ...)
{
  REPORT_AT (REPORT_WARNING);
}

void
report_debug (const char *fmt, ...)
{
  REPORT_AT (REPORT_DEBUG);
}

void
report_hold_begin (struct report_hold *hold)
{
  hold->outer = held;
  hold->any = false;
  held = hold;
}

void
report_hold_end (struct report_hold *hold)
{
  held = hold->outer;
}

void
report_held (const struct report_hold *hold)
{
  if (hold->any)
    report_error ("%s", hold->text);
}
