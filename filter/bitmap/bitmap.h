/* nbdkit-dirty-bitmap-filter
 * SPDX-License-Identifier: BSD-3-Clause
 * Copyright the nbdkit-dirty-bitmap-filter authors
 */

#ifndef DIRTY_BITMAP_BITMAP_H
#define DIRTY_BITMAP_BITMAP_H

/* Dirty bitmaps in RAM, their states, and how they are loaded from the image
 * and stored to it.
 *
 * Functions return 0, or -1 with errno set and the reason reported,
 * unless said otherwise.
 */

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

struct qcow2;
struct bitmap;
struct bitmap_set;

struct bitmap_options {
  uint32_t granularity;         /* of bitmaps that are created, 0: default */
  const char *const *require;   /* must exist and record, or are created */
  size_t nr_require;
  const char *const *expose;    /* offered to clients; all if none */
  size_t nr_expose;
  bool check_only;              /* write nothing, read no bits */
  bool load_all;                /* load the bits of those that are neither
                                   offered nor record, too */
  bool keep;                    /* never mark a bitmap in_use, if possible:
                                   write bits ahead of the changes */

  /* With keep: flush the image together with this set, by the steps below.
   * A mark calls it, with no lock held, where the image has no clusters yet
   * for the bits (keep.c).  Returns 0, or -1 with errno set and the reason
   * reported.
   */
  int (*flush) (struct qcow2 *, struct bitmap_set *);

  /* There are backing files: bitmaps that expose names and the image does
   * not have may be in one of them.
   */
  bool has_backing;

  /* For a backing file, which is open read-only: its path, for messages, and
   * the sets of all images above it.  It offers no bitmap whose name one of
   * these sets has.  It offers nothing if the bitmaps of one of them cannot
   * be used.
   */
  const char *backing_path;
  const struct bitmap_set *const *above;
  size_t nr_above;
};

/* Load the image's bitmaps, create those that are required and absent
 * (durable on return), and warn on stderr which cannot be used and why.
 * Damage in the image never makes this fail (I7).  A bitmap that the options
 * ask for and that is not available does.
 */
extern struct bitmap_set *bitmap_set_open (struct qcow2 *,
                                           const struct bitmap_options *);
extern void bitmap_set_close (struct bitmap_set *);

/* Mark [offset, offset + count) dirty in every recording bitmap, before
 * the change itself is made.  On return each granule is set in RAM, and
 * either the image's bitmap has it or is durably in_use.  -1 if in_use
 * could not be made durable: then the change must not be made.
 *
 * The range lies inside the disk, and the set is not read-only, which is
 * asserted.  Any thread, no lock held.  If all granules are set already,
 * this costs one relaxed load a word.
 */
extern int bitmap_set_mark (struct bitmap_set *, uint64_t offset,
                            uint64_t count);

/* If the set keeps its bitmaps by writing bits ahead: have the image lose bits
 * that RAM does not have, in units that were of no use since the last call,
 * or everywhere.  -1 if something could not be written: then the image's
 * bitmaps have more bits than they should.  Any thread, no lock held.
 */
extern int bitmap_set_tidy (struct bitmap_set *, bool all);
extern bool bitmap_set_keeps (const struct bitmap_set *);

/* How many bytes of the disk the image's bitmap, after a crash now, would
 * report that were not changed.
 */
extern uint64_t bitmap_extra_bytes (const struct bitmap *);

/* The bitmaps' steps of a flush, which disk/flush.c conducts, one flush at a
 * time:
 *
 *   data        write what may be on disk before the references are: new
 *               clusters, and contents safe to overwrite.  Returns 1 if it
 *               left something for the next flush, for lack of space, else 0
 *   - barrier -
 *   references  write the references to them.  Returns 1 if it wrote
 *               anything, 0 if not
 *   - barrier if references wrote -
 *   settle      the references are durable.  Write what must only be on
 *               disk after them, if anything, and then return 1
 *   - barrier if settle wrote -
 *   done        all of it is durable
 *   failed      called after any step or barrier failed, instead of all
 *               steps that would have followed
 */
extern int bitmap_flush_data (struct bitmap_set *);
extern int bitmap_flush_references (struct bitmap_set *);
extern int bitmap_flush_settle (struct bitmap_set *);
extern void bitmap_flush_done (struct bitmap_set *);
extern void bitmap_flush_failed (struct bitmap_set *);

/* A flush succeeds even though bitmaps could not be stored.  Warn of that,
 * once while it lasts.  Call this after every flush.
 */
