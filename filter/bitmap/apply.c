/* nbdkit-dirty-bitmap-filter
 * SPDX-License-Identifier: BSD-3-Clause
 * Copyright the nbdkit-dirty-bitmap-filter authors
 */

/* From the drafts of a change to bitmaps, in RAM and in the image.
 *
 * Nothing that the image's directory refers to is overwritten.  Bitmaps with
 * other contents get a table and data clusters of their own, and all of them
 * a new directory.  When all of this and its refcounts are durable, the header
 * is pointed at the new directory in one step.  So after a crash the image has
 * the old set or the new one, and at worst leaked clusters.
 *
 * A bitmap whose contents do not change keeps its struct, its table and its
 * state.  Its new entry has in_use set unless it is SYNCED, so that what is
 * true of its old entry is true of the new one (I13).
 *
 * If the header cannot be written, it is unknown which directory the image
 * has.  A mark would keep one of them complete, and not the other.  So what
 * the header said is restored, durably.  Until that has succeeded the set is
 * in doubt, and no mark succeeds.
 */

#include <config.h>

#include <assert.h>
#include <errno.h>
#include <stdlib.h>
#include <string.h>

#include "bitmap/draft.h"
#include "common/bytes.h"
#include "common/cleanup.h"
#include "common/report.h"
#include "qcow2/order.h"

static uint64_t
clusters_of (const struct bitmap_set *set, uint64_t bytes)
{
  return div_round_up (bytes, set->geometry.cluster_size_bytes);
}

/* Make the bitmap of a draft that is new. */
static struct bitmap *
make_bitmap (struct bitmap_set *set, const struct draft *d)
{
  const struct bitmap_directory_entry entry = {
    .table_entries = bitmap_table_entries_needed (&set->geometry, d->shift),
    .flags = d->enabled ? BITMAP_FLAG_AUTO : 0,
    .granularity_bits = d->shift,
    .name = d->name,
    .name_bytes = strlen (d->name),
  };
  struct bitmap *b = bitmap_new (&entry, bitmap_set_nr_bits (set, d->shift));

  if (b != NULL && !d->in_ram)
    b->table = calloc (b->table_entries + UINT64_C (1), 8);
  if (b == NULL || (!d->in_ram && b->table == NULL)) {
    report_error ("bitmap '%s': calloc: %m", d->name);
    bitmap_put (b);
    return NULL;
  }
  b->in_ram = d->in_ram;
  if (d->in_ram)
    atomic_init (&b->state, IN_USE);
  if (d->is_all_dirty)
    bits_set_all (&b->bits);
  for (size_t i = 0; i < d->nr_content; ++i) {
    const struct content *from = &d->content[i];

    bits_add (&b->bits, b->shift, &from->bitmap->bits, from->bitmap->shift,
              from->shift);
  }
  return b;
}

/* What a bitmap needs to record, unless it had it before.  The map of units
 * ahead may be read at any time for a bitmap that clients are offered, so it
 * gets that only when the lists change, too.
 */
static int
prepare_to_record (struct bitmap_set *set, struct draft *d)
{
  struct bitmap *b = d->bitmap;

  if (b->in_ram)
    return 0;
  if (b->reserved == NULL && bitmap_reserve_init (b) == -1)
    return -1;
  return set->keeps && b->ahead.ahead == NULL
    ? keep_init_ahead (set, &d->ahead, d->shift) : 0;
}

/* The same bound as when they are loaded: bitmaps that exceed it would not be
 * loaded again.
 */
static int
check_memory (const struct bitmap_change *c)
{
  uint64_t bytes = 0;

  for (size_t i = 0; i < c->nr_drafts; ++i) {
    const struct draft *d = &c->drafts[i];

    bytes += bitmap_fixed_memory (c->set, d->shift, strlen (d->name));
  }
  if (bytes <= bitmap_fixed_memory_limit ())
    return 0;
  report_error ("the tables of all bitmaps would take more than an eighth of "
                "the memory that nbdkit can use");
  errno = ENOMEM;
  return -1;
}

/* Make the bitmap of what is changed since a backup begins. */
static struct bitmap *
make_since (struct bitmap_set *set, const struct draft *d)
{
  const struct draft since = {
    .name = d->name, .shift = d->shift, .enabled = true, .in_ram = true,
  };
  struct bitmap *b = make_bitmap (set, &since);

  if (b != NULL)
    b->lost = d->lost;
  return b;
}

/* Make a copy of the draft's bitmap. */
static struct bitmap *
make_frozen (struct bitmap_set *set, const struct draft *d)
{
  struct content content = { .bitmap = d->bitmap, .shift = d->shift };
  const struct draft frozen = {
    .name = d->name, .shift = d->shift, .in_ram = true,
    .content = &content, .nr_content = 1,
  };

  return make_bitmap (set, &frozen);
}

