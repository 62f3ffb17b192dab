/* nbdkit-dirty-bitmap-filter
 * SPDX-License-Identifier: BSD-3-Clause
 * Copyright the nbdkit-dirty-bitmap-filter authors
 */

/* nbdkit's callbacks for the life of the filter.
 *
 * How this works
 *
 * In the order in which nbdkit calls them:
 *
 * config       parameters; those of the plugin that concern us are
 *              remembered as they pass by (image/image-file.c,
 *              nbdkit/plugin-parameters.c)
 * get_ready    all checks are made here, where the user sees an error and
 *              nbdkit exits with it: the image and the files that it refers
 *              to are locked and checked (storage.c), keys and certificates
 *              loaded, the listening address bound, and it is decided which
 *              server answers the clients
 * after_fork   the plugin is opened, unless its file is used directly, and
 *              the disk.  Either our server stands in for nbdkit's
 *              (nbdkit/sockets.c, and nbdkit/single.c for nbdkit -s), or
 *              nbdkit's own server answers (nbdkit/clients.c).  The control
 *              socket is served (control/).  A thread waits for what ends
 *              nbdkit, and then stops the servers, and writes what is in RAM
 *              (nbdkit/stop.c)
 * cleanup      waits for that thread, and closes the image
 * unload       if something could not be written, the process ends with
 *              an exit code that says so: cleanup has no other way, and
 *              to exit there would skip the cleanup of those below us
 *
 * The callbacks are called by nbdkit's main thread.
 */

#include <config.h>

#include <errno.h>
#include <inttypes.h>
#include <signal.h>
#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include <nbdkit-filter.h>

#include "common/cleanup.h"
#include "common/meter.h"
#include "common/report.h"
#include "control/control.h"
#include "disk/disk.h"
#include "nbd/nbd.h"
#include "nbdkit/clients.h"
#include "nbdkit/command-line.h"
#include "nbdkit/filter-stack.h"
#include "nbdkit/listen.h"
#include "nbdkit/loaded-objects.h"
#include "nbdkit/plugin-parameters.h"
#include "nbdkit/single.h"
#include "nbdkit/sockets.h"
#include "nbdkit/stop.h"
#include "nbdkit/tls-options.h"
#include "parameters.h"
#include "settings.h"
#include "stats/stats-file.h"
#include "stats/stats.h"
#include "storage.h"

/* How long the client of nbdkit -s may take to receive its last replies. */
#define SINGLE_GRACE_MS 300

static unsigned nr_loads;
static struct parameters parameters;
static struct plugin_parameters plugin_parameters;
static struct command_line command_line;
static bool has_command_line;
static struct storage storage = STORAGE_INITIAL;
static struct listen_sockets listen_sockets;
static bool stands_in;
static int thread_model;
static struct disk *disk;
static struct nbd_tls *tls;     /* or NULL: none */
static struct nbd_server *server;
static struct control *control; /* or NULL: not requested */
static struct listen_sockets control_sockets;
static struct stats *stats;     /* or NULL: not requested */
static bool failed;             /* to write at shutdown */

static void
send_report (enum report_level level, const char *fmt, va_list args)
{
  const int saved_errno = errno;
  CLEANUP_FREE char *warning = NULL;

  switch (level) {
  case REPORT_ERROR:
    nbdkit_verror (fmt, args);
    break;
  case REPORT_WARNING:
    if (asprintf (&warning, "warning: %s", fmt) == -1)
      warning = NULL;
    errno = saved_errno;
    nbdkit_verror (warning != NULL ? warning : fmt, args);
    break;
  case REPORT_DEBUG:
    nbdkit_vdebug (fmt, args);
    break;
  }
}

static void
dirty_bitmap_load (void)
{
  report_sink = send_report;
  nbdkit_debug ("nbdkit-dirty-bitmap-filter " PACKAGE_VERSION);
  nr_loads++;
}

/* Read the command line when it is first needed. */
static int
know_command_line (void)
{
  if (has_command_line)
    return 0;
  if (command_line_read (&command_line) == -1)
    return -1;
  has_command_line = true;
  if (command_line.is_ambiguous)
    return loaded_objects_name (&command_line);
  return 0;
}

