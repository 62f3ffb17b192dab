/* nbdkit-dirty-bitmap-filter
 * SPDX-License-Identifier: BSD-3-Clause
 * Copyright the nbdkit-dirty-bitmap-filter authors
 */

#ifndef DIRTY_BITMAP_BITMAP_INTERNAL_H
#define DIRTY_BITMAP_BITMAP_INTERNAL_H

/* What the files of bitmap/ share.
 *
 *   bits.c      the bits of one bitmap in RAM
 *   changes.c   which pieces of them have changed
 *   load.c      from the image to RAM, believing nothing
 *   change.c    what the set shall become (change.h, draft.h)
 *   apply.c     how it does, in RAM and in the image
 *   create.c    bitmaps that the options ask for and the image lacks
 *   set.c       open and close; what the options ask for; what clients see
 *   mark.c      marking, and how a bitmap becomes in use
 *   reserve.c   space for what a mark will have to be written
 *   sync.c      from RAM to the image, and how it ceases to be in use
 *   ahead.c     where the image has more bits than RAM
 *   keep.c      how it comes to have them, so that none is ever missing
 *
 * The states and the invariants that mark.c and sync.c maintain together are
 * described here.
 *
 * A bitmap that records is always in one of these states:
 *
 *   SYNCED   in_use is durably clear in the image, and the image's
 *            bitmap durably has every bit that RAM has
 *   IN_USE   in_use is durably set
 *   DOUBTFUL in_use may be found set or clear after a crash: it has been
 *            written, but not (or not successfully) been made durable.  The
 *            image's bitmap durably has every bit that RAM has
 *   CLOSING  as IN_USE, for a moment within a flush, while no bits may be
 *            set
 *
 * A bitmap that is in RAM alone is IN_USE for ever.  The image has nothing of
 * it, so what the states say of the image does not apply.
 *
 * (A) A bit is set in RAM only in a section of the set's grace in which
 *     IN_USE was read, or that its unit is ahead: then the image has the bit
 *     already (keep.c).  In the former case, in the same section, after the
 *     bits, their pieces are flagged as changed.
 * (B) A bitmap leaves IN_USE for DOUBTFUL only through CLOSING and a
 *     grace period, with no piece flagged then, all pieces that were
 *     taken since durable, and no table entry pending.
 *
 * From these follow I3, and that a set bit need only be read.  By (A) the
 * image had the bit durably, and keep.c never takes a bit from it that RAM
 * has; or the bit was set while in_use was durable.  If in_use has been
 * cleared since, it was by (B): the grace period waited for the section, so
 * the piece had been flagged.  No flag remained, so the piece had been taken
 * after the bit was set, and taken pieces are durable.
 *
 * Locks: state_lock and reserve_lock of the set.  No thread ever holds both.
 * keep_lock is taken with no other lock held, and none is taken inside it.
 * The steps of a flush run under the flush lock of qcow2/ and take state_lock
 * or reserve_lock inside it.  Marks hold no other lock when they take one of
 * these.  Both call qcow2/ with one of them held.  qcow2/ then takes its own
 * locks inside, but never the flush lock: only disk/flush.c, qcow2_flush and
 * qcow2_stop take that, and their callers hold no lock of ours.  A thread that
 * leads a round (keep.c) is such a caller.  A change (change.h) is made with
 * the flush lock held and keep_busy set, while no mark is under way.  A
 * section never waits for anything, so a thread that waits for a grace period
 * may hold any lock.  A section may be entered with state_lock held.
 */

#include <pthread.h>
#include <stdatomic.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "bitmap/ahead.h"
#include "bitmap/bits.h"
#include "bitmap/bitmap.h"
#include "bitmap/changes.h"
#include "common/grace.h"
#include "common/meter.h"
#include "qcow2/bitmap-directory.h"
#include "qcow2/holes.h"
#include "qcow2/qcow2.h"

enum bitmap_state { SYNCED, IN_USE, DOUBTFUL, CLOSING };

/* A table entry that was changed in RAM and is not known to be durable. */
struct pending_entry {
  uint32_t index;
  bool attempted;               /* the entry may be in the image */
  uint64_t old_entry;           /* its value in RAM before */
  uint64_t reserved;            /* the cluster it was made of (reserve.c), or
                                   0 */
};

/* A reserved cluster reads as zeroes: a flag stored with its host offset. */
#define RESERVED_ZEROED UINT64_C (1)

struct bitmap {
  /* Read by marks. */
  struct bits bits;
  unsigned shift;               /* log2 of the granularity */
  _Atomic enum bitmap_state state; /* changed under state_lock */

