/* nbdkit-dirty-bitmap-filter
 * SPDX-License-Identifier: BSD-3-Clause
 * Copyright the nbdkit-dirty-bitmap-filter authors
 */

/* Refcounts (qcow2.rst, "Host cluster management").
 *
 * The whole refcount table is in RAM (QEMU and we limit it to 8 MiB).  Of
 * the refcount blocks, slices of at most 4 KiB are cached.
 *
 * A count in RAM may be higher than on disk only for clusters that no
 * durable entry refers to yet, since refcounts_flush runs before references
 * are written.  It is lowered in RAM only after the entry that referred to
 * the cluster is gone from the disk (release.c).  So a dirty slice may be
 * written at any time: at worst it leaks.  An entry of the refcount table
 * may not: the block it points to, with its count of itself, must be durable
 * first.
 *
 * A barrier that fails may lose what was written before it (flush.c), so
 * what was written stays in the cache until a barrier has covered it: a
 * slice, and an entry of the table.  If all slices wait for that, a thread
 * that needs a slice has to wait, too.
 *
 * A count is raised, and an entry of the table set, only where there is
 * space on disk for it (holes.c).
 */

#include <config.h>

#include <assert.h>
#include <errno.h>
#include <inttypes.h>
#include <stdlib.h>

#include "common/vector.h"
#include "qcow2/internal.h"

#define UNUSED UINT64_MAX

static int
load_table (struct qcow2 *q)
{
  struct refcounts *rc = &q->rc;
  const size_t bytes = q->header.reftable_clusters * q->cluster_size;

  rc->table_entries = bytes / 8;
  rc->table_offset = q->header.reftable_offset;
  rc->table = malloc (bytes);
  if (rc->table == NULL) {
    report_error ("malloc: %m");
    return -1;
  }
  if (container_pread (q->container, rc->table, bytes,
                       rc->table_offset) == -1) {
    report_error ("cannot read the refcount table: %m");
    return -1;
  }
  if (qcow2_register (q, QCOW2_REFCOUNT_TABLE, rc->table_offset, bytes) == -1) {
    report_error ("the refcount table of the image overlaps other metadata "
                  "or the end of the file");
    return -1;
  }
  rc->table_holes = holes_in_table (rc->table, bytes);
  if (rc->table_holes == NULL)
    return -1;

  for (uint64_t i = 0; i < rc->table_entries; ++i) {
    uint64_t entry = get_be64 (&rc->table[i]);

    rc->table[i] = entry;
    if (entry == 0)
      continue;
    if ((entry & REFTABLE_RESERVED_MASK) != 0 ||
        qcow2_register (q, QCOW2_REFCOUNT_BLOCK, entry,
                        q->cluster_size) == -1) {
      report_error ("the image is corrupt: entry %" PRIu64 " of the refcount "
                    "table, %#" PRIx64 ", is invalid or overlaps other "
                    "metadata; see qemu-img check", i, entry);
      errno = EIO;
      return -1;
    }
  }
  return 0;
}

int
refcounts_open (struct qcow2 *q, uint64_t cache_bytes)
{
  struct refcounts *rc = &q->rc;
  size_t hash_size = 32;

  pthread_cond_init (&rc->unpinned, NULL);
  rc->slice_bytes = min_u64 (q->cluster_size, 4096);
  rc->slice_entries_bits =
    __builtin_ctz (rc->slice_bytes) + 3 - q->header.refcount_order;
  rc->epoch = 1;
  rc->block_entries_bits = q->cluster_bits + 3 - q->header.refcount_order;
  rc->opened = div_round_up (container_size (q->container), q->cluster_size);
  rc->fresh = rc->opened;

  rc->nr_slices = max_u64 (cache_bytes / rc->slice_bytes, 16);
  while (hash_size < rc->nr_slices * 2)
    hash_size *= 2;
  rc->hash_mask = hash_size - 1;
  rc->slices = calloc (rc->nr_slices, sizeof rc->slices[0]);
  rc->hash = calloc (hash_size, sizeof rc->hash[0]);
  if (rc->slices == NULL || rc->hash == NULL) {
    report_error ("calloc: %m");
    return -1;
  }
  for (size_t i = 0; i < rc->nr_slices; ++i)
    rc->slices[i].index = UNUSED;
  return load_table (q);
}