/* Before the first parameter of the plugin.  Below us the nbd plugin has one
 * connection in any case.  With shared=true it does not ask for the export
 * name of a client, which nbdkit reports as an error if there is none.  But
 * then it never reconnects, which retry needs.
 */
static int
prepare_plugin (nbdkit_next_config *next, nbdkit_backend *nxdata)
{
  static bool is_prepared;

  if (is_prepared)
    return 0;
  is_prepared = true;
  if (know_command_line () == -1)
    return -1;
  if (filter_stack_is_nbd (&command_line) &&
      !filter_stack_reopens (&command_line))
    return next (nxdata, "shared", "true");
  return 0;
}

static int
dirty_bitmap_config (nbdkit_next_config *next, nbdkit_backend *nxdata,
                     const char *key, const char *value)
{
  const int r = parameters_take (&parameters, key, value);

  if (r != 0)
    return r == -1 ? -1 : 0;
  if (prepare_plugin (next, nxdata) == -1)
    return -1;
  plugin_parameters_note (&plugin_parameters, key, value);
  if (image_file_remember (&storage.file, key, value) == -1)
    return -1;
  return next (nxdata, key, value);
}

static int
dirty_bitmap_config_complete (nbdkit_next_config_complete *next,
                              nbdkit_backend *nxdata)
{
  /* nbdkit has one copy of the variables for both. */
  if (nr_loads > 1) {
    nbdkit_error ("--filter=dirty-bitmap can only appear once "
                  "on the command line");
    return -1;
  }
  if (parameters_complete (&parameters) == -1 ||
      know_command_line () == -1 ||
      plugin_parameters_check (&plugin_parameters, &command_line) == -1)
    return -1;
  return next (nxdata);
}

static struct export_options
get_export_options (void)
{
  return (struct export_options) {
    .name = parameters.exportname,
    .description = parameters.description,
    .list_deltas = parameters.list_deltas,
  };
}

/* nbdkit's own server will answer, although the user did not choose that. */
static int
cannot_stand_in (const char *why)
{
  if (parameters.server != SERVER_AUTO) {
    nbdkit_error ("dirty-bitmap-server=%s: cannot stand in for nbdkit's "
                  "server: %s",
                  parameters.server == SERVER_ON ? "on" : "force", why);
    return -1;
  }
  nbdkit_error ("warning: nbdkit's own server cannot show clients the dirty "
                "bitmaps, and it was not replaced: %s", why);
  stands_in = false;
  return 0;
}

static int
decide_who_answers (void)
{
  CLEANUP_FREE char *objection = NULL;
  bool no_memory;

  stands_in = parameters.server != SERVER_OFF;
  if (!stands_in)
    return 0;
  objection =
    filter_stack_objection (&command_line,
                            thread_model ==
                            NBDKIT_THREAD_MODEL_SERIALIZE_CONNECTIONS,
                            parameters.server == SERVER_FORCE, &no_memory);
  if (no_memory)
    return -1;
  return objection != NULL ? cannot_stand_in (objection) : 0;
}

static int
check_exit_last (void)
{
  if (!parameters.exit_last || stands_in)
    return 0;
  nbdkit_error ("dirty-bitmap-exit-last: requires the filter's own server in "
                "place of nbdkit's");
  return -1;
}

/* Does our server stand in for nbdkit -s? */
static bool
serves_single (void)
{
  return stands_in && command_line.listens_on_stdin;
}

static int
prepare_stats (void)
{
  if (parameters.stats != NULL &&
      stats_file_prepare (parameters.stats) == -1)
    return -1;
  meter_is_on = true;
  stats = stats_new ();
  if (stats == NULL) {
    nbdkit_error ("statistics: %m");
    return -1;
  }
  clients_count (stats);
  return 0;
}

static void
unlink_sockets (void)
{
  listen_unlink (&listen_sockets);
  listen_unlink (&control_sockets);
}

static int
open_sockets (void)
{
  const char *label = command_line.selinux_label;

  if (parameters.listens &&
      listen_open (&parameters.listen, label, &listen_sockets) == -1)
    return -1;
  if (parameters.is_controlled &&
      listen_open (&parameters.control, label, &control_sockets) == -1) {
    unlink_sockets ();
    return -1;
  }
  listen_unlink_at_exit (&listen_sockets, command_line.forks);
  listen_unlink_at_exit (&control_sockets, command_line.forks);
  return 0;
}

