/* nbdkit-dirty-bitmap-filter
 * SPDX-License-Identifier: BSD-3-Clause
 * Copyright the nbdkit-dirty-bitmap-filter authors
 */

/* dirty-bitmap-backup: the command line. */

#include <config.h>

#include <errno.h>
#include <getopt.h>
#include <signal.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "backup/commands.h"
#include "backup/progress.h"
#include "common/report.h"

atomic_bool is_interrupted;

static void
usage (FILE *f)
{
  fputs ("usage: " PROGRAM " [--control=SOCKET] [--bitmap=NAME] [--compress]\n"
         "           URI REPOSITORY          back the disk up: all of it the\n"
         "                                   first time, then what was changed\n"
         "       " PROGRAM " --list REPOSITORY\n"
         "       " PROGRAM " --verify REPOSITORY\n"
         "       " PROGRAM " --restore REPOSITORY[@N] FILE|URI\n"
         "       " PROGRAM " --prune REPOSITORY --keep=N\n"
         "       " PROGRAM " --map URI FILE.svg  draw the disk and its bitmaps\n"
         "\n"
         "  --control=SOCKET  of nbdkit's dirty-bitmap filter: copy a view of\n"
         "                    one moment, and let the bitmap begin anew\n"
         "  --bitmap=NAME     the bitmap (default: the repository's own)\n"
         "  --compress        compress new images, with zstd\n"
         "  --format=FORMAT   of a restored file: qcow2 or raw (default: by\n"
         "                    its name)\n"
         "  --force           overwrite the file\n"
         "  --quiet           show no progress\n"
         "  --json            print the result as JSON\n"
         "  --help            show this\n"
         "  --version         show the version\n", f);
}

static void
send_report (enum report_level level, const char *fmt, va_list args)
{
  const int err = errno;

  if (level == REPORT_DEBUG)
    return;
  progress_erase ();
  fprintf (stderr, PROGRAM ": %s",
           level == REPORT_WARNING ? "warning: " : "error: ");
  errno = err;
  vfprintf (stderr, fmt, args);
  fputc ('\n', stderr);
}

static void
interrupt (int sig)
{
  (void) sig;
  is_interrupted = true;
}

/* The second signal ends the program at once.  The first one interrupts no
 * call: what was asked on the control socket has an answer, by which we know
 * whether there is a backup to be ended.
 */
static void
catch_signals (void)
{
  struct sigaction sa = {
    .sa_handler = interrupt, .sa_flags = SA_RESETHAND | SA_RESTART
  };

  sigaction (SIGINT, &sa, NULL);
  sigaction (SIGTERM, &sa, NULL);
  sigaction (SIGHUP, &sa, NULL);
  signal (SIGPIPE, SIG_IGN);
}

enum command { BACKUP, LIST, VERIFY, RESTORE, PRUNE, MAP };

static const struct {
  const char *name;
  int nr_arguments;
} commands[] = {
  [BACKUP] = { "a backup", 2 }, [LIST] = { "--list", 1 },
  [VERIFY] = { "--verify", 1 }, [RESTORE] = { "--restore", 2 },
  [PRUNE] = { "--prune", 1 }, [MAP] = { "--map", 2 },
};

__attribute__ ((format (printf, 1, 2), noreturn))
static void
wrong_usage (const char *fmt, ...)
{
  va_list args;

  fprintf (stderr, PROGRAM ": ");
  va_start (args, fmt);
  vfprintf (stderr, fmt, args);
  va_end (args);
  fprintf (stderr, "\nTry '" PROGRAM " --help'.\n");
  exit (EXIT_FAILURE);
}

static unsigned
parse_keep (const char *text)
{
  const size_t digits = strspn (text, "0123456789");

  if (digits == 0 || digits > 6 || text[digits] != '\0' || atoi (text) == 0)
    wrong_usage ("--keep: must be a number from 1 to 999999: %s", text);
  return atoi (text);
}

enum { OPT_BITMAP = 256, OPT_COMPRESS, OPT_CONTROL, OPT_FORCE, OPT_FORMAT,
       OPT_JSON, OPT_KEEP, OPT_QUIET, OPT_VERSION, OPT_COMMAND };

