/* nbdkit-dirty-bitmap-filter
 * SPDX-License-Identifier: BSD-3-Clause
 * Copyright the nbdkit-dirty-bitmap-filter authors
 */

#ifndef DIRTY_BITMAP_COMMAND_LINE_H
#define DIRTY_BITMAP_COMMAND_LINE_H

/* What nbdkit was told on its command line, and does not tell filters. */

#include <stdbool.h>
#include <stddef.h>

/* What the --tls options ask for.  nbdkit's TLS is "on" if none is given,
 * which has no effect if there are neither keys nor certificates.
 */
enum tls_mode { TLS_ON, TLS_OFF, TLS_REQUIRE };

struct command_line_tls {
  enum tls_mode mode;
  const char *certificates;     /* a directory; or NULL */
  const char *psk;              /* a file of keys; or NULL */
  const char *priority;         /* or NULL */
  bool verify_peer;
};

struct command_line {
  bool readonly;                /* -r; or assumed (assumes_readonly) */
  bool listens_on_stdin;        /* -s */
  bool forks;                   /* nbdkit continues in a child: no -f, or
                                   --run */

  /* Where nbdkit listens: on a Unix socket (its path as given, or NULL if
   * nbdkit chooses one), on TCP or vsock (the port as given, or NULL).  With
   * --run and neither, it depends on the version.
   */
  bool on_unix, on_tcp, on_vsock;
  const char *unix_path;
  const char *port;

  const char *selinux_label;    /* of nbdkit's sockets, or NULL */
  const char *pid_file;         /* -P, or NULL */
  const char *log_file;         /* --log=/PATH, or NULL */

  unsigned threads;             /* -t, or 0 */
  unsigned timeout_seconds;     /* --timeout, rounded up, or 0 */

  struct command_line_tls tls;

  /* -D dirty_bitmap.request=N, or 0.  nbdkit takes only flags with the name
   * of the filter, which has a dash, and leaves this one to us.
   */
  int debug_request;

  /* A feature of nbdkit's protocol server that the user asked for and ours
   * lacks, as a clause ("--timeout was given"); NULL if none.
   */
  const char *server_feature;

  /* Filters as they were named, outermost first, and the plugin (NULL if
   * none was named).
   */
  const char **filters;
  size_t nr_filters;
  const char *plugin;

  /* The first option that is not known here ("--frobnicate"), or "".  If
   * is_ambiguous, its value may be the next argument, and everything here
   * may be wrong except readonly, which is true if there may have been a -r
   * (then assumes_readonly is true, too).  The caller must then get the
   * filters and the plugin from loaded_objects_name.
   */
  char unknown_option[64];
  bool is_ambiguous;
  bool assumes_readonly;

  char feature[128];            /* room for server_feature */
  char *storage;                /* the memory of the strings */
  char **argv;
};

/* Read and parse the command line of this process.  -1, with the reason
 * reported, if it cannot be read.
 */
extern int command_line_read (struct command_line *);

/* The same from arguments.  The result keeps pointers into them.  -1, with
 * the reason reported.
 */
extern int command_line_parse (struct command_line *, int argc, char **argv);

extern void command_line_free (struct command_line *);

/* The number of listening sockets, from descriptor 3 on, that this process
 * was given at its start (systemd's socket activation); 0 if none.
 */
extern unsigned command_line_nr_activated (void);

/* The same from an environment block of NUL-terminated strings. */
extern unsigned command_line_parse_activated (const char *environment,
                                              size_t len, long pid);

#endif /* DIRTY_BITMAP_COMMAND_LINE_H */
