/* nbdkit-dirty-bitmap-filter
 * SPDX-License-Identifier: BSD-3-Clause
 * Copyright the nbdkit-dirty-bitmap-filter authors
 */

#ifndef DIRTY_BITMAP_KEPT_REPORTS_H
#define DIRTY_BITMAP_KEPT_REPORTS_H

/* What the code under test reports to the user, for the test that includes
 * this: how many errors and warnings, and the last of them.
 */

#include <stdarg.h>
#include <stdio.h>

#include <cmocka.h>

#include "common/report.h"

static unsigned nr_reports;
static char last_report[512];

static void
keep_report (enum report_level level, const char *fmt, va_list args)
{
  if (level == REPORT_DEBUG)
    return;
  nr_reports++;
  vsnprintf (last_report, sizeof last_report, fmt, args);
  print_message ("%s\n", last_report);
}

/* From now on, and none so far. */
static void
keep_reports (void)
{
  nr_reports = 0;
  last_report[0] = '\0';
  report_sink = keep_report;
}

#endif /* DIRTY_BITMAP_KEPT_REPORTS_H */