static int
dirty_bitmap_get_ready (int model)
{
  const struct settings settings = {
    .parameters = &parameters,
    .command_line = &command_line,
    .image_path = storage.file.path,
  };

  thread_model = model;
  if (filter_stack_refuse (&command_line) == -1 ||
      settings_check (&settings) == -1)
    return -1;
  if (command_line.debug_request != 0)
    dirty_bitmap_debug_request = command_line.debug_request;
  if (decide_who_answers () == -1 || check_exit_last () == -1)
    return -1;
  filter_stack_warn (&command_line);

  /* Before the image: if a key is missing, the image is not touched. */
  if ((stands_in || parameters.listens) &&
      tls_options_load (&command_line.tls, &tls) == -1)
    return -1;

  storage.parameters = &parameters;
  storage.command_line = &command_line;
  if (storage_prepare (&storage) == -1 ||
      settings_check_locked (&settings) == -1)
    return -1;
  if ((parameters.stats != NULL || parameters.is_controlled) &&
      prepare_stats () == -1)
    return -1;

  /* Last, so that no error of ours leaves a Unix socket behind. */
  if (open_sockets () == -1)
    return -1;
  if (sockets_note_others (&command_line) == -1 ||
      (serves_single () && single_take () == -1)) {
    unlink_sockets ();
    return -1;
  }
  return 0;
}

static int
open_disk (nbdkit_backend *backend)
{
  const struct export_options exports = get_export_options ();

  disk = storage_open (&storage, backend,
                       thread_model < NBDKIT_THREAD_MODEL_PARALLEL);
  if (disk == NULL)
    return -1;
  clients_start (disk, &exports);
  if (filter_stack_may_quit (&command_line))
    clients_store_when_left (stop_store);
  return 0;
}

/* Give our server its sockets. */
static int
add_sockets (void)
{
  size_t i;

  if (single_is_taken ()) {
    if (single_serve (server) == -1)
      return -1;
  }
  else if (stands_in && sockets_take_over (server) == -1)
    return -1;
  for (i = 0; i < listen_sockets.nr; ++i) {
    const int fd = listen_sockets.fd[i];

    listen_sockets.fd[i] = -1;
    if (nbd_server_add_socket (server, fd) == -1) {
      nbdkit_error ("dirty-bitmap-listen: %m");
      return -1;
    }
  }
  return 0;
}

static int
start_server (void)
{
  const struct nbd_options options = {
    .readonly = disk_is_readonly (disk),
    .export = get_export_options (),
    .tls = tls,
    .limits = settings_limits (&parameters, &command_line),
    .stats = stats,
    .last_left = parameters.exit_last ? stop_ask : NULL,
  };

  server = nbd_server_new (disk, &options);
  if (server == NULL) {
    nbdkit_error ("cannot make a server: %m");
    return -1;
  }
  if (add_sockets () == -1)
    return -1;
  if (nbd_server_start (server) == -1) {
    nbdkit_error ("cannot start the server: %m");
    return -1;
  }
  return 0;
}

static int
start_control (void)
{
  const struct control_options options = {
    .disk = disk,
    .stats = stats,
    .exports = get_export_options (),
    .node = parameters.node != NULL ? parameters.node : CONTROL_DEFAULT_NODE,
    .image = storage_name (&storage),
    .quit = stop_ask,
  };
  const int fd = control_sockets.fd[0];

  control_sockets.fd[0] = -1;
  control = control_new (&options, fd);
  if (control == NULL) {
    nbdkit_error ("dirty-bitmap-control: %m");
    return -1;
  }
  return control_start (control);
}

/* Called when the process ends and cleanup will not be called. */
static void
leave_nothing_behind (void)
{
  unlink_sockets ();
  stats_file_stop ();
  report_limits_end ();
}

