/* nbdkit-dirty-bitmap-filter
 * SPDX-License-Identifier: BSD-3-Clause
 * Copyright the nbdkit-dirty-bitmap-filter authors
 */

/* Errors, warnings and debug messages: where they go, which are held back, and
 * how many of one kind are shown.
 */

#include <config.h>

#include <assert.h>
#include <errno.h>
#include <pthread.h>
#include <stddef.h>
#include <stdio.h>

#include "common/cleanup.h"
#include "common/limit.h"
#include "common/lock.h"
#include "report.h"

report_sink_fn report_sink;

static _Thread_local struct report_hold *held;
static _Thread_local bool is_limited;

/* The kinds of messages that limited threads have reported so far.  A kind
 * keeps its place.  When there are more kinds than places, the last place is
 * for all others.
 */
#define MAX_KINDS 64

static struct kind {
  const char *fmt;
  struct limit limit;
  char text[160];               /* of the last that was shown; under
                                   kinds_lock */
} kinds[MAX_KINDS];
static size_t nr_kinds;

/* Protects kinds, except their limits.  Only a limit's lock is taken while
 * it is held.
 */
static pthread_mutex_t kinds_lock = PTHREAD_MUTEX_INITIALIZER;

void
report_limit_thread (void)
{
  is_limited = true;
}

/* Called with kinds_lock. */
static struct kind *
find_kind (const char *fmt)
{
  size_t i;

  assert (lock_is_mine (&kinds_lock));
  for (i = 0; i < nr_kinds; ++i)
    if (kinds[i].fmt == fmt)
      return &kinds[i];
  if (i == MAX_KINDS)
    return &kinds[i - 1];
  kinds[i].fmt = fmt;
  limit_init (&kinds[i].limit);
  nr_kinds++;
  return &kinds[i];
}

static void
show (enum report_level level, const char *fmt, va_list args)
{
  if (report_sink != NULL)
    report_sink (level, fmt, args);
  else if (level != REPORT_DEBUG) {
    if (level == REPORT_WARNING)
      fputs ("warning: ", stderr);
    vfprintf (stderr, fmt, args);
    fputc ('\n', stderr);
  }
}

void
report_limited_error (const char *fmt, ...)
{
  const int saved_errno = errno;
  va_list args;

  va_start (args, fmt);
  show (REPORT_ERROR, fmt, args);
  va_end (args);
  errno = saved_errno;
}

/* May a message of a kind be shown? */
static bool
is_admitted (const char *kind_fmt, const char *fmt, va_list args)
{
  unsigned nr_hidden;
  bool r;

  {
    ACQUIRE_LOCK_FOR_CURRENT_SCOPE (&kinds_lock);
    struct kind *k = find_kind (kind_fmt);

    r = limit_admits (&k->limit, &nr_hidden);
    if (r)
      vsnprintf (k->text, sizeof k->text, fmt, args);
  }
  if (nr_hidden > 0)
    report_limited_error ("%u more errors like the next one were not shown",
                          nr_hidden);
  return r;
}

/* Show a message, which is of the kind of kind_fmt. */
static void
report (enum report_level level, const char *kind_fmt, const char *fmt,
        va_list args)
{
  const int saved_errno = errno;
  va_list copy;

  if (level == REPORT_ERROR && held != NULL) {
    if (!held->any) {
      vsnprintf (held->text, sizeof held->text, fmt, args);
      held->fmt = kind_fmt;
    }
    held->any = true;
    errno = saved_errno;
    return;
  }
  if (is_limited && level != REPORT_DEBUG) {
    bool r;

    va_copy (copy, args);
    r = is_admitted (kind_fmt, fmt, copy);
    va_end (copy);
    errno = saved_errno;
    if (!r)
      return;
  }
  show (level, fmt, args);
  errno = saved_errno;
}

#define REPORT_AT(level, kind_fmt)              \
  va_list args;                                 \
                                                \
  va_start (args, fmt);                         \
  report (level, kind_fmt, fmt, args);          \
  va_end (args)

void
report_error (const char *fmt, ...)
{
  REPORT_AT (REPORT_ERROR, fmt);
}

void
report_warning (const char *fmt, ...)
{
  REPORT_AT (REPORT_WARNING, fmt);
}

void
report_debug (const char *fmt, ...)
{
  REPORT_AT (REPORT_DEBUG, fmt);
}

void
report_limits_end (void)
{
  ACQUIRE_LOCK_FOR_CURRENT_SCOPE (&kinds_lock);
  for (size_t i = 0; i < nr_kinds; ++i) {
    const unsigned nr_hidden = limit_end (&kinds[i].limit);

    if (nr_hidden > 0)
      report_limited_error ("%u more errors like this one were not shown: %s",
                            nr_hidden, kinds[i].text);
  }
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

__attribute__ ((format (printf, 2, 3)))
static void
report_of_kind (const char *kind_fmt, const char *fmt, ...)
{
  REPORT_AT (REPORT_ERROR, kind_fmt);
}

void
report_held (const struct report_hold *hold)
{
  if (hold->any)
    report_of_kind (hold->fmt, "%s", hold->text);
}

int
report_hold_result (struct report_hold *hold, int r)
{
  report_hold_end (hold);
  if (r == -1)
    report_held (hold);
  return r;
}
