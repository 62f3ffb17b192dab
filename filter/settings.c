/* nbdkit-dirty-bitmap-filter
 * SPDX-License-Identifier: BSD-3-Clause
 * Copyright the nbdkit-dirty-bitmap-filter authors
 */

/* How this works
 *
 * An option that nobody here knows may be about TLS, or hide one that is
 * (command-line.c).  So the socket of dirty-bitmap-listen, which our
 * server serves in any case, is refused with such options.
 */

#include <config.h>

#include <stddef.h>
#include <string.h>

#include "command-line.h"
#include "common/report.h"
#include "parameters.h"
#include "settings.h"

static int
check_unknown_option (const struct settings *s)
{
  const struct command_line *cl = s->command_line;

  if (s->parameters->listens &&
      (cl->is_ambiguous || strncmp (cl->unknown_option, "--tls", 5) == 0)) {
    report_error ("dirty-bitmap-listen: nbdkit's option %s is not known to "
                  "this filter, which cannot tell what it means for that "
                  "socket: leave out one of them", cl->unknown_option);
    return -1;
  }
  if (cl->assumes_readonly)
    report_warning ("the disk is served read-only, since there may be a -r: "
                    "nbdkit's option %s is not known to this filter",
                    cl->unknown_option);
  return 0;
}

int
settings_check (const struct settings *s)
{
  return check_unknown_option (s);
}
