/* nbdkit-dirty-bitmap-filter
 * SPDX-License-Identifier: BSD-3-Clause
 * Copyright the nbdkit-dirty-bitmap-filter authors
 */

#ifndef DIRTY_BITMAP_FILTER_STACK_H
#define DIRTY_BITMAP_FILTER_STACK_H

/* What nbdkit's other filters, and its plugin, mean to ours. */

#include <stdbool.h>

struct command_line;

/* Why would it take something away that the user asked for, if our
 * server stood in for nbdkit's?  A clause; free it.  NULL if it would
 * not, and then *failed is false (true: out of memory, reported).
 *
 * one_client: the thread model is that of one connection at a time.
 * vouched: the user says that what we do not know judges no clients.
 */
extern char *filter_stack_objection (const struct command_line *,
                                     bool one_client, bool vouched,
                                     bool *failed);

/* Is the plugin nbdkit's file plugin, or its nbd plugin? */
extern bool filter_stack_is_file (const struct command_line *);
extern bool filter_stack_is_nbd (const struct command_line *);

/* Is it one that serves each client something else? */
extern bool filter_stack_serves_by_client (const struct command_line *);

/* Is there a filter below ours that may open the plugin anew? */
extern bool filter_stack_reopens (const struct command_line *);

/* Is a client to get one reply at a time, in the order of its requests,
 * because of a filter?
 */
extern bool filter_stack_keeps_order (const struct command_line *);

/* Is it so by its own name, and is there no filter between? */
extern bool filter_stack_is_plugin_alone (const struct command_line *);

/* Does nbdkit's retry filter lie below ours, which opens the plugin anew
 * whenever it likes?
 */
extern bool filter_stack_retries (const struct command_line *);

/* The name of a filter below ours that may show other bytes, or another
 * size, than the plugin's.  NULL if there is none.
 */
extern const char *filter_stack_changes_bytes (const struct command_line *);

/* Is there a filter below ours that keeps writes from the plugin? */
extern bool filter_stack_holds_writes (const struct command_line *);

/* May a filter above ours let nbdkit quit when a client has gone? */
extern bool filter_stack_may_quit (const struct command_line *);

/* The name of a filter below ours that sleeps, and cannot once nbdkit
 * quits.  NULL if there is none.
 */
extern const char *filter_stack_sleeper (const struct command_line *);

/* Warn of filters that do not work below ours. */
extern void filter_stack_warn (const struct command_line *);

/* -1, with the reason reported, if there is a filter below ours with
 * which nothing could be served for long.
 */
extern int filter_stack_refuse (const struct command_line *);

#endif /* DIRTY_BITMAP_FILTER_STACK_H */
