/* nbdkit-dirty-bitmap-filter
 * SPDX-License-Identifier: BSD-3-Clause
 * Copyright the nbdkit-dirty-bitmap-filter authors
 */

#ifndef DIRTY_BITMAP_DISK_H
#define DIRTY_BITMAP_DISK_H

/* The guest's disk: the one door for every change.
 *
 * disk/ puts the image (qcow2/) and its bitmaps (bitmap/) together: a change
 * is marked in every recording bitmap before it is made, and a flush makes
 * both durable.  Above it are nbd/, control/, stats/, nbdkit/ and filter.c,
 * which share the disk.
 *
 * All request functions may be called from any thread at any time.  They
 * return 0, or -1 with errno set and the reason reported.  Offsets and
 * counts are bytes of the guest's disk, need no alignment, and must lie
 * inside disk_size.  disk/ checks that, and that the disk may be changed, and
 * returns EINVAL or EROFS.  The rooms below assert it.
 */

#include <stdatomic.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "bitmap/bitmap.h"
#include "qcow2/qcow2.h"

struct container;
struct disk;

/* A backing file that is a qcow2 image, open read-only. */
struct disk_backing {
  struct qcow2 *image;
  const char *path;             /* for messages */
};

/* What becomes of a write of nothing but zeroes: QEMU's detect-zeroes. */
enum disk_zeroes {
  DISK_ZEROES_OFF,              /* it is a write */
  DISK_ZEROES_ON,               /* zeroes, that leave (or make) the range
                                   allocated */
  DISK_ZEROES_UNMAP,            /* zeroes, that may give up its space */
};

/* Bytes of memory that a view may take, unless the options say so. */
#define DISK_DEFAULT_VIEW_MEMORY ((uint64_t) 256 << 20)

struct disk_options {
  bool readonly;                /* nothing is written, not even in_use */
  const char *snapshot;         /* serve this snapshot (an ID, or else a
                                   name), read-only and without bitmaps; or
                                   NULL */
  uint64_t cache_size;          /* bytes for L2 and refcount tables */
  uint32_t granularity;         /* bytes, for a bitmap that is created;
                                   0 for QEMU's rule */
  const char *const *require;   /* bitmaps that must exist and record,
                                   created if absent */
  size_t nr_require;
  const char *const *expose;    /* bitmaps that clients are offered */
  size_t nr_expose;             /* 0: all */
  bool load_all;                /* all bitmaps of the image, to be listed */

  bool keep;                    /* a crash costs no bitmap (bitmap/keep.c) */
  enum disk_zeroes detect_zeroes;

  /* Views (view.c): the folder of their scratch files, or NULL if there can
   * be none; how many bytes each may keep there, 0 for no limit; and how much
   * memory each may take, 0 for the default.
   */
  const char *scratch;
  uint64_t scratch_max, view_memory;

  /* The files that the image refers to.  They are the caller's and outlive
   * the disk: the layer right below it, its external data file or NULL, and
   * the qcow2 images of its whole chain from the top down.  Clients are
   * offered a bitmap of one of these where no image above has a bitmap of
   * the same name.
   */
  struct qcow2_layer below;
  struct container *data_file;
  const struct disk_backing *backing;
  size_t nr_backing;
  bool is_top_alone;            /* the backing files are left out: as in
                                   struct qcow2_options */

  /* The guest's disk is not in the image, which has only the bitmaps, but in
   * another container.  That is the caller's and outlives the disk.  It may
   * be the image's raw external data file, by whose tables it is then
   * changed.  For disk_check it may be NULL: its size is not known yet.
   */
  bool is_beside, beside_is_data_file;
  struct container *beside;
};

/* Check that the image can be served with these options, without
 * writing and without reading the bitmaps' bits.
 */
extern int disk_check (struct container *, const struct disk_options *);

/* Open the image.  disk_close closes the container.  If this returns NULL,
 * the container stays the caller's.
 */
extern struct disk *disk_open (struct container *,
                               const struct disk_options *);

/* Write all that is in RAM and cut the container to the used part.  No
 * request may be under way.  -1 if something could not be written: the image
 * is consistent, and the bitmaps concerned stay in_use.  Also -1 if an
 * earlier flush failed and no client's flush has reported it.
 */
