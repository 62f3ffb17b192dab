/* nbdkit-dirty-bitmap-filter
 * SPDX-License-Identifier: BSD-3-Clause
 * Copyright the nbdkit-dirty-bitmap-filter authors
 */

#ifndef DIRTY_BITMAP_DISK_OFFERS_H
#define DIRTY_BITMAP_DISK_OFFERS_H

/* The bitmaps that clients are offered, and which clients read them.
 * disk.h has what the rooms above may call.
 *
 * An offer is one bitmap.  A list has all offers of one moment and never
 * changes; when the set of bitmaps changes, another list takes its place.
 * Both are counted:
 *
 *   a reference to a list     its array, its index and its offers exist
 *   a reference to an offer   the offer and its bitmap exist, whether they
 *                             are still on the current list or not
 *   a holder of an offer      a client reads the bitmap, which is therefore
 *                             in use.  A holder also has a reference: to
 *                             hold keeps nothing alive
 *
 * An offer is cut by offers_switch, once what it stood for is no longer there:
 * its bitmap was removed, or changed other than by marks.  All further reads
 * of the offer fail with EIO.  A cut offer stays cut.  If its bitmap is still
 * to be offered, the new list has a new offer of it, which has no holders.
 *
 * What other threads see:
 *
 * - A thread that takes the list after offers_switch has returned gets the
 *   new one.
 * - A client may begin to hold an offer between offers_is_held and the
 *   change that this allows.  So offers_switch cuts the offer even if nothing
 *   held it.  Such a client gets EIO and not a mixture.
 *
 * Locks: the lock protects which list is current, and is held for a moment
 * only, with no other lock taken inside.  The counts are atomic.
 * offers_prepare, offers_switch and offers_abandon are called by one thread
 * at a time.  The others are called by any thread.
 */

#include <pthread.h>
#include <stdatomic.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "disk/disk.h"

struct bitmap;
struct bitmap_set;

struct disk_offer {
  const struct bitmap *bitmap;  /* a reference */
  uint64_t size;                /* how many bytes of the disk it covers */
  atomic_ulong references;
  atomic_ulong holders;         /* clients that read it */
  atomic_bool cut;
  bool is_fresh;                /* it was not to be an earlier one */
};

struct offers {
  pthread_mutex_t lock;
  struct disk_offers *current;  /* a reference; NULL before the first */
};

extern void offers_init (struct offers *);

/* Drop the current list.  References to it and its offers may remain. */
extern void offers_free (struct offers *);

/* A bitmap that is to be offered. */
struct offer_source {
  const struct bitmap *bitmap;
  uint64_t size;                /* as in struct disk_offer */
  bool goes_on;                 /* clients that read it may go on */
};

/* Append what a set exposes now to an array of nr of them, which has the room.
 * Returns how many there are then.
 */
extern size_t offer_sources_add (struct offer_source *, size_t nr,
                                 const struct bitmap_set *, uint64_t size);

/* A new list of these, but that only the first of several with the same name
 * is on it.  NULL with ENOMEM, reported.
 */
extern struct disk_offers *offers_prepare_from (const struct offer_source *,
                                                size_t nr);

/* The same of the bitmaps that each set exposes now, in this order, of which
 * those of sets[i] cover sizes[i] bytes of the disk.
 */
extern struct disk_offers *
offers_prepare (struct bitmap_set *const *sets, const uint64_t *sizes,
                size_t nr_sets);

/* Make it the current list.  This cannot fail.  Where the list before has an
 * offer of the same bitmap, and that goes on, the offer is kept, with its
 * holders.  The other offers of that list are cut.
 */
extern void offers_switch (struct offers *, struct disk_offers *prepared);
extern void offers_abandon (struct disk_offers *prepared);

/* Prepare and switch.  0, or -1 with ENOMEM, reported. */
extern int offers_replace (struct offers *, struct bitmap_set *const *sets,
                           const uint64_t *sizes, size_t nr_sets);

/* Does a client read this bitmap, by a current offer? */
extern bool offers_is_held (const struct offers *, const struct bitmap *);

/* The same, by the offers of a list. */
extern bool offers_is_held_on (const struct disk_offers *,
                               const struct bitmap *);

/* A reference to the current list.  disk_offers_put puts it. */
extern struct disk_offers *offers_get (const struct offers *);

/* Another reference to a list. */
extern struct disk_offers *offers_ref (struct disk_offers *);

/* The offer of this bitmap on a list, or NULL, without a reference. */
extern struct disk_offer *offers_of (const struct disk_offers *,
                                     const struct bitmap *);

#endif /* DIRTY_BITMAP_DISK_OFFERS_H */
