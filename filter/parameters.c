/* nbdkit-dirty-bitmap-filter
 * SPDX-License-Identifier: BSD-3-Clause
 * Copyright the nbdkit-dirty-bitmap-filter authors
 */

/* The parameters of the filter.
 *
 * How this works
 *
 * One function takes each parameter; a table lists them.  Every check of a
 * value that does not need the image is made here, and its message names the
 * parameter.
 */

#include <config.h>

#include <ctype.h>
#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>

#include "common/bytes.h"
#include "common/cleanup.h"
#include "common/report.h"
#include "common/utf8.h"
#include "control/control.h"
#include "nbd/exports.h"
#include "parameters.h"
#include "used-paths.h"

/* QEMU's limits for bitmaps, since QEMU must be able to read them. */
#define MIN_GRANULARITY ((int64_t) 512)
#define MAX_GRANULARITY ((int64_t) 1 << 31)
#define MAX_NAME_BYTES 1023

/* The protocol's limit for a string. */
#define MAX_STRING_BYTES 4096

/* At least a few tables of the largest cluster size must fit.  All tables of
 * the largest possible image take less than the maximum.
 */
#define MIN_CACHE_SIZE ((int64_t) 1 << 20)
#define MAX_CACHE_SIZE ((int64_t) 64 << 30)

/* At least a few units of what is kept must fit. */
#define MIN_SCRATCH_SIZE ((int64_t) 1 << 20)
#define MIN_VIEW_MEMORY ((int64_t) 1 << 20)

#define MAX_MEMORY ((int64_t) 1 << 40)
#define MAX_SECONDS (24 * 60 * 60)

/* A week. */
#define MAX_STATS_INTERVAL 604800

const char parameters_help[] =
  "dirty-bitmap=NAME              Record into this bitmap, create it if absent\n"
  "                               (may be repeated).\n"
  "dirty-bitmap-granularity=SIZE  Granularity of a bitmap that is created\n"
  "                               (default: cluster size, 4K to 64K).\n"
  "dirty-bitmap-expose=NAME       Offer only this bitmap to clients\n"
  "                               (may be repeated, default: all).\n"
  "dirty-bitmap-allow-path=DIR    Folder that backing and data files may be in,\n"
  "                               besides the image's own (may be repeated).\n"
  "dirty-bitmap-backing=on|off    Serve the image with its backing files, or what\n"
  "                               it has itself, read-only (default: on).\n"
  "dirty-bitmap-exportname=NAME   Name of the export (default: any name).\n"
  "dirty-bitmap-description=TEXT  Description of the export.\n"
  "dirty-bitmap-crash=keep|mark   Bitmaps stay complete in a crash, or are\n"
  "                               marked (default: keep).\n"
  "dirty-bitmap-delta=on|off      List the exports delta:BITMAP (default: off).\n"
  "dirty-bitmap-detect-zeroes=off|on|unmap\n"
  "                               Take writes of zeroes for requests to zero,\n"
  "                               which keep or may give up space (default: off).\n"
  "dirty-bitmap-image=FILE        The plugin serves the disk itself. This qcow2\n"
  "                               image has its bitmaps (created if absent).\n"
  "dirty-bitmap-snapshot=NAME_OR_ID\n"
  "                               Serve this internal snapshot, read-only.\n"
  "dirty-bitmap-cache-size=SIZE   Memory for the image's tables (default: 40M).\n"
  "dirty-bitmap-server=auto|on|force|off\n"
  "                               Stand in for nbdkit's server, which cannot\n"
  "                               show bitmaps to clients (default: auto).\n"
  "dirty-bitmap-listen=ADDRESS    Also serve on this Unix socket or HOST:PORT.\n"
  "dirty-bitmap-control=PATH      Unix socket for commands: QEMU's protocol QMP\n"
  "                               (see also nbdkit-dirty-bitmap-ctl).\n"
  "dirty-bitmap-node=NAME         Name of the disk in commands (default: disk).\n"
  "dirty-bitmap-scratch=DIR       Folder where views of backups keep old data\n"
  "                               (default: that of the image).\n"
  "dirty-bitmap-scratch-size=SIZE How much a view may keep (default: no limit).\n"
  "dirty-bitmap-view-memory=SIZE  Memory for a view (default: 256M).\n"
  "dirty-bitmap-max-connections=N Clients at once (default: 256).\n"
  "dirty-bitmap-when-full=close|wait\n"
  "                               Close further clients, or let them wait\n"
  "                               (default: close).\n"
  "dirty-bitmap-exit-last=on|off  Exit when the last client has disconnected\n"
  "                               (default: off).\n"
  "dirty-bitmap-max-requests=N    Requests of a client at once (default: 16).\n"
  "dirty-bitmap-max-memory=SIZE   Memory for all clients (default: 512M).\n"
  "dirty-bitmap-handshake-timeout=SECONDS\n"
  "                               Time for a handshake (default: 30).\n"
  "dirty-bitmap-idle-timeout=SECONDS\n"
  "                               Close idle connections (default: 0, never).\n"
  "dirty-bitmap-stats=FILE        Write statistics to this file, for Prometheus,\n"
  "                               at the start, the end and on SIGUSR1.\n"
  "dirty-bitmap-stats-interval=SECONDS\n"
  "                               Write them this often, too.";

