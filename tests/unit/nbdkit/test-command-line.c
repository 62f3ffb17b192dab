/* nbdkit-dirty-bitmap-filter
 * SPDX-License-Identifier: BSD-3-Clause
 * Copyright the nbdkit-dirty-bitmap-filter authors
 */

/* What the filter makes of nbdkit's command line and filters. */

#include <config.h>

#include <getopt.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

#include <cmocka.h>

#include "kept-reports.h"
#include "nbdkit/command-line.h"
#include "nbdkit/filter-stack.h"
#include "parameters.h"
#include "nbdkit/plugin-parameters.h"
#include "settings.h"

#define MAX_ARGS 32

static int
setup (void **state)
{
  (void) state;
  keep_reports ();
  unsetenv ("POSIXLY_CORRECT");
  return 0;
}

/* Parse a command line, given as one string with spaces between the
 * arguments.  The arguments live until the next call.
 */
static int
parse (struct command_line *cl, const char *line)
{
  static char storage[1024];
  static char *argv[MAX_ARGS + 1];
  int argc = 0;
  char *p, *save;

  assert_true (strlen (line) < sizeof storage);
  strcpy (storage, line);
  for (p = strtok_r (storage, " ", &save); p != NULL;
       p = strtok_r (NULL, " ", &save)) {
    assert_true (argc < MAX_ARGS);
    argv[argc++] = p;
  }
  argv[argc] = NULL;
  return command_line_parse (cl, argc, argv);
}

static void
test_readonly_and_plugin (void **state)
{
  static const struct {
    const char *line;
    bool readonly;
    const char *plugin;
  } cases[] = {
    { "nbdkit file disk", false, "file" },
    { "nbdkit -r file disk", true, "file" },
    { "nbdkit file disk -r", true, "file" },
    { "nbdkit --readonly file", true, "file" },
    { "nbdkit --read-only file", true, "file" },
    { "nbdkit --readonl file", true, "file" },
    { "nbdkit --re file", true, "file" },
    { "nbdkit -fr file", true, "file" },
    { "nbdkit -frv file", true, "file" },
    { "nbdkit -fU- file", false, "file" },
    { "nbdkit -U r file", false, "file" },
    { "nbdkit -U -r file", false, "file" },
    { "nbdkit -fUr file", false, "file" },
    { "nbdkit -P -r file", false, "file" },
    { "nbdkit --run -r file", false, "file" },
    { "nbdkit --pidfile=-r file", false, "file" },
    { "nbdkit --pidf -r file", false, "file" },
    { "nbdkit -D -r file", false, "file" },
    { "nbdkit -e -r -u -r -g -r -i -r -t -r -p -r file", false, "file" },
    { "nbdkit --selinux-label -r --log -r --tls-psk -r file", false, "file" },
    { "nbdkit --mask-handshake -r --threads -r --timeout -r file",
      false, "file" },
    { "nbdkit --print-uri --no-mc --keepalive -r file", true, "file" },
    { "nbdkit -46 --swap --vsock file -r", true, "file" },
    { "nbdkit -- file -r", false, "file" },
    { "nbdkit -r -- file", true, "file" },
    { "nbdkit -f -- -r", false, "-r" },
    { "nbdkit key=value -r", true, "key=value" },
    { "nbdkit ./nbdkit-file-plugin.so a b -f c", false,
      "./nbdkit-file-plugin.so" },
    { "nbdkit - -r", true, "-" },
    { "nbdkit -r", true, NULL },
    { "nbdkit", false, NULL },
    { "", false, NULL },
  };
  struct command_line cl;
  size_t i;

  (void) state;
  for (i = 0; i < sizeof cases / sizeof cases[0]; ++i) {
    print_message ("%s\n", cases[i].line);
    assert_int_equal (parse (&cl, cases[i].line), 0);
    assert_int_equal (cl.readonly, cases[i].readonly);
    if (cases[i].plugin == NULL)
      assert_null (cl.plugin);
    else
      assert_string_equal (cl.plugin, cases[i].plugin);
    command_line_free (&cl);
  }
  assert_int_equal (nr_reports, 0);
}

static void
test_posixly_correct (void **state)
{
  struct command_line cl;

  (void) state;
  setenv ("POSIXLY_CORRECT", "1", 1);
  assert_int_equal (parse (&cl, "nbdkit -f file -r"), 0);
  assert_false (cl.readonly);
  assert_string_equal (cl.plugin, "file");
  command_line_free (&cl);
  assert_int_equal (parse (&cl, "nbdkit -fr file"), 0);
  assert_true (cl.readonly);
  command_line_free (&cl);
  unsetenv ("POSIXLY_CORRECT");
}

