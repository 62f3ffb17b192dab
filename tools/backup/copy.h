/* nbdkit-dirty-bitmap-filter
 * SPDX-License-Identifier: BSD-3-Clause
 * Copyright the nbdkit-dirty-bitmap-filter authors
 */

#ifndef DIRTY_BITMAP_BACKUP_COPY_H
#define DIRTY_BITMAP_BACKUP_COPY_H

/* Copying what a plan has from an NBD server. */

#include <stdint.h>

#include "backup/progress.h"
#include "backup/source.h"

/* Where it goes.  The functions are called from several threads, for ranges of
 * whole units, but for the end of the disk.  They return 0, or -1 with the
 * reason reported.
 */
struct copy_sink {
  void *opaque;
  uint32_t unit;                /* bytes; data that are zeroes are found for
                                   whole units */
  int (*data) (void *opaque, const void *buf, uint64_t count,
               uint64_t offset);
  int (*zero) (void *opaque, uint64_t count, uint64_t offset);
};

/* 0, or -1 with one reason reported (none if it was interrupted). */
extern int copy_plan (struct source *, const struct plan *,
                      const struct copy_sink *, struct progress *);

/* Give a buffer to a sink, by runs of units that are zeroes or not. */
extern int copy_to_sink (const struct copy_sink *, const void *buf,
                         uint64_t count, uint64_t offset);

#endif /* DIRTY_BITMAP_BACKUP_COPY_H */
