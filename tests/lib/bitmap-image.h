/* nbdkit-dirty-bitmap-filter
 * SPDX-License-Identifier: BSD-3-Clause
 * Copyright the nbdkit-dirty-bitmap-filter authors
 */

#ifndef DIRTY_BITMAP_TEST_BITMAP_IMAGE_H
#define DIRTY_BITMAP_TEST_BITMAP_IMAGE_H

/* What the tests of bitmap/ share: images with bitmaps, made byte by
 * byte so that every byte can be wrong; a container that records what
 * is done to it, fails on demand, and can be crashed; and a reader of
 * bitmaps that has nothing in common with the code under test.
 */

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "bitmap/bitmap.h"
#include "container/container.h"
#include "qcow2/qcow2.h"

/* An image, flat in memory. */
struct bytes {
  uint8_t *p;
  size_t n;
};

struct bitmap_spec {
  const char *name;
  unsigned granularity_bits;
  uint32_t flags;
  const char *table;            /* an entry a character: 0, 1, or d for a
                                   data cluster; as if followed by 0s */
  uint8_t fill;                 /* every byte of the data clusters */
};

#define MAX_SPECS 8

/* A crafted image, and where its parts are. */
struct crafted {
  struct bytes bytes;
  uint32_t cluster_size;
  size_t extension;             /* offset of its 8 bytes of head */
  size_t directory, directory_bytes;
  size_t entry[MAX_SPECS], table[MAX_SPECS], first_data[MAX_SPECS];
};

#define AUTOCLEAR_OFFSET 88

/* Append free clusters full of ones: what is allocated there and not
 * written has something in it.
 */
extern void craft_garbage (struct crafted *, unsigned nr_clusters);

/* A version 3 image.  No extension if there are no specs. */
extern void craft (struct crafted *, unsigned cluster_bits, uint64_t size,
                   const struct bitmap_spec *specs, size_t nr_specs);

/* A container that records.  It takes a copy of the bytes, and may grow
 * up to limit.
 */
extern struct container *recorder_open (const struct bytes *, size_t limit);

/* Fail the nth write or flush from now on (0: the next), and all that
 * follow for as long as for_ever says.  applied: a failed write has
 * happened all the same.
 */
extern void recorder_fail (struct container *, unsigned nth, bool for_ever,
                           bool applied);
extern void recorder_stop_failing (struct container *);

/* How many writes and flushes there have been, and how many of them
 * were failed.
 */
extern unsigned recorder_writes (struct container *);
extern unsigned recorder_flushes (struct container *);
extern unsigned recorder_failures (struct container *);

/* Writes and flushes that something costs.  w->c is a recorder. */
#define assert_cost(w, writes, flushes, something)              \
  do {                                                          \
    unsigned writes_before_ = recorder_writes ((w)->c);         \
    unsigned flushes_before_ = recorder_flushes ((w)->c);       \
    something;                                                  \
    assert_int_equal (recorder_writes ((w)->c) - writes_before_, writes); \
    assert_int_equal (recorder_flushes ((w)->c) - flushes_before_, flushes); \
  } while (0)

/* Let other threads in at every operation. */
extern void recorder_yield (struct container *, bool);

/* Be told of each write, just before it happens.  buf is NULL if it
 * writes zeroes.
 */
typedef void (*recorder_watch_fn) (void *opaque, const void *buf,
                                   size_t count, uint64_t offset);
extern void recorder_watch (struct container *, recorder_watch_fn,
                            void *opaque);

/* Put a note into the record: from here on a crash must find granules
 * [first, last] of the bitmap dirty, or the bitmap marked.
 */
extern void recorder_note (struct container *, const char *name,
                           uint64_t first, uint64_t last);

/* Put a number into the record, and be told of it, with each image that a
 * crash leaves from there on to the next number.  The first is 0.
 */
typedef void (*recorder_judge_fn) (void *opaque, unsigned stage,
                                   const struct bytes *image);
extern void recorder_stage (struct container *, unsigned number);
extern void recorder_judge (struct container *, recorder_judge_fn,
                            void *opaque);

/* As it is now, as if all writes had reached it. */
extern struct bytes recorder_image (struct container *);

/* The same, as a copy for the caller to free, while other threads write. */
extern struct bytes recorder_copy (struct container *);

/* For every point of the record, for subsets of the writes since the
 * last barrier, torn at 512 bytes: make the image that a crash there
 * leaves, and check that I3 holds for the notes so far.  At most
 * max_subsets are tried at a point (all of them if there are fewer).
 * Returns the number of images checked.
 */
extern unsigned long recorder_crash (struct container *,
                                     unsigned max_subsets, uint64_t seed);

/* What the image says of a bitmap. */
enum disk_state { DISK_ABSENT, DISK_MARKED, DISK_CLEAN };
struct disk_bitmap {
  enum disk_state state;
  uint32_t flags;
  unsigned granularity_bits;
  uint64_t nr_bits;
  uint8_t *bits;                /* malloc'd, NULL if absent */
  size_t nr_bytes;              /* of bits: whole clusters */
  unsigned nr_zero, nr_ones, nr_data; /* table entries */
};
extern struct disk_bitmap disk_bitmap_read (const struct bytes *,
                                            const char *name);
extern bool disk_bitmap_bit (const struct disk_bitmap *, uint64_t bit);

/* Whatever was reported since the last call of messages_clear. */
extern void messages_install (void);
extern void messages_clear (void);
extern unsigned messages_warnings (void);
extern unsigned messages_errors (void);
extern void assert_message (const char *part);

extern struct qcow2 *open_image (struct container *, bool readonly);
extern struct bitmap_set *open_set (struct qcow2 *);
extern struct bitmap_set *open_set_requiring (struct qcow2 *,
                                              const char *name,
                                              uint32_t granularity);

/* Is the granule dirty in RAM? */
extern bool ram_bit (const struct bitmap *, uint64_t bit);
extern const struct bitmap *find_exposed (struct bitmap_set *,
                                          const char *name);

/* Mark, expect success, and note it. */
extern void mark_and_note (struct bitmap_set *, struct container *,
                           uint64_t offset, uint64_t count);

/* Note a mark that succeeded, for all bitmaps but one named "off". */
extern void note_mark (struct bitmap_set *, struct container *,
                       uint64_t offset, uint64_t count);

#endif /* DIRTY_BITMAP_TEST_BITMAP_IMAGE_H */
