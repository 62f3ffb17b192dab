/* nbdkit-dirty-bitmap-filter
 * SPDX-License-Identifier: BSD-3-Clause
 * Copyright the nbdkit-dirty-bitmap-filter authors
 */

/* What nbdkit's other filters and its plugin mean for this filter.
 *
 * How this works
 *
 * A list of nbdkit's filters, those of 1.32 to 1.48, with the answers to six
 * questions about each.
 *
 * - Does it act on data alone?  Then it works below ours as always,
 *   whichever server answers the clients.  Other filters judge, count or
 *   delay the clients themselves.  If one of these is used, nbdkit's own
 *   server must answer.
 * - Does it pass bytes and size through unchanged?  Then we see the bytes of
 *   the file plugin's file, so we can check the file before the plugin is
 *   opened, and extend it.
 * - Does it act when connections are opened?  Our filter opens the plugin
 *   once for all clients, so below ours it never sees a client.
 * - Does it end connections?  Below ours there is only one, which all
 *   clients share and which must last until the bitmaps are stored.
 * - Does it fail requests because nbdkit quits?  Such filters sleep in
 *   nbdkit_nanosleep.  Below ours they work until everything is stored
 *   (stop.c).  (spinning sleeps, too, but ignores a failure to.)
 * - Does it let nbdkit quit when a client has disconnected?
 *
 * A filter that is not in the list is unknown, and all its answers are no.
 *
 * How some filters behave when nbdkit ends:
 *
 * - retry opens the plugin again, in the thread of the request that failed.
 *   In nbdkit since 1.32 that works in our context, which belongs to no
 *   connection.  As retry lowers the thread model, it gets one request at a
 *   time.
 * - pause, while it is paused, stops everything, including what is stored at
 *   the end: nbdkit ends when it is resumed.
 * - exitlast takes a client that asks for INFO for one that has connected
 *   and disconnected, with or without our filter.  If it was the only
 *   client, nbdkit quits, and the GO that follows is refused.
 *
 * noparallel is special.  A plugin that can handle one request at a time
 * gets one at a time from our container, and clients are not affected.  But
 * the user of noparallel may want it for the clients, which then get their
 * replies in order.
 *
 * A plugin can judge clients too, by .preconnect, which nbdkit's own server
 * calls for each client.  Our server cannot: nbdkit lets filters call it
 * from nbdkit's own connections only.  Whatever else a plugin may do by
 * client (in .open and the lists of exports, by the name of the export or by
 * TLS) is impossible whichever server answers, since our filter opens the
 * plugin once.  So there is a list of the plugins of nbdkit 1.32 to 1.48
 * that have no .preconnect.  The other plugins are cc, eval, python and sh,
 * which have it if the script has, and torrent, which waits in it.  A plugin
 * in a script (S3, gcs, those that begin with "#! nbdkit sh") counts as the
 * plugin that runs the script, since nbdkit executes itself again with that.
 */

#include <config.h>

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "common/report.h"
#include "nbdkit/command-line.h"
#include "nbdkit/filter-stack.h"

#define NOPARALLEL "noparallel"

enum {
  DATA = 1,                     /* acts on data alone */
  SAME = 2,                     /* passes bytes and size through */
  OPENS = 4,                    /* acts in .open or .close */
  SLEEPS = 8,                   /* and fails requests when nbdkit quits */
  QUITS = 16,                   /* when a client has disconnected */
  ENDS = 32,                    /* ends connections */
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
  { "indexed-gzip", DATA },
  { "ip", SAME },
  { "limit", SAME | OPENS },
  { "log", DATA | SAME },
  { "luks", DATA },
  { "lzip", DATA },
  { "map", DATA },
  { "multi-conn", DATA | SAME },
  { "nocache", DATA | SAME },
  { "noextents", DATA | SAME },
  { "nofilter", DATA | SAME },
  { NOPARALLEL, DATA | SAME },
  { "nozero", DATA | SAME },
  { "offset", DATA },
  { "openonce", DATA },
  { "partition", DATA },
  { "pause", SAME },
  { "protect", DATA | SAME },
  { "qcow2dec", DATA },
  { "rate", SAME | SLEEPS },
  { "readahead", DATA | SAME },
  { "readonly", DATA | SAME },
  { "retry", DATA | SAME | SLEEPS },
  { "retry-request", DATA | SAME | SLEEPS },
  { "rotational", DATA | SAME },
  { "scan", DATA | SAME },
  { "spinning", DATA | SAME },
  { "stats", DATA | SAME },
  { "swab", DATA },
  { "tar", DATA },
  { "time-limit", SAME | ENDS },
  { "tls-fallback", OPENS },
  { "truncate", DATA },
  { "xor", DATA },
  { "xz", DATA },
};

