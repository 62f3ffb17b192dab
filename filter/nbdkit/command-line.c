/* nbdkit-dirty-bitmap-filter
 * SPDX-License-Identifier: BSD-3-Clause
 * Copyright the nbdkit-dirty-bitmap-filter authors
 */

/* What nbdkit was told on its command line.
 *
 * How this works
 *
 * nbdkit tells a filter about -r only when a client connects, and never
 * about TLS, the handshake, -s and the other filters.  We have to know
 * before nbdkit becomes a daemon, since an error is not seen afterwards.  So
 * the command line is read again from /proc/self/cmdline (nbdkit takes care
 * not to change it) and parsed in the same way as in nbdkit.
 *
 * The rules (abbreviations, permutation, POSIXLY_CORRECT, "--") are those of
 * getopt_long, so this calls getopt_long; nbdkit has finished with it when
 * it calls filters.  The table has all options of nbdkit 1.32 to 1.48.  None
 * of the newer options changes the meaning of an abbreviation that an older
 * nbdkit accepts.  --tls-priority is in the table for every version.
 * "tls-p" is there for what --tls-p abbreviates in a version without
 * --tls-priority.
 *
 * An option that the table does not have is no error, since nbdkit has
 * accepted it, but then our server does not stand in: what the user asked
 * for is unknown.  If the option's value is given with "=", everything else
 * is still understood.  Otherwise it is unknown whether it has a value: in
 * "--new -r" the -r may be the value.  Then the command line is ambiguous
 * (also after an unknown letter), and nothing is taken from it that would do
 * harm if it were wrong: the disk is read-only if any argument looks like a
 * -r, and the filters and the plugin are found among the loaded objects
 * (loaded-objects.c).
 */

#include <config.h>

#include <errno.h>
#include <fcntl.h>
#include <float.h>
#include <getopt.h>
#include <limits.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <strings.h>
#include <unistd.h>

#include "common/cleanup.h"
#include "common/report.h"
#include "nbdkit/command-line.h"

/* Options without a short form. */
enum {
  OTHER_OPTION = 256,           /* disables no feature of nbdkit's */
  EXIT_WITH_PARENT_OPTION,
  FILTER_OPTION,
  LOG_OPTION,
  MASK_HANDSHAKE_OPTION,
  NO_META_CONTEXTS_OPTION,
  NO_SR_OPTION,
  RUN_OPTION,
  SELINUX_LABEL_OPTION,
  TIMEOUT_OPTION,
  TLS_OPTION,
  TLS_CERTIFICATES_OPTION,
  TLS_PRIORITY_OPTION,
  TLS_PSK_OPTION,
  TLS_VERIFY_PEER_OPTION,
  VSOCK_OPTION,
};

static const char short_options[] = "46D:e:fg:i:nop:P:rst:u:U:vV";

/* getopt_long takes two names with the same value for one option, so it
 * accepts abbreviations of them (--dump) that nbdkit refuses as ambiguous.
 * That is harmless: nbdkit has parsed them before.
 */
