/* nbdkit-dirty-bitmap-filter
 * SPDX-License-Identifier: BSD-3-Clause
 * Copyright the nbdkit-dirty-bitmap-filter authors
 */

/* nbdkit-dirty-bitmap-ctl SOCKET COMMAND [KEY=VALUE...]
 *
 * One command for a control socket: connect, negotiate, send the command, wait
 * for its reply, and print it.  Events are skipped.  The tables of the query
 * commands are in ctl-table.c.
 */

#include <config.h>

#include <ctype.h>
#include <errno.h>
#include <getopt.h>
#include <signal.h>
#include <stdarg.h>
#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include <jansson.h>

#include "ctl.h"
#include "qmp-client.h"

#define PROGRAM "nbdkit-dirty-bitmap-ctl"

static void
usage (FILE *f)
{
  fputs ("usage: " PROGRAM " [--json] SOCKET COMMAND [KEY=VALUE...]\n"
         "\n"
         "Execute a command of nbdkit's dirty-bitmap filter, on the socket of\n"
         "its parameter dirty-bitmap-control=SOCKET, and print the result.\n"
         "\n"
         "  KEY=VALUE   an argument: true, false, a number, an array or object\n"
         "              in JSON, or else a string\n"
         "  KEY:=JSON   an argument as JSON; KEY:='\"12\"' is a string\n"
         "  KEY:=@FILE  the same, from a file; - is stdin\n"
         "  bitmaps=NAME  one of several names; each has such an argument\n"
         "  --json      print JSON, for query commands as well\n"
         "  --help      show this\n"
         "  --version   show the version\n"
         "\n"
         "The command query-commands lists the commands.\n", f);
}

__attribute__ ((format (printf, 1, 2), noreturn))
static void
fail (const char *fmt, ...)
{
  va_list args;

  fprintf (stderr, PROGRAM ": ");
  va_start (args, fmt);
  vfprintf (stderr, fmt, args);
  va_end (args);
  fputc ('\n', stderr);
  exit (EXIT_FAILURE);
}

/* The arguments whose values are always strings, whatever they look like. */
static bool
is_string_key (const char *key)
{
  static const char *const keys[] = {
    "bitmap", "device", "export", "id", "name", "node", "target",
  };

  for (size_t i = 0; i < sizeof keys / sizeof keys[0]; ++i)
    if (strcmp (keys[i], key) == 0)
      return true;
  return false;
}

/* The argument that is a list of strings, or of what is written in JSON. */
static bool
is_list_key (const char *key)
{
  return strcmp (key, "bitmaps") == 0;
}

static json_t *
parse_json (const char *key, const char *text)
{
  json_error_t error;
  json_t *value = json_loads (text, JSON_DECODE_ANY | JSON_REJECT_DUPLICATES |
                              JSON_ALLOW_NUL, &error);

  if (value == NULL)
    fail ("%s: not JSON: %s", key, text);
  return value;
}

/* The value of KEY=VALUE. */
static json_t *
parse_value (const char *key, const char *text)
{
  json_t *value;

  if (!is_string_key (key)) {
    if (text[0] == '[' || text[0] == '{')
      return parse_json (key, text);
    value = is_list_key (key) ? NULL
      : json_loads (text, JSON_DECODE_ANY, NULL);
    if (json_is_boolean (value) || json_is_number (value))
      return value;
    json_decref (value);
  }
  value = json_string (text);
  if (value == NULL)
    fail ("%s: not in UTF-8", key);
  return value;
}

/* The JSON in a file; - is stdin. */
static json_t *
read_json (const char *key, const char *path)
{
  const bool is_stdin = strcmp (path, "-") == 0;
  FILE *f = is_stdin ? stdin : fopen (path, "r");
  json_error_t error;
  json_t *value;

  if (f == NULL)
    fail ("%s: %s", path, strerror (errno));
  value = json_loadf (f, JSON_DECODE_ANY | JSON_REJECT_DUPLICATES |
                      JSON_ALLOW_NUL, &error);
  if (ferror (f))
    fail ("%s: %s", path, strerror (errno));
  if (value == NULL)
    fail ("%s: not JSON: %s, line %d: %s", key, path, error.line, error.text);
  if (!is_stdin)
    fclose (f);
  return value;
}

