/* nbdkit-dirty-bitmap-filter
 * SPDX-License-Identifier: BSD-3-Clause
 * Copyright the nbdkit-dirty-bitmap-filter authors
 */

#ifndef DIRTY_BITMAP_SIGNALS_H
#define DIRTY_BITMAP_SIGNALS_H

/* The signals that end nbdkit, before nbdkit knows of them. */

#include <stdbool.h>

/* Put a handler of ours in the place of nbdkit's, for all signals that
 * have it.  From then on fd, an eventfd, is written to when one of them
 * comes, and nbdkit does not quit.  False if nbdkit's handler was not
 * recognised: then nothing is changed.  In after_fork.
 */
extern bool signals_take (int fd);

/* Put nbdkit's handler back.  In cleanup, by the main thread.  fd is not
 * used any more.
 */
extern void signals_give_back (void);

#endif /* DIRTY_BITMAP_SIGNALS_H */