static const struct option long_options[] = {
  { "debug", required_argument, NULL, 'D' },
  { "dump-config", no_argument, NULL, OTHER_OPTION },
  { "dump-plugin", no_argument, NULL, OTHER_OPTION },
  { "exit-with-parent", no_argument, NULL, EXIT_WITH_PARENT_OPTION },
  { "export", required_argument, NULL, 'e' },
  { "export-name", required_argument, NULL, 'e' },
  { "exportname", required_argument, NULL, 'e' },
  { "filter", required_argument, NULL, FILTER_OPTION },
  { "foreground", no_argument, NULL, 'f' },
  { "group", required_argument, NULL, 'g' },
  { "help", no_argument, NULL, OTHER_OPTION },
  { "ip-addr", required_argument, NULL, 'i' },
  { "ipaddr", required_argument, NULL, 'i' },
  { "ipv4-only", no_argument, NULL, '4' },
  { "ipv6-only", no_argument, NULL, '6' },
  { "keep-alive", no_argument, NULL, OTHER_OPTION },
  { "keepalive", no_argument, NULL, OTHER_OPTION },
  { "log", required_argument, NULL, LOG_OPTION },
  { "long-options", no_argument, NULL, OTHER_OPTION },
  { "mask-handshake", required_argument, NULL, MASK_HANDSHAKE_OPTION },
  { "name", required_argument, NULL, OTHER_OPTION },
  { "new-style", no_argument, NULL, 'n' },
  { "newstyle", no_argument, NULL, 'n' },
  { "no-fork", no_argument, NULL, 'f' },
  { "no-mc", no_argument, NULL, NO_META_CONTEXTS_OPTION },
  { "no-meta-contexts", no_argument, NULL, NO_META_CONTEXTS_OPTION },
  { "no-sr", no_argument, NULL, NO_SR_OPTION },
  { "no-structured-replies", no_argument, NULL, NO_SR_OPTION },
  { "old-style", no_argument, NULL, 'o' },
  { "oldstyle", no_argument, NULL, 'o' },
  { "pid-file", required_argument, NULL, 'P' },
  { "pidfile", required_argument, NULL, 'P' },
  { "port", required_argument, NULL, 'p' },
  { "print-uri", no_argument, NULL, OTHER_OPTION },
  { "print-url", no_argument, NULL, OTHER_OPTION },
  { "read-only", no_argument, NULL, 'r' },
  { "readonly", no_argument, NULL, 'r' },
  { "run", required_argument, NULL, RUN_OPTION },
  { "selinux-label", required_argument, NULL, SELINUX_LABEL_OPTION },
  { "short-options", no_argument, NULL, OTHER_OPTION },
  { "show-uri", no_argument, NULL, OTHER_OPTION },
  { "show-url", no_argument, NULL, OTHER_OPTION },
  { "single", no_argument, NULL, 's' },
  { "stdin", no_argument, NULL, 's' },
  { "swap", no_argument, NULL, OTHER_OPTION },
  { "threads", required_argument, NULL, 't' },
  { "time-out", required_argument, NULL, TIMEOUT_OPTION },
  { "timeout", required_argument, NULL, TIMEOUT_OPTION },
  { "tls", required_argument, NULL, TLS_OPTION },
  { "tls-certificates", required_argument, NULL, TLS_CERTIFICATES_OPTION },
  { "tls-p", required_argument, NULL, TLS_PSK_OPTION },
  { "tls-priority", required_argument, NULL, TLS_PRIORITY_OPTION },
  { "tls-psk", required_argument, NULL, TLS_PSK_OPTION },
  { "tls-verify-peer", no_argument, NULL, TLS_VERIFY_PEER_OPTION },
  { "unix", required_argument, NULL, 'U' },
  { "user", required_argument, NULL, 'u' },
  { "verbose", no_argument, NULL, 'v' },
  { "version", no_argument, NULL, 'V' },
  { "vsock", no_argument, NULL, VSOCK_OPTION },
  { NULL, 0, NULL, 0 },
};

/* What the options say about the protocol server.  As in nbdkit, the last
 * one on the command line counts.
 */
struct server_options {
  bool oldstyle, no_sr, no_meta_contexts, strange_timeout, run, foreground;
  unsigned long handshake_mask;
};

/* The values that mean false to nbdkit_parse_bool. */
static bool
is_false (const char *s)
{
  static const char *const words[] = { "0", "false", "f", "no", "n", "off" };
  size_t i;

  for (i = 0; i < sizeof words / sizeof words[0]; ++i)
    if (strcasecmp (s, words[i]) == 0)
      return true;
  return false;
}

/* nbdkit has checked that s is one of its words. */
static enum tls_mode
parse_tls_mode (const char *s)
{
  static const char *const words[] = { "require", "required", "force" };
  size_t i;

  for (i = 0; i < sizeof words / sizeof words[0]; ++i)
    if (strcasecmp (s, words[i]) == 0)
      return TLS_REQUIRE;
  return is_false (s) ? TLS_OFF : TLS_ON;
}

static const char *
server_feature (const struct server_options *o)
{
  if (o->oldstyle)
    return "the oldstyle protocol was asked for";
  /* Fixed newstyle and no-zeroes, the only two flags. */
  if ((o->handshake_mask & 3) != 3)
    return "--mask-handshake was given";
  if (o->no_sr)
    return "structured replies were forbidden by --no-sr";
  if (o->no_meta_contexts)
    return "metadata contexts were forbidden by --no-meta-contexts";
  if (o->strange_timeout)
    return "the value of --timeout is not understood";
  return NULL;
}

/* A delay in the syntax of nbdkit_parse_delay, which nbdkit 1.32 lacks: in
 * seconds, or with a unit.  The result is rounded up to whole seconds.
 */
static bool
parse_delay (const char *s, unsigned *seconds)
{
  static const struct {
    const char *unit;
    double in_a_second;
  } units[] = {
    { "", 1 }, { "s", 1 }, { "ms", 1e3 }, { "us", 1e6 },
    { "\xce\xbcs", 1e6 }, { "ns", 1e9 },
  };
  char *end;
  const double number = strtod (s, &end);
  size_t i;

  if (end == s || !(number >= 0 && number <= DBL_MAX))
    return false;
  for (i = 0; i < sizeof units / sizeof units[0]; ++i)
    if (strcmp (end, units[i].unit) == 0) {
      const double d = number / units[i].in_a_second;

      *seconds = d < INT_MAX ? (unsigned) d : INT_MAX;
      if (*seconds < d)
        ++*seconds;
      return true;
    }
  return false;
}

