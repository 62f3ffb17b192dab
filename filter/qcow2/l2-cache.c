/* nbdkit-dirty-bitmap-filter
 * SPDX-License-Identifier: BSD-3-Clause
 * Copyright the nbdkit-dirty-bitmap-filter authors
 */

/* L2 tables in RAM.
 *
 * The cache holds slices of L2 tables, of at most 4 KiB, in sets of 16 slots
 * each; the number of a slice says which set it can be in.  Slices are
 * numbered by their position on the guest's disk, whichever L2 tables they
 * are in, so moving a table does not affect the cache.
 *
 * Looking up takes no lock.  A slot's tag has the number of its slice and a
 * version, which changes whenever something else is put into the slot.  A
 * reader reads the tag, the entries, and the tag again: if the tag has not
 * changed, the entries were the slice's.  That needs no fence: a word is
 * stored with release and loaded with acquire, so a reader that sees a word
 * stored after the tag was removed also sees that the tag is gone.  All
 * changes are made under the set's lock.  An extended entry is two words, so
 * the tag is also removed, and comes back with another version, when such
 * entries are changed.
 *
 * A slot that was changed is dirty until the flush writes it, since only the
 * flush knows when (flush.c).  The flush copies dirty slots and pins them
 * until the copies are on disk: a slot that is dirty or pinned is not
 * replaced, so no thread reads an old version back.  If all slots of a set
 * are dirty or pinned, l2_set asks its caller to flush.
 *
 * Before a slot is changed, the new entries have their space on disk
 * (holes.c).
 */

#include <config.h>

#include <assert.h>
#include <errno.h>
#include <inttypes.h>
#include <stdlib.h>

#include "qcow2/internal.h"

#define MAX_SLICE_WORDS L2_MAX_SLICE_ENTRIES
#define MAX_SLICE_BYTES (8 * MAX_SLICE_WORDS)
#define VERSION_BITS 24
#define VERSION_MASK ((UINT64_C (1) << VERSION_BITS) - 1)

unsigned
l2_slice_bytes (const struct qcow2 *q)
{
  return 8U << q->l2.entry_bits << q->l2.slice_bits;
}

int
l2_cache_open (struct qcow2 *q, uint64_t cache_bytes)
{
  struct l2_cache *l2 = &q->l2;
  const uint64_t slice_bytes = min_u64 (q->cluster_size, MAX_SLICE_BYTES);
  size_t slots;

  l2->entry_bits = q->extended_l2;
  l2->slice_bits = __builtin_ctz (slice_bytes) - 3 - l2->entry_bits;
  l2->nr_sets = 1;
  while (l2->nr_sets * 2 * L2_WAYS * slice_bytes <= cache_bytes)
    l2->nr_sets *= 2;
  slots = l2->nr_sets * L2_WAYS;

  /* calloc, so that unused slots cost no memory. */
  l2->sets = calloc (l2->nr_sets, sizeof l2->sets[0]);
  l2->words = calloc (slots, slice_bytes);
  if (l2->sets == NULL || l2->words == NULL) {
    report_error ("calloc: %m");
    return -1;
  }
  for (size_t i = 0; i < l2->nr_sets; ++i)
    pthread_mutex_init (&l2->sets[i].lock, NULL);
  return 0;
}

void
l2_cache_free (struct qcow2 *q)
{
  if (q->l2.sets != NULL)
    for (size_t i = 0; i < q->l2.nr_sets; ++i)
      pthread_mutex_destroy (&q->l2.sets[i].lock);
  free (q->l2.sets);
  free (q->l2.words);
}

static struct l2_set *
set_of (struct qcow2 *q, uint64_t slice)
{
  return &q->l2.sets[slice & (q->l2.nr_sets - 1)];
}

static size_t
slot_index (struct qcow2 *q, const struct l2_set *set, unsigned way)
{
  return (set - q->l2.sets) * L2_WAYS + way;
}

static _Atomic uint64_t *
slot_words (struct qcow2 *q, size_t slot)
{
  return q->l2.words + (slot << q->l2.slice_bits << q->l2.entry_bits);
}

static unsigned
words_in_slice (const struct qcow2 *q)
{
  return 1U << q->l2.slice_bits << q->l2.entry_bits;
}

/* Where a slice is in the container, or 0 if it has no L2 table. */
static int
slice_location (struct qcow2 *q, uint64_t slice, uint64_t *location)
{
  const unsigned bits = q->l2_bits - q->l2.slice_bits;
  const uint64_t in_table = slice & ((UINT64_C (1) << bits) - 1);
  const uint64_t table =
    atomic_load_explicit (&q->l1.entries[slice >> bits], memory_order_acquire)
    & ENTRY_OFFSET_MASK;

  if (table % q->cluster_size != 0) {
    report_error ("the image is corrupt: L1 entry %" PRIu64 " points to %#"
                  PRIx64 ", which is not aligned", slice >> bits, table);
    errno = EIO;
    return -1;
  }
  *location = table == 0 ? 0 : table + in_table * l2_slice_bytes (q);
  return 0;
}

