/* nbdkit-dirty-bitmap-filter
 * SPDX-License-Identifier: BSD-3-Clause
 * Copyright the nbdkit-dirty-bitmap-filter authors
 */

/* Plugins that cannot be opened before there is a client.
 *
 * How this works
 *
 * Some plugins choose what they serve by the export name of the client.
 * This filter opens the plugin before there is a client.  nbdkit before 1.44
 * then gives the plugin no name at all, instead of an empty one: the file
 * plugin crashes, the nbd plugin aborts, others end with an error that does
 * not name the cause.  So these plugins are refused, by their parameters or
 * by their names, before they see the end of their parameters.
 */

#include <config.h>

#include <stddef.h>
#include <string.h>
#include <strings.h>

#include "common/report.h"
#include "nbdkit/command-line.h"
#include "nbdkit/filter-stack.h"
#include "nbdkit/plugin-parameters.h"

void
plugin_parameters_note (struct plugin_parameters *p,
                        const char *key, const char *value)
{
  /* The values that mean true to nbdkit_parse_bool. */
  static const char *const true_words[] = {
    "1", "true", "t", "yes", "y", "on"
  };
  size_t i;

  if (strcmp (key, "dir") == 0 || strcmp (key, "directory") == 0 ||
      strcmp (key, "dirfd") == 0)
    p->names_folder = true;
  if (strcmp (key, "dynamic-export") == 0) {
    p->dynamic_export = false;
    for (i = 0; i < sizeof true_words / sizeof true_words[0]; ++i)
      if (strcasecmp (value, true_words[i]) == 0)
        p->dynamic_export = true;
  }
}

int
plugin_parameters_check (const struct plugin_parameters *p,
                         const struct command_line *cl)
{
  if (filter_stack_is_file (cl) && p->names_folder) {
    report_error ("the file plugin serves one file to all clients "
                  "below --filter=dirty-bitmap, not a folder of files: "
                  "name the image by file=");
    return -1;
  }
  if (filter_stack_is_nbd (cl) && p->dynamic_export) {
    report_error ("dynamic-export: the nbd plugin is connected once for all "
                  "clients below --filter=dirty-bitmap: "
                  "name the export by export=");
    return -1;
  }
  if (filter_stack_serves_by_client (cl)) {
    report_error ("the plugin %s serves each client something different, "
                  "but --filter=dirty-bitmap opens it once for all clients",
                  cl->plugin);
    return -1;
  }
  return 0;
}