/* No option that is not known keeps nbdkit from starting, or our server
 * from saying so.  Where all else is understood, it is taken as it is.
 */
static void
test_unknown_options (void **state)
{
  static const struct {
    const char *line, *unknown;
    bool is_ambiguous, readonly, assumes_readonly;
    const char *plugin;         /* if not ambiguous */
  } cases[] = {
    { "nbdkit --frobnicate=3 file", "--frobnicate",
      false, false, false, "file" },
    { "nbdkit --frobnicate=3 -r file", "--frobnicate",
      false, true, false, "file" },
    { "nbdkit --frobnicate=-r file --other=x", "--frobnicate",
      false, false, false, "file" },
    { "nbdkit file --tls-new=-r -P /run/r", "--tls-new",
      false, false, false, "file" },
    { "nbdkit --readonly=yes file", "--readonly",
      false, false, false, "file" },
    { "nbdkit --p=5 file", "--p", false, false, false, "file" },
    { "nbdkit --frobnicate file", "--frobnicate", true, false, false, NULL },
    { "nbdkit --frobnicate -r file", "--frobnicate", true, true, true, NULL },
    { "nbdkit --frobnicate -p -r file", "--frobnicate",
      true, true, true, NULL },
    { "nbdkit --frobnicate -p -vr file", "--frobnicate",
      true, true, true, NULL },
    { "nbdkit --frobnicate -U --read file", "--frobnicate",
      true, true, true, NULL },
    { "nbdkit --frobnicate -- file -r", "--frobnicate",
      true, true, true, NULL },
    { "nbdkit --frobnicate -P/run/r -fU/run/r -Dr=1 file", "--frobnicate",
      true, false, false, NULL },
    { "nbdkit -x file", "-x", true, false, false, NULL },
    { "nbdkit -fx file", "-x", true, false, false, NULL },
    { "nbdkit -xf file", "-x", true, false, false, NULL },
    { "nbdkit -xr file", "-x", true, true, true, NULL },
    { "nbdkit -Z -x=-r file --late", "-Z", true, true, true, NULL },
    { "nbdkit file --no-such", "--no-such", true, false, false, NULL },
    { "nbdkit -U", "-U", true, false, false, NULL },
    { "nbdkit --filter", "--filter", true, false, false, NULL },
    { "nbdkit --a-name-that-is-longer-than-any-that-there-ever-was-in-nbdkit"
      "-or-will-be=x file",
      "--a-name-that-is-longer-than-any-that-there-ever-was-in-nbdkit-",
      false, false, false, "file" },
  };
  struct command_line cl;
  char *objection;
  bool failed;
  size_t i;

  (void) state;
  for (i = 0; i < sizeof cases / sizeof cases[0]; ++i) {
    print_message ("%s\n", cases[i].line);
    assert_int_equal (parse (&cl, cases[i].line), 0);
    assert_string_equal (cl.unknown_option, cases[i].unknown);
    assert_int_equal (cl.is_ambiguous, cases[i].is_ambiguous);
    assert_int_equal (cl.readonly, cases[i].readonly);
    assert_int_equal (cl.assumes_readonly, cases[i].assumes_readonly);
    if (!cases[i].is_ambiguous)
      assert_string_equal (cl.plugin, cases[i].plugin);
    else
      assert_true (cl.forks);
    objection = filter_stack_objection (&cl, false, true, &failed);
    assert_non_null (objection);
    assert_non_null (strstr (objection, cases[i].unknown));
    free (objection);
    command_line_free (&cl);
  }
  assert_int_equal (nr_reports, 0);
}

static void
test_getopt_is_put_back (void **state)
{
  char arg[] = "argument";
  struct command_line cl;

  (void) state;
  optind = 17;
  opterr = 5;
  optopt = 'q';
  optarg = arg;
  assert_int_equal (parse (&cl, "nbdkit -r -U - file"), 0);
  command_line_free (&cl);
  assert_int_equal (parse (&cl, "nbdkit --wrong file"), 0);
  command_line_free (&cl);
  assert_int_equal (optind, 17);
  assert_int_equal (opterr, 5);
  assert_int_equal (optopt, 'q');
  assert_ptr_equal (optarg, arg);
}