extern int disk_stop (struct disk *);

/* Free the memory.  Writes nothing. */
extern void disk_close (struct disk *);

extern uint64_t disk_size (const struct disk *);
extern bool disk_is_readonly (const struct disk *);

extern enum disk_zeroes disk_detect_zeroes (const struct disk *);

/* What is to be said of the image. */
extern void disk_describe (const struct disk *, struct qcow2_description *);

/* Is the guest's disk beside the image (and not its data file)? */
extern bool disk_is_beside (const struct disk *);

/* What clients may be offered. */
struct disk_abilities {
  bool zero, zero_fast, trim, cache, flush;
  bool is_rotational;
};
extern struct disk_abilities disk_can (const struct disk *);

/* The cheapest size of a write in bytes: that of a cluster. */
extern uint32_t disk_preferred_block_size (const struct disk *);

extern int disk_read (struct disk *, void *buf, uint32_t count,
                      uint64_t offset);

/* Read the piece at offset, data or a hole (qcow2.h).  [offset, offset +
 * limit) lies inside the disk.
 */
extern int disk_read_chunk (struct disk *, uint64_t offset,
                            struct qcow2_chunk *);

/* With detect_zeroes, one of nothing but zeroes is done as disk_zero. */
extern int disk_write (struct disk *, const void *buf, uint32_t count,
                       uint64_t offset, bool fua);

/* Write zeroes.  no_hole keeps (or makes) the range allocated.  fast fails
 * with ENOTSUP, having changed nothing, if zeroing would be no faster than
 * writing.  Usually it has not even marked the range then.
 */
extern int disk_zero (struct disk *, uint64_t count, uint64_t offset,
                      bool no_hole, bool fast, bool fua);
extern int disk_trim (struct disk *, uint64_t count, uint64_t offset,
                      bool fua);

/* A client: a connection, and which failed flushes were reported to it
 * (disk_flush).  A new client also sees failures that were not yet reported
 * to any client: it may be an earlier client that has reconnected.
 */
struct disk_client {
  atomic_ulong told;
};
extern void disk_client_begin (struct disk *, struct disk_client *);

/* A client's flush.  It also fails if a flush of the storage has failed,
 * whichever client asked for that, and this client has not been told yet.
 * What the client wrote before then may be lost, though it reads back.  The
 * client has to write again everything it wrote since its last successful
 * flush.  (Linux reports such an error to fsync in this way, once for each
 * open file.)
 *
 * FUA covers its own request only, as in the protocol: a request with FUA
 * fails if its own data may be lost.  Such a failure leaves the rest to be
 * reported by the client's next flush.
 */
extern int disk_flush (struct disk *, struct disk_client *);

/* The same for the filter's own use: it reports only its own failure. */
extern int disk_sync (struct disk *);

/* disk_sync, and everything else that disk_stop would write, if no request
 * comes in between.
 */
extern int disk_settle (struct disk *);

/* Tidy what the bitmaps in the image have beyond the changes, where that was
 * of no use since the last call, or all of it.  Call it every disk_tidy_ms
 * milliseconds, or never if that is -1; bitmaps are right without it.
 */
extern void disk_tidy (struct disk *, bool all);
extern int disk_tidy_ms (const struct disk *);

extern int disk_cache (struct disk *, uint64_t count, uint64_t offset);

/* In grace_ms milliseconds, begin to end long requests early, with
 * ESHUTDOWN.  The part of a range that was changed by then is marked, and
 * stays changed.  Changes that still come keep nothing for views, which break.
 * disk_sync and disk_stop still do all their work.
 */
extern void disk_hurry (struct disk *, unsigned grace_ms);

/* What base:allocation says of a run of bytes (NBD's flag values). */
enum {
  DISK_EXTENT_HOLE = 1,
  DISK_EXTENT_ZERO = 2,
};

/* The run at offset: all bytes of [offset, offset + *length) have the
 * same *flags.  *length is at most limit - offset (limit > offset) and
 * at least 1.  The run may end before the flags change: callers merge.
 */
extern int disk_extent (struct disk *, uint64_t offset, uint64_t limit,
                        uint64_t *length, uint32_t *flags);