void
refcounts_free (struct qcow2 *q)
{
  struct refcounts *rc = &q->rc;

  for (size_t i = 0; rc->slices != NULL && i < rc->nr_slices; ++i)
    free (rc->slices[i].data);
  free (rc->slices);
  free (rc->hash);
  free (rc->table);
  free (rc->table_holes);
  free (rc->dirty_table);
}

bool
refcount_block_exists (struct qcow2 *q, uint64_t block_index)
{
  return block_index < q->rc.table_entries && q->rc.table[block_index] != 0;
}

static struct refcount_slice **
hash_chain (struct refcounts *rc, uint64_t index)
{
  return &rc->hash[(index * UINT64_C (0x9e3779b97f4a7c15) >> 32)
                   & rc->hash_mask];
}

static uint64_t
slice_offset (const struct refcounts *rc, uint64_t index)
{
  const unsigned bits = rc->block_entries_bits - rc->slice_entries_bits;
  const uint64_t in_block = index & ((UINT64_C (1) << bits) - 1);

  return rc->table[index >> bits] + in_block * rc->slice_bytes;
}

static int
write_slice (struct qcow2 *q, uint64_t index, const uint8_t *data,
             uint8_t holes)
{
  return holes_write_around (q, QCOW2_REFCOUNT_BLOCK, data,
                             q->rc.slice_bytes, holes,
                             slice_offset (&q->rc, index));
}

static void
set_clean (struct refcounts *rc, struct refcount_slice *s)
{
  s->dirty = false;
  rc->nr_dirty--;
}

/* Set in which epoch a slice was written, or 0 if it is durable. */
static void
mark_written (struct refcounts *rc, struct refcount_slice *s,
              uint64_t epoch)
{
  rc->nr_written_slices += (epoch != 0) - (s->written != 0);
  s->written = epoch;
}

/* The slice is written, but not durable. */
static void
set_written (struct refcounts *rc, struct refcount_slice *s)
{
  mark_written (rc, s, rc->epoch);
}

static void
set_dirty (struct refcounts *rc, struct refcount_slice *s)
{
  if (!s->dirty)
    rc->nr_dirty++;
  s->dirty = true;
}

static void
unhash (struct refcounts *rc, struct refcount_slice *s)
{
  struct refcount_slice **p = hash_chain (rc, s->index);

  while (*p != s)
    p = &(*p)->next;
  *p = s->next;
  s->index = UNUSED;
  mark_written (rc, s, 0);
}

/* With rc.lock held: if barriers have failed since the last call,
 * everything that was written and is not durable becomes dirty again.
 */
static void
redo_lost (struct qcow2 *q)
{
  struct refcounts *rc = &q->rc;
  const unsigned long lost = qcow2_lost (q);

  assert (lock_is_mine (&q->rc.lock));
  if (lost == rc->lost)
    return;
  rc->lost = lost;
  rc->nr_written_table = 0;
  for (size_t i = 0; i < rc->nr_slices; ++i) {
    struct refcount_slice *s = &rc->slices[i];

    if (s->written != 0)
      set_dirty (rc, s);
    mark_written (rc, s, 0);
  }
}

void
refcounts_redo_lost (struct qcow2 *q)
{
  ACQUIRE_LOCK_FOR_CURRENT_SCOPE (&q->rc.lock);
  redo_lost (q);
}

/* With rc.lock held: everything written up to an epoch is durable. */
static void
settle (struct qcow2 *q, uint64_t epoch)
{
  struct refcounts *rc = &q->rc;

  assert (lock_is_mine (&q->rc.lock));
  for (size_t i = 0; rc->nr_written_slices != 0 && i < rc->nr_slices; ++i)
    if (rc->slices[i].written <= epoch)
      mark_written (rc, &rc->slices[i], 0);
}

uint64_t
refcounts_barrier_begins (struct qcow2 *q)
{
  ACQUIRE_LOCK_FOR_CURRENT_SCOPE (&q->rc.lock);
  return q->rc.epoch++;
}

void
refcounts_barrier_done (struct qcow2 *q, uint64_t epoch)
{
  struct refcounts *rc = &q->rc;

  ACQUIRE_LOCK_FOR_CURRENT_SCOPE (&q->rc.lock);
  redo_lost (q);
  settle (q, epoch);
  if (rc->nr_written_table == 0)
    return;
  rc->nr_dirty_table -= rc->nr_written_table;
  memmove (rc->dirty_table, rc->dirty_table + rc->nr_written_table,
           rc->nr_dirty_table * sizeof rc->dirty_table[0]);
  rc->nr_written_table = 0;
}

