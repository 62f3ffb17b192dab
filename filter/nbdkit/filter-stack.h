/* nbdkit-dirty-bitmap-filter
 * SPDX-License-Identifier: BSD-3-Clause
 * Copyright the nbdkit-dirty-bitmap-filter authors
 */

#ifndef DIRTY_BITMAP_FILTER_STACK_H
#define DIRTY_BITMAP_FILTER_STACK_H

/* What nbdkit's other filters and its plugin mean for this filter. */

#include <stdbool.h>

struct command_line;

/* If our server stood in for nbdkit's, why would that disable something that
 * the user asked for?  A clause, for the caller to free.  NULL if it would
 * not, and then *failed is false (true: out of memory, reported).
 *
 * one_client: the thread model is one connection at a time.
 * vouched: the user says that unknown filters and plugins do not judge
 * clients.
 */
extern char *filter_stack_objection (const struct command_line *,
                                     bool one_client, bool vouched,
                                     bool *failed);

/* Is the plugin nbdkit's file plugin, or its nbd plugin? */
extern bool filter_stack_is_file (const struct command_line *);
extern bool filter_stack_is_nbd (const struct command_line *);

/* Does the plugin serve each client something different? */
extern bool filter_stack_serves_by_client (const struct command_line *);

/* Is there a filter below ours that may reopen the plugin? */
extern bool filter_stack_reopens (const struct command_line *);

/* Does a filter require that a client gets one reply at a time, in the order
 * of its requests?
 */
extern bool filter_stack_keeps_order (const struct command_line *);

/* Is it the file plugin, given by its short name, with no filter between? */
extern bool filter_stack_is_plugin_alone (const struct command_line *);

/* Is nbdkit's retry filter below ours?  It reopens the plugin at any time. */
extern bool filter_stack_retries (const struct command_line *);

/* The name of a filter below ours that may show other bytes, or another
 * size, than the plugin.  NULL if there is none.
 */
extern const char *filter_stack_changes_bytes (const struct command_line *);

/* Is there a filter below ours that keeps writes from the plugin? */
extern bool filter_stack_holds_writes (const struct command_line *);

/* May a filter above ours let nbdkit quit when a client has disconnected? */
extern bool filter_stack_may_quit (const struct command_line *);

/* The name of a filter below ours that sleeps, which it cannot once nbdkit
 * quits.  NULL if there is none.
 */
extern const char *filter_stack_sleeper (const struct command_line *);

/* Warn of filters that do not work below ours. */
extern void filter_stack_warn (const struct command_line *);

/* -1, with the reason reported, if there is a filter below ours that would
 * soon make serving impossible.
 */
extern int filter_stack_refuse (const struct command_line *);

#endif /* DIRTY_BITMAP_FILTER_STACK_H */