/* The value of KEY:=JSON and KEY:=@FILE. */
static json_t *
json_value (const char *key, const char *text)
{
  return text[0] == '@' ? read_json (key, text + 1) : parse_json (key, text);
}

/* KEY=VALUE adds to a list, or sets it if VALUE is one. */
static json_t *
list_value (json_t *arguments, const char *key, const char *text)
{
  json_t *list = json_incref (json_object_get (arguments, key));
  json_t *value = parse_value (key, text);

  if (list == NULL && json_is_array (value))
    return value;
  if (list == NULL)
    list = json_array ();
  if (json_array_append_new (list, value) == -1)
    fail ("%s is given twice", key);
  return list;
}

static void
add_argument (json_t *arguments, char *word)
{
  char *equals = strchr (word, '=');
  const char *text;
  bool as_json, is_list;
  json_t *value;

  if (equals == NULL || equals == word)
    fail ("expecting KEY=VALUE, not '%s'", word);
  text = equals + 1;
  as_json = equals[-1] == ':';
  equals[as_json ? -1 : 0] = '\0';
  is_list = !as_json && is_list_key (word);
  if (!is_list && json_object_get (arguments, word) != NULL)
    fail ("%s is given twice", word);
  value = as_json ? json_value (word, text)
    : is_list ? list_value (arguments, word, text)
    : parse_value (word, text);
  if (json_object_set_new (arguments, word, value) == -1)
    fail ("cannot use the argument '%s'", word);
}

/* Print the reason of a failure, which may be the server's. */
__attribute__ ((noreturn))
static void
fail_with (const struct qmp_client *c)
{
  fprintf (stderr, PROGRAM ": ");
  print_text (stderr, c->error != NULL ? c->error : "out of memory");
  fputc ('\n', stderr);
  exit (EXIT_FAILURE);
}

static json_t *
execute (const char *path, const char *command, json_t *arguments)
{
  struct qmp_client client;
  json_t *result;

  if (qmp_client_open (&client, path) == -1)
    fail_with (&client);
  result = qmp_client_call (&client, command, arguments);
  if (result == NULL)
    fail_with (&client);
  qmp_client_close (&client);
  return result;
}

int
main (int argc, char **argv)
{
  static const struct option options[] = {
    { "help", no_argument, NULL, 'h' },
    { "json", no_argument, NULL, 'j' },
    { "version", no_argument, NULL, 'V' },
    { NULL, 0, NULL, 0 },
  };
  bool as_json = false;
  json_t *arguments, *result;
  int c;

  signal (SIGPIPE, SIG_IGN);
  while ((c = getopt_long (argc, argv, "+h", options, NULL)) != -1)
    switch (c) {
    case 'h':
      usage (stdout);
      return EXIT_SUCCESS;
    case 'j':
      as_json = true;
      break;
    case 'V':
      puts (PROGRAM " " PACKAGE_VERSION);
      return EXIT_SUCCESS;
    default:
      usage (stderr);
      return EXIT_FAILURE;
    }
  if (argc - optind < 2) {
    usage (stderr);
    return EXIT_FAILURE;
  }
  arguments = json_object ();
  for (int i = optind + 2; i < argc; ++i)
    add_argument (arguments, argv[i]);
  result = execute (argv[optind], argv[optind + 1], arguments);
  if (as_json || !print_table (argv[optind + 1], result)) {
    json_dumpf (result, stdout, JSON_INDENT (2) | JSON_ENCODE_ANY |
                JSON_ENSURE_ASCII);
    putchar ('\n');
  }
  json_decref (result);
  json_decref (arguments);
  if (fflush (stdout) == EOF || ferror (stdout))
    fail ("writing: %s", strerror (errno));
  return EXIT_SUCCESS;
}