int
refcounts_write_durably (struct qcow2 *q)
{
  uint64_t epoch;

  assert (lock_is_mine (&q->rc.lock));
  redo_lost (q);
  if (refcounts_write_all (q) == -1)
    return -1;
  epoch = q->rc.epoch++;
  if (qcow2_barrier (q) == -1)
    return -1;
  redo_lost (q);
  settle (q, epoch);
  return 0;
}

/* A slice that can be replaced, or NULL if no slice is durable. */
static struct refcount_slice *
find_durable (struct refcounts *rc)
{
  for (size_t tries = 0; tries < 2 * rc->nr_slices; ++tries) {
    struct refcount_slice *s = &rc->slices[rc->hand];

    rc->hand = (rc->hand + 1) % rc->nr_slices;
    if (s->index == UNUSED)
      return s;
    if (s->pinned || s->dirty || s->written != 0)
      continue;
    if (s->referenced) {
      s->referenced = false;
      continue;
    }
    tally_add (&rc->evictions, 1);
    unhash (rc, s);
    return s;
  }
  return NULL;
}

/* At most half of the slices are pinned, so one is found in the end. */
static struct refcount_slice *
find_victim (struct qcow2 *q)
{
  struct refcount_slice *s;

  while ((s = find_durable (&q->rc)) == NULL)
    if (refcounts_write_durably (q) == -1)
      return NULL;
  return s;
}

/* The slice that holds a cluster's count; its refcount block exists. */
static struct refcount_slice *
get_slice (struct qcow2 *q, uint64_t cluster)
{
  struct refcounts *rc = &q->rc;
  const uint64_t index = cluster >> rc->slice_entries_bits;
  struct refcount_slice **chain = hash_chain (rc, index), *s;

  tally_add (&rc->lookups, 1);
  for (s = *chain; s != NULL; s = s->next)
    if (s->index == index) {
      s->referenced = true;
      return s;
    }

  tally_add (&rc->misses, 1);
  s = find_victim (q);
  if (s == NULL)
    return NULL;
  if (s->data == NULL) {
    s->data = malloc (rc->slice_bytes);
    if (s->data == NULL) {
      report_error ("malloc: %m");
      return NULL;
    }
    tally_add (&rc->slices_loaded, 1);
  }
  if (container_pread (q->container, s->data, rc->slice_bytes,
                       slice_offset (rc, index)) == -1) {
    report_error ("cannot read refcounts: %m");
    return NULL;
  }
  s->holes = holes_in (s->data, rc->slice_bytes);
  s->index = index;
  s->referenced = true;
  s->next = *chain;
  *chain = s;
  return s;
}

void
refcounts_get_numbers (const struct qcow2 *q, struct qcow2_cache_numbers *n)
{
  const struct refcounts *rc = &q->rc;

  n->misses = tally_get (&rc->misses);
  n->hits = tally_get (&rc->lookups);
  n->hits -= min_u64 (n->hits, n->misses);
  n->evictions = tally_get (&rc->evictions);
  n->bytes = tally_get (&rc->slices_loaded) * rc->slice_bytes;
}

static uint64_t
entry_in_slice (const struct refcounts *rc, uint64_t cluster)
{
  return cluster & ((UINT64_C (1) << rc->slice_entries_bits) - 1);
}

int
refcount_get (struct qcow2 *q, uint64_t cluster, uint64_t *count)
{
  struct refcount_slice *s;

  assert (lock_is_mine (&q->rc.lock));
  if (!refcount_block_exists (q, cluster >> q->rc.block_entries_bits)) {
    *count = 0;
    return 0;
  }
  s = get_slice (q, cluster);
  if (s == NULL)
    return -1;
  *count = refcount_format_get (s->data, q->header.refcount_order,
                                entry_in_slice (&q->rc, cluster));
  return 0;
}

int
refcount_set (struct qcow2 *q, uint64_t cluster, uint64_t count)
{
  const uint64_t i = entry_in_slice (&q->rc, cluster);
  const unsigned order = q->header.refcount_order;
  struct refcount_slice *s;

  assert (lock_is_mine (&q->rc.lock));
  s = get_slice (q, cluster);
  if (s == NULL)
    return -1;
  if (count > refcount_format_max (order)) {
    report_error ("the refcount of a cluster would exceed its maximum");
    errno = EINVAL;
    return -1;
  }
  if (refcount_format_get (s->data, order, i) == count)
    return 0;
  if (count != 0 &&
      holes_fill (q, QCOW2_REFCOUNT_BLOCK, &s->holes,
                  slice_offset (&q->rc, s->index), q->rc.slice_bytes,
                  (i << order) / 8) == -1)
    return -1;
  refcount_format_set (s->data, order, i, count);
  set_dirty (&q->rc, s);
  return 0;
}