  atomic_ulong references;      /* bitmap_get; the last put frees it */
  char *name;
  uint32_t flags;               /* of its directory entry, but for in_use */
  bool in_ram;                  /* it is not in the image, and IN_USE for
                                   ever */
  bool is_recording;            /* it is on such a list of the set */

  /* While a backup is under way: what was changed since it began.  This is in
   * RAM alone, and not among the bitmaps of the set; it is on the list of
   * those that record.  Or NULL.
   */
  struct bitmap *since;
  unsigned long lost;           /* of such a bitmap: barriers that had failed
                                   when the backup began */
  bool stays;                   /* for apply.c: a change does not drop it */
  bool inconsistent;            /* found in use: no bits are loaded, not
                                   offered */
  uint64_t entry_offset;        /* of the directory entry in the image */

  /* Host offset and entries of the bitmap table.  The entries are those that
   * the image shall have, including pending ones.  Only the flush changes
   * them, with reserve_lock held.
   */
  uint64_t table_offset;
  uint32_t table_entries;
  uint64_t *table;

  /* Protected by reserve_lock.  For each table entry: the cluster that is
   * reserved for it, with or without RESERVED_ZEROED, or 0.
   */
  uint64_t *reserved;
  uint32_t nr_reserved;
  uint8_t *table_holes;         /* of the table on disk (qcow2/holes.c) */

  struct changes changes;

  /* For the flush alone: its changes to the table.  They are added and
   * removed with reserve_lock held.
   */
  struct pending_entry *pending;
  size_t nr_pending, max_pending;
  bool settling;                /* this flush wrote the pending entries */

  /* Protected by state_lock: this flush wrote in_use clear, and the flags
   * word has not been written since.
   */
  bool cleared;

  struct ahead ahead;           /* empty unless the set keeps; made when the
                                   bitmap is first on such a list */
  bool fell_back;               /* it is not SYNCED, though the set keeps;
                                   under state_lock */
  atomic_bool returning;        /* it is IN_USE, and marks write bits ahead all
                                   the same, so that a flush can close it */
  atomic_uint nr_entries_wanted; /* a flush shall write flagged pieces, though
                                   the bitmap is not IN_USE */
};

/* The state of the image's bitmaps extension. */
enum bitmap_store {
  STORE_ABSENT,
  STORE_STALE,                  /* the autoclear bit is clear */
  STORE_DAMAGED,
  STORE_GOOD,
};

enum sync_phase {
  SYNC_IDLE,
  SYNC_DATA,                    /* taken pieces may not be durable */
  SYNC_REFERENCES,              /* taken pieces are durable */
  SYNC_SETTLE,                  /* and so are the table entries */
};

/* A bounce buffer of the flush. */
#define SYNC_BUFFER_BYTES 65536

struct bitmap_set {
  struct grace grace;           /* marks being made */
  struct qcow2 *image;
  bool readonly;
  struct bitmap_geometry geometry;

  enum bitmap_store store;
  struct bitmap_damage damage;  /* if STORE_DAMAGED or STORE_STALE */
  uint64_t memory_bytes;        /* an upper bound of what the bitmaps take,
                                   by what the image says of them */
  bool is_backing;              /* of a backing file */
  char *prefix;                 /* of messages; names the backing file */

  /* In the order of the directory.  This and the lists that follow change
   * only in bitmap_change_adopt, while no mark, flush or tidying is under way.
   */
  struct bitmap **bitmaps;
  size_t nr_bitmaps, max_bitmaps;
  struct bitmap **recording;    /* and stored in the image */
  size_t nr_recording;
  struct bitmap **recording_in_ram;
  size_t nr_recording_in_ram;
  struct bitmap **exposed;
  size_t nr_exposed;
  uint64_t mark_bytes;          /* what one section marks at most */

  /* The directory in the image. */
  uint64_t directory_offset;
  size_t directory_bytes;

  char **expose;                /* a copy of what bitmap_options had; none in
                                   the set of a backing file */
  size_t nr_expose;

  /* A change has failed such that the header may refer to another directory
   * than this one (apply.c), and what it said before.  The change sets both,
   * while no mark is under way.  The flag is cleared, and the rest read, under
   * state_lock.  Any thread may read the flag.
   */
  atomic_bool in_doubt;
  struct qcow2_bitmaps_extension undoubted;

  pthread_mutex_t state_lock;   /* protects the bitmaps' states, and the
                                   flags words in the image */
  atomic_size_t nr_unsettled;   /* recording and not SYNCED */
  char why[512];                /* the reason why the last flush could not
                                   store bitmaps, or empty; under state_lock */
  bool told;                    /* a warning was shown; under state_lock */

