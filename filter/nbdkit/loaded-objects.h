/* nbdkit-dirty-bitmap-filter
 * SPDX-License-Identifier: BSD-3-Clause
 * Copyright the nbdkit-dirty-bitmap-filter authors
 */

#ifndef DIRTY_BITMAP_LOADED_OBJECTS_H
#define DIRTY_BITMAP_LOADED_OBJECTS_H

/* The plugin and the filters, by what nbdkit has loaded.  For a command line
 * whose meaning is not certain.
 */

struct command_line;

/* Get the filters and the plugin from the objects that nbdkit has loaded,
 * instead of from the command line.  Call it once all filters are loaded.
 * -1, with the reason reported, on error.
 */
extern int loaded_objects_name (struct command_line *);

#endif /* DIRTY_BITMAP_LOADED_OBJECTS_H */
