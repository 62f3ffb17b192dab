/* nbdkit-dirty-bitmap-filter
 * SPDX-License-Identifier: BSD-3-Clause
 * Copyright the nbdkit-dirty-bitmap-filter authors
 */

/* How this works
 *
 * A list of nbdkit's filters, and five questions of each.
 *
 * - Does it act on data alone?  Then it does below ours what it always
 *   does, whoever answers the clients.  Others judge, count or delay the
 *   clients themselves, and where one of them is used, nbdkit's own
 *   server must answer.
 * - Does it pass bytes and size through unchanged?  Then what the file
 *   plugin's file holds is what we see, and we can look at the file
 *   before the plugin is opened, and extend it.
 * - Does it work through the opening of connections?  Our filter opens
 *   the plugin once for all, so below ours it never sees a client.
 *
 * - Does it fail requests because nbdkit quits?  Such filters sleep in
 *   nbdkit_nanosleep.  Below ours they work until everything is stored
 *   (stop.c).  (spinning sleeps too, and does not mind if it cannot.)
 * - Does it let nbdkit quit when a client has gone?
 *
 * What is not in the list is unknown, and the answer is no.
 *
 * Some that were looked at, as to how nbdkit ends:
 *
 * - retry opens the plugin again, in the thread of whatever request has
 *   failed.  In nbdkit since 1.32 that works in our context, which belongs
 *   to no connection; and as it lowers the thread model, requests come to
 *   it one at a time.
 * - pause, as long as it is paused, stops what is stored at the end, as it
 *   stops everything: nbdkit ends when it is resumed.
 * - exitlast takes a client that asks for INFO for one that has come and
 *   gone, with or without our filter.  If it was the only one nbdkit
 *   quits, and the GO that follows it is refused.
 */

#include <config.h>

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "command-line.h"
#include "common/report.h"
#include "filter-stack.h"

enum {
  DATA = 1,                     /* acts on data alone */
  SAME = 2,                     /* passes bytes and size through */
  OPENS = 4,                    /* works through .open or .close */
  SLEEPS = 8,                   /* and fails requests when nbdkit quits */
  QUITS = 16,                   /* when a client has gone */
};

static const struct {
  const char *name;
  unsigned what;
} known_filters[] = {
  { "blocksize", DATA | SAME },
  { "blocksize-policy", DATA | SAME },
  { "bzip2", DATA },
  { "cache", DATA },
  { "cacheextents", DATA | SAME },
  { "checkwrite", DATA },
  { "count", DATA | SAME },
  { "cow", DATA },
  { "ddrescue", DATA },
  { "delay", DATA | SAME | SLEEPS },
  { "error", DATA | SAME },
  { "evil", DATA },
  { "exitlast", SAME | OPENS | QUITS },
  { "exitwhen", SAME | OPENS | QUITS },
  { "exportname", SAME | OPENS },
  { "ext2", DATA },
  { "extentlist", DATA | SAME },
  { "fua", DATA | SAME },
  { "gzip", DATA },
  { "ip", SAME },
  { "limit", SAME | OPENS },
  { "log", DATA | SAME },
  { "luks", DATA },
  { "lzip", DATA },
  { "multi-conn", DATA | SAME },
  { "nocache", DATA | SAME },
  { "noextents", DATA | SAME },
  { "nofilter", DATA | SAME },
  { "noparallel", DATA | SAME },
  { "nozero", DATA | SAME },
  { "offset", DATA },
  { "openonce", DATA },
  { "partition", DATA },
  { "pause", SAME },
  { "protect", DATA | SAME },
  { "qcow2dec", DATA },
  { "rate", SAME | SLEEPS },
  { "readahead", DATA | SAME },
  { "retry", DATA | SAME | SLEEPS },
  { "retry-request", DATA | SAME | SLEEPS },
  { "rotational", DATA | SAME },
  { "scan", DATA | SAME },
  { "spinning", DATA | SAME },
  { "stats", DATA | SAME },
  { "swab", DATA },
  { "tar", DATA },
  { "time-limit", DATA | SAME },
  { "tls-fallback", OPENS },
  { "truncate", DATA },
  { "xz", DATA },
};