/* Add a string.  names owns it; it is freed at once if it is there already. */
static int
add_name (struct names *names, char *name)
{
  char **larger;
  size_t i;

  for (i = 0; i < names->nr; ++i)
    if (strcmp (names->name[i], name) == 0) {
      free (name);
      return 1;
    }
  larger = realloc (names->name, (names->nr + 1) * sizeof *larger);
  if (larger == NULL) {
    report_error ("malloc: %m");
    free (name);
    return -1;
  }
  names->name = larger;
  names->name[names->nr++] = name;
  return 1;
}

static int
take_name (struct names *names, const char *key, const char *value)
{
  char *name;

  if (*value == '\0') {
    report_error ("%s: the name of a bitmap must not be empty", key);
    return -1;
  }
  if (strlen (value) > MAX_NAME_BYTES) {
    report_error ("%s: the name of a bitmap has at most %d bytes",
                  key, MAX_NAME_BYTES);
    return -1;
  }
  name = strdup (value);
  if (name == NULL) {
    report_error ("malloc: %m");
    return -1;
  }
  return add_name (names, name);
}

static int
take_require (struct parameters *p, const char *key, const char *value)
{
  return take_name (&p->require, key, value);
}

static int
take_expose (struct parameters *p, const char *key, const char *value)
{
  return take_name (&p->expose, key, value);
}

/* The true path of a folder, to be freed.  NULL with the reason reported. */
static char *
true_folder (const char *key, const char *value)
{
  struct stat statbuf;
  char *path;

  if (*value == '\0') {
    report_error ("%s: the name of a folder must not be empty", key);
    return NULL;
  }
  path = realpath (value, NULL);
  if (path == NULL || stat (path, &statbuf) == -1) {
    report_error ("%s: %s: %m", key, value);
    free (path);
    return NULL;
  }
  if (!S_ISDIR (statbuf.st_mode)) {
    report_error ("%s: %s: is not a folder", key, value);
    free (path);
    return NULL;
  }
  return path;
}

/* Keep the true path, as of now: the user did not allow what a symbolic link
 * points to later.
 */
static int
take_allow (struct parameters *p, const char *key, const char *value)
{
  char *path = true_folder (key, value);

  return path == NULL ? -1 : add_name (&p->allow, path);
}

static int
repeated (const char *key)
{
  report_error ("%s can only appear once on the command line", key);
  return -1;
}

/* A size as everywhere in nbdkit: a number and perhaps a suffix, powers of
 * 1024, "s" for sectors.  nbdkit_parse_size would not name the parameter in
 * its error.  -1, with the reason reported.
 */
static int64_t
parse_size (const char *key, const char *value)
{
  static const char suffixes[] = "bkmgtpe";
  unsigned long long n;
  const char *suffix;
  unsigned shift = 0;
  char *end;

  if (*value < '0' || *value > '9')
    goto invalid;
  errno = 0;
  n = strtoull (value, &end, 10);
  if (errno != 0)
    goto invalid;
  if (*end != '\0') {
    if (end[1] != '\0')
      goto invalid;
    suffix = strchr (suffixes, tolower ((unsigned char) *end));
    if (suffix != NULL)
      shift = 10 * (suffix - suffixes);
    else if (*end == 's' || *end == 'S')
      shift = 9;
    else
      goto invalid;
  }
  if (n > (uint64_t) INT64_MAX >> shift)
    goto invalid;
  return n << shift;

 invalid:
  report_error ("%s: not a size: %s", key, value);
  return -1;
}