/* nbdkit has checked that N is a number. */
static void
take_debug_flag (struct command_line *cl, const char *arg)
{
  static const char flag[] = "dirty_bitmap.request=";

  if (strncmp (arg, flag, sizeof flag - 1) == 0)
    cl->debug_request = strtol (arg + sizeof flag - 1, NULL, 0);
}

/* Act on one option. */
static void
take_option (struct command_line *cl, struct server_options *o,
             int c, const char *arg)
{
  switch (c) {
  case 'D': take_debug_flag (cl, arg); break;
  case 'f':
  case EXIT_WITH_PARENT_OPTION: o->foreground = true; break;
  case 'n': o->oldstyle = false; break;
  case 'o': o->oldstyle = true; break;
  case 'p': cl->port = arg; break;
  case 'P': cl->pid_file = arg; break;
  case 'r': cl->readonly = true; break;
  case 's': cl->listens_on_stdin = true; break;
  case 't': cl->threads = strtoul (arg, NULL, 0); break;
  case 'U': cl->on_unix = true; cl->unix_path = arg; break;
  case FILTER_OPTION: cl->filters[cl->nr_filters++] = arg; break;
  case LOG_OPTION: cl->log_file = *arg == '/' ? arg : NULL; break;
  case MASK_HANDSHAKE_OPTION:
    o->handshake_mask = strtoul (arg, NULL, 0);
    break;
  case NO_META_CONTEXTS_OPTION: o->no_meta_contexts = true; break;
  case NO_SR_OPTION: o->no_sr = true; break;
  case RUN_OPTION: o->run = true; break;
  case SELINUX_LABEL_OPTION: cl->selinux_label = arg; break;
  case TIMEOUT_OPTION:
    o->strange_timeout = !parse_delay (arg, &cl->timeout_seconds);
    break;
  case TLS_OPTION: cl->tls.mode = parse_tls_mode (arg); break;
  case TLS_CERTIFICATES_OPTION: cl->tls.certificates = arg; break;
  case TLS_PRIORITY_OPTION: cl->tls.priority = arg; break;
  case TLS_PSK_OPTION: cl->tls.psk = arg; break;
  case TLS_VERIFY_PEER_OPTION: cl->tls.verify_peer = true; break;
  case VSOCK_OPTION: cl->on_vsock = true; break;
  default: break;
  }
}

/* getopt_long does not know the option that it has just passed.  If that was
 * a long one, it is the argument before optind, which has moved on.
 */
static void
note_unknown (struct command_line *cl, char **argv, int previous_optind)
{
  const char *arg = optind > previous_optind ? argv[optind - 1] : "";
  const bool is_long = strncmp (arg, "--", 2) == 0;
  const char *value = is_long ? strchr (arg, '=') : NULL;

  if (value == NULL)
    cl->is_ambiguous = true;
  if (cl->unknown_option[0] != '\0')
    return;
  if (is_long)
    snprintf (cl->unknown_option, sizeof cl->unknown_option, "%.*s",
              (int) (value != NULL ? value - arg : (long) strlen (arg)), arg);
  else
    snprintf (cl->unknown_option, sizeof cl->unknown_option, "-%c", optopt);
}

/* Call getopt_long for all arguments, and restore its variables. */
static void
take_options (struct command_line *cl, struct server_options *o,
              int argc, char **argv)
{
  const int saved_optind = optind, saved_opterr = opterr;
  const int saved_optopt = optopt;
  char *const saved_optarg = optarg;
  int c, previous = 1;

  optind = 0;                   /* Start over, in the GNU C library. */
  opterr = 0;
  while ((c = getopt_long (argc, argv, short_options, long_options,
                           NULL)) != -1) {
    if (c == '?')
      note_unknown (cl, argv, previous);
    else
      take_option (cl, o, c, optarg);
    previous = optind;
  }
  if (optind < argc)
    cl->plugin = argv[optind];

  optind = saved_optind;
  opterr = saved_opterr;
  optopt = saved_optopt;
  optarg = saved_optarg;
}

/* Could the argument be a -r, alone or with other letters, or in full? */
static bool
may_be_readonly (const char *arg)
{
  if (arg[0] != '-')
    return false;
  if (arg[1] == '-')
    return arg[2] == 'r';
  for (arg++; *arg != '\0'; ++arg) {
    const char *known = strchr (short_options, *arg);

    if (*arg == 'r')
      return true;
    if (known != NULL && known[1] == ':')
      return false;             /* The rest is its value. */
  }
  return false;
}

