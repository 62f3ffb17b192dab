/* nbdkit-dirty-bitmap-filter
 * SPDX-License-Identifier: BSD-3-Clause
 * Copyright the nbdkit-dirty-bitmap-filter authors
 */

#ifndef DIRTY_BITMAP_VIEW_H
#define DIRTY_BITMAP_VIEW_H

/* A context of nbdkit's plugin that belongs to no connection, with all the
 * questions that nbdkit requires a filter to ask, and the answers.  For
 * next.c.  Include <nbdkit-filter.h> first.
 */

#include <pthread.h>
#include <stdbool.h>
#include <stdint.h>
#include <sys/stat.h>

/* Minimum block sizes are at most this. */
#define VIEW_MAX_BLOCK_BYTES ((uint32_t) 64 << 10)

struct view {
  nbdkit_next *next;
  pthread_mutex_t *serial_lock; /* held around each call, or NULL */
  uint64_t plugin_size;         /* bytes, as the plugin says */
  uint64_t size;                /* the whole blocks of it */
  uint32_t block_bytes;         /* requests are multiples of this */
  struct view *older;           /* in a list of replaced views */
  uint32_t max_data_bytes;
  uint32_t max_zero_bytes;
  uint32_t preferred_bytes;     /* of a request, or 0 */
  bool can_write;
  bool can_flush;
  bool can_zero;
  bool can_zero_fast;
  bool can_trim;
  bool can_cache;
  bool can_extents;
  bool can_fua;                 /* by itself, not by a flush */
  bool is_rotational;
};

/* NULL, with the reason reported, if it cannot be opened. */
extern struct view *view_open (nbdkit_backend *, bool readonly);

/* The same.  Also says whether the plugin has opened a certain file. */
extern struct view *view_open_of_file (nbdkit_backend *, bool readonly,
                                       const struct stat *file,
                                       bool *is_ours);

/* Close a view, or all views of a list (or NULL).  Call it where no other
 * thread can be inside the plugin, if the plugin is not made for that.
 */
extern void view_close (struct view *);
extern void view_close_all (struct view *);

/* The calls.  The caller makes sure that the view can do what is asked
 * (can_zero and so on) and has the range, which is of whole blocks and, for
 * zeroes, no longer than max_zero_bytes.  0, or -1 with errno.
 *
 * view_zero_fast returns 1 if the plugin refused because it would not be fast.
 * view_extent is about the range from offset on: *flags are NBD's, and
 * *length, which is at most count, says how far they hold.
 */
extern int view_pread (struct view *, void *buf, uint64_t count,
                       uint64_t offset);
extern int view_pwrite (struct view *, const void *buf, uint64_t count,
                        uint64_t offset);
extern int view_zero (struct view *, uint32_t count, uint64_t offset,
                      bool punch);
extern int view_pwrite_durable (struct view *, const void *buf,
                                uint64_t count, uint64_t offset);
extern int view_zero_fast (struct view *, uint32_t count, uint64_t offset,
                           bool punch);
extern int view_trim (struct view *, uint64_t count, uint64_t offset);
extern int view_extent (struct view *, uint64_t offset, uint64_t count,
                        uint64_t *length, unsigned *flags);
extern int view_cache (struct view *, uint64_t count, uint64_t offset);
extern int view_flush (struct view *);

#endif /* DIRTY_BITMAP_VIEW_H */
