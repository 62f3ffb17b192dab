/* nbdkit-dirty-bitmap-filter
 * SPDX-License-Identifier: BSD-3-Clause
 * Copyright the nbdkit-dirty-bitmap-filter authors
 */

#ifndef DIRTY_BITMAP_SIGNALS_H
#define DIRTY_BITMAP_SIGNALS_H

/* The signals that end nbdkit, which this intercepts. */

#include <stdbool.h>

/* Replace nbdkit's handler with ours, for all signals that have it.  From
 * then on such a signal writes to fd, an eventfd, and nbdkit does not quit.
 * False if nbdkit's handler was not recognised: then nothing is changed.  In
 * after_fork.
 */
extern bool signals_take (int fd);

/* Put nbdkit's handler back.  In cleanup, by the main thread.  fd is no
 * longer used.
 */
extern void signals_give_back (void);

#endif /* DIRTY_BITMAP_SIGNALS_H */