static int
take_granularity (struct parameters *p, const char *key, const char *value)
{
  int64_t size;

  if (p->granularity != 0)
    return repeated (key);
  size = parse_size (key, value);
  if (size == -1)
    return -1;
  if (size < MIN_GRANULARITY || size > MAX_GRANULARITY ||
      !is_power_of_2 (size)) {
    report_error ("%s: must be a power of two from 512 to 2G: %s",
                  key, value);
    return -1;
  }
  p->granularity = size;
  return 1;
}

/* A size from min to max, unless it was given already. */
static int
take_size (const char *key, const char *value, bool given, int64_t min,
           int64_t max, const char *bounds, uint64_t *size)
{
  int64_t n;

  if (given)
    return repeated (key);
  n = parse_size (key, value);
  if (n == -1)
    return -1;
  if (n < min || n > max) {
    report_error ("%s: must be %s: %s", key, bounds, value);
    return -1;
  }
  *size = n;
  return 1;
}

static int
take_cache_size (struct parameters *p, const char *key, const char *value)
{
  const int r = take_size (key, value, p->cache_size_given, MIN_CACHE_SIZE,
                           MAX_CACHE_SIZE, "from 1M to 64G", &p->cache_size);

  p->cache_size_given |= r == 1;
  return r;
}

/* A number from min to max, unless it was given already. */
static int
take_number (const char *key, const char *value, bool given,
             unsigned min, unsigned max, unsigned *number)
{
  const size_t digits = strspn (value, "0123456789");
  unsigned long n;

  if (given)
    return repeated (key);
  n = digits > 0 && digits < 10 ? strtoul (value, NULL, 10) : max + 1UL;
  if (value[digits] != '\0' || n < min || n > max) {
    report_error ("%s: must be a number from %u to %u: %s",
                  key, min, max, value);
    return -1;
  }
  *number = n;
  return 1;
}

static int
take_max_connections (struct parameters *p, const char *key,
                      const char *value)
{
  return take_number (key, value, p->limits.connections != 0,
                      1, NBD_MAX_CONNECTIONS, &p->limits.connections);
}

static int
take_max_requests (struct parameters *p, const char *key, const char *value)
{
  return take_number (key, value, p->limits.requests != 0,
                      1, NBD_MAX_REQUESTS, &p->limits.requests);
}

static int
take_handshake_timeout (struct parameters *p, const char *key,
                        const char *value)
{
  return take_number (key, value, p->limits.handshake_seconds != 0,
                      1, MAX_SECONDS, &p->limits.handshake_seconds);
}

static int
take_idle_timeout (struct parameters *p, const char *key, const char *value)
{
  const int r = take_number (key, value, p->idle_timeout_given,
                             0, MAX_SECONDS, &p->limits.idle_seconds);

  p->idle_timeout_given = true;
  return r;
}

static int
take_max_memory (struct parameters *p, const char *key, const char *value)
{
  return take_size (key, value, p->limits.memory != 0, NBD_MIN_MEMORY,
                    MAX_MEMORY, "from 128M to 1T", &p->limits.memory);
}

static int
take_server (struct parameters *p, const char *key, const char *value)
{
  if (p->server_given)
    return repeated (key);
  if (strcmp (value, "auto") == 0)
    p->server = SERVER_AUTO;
  else if (strcmp (value, "on") == 0)
    p->server = SERVER_ON;
  else if (strcmp (value, "force") == 0)
    p->server = SERVER_FORCE;
  else if (strcmp (value, "off") == 0)
    p->server = SERVER_OFF;
  else {
    report_error ("%s: must be auto, on, force or off: %s", key, value);
    return -1;
  }
  p->server_given = true;
  return 1;
}