static int
start_serving (nbdkit_backend *backend)
{
  const int nr_sockets = sockets_find (&command_line);
  struct stop_options stop_options;

  if (nr_sockets == -1)
    return -1;
  if (stands_in && nr_sockets == 0 && !single_is_taken () &&
      cannot_stand_in ("its listening sockets were not found") == -1)
    return -1;
  if (open_disk (backend) == -1)
    return -1;
  if ((stands_in || parameters.listens) && start_server () == -1)
    return -1;
  if (parameters.stats != NULL &&
      stats_file_start (stats, disk, parameters.stats_interval) == -1)
    return -1;

  if (parameters.is_controlled && start_control () == -1)
    return -1;

  stop_options = (struct stop_options) {
    .disk = disk,
    .server = server,
    .control = control,
    .nbdkit_answers = !stands_in,
    .sleeper = filter_stack_sleeper (&command_line),
    .give_up = leave_nothing_behind,
  };
  return stop_start (&stop_options);
}

/* Undo what start_serving did before it failed: nbdkit is about to exit and
 * does not call us any more.
 */
static void
give_up_serving (void)
{
  stop_finish ();
  if (server != NULL)
    nbd_server_stop (server, 0);
  if (control != NULL)
    control_stop (control, 0);
  single_stop (0);
  if (disk != NULL)
    disk_stop (disk);
  unlink_sockets ();
}

static int
dirty_bitmap_after_fork (nbdkit_backend *backend)
{
  struct sigaction sa;

  listen_serves ();

  /* A write beyond a limit of the process must be an error of that write,
   * not the end of the server and the loss of what it has in RAM.
   */
  if (sigaction (SIGXFSZ, NULL, &sa) == 0 && sa.sa_handler == SIG_DFL)
    signal (SIGXFSZ, SIG_IGN);

  if (start_serving (backend) == 0) {
    nbdkit_debug ("serving %" PRIu64 " bytes, %s, %s", disk_size (disk),
                  disk_is_readonly (disk) ? "read-only" : "read-write",
                  stands_in ? "standing in for nbdkit's server"
                            : "through nbdkit's server");
    return 0;
  }
  give_up_serving ();
  return -1;
}

static int
dirty_bitmap_preconnect (nbdkit_next_preconnect *next,
                         nbdkit_backend *nxdata, int readonly)
{
  if (!single_is_taken ())
    return next (nxdata, readonly);
  single_wait ();
  return -1;
}

static void
dirty_bitmap_cleanup (nbdkit_backend *backend)
{
  (void) backend;
  failed = stop_finish () == -1;
  if (failed)
    nbdkit_error ("could not write everything at shutdown: "
                  "incomplete dirty bitmaps stay marked as in use");
  nbd_server_free (server);
  server = NULL;
  control_free (control);
  control = NULL;
  single_stop (SINGLE_GRACE_MS);
  unlink_sockets ();
  stats_file_stop ();
  disk_close (disk);
  disk = NULL;
  storage_close_disk (&storage, !failed);
  report_limits_end ();
}

static void
dirty_bitmap_unload (void)
{
  storage_free (&storage);
  listen_close (&listen_sockets);
  listen_close (&control_sockets);
  sockets_free ();
  nbd_tls_free (tls);
  stats_file_free ();
  stats_free (stats);
  parameters_free (&parameters);
  command_line_free (&command_line);
  report_sink = NULL;
  if (failed)
    exit (EXIT_FAILURE);
}

static struct nbdkit_filter filter = {
  .name = "dirty-bitmap",
  .longname = "nbdkit dirty bitmap filter",
  .description = "Serve a qcow2 image and record changes in its dirty "
                 "bitmaps.",
  .load = dirty_bitmap_load,
  .unload = dirty_bitmap_unload,
  .config = dirty_bitmap_config,
  .config_complete = dirty_bitmap_config_complete,
  .config_help = parameters_help,
  .get_ready = dirty_bitmap_get_ready,
  .after_fork = dirty_bitmap_after_fork,
  .cleanup = dirty_bitmap_cleanup,
  .preconnect = dirty_bitmap_preconnect,
};

/* The callbacks of requests are in nbdkit/clients.c, and must be in the struct
 * before nbdkit copies it.
 */
__attribute__ ((constructor))
static void
set_callbacks (void)
{
  clients_set_callbacks (&filter);
}

NBDKIT_REGISTER_FILTER (filter)