static const struct option options[] = {
  { "bitmap", required_argument, NULL, OPT_BITMAP },
  { "compress", no_argument, NULL, OPT_COMPRESS },
  { "control", required_argument, NULL, OPT_CONTROL },
  { "force", no_argument, NULL, OPT_FORCE },
  { "format", required_argument, NULL, OPT_FORMAT },
  { "help", no_argument, NULL, 'h' },
  { "json", no_argument, NULL, OPT_JSON },
  { "keep", required_argument, NULL, OPT_KEEP },
  { "list", no_argument, NULL, OPT_COMMAND + LIST },
  { "map", no_argument, NULL, OPT_COMMAND + MAP },
  { "prune", no_argument, NULL, OPT_COMMAND + PRUNE },
  { "quiet", no_argument, NULL, OPT_QUIET },
  { "restore", no_argument, NULL, OPT_COMMAND + RESTORE },
  { "verify", no_argument, NULL, OPT_COMMAND + VERIFY },
  { "version", no_argument, NULL, OPT_VERSION },
  { NULL, 0, NULL, 0 },
};

static void
take_option (struct settings *s, enum command *command, int c)
{
  switch (c) {
  case OPT_BITMAP:
    s->bitmap = optarg;
    break;
  case OPT_COMPRESS:
    s->compress = true;
    break;
  case OPT_CONTROL:
    s->control = optarg;
    break;
  case OPT_FORCE:
    s->force = true;
    break;
  case OPT_FORMAT:
    s->format = optarg;
    break;
  case OPT_JSON:
    s->json = true;
    break;
  case OPT_KEEP:
    s->keep = parse_keep (optarg);
    break;
  case OPT_QUIET:
    s->quiet = true;
    break;
  case 'h':
    usage (stdout);
    exit (EXIT_SUCCESS);
  case OPT_VERSION:
    puts (PROGRAM " " PACKAGE_VERSION);
    exit (EXIT_SUCCESS);
  case OPT_COMMAND + LIST ... OPT_COMMAND + MAP:
    if (*command != BACKUP)
      wrong_usage ("%s and %s exclude each other", commands[*command].name,
                   commands[c - OPT_COMMAND].name);
    *command = c - OPT_COMMAND;
    break;
  default:
    fprintf (stderr, "Try '" PROGRAM " --help'.\n");
    exit (EXIT_FAILURE);
  }
}

static void
check_settings (const struct settings *s, enum command command, int nr)
{
  if (nr != commands[command].nr_arguments)
    wrong_usage ("%s takes %d argument%s", commands[command].name,
                 commands[command].nr_arguments,
                 commands[command].nr_arguments == 1 ? "" : "s");
  if ((command == PRUNE) != (s->keep != 0))
    wrong_usage ("--prune and --keep=N belong together");
  if (command != BACKUP && s->control != NULL)
    wrong_usage ("--control is for a backup");
  if (command != BACKUP && s->bitmap != NULL)
    wrong_usage ("--bitmap is for a backup");
  if (command != RESTORE && s->format != NULL)
    wrong_usage ("--format is for --restore");
  if (command != RESTORE && command != MAP && s->force)
    wrong_usage ("--force is for --restore and --map");
}

/* Both the picture and the figures would be on stdout. */
static void
check_map (const struct settings *s, const char *target)
{
  if (s->json && strcmp (target, "-") == 0)
    wrong_usage ("--json: the picture must have a file, not -");
}

static int
run (const struct settings *s, enum command command, char **arguments)
{
  switch (command) {
  case LIST:
    return command_list (s, arguments[0]);
  case VERIFY:
    return command_verify (s, arguments[0]);
  case RESTORE:
    return command_restore (s, arguments[0], arguments[1]);
  case PRUNE:
    return command_prune (s, arguments[0]);
  case MAP:
    check_map (s, arguments[1]);
    return command_map (s, arguments[0], arguments[1]);
  default:
    return command_backup (s, arguments[0], arguments[1]);
  }
}

int
main (int argc, char **argv)
{
  struct settings settings = { 0 };
  enum command command = BACKUP;
  int c, r;

  while ((c = getopt_long (argc, argv, "h", options, NULL)) != -1)
    take_option (&settings, &command, c);
  check_settings (&settings, command, argc - optind);
  report_sink = send_report;
  catch_signals ();
  r = run (&settings, command, argv + optind);
  if (r == -1 && is_interrupted)
    fprintf (stderr, PROGRAM ": interrupted\n");
  if (fflush (stdout) == EOF || ferror (stdout)) {
    fprintf (stderr, PROGRAM ": writing: %s\n", strerror (errno));
    r = -1;
  }
  return r == 0 ? EXIT_SUCCESS : EXIT_FAILURE;
}