/* Which image of the chain the run at offset comes from (as in qemu-nbd's
 * context qemu:allocation-depth): 0 if none has it, 1 for the image itself,
 * 2 for its backing file and so on.  The rest as above.
 */
extern int disk_extent_depth (struct disk *, uint64_t offset, uint64_t limit,
                              uint64_t *length, uint32_t *depth);

/* Bitmaps that clients are offered (offers.h).  An offer is one of them.  It
 * and all that can be asked of it exist as long as the caller has a
 * reference, even if the bitmap is removed meanwhile.
 */
struct disk_offer;
extern struct disk_offer *disk_offer_get (struct disk_offer *);
extern void disk_offer_put (struct disk_offer *); /* or NULL */

/* All that there are at one moment, in the order of the image's directory,
 * then those of its backing files.  Writes to the disk change only the
 * image's own.  A list never changes.  When the set of bitmaps does, another
 * list takes its place.  disk_offers_get returns a reference to the current
 * one, at the same cost however long it is, for disk_offers_put.
 */
struct disk_offers;
extern struct disk_offers *disk_offers_get (const struct disk *);
extern void disk_offers_put (struct disk_offers *); /* or NULL */
extern size_t disk_offers_nr (const struct disk_offers *);

/* Offer i.  The reference is the list's. */
extern struct disk_offer *disk_offers_at (const struct disk_offers *,
                                          size_t i);

/* The place of the bitmap of this name, which needs no NUL behind it.  False
 * if there is none.  It is looked up in an index.
 */
extern bool disk_offers_find (const struct disk_offers *, const char *name,
                              size_t length, size_t *i);

/* A reference to the current offer of this name, or NULL. */
extern struct disk_offer *disk_find_offer (const struct disk *,
                                           const char *name, size_t length);

/* The format does not terminate names with NUL, but names that contain a NUL
 * are not offered, so these are C strings.
 */
extern const char *disk_bitmap_name (const struct disk_offer *);
extern uint64_t disk_bitmap_granularity (const struct disk_offer *);

/* A client reads the bitmap, from the first call to the second: the bitmap
 * is in use.  The client has a reference besides.
 */
extern void disk_bitmap_hold (struct disk_offer *);
extern void disk_bitmap_release (struct disk_offer *);

/* The runs of equally dirty or clean bytes from offset on, up to max of them
 * (at least 1), clipped to limit: run k ends at guest offset ends[k].
 * Returns how many there are; the last one ends at limit.  *dirty says
 * whether the first is dirty; dirty and clean runs alternate.  Bytes beyond
 * the end of the backing file that holds the bitmap are dirty, since the
 * bitmap does not cover them.
 *
 * Returns 0 with errno EIO, reported, once the bitmap was removed or was
 * changed other than by writes to the disk.  Then the client has to begin
 * again with a new offer.
 */
extern size_t disk_bitmap_runs (const struct disk_offer *,
                                uint64_t offset, uint64_t limit,
                                uint64_t *ends, size_t max, bool *dirty);

/* What has happened since the disk was opened, in the image and not in its
 * backing files; qcow2.h and bitmap.h say more.
 */
struct disk_numbers {
  struct qcow2_numbers qcow2;
  struct bitmap_set_numbers bitmaps;
  uint64_t image_bytes;         /* the size of the image file */
  uint64_t grown_bytes;         /* the sum of its growth */
};
extern void disk_get_numbers (const struct disk *, struct disk_numbers *);

/* Call fn for each bitmap that clients are offered or that records.  The
 * name is valid during that call only.
 */
struct disk_bitmap_numbers {
  const char *name;
  uint64_t granularity, dirty_bytes, memory_bytes, extra_bytes;
  bool records;
};
extern void disk_each_bitmap (const struct disk *,
                              void (*fn) (const struct disk_bitmap_numbers *,
                                          void *opaque),
                              void *opaque);

/* Call fn for each bitmap of the image itself, whether clients are offered it
 * or not.  Dirty bytes are those of whole granules, even at the end of the
 * disk, and 0 if the bitmap is inconsistent.  A bitmap is in use while it is
 * held.  The name is valid during that call only.  load_all has to be set.
 */