static void
test_server_feature (void **state)
{
  static const struct {
    const char *line;
    const char *feature;        /* a part of it, or NULL */
  } cases[] = {
    { "nbdkit file", NULL },
    { "nbdkit -n --newstyle file", NULL },
    { "nbdkit -s file", NULL },
    { "nbdkit --single file", NULL },
    { "nbdkit --stdin file", NULL },
    { "nbdkit -o file", "oldstyle" },
    { "nbdkit --old-style file", "oldstyle" },
    { "nbdkit -o -n file", NULL },
    { "nbdkit -n -o file", "oldstyle" },
    { "nbdkit --mask-handshake=0 file", "--mask-handshake" },
    { "nbdkit --mask-handshake 0x1 file", "--mask-handshake" },
    { "nbdkit --mask-handshake 3 file", NULL },
    { "nbdkit --mask-handshake 0xffffffff file", NULL },
    { "nbdkit --mask-handshake 0 --mask-handshake=3 file", NULL },
    { "nbdkit --no-sr file", "--no-sr" },
    { "nbdkit --no-s file", "--no-sr" },
    { "nbdkit --no-structured-replies file", "--no-sr" },
    { "nbdkit --no-mc file", "--no-meta-contexts" },
    { "nbdkit --no-meta-contexts file", "--no-meta-contexts" },
    { "nbdkit --timeout=10 file", NULL },
    { "nbdkit --timeout=soon file", "--timeout" },
    { "nbdkit --keepalive --keep-alive file", NULL },
    { "nbdkit --print-url --show-uri --show-url --name=n --name n file",
      NULL },
    { "nbdkit --log=/var/log/nbdkit --log default file", NULL },
    { "nbdkit --no-fork -v -t 4 --swap --print-uri -e x file", NULL },
    { "nbdkit --tls=require --tls-psk=keys --tls-verify-peer file", NULL },
  };
  struct command_line cl;
  size_t i;

  (void) state;
  for (i = 0; i < sizeof cases / sizeof cases[0]; ++i) {
    print_message ("%s\n", cases[i].line);
    assert_int_equal (parse (&cl, cases[i].line), 0);
    if (cases[i].feature == NULL)
      assert_null (cl.server_feature);
    else {
      assert_non_null (cl.server_feature);
      assert_non_null (strstr (cl.server_feature, cases[i].feature));
    }
    command_line_free (&cl);
  }
}

static void
assert_same_string (const char *a, const char *b)
{
  if (a == NULL || b == NULL)
    assert_ptr_equal (a, b);
  else
    assert_string_equal (a, b);
}

static void
test_tls (void **state)
{
  static const struct {
    const char *line;
    struct command_line_tls tls;
  } cases[] = {
    { "nbdkit file", { .mode = TLS_ON } },
    { "nbdkit --tls=on file", { .mode = TLS_ON } },
    { "nbdkit --tls 1 file", { .mode = TLS_ON } },
    { "nbdkit --tls=require file", { .mode = TLS_REQUIRE } },
    { "nbdkit --tls Required file", { .mode = TLS_REQUIRE } },
    { "nbdkit file --tls force", { .mode = TLS_REQUIRE } },
    { "nbdkit --tls=off file", { .mode = TLS_OFF } },
    { "nbdkit --tls=NO file", { .mode = TLS_OFF } },
    { "nbdkit --tls=false file", { .mode = TLS_OFF } },
    { "nbdkit --tls=require --tls=off file", { .mode = TLS_OFF } },
    { "nbdkit file --tls=off --tls=require", { .mode = TLS_REQUIRE } },
    { "nbdkit -- file --tls=require", { .mode = TLS_ON } },
    { "nbdkit --tls-psk=keys file", { .psk = "keys" } },
    { "nbdkit --tls-psk keys --tls-psk other file", { .psk = "other" } },
    { "nbdkit --tls-p keys file", { .psk = "keys" } },
    { "nbdkit --tls-ps=keys file", { .psk = "keys" } },
    { "nbdkit --tls-certificates=/x file", { .certificates = "/x" } },
    { "nbdkit --tls-cert /x --tls=off file",
      { .mode = TLS_OFF, .certificates = "/x" } },
    { "nbdkit --tls-verify-peer file", { .verify_peer = true } },
    { "nbdkit --tls-v --tls require file",
      { .mode = TLS_REQUIRE, .verify_peer = true } },
    { "nbdkit --tls-priority=SECURE256 --tls-pr NORMAL file",
      { .priority = "NORMAL" } },
    { "nbdkit --tls-psk --tls-verify-peer file",
      { .psk = "--tls-verify-peer" } },
  };
  struct command_line cl;
  size_t i;

  (void) state;
  for (i = 0; i < sizeof cases / sizeof cases[0]; ++i) {
    print_message ("%s\n", cases[i].line);
    assert_int_equal (parse (&cl, cases[i].line), 0);
    assert_null (cl.server_feature);
    assert_int_equal (cl.tls.mode, cases[i].tls.mode);
    assert_same_string (cl.tls.certificates, cases[i].tls.certificates);
    assert_same_string (cl.tls.psk, cases[i].tls.psk);
    assert_same_string (cl.tls.priority, cases[i].tls.priority);
    assert_int_equal (cl.tls.verify_peer, cases[i].tls.verify_peer);
    command_line_free (&cl);
  }
}

