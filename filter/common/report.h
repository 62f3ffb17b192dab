/* nbdkit-dirty-bitmap-filter
 * SPDX-License-Identifier: BSD-3-Clause
 * Copyright the nbdkit-dirty-bitmap-filter authors
 */

#ifndef DIRTY_BITMAP_REPORT_H
#define DIRTY_BITMAP_REPORT_H

/* Where the rooms below filter.c report errors, warnings and debug messages.
 * They do not know nbdkit, so filter.c sets report_sink to a function that
 * calls nbdkit_error or nbdkit_debug.  Without a sink everything but debug
 * messages goes to stderr.  All three functions keep errno and understand
 * %m.  A message is in lower case, with no newline and no full stop, and its
 * format is a string literal.
 */

#include <stdarg.h>
#include <stdbool.h>

enum report_level { REPORT_ERROR, REPORT_WARNING, REPORT_DEBUG };

typedef void (*report_sink_fn) (enum report_level level,
                                const char *fmt, va_list args)
  __attribute__ ((format (printf, 2, 0)));

extern report_sink_fn report_sink;

/* Something failed: the caller is about to return -1. */
extern void report_error (const char *fmt, ...)
  __attribute__ ((format (printf, 1, 2)));

/* Something the operator should know, though the caller goes on. */
extern void report_warning (const char *fmt, ...)
  __attribute__ ((format (printf, 1, 2)));

extern void report_debug (const char *fmt, ...)
  __attribute__ ((format (printf, 1, 2)));

/* From now on this thread serves requests, or stores what they changed.
 * Such a thread may meet the same error with every request or cluster.  So
 * its errors and warnings of each kind (that is, with one format) are shown
 * up to a limit (limit.h), which all such threads share.
 */
extern void report_limit_thread (void);

/* An error that the caller limits itself, or that must be shown each time.
 * Holds (below) do not keep it back.
 */
extern void report_limited_error (const char *fmt, ...)
  __attribute__ ((format (printf, 1, 2)));

/* Report how many messages were suppressed. */
extern void report_limits_end (void);

/* Where the caller has a fallback, a failure need not be reported: keep the
 * errors of this thread back from begin to end.  text then has the first of
 * them, which caused the others, and none was reported.  Holds may nest.
 */
struct report_hold {
  struct report_hold *outer;
  const char *fmt;              /* if any */
  bool any;
  char text[512];               /* if any */
};
extern void report_hold_begin (struct report_hold *);
extern void report_hold_end (struct report_hold *);

/* After the end: report the error that was kept back. */
extern void report_held (const struct report_hold *);

/* End it, and report that error only if the result r, which is returned, is
 * -1: of what succeeds nothing is reported.
 */
extern int report_hold_result (struct report_hold *, int r);

#endif /* DIRTY_BITMAP_REPORT_H */
