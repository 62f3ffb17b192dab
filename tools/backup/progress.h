/* nbdkit-dirty-bitmap-filter
 * SPDX-License-Identifier: BSD-3-Clause
 * Copyright the nbdkit-dirty-bitmap-filter authors
 */

#ifndef DIRTY_BITMAP_BACKUP_PROGRESS_H
#define DIRTY_BITMAP_BACKUP_PROGRESS_H

/* Telling on stderr how far some work is: on a terminal a bar that is drawn
 * again and again, elsewhere a line from time to time.
 */

#include <stdatomic.h>
#include <stdbool.h>
#include <stdint.h>

struct progress {
  const char *verb;             /* "copying", say */
  uint64_t total;               /* bytes */
  _Atomic uint64_t done;        /* any thread adds to it */
  bool is_quiet, is_terminal;
  int64_t began_ns, told_ns;
};

extern void progress_begin (struct progress *, const char *verb,
                            uint64_t total, bool quiet);

/* Tell, if it is time again.  One thread calls it, a few times a second. */
extern void progress_tell (struct progress *);

/* Tell for the last time, with how long it took, or remove the bar. */
extern void progress_end (struct progress *, bool success);

/* Remove the bar for now, so that something else can be printed. */
extern void progress_erase (void);

/* Bytes as people read them: "1.5 GiB". */
#define PROGRESS_SIZE_CHARS 24
extern const char *progress_size (char text[PROGRESS_SIZE_CHARS],
                                  uint64_t bytes);

#endif /* DIRTY_BITMAP_BACKUP_PROGRESS_H */
