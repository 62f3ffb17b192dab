/* nbdkit-dirty-bitmap-filter
 * SPDX-License-Identifier: BSD-3-Clause
 * Copyright the nbdkit-dirty-bitmap-filter authors
 */

/* The parameters and nbdkit's command line, taken together.
 *
 * How this works
 *
 * Each file must have one use only.  nbdkit writes to the files of -P and
 * --log before it calls after_fork, whatever they contain: get_ready is the
 * last moment to find that one of them is the image.
 *
 * An option that nbdkit/command-line.c does not know may concern TLS, or
 * hide an option that does.  So dirty-bitmap-listen, whose socket our server
 * serves in any case, is refused with such options.
 *
 * Options of nbdkit that limit its clients also limit those of our server:
 * -t, --timeout, and the filter noparallel.  If a parameter sets the same
 * limit, the smaller number holds.
 */

#include <config.h>

#include <stddef.h>
#include <string.h>

#include "common/report.h"
#include "nbdkit/command-line.h"
#include "nbdkit/filter-stack.h"
#include "parameters.h"
#include "settings.h"
#include "used-paths.h"

static int
check_paths (const struct settings *s)
{
  const struct command_line *cl = s->command_line;
  const struct used_path paths[] = {
    { s->parameters->image != NULL ? "the disk" : "the image",
      filter_stack_is_file (cl) ? s->image_path : NULL },
    { "dirty-bitmap-image", s->parameters->image },
    { "-P", cl->pid_file },
    { "--log", cl->log_file },
    { "-U", cl->unix_path },
    { "dirty-bitmap-listen", s->parameters->listen.path },
    { "dirty-bitmap-control", s->parameters->control.path },
    { "dirty-bitmap-stats", s->parameters->stats },
    { "--tls-psk", cl->tls.psk },
  };

  return used_paths_check (paths, sizeof paths / sizeof paths[0]);
}

static int
check_unknown_option (const struct settings *s)
{
  const struct command_line *cl = s->command_line;

  if (s->parameters->listens &&
      (cl->is_ambiguous || strncmp (cl->unknown_option, "--tls", 5) == 0)) {
    report_error ("dirty-bitmap-listen: nbdkit's option %s is not known to "
                  "this filter and may concern that socket: leave out one of "
                  "them", cl->unknown_option);
    return -1;
  }
  if (cl->assumes_readonly)
    report_warning ("the disk is served read-only, since -r may be given: "
                    "nbdkit's option %s is not known to this filter",
                    cl->unknown_option);
  return 0;
}

int
settings_check (const struct settings *s)
{
  return check_paths (s) == -1 || check_unknown_option (s) == -1 ? -1 : 0;
}

int
settings_check_locked (const struct settings *s)
{
  const struct used_path pid = { "-P", s->command_line->pid_file };
  const struct used_path log = { "--log", s->command_line->log_file };

  return used_paths_check_unlocked (&pid) == -1 ||
    used_paths_check_unlocked (&log) == -1 ? -1 : 0;
}

/* The same as for dirty-bitmap-handshake-timeout. */
#define MAX_HANDSHAKE_SECONDS (24 * 60 * 60)

/* The smaller of two limits, where 0 is none. */
static unsigned
smaller_bound (unsigned a, unsigned b)
{
  if (a == 0 || b == 0)
    return a + b;
  return a < b ? a : b;
}

struct nbd_limits
settings_limits (const struct parameters *p, const struct command_line *cl)
{
  struct nbd_limits limits = p->limits;

  limits.requests = smaller_bound (limits.requests, cl->threads);
  limits.requests = smaller_bound (limits.requests, NBD_MAX_REQUESTS);
  if (filter_stack_keeps_order (cl))
    limits.requests = 1;
  limits.handshake_seconds = smaller_bound (limits.handshake_seconds,
                                            cl->timeout_seconds);
  if (limits.handshake_seconds > MAX_HANDSHAKE_SECONDS)
    limits.handshake_seconds = MAX_HANDSHAKE_SECONDS;
  return limits;
}