/* What bounds clients, in the options and in the parameters. */
static void
test_limits (void **state)
{
  static const struct {
    const char *line;
    unsigned requests, handshake;       /* parameters, or 0 */
    unsigned expected_requests, expected_handshake;
  } cases[] = {
    { "nbdkit file", 0, 0, 16, 0 },
    { "nbdkit file", 4, 60, 4, 60 },
    { "nbdkit -t 1 file", 0, 0, 1, 0 },
    { "nbdkit -t5 file --threads=0x7", 0, 0, 7, 0 },
    { "nbdkit --threads 0 file", 0, 0, 16, 0 },
    { "nbdkit -t 100 file", 0, 0, 16, 0 },
    { "nbdkit -t 8 file", 2, 0, 2, 0 },
    { "nbdkit -t 2 file", 8, 0, 2, 0 },
    { "nbdkit --timeout=60 file", 0, 0, 16, 60 },
    { "nbdkit --timeout 60s file", 0, 5, 16, 5 },
    { "nbdkit --time-out=1.2 file", 0, 0, 16, 2 },
    { "nbdkit --timeout=100ms file", 0, 5, 16, 1 },
    { "nbdkit --timeout=1000ms file", 0, 0, 16, 1 },
    { "nbdkit --timeout=3000000us file", 0, 0, 16, 3 },
    { "nbdkit --timeout=2000001\xce\xbcs file", 0, 0, 16, 3 },
    { "nbdkit --timeout=1ns file", 0, 0, 16, 1 },
    { "nbdkit --timeout=0 file", 0, 5, 16, 5 },
    { "nbdkit --timeout=1e30 file", 0, 0, 16, 86400 },
    { "nbdkit --filter=dirty-bitmap --filter=noparallel file", 0, 0, 1, 0 },
    { "nbdkit --filter=dirty-bitmap --filter=noparallel -t 4 file", 8, 0,
      1, 0 },
  };
  struct command_line cl;
  size_t i;

  (void) state;
  for (i = 0; i < sizeof cases / sizeof cases[0]; ++i) {
    const struct parameters parameters = {
      .limits = {
        .requests = cases[i].requests,
        .handshake_seconds = cases[i].handshake,
        .connections = 7,
      },
    };
    struct nbd_limits limits;

    print_message ("%s\n", cases[i].line);
    assert_int_equal (parse (&cl, cases[i].line), 0);
    assert_null (cl.server_feature);
    limits = settings_limits (&parameters, &cl);
    assert_int_equal (limits.requests, cases[i].expected_requests);
    assert_int_equal (limits.handshake_seconds, cases[i].expected_handshake);
    assert_int_equal (limits.connections, 7);
    command_line_free (&cl);
  }
}

static void
test_forks (void **state)
{
  static const struct {
    const char *line;
    bool forks;
  } cases[] = {
    { "nbdkit file", true },
    { "nbdkit -f file", false },
    { "nbdkit --no-fork file", false },
    { "nbdkit -s file", false },
    { "nbdkit --exit-with-parent file", false },
    { "nbdkit --run true file", true },
    { "nbdkit -f --run true file", true },
  };
  struct command_line cl;
  size_t i;

  (void) state;
  for (i = 0; i < sizeof cases / sizeof cases[0]; ++i) {
    print_message ("%s\n", cases[i].line);
    assert_int_equal (parse (&cl, cases[i].line), 0);
    assert_int_equal (cl.forks, cases[i].forks);
    command_line_free (&cl);
  }
}

