/* nbdkit-dirty-bitmap-filter
 * SPDX-License-Identifier: BSD-3-Clause
 * Copyright the nbdkit-dirty-bitmap-filter authors
 */

#ifndef DIRTY_BITMAP_BACKUP_CONTROL_H
#define DIRTY_BITMAP_BACKUP_CONTROL_H

/* Backups of one bitmap, by the commands of a control socket. */

#include <stdbool.h>
#include <stdint.h>

#include "qmp-client.h"

struct control {
  struct qmp_client client;
  const char *bitmap;           /* its name: the caller's */
  bool has_begun;               /* backup-begin, and no backup-end yet */

  /* What backup-begin said. */
  char *export;                 /* of the view */
  bool is_created, is_recreated;        /* the bitmap, which is all dirty */
  uint64_t dirty_bytes;         /* of whole granules */
};

/* The functions return 0, or -1 with the reason reported. */

/* In any case it has to be closed. */
extern int control_open (struct control *, const char *path,
                         const char *bitmap);
extern void control_close (struct control *);

/* Of the bitmap as it is now, in bytes; 0 if there is none that records. */
extern int control_granularity (struct control *, uint64_t *granularity,
                                uint64_t *disk_bytes);

/* The view shows all of the disk, or only what is dirty. */
extern int control_begin (struct control *, bool dirty_only);

/* If a backup of the bitmap has begun, and was not ended, end it as failed. */
extern int control_end_earlier (struct control *, bool *ended);

/* End the backup: the point is stored. */
extern int control_end_as_success (struct control *);

/* End it if it has begun.  The reason why is told already, and if the server is
 * gone, so is the backup, so nothing is reported.
 */
extern void control_end_as_failure (struct control *);

#endif /* DIRTY_BITMAP_BACKUP_CONTROL_H */