int
refcount_find_free (struct qcow2 *q, uint64_t *cluster)
{
  struct refcounts *rc = &q->rc;
  const uint64_t in_slice = UINT64_C (1) << rc->slice_entries_bits;
  const unsigned order = q->header.refcount_order;
  uint64_t c = *cluster;

  assert (lock_is_mine (&q->rc.lock));
  while (refcount_block_exists (q, c >> rc->block_entries_bits)) {
    struct refcount_slice *s = get_slice (q, c);
    uint64_t i;

    if (s == NULL)
      return -1;
    for (i = entry_in_slice (rc, c); i < in_slice; ++i, ++c)
      if (refcount_format_get (s->data, order, i) == 0) {
        *cluster = c;
        return 0;
      }
  }
  *cluster = c;
  return 0;
}

void
refcount_forget (struct qcow2 *q, uint64_t block_index)
{
  struct refcounts *rc = &q->rc;
  const uint64_t first =
    block_index << (rc->block_entries_bits - rc->slice_entries_bits);

  assert (lock_is_mine (&q->rc.lock));
  for (size_t i = 0; i < rc->nr_slices; ++i) {
    struct refcount_slice *s = &rc->slices[i];

    if (s->index == UNUSED || s->index < first)
      continue;
    if (s->dirty)
      set_clean (rc, s);
    unhash (rc, s);
  }
}

int
refcount_set_table_entry (struct qcow2 *q, uint64_t block_index,
                          uint64_t host_offset)
{
  struct refcounts *rc = &q->rc;
  const uint64_t on_disk = q->header.reftable_clusters * q->cluster_size;

  assert (lock_is_mine (&q->rc.lock));
  /* The entries of a larger table are written with that table (allocate.c). */
  if (block_index * 8 < on_disk &&
      holes_fill_table (q, QCOW2_REFCOUNT_TABLE, rc->table_holes,
                        rc->table_offset, on_disk, block_index * 8) == -1)
    return -1;
  if (vector_reserve (rc->dirty_table, rc->nr_dirty_table,
                      rc->max_dirty_table, 1) == -1) {
    report_error ("realloc: %m");
    return -1;
  }
  rc->dirty_table[rc->nr_dirty_table++] = block_index;
  rc->table[block_index] = host_offset;
  return 0;
}

int
refcounts_write_all (struct qcow2 *q)
{
  struct refcounts *rc = &q->rc;

  assert (lock_is_mine (&q->rc.lock));
  for (size_t i = 0; rc->nr_dirty != 0 && i < rc->nr_slices; ++i) {
    struct refcount_slice *s = &rc->slices[i];

    if (!s->dirty || s->pinned)
      continue;
    if (write_slice (q, s->index, s->data, s->holes) == -1)
      return -1;
    set_clean (rc, s);
    set_written (rc, s);
  }
  return 0;
}

#define BATCH 64

/* Copy dirty slices from *next on, and pin them: what is pinned is not
 * replaced, so no thread reads it back from the disk before it is there.
 */
static size_t
take_batch (struct qcow2 *q, size_t *next, size_t picked[BATCH],
            uint64_t index[BATCH], uint8_t holes[BATCH], uint8_t *copies)
{
  struct refcounts *rc = &q->rc;
  const size_t max = min_u64 (BATCH, rc->nr_slices / 2);
  size_t n = 0;

  ACQUIRE_LOCK_FOR_CURRENT_SCOPE (&q->rc.lock);
  for (; n < max && *next < rc->nr_slices && rc->nr_dirty != 0; ++*next) {
    struct refcount_slice *s = &rc->slices[*next];

    if (!s->dirty)
      continue;
    memcpy (copies + n * rc->slice_bytes, s->data, rc->slice_bytes);
    set_clean (rc, s);
    s->pinned = true;
    index[n] = s->index;
    holes[n] = s->holes;
    picked[n++] = *next;
  }
  rc->nr_pinned = n;
  return n;
}