/* Make the bitmap of a draft, or take the one that stays. */
static int
prepare_draft (struct bitmap_change *c, struct draft *d)
{
  struct bitmap_set *set = c->set;
  bool records, exposed;

  d->bitmap = d->is_new ? make_bitmap (set, d) : d->original;
  if (d->bitmap == NULL)
    return -1;
  d->bitmap->stays = true;
  records = d->enabled && !set->readonly && !d->bitmap->inconsistent;
  exposed = !d->bitmap->inconsistent && bitmap_set_wants (set, d->name);
  if (records && prepare_to_record (set, d) == -1)
    return -1;
  if (exposed)
    c->goes_on[c->lists.nr_exposed] = !d->is_new && !d->is_forced;
  bitmap_lists_add (&c->lists, d->bitmap, records, exposed);
  if (d->begins_backup && (d->since = make_since (set, d)) == NULL)
    return -1;
  if (d->is_to_freeze && (d->frozen = make_frozen (set, d)) == NULL)
    return -1;
  if (d->since != NULL)
    bitmap_lists_add_since (&c->lists, d->since);
  else if (d->bitmap->since != NULL && !d->ends_backup)
    bitmap_lists_add_since (&c->lists, d->bitmap->since);
  return 0;
}

int
bitmap_change_prepare (struct bitmap_change *c)
{
  struct bitmap_set *set = c->set;

  if (check_memory (c) == -1 ||
      bitmap_lists_init (&c->lists, c->nr_drafts) == -1)
    return -1;
  c->goes_on = calloc (c->nr_drafts + 1, sizeof *c->goes_on);
  if (c->goes_on == NULL) {
    report_error ("calloc: %m");
    return -1;
  }
  for (size_t i = 0; i < set->nr_bitmaps; ++i)
    set->bitmaps[i]->stays = false;
  for (size_t i = 0; i < c->nr_drafts; ++i)
    if (prepare_draft (c, &c->drafts[i]) == -1)
      return -1;
  return 0;
}

const struct bitmap *
bitmap_change_frozen (const struct bitmap_change *c, const char *name)
{
  return draft_find (c, name)->frozen;
}

uint64_t
bitmap_change_dirty_bytes (const struct bitmap_change *c, const char *name)
{
  const struct draft *d = draft_find (c, name);
  uint64_t ignored;

  return d == NULL ? 0
    : bitmap_dirty_bytes (d->bitmap, UINT64_MAX, &ignored);
}

size_t
bitmap_change_nr_exposed (const struct bitmap_change *c)
{
  return c->lists.nr_exposed;
}

const struct bitmap *
bitmap_change_exposed (const struct bitmap_change *c, size_t i, bool *goes_on)
{
  *goes_on = c->goes_on[i];
  return c->lists.exposed[i];
}

/* Write bytes, and zeroes up to the end of their last cluster. */
static int
write_clusters (struct bitmap_set *set, enum qcow2_class class,
                const void *bytes, size_t count, uint64_t host_offset)
{
  const size_t padded =
    clusters_of (set, count) * set->geometry.cluster_size_bytes;
  CLEANUP_FREE uint8_t *buf = calloc (1, padded);

  if (buf == NULL) {
    report_error ("calloc: %m");
    return -1;
  }
  memcpy (buf, bytes, count);
  return qcow2_write_metadata (set->image, class, buf, padded, host_offset);
}

/* The first piece from this one on that may have a set bit, or nr_pieces. */
static uint64_t
next_populated (const struct bits *bits, uint64_t piece)
{
  while (piece < bits->nr_pieces && !bits_is_populated (bits, piece))
    piece++;
  return piece;
}

static int
store_bits (struct bitmap_set *set, struct bitmap *b)
{
  const uint64_t in_cluster = set->geometry.cluster_size_bytes / PIECE_BYTES;
  uint64_t piece = 0;

  while ((piece = next_populated (&b->bits, piece)) < b->bits.nr_pieces) {
    const uint32_t index = piece / in_cluster;

    if (bitmap_cluster_is_full (set, b, index))
      b->table[index] = BITMAP_TABLE_ALL_ONES;
    else {
      if (qcow2_alloc (set->image, QCOW2_BITMAP_DATA, 1, &b->table[index],
                       NULL) == -1)
        return -1;
      if (bitmap_write_bits (set, b, set->buffer,
                             index * in_cluster * PIECE_BYTES,
                             set->geometry.cluster_size_bytes,
                             b->table[index], NULL) == -1)
        return -1;
    }
    piece = (index + UINT64_C (1)) * in_cluster;
  }
  return 0;
}