extern void bitmap_set_tell_unstored (struct bitmap_set *);

/* At the clean stop, after the last flush: release reserved clusters that
 * were not needed.  True if there were any: flush again.
 */
extern bool bitmap_set_give_back_reserved (struct bitmap_set *);

/* Have all recording bitmaps been stored in the image, so that we left none
 * in_use?  For the clean stop, after the last flush.  Reports the bitmaps
 * that were not stored.
 */
extern bool bitmap_set_all_stored (struct bitmap_set *);

/* How often the bitmaps were written to the image: writes that failed, and
 * that succeeded.  Times, in nanoseconds, are taken only while meter_is_on;
 * bytes are those of bits and bitmap tables.
 */
struct bitmap_set_numbers {
  uint64_t syncs[2], sync_ns[2], sync_bytes[2];

  /* If the set keeps its bitmaps: rounds of durably writing bits ahead;
   * the regions whose bits they wrote, for each bitmap, and the
   * bytes of the disk where these were tidied; and how often a bitmap was
   * marked as in use all the same.
   */
  uint64_t rounds[2], round_ns[2];
  uint64_t regions_marked, bytes_tidied, fallbacks;
};
extern void bitmap_set_get_numbers (const struct bitmap_set *,
                                    struct bitmap_set_numbers *);

/* The bitmaps that record and are stored in the image, whether they are
 * offered or not.
 */
extern size_t bitmap_set_nr_recording (const struct bitmap_set *);
extern const struct bitmap *bitmap_set_recording (const struct bitmap_set *,
                                                  size_t i);

/* All bitmaps of the image, in the order of its directory, and those that are
 * in RAM alone.  The bits of those that are inconsistent are not known.
 */
extern size_t bitmap_set_nr_all (const struct bitmap_set *);
extern const struct bitmap *bitmap_set_get (const struct bitmap_set *,
                                            size_t i);
extern bool bitmap_is_inconsistent (const struct bitmap *);
extern bool bitmap_is_enabled (const struct bitmap *);
extern bool bitmap_is_in_ram (const struct bitmap *);

/* Does it record, in the image or in RAM alone? */
extern bool bitmap_is_recording (const struct bitmap *);

/* Is a backup of it under way (change.h)?  And how many bytes of a disk of
 * size bytes were changed since that began.
 */
extern bool bitmap_has_backup (const struct bitmap *);
extern uint64_t bitmap_since_bytes (const struct bitmap *, uint64_t size);

/* How many bytes of a disk of size bytes are dirty, and how much memory the
 * pieces with set bits take.  This reads all set bits.
 */
extern uint64_t bitmap_dirty_bytes (const struct bitmap *, uint64_t size,
                                    uint64_t *memory_bytes);

/* The bitmaps that clients are offered. */
extern size_t bitmap_set_nr_exposed (const struct bitmap_set *);
extern const struct bitmap *bitmap_set_exposed (const struct bitmap_set *,
                                                size_t i);
extern const char *bitmap_name (const struct bitmap *);
extern uint64_t bitmap_granularity (const struct bitmap *);

/* A reference to a bitmap, which keeps its memory; and its end, in any
 * thread and with any lock held.  The set has one of its own, until the
 * bitmap is removed from it or the set is closed.  From then on no change is
 * recorded in the bitmap.  Its name, granularity and bits can still be read.
 */
extern const struct bitmap *bitmap_get (const struct bitmap *);
extern void bitmap_put (const struct bitmap *); /* or NULL */

/* Does the set have a bitmap of this name that clients are offered, or
 * (after a check) would be?
 */
extern bool bitmap_set_offers (const struct bitmap_set *, const char *name);

/* The runs of equally dirty or clean bytes from offset on, up to max of them
 * (at least 1), clipped to limit (offset < limit <= the disk's size): run k
 * ends at guest offset ends[k].  Returns how many there are; the last one
 * ends at limit.  *dirty says whether the first is dirty; dirty and clean
 * runs alternate.  Concurrent marks may or may not be seen.
 */
extern size_t bitmap_runs (const struct bitmap *, uint64_t offset,
                           uint64_t limit, uint64_t *ends, size_t max,
                           bool *dirty);

/* The length of the first run. */
static inline uint64_t
bitmap_run (const struct bitmap *b, uint64_t offset, uint64_t limit,
            bool *dirty)
{
  uint64_t end;

  bitmap_runs (b, offset, limit, &end, 1, dirty);
  return end - offset;
}

#endif /* DIRTY_BITMAP_BITMAP_H */
