/* nbdkit-dirty-bitmap-filter
 * SPDX-License-Identifier: BSD-3-Clause
 * Copyright the nbdkit-dirty-bitmap-filter authors
 */

#ifndef DIRTY_BITMAP_PLUGIN_PARAMETERS_H
#define DIRTY_BITMAP_PLUGIN_PARAMETERS_H

/* What the parameters of the plugin mean to this filter, which opens the
 * plugin once, for all clients, and without a name that a client gave.
 */

#include <stdbool.h>

struct command_line;

struct plugin_parameters {
  bool names_folder;            /* file dir=, or dirfd= */
  bool dynamic_export;          /* nbd dynamic-export=true */
};

/* Note a parameter that passes by. */
extern void plugin_parameters_note (struct plugin_parameters *,
                                    const char *key, const char *value);

/* When all have passed by: -1, with the reason reported, if the plugin
 * serves what depends on the client.
 */
extern int plugin_parameters_check (const struct plugin_parameters *,
                                    const struct command_line *);

#endif /* DIRTY_BITMAP_PLUGIN_PARAMETERS_H */