static int
store_bitmap (struct bitmap_set *set, struct bitmap *b)
{
  CLEANUP_FREE uint64_t *copy = malloc (bitmap_table_bytes (b));
  uint64_t offset;

  if (copy == NULL) {
    report_error ("malloc: %m");
    return -1;
  }
  if (qcow2_alloc (set->image, QCOW2_BITMAP_TABLE,
                   clusters_of (set, bitmap_table_bytes (b)), &offset,
                   NULL) == -1)
    return -1;
  b->table_offset = offset;
  if (store_bits (set, b) == -1)
    return -1;
  bitmap_table_put (copy, b->table, b->table_entries);
  bitmap_reserve_table_written (b);
  return write_clusters (set, QCOW2_BITMAP_TABLE, copy, bitmap_table_bytes (b),
                         offset);
}

/* The flags of a bitmap's entry in the new directory. */
static uint32_t
flags_of (const struct draft *d)
{
  const struct bitmap *b = d->bitmap;
  const uint32_t flags = d->enabled ? BITMAP_FLAG_AUTO : 0;

  return b->inconsistent || atomic_load (&b->state) != SYNCED
    ? flags | BITMAP_FLAG_IN_USE : flags;
}

/* A bitmap that no longer records stays as it is in the image. */
static int
check_stored (const struct bitmap_change *c)
{
  for (size_t i = 0; i < c->nr_drafts; ++i) {
    const struct draft *d = &c->drafts[i];

    if (d->is_new || d->in_ram || d->enabled || d->original->inconsistent ||
        !bitmap_is_enabled (d->original) ||
        atomic_load (&d->original->state) == SYNCED)
      continue;
    report_error ("bitmap '%s' cannot be disabled, since it could not be "
                  "stored: %s", d->name, c->set->why);
    errno = EIO;
    return -1;
  }
  return 0;
}

static int
store_directory (struct bitmap_change *c)
{
  struct bitmap_set *set = c->set;
  CLEANUP_FREE uint8_t *directory = NULL;
  size_t bytes = 0;
  uint64_t offset;

  for (size_t i = 0; i < c->nr_drafts; ++i)
    if (!c->drafts[i].in_ram)
      bytes += bitmap_directory_entry_bytes (strlen (c->drafts[i].name));
  c->directory_bytes = bytes;
  if (bytes == 0)
    return 0;
  directory = malloc (bytes);
  if (directory == NULL) {
    report_error ("malloc: %m");
    return -1;
  }
  bytes = 0;
  for (size_t i = 0; i < c->nr_drafts; ++i) {
    const struct draft *d = &c->drafts[i];

    if (!d->in_ram)
      bytes += bitmap_directory_put (&directory[bytes],
        &(struct bitmap_directory_entry) {
          .table_offset = d->bitmap->table_offset,
          .table_entries = d->bitmap->table_entries,
          .flags = flags_of (d),
          .granularity_bits = d->shift,
          .name_bytes = strlen (d->name),
          .name = d->name,
        });
  }
  if (qcow2_alloc (set->image, QCOW2_BITMAP_DIRECTORY,
                   clusters_of (set, bytes), &offset, NULL) == -1)
    return -1;
  c->directory_offset = offset;
  return write_clusters (set, QCOW2_BITMAP_DIRECTORY, directory, bytes,
                         offset);
}

int
bitmap_change_store (struct bitmap_change *c)
{
  if (check_stored (c) == -1 ||
      (c->set->store == STORE_ABSENT &&
       qcow2_check_bitmaps_extension (c->set->image) == -1))
    return -1;
  for (size_t i = 0; i < c->nr_drafts; ++i) {
    const struct draft *d = &c->drafts[i];

    if (d->is_new && !d->in_ram && store_bitmap (c->set, d->bitmap) == -1)
      return -1;
  }
  return store_directory (c);
}

static size_t
nr_stored (const struct bitmap_change *c)
{
  size_t nr = 0;

  for (size_t i = 0; i < c->nr_drafts; ++i)
    nr += !c->drafts[i].in_ram;
  return nr;
}

int
bitmap_set_settle_doubt (struct bitmap_set *set)
{
  if (!atomic_load (&set->in_doubt))
    return 0;
  ACQUIRE_LOCK_FOR_CURRENT_SCOPE (&set->state_lock);
  if (!atomic_load (&set->in_doubt))
    return 0;
  if (qcow2_restore_bitmaps_extension (set->image, &set->undoubted) == -1)
    return -1;
  atomic_store (&set->in_doubt, false);
  return 0;
}