static void
test_where_nbdkit_listens (void **state)
{
  static const struct {
    const char *line;
    bool on_unix, on_tcp, on_vsock;
    const char *path, *port;
  } cases[] = {
    { "nbdkit file", false, true, false, NULL, NULL },
    { "nbdkit -p 10810 file", false, true, false, NULL, "10810" },
    { "nbdkit -p 0 file", false, true, false, NULL, "0" },
    { "nbdkit -p10810 file", false, true, false, NULL, "10810" },
    { "nbdkit --port=nbd file", false, true, false, NULL, "nbd" },
    { "nbdkit -U /run/s file", true, false, false, "/run/s", NULL },
    { "nbdkit -U - file", true, false, false, NULL, NULL },
    { "nbdkit --unix=s file", true, false, false, "s", NULL },
    { "nbdkit --vsock file", false, false, true, NULL, NULL },
    { "nbdkit --vsock -p 5 file", false, false, true, NULL, "5" },
    { "nbdkit file --run true", true, true, false, NULL, NULL },
    { "nbdkit file --run true -p 5", false, true, false, NULL, "5" },
    { "nbdkit file --run true -U s", true, false, false, "s", NULL },
  };
  struct command_line cl;
  size_t i;

  (void) state;
  for (i = 0; i < sizeof cases / sizeof cases[0]; ++i) {
    print_message ("%s\n", cases[i].line);
    assert_int_equal (parse (&cl, cases[i].line), 0);
    assert_int_equal (cl.on_unix, cases[i].on_unix);
    assert_int_equal (cl.on_tcp, cases[i].on_tcp);
    assert_int_equal (cl.on_vsock, cases[i].on_vsock);
    assert_int_equal (cl.unix_path == NULL, cases[i].path == NULL);
    if (cl.unix_path != NULL)
      assert_string_equal (cl.unix_path, cases[i].path);
    assert_int_equal (cl.port == NULL, cases[i].port == NULL);
    if (cl.port != NULL)
      assert_string_equal (cl.port, cases[i].port);
    command_line_free (&cl);
  }
}

#define BY_PATH "/usr/lib/nbdkit/filters/nbdkit-dirty-bitmap-filter.so"

static void
test_objections (void **state)
{
  static const struct {
    const char *line;
    const char *objection;      /* a part of it, or NULL */
  } cases[] = {
    { "nbdkit --filter=dirty-bitmap file", NULL },
    { "nbdkit --filter dirty-bitmap file", NULL },
    { "nbdkit file --fil dirty-bitmap", NULL },
    { "nbdkit --filter=" BY_PATH " file", NULL },
    { "nbdkit --filter=./nbdkit-dirty-bitmap-filter.so file", NULL },
    { "nbdkit --filter=nbdkit-dirty-bitmap-filter.so file", NULL },
    { "nbdkit --filter=./other-name.so file", "not named" },
    { "nbdkit --filter=dirty-bitmap --filter=readonly --filter=xor file",
      NULL },
    { "nbdkit --filter=dirty-bitmap --filter=map --filter=indexed-gzip file",
      NULL },
    { "nbdkit --filter=dirty-bitmap --filter=time-limit file", "time-limit" },
    { "nbdkit --filter=dirty-bitmap --filter=noparallel file", NULL },
    { "nbdkit --filter=./nbdkit-dirty-bitmap-plugin.so file", "not named" },
    { "nbdkit --filter=dirty-bitmap --filter=delay --filter=cow file", NULL },
    { "nbdkit --filter=dirty-bitmap --filter=/x/nbdkit-xz-filter.so file",
      NULL },
    { "nbdkit --filter=delay --filter=dirty-bitmap file", "delay" },
    { "nbdkit --filter=ip --filter=dirty-bitmap file", "ip" },
    { "nbdkit --filter=dirty-bitmap --filter=ip file", "ip" },
    { "nbdkit --filter=dirty-bitmap --filter=limit file", "limit" },
    { "nbdkit --filter=dirty-bitmap --filter=exitlast file", "exitlast" },
    { "nbdkit --filter=dirty-bitmap --filter=exitwhen file", "exitwhen" },
    { "nbdkit --filter=dirty-bitmap --filter=rate file", "rate" },
    { "nbdkit --filter=dirty-bitmap --filter=pause file", "pause" },
    { "nbdkit --filter=dirty-bitmap --filter=exportname file", "exportname" },
    { "nbdkit --filter=dirty-bitmap --filter=tls-fallback file",
      "tls-fallback" },
    { "nbdkit --filter=dirty-bitmap --filter=delay --filter=unheard file",
      "unheard" },
    { "nbdkit --filter=dirty-bitmap --filter=./nbdkit-my-filter.so file",
      "nbdkit-my-filter.so" },
    { "nbdkit --filter=dirty-bitmap --filter=./delay file", "./delay" },
    { "nbdkit -o --filter=dirty-bitmap file", "oldstyle" },
  };
  struct command_line cl;
  char *objection;
  bool failed;
  size_t i;

  (void) state;
  for (i = 0; i < sizeof cases / sizeof cases[0]; ++i) {
    print_message ("%s\n", cases[i].line);
    assert_int_equal (parse (&cl, cases[i].line), 0);
    objection = filter_stack_objection (&cl, false, false, &failed);
    assert_false (failed);
    if (cases[i].objection == NULL)
      assert_null (objection);
    else {
      assert_non_null (objection);
      assert_non_null (strstr (objection, cases[i].objection));
    }
    free (objection);
    command_line_free (&cl);
  }
}