  pthread_mutex_t reserve_lock; /* protects the fields above that say so */

  /* keep.c.  keeps and flush are fixed.  If keeps is false, the rest is not
   * used.
   */
  bool keeps;
  int (*flush) (struct qcow2 *, struct bitmap_set *); /* bitmap_options */
  atomic_bool loaded_is_durable; /* what was in the image when it was opened */
  pthread_mutex_t keep_lock;    /* protects the fields down to keep_why */
  pthread_cond_t keep_changed;
  bool keep_busy;               /* a thread leads a round, or tidies */
  uint64_t next_round, last_round; /* that collects wants; that has ended */
  uint64_t failed_round;        /* the last that failed */
  struct keep_want *wants;
  size_t nr_wants, max_wants;
  unsigned region_shift;        /* log2 of bytes */
  int64_t pace_began, pace_ns;  /* since then so much time went into rounds */
  char keep_why[512];           /* why the last failed round failed */
  atomic_uint nr_entries_wanted; /* bitmaps that wait for a flush so */
  uint8_t *keep_buffer;         /* of SYNC_BUFFER_BYTES, for that thread */
  tally rounds[2], rounds_ns[2]; /* failed, succeeded; by that thread */
  tally regions_marked, bytes_tidied; /* by that thread */
  tally fallbacks;              /* under state_lock */

  /* For the flush alone. */
  enum sync_phase phase;
  bool left_out;                /* this flush left out a bitmap */
  uint64_t sync_began, sync_bytes;
  tally syncs[2], syncs_ns[2], syncs_bytes[2]; /* failed, succeeded */
  uint8_t *buffer;
};

/* The bit of the granule at offset, and the last bit of a range. */
static inline uint64_t
bitmap_first_bit (const struct bitmap *b, uint64_t offset)
{
  return offset >> b->shift;
}

static inline uint64_t
bitmap_last_bit (const struct bitmap *b, uint64_t offset, uint64_t count)
{
  return (offset + count - 1) >> b->shift;
}

static inline bool
bitmap_has_all (const struct bitmap *b, uint64_t offset, uint64_t count)
{
  return bits_all_set (&b->bits, bitmap_first_bit (b, offset),
                       bitmap_last_bit (b, offset, count));
}

static inline uint64_t
bitmap_table_bytes (const struct bitmap *b)
{
  return 8 * (uint64_t) b->table_entries;
}

/* Are all units of a range ahead? */
static inline bool
bitmap_is_ahead (const struct bitmap *b, uint64_t offset, uint64_t count)
{
  return b->ahead.ahead != NULL &&
    ahead_all (&b->ahead, ahead_first (&b->ahead, offset),
               ahead_last (&b->ahead, offset, count));
}

/* set.c */

/* The lists of a set that is to be. */
struct bitmap_lists {
  struct bitmap **bitmaps, **recording, **recording_in_ram, **exposed;
  size_t nr_bitmaps, nr_recording, nr_recording_in_ram, nr_exposed;
  unsigned min_shift;
};

/* No bitmap, and room for max. */
extern int bitmap_lists_init (struct bitmap_lists *, size_t max);
extern void bitmap_lists_free (struct bitmap_lists *);
extern void bitmap_lists_add (struct bitmap_lists *, struct bitmap *,
                              bool records, bool exposed);
extern void bitmap_lists_add_since (struct bitmap_lists *, struct bitmap *);

/* The set gets these lists, which are empty then.  Its old ones are freed. */
extern void bitmap_set_install (struct bitmap_set *, struct bitmap_lists *);

/* Make a bitmap of nr_bits (0 for none at all), not in the set yet, with one
 * reference.  NULL with ENOMEM.
 */
extern struct bitmap *bitmap_new (const struct bitmap_directory_entry *,
                                  uint64_t nr_bits);

/* Make room for nr more bitmaps. */
extern int bitmap_set_reserve (struct bitmap_set *, size_t nr);
extern struct bitmap *bitmap_set_find (const struct bitmap_set *,
                                       const char *name);

/* Would clients be offered a new bitmap of this name? */
extern bool bitmap_set_wants (const struct bitmap_set *, const char *name);
extern uint64_t bitmap_default_granularity (const struct bitmap_set *);
extern uint64_t bitmap_set_nr_bits (const struct bitmap_set *,
                                    unsigned granularity_bits);

/* Will clients be offered the bitmap of this name, if it is consistent?  If
 * not, and the set is read-only, its bits are not needed.
 */