static int
read_slice (struct qcow2 *q, uint64_t slice, uint64_t *buf)
{
  uint64_t location;

  if (slice_location (q, slice, &location) == -1)
    return -1;
  if (location == 0) {
    memset (buf, 0, l2_slice_bytes (q));
    return 0;
  }
  if (container_pread (q->container, buf, l2_slice_bytes (q), location) == -1) {
    report_error ("cannot read an L2 table at host offset %#" PRIx64 ": %m",
                  location);
    return -1;
  }
  return 0;
}

static void
get_words (const struct qcow2 *q, _Atomic uint64_t *words, unsigned first,
           unsigned nr, struct l2_entry *entries)
{
  const unsigned bits = q->l2.entry_bits;

  words += first << bits;
  for (unsigned i = 0; i < nr; ++i) {
    entries[i].descriptor =
      be64toh (atomic_load_explicit (&words[i << bits],
                                     memory_order_acquire));
    entries[i].bitmap = bits == 0 ? 0 :
      be64toh (atomic_load_explicit (&words[(i << bits) + 1],
                                     memory_order_acquire));
  }
}

/* Look up without the lock.  True if the slice was there. */
static bool
peek (struct qcow2 *q, struct l2_set *set, uint64_t slice, unsigned first,
      unsigned nr, struct l2_entry *entries)
{
  for (unsigned way = 0; way < L2_WAYS; ++way) {
    struct l2_slot *slot = &set->way[way];
    const uint64_t tag = atomic_load_explicit (&slot->tag,
                                               memory_order_acquire);

    if (tag >> VERSION_BITS != slice + 1)
      continue;
    get_words (q, slot_words (q, slot_index (q, set, way)), first, nr,
               entries);
    if (atomic_load_explicit (&slot->tag, memory_order_relaxed) != tag)
      return false;
    if (!atomic_load_explicit (&slot->referenced, memory_order_relaxed))
      atomic_store_explicit (&slot->referenced, 1, memory_order_relaxed);
    return true;
  }
  return false;
}

/* With the set's lock held: the way of a slice, or -1. */
static int
find_way (struct l2_set *set, uint64_t slice)
{
  assert (lock_is_mine (&set->lock));
  for (unsigned way = 0; way < L2_WAYS; ++way)
    if (atomic_load_explicit (&set->way[way].tag, memory_order_relaxed)
        >> VERSION_BITS == slice + 1)
      return way;
  return -1;
}

/* With the set's lock held: a way that can be replaced, or -1. */
static int
find_victim (struct l2_set *set)
{
  assert (lock_is_mine (&set->lock));
  for (unsigned tries = 0; tries < 2 * L2_WAYS; ++tries) {
    const unsigned way = set->hand;
    struct l2_slot *slot = &set->way[way];

    set->hand = (way + 1) % L2_WAYS;
    if (slot->dirty || slot->pinned)
      continue;
    if (!atomic_exchange_explicit (&slot->referenced, 0,
                                   memory_order_relaxed))
      return way;
  }
  return -1;
}

/* With the set's lock held: until the change ends, no reader accepts the
 * words of the slot, which are stored with release.
 */
static void
begin_change (struct l2_slot *slot)
{
  const uint64_t version =
    (atomic_load_explicit (&slot->tag, memory_order_relaxed) + 1)
    & VERSION_MASK;

  atomic_store_explicit (&slot->tag, version, memory_order_relaxed);
}

static void
end_change (struct l2_slot *slot, uint64_t slice)
{
  const uint64_t version =
    atomic_load_explicit (&slot->tag, memory_order_relaxed);

  atomic_store_explicit (&slot->tag, (slice + 1) << VERSION_BITS | version,
                         memory_order_release);
}

/* For the statistics.  A miss reads from the disk, so all threads may share
 * its counter; look-ups must not share one.
 */
static void
count_lookup (struct qcow2 *q)
{
  if (meter_wanted ())
    meter_add (&q->l2.lookups, 1);
}

static void
count_miss (struct qcow2 *q)
{
  atomic_fetch_add_explicit (&q->l2.misses, 1, memory_order_relaxed);
}

static void
count_fill (struct l2_cache *l2, struct l2_slot *slot)
{
  const bool is_empty = atomic_load_explicit (&slot->tag, memory_order_relaxed)
    >> VERSION_BITS == 0;

  atomic_fetch_add_explicit (is_empty ? &l2->slots_used : &l2->evictions, 1,
                             memory_order_relaxed);
}