static void
drop_batch (struct qcow2 *q, const size_t picked[BATCH], size_t n,
            size_t written, unsigned long lost)
{
  struct refcounts *rc = &q->rc;

  ACQUIRE_LOCK_FOR_CURRENT_SCOPE (&q->rc.lock);
  for (size_t i = 0; i < n; ++i) {
    struct refcount_slice *s = &rc->slices[picked[i]];

    s->pinned = false;
    if (i >= written || lost != qcow2_lost (q))
      set_dirty (rc, s);
    else
      set_written (rc, s);
  }
  rc->nr_pinned = 0;
  pthread_cond_broadcast (&rc->unpinned);
}

static int
flush_slices (struct qcow2 *q)
{
  CLEANUP_FREE uint8_t *copies = NULL;
  size_t next = 0, n, picked[BATCH];
  uint64_t index[BATCH];
  uint8_t holes[BATCH];

  /* Read without the lock: a count raised before this flush began is seen,
   * since its request has been answered.
   */
  if (atomic_load (&q->rc.nr_dirty) == 0)
    return 0;
  copies = malloc (BATCH * q->rc.slice_bytes);
  if (copies == NULL) {
    report_error ("malloc: %m");
    return -1;
  }
  while ((n = take_batch (q, &next, picked, index, holes, copies)) != 0) {
    const unsigned long lost = qcow2_lost (q);
    size_t written = 0;

    while (written < n &&
           write_slice (q, index[written],
                        copies + written * q->rc.slice_bytes,
                        holes[written]) == 0)
      written++;
    drop_batch (q, picked, n, written, lost);
    if (written < n)
      return -1;
  }
  return 0;
}

static int
write_table_entry (struct qcow2 *q, uint64_t index)
{
  const uint64_t offset = q->rc.table_offset + index * 8;
  uint64_t entry;

  put_be64 (&entry, q->rc.table[index]);
  if (gate_check (q, QCOW2_REFCOUNT_TABLE, offset, 8) == -1)
    return -1;
  if (container_pwrite (q->container, &entry, 8, offset) == -1) {
    report_error ("cannot write the refcount table: %m");
    return -1;
  }
  return 0;
}

/* Does a block of one of the entries [first, i) count the block of dirty
 * entry i?  A block is made after the block that counts it.
 */
static bool
is_counted_by_one_of (const struct qcow2 *q, size_t first, size_t i)
{
  const struct refcounts *rc = &q->rc;
  const uint64_t index = rc->dirty_table[i];
  const uint64_t counter =
    rc->table[index] >> q->cluster_bits >> rc->block_entries_bits;

  if (counter == index)
    return false;
  for (; first < i; ++first)
    if (rc->dirty_table[first] == counter)
      return true;
  return false;
}

/* Write the first nr dirty entries of the refcount table that are not
 * written yet, with a barrier before an entry whose block is counted by
 * another new block.  If the table has been replaced in the meantime, the
 * new one has these entries, durably.
 */
static int
flush_table (struct qcow2 *q, size_t nr, unsigned long tables,
             unsigned long lost)
{
  struct refcounts *rc = &q->rc;
  size_t since_barrier;

  ACQUIRE_LOCK_FOR_CURRENT_SCOPE (&q->rc.lock);
  if (rc->tables != tables)
    return 0;
  since_barrier = rc->nr_written_table;
  for (size_t i = since_barrier; i < nr; ++i) {
    if (ORDER (COUNTING_ENTRY_FIRST) &&
        is_counted_by_one_of (q, since_barrier, i)) {
      if (qcow2_barrier_since (q, lost) == -1)
        return -1;
      since_barrier = i;
    }
    if (write_table_entry (q, rc->dirty_table[i]) == -1)
      return -1;
  }
  rc->nr_written_table = max_u64 (rc->nr_written_table, nr);
  return 0;
}

int
refcounts_flush (struct qcow2 *q, unsigned long lost)
{
  unsigned long tables;
  size_t nr, done;

  assert (lock_is_mine (&q->flush.lock));
  /* Entries that become dirty from now on are left to the next flush. */
  pthread_mutex_lock (&q->rc.lock);
  nr = q->rc.nr_dirty_table;
  done = q->rc.nr_written_table;
  tables = q->rc.tables;
  pthread_mutex_unlock (&q->rc.lock);

  if (flush_slices (q) == -1)
    return -1;
  if (nr == done)
    return 0;
  if (ORDER (BLOCK_BEFORE_TABLE_ENTRY) &&
      qcow2_barrier_since (q, lost) == -1)
    return -1;
  return flush_table (q, nr, tables, lost);
}
