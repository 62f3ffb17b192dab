/* nbdkit-dirty-bitmap-filter
 * SPDX-License-Identifier: BSD-3-Clause
 * Copyright the nbdkit-dirty-bitmap-filter authors
 */

#ifndef DIRTY_BITMAP_SETTINGS_H
#define DIRTY_BITMAP_SETTINGS_H

/* The parameters and nbdkit's command line, taken together. */

#include "nbd/nbd.h"

struct command_line;
struct parameters;

struct settings {
  const struct parameters *parameters;
  const struct command_line *command_line;
  const char *image_path;       /* file=, or NULL */
};

/* -1, with the reason reported, if the settings contradict each other.  Also
 * warns of unknown options where they matter.
 */
extern int settings_check (const struct settings *);

/* The same once the image, and all that it refers to, is locked: -1, with
 * the reason reported, if nbdkit would write to one of these files.
 */
extern int settings_check_locked (const struct settings *);

/* The limits for the clients of our server. */
extern struct nbd_limits settings_limits (const struct parameters *,
                                          const struct command_line *);

#endif /* DIRTY_BITMAP_SETTINGS_H */