extern bool bitmap_is_wanted (const struct bitmap_options *,
                              const char *name);

/* load.c: fill the set from the image, as far as it is sound. */
extern void bitmap_load (struct bitmap_set *, const struct bitmap_options *);

/* The memory that a bitmap takes whatever its table says, and the bound on
 * that of all bitmaps.
 */
extern uint64_t bitmap_fixed_memory (const struct bitmap_set *,
                                     unsigned granularity_bits,
                                     size_t name_bytes);
extern uint64_t bitmap_fixed_memory_limit (void);

/* apply.c: what bitmap_change_end does first. */
struct bitmap_change;
extern void bitmap_change_give_back (struct bitmap_change *);

/* create.c: create the required bitmaps that are absent.  The first function
 * says whether they can be created.
 */
extern int bitmap_create_check (const struct bitmap_set *,
                                const struct bitmap_options *);
extern int bitmap_create_missing (struct bitmap_set *,
                                  const struct bitmap_options *);

/* mark.c */

/* Change a state.  state_lock is held. */
extern void bitmap_set_state (struct bitmap_set *, struct bitmap *,
                              enum bitmap_state);

/* Write the flags word.  state_lock is held.  Sets the state to DOUBTFUL,
 * whether this succeeds or not.
 */
extern int bitmap_write_flags (struct bitmap_set *, struct bitmap *,
                               bool in_use);

/* reserve.c */

/* For a bitmap that records, once its table is loaded. */
extern int bitmap_reserve_init (struct bitmap *);
extern void bitmap_reserve_free (struct bitmap *);

/* All of the table was written to the image, zeroes, too. */
extern void bitmap_reserve_table_written (struct bitmap *);

/* Reserve the space that the bits of a range will need, as far as there is
 * any.  No lock is held.
 */
extern void bitmap_reserve (struct bitmap_set *, uint64_t offset,
                            uint64_t count);

/* With reserve_lock held: make sure that a table entry can be written. */
extern int bitmap_reserve_entry (struct bitmap_set *, struct bitmap *,
                                 uint32_t index);

/* With reserve_lock held: take the cluster reserved for a table entry, or 0,
 * for the caller; and give it back.
 */
extern uint64_t bitmap_take_reserved (struct bitmap *, uint32_t index);
extern void bitmap_keep_reserved (struct bitmap *, uint32_t index,
                                  uint64_t reserved);

/* With reserve_lock held: release all that is reserved.  True if there was
 * anything.
 */
extern bool bitmap_release_reserved (struct bitmap_set *, struct bitmap *);

/* sync.c */

/* Are all bits of a cluster of bits ones?  Not if some of its bits are beyond
 * the end, since those must be zero in the image.
 */
extern bool bitmap_cluster_is_full (const struct bitmap_set *,
                                    const struct bitmap *, uint32_t index);

/* Write the bytes [offset, offset + count) of the array of bits, and zeroes
 * beyond its end, to a data cluster.  buffer has SYNC_BUFFER_BYTES.  If durable
 * is not NULL, this tries to make them durable by themselves, and sets
 * *durable to false if that needs a barrier.  reserve_lock is held, unless the
 * bitmap is a new one that no other thread has.
 */
extern int bitmap_write_bits (struct bitmap_set *, struct bitmap *,
                              uint8_t *buffer, uint64_t offset,
                              uint64_t count, uint64_t host_offset,
                              bool *durable);

/* keep.c */

/* For a set whose lists are made, before any mark.  flush is that of
 * bitmap_options.
 */
extern int keep_init (struct bitmap_set *,
                      int (*flush) (struct qcow2 *, struct bitmap_set *));
extern void keep_free (struct bitmap_set *);

/* For another bitmap of a set that keeps its bitmaps.  granularity is log2. */
extern int keep_init_ahead (const struct bitmap_set *, struct ahead *,
                            unsigned granularity);

/* Make durable what was loaded, since bits that are set already are never
 * written again: a process that was killed may have written it a moment ago.
 * Before the first mark, if not loaded_is_durable.  No lock is held.
 */
extern int keep_begin (struct bitmap_set *);

/* Make the units of a range ahead, for each bitmap that lacks a bit and is
 * not IN_USE.  -1 if that failed for some.  No lock is held.
 */
extern int keep_ahead (struct bitmap_set *, uint64_t offset,
                        uint64_t count);

/* Warn of bitmaps that have fallen back to IN_USE, once for each.  No lock is
 * held.
 */
extern void keep_tell_fallbacks (struct bitmap_set *);

#endif /* DIRTY_BITMAP_BITMAP_INTERNAL_H */