struct disk_bitmap_state {
  const char *name;
  uint64_t granularity, dirty_bytes;
  bool is_enabled, is_inconsistent, is_in_use;
  bool is_persistent;           /* false: in RAM alone */
  bool has_backup;              /* a backup of the bitmap is under way */
  uint64_t since_bytes;         /* what is dirty since that backup began, or
                                   0 if there is none */
};
extern void disk_list_bitmaps (const struct disk *,
                               void (*fn) (const struct disk_bitmap_state *,
                                           void *opaque),
                               void *opaque);

/* The length of the first run, or 0 as above. */
static inline uint64_t
disk_bitmap_run (const struct disk_offer *o, uint64_t offset, uint64_t limit,
                 bool *dirty)
{
  uint64_t end;

  return disk_bitmap_runs (o, offset, limit, &end, 1, dirty) == 0
    ? 0 : end - offset;
}

/* delta.c: the disk as seen through a bitmap.  Dirty bytes are the disk's
 * data, even where the disk has zeroes or a hole, since that may be the
 * change.  Clean bytes read as zeroes.  These fail with EIO where
 * disk_bitmap_runs does.
 */
extern int disk_delta_read (struct disk *, const struct disk_offer *,
                            void *buf, uint32_t count, uint64_t offset);

/* As disk_read_chunk: clean bytes are a hole. */
extern int disk_delta_read_chunk (struct disk *, const struct disk_offer *,
                                  uint64_t offset, struct qcow2_chunk *);

/* As disk_extent. */
extern int disk_delta_extent (struct disk *, const struct disk_offer *,
                              uint64_t offset, uint64_t limit,
                              uint64_t *length, uint32_t *flags);

/* The base:allocation flags of a dirty or clean run. */
static inline uint32_t
disk_delta_flags (bool dirty)
{
  return dirty ? 0 : DISK_EXTENT_HOLE | DISK_EXTENT_ZERO;
}

/* view.c: views.  A view is the disk, and one bitmap, as they were at the
 * moment when a backup of that bitmap began.  It is there until the backup
 * ends.  It is named as the bitmap.
 *
 * Reads of a view fail with EIO, reported, once the backup has ended, or the
 * view is broken: what it has to show could not be kept.  A change of the
 * disk never fails because of a view, and never waits for a client that reads
 * it.
 *
 * These functions are called from any thread at any time.  A view and all
 * that can be asked of it exist as long as the caller has a reference, but
 * not longer than the disk.
 */
struct disk_view;

/* A reference to the view of this name, which needs no NUL behind it, or
 * NULL if there is none.  As long as the backup lasts, it is the same view.
 */
extern struct disk_view *disk_find_view (const struct disk *,
                                         const char *name, size_t length);
extern struct disk_view *disk_view_get (struct disk_view *);
extern void disk_view_put (struct disk_view *); /* or NULL */

extern const char *disk_view_name (const struct disk_view *);

/* Does the view show only what is dirty in its bitmap?  Then all the rest is
 * data to disk_view_extent, and reads of it fail with EIO.
 */
extern bool disk_view_is_dirty_only (const struct disk_view *);

/* A list that has the bitmap of that moment, and no other: a reference, for
 * disk_offers_put.  Reads of the bitmap do not fail, whatever becomes of the
 * view.
 */
extern struct disk_offers *disk_view_offers (const struct disk_view *);

/* A client has the view open, from the first call to the second.  It has a
 * reference besides.
 */
extern void disk_view_hold (struct disk_view *);
extern void disk_view_release (struct disk_view *);

/* As disk_read, disk_read_chunk and disk_extent. */
extern int disk_view_read (struct disk_view *, void *buf, uint32_t count,
                           uint64_t offset);
extern int disk_view_read_chunk (struct disk_view *, uint64_t offset,
                                 struct qcow2_chunk *);
extern int disk_view_extent (struct disk_view *, uint64_t offset,
                             uint64_t limit, uint64_t *length,
                             uint32_t *flags);

/* Call fn for each view.  The strings are valid during that call only. */
struct disk_view_state {
  const char *name;
  unsigned clients;             /* that have it open */
  uint64_t kept_bytes;          /* in its scratch file */
  const char *broken;           /* why it is, or NULL */
};
extern void disk_list_views (const struct disk *,
                             void (*fn) (const struct disk_view_state *,
                                         void *opaque),
                             void *opaque);

#endif /* DIRTY_BITMAP_DISK_H */