/* The plugins that have no .preconnect. */
static const char *const known_plugins[] = {
  "blkio", "cdi", "curl", "data", "example1", "example2", "example3", "file",
  "floppy", "full", "guestfs", "iso", "libvirt", "linuxdisk", "lua",
  "memory", "nbd", "null", "ones", "partitioning", "pattern", "perl",
  "random", "ruby", "sparse-random", "split", "ssh", "tcl", "tmpdisk",
  "vddk", "vram", "zero",
};

#define OUR_NAME "dirty-bitmap"
#define VOUCH "; dirty-bitmap-server=force says that it does not"

/* Does arg, which is a short name or the path of a shared object, name the
 * filter or plugin?
 */
static bool
is_named (const char *arg, const char *name, const char *suffix)
{
  const char *base = strrchr (arg, '/');
  const size_t len = strlen (name);

  /* nbdkit's rule for short names. */
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

static bool
is_plugin (const char *arg, const char *name)
{
  return is_named (arg, name, "-plugin.so");
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

/* Our position in the stack, 0 for outermost, or -1 if this filter was
 * loaded from a file with another name.
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

static bool
judges_no_client (const char *plugin)
{
  size_t i;

  for (i = 0; i < sizeof known_plugins / sizeof known_plugins[0]; ++i)
    if (is_plugin (plugin, known_plugins[i]))
      return true;
  return false;
}

/* The objection to a filter below ours, if any.  Returns as asprintf. */
static int
object_to_filter (const char *name, bool vouched, char **objection)
{
  const unsigned what = what_is (name);

  if (what & DATA || (what == 0 && vouched))
    return 0;
  if (what == 0)
    return asprintf (objection, "--filter=%s is not known and may judge "
                     "clients" VOUCH, name);
  return asprintf (objection, "--filter=%s may depend on nbdkit's server",
                   name);
}

char *
filter_stack_objection (const struct command_line *cl, bool one_client,
                        bool vouched, bool *failed)
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
  else if (one_client && filter_stack_keeps_order (cl))
    r = asprintf (&objection, "--filter=" NOPARALLEL
                  " lets one client in at a time");
  for (i = 1; r == 0 && i < cl->nr_filters; ++i)
    r = object_to_filter (cl->filters[i], vouched, &objection);
  if (r == 0 && !vouched &&
      (cl->plugin == NULL || !judges_no_client (cl->plugin)))
    r = asprintf (&objection, "the plugin %s may judge clients itself" VOUCH,
                  cl->plugin != NULL ? cl->plugin : "");

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
  return cl->plugin != NULL && is_plugin (cl->plugin, "file");
}

bool
filter_stack_is_nbd (const struct command_line *cl)
{
  return cl->plugin != NULL && is_plugin (cl->plugin, "nbd");
}

bool
filter_stack_serves_by_client (const struct command_line *cl)
{
  return cl->plugin != NULL && (is_plugin (cl->plugin, "info") ||
                                is_plugin (cl->plugin, "ondemand"));
}

bool
filter_stack_reopens (const struct command_line *cl)
{
  size_t i;

  for (i = our_place (cl) + 1; i < cl->nr_filters; ++i)
    if (is_filter (cl->filters[i], "retry") || what_is (cl->filters[i]) == 0)
      return true;
  return false;
}

bool
filter_stack_keeps_order (const struct command_line *cl)
{
  size_t i;

  for (i = 0; i < cl->nr_filters; ++i)
    if (is_filter (cl->filters[i], NOPARALLEL))
      return true;
  return false;
}

/* A file with the plugin's name may be another plugin. */
bool
filter_stack_is_plugin_alone (const struct command_line *cl)
{
  return cl->plugin != NULL && strcmp (cl->plugin, "file") == 0 &&
    our_place (cl) + 1 == (ssize_t) cl->nr_filters;
}

bool
filter_stack_retries (const struct command_line *cl)
{
  size_t i;

  for (i = our_place (cl) + 1; i < cl->nr_filters; ++i)
    if (is_filter (cl->filters[i], "retry"))
      return true;
  return false;
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
      report_warning ("--filter=%s does not see the clients below this filter: "
                      "name it before --filter=" OUR_NAME, cl->filters[i]);
}

int
filter_stack_refuse (const struct command_line *cl)
{
  size_t i;

  for (i = our_place (cl) + 1; i < cl->nr_filters; ++i)
    if (what_is (cl->filters[i]) & ENDS) {
      report_error ("--filter=%s would end the one connection to the plugin "
                    "that all clients share: "
                    "name it before --filter=" OUR_NAME, cl->filters[i]);
      return -1;
    }
  return 0;
}
