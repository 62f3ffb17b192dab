/* nbdkit-dirty-bitmap-filter
 * SPDX-License-Identifier: BSD-3-Clause
 * Copyright the nbdkit-dirty-bitmap-filter authors
 */

#ifndef DIRTY_BITMAP_NBD_OPTION_H
#define DIRTY_BITMAP_NBD_OPTION_H

/* One option of the handshake. */

#include <stddef.h>
#include <stdint.h>

#include "nbd/worker.h"

/* An option being received: what the client said it sends, and how much
 * of it has not been taken.
 */
struct option {
  struct worker *worker;
  uint32_t option;
  uint32_t remaining;
  unsigned nr_listed;           /* exports that LIST has told of */
};

/* Take count bytes of the option.  1 if it is shorter than that, -1 if
 * the connection ends.
 */
extern int option_read (struct option *, void *buf, size_t count);
extern int option_skip (struct option *, size_t count);

/* One option reply.  The error also drains the option. */
extern int option_reply (struct option *, uint32_t reply,
                         const void *data, size_t length);
extern int option_reply2 (struct option *, uint32_t reply,
                          const void *data, size_t length,
                          const void *more, size_t more_length);
extern int option_error (struct option *, uint32_t reply,
                         const char *message);

/* An export's name: its 32 bit length and its bytes, into name[] of
 * NBD_MAX_STRING.  0 if it is fine; 1 if not, and an error reply was
 * sent; -1.
 */
extern int option_export_name (struct option *, char *name,
                               uint32_t *length);

/* The export of a name that the client gave: 0; 1 if there is none, and
 * an error reply was sent; -1.
 */
extern int option_find_export (struct option *, const char *name,
                               uint32_t length, struct export *);

#endif /* DIRTY_BITMAP_NBD_OPTION_H */
