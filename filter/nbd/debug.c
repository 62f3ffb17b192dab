/* nbdkit-dirty-bitmap-filter
 * SPDX-License-Identifier: BSD-3-Clause
 * Copyright the nbdkit-dirty-bitmap-filter authors
 */

/* Debug messages about options and requests.  A thread serves one
 * connection as long as it lives, so its messages are about that one.
 */

#include <config.h>

#include <endian.h>
#include <inttypes.h>
#include <stdarg.h>
#include <stdio.h>
#include <string.h>

#include "common/cleanup.h"
#include "common/report.h"
#include "nbd/debug.h"

__attribute__ ((visibility ("default"))) int dirty_bitmap_debug_request;

/* For -D dirty-bitmap.request=1 nbdkit looks for a symbol that begins
 * with the filter's name, dash and all, which C cannot write.
 */
__asm__ (".globl \"dirty-bitmap_debug_request\"\n"
         ".set \"dirty-bitmap_debug_request\", dirty_bitmap_debug_request\n");

static _Thread_local const struct debug_context *my_context;

void
debug_thread (const struct debug_context *context)
{
  my_context = context;
}

void
debug_show (const char *fmt, ...)
{
  static const char prefix[] = "nbd: ";
  const struct debug_context *d = my_context;
  CLEANUP_FREE char *text = NULL;
  const char *rest;
  va_list args;
  int r;

  va_start (args, fmt);
  r = vasprintf (&text, fmt, args);
  va_end (args);
  if (r == -1) {
    text = NULL;
    return;
  }
  rest = strncmp (text, prefix, sizeof prefix - 1) == 0
    ? text + sizeof prefix - 1 : text;
  if (d == NULL)
    report_debug ("nbd: %s", rest);
  else if (d->request == 0)
    report_debug ("nbd: connection %" PRIu64 ": %s", d->connection, rest);
  else
    report_debug ("nbd: connection %" PRIu64 ": request %" PRIu64
                  ", cookie %#" PRIx64 ": %s", d->connection, d->request,
                  be64toh (d->cookie), rest);
}
