/* nbdkit-dirty-bitmap-filter
 * SPDX-License-Identifier: BSD-3-Clause
 * Copyright the nbdkit-dirty-bitmap-filter authors
 */

#ifndef DIRTY_BITMAP_BITMAP_CHANGE_H
#define DIRTY_BITMAP_BITMAP_CHANGE_H

/* A change of the set of bitmaps: any number of actions, carried out whole or
 * not at all, in RAM and in the image (I13).
 *
 * A change goes through these steps.  Whatever fails, bitmap_change_end leaves
 * the set as it was.
 *
 *   begin     nothing has changed
 *   actions   what the set shall be is noted and checked
 *   prepare   everything that the set shall be is made in RAM
 *   store     new contents, tables and directory are written to free clusters
 *   - flush of the image -
 *   switch    one write of the header makes the image have the new set
 *   adopt     so has RAM
 *   end
 *
 * From prepare to adopt no mark, no flush and no tidying may be under way, and
 * no other thread may read the lists of the set.  store, switch and the flush
 * are left out if bitmap_change_is_in_ram.
 *
 * Functions return 0, or -1 with errno set and the reason reported.  Where
 * QEMU has a text for the reason, it is that, though it begins with a capital.
 */

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

struct bitmap;
struct bitmap_change;
struct bitmap_set;

/* Does a client read the bitmap?  Then it is changed only by force. */
typedef bool (*bitmap_is_busy_fn) (void *opaque, const struct bitmap *);

/* image is a name for the image, for messages.  NULL if there is no
 * memory.  One change of a set at a time.
 */
extern struct bitmap_change *bitmap_change_begin (struct bitmap_set *,
                                                  const char *image,
                                                  bitmap_is_busy_fn,
                                                  void *opaque);

/* The actions.  Each sees what those before it have done. */

enum {
  BITMAP_ADD_DISABLED = 1,      /* it does not record */
  BITMAP_ADD_IN_RAM = 2,        /* it is not stored in the image */
};

/* Without a granularity it is QEMU's default. */
extern int bitmap_change_add (struct bitmap_change *, const char *name,
                              bool has_granularity, uint64_t granularity,
                              unsigned flags);

/* Also for a bitmap that is inconsistent. */
extern int bitmap_change_remove (struct bitmap_change *, const char *name,
                                 bool force);
extern int bitmap_change_clear (struct bitmap_change *, const char *name,
                                bool force);
extern int bitmap_change_enable (struct bitmap_change *, const char *name,
                                 bool force);
extern int bitmap_change_disable (struct bitmap_change *, const char *name,
                                  bool force);

/* Set the bits of target that are set in any of the sources. */
extern int bitmap_change_merge (struct bitmap_change *, const char *target,
                                const char *const *sources,
                                size_t nr_sources, bool force);

/* A backup: a client copies what is dirty in the bitmap, and when it has
 * succeeded, the bitmap is to have what was changed since the backup began.
 * Until then it has that as well as what it had before, in RAM and in the
 * image.  So whatever ends the backup early, the next one copies all that
 * this one should have (I11).  The bitmap has to record.
 *
 * If create is true, a bitmap that does not exist, or is inconsistent, is made
 * anew, with all of the disk dirty, since nothing is known of what changed
 * before (I12).  *action says what was done.
 */
enum bitmap_backup_action {
  BITMAP_BACKUP_USED,
  BITMAP_BACKUP_CREATED,
  BITMAP_BACKUP_RECREATED,      /* it was inconsistent */
};
extern int bitmap_change_begin_backup (struct bitmap_change *,
                                       const char *name, bool create,
                                       bool has_granularity,
                                       uint64_t granularity, bool freeze,
                                       enum bitmap_backup_action *action);

/* How many barriers had failed when a backup began.  The caller says it right
 * after the action that begins the backup, and asks for it right after the
 * action that ends it.
 */
extern void bitmap_change_set_lost (struct bitmap_change *, const char *name,
                                    unsigned long lost);
extern unsigned long bitmap_change_lost (const struct bitmap_change *,
                                         const char *name);

/* After prepare: a copy of the bitmap with the bits that it has now, which
 * nothing changes, if its backup begins and freeze was set.  The reference is
 * the change's.
 */
extern const struct bitmap *bitmap_change_frozen (const struct bitmap_change *,
                                                  const char *name);

/* After prepare: the bytes that the bitmap will have dirty, those of whole
 * granules.  0 if there is no such bitmap.
 */
extern uint64_t bitmap_change_dirty_bytes (const struct bitmap_change *,
                                           const char *name);

/* The backup has ended.  clear: the bitmap gets what was changed since it
 * began, and clients that read it do not prevent that.  Otherwise the bitmap
 * stays as it is.
 */
extern int bitmap_change_end_backup (struct bitmap_change *,
                                     const char *name, bool clear);

/* Does the change leave the image as it is? */
extern bool bitmap_change_is_in_ram (const struct bitmap_change *);

/* Does it make a bitmap stop recording?  Then the set has to be tidied
 * before, since nothing tidies that bitmap afterwards.
 */
extern bool bitmap_change_needs_tidy (const struct bitmap_change *);

extern int bitmap_change_prepare (struct bitmap_change *);
extern int bitmap_change_store (struct bitmap_change *);

/* If this fails, it has tried to restore what the header said.  If that has
 * failed, too, the set is in doubt: the image may have the old set or the new
 * one.  Marks fail until bitmap_set_settle_doubt succeeds.
 */
extern int bitmap_change_switch (struct bitmap_change *);
extern void bitmap_change_adopt (struct bitmap_change *);
extern void bitmap_change_end (struct bitmap_change *);

/* After prepare: the bitmaps that clients will be offered, and whether the
 * bitmap was there before and clients may go on reading it.
 */
extern size_t bitmap_change_nr_exposed (const struct bitmap_change *);
extern const struct bitmap *
bitmap_change_exposed (const struct bitmap_change *, size_t i, bool *goes_on);

/* No other thread tidies, or leads a round of marks ahead, from pause to
 * resume.  No lock is held.
 */
extern void bitmap_set_pause (struct bitmap_set *);
extern void bitmap_set_resume (struct bitmap_set *);

/* While it is paused: as bitmap_set_tidy, for all units. */
extern int bitmap_set_tidy_paused (struct bitmap_set *);

/* If the set is in doubt: make the image durably have the set that RAM has.
 * Any thread, no lock held.
 */
extern int bitmap_set_settle_doubt (struct bitmap_set *);

#endif /* DIRTY_BITMAP_BITMAP_CHANGE_H */