/* A parameter that is one of two words: *result says whether the first. */
static int
take_either (const char *key, const char *value, const char *yes,
             const char *no, bool *result, bool *given)
{
  if (*given)
    return repeated (key);
  if (strcmp (value, yes) != 0 && strcmp (value, no) != 0) {
    report_error ("%s: must be %s or %s: %s", key, yes, no, value);
    return -1;
  }
  *result = strcmp (value, yes) == 0;
  *given = true;
  return 1;
}

/* The path of a file that need not exist, made absolute. */
static int
take_file (char **path, const char *key, const char *value)
{
  if (*path != NULL)
    return repeated (key);
  if (*value == '\0') {
    report_error ("%s: the name of a file must not be empty", key);
    return -1;
  }
  *path = used_paths_absolute (value);
  if (*path == NULL) {
    report_error ("%s: %s: %m", key, value);
    return -1;
  }
  return 1;
}

static int
take_crash (struct parameters *p, const char *key, const char *value)
{
  return take_either (key, value, "keep", "mark", &p->keep, &p->crash_given);
}

static int
take_image (struct parameters *p, const char *key, const char *value)
{
  return take_file (&p->image, key, value);
}

static int
take_exit_last (struct parameters *p, const char *key, const char *value)
{
  return take_either (key, value, "on", "off", &p->exit_last,
                      &p->exit_last_given);
}

static int
take_when_full (struct parameters *p, const char *key, const char *value)
{
  return take_either (key, value, "wait", "close", &p->limits.others_wait,
                      &p->when_full_given);
}

static int
take_backing (struct parameters *p, const char *key, const char *value)
{
  return take_either (key, value, "off", "on", &p->is_top_alone,
                      &p->backing_given);
}

static int
take_delta (struct parameters *p, const char *key, const char *value)
{
  return take_either (key, value, "on", "off", &p->list_deltas,
                      &p->delta_given);
}

static int
take_detect_zeroes (struct parameters *p, const char *key, const char *value)
{
  static const char *const words[] = {
    [DISK_ZEROES_OFF] = "off", [DISK_ZEROES_ON] = "on",
    [DISK_ZEROES_UNMAP] = "unmap",
  };

  if (p->detect_zeroes_given)
    return repeated (key);
  for (size_t i = 0; i < sizeof words / sizeof words[0]; ++i)
    if (strcmp (value, words[i]) == 0) {
      p->detect_zeroes = i;
      p->detect_zeroes_given = true;
      return 1;
    }
  report_error ("%s: must be off, on or unmap: %s", key, value);
  return -1;
}

static int
take_snapshot (struct parameters *p, const char *key, const char *value)
{
  if (p->snapshot != NULL)
    return repeated (key);
  if (*value == '\0') {
    report_error ("%s: the name or ID of a snapshot must not be empty", key);
    return -1;
  }
  p->snapshot = strdup (value);
  if (p->snapshot == NULL) {
    report_error ("malloc: %m");
    return -1;
  }
  return 1;
}

/* A string that clients see. */
static int
take_string (char **string, const char *key, const char *value)
{
  const unsigned char *s = (const unsigned char *) value;
  unsigned n;

  if (*string != NULL)
    return repeated (key);
  if (strlen (value) > MAX_STRING_BYTES) {
    report_error ("%s: exceeds the protocol's maximum of %d bytes",
                  key, MAX_STRING_BYTES);
    return -1;
  }
  for (; *s != '\0'; s += n) {
    n = utf8_length (s);
    if (n == 0) {
      report_error ("%s: must be in UTF-8", key);
      return -1;
    }
  }
  *string = strdup (value);
  if (*string == NULL) {
    report_error ("malloc: %m");
    return -1;
  }
  return 1;
}

static int
take_exportname (struct parameters *p, const char *key, const char *value)
{
  static const struct {
    const char *prefix, *exports;
  } reserved[] = {
    { EXPORT_DELTA_PREFIX, "delta exports" },
    { EXPORT_VIEW_PREFIX, "views of the disk for backups" },
  };

  for (size_t i = 0; i < sizeof reserved / sizeof reserved[0]; ++i)
    if (strncmp (value, reserved[i].prefix,
                 strlen (reserved[i].prefix)) == 0) {
      report_error ("%s: names that begin with %s are reserved for %s: %s",
                    key, reserved[i].prefix, reserved[i].exports, value);
      return -1;
    }
  return take_string (&p->exportname, key, value);
}

