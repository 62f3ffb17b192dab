/* nbdkit-dirty-bitmap-filter
 * SPDX-License-Identifier: BSD-3-Clause
 * Copyright the nbdkit-dirty-bitmap-filter authors
 */

#ifndef DIRTY_BITMAP_TEST_CRASH_CHECK_H
#define DIRTY_BITMAP_TEST_CRASH_CHECK_H

/* A reader and checker of qcow2 images, flat in memory, that has nothing
 * in common with the code under test.  It knows what the tests make, with
 * the backing file and the external data file that the image comes with;
 * of compressed clusters it knows only where they are.
 */

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "crash-container.h"

#define CHECKED_MAX_BITMAPS 8
#define CHECKED_MAX_SNAPSHOTS 8

/* In the first byte of the autoclear bits: one that nobody knows. */
#define UNKNOWN_AUTOCLEAR 0x20

struct checked_bitmap {
  char name[32];
  uint32_t flags;               /* 1 in use, 2 records */
  unsigned granularity_bits;
  uint64_t nr_bits;
  uint8_t *bits;                /* as in the image, room for nr_bits */
};

struct checked {
  const struct crash_image *image;
  unsigned version, cluster_bits, refcount_order;
  unsigned entry_bits;          /* log2 of the bytes of an L2 entry */
  unsigned unit_bits;           /* of a cluster, or a subcluster if there
                                   are any; of a sector of a disk beside */
  unsigned trim_bits;           /* of what can be trimmed */
  uint64_t disk_size;
  uint64_t l1_offset, l1_entries;
  uint64_t header;              /* a hash of what never changes of it */
  bool trusted;                 /* the autoclear bit of the bitmaps */
  bool has_extension;           /* there are some, trusted or not */
  bool stale;                   /* the unknown autoclear bit is set */
  bool trusts_damaged;          /* bitmaps, which are not looked at */
  struct checked_bitmap bitmaps[CHECKED_MAX_BITMAPS];
  size_t nr_bitmaps;            /* 0 if they are not trusted */
  uint64_t nr_leaked;           /* clusters */
  uint8_t *references;          /* a counter a cluster */
  uint8_t *marks;               /* what for, and of whom, in the trees */
  uint64_t snapshots;           /* a hash of them, 0 without any */
  const uint8_t *served;        /* the disk, if it was not check_image that
                                   read it, else NULL */
  char error[256];              /* what is wrong, or empty */
};

/* Check the image; false, and an error, if it is not sound.  Leaked
 * clusters are sound.  The result refers to the image.
 */
extern bool check_image (struct checked *, const struct crash_image *);
extern void checked_free (struct checked *);
extern struct checked_bitmap *checked_find (struct checked *,
                                            const char *name);

/* The bytes of a cluster or subcluster of the guest, from here or from
 * below; NULL if it reads as zeroes.
 */
extern const uint8_t *checked_unit (const struct checked *, uint64_t unit);

/* A compressed cluster is nowhere as it reads. */
extern bool checked_is_compressed (const struct checked *,
                                   uint64_t guest_cluster);

#endif /* DIRTY_BITMAP_TEST_CRASH_CHECK_H */
