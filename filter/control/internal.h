/* nbdkit-dirty-bitmap-filter
 * SPDX-License-Identifier: BSD-3-Clause
 * Copyright the nbdkit-dirty-bitmap-filter authors
 */

#ifndef DIRTY_BITMAP_CONTROL_INTERNAL_H
#define DIRTY_BITMAP_CONTROL_INTERNAL_H

/* The room's files:
 *
 *   socket.c          the thread: clients come and go, are read and written
 *   json-stream.c     from bytes to JSON values
 *   qmp.c             from a value to a command, from a result to a reply
 *   arguments.c       whether a command's arguments are those that it takes
 *   commands.c        the table of commands, and those about QMP itself
 *   query-block.c     query-block and query-named-block-nodes
 *   query-stats.c     query-stats
 *   backup.c          backups and the gate
 *   change-bitmaps.c  the block-dirty-bitmap commands
 *   transaction.c     transaction
 *   views.c           views of backups, as the thread watches them
 *
 * All of it is run by the thread, but for the functions of control.h.
 * control->lock is the only lock, protects what says so, and no other is
 * taken while it is held.
 */

#include <pthread.h>
#include <stdatomic.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include <jansson.h>

#include "control/control.h"
#include "control/json-stream.h"
#include "disk/change.h"

#define MAX_CLIENTS 4

/* What a client sends is taken in parts of so much. */
#define INPUT_BYTES 16384

struct client {
  int fd;                       /* -1: there is none */
  bool is_negotiated;           /* qmp_capabilities has succeeded */

  struct json_stream stream;

  /* input[taken, received) was received and is not in the stream yet. */
  char input[INPUT_BYTES];
  size_t taken, received;
  bool has_ended;               /* the client sends no more */

  /* output[sent, nr_output) is not sent yet.  There is room for max_output
   * bytes.
   */
  char *output;
  size_t sent, nr_output, max_output;
  size_t event_bytes;           /* of events in it, since it was last empty */
  bool is_broken;               /* the client is to be disconnected */
};

struct watch;                   /* a view (views.c) */

enum control_gate {
  GATE_OPEN,
  GATE_CLOSED,
  GATE_EXPIRED,                 /* it is open, but not by gate-open */
};

struct control {
  struct control_options options;
  int listen_fd;
  int wake_fd;                  /* an eventfd, for control_begin_stop */
  struct client clients[MAX_CLIENTS];
  enum control_gate gate;
  struct client *gate_client;   /* that has closed the gate */
  int64_t gate_until_ms;        /* until when it may be closed, in now_ms */
  struct watch *views;          /* that exist */
  int64_t views_seen_ms;        /* when the disk was last asked for them, in
                                   now_ms */
  bool quit_asked;              /* a client has sent the command quit */
  bool quit_told;               /* options.quit was called */
  pthread_t thread;
  bool started;                 /* for the functions of control.h alone */

  atomic_bool stopping;
  int64_t cut_at_ms;            /* in now_ms; set before stopping */

  pthread_mutex_t lock;         /* protects has_ended */
  pthread_cond_t ended;
  bool has_ended;               /* the thread is done with the disk */
};

/* A command that is being executed. */
struct call {
  struct control *control;
  struct client *client;
  const struct command *command;
  json_t *arguments;            /* an object, checked */

  const char *class;            /* of the error, or NULL: none */
  char *error;                  /* its text */
};

#define GENERIC_ERROR "GenericError"
#define COMMAND_NOT_FOUND "CommandNotFound"

/* The call fails: returns NULL, for the caller to return. */
extern json_t *call_fail (struct call *, const char *class,
                          const char *fmt, ...)
  __attribute__ ((format (printf, 3, 4)));

enum argument_type {
  ARGUMENT_STRING,
  ARGUMENT_BOOL,
  ARGUMENT_UINT32,
  ARGUMENT_STRINGS,             /* an array of strings */
  ARGUMENT_ARRAY,
  ARGUMENT_OBJECT,
};

struct argument {
  const char *name;             /* NULL ends a list of them */
  enum argument_type type;
  bool is_optional;

  /* Check a string, or each element of an array, further: -1 after call_fail.
   * where is its name for the error, as "actions[0]".
   */
  int (*check) (struct call *, const json_t *value, const char *where);

  const struct argument *members; /* of an object; NULL: it has none */
};

struct command {
  const char *name;
  const struct argument *arguments; /* or NULL: it takes none */

  /* Execute it.  Returns a new reference; or NULL, after call_fail, or else
   * because memory is short.
   */
  json_t *(*run) (struct call *);
};

/* arguments.c: check an object, as QEMU does: its members by their order in
 * the list, then for those that are not in it.  -1 after call_fail.  where is
 * put before the names in the error, as in "actions[0].data.", or "".
 */