static int
take_description (struct parameters *p, const char *key, const char *value)
{
  return take_string (&p->description, key, value);
}

static int
take_listen (struct parameters *p, const char *key, const char *value)
{
  if (p->listens)
    return repeated (key);
  if (*value == '\0') {
    report_error ("%s: the address must not be empty", key);
    return -1;
  }
  if (listen_parse (key, value, &p->listen) == -1)
    return -1;
  p->listens = true;
  return 1;
}

static int
take_control (struct parameters *p, const char *key, const char *value)
{
  if (p->is_controlled)
    return repeated (key);
  if (*value == '\0') {
    report_error ("%s: the path must not be empty", key);
    return -1;
  }
  if (listen_parse_path (key, value, &p->control) == -1)
    return -1;
  p->control.is_private = true;
  p->is_controlled = true;
  return 1;
}

static int
take_node (struct parameters *p, const char *key, const char *value)
{
  if (p->node != NULL)
    return repeated (key);
  if (!control_is_node_name (value)) {
    report_error ("%s: must begin with a letter, and have at most 31 letters, "
                  "digits, '-', '.' and '_': %s", key, value);
    return -1;
  }
  p->node = strdup (value);
  if (p->node == NULL) {
    report_error ("malloc: %m");
    return -1;
  }
  return 1;
}

static int
take_scratch (struct parameters *p, const char *key, const char *value)
{
  if (p->scratch != NULL)
    return repeated (key);
  p->scratch = true_folder (key, value);
  return p->scratch == NULL ? -1 : 1;
}

static int
take_scratch_size (struct parameters *p, const char *key, const char *value)
{
  return take_size (key, value, p->scratch_size != 0, MIN_SCRATCH_SIZE,
                    INT64_MAX, "at least 1M", &p->scratch_size);
}

static int
take_view_memory (struct parameters *p, const char *key, const char *value)
{
  return take_size (key, value, p->view_memory != 0, MIN_VIEW_MEMORY,
                    MAX_MEMORY, "from 1M to 1T", &p->view_memory);
}

static int
take_stats (struct parameters *p, const char *key, const char *value)
{
  return take_file (&p->stats, key, value);
}

static int
take_stats_interval (struct parameters *p, const char *key, const char *value)
{
  unsigned long n = 0;
  char *end;

  if (p->stats_interval != 0)
    return repeated (key);
  if (*value >= '0' && *value <= '9') {
    n = strtoul (value, &end, 10);
    if (*end != '\0')
      n = 0;
  }
  if (n == 0 || n > MAX_STATS_INTERVAL) {
    report_error ("%s: must be a number of seconds from 1 to %d: %s",
                  key, MAX_STATS_INTERVAL, value);
    return -1;
  }
  p->stats_interval = n;
  return 1;
}

int
parameters_take (struct parameters *p, const char *key, const char *value)
{
  static const struct {
    const char *key;
    int (*take) (struct parameters *, const char *key, const char *value);
  } table[] = {
    { "dirty-bitmap", take_require },
    { "dirty-bitmap-allow-path", take_allow },
    { "dirty-bitmap-backing", take_backing },
    { "dirty-bitmap-cache-size", take_cache_size },
    { "dirty-bitmap-control", take_control },
    { "dirty-bitmap-crash", take_crash },
    { "dirty-bitmap-delta", take_delta },
    { "dirty-bitmap-description", take_description },
    { "dirty-bitmap-detect-zeroes", take_detect_zeroes },
    { "dirty-bitmap-exportname", take_exportname },
    { "dirty-bitmap-exit-last", take_exit_last },
    { "dirty-bitmap-expose", take_expose },
    { "dirty-bitmap-granularity", take_granularity },
    { "dirty-bitmap-handshake-timeout", take_handshake_timeout },
    { "dirty-bitmap-idle-timeout", take_idle_timeout },
    { "dirty-bitmap-image", take_image },
    { "dirty-bitmap-listen", take_listen },
    { "dirty-bitmap-max-connections", take_max_connections },
    { "dirty-bitmap-max-memory", take_max_memory },
    { "dirty-bitmap-max-requests", take_max_requests },
    { "dirty-bitmap-node", take_node },
    { "dirty-bitmap-scratch", take_scratch },
    { "dirty-bitmap-scratch-size", take_scratch_size },
    { "dirty-bitmap-server", take_server },
    { "dirty-bitmap-snapshot", take_snapshot },
    { "dirty-bitmap-stats", take_stats },
    { "dirty-bitmap-stats-interval", take_stats_interval },
    { "dirty-bitmap-view-memory", take_view_memory },
    { "dirty-bitmap-when-full", take_when_full },
  };
  size_t i;

  for (i = 0; i < sizeof table / sizeof table[0]; ++i) {
    if (strcmp (key, table[i].key) != 0)
      continue;
    return table[i].take (p, table[i].key, value);
  }
  return 0;
}