void
l2_get_numbers (const struct qcow2 *q, struct qcow2_cache_numbers *n)
{
  n->misses = tally_get (&q->l2.misses);
  n->hits = meter_total (&q->l2.lookups);
  n->hits -= min_u64 (n->hits, n->misses);
  n->evictions = tally_get (&q->l2.evictions);
  n->bytes = tally_get (&q->l2.slots_used) * l2_slice_bytes (q);
}

/* With the set's lock held: put a slice into a slot. */
static void
fill (struct qcow2 *q, struct l2_set *set, unsigned way, uint64_t slice,
      const uint64_t *buf)
{
  struct l2_slot *slot = &set->way[way];
  _Atomic uint64_t *words = slot_words (q, slot_index (q, set, way));

  assert (lock_is_mine (&set->lock));
  count_fill (&q->l2, slot);
  begin_change (slot);
  for (unsigned i = 0; i < words_in_slice (q); ++i)
    atomic_store_explicit (&words[i], buf[i], memory_order_release);
  end_change (slot, slice);
  if (!q->readonly)
    slot->holes = holes_in (buf, l2_slice_bytes (q));
  atomic_store_explicit (&slot->referenced, 1, memory_order_relaxed);
}

/* Split a guest cluster into its slice and its position in that slice. */
static uint64_t
slice_of (const struct qcow2 *q, uint64_t guest_cluster, unsigned *first)
{
  *first = guest_cluster & ((UINT64_C (1) << q->l2.slice_bits) - 1);
  return guest_cluster >> q->l2.slice_bits;
}

int
l2_get (struct qcow2 *q, uint64_t guest_cluster, unsigned nr,
        struct l2_entry *entries)
{
  unsigned first;
  const uint64_t slice = slice_of (q, guest_cluster, &first);
  struct l2_set *set = set_of (q, slice);
  uint64_t buf[MAX_SLICE_WORDS];
  int way;

  count_lookup (q);
  if (peek (q, set, slice, first, nr, entries))
    return 0;

  ACQUIRE_LOCK_FOR_CURRENT_SCOPE (&set->lock);
  if (peek (q, set, slice, first, nr, entries))
    return 0;
  count_miss (q);
  if (read_slice (q, slice, buf) == -1)
    return -1;
  /* If there is no slot, the entries on disk are current: the slice is
   * neither dirty nor pinned, and cannot become so under the lock.
   */
  way = find_victim (set);
  if (way >= 0)
    fill (q, set, way, slice, buf);
  for (unsigned i = 0; i < nr; ++i) {
    const uint64_t *words = buf + ((first + i) << q->l2.entry_bits);

    entries[i].descriptor = be64toh (words[0]);
    entries[i].bitmap = q->extended_l2 ? be64toh (words[1]) : 0;
  }
  return 0;
}

/* With the set's lock held: make sure that nr entries of a slice, from first
 * on, have their space on disk.
 */
static int
fill_holes (struct qcow2 *q, struct l2_slot *slot, uint64_t slice,
            unsigned first, unsigned nr, const struct l2_entry *entries)
{
  uint64_t location;

  assert (lock_is_mine (&set_of (q, slice)->lock));
  if (slot->holes == 0)
    return 0;
  if (slice_location (q, slice, &location) == -1)
    return -1;
  for (unsigned i = 0; i < nr; ++i)
    if ((entries[i].descriptor | entries[i].bitmap) != 0 &&
        holes_fill (q, QCOW2_L2_TABLE, &slot->holes, location,
                    l2_slice_bytes (q),
                    (size_t) (first + i) << (3 + q->l2.entry_bits)) == -1)
      return -1;
  return 0;
}

int
l2_set (struct qcow2 *q, uint64_t guest_cluster, unsigned nr,
        const struct l2_entry *entries)
{
  unsigned first;
  const uint64_t slice = slice_of (q, guest_cluster, &first);
  struct l2_set *set = set_of (q, slice);
  uint64_t buf[MAX_SLICE_WORDS];
  int way;

  count_lookup (q);
  ACQUIRE_LOCK_FOR_CURRENT_SCOPE (&set->lock);
  way = find_way (set, slice);
  if (way < 0) {
    count_miss (q);
    way = find_victim (set);
    if (way < 0) {
      errno = EAGAIN;
      return -1;
    }
    if (read_slice (q, slice, buf) == -1)
      return -1;
    fill (q, set, way, slice, buf);
  }

  struct l2_slot *slot = &set->way[way];
  _Atomic uint64_t *words = slot_words (q, slot_index (q, set, way));
  if (fill_holes (q, slot, slice, first, nr, entries) == -1)
    return -1;
  if (q->extended_l2)
    begin_change (slot);
  for (unsigned i = 0; i < nr; ++i) {
    _Atomic uint64_t *entry = words + ((first + i) << q->l2.entry_bits);

    atomic_store_explicit (&entry[0], htobe64 (entries[i].descriptor),
                           memory_order_release);
    if (q->extended_l2)
      atomic_store_explicit (&entry[1], htobe64 (entries[i].bitmap),
                             memory_order_release);
  }
  if (q->extended_l2)
    end_change (slot, slice);
  if (!slot->dirty) {
    slot->dirty = true;
    atomic_fetch_add (&set->nr_dirty, 1);
    atomic_fetch_add (&q->l2.nr_dirty, 1);
  }
  return 0;
}

