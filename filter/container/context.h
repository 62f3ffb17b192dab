/* nbdkit-dirty-bitmap-filter
 * SPDX-License-Identifier: BSD-3-Clause
 * Copyright the nbdkit-dirty-bitmap-filter authors
 */

#ifndef DIRTY_BITMAP_CONTEXT_H
#define DIRTY_BITMAP_CONTEXT_H

/* A context of nbdkit's plugin that belongs to no connection, with all the
 * questions that nbdkit requires a filter to ask, and the answers.  For
 * next.c.  Include <nbdkit-filter.h> first.
 */

#include <pthread.h>
#include <stdbool.h>
#include <stdint.h>
#include <sys/stat.h>

/* Minimum block sizes are at most this. */
#define CONTEXT_MAX_BLOCK_BYTES ((uint32_t) 64 << 10)

struct plugin_context {
  nbdkit_next *next;
  pthread_mutex_t *serial_lock; /* held around each call, or NULL */
  uint64_t plugin_size;         /* bytes, as the plugin says */
  uint64_t size;                /* the whole blocks of it */
  uint32_t block_bytes;         /* requests are multiples of this */
  struct plugin_context *older; /* in a list of replaced contexts */
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
extern struct plugin_context *context_open (nbdkit_backend *, bool readonly);

/* The same.  Also says whether the plugin has opened a certain file. */
extern struct plugin_context *
context_open_of_file (nbdkit_backend *, bool readonly,
                      const struct stat *file, bool *is_ours);

/* Close a context, or all contexts of a list (or NULL).  Call it where no
 * other thread can be inside the plugin, if the plugin is not made for that.
 */
extern void context_close (struct plugin_context *);
extern void context_close_all (struct plugin_context *);

/* The calls.  The caller makes sure that the context can do what is asked
 * (can_zero and so on) and has the range, which is of whole blocks and, for
 * zeroes, no longer than max_zero_bytes.  0, or -1 with errno.
 *
 * context_zero_fast returns 1 if the plugin refused because it would not be
 * fast.  context_extent is about the range from offset on: *flags are NBD's,
 * and *length, which is at most count, says how far they hold.
 */
extern int context_pread (struct plugin_context *, void *buf, uint64_t count,
                          uint64_t offset);
extern int context_pwrite (struct plugin_context *, const void *buf,
                           uint64_t count, uint64_t offset);
extern int context_zero (struct plugin_context *, uint32_t count,
                         uint64_t offset, bool punch);
extern int context_pwrite_durable (struct plugin_context *, const void *buf,
                                   uint64_t count, uint64_t offset);
extern int context_zero_fast (struct plugin_context *, uint32_t count,
                              uint64_t offset, bool punch);
extern int context_trim (struct plugin_context *, uint64_t count,
                         uint64_t offset);
extern int context_extent (struct plugin_context *, uint64_t offset,
                           uint64_t count, uint64_t *length, unsigned *flags);
extern int context_cache (struct plugin_context *, uint64_t count,
                          uint64_t offset);
extern int context_flush (struct plugin_context *);

#endif /* DIRTY_BITMAP_CONTEXT_H */