/* The name of a parameter that limits the clients of our server, if one was
 * given.
 */
static const char *
given_limit (const struct parameters *p)
{
  return p->limits.connections != 0 ? "dirty-bitmap-max-connections"
    : p->limits.requests != 0 ? "dirty-bitmap-max-requests"
    : p->limits.memory != 0 ? "dirty-bitmap-max-memory"
    : p->limits.handshake_seconds != 0 ? "dirty-bitmap-handshake-timeout"
    : p->idle_timeout_given ? "dirty-bitmap-idle-timeout"
    : p->when_full_given ? "dirty-bitmap-when-full"
    : NULL;
}

/* The name of a parameter about the control socket, if one was given. */
static const char *
given_of_control (const struct parameters *p)
{
  return p->node != NULL ? "dirty-bitmap-node"
    : p->scratch != NULL ? "dirty-bitmap-scratch"
    : p->scratch_size != 0 ? "dirty-bitmap-scratch-size"
    : p->view_memory != 0 ? "dirty-bitmap-view-memory"
    : NULL;
}

int
parameters_complete (struct parameters *p)
{
  if (p->snapshot != NULL && (p->require.nr != 0 || p->expose.nr != 0)) {
    report_error ("%s: cannot be used with dirty-bitmap-snapshot, which "
                  "offers no bitmaps",
                  p->require.nr != 0 ? "dirty-bitmap" : "dirty-bitmap-expose");
    return -1;
  }
  if (p->snapshot != NULL && p->image != NULL) {
    report_error ("dirty-bitmap-image: cannot be used with "
                  "dirty-bitmap-snapshot, which is of the image that the "
                  "plugin serves");
    return -1;
  }
  if (p->is_top_alone && p->image != NULL) {
    report_error ("dirty-bitmap-backing=off: cannot be used with "
                  "dirty-bitmap-image, which has no backing file");
    return -1;
  }
  if (p->granularity != 0 && p->require.nr == 0) {
    report_error ("dirty-bitmap-granularity: requires dirty-bitmap");
    return -1;
  }
  if (p->stats_interval != 0 && p->stats == NULL) {
    report_error ("dirty-bitmap-stats-interval: requires dirty-bitmap-stats");
    return -1;
  }
  if (!p->is_controlled && given_of_control (p)) {
    report_error ("%s: requires dirty-bitmap-control", given_of_control (p));
    return -1;
  }
  if (p->server == SERVER_OFF && !p->listens && given_limit (p)) {
    report_error ("%s: requires the filter's own server, which "
                  "dirty-bitmap-server=off disables",
                  given_limit (p));
    return -1;
  }
  if (!p->cache_size_given)
    p->cache_size = PARAMETERS_DEFAULT_CACHE_SIZE;
  if (p->view_memory == 0)
    p->view_memory = PARAMETERS_DEFAULT_VIEW_MEMORY;
  if (!p->crash_given)
    p->keep = true;
  return 0;
}

static void
free_names (struct names *names)
{
  size_t i;

  for (i = 0; i < names->nr; ++i)
    free (names->name[i]);
  free (names->name);
}

void
parameters_free (struct parameters *p)
{
  free_names (&p->require);
  free_names (&p->expose);
  free_names (&p->allow);
  free (p->snapshot);
  free (p->image);
  free (p->exportname);
  free (p->description);
  free (p->stats);
  free (p->node);
  free (p->scratch);
  listen_address_free (&p->listen);
  listen_address_free (&p->control);
  memset (p, 0, sizeof *p);
}
