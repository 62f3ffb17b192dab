/* nbdkit-dirty-bitmap-filter
 * SPDX-License-Identifier: BSD-3-Clause
 * Copyright the nbdkit-dirty-bitmap-filter authors
 */

#ifndef DIRTY_BITMAP_NBD_DEBUG_H
#define DIRTY_BITMAP_NBD_DEBUG_H

/* nbdkit's debug messages about options and requests. */

#include <stdint.h>

#include "nbd/nbd.h"

/* What a thread is serving. */
struct debug_context {
  uint64_t connection;          /* its serial number */
  uint64_t request;             /* its number, or 0: none is at hand */
  uint64_t cookie;              /* of the request, as on the wire */
};

/* From now on this thread's messages begin with the numbers in context,
 * as they are then.
 */
extern void debug_thread (const struct debug_context *);

/* Show a message if the flag is set, after the number of the connection
 * and of the request that the thread is serving, if there is one.
 */
#define debug_request(...)                                              \
  do {                                                                  \
    if (__builtin_expect (dirty_bitmap_debug_request, 0))               \
      debug_show (__VA_ARGS__);                                         \
  } while (0)

extern void debug_show (const char *fmt, ...)
  __attribute__ ((format (printf, 1, 2)));

#endif /* DIRTY_BITMAP_NBD_DEBUG_H */