/* Who may judge clients, and what the user can vouch for. */
static void
test_vouching (void **state)
{
  static const struct {
    const char *rest;           /* after our filter */
    bool one_client;
    const char *objection;      /* a part of it, or NULL */
    const char *vouched;        /* the same if the user vouches */
  } cases[] = {
    { "file", false, NULL, NULL },
    { "nbd", false, NULL, NULL },
    { "/usr/lib/nbdkit/plugins/nbdkit-memory-plugin.so", false, NULL, NULL },
    { "vram", true, NULL, NULL },
    { "guestfs", true, NULL, NULL },
    { "sh", false, "plugin sh", NULL },
    { "eval", false, "plugin eval", NULL },
    { "python", false, "plugin python", NULL },
    { "cc", false, "plugin cc", NULL },
    { "torrent", false, "plugin torrent", NULL },
    { "unheard", false, "plugin unheard", NULL },
    { "./file", false, "plugin ./file", NULL },
    { "./file.so", false, "plugin ./file.so", NULL },
    { "./nbdkit-my-plugin.so", false, "nbdkit-my-plugin.so", NULL },
    { "./nbdkit-file-filter.so", false, "nbdkit-file-filter.so", NULL },
    { "--filter=unheard file", false, "unheard", NULL },
    { "--filter=unheard --filter=ip file", false, "unheard", "ip" },
    { "--filter=ip sh", false, "ip", "ip" },
    { "--filter=time-limit file", false, "time-limit", "time-limit" },
    { "-o sh", false, "oldstyle", "oldstyle" },
    { "--filter=noparallel file", false, NULL, NULL },
    { "--filter=noparallel file", true, "noparallel", "noparallel" },
    { "", false, "plugin", NULL },
  };
  struct command_line cl;
  char line[200], *objection;
  bool failed;
  size_t i;
  int vouched;

  (void) state;
  for (i = 0; i < sizeof cases / sizeof cases[0]; ++i)
    for (vouched = 0; vouched <= 1; ++vouched) {
      const char *expected =
        vouched ? cases[i].vouched : cases[i].objection;

      print_message ("%s, vouched %d\n", cases[i].rest, vouched);
      snprintf (line, sizeof line, "nbdkit --filter=dirty-bitmap %s",
                cases[i].rest);
      assert_int_equal (parse (&cl, line), 0);
      objection = filter_stack_objection (&cl, cases[i].one_client, vouched,
                                          &failed);
      assert_false (failed);
      if (expected == NULL)
        assert_null (objection);
      else {
        assert_non_null (objection);
        assert_non_null (strstr (objection, expected));
      }
      free (objection);
      command_line_free (&cl);
    }
}

/* time-limit would end the connection that all clients share. */
static void
test_refused_filters (void **state)
{
  static const struct {
    const char *line;
    bool refused;
  } cases[] = {
    { "nbdkit --filter=dirty-bitmap --filter=time-limit file", true },
    { "nbdkit --filter=dirty-bitmap --filter=log --filter=time-limit file",
      true },
    { "nbdkit --filter=time-limit --filter=dirty-bitmap file", false },
    { "nbdkit --filter=dirty-bitmap --filter=exitlast file", false },
    { "nbdkit --filter=dirty-bitmap file", false },
  };
  struct command_line cl;
  size_t i;

  (void) state;
  for (i = 0; i < sizeof cases / sizeof cases[0]; ++i) {
    print_message ("%s\n", cases[i].line);
    nr_reports = 0;
    assert_int_equal (parse (&cl, cases[i].line), 0);
    assert_int_equal (filter_stack_refuse (&cl), cases[i].refused ? -1 : 0);
    assert_int_equal (nr_reports, cases[i].refused);
    command_line_free (&cl);
  }
}