/* If there is an option that is not in the table: our server must not stand
 * in, and nothing may be written if -r may have been given.
 */
static void
mind_unknown (struct command_line *cl, int argc, char **argv)
{
  int i;

  if (cl->unknown_option[0] == '\0')
    return;
  snprintf (cl->feature, sizeof cl->feature,
            "nbdkit's option %s is not known to this filter",
            cl->unknown_option);
  cl->server_feature = cl->feature;
  for (i = 1; cl->is_ambiguous && i < argc; ++i)
    if (may_be_readonly (argv[i]))
      cl->readonly = cl->assumes_readonly = true;
}

int
command_line_parse (struct command_line *cl, int argc, char **argv)
{
  struct server_options o = { .handshake_mask = ~0UL };

  memset (cl, 0, sizeof *cl);
  cl->filters = calloc (argc + 1, sizeof *cl->filters);
  if (cl->filters == NULL) {
    report_error ("malloc: %m");
    return -1;
  }
  take_options (cl, &o, argc, argv);

  if (cl->unix_path != NULL && strcmp (cl->unix_path, "-") == 0)
    cl->unix_path = NULL;
  if (!cl->on_unix && !cl->on_vsock) {
    cl->on_tcp = true;
    /* Since 1.36, --run alone implies "-U -". */
    cl->on_unix = o.run && cl->port == NULL;
  }
  cl->forks = o.run || !(o.foreground || cl->listens_on_stdin) ||
    cl->is_ambiguous;
  cl->server_feature = server_feature (&o);
  mind_unknown (cl, argc, argv);
  return 0;
}

/* Read a file of /proc, whose size is not known.  Adds a NUL after it. */
static char *
read_proc_file (const char *path, size_t *len)
{
  CLEANUP_CLOSE int fd = open (path, O_RDONLY | O_CLOEXEC);
  char *buf = NULL, *larger;
  size_t used = 0, allocated = 0;
  ssize_t r;

  if (fd == -1)
    return NULL;
  for (;;) {
    if (allocated - used < 2) {
      allocated += 65536;
      larger = realloc (buf, allocated);
      if (larger == NULL) {
        free (buf);
        return NULL;
      }
      buf = larger;
    }
    r = read (fd, buf + used, allocated - used - 1);
    if (r == -1 && errno == EINTR)
      continue;
    if (r == -1) {
      free (buf);
      return NULL;
    }
    if (r == 0)
      break;
    used += r;
  }
  buf[used] = '\0';
  *len = used;
  return buf;
}

int
command_line_read (struct command_line *cl)
{
  char *storage, **argv, *p;
  size_t len, argc = 0;

  storage = read_proc_file ("/proc/self/cmdline", &len);
  if (storage == NULL) {
    report_error ("/proc/self/cmdline: %m");
    return -1;
  }
  argv = calloc (len + 1, sizeof *argv);
  if (argv == NULL) {
    report_error ("malloc: %m");
    free (storage);
    return -1;
  }
  for (p = storage; p < storage + len; p += strlen (p) + 1)
    argv[argc++] = p;

  if (command_line_parse (cl, argc, argv) == -1) {
    free (argv);
    free (storage);
    return -1;
  }
  cl->storage = storage;
  cl->argv = argv;
  return 0;
}

void
command_line_free (struct command_line *cl)
{
  free (cl->filters);
  free (cl->argv);
  free (cl->storage);
  memset (cl, 0, sizeof *cl);
}

unsigned
command_line_parse_activated (const char *environment, size_t len, long pid)
{
  const char *p;
  long activated_pid = -1, nr_fds = 0;

  for (p = environment; p < environment + len; p += strlen (p) + 1) {
    if (strncmp (p, "LISTEN_PID=", 11) == 0)
      activated_pid = strtol (p + 11, NULL, 10);
    else if (strncmp (p, "LISTEN_FDS=", 11) == 0)
      nr_fds = strtol (p + 11, NULL, 10);
  }
  if (activated_pid != pid || nr_fds < 0 || nr_fds > 65536)
    return 0;
  return nr_fds;
}

unsigned
command_line_nr_activated (void)
{
  CLEANUP_FREE char *environment = NULL;
  size_t len;

  /* nbdkit has unset the variables by now, but this is the environment that
   * the process was started with.
   */
  environment = read_proc_file ("/proc/self/environ", &len);
  if (environment == NULL)
    return 0;
  return command_line_parse_activated (environment, len, getpid ());
}