/* With the set's lock held: copy a dirty slot and pin it. */
static void
copy_slot (struct qcow2 *q, struct l2_set *set, unsigned way,
           struct l2_copy *copy, uint64_t *data)
{
  struct l2_slot *slot = &set->way[way];

  assert (lock_is_mine (&set->lock));
  copy->slot = slot_index (q, set, way);
  copy->slice = (atomic_load_explicit (&slot->tag, memory_order_relaxed)
                 >> VERSION_BITS) - 1;
  copy->holes = slot->holes;
  _Atomic uint64_t *words = slot_words (q, copy->slot);
  for (unsigned i = 0; i < words_in_slice (q); ++i)
    data[i] = atomic_load_explicit (&words[i], memory_order_relaxed);
  slot->dirty = false;
  slot->pinned = true;
  atomic_fetch_sub (&set->nr_dirty, 1);
  atomic_fetch_sub (&q->l2.nr_dirty, 1);
}

size_t
l2_copy_dirty (struct qcow2 *q, size_t *next_set, struct l2_copy *copies,
               uint8_t *data, size_t max_copies)
{
  size_t n = 0;

  if (atomic_load (&q->l2.nr_dirty) == 0)
    return 0;
  for (; *next_set < q->l2.nr_sets; ++*next_set) {
    struct l2_set *set = &q->l2.sets[*next_set];

    if (atomic_load (&set->nr_dirty) == 0)
      continue;
    ACQUIRE_LOCK_FOR_CURRENT_SCOPE (&set->lock);
    for (unsigned way = 0; way < L2_WAYS; ++way) {
      if (!set->way[way].dirty)
        continue;
      if (n == max_copies)
        return n;
      copy_slot (q, set, way, &copies[n],
                 (uint64_t *) (data + n * l2_slice_bytes (q)));
      n++;
    }
  }
  return n;
}

int
l2_write_copy (struct qcow2 *q, const struct l2_copy *copy,
               const uint8_t *data)
{
  uint64_t location;

  if (gate_pass (q) == -1 ||
      slice_location (q, copy->slice, &location) == -1)
    return -1;
  return holes_write_around (q, QCOW2_L2_TABLE, data, l2_slice_bytes (q),
                             copy->holes, location);
}

void
l2_copies_done (struct qcow2 *q, const struct l2_copy *copies, size_t nr,
                bool written)
{
  for (size_t i = 0; i < nr; ++i) {
    struct l2_set *set = &q->l2.sets[copies[i].slot / L2_WAYS];
    struct l2_slot *slot = &set->way[copies[i].slot % L2_WAYS];

    ACQUIRE_LOCK_FOR_CURRENT_SCOPE (&set->lock);
    slot->pinned = false;
    if (!written && !slot->dirty) {
      slot->dirty = true;
      atomic_fetch_add (&set->nr_dirty, 1);
      atomic_fetch_add (&q->l2.nr_dirty, 1);
    }
  }
}

/* With the set's lock held: zero a slice on disk, unless it will be written. */
static int
zero_slice (struct qcow2 *q, struct l2_set *set, uint64_t slice)
{
  const int way = find_way (set, slice);
  uint64_t location;

  assert (lock_is_mine (&set->lock));
  if (way >= 0 && (set->way[way].dirty || set->way[way].pinned))
    return 0;
  if (slice_location (q, slice, &location) == -1)
    return -1;
  /* No entry was set, so none needs the space. */
  if (container_zero (q->container, l2_slice_bytes (q), location,
                      true) == -1) {
    report_error ("cannot write a new L2 table: %m");
    return -1;
  }
  return 0;
}

int
l2_zero_again (struct qcow2 *q, uint32_t l1_index)
{
  const unsigned bits = q->l2_bits - q->l2.slice_bits;
  const uint64_t first = (uint64_t) l1_index << bits;

  for (uint64_t slice = first; slice < first + (UINT64_C (1) << bits);
       ++slice) {
    struct l2_set *set = set_of (q, slice);

    ACQUIRE_LOCK_FOR_CURRENT_SCOPE (&set->lock);
    if (zero_slice (q, set, slice) == -1)
      return -1;
  }
  return 0;
}