static void
test_reopening (void **state)
{
  static const struct {
    const char *line;
    bool reopens;
  } cases[] = {
    { "nbdkit --filter=dirty-bitmap nbd", false },
    { "nbdkit --filter=dirty-bitmap --filter=retry-request nbd", false },
    { "nbdkit --filter=dirty-bitmap --filter=log --filter=retry nbd", true },
    { "nbdkit --filter=dirty-bitmap --filter=unheard nbd", true },
    { "nbdkit --filter=retry --filter=dirty-bitmap nbd", false },
  };
  struct command_line cl;
  size_t i;

  (void) state;
  for (i = 0; i < sizeof cases / sizeof cases[0]; ++i) {
    print_message ("%s\n", cases[i].line);
    assert_int_equal (parse (&cl, cases[i].line), 0);
    assert_true (filter_stack_is_nbd (&cl));
    assert_int_equal (filter_stack_reopens (&cl), cases[i].reopens);
    command_line_free (&cl);
  }
}

/* Plugins that serve what a client's export name says. */
static void
test_plugin_parameters (void **state)
{
  static const struct {
    const char *line, *key, *value;
    const char *error;          /* a part of it, or NULL */
  } cases[] = {
    { "nbdkit file", "dir", ".", "file=" },
    { "nbdkit file", "directory", ".", "file=" },
    { "nbdkit file", "dirfd", "3", "file=" },
    { "nbdkit ./nbdkit-file-plugin.so", "dir", ".", "file=" },
    { "nbdkit file", "file", "d", NULL },
    { "nbdkit floppy", "dir", ".", NULL },
    { "nbdkit nbd", "dynamic-export", "true", "export=" },
    { "nbdkit nbd", "dynamic-export", "ON", "export=" },
    { "nbdkit nbd", "dynamic-export", "false", NULL },
    { "nbdkit file", "dynamic-export", "true", NULL },
    { "nbdkit info", "mode", "time", "info" },
    { "nbdkit ondemand", "size", "1M", "ondemand" },
    { "nbdkit", "dir", ".", NULL },
  };
  struct command_line cl;
  size_t i;

  (void) state;
  for (i = 0; i < sizeof cases / sizeof cases[0]; ++i) {
    struct plugin_parameters p = { .names_folder = false };

    print_message ("%s %s=%s\n", cases[i].line, cases[i].key,
                   cases[i].value);
    nr_reports = 0;
    assert_int_equal (parse (&cl, cases[i].line), 0);
    plugin_parameters_note (&p, cases[i].key, cases[i].value);
    assert_int_equal (plugin_parameters_check (&p, &cl),
                      cases[i].error != NULL ? -1 : 0);
    assert_int_equal (nr_reports, cases[i].error != NULL);
    if (cases[i].error != NULL)
      assert_non_null (strstr (last_report, cases[i].error));
    command_line_free (&cl);
  }
}

