/* nbdkit-dirty-bitmap-filter
 * SPDX-License-Identifier: BSD-3-Clause
 * Copyright the nbdkit-dirty-bitmap-filter authors
 */

#ifndef DIRTY_BITMAP_TEST_CRASH_MODEL_H
#define DIRTY_BITMAP_TEST_CRASH_MODEL_H

/* What a disk must hold, now and after a crash at any moment.
 *
 * Data is written to a few windows of the disk only, whose sectors have
 * a history each, from what they hold in the beginning, wherever that
 * comes from; the rest of the disk, up to active_size, is zero.
 * Moments are indices of the log (crash_log_note).  No sector is changed
 * by two requests at once.
 */

#include <pthread.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "crash-check.h"

enum change_kind { CHANGE_WRITE, CHANGE_ZERO, CHANGE_TRIM };

struct change {
  enum change_kind kind;
  uint64_t offset, count;
  bool fua;
  size_t start, end;            /* SIZE_MAX until it was acknowledged */
};

struct version;
struct sector {
  struct version *versions;
  size_t nr, max;
};

struct flushed {
  size_t start, end;
};

struct model_bitmap {
  char name[32];
  unsigned granularity_bits;
  uint64_t nr_bits;
  bool created;                 /* after the base */
  bool frozen;                  /* must stay as it was */
  uint32_t flags;               /* in the base */
  uint8_t *required;            /* bits that it must have */
};

struct model {
  unsigned cluster_bits;
  unsigned unit_bits;           /* of checked_unit */
  unsigned trim_bits;           /* of what can be trimmed */
  uint64_t trim_from;           /* nothing below this can be */
  bool fua_is_own;              /* FUA makes nothing durable but what was
                                   written with it */
  uint64_t disk_size, active_size;
  uint64_t window_size, windows_apart;
  unsigned nr_windows;
  uint64_t header, snapshots;   /* in the base (crash-check.h) */
  uint8_t *content;             /* of the windows */
  struct sector *sectors;
  uint64_t hash_of_zeroes;      /* of a sector of them */
  struct model_bitmap bitmaps[CHECKED_MAX_BITMAPS];
  size_t nr_bitmaps;

  pthread_mutex_t lock;         /* protects changes and flushes */
  struct change *changes;
  size_t nr_changes, max_changes;
  struct flushed *flushes;
  size_t nr_flushes, max_flushes;
  size_t opened;                /* when the disk had been opened */
  bool never_marked;            /* bitmaps that are not frozen */
  bool may_lose;                /* bitmaps, after a failure to create one
                                   that left the autoclear bit clear */

  /* Of the moment that is looked at. */
  size_t moment, next_change, next_flush, last_flush;
};

struct model_windows {
  uint64_t size, apart;
  unsigned nr;
  uint64_t active_size;
};

extern struct model *model_new (struct checked *base,
                                const struct model_windows *);
extern void model_free (struct model *);

/* A bitmap that will be created. */
extern void model_expect_bitmap (struct model *, const char *name,
                                 unsigned granularity_bits);

/* The byte in content of a guest offset in a window, or NULL. */
extern uint8_t *model_content (const struct model *, uint64_t offset);
extern uint64_t model_window (const struct model *, unsigned nr);

/* A request begins at change->start: data as it will be written, unless
 * it zeroes.  Then it ends.
 */
extern void model_begin (struct model *, const struct change *,
                         const uint8_t *data);
extern void model_end (struct model *, const struct change *);

/* The request failed, at change->end: content has been read back. */
extern void model_failed (struct model *, const struct change *);

extern void model_flushed (struct model *, size_t start, size_t end);

/* Look at a moment, all moments in ascending order. */
extern void model_sort (struct model *);
extern void model_advance (struct model *, size_t moment);

/* Is this what a crash at that moment may leave?  NULL, or what is
 * wrong, a static string.
 */
extern const char *model_check (struct model *, struct checked *);

/* And is it what a clean stop at that moment leaves, with nothing marked
 * that did not change?
 */
extern const char *model_check_stopped (struct model *, struct checked *);

#endif /* DIRTY_BITMAP_TEST_CRASH_MODEL_H */
