/* nbdkit-dirty-bitmap-filter
 * SPDX-License-Identifier: BSD-3-Clause
 * Copyright the nbdkit-dirty-bitmap-filter authors
 */

#ifndef DIRTY_BITMAP_PLUGIN_PARAMETERS_H
#define DIRTY_BITMAP_PLUGIN_PARAMETERS_H

/* What the parameters of the plugin mean for this filter, which opens the
 * plugin once for all clients, without an export name from a client.
 */

#include <stdbool.h>

struct command_line;

struct plugin_parameters {
  bool names_folder;            /* file dir=, or dirfd= */
  bool dynamic_export;          /* nbd dynamic-export=true */
};

/* Note a parameter that the filter passes on. */
extern void plugin_parameters_note (struct plugin_parameters *,
                                    const char *key, const char *value);

/* After the last parameter: -1, with the reason reported, if what the plugin
 * serves depends on the client.
 */
extern int plugin_parameters_check (const struct plugin_parameters *,
                                    const struct command_line *);

#endif /* DIRTY_BITMAP_PLUGIN_PARAMETERS_H */
