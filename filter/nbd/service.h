/* nbdkit-dirty-bitmap-filter
 * SPDX-License-Identifier: BSD-3-Clause
 * Copyright the nbdkit-dirty-bitmap-filter authors
 */

#ifndef DIRTY_BITMAP_NBD_SERVICE_H
#define DIRTY_BITMAP_NBD_SERVICE_H

/* What a server serves, and how: constant while it serves. */

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "nbd/nbd.h"

struct disk;
struct limit;

struct service {
  struct disk *disk;
  uint64_t size;
  uint32_t preferred_block_size;
  bool readonly;
  struct export_options export;
  const struct nbd_tls *tls;    /* or NULL: there is none */
  struct stats *stats;          /* or NULL: there are none */
  uint16_t eflags;              /* transmission flags without DF */
  struct nbd_limits limits;     /* in force; none is 0 but idle_seconds */
  struct limit *errors;         /* of messages about clients */
};

#endif /* DIRTY_BITMAP_NBD_SERVICE_H */
