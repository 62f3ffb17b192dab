/* nbdkit-dirty-bitmap-filter
 * SPDX-License-Identifier: BSD-3-Clause
 * Copyright the nbdkit-dirty-bitmap-filter authors
 */

/* The plugin and the filters, by what nbdkit has loaded.
 *
 * How this works
 *
 * nbdkit loads the plugin first, and then the filters from the innermost to
 * the outermost.  The dynamic linker keeps its list of objects in the order
 * in which they were loaded.  So the objects in that list that define
 * plugin_init and filter_init are the plugin and the filters, whatever the
 * command line means.
 *
 * A filter that was named twice is loaded once, and has its innermost place
 * here.  A filter matters most below ours, so this errs on the safe side.
 * The cc plugin loads the plugin that it has compiled after all filters, so
 * the first plugin in the list counts.
 *
 * The paths are the linker's, and last as long as the objects are loaded.
 * dlopen cannot be called while the linker walks its list, so there are two
 * steps.
 */

#include <config.h>

#include <dlfcn.h>
#include <link.h>
#include <stdbool.h>
#include <stdlib.h>

#include "common/cleanup.h"
#include "common/report.h"
#include "nbdkit/command-line.h"
#include "nbdkit/loaded-objects.h"

struct paths {
  const char **path;
  size_t nr;
  bool no_memory;
};

static int
take_path (struct dl_phdr_info *info, size_t size, void *opaque)
{
  struct paths *paths = opaque;
  const char **larger;

  (void) size;
  if (info->dlpi_name == NULL || info->dlpi_name[0] == '\0')
    return 0;                   /* nbdkit itself */
  larger = realloc (paths->path, (paths->nr + 1) * sizeof *larger);
  if (larger == NULL) {
    paths->no_memory = true;
    return 1;
  }
  paths->path = larger;
  paths->path[paths->nr++] = info->dlpi_name;
  return 0;
}

static bool
defines (const char *path, const char *symbol)
{
  void *object = dlopen (path, RTLD_LAZY | RTLD_NOLOAD);
  bool r;

  if (object == NULL)
    return false;               /* The kernel's vDSO is no file. */
  r = dlsym (object, symbol) != NULL;
  dlclose (object);
  return r;
}

int
loaded_objects_name (struct command_line *cl)
{
  struct paths paths = { .nr = 0 };
  CLEANUP_FREE const char **filters = NULL;
  const char **swap;
  size_t i, nr_filters = 0;

  dl_iterate_phdr (take_path, &paths);
  CLEANUP_FREE const char **path = paths.path;
  if (!paths.no_memory)
    filters = calloc (paths.nr + 1, sizeof *filters);
  if (filters == NULL) {
    report_error ("malloc: %m");
    return -1;
  }

  cl->plugin = NULL;
  for (i = 0; i < paths.nr; ++i)
    if (cl->plugin == NULL && defines (path[i], "plugin_init"))
      cl->plugin = path[i];
  for (i = paths.nr; i > 0; --i)
    if (defines (path[i - 1], "filter_init"))
      filters[nr_filters++] = path[i - 1];

  swap = cl->filters;
  cl->filters = filters;
  cl->nr_filters = nr_filters;
  filters = swap;               /* to be freed */
  return 0;
}