#define OUR_NAME "dirty-bitmap"

/* Does arg, which is a short name or the path of a shared object, name
 * the filter or plugin?
 */
static bool
is_named (const char *arg, const char *name, const char *suffix)
{
  const char *base = strrchr (arg, '/');
  const size_t len = strlen (name);

  /* nbdkit's rule for what is a short name. */
  if (strchr (arg, '.') == NULL && base == NULL)
    return strcmp (arg, name) == 0;

  base = base != NULL ? base + 1 : arg;
  return strncmp (base, "nbdkit-", 7) == 0 &&
    strncmp (base + 7, name, len) == 0 &&
    strcmp (base + 7 + len, suffix) == 0;
}

static bool
is_filter (const char *arg, const char *name)
{
  return is_named (arg, name, "-filter.so");
}

static unsigned
what_is (const char *arg)
{
  size_t i;

  for (i = 0; i < sizeof known_filters / sizeof known_filters[0]; ++i)
    if (is_filter (arg, known_filters[i].name))
      return known_filters[i].what;
  return 0;
}

/* Our place in the stack, 0 for outermost, or -1 if we were loaded from
 * a file of another name.
 */
static ssize_t
our_place (const struct command_line *cl)
{
  size_t i;

  for (i = 0; i < cl->nr_filters; ++i)
    if (is_filter (cl->filters[i], OUR_NAME))
      return i;
  return -1;
}

char *
filter_stack_objection (const struct command_line *cl, bool *failed)
{
  const ssize_t ours = our_place (cl);
  size_t i;
  char *objection = NULL;
  int r = 0;

  if (cl->server_feature != NULL)
    r = asprintf (&objection, "%s", cl->server_feature);
  else if (ours == -1)
    r = asprintf (&objection, "the filter was loaded from a file that is "
                  "not named nbdkit-" OUR_NAME "-filter.so");
  else if (ours > 0)
    r = asprintf (&objection, "--filter=%s stands before --filter=" OUR_NAME,
                  cl->filters[0]);
  else {
    for (i = 1; i < cl->nr_filters; ++i)
      if (!(what_is (cl->filters[i]) & DATA)) {
        r = asprintf (&objection, "--filter=%s may depend on nbdkit's server",
                      cl->filters[i]);
        break;
      }
  }

  *failed = r == -1;
  if (r == -1) {
    report_error ("malloc: %m");
    return NULL;
  }
  return objection;
}

bool
filter_stack_is_file (const struct command_line *cl)
{
  return cl->plugin != NULL && is_named (cl->plugin, "file", "-plugin.so");
}

const char *
filter_stack_changes_bytes (const struct command_line *cl)
{
  size_t i;

  for (i = our_place (cl) + 1; i < cl->nr_filters; ++i)
    if (!(what_is (cl->filters[i]) & SAME))
      return cl->filters[i];
  return NULL;
}

bool
filter_stack_holds_writes (const struct command_line *cl)
{
  size_t i;

  for (i = our_place (cl) + 1; i < cl->nr_filters; ++i)
    if (is_filter (cl->filters[i], "cow"))
      return true;
  return false;
}

bool
filter_stack_may_quit (const struct command_line *cl)
{
  const ssize_t ours = our_place (cl);
  const size_t end = ours == -1 ? cl->nr_filters : (size_t) ours;
  size_t i;

  for (i = 0; i < end; ++i)
    if (what_is (cl->filters[i]) & QUITS)
      return true;
  return false;
}

const char *
filter_stack_sleeper (const struct command_line *cl)
{
  size_t i;

  for (i = our_place (cl) + 1; i < cl->nr_filters; ++i)
    if (what_is (cl->filters[i]) & SLEEPS)
      return cl->filters[i];
  return NULL;
}

void
filter_stack_warn (const struct command_line *cl)
{
  size_t i;

  for (i = our_place (cl) + 1; i < cl->nr_filters; ++i)
    if (what_is (cl->filters[i]) & OPENS)
      report_warning ("--filter=%s does not see the clients where it stands: "
                      "name it before --filter=" OUR_NAME, cl->filters[i]);
}
