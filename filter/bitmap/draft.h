/* nbdkit-dirty-bitmap-filter
 * SPDX-License-Identifier: BSD-3-Clause
 * Copyright the nbdkit-dirty-bitmap-filter authors
 */

#ifndef DIRTY_BITMAP_BITMAP_DRAFT_H
#define DIRTY_BITMAP_BITMAP_DRAFT_H

/* What change.c notes, and apply.c makes true. */

#include "bitmap/change.h"
#include "bitmap/internal.h"

/* Bits of a bitmap of the set, rounded to granules of 2^shift bytes: those of
 * the coarsest bitmap that they have come through.
 */
struct content {
  struct bitmap *bitmap;
  unsigned shift;
};

/* A bitmap as it shall be. */
struct draft {
  char *name;
  unsigned shift;
  bool enabled, in_ram;
  struct bitmap *original;      /* which it stems from, or NULL: it is added */
  bool is_new;                  /* added, or with other contents: it becomes
                                   another struct bitmap */
  bool is_forced;               /* though clients read it */
  bool is_all_dirty;            /* it is added so */
  bool begins_backup, ends_backup;
  bool is_to_freeze;            /* the backup has a view */
  unsigned long lost;           /* barriers, when the backup begins */

  /* It has the bits of all these. */
  struct content *content;
  size_t nr_content, max_content;

  struct bitmap *bitmap;        /* from prepare on: made, or the original */
  struct ahead ahead;           /* made, if the bitmap needs it */
  struct bitmap *since;         /* made, if it begins a backup */
  struct bitmap *frozen;        /* a copy, if is_to_freeze */
};

struct bitmap_change {
  struct bitmap_set *set;
  const char *image;
  bitmap_is_busy_fn is_busy;
  void *opaque;

  struct draft *drafts;
  size_t nr_drafts, max_drafts;
  bool is_in_image;             /* the image has to change */

  /* apply.c */
  struct bitmap_lists lists;
  bool *goes_on;                /* of the exposed ones */
  uint64_t directory_offset;    /* 0: there is none */
  size_t directory_bytes;
  bool is_adopted;
  bool is_in_doubt;             /* the header may refer to what was made */
};

/* The draft of this name, or NULL. */
extern struct draft *draft_find (const struct bitmap_change *,
                                 const char *name);

#endif /* DIRTY_BITMAP_BITMAP_DRAFT_H */