extern int arguments_check (struct call *, const struct argument *,
                            const json_t *object, const char *where);

/* The same for a value inside the arguments, which has to be an object.  where
 * is its own name, as "actions[0]".
 */
extern int arguments_check_object (struct call *, const struct argument *,
                                   const json_t *value, const char *where);
extern int arguments_check_string (struct call *, const json_t *value,
                                   const char *where);

/* socket.c: send an event to each client that has negotiated.  data is a new
 * reference, or NULL if memory is short.
 */
extern void control_send_event (struct control *, const char *name,
                                json_t *data);

/* qmp.c */

/* The reply to what a client sent: a new reference, or NULL if memory is
 * short.
 */
extern json_t *qmp_answer (struct control *, struct client *,
                           const json_t *request);
extern json_t *qmp_error (const char *class, const char *text);
extern json_t *qmp_greeting (void);
extern json_t *qmp_event (const char *name, json_t *data);

/* A string of any bytes: those that are not UTF-8 become U+FFFD, as in
 * QEMU.
 */
extern json_t *qmp_string (const char *);

/* The same of a name with a prefix. */
extern json_t *qmp_string_of (const char *prefix, const char *name);

/* commands.c */
extern const struct command control_commands[];
extern const struct command *command_find (const char *name, size_t length);
extern json_t *command_capabilities (struct call *);
extern json_t *command_version (void);

/* query-block.c */
extern json_t *command_query_block (struct call *);
extern json_t *command_query_named_block_nodes (struct call *);

/* query-stats.c */
extern json_t *command_query_stats (struct call *);

/* change-bitmaps.c */

/* What a command or a transaction does, action by action. */
struct change {
  struct disk_action *actions;
  size_t nr;
  struct watch *views;          /* of backups that begin */

  /* What the first action has done, after change_end. */
  enum bitmap_backup_action done;
  uint64_t dirty_bytes;
};

/* Of so many actions at most.  -1 if memory is short. */
extern int change_begin (struct change *, size_t max);

/* Append an action by the command's name and its arguments, which were
 * checked.  -1 after call_fail if it cannot be carried out.
 */
extern int change_append (struct call *, struct change *, const char *name,
                          const json_t *arguments);

/* Carry the actions out, and free them.  If one could not be appended
 * (after call_fail), find out instead whether one before it fails, too: then
 * that is the call's error.  Returns what the command returns.
 */
extern json_t *change_end (struct call *, struct change *);

/* All of this for a command that is one action. */
extern json_t *change_run (struct call *, struct change *);

extern json_t *command_change_bitmap (struct call *);
extern const struct argument add_arguments[];
extern const struct argument change_arguments[];
extern const struct argument merge_arguments[];

/* backup.c */
extern json_t *command_backup_begin (struct call *);
extern json_t *command_backup_end (struct call *);
extern json_t *command_backup_list (struct call *);
extern json_t *command_gate_close (struct call *);
extern json_t *command_gate_open (struct call *);
extern const struct argument backup_begin_arguments[];
extern const struct argument backup_end_arguments[];
extern const struct argument gate_close_arguments[];

/* Read the arguments of the first two.  -1 after call_fail.  If the backup is
 * to have a view, it is noted in a list (views_note).
 */
extern int backup_read_begin (struct call *, const json_t *arguments,
                              struct disk_action *, struct watch **);
extern void backup_read_end (const json_t *arguments, struct disk_action *);

/* Open the gate if its time is over or its client is gone.  Returns how many
 * milliseconds may pass until the next call, or -1: any number.
 */
extern int backup_gate_turn (struct control *);

/* Open the gate, if it is closed. */
extern void backup_gate_expire (struct control *);

/* transaction.c */
extern json_t *command_transaction (struct call *);
extern const struct argument transaction_arguments[];

/* views.c */

/* Note a view that is to be, for views_watch or views_forget.  fail_after is
 * in seconds, or 0: the backup may be without clients for any time.  -1 if
 * memory is short.
 */
extern int views_note (struct watch **list, const char *name,
                       uint32_t fail_after);
extern void views_forget (struct watch **list);

/* These views exist from now on. */
extern void views_watch (struct control *, struct watch **list);

/* Tell clients which views have broken or ended since the last time. */
extern void views_look (struct control *);

/* Do that if it is time, and end a backup of which no client has had the view
 * open for too long.  Returns as backup_gate_turn.
 */
extern int views_turn (struct control *);

/* The name of a view's export. */
extern json_t *views_export (const char *name);

/* Add the views to the result of backup-list.  -1 if memory is short. */
extern int views_add_to_backups (struct control *, json_t *list);

#endif /* DIRTY_BITMAP_CONTROL_INTERNAL_H */
