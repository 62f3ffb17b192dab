/* nbdkit-dirty-bitmap-filter
 * SPDX-License-Identifier: BSD-3-Clause
 * Copyright the nbdkit-dirty-bitmap-filter authors
 */

#ifndef DIRTY_BITMAP_REPORT_H
#define DIRTY_BITMAP_REPORT_H

/* Where the rooms below filter.c send what they have to say.  They
 * know no nbdkit, so filter.c sets report_sink to one that calls
 * nbdkit_error or nbdkit_debug; without a sink everything but debug
 * lines goes to stderr.  All three keep errno, understand %m, and take
 * a message in lower case with no newline and no full stop, the format of
 * which is a string literal.
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

/* Something the operator should know, though we go on. */
extern void report_warning (const char *fmt, ...)
  __attribute__ ((format (printf, 1, 2)));

extern void report_debug (const char *fmt, ...)
  __attribute__ ((format (printf, 1, 2)));

/* From now on this thread serves requests, or stores what they have done.
 * An error that it meets it may meet again with every request or cluster:
 * so of its errors and warnings those of each
 * kind, that is with one format, are shown up to a limit (limit.h), which
 * is that of all such threads together.
 */
extern void report_limit_thread (void);

/* An error that the caller has limited, or that has to be shown each time.
 * Holds (below) do not keep it back.
 */
extern void report_limited_error (const char *fmt, ...)
  __attribute__ ((format (printf, 1, 2)));

/* Tell of what was not shown. */
extern void report_limits_end (void);

/* Where a failure may not be the last word, because there is another
 * way: keep the errors of this thread back from begin to end.  The first
 * of them, which is the cause of the others, is in text then; nothing
 * has been said.  Holds may nest.
 */
struct report_hold {
  struct report_hold *outer;
  const char *fmt;              /* if any */
  bool any;
  char text[512];               /* if any */
};
extern void report_hold_begin (struct report_hold *);
extern void report_hold_end (struct report_hold *);

/* After the end: say it after all. */
extern void report_held (const struct report_hold *);

#endif /* DIRTY_BITMAP_REPORT_H */
