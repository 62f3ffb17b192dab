/* nbdkit-dirty-bitmap-filter
 * SPDX-License-Identifier: BSD-3-Clause
 * Copyright the nbdkit-dirty-bitmap-filter authors
 */

/* Messages about what clients do wrong, a few of them a minute. */

#include <config.h>

#include <stdarg.h>
#include <stdio.h>

#include "common/limit.h"
#include "common/report.h"
#include "nbd/client-errors.h"

static void
report_hidden (unsigned nr)
{
  if (nr > 0)
    report_limited_error ("nbd: %u more errors of clients were not shown", nr);
}

void
client_error (struct limit *limit, const char *fmt, ...)
{
  unsigned nr_hidden;
  char text[256];
  va_list args;

  if (!limit_admits (limit, &nr_hidden))
    return;
  report_hidden (nr_hidden);
  va_start (args, fmt);
  vsnprintf (text, sizeof text, fmt, args);
  va_end (args);
  report_limited_error ("%s", text);
}

void
client_errors_end (struct limit *limit)
{
  report_hidden (limit_end (limit));
}