int
bitmap_change_switch (struct bitmap_change *c)
{
  struct bitmap_set *set = c->set;
  const size_t nr = nr_stored (c);
  struct report_hold hold;
  int r;

  qcow2_get_bitmaps_extension (set->image, &set->undoubted);
  r = nr > 0
    ? qcow2_set_bitmaps_extension (set->image, nr, c->directory_bytes,
                                   c->directory_offset)
    : qcow2_remove_bitmaps_extension (set->image);
  if (r == 0)
    return 0;

  const int err = errno;

  atomic_store (&set->in_doubt, true);
  report_hold_begin (&hold);
  c->is_in_doubt = bitmap_set_settle_doubt (set) == -1;
  report_hold_end (&hold);
  errno = err;
  return -1;
}

/* The clusters of a bitmap's bits, of its table and of what is reserved. */
static void
release_bitmap (struct bitmap_set *set, struct bitmap *b)
{
  ACQUIRE_LOCK_FOR_CURRENT_SCOPE (&set->reserve_lock);
  if (b->reserved != NULL)
    bitmap_release_reserved (set, b);
  for (size_t i = 0; i < b->nr_pending; ++i)
    if (bitmap_table_entry_is_data (b->pending[i].old_entry))
      qcow2_release (set->image, b->pending[i].old_entry, 1);
  for (uint32_t i = 0; b->table != NULL && i < b->table_entries; ++i)
    if (bitmap_table_entry_is_data (b->table[i]))
      qcow2_release (set->image, b->table[i], 1);
  if (b->table_offset != 0 && b->table != NULL)
    qcow2_release (set->image, b->table_offset,
                   clusters_of (set, bitmap_table_bytes (b)));
}

void
bitmap_change_give_back (struct bitmap_change *c)
{
  struct bitmap_set *set = c->set;

  if (c->is_adopted)
    return;
  for (size_t i = 0; i < c->nr_drafts; ++i) {
    struct draft *d = &c->drafts[i];

    bitmap_put (d->since);
    if (!d->is_new || d->bitmap == NULL)
      continue;
    /* What the header may refer to is leaked until the next open. */
    if (!c->is_in_doubt)
      release_bitmap (set, d->bitmap);
    bitmap_put (d->bitmap);
  }
  if (c->directory_offset != 0 && !c->is_in_doubt)
    qcow2_release (set->image, c->directory_offset,
                   clusters_of (set, c->directory_bytes));
  bitmap_lists_free (&c->lists);
}

/* A bitmap leaves the set. */
static void
drop (struct bitmap_set *set, struct bitmap *b)
{
  if (!b->in_ram) {
    if (atomic_load (&b->state) != SYNCED)
      atomic_fetch_sub (&set->nr_unsettled, 1);
    release_bitmap (set, b);
  }
  bitmap_put (b);
}

static void
adopt_draft (struct bitmap_set *set, struct draft *d)
{
  struct bitmap *b = d->bitmap;

  if (!d->is_new && !d->in_ram && !d->enabled && b->reserved != NULL) {
    ACQUIRE_LOCK_FOR_CURRENT_SCOPE (&set->reserve_lock);
    bitmap_release_reserved (set, b);
  }
  b->flags = (b->flags & ~BITMAP_FLAG_AUTO) |
    (d->enabled ? BITMAP_FLAG_AUTO : 0);
  if (d->ahead.ahead != NULL) {
    b->ahead = d->ahead;
    d->ahead = (struct ahead) { 0 };
  }
  if (d->ends_backup && !d->is_new) {
    bitmap_put (b->since);
    b->since = NULL;
  }
  if (d->begins_backup)
    b->since = d->since;
}

void
bitmap_change_adopt (struct bitmap_change *c)
{
  struct bitmap_set *set = c->set;
  uint64_t entry_offset = c->directory_offset;

  for (size_t i = 0; i < set->nr_bitmaps; ++i)
    if (!set->bitmaps[i]->stays)
      drop (set, set->bitmaps[i]);
  for (size_t i = 0; i < c->nr_drafts; ++i) {
    struct draft *d = &c->drafts[i];

    adopt_draft (set, d);
    if (d->in_ram || !c->is_in_image)
      continue;
    d->bitmap->entry_offset = entry_offset;
    entry_offset += bitmap_directory_entry_bytes (strlen (d->name));
  }
  bitmap_set_install (set, &c->lists);
  if (c->is_in_image) {
    if (set->store == STORE_GOOD)
      qcow2_release (set->image, set->directory_offset,
                     clusters_of (set, set->directory_bytes));
    set->directory_offset = c->directory_offset;
    set->directory_bytes = c->directory_bytes;
    set->store = c->directory_bytes > 0 ? STORE_GOOD : STORE_ABSENT;
  }
  c->is_adopted = true;
}