static void
test_bytes (void **state)
{
  static const struct {
    const char *line;
    bool is_file;
    const char *changes;
    bool holds;
    unsigned nr_warnings;
  } cases[] = {
    { "nbdkit --filter=dirty-bitmap file", true, NULL, false, 0 },
    { "nbdkit --filter=dirty-bitmap /x/nbdkit-file-plugin.so",
      true, NULL, false, 0 },
    { "nbdkit --filter=dirty-bitmap /x/file", false, NULL, false, 0 },
    { "nbdkit --filter=dirty-bitmap nbd", false, NULL, false, 0 },
    { "nbdkit --filter=dirty-bitmap", false, NULL, false, 0 },
    { "nbdkit --filter=dirty-bitmap --filter=fua --filter=log file",
      true, NULL, false, 0 },
    { "nbdkit --filter=dirty-bitmap --filter=fua --filter=offset file",
      true, "offset", false, 0 },
    { "nbdkit --filter=offset --filter=cow --filter=dirty-bitmap file",
      true, NULL, false, 0 },
    { "nbdkit --filter=dirty-bitmap --filter=cow file", true, "cow", true, 0 },
    { "nbdkit --filter=dirty-bitmap --filter=readonly file",
      true, NULL, false, 0 },
    { "nbdkit --filter=dirty-bitmap --filter=map file", true, "map", false, 0 },
    { "nbdkit --filter=dirty-bitmap --filter=xor file", true, "xor", false, 0 },
    { "nbdkit --filter=dirty-bitmap --filter=indexed-gzip file",
      true, "indexed-gzip", false, 0 },
    { "nbdkit --filter=dirty-bitmap --filter=unheard file",
      true, "unheard", false, 0 },
    { "nbdkit --filter=dirty-bitmap --filter=exitlast file",
      true, NULL, false, 1 },
    { "nbdkit --filter=exitlast --filter=dirty-bitmap file",
      true, NULL, false, 0 },
    { "nbdkit --filter=./other.so --filter=fua file", true, "./other.so",
      false, 0 },
  };
  struct command_line cl;
  size_t i;

  (void) state;
  for (i = 0; i < sizeof cases / sizeof cases[0]; ++i) {
    print_message ("%s\n", cases[i].line);
    nr_reports = 0;
    assert_int_equal (parse (&cl, cases[i].line), 0);
    assert_int_equal (filter_stack_is_file (&cl), cases[i].is_file);
    assert_int_equal (filter_stack_holds_writes (&cl), cases[i].holds);
    if (cases[i].changes == NULL)
      assert_null (filter_stack_changes_bytes (&cl));
    else
      assert_string_equal (filter_stack_changes_bytes (&cl),
                           cases[i].changes);
    filter_stack_warn (&cl);
    assert_int_equal (nr_reports, cases[i].nr_warnings);
    command_line_free (&cl);
  }
}

static void
test_activation (void **state)
{
#define ACTIVATED(s, pid) \
  command_line_parse_activated (s, sizeof s - 1, pid)

  (void) state;
  assert_int_equal (ACTIVATED ("LISTEN_PID=12\0LISTEN_FDS=3\0", 12), 3);
  assert_int_equal (ACTIVATED ("A=b\0LISTEN_FDS=1\0C=\0LISTEN_PID=7\0", 7), 1);
  assert_int_equal (ACTIVATED ("LISTEN_PID=12\0LISTEN_FDS=3\0", 13), 0);
  assert_int_equal (ACTIVATED ("LISTEN_FDS=3\0", 13), 0);
  assert_int_equal (ACTIVATED ("LISTEN_PID=13\0", 13), 0);
  assert_int_equal (ACTIVATED ("LISTEN_PID=13\0LISTEN_FDS=-2\0", 13), 0);
  assert_int_equal (ACTIVATED ("LISTEN_PID=13\0LISTEN_FDS=9999999\0", 13), 0);
  assert_int_equal (ACTIVATED ("XLISTEN_PID=13\0XLISTEN_FDS=1\0", 13), 0);
  assert_int_equal (ACTIVATED ("", 13), 0);
}

/* Read from /proc what this process was started with. */
static void
test_read (void **state)
{
  struct command_line cl;

  (void) state;
  assert_int_equal (command_line_read (&cl), 0);
  assert_int_equal (cl.nr_filters, 0);
  assert_null (cl.plugin);
  assert_false (cl.readonly);
  command_line_free (&cl);
}

static void
test_selinux_label (void **state)
{
  struct command_line cl;

  (void) state;
  assert_int_equal (parse (&cl, "nbdkit --selinux-label a:b --selinux-label=c "
                           "file"), 0);
  assert_string_equal (cl.selinux_label, "c");
  command_line_free (&cl);
  assert_int_equal (parse (&cl, "nbdkit file"), 0);
  assert_null (cl.selinux_label);
  command_line_free (&cl);
}

#define TEST(f) cmocka_unit_test_setup (f, setup)

int
main (void)
{
  const struct CMUnitTest tests[] = {
    TEST (test_readonly_and_plugin),
    TEST (test_posixly_correct),
    TEST (test_unknown_options),
    TEST (test_getopt_is_put_back),
    TEST (test_server_feature),
    TEST (test_tls),
    TEST (test_selinux_label),
    TEST (test_limits),
    TEST (test_forks),
    TEST (test_where_nbdkit_listens),
    TEST (test_objections),
    TEST (test_vouching),
    TEST (test_refused_filters),
    TEST (test_reopening),
    TEST (test_plugin_parameters),
    TEST (test_bytes),
    TEST (test_activation),
    TEST (test_read),
  };

  return cmocka_run_group_tests (tests, NULL, NULL);
}
