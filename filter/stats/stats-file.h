/* nbdkit-dirty-bitmap-filter
 * SPDX-License-Identifier: BSD-3-Clause
 * Copyright the nbdkit-dirty-bitmap-filter authors
 */

#ifndef DIRTY_BITMAP_STATS_FILE_H
#define DIRTY_BITMAP_STATS_FILE_H

/* The file that statistics are written to, and when. */

struct disk;
struct stats;

/* Check that the file can be written, and make SIGUSR1 request a write from
 * now on.  -1 with the reason reported.  The path is absolute, and stays the
 * caller's.
 */
extern int stats_file_prepare (const char *path);

/* Begin to write: now, when SIGUSR1 comes, and every interval_s seconds,
 * unless that is 0.  Later failures are reported, once, and have no other
 * effect.  -1, with the reason reported, if the thread cannot be started.
 * Call it after stats_file_prepare.
 */
extern int stats_file_start (struct stats *, struct disk *,
                             unsigned interval_s);

/* Write for the last time.  SIGUSR1 is ignored from now on. */
extern void stats_file_stop (void);

/* Free everything, at the very end. */
extern void stats_file_free (void);

#endif /* DIRTY_BITMAP_STATS_FILE_H */
