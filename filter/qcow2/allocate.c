/* nbdkit-dirty-bitmap-filter
 * SPDX-License-Identifier: BSD-3-Clause
 * Copyright the nbdkit-dirty-bitmap-filter authors
 */

/* Finding free clusters, and making refcount blocks and tables that count
 * them.
 *
 * rc.cursor is the place to search from: no cluster below it is free.
 * Clusters at rc.fresh or beyond were outside the container when it was
 * opened and have never been used since, so they read as zeroes.
 *
 * A cluster whose refcount block does not exist is free, but the block has
 * to be made before the cluster can be taken.  Normally a run ends where the
 * block is missing, and the next run begins with the new block, which thus
 * counts itself.  Only if the caller needs a long run, the block takes the
 * first cluster of the run, and the run starts one cluster later: then
 * another new block may count it, and is made before it (refcount.c writes
 * their table entries in that order).  A new table is made in the same way:
 * the table in RAM is made larger first, so that blocks for the clusters of
 * the new table itself can be noted in it; then blocks, then table, barrier,
 * header, barrier.  If that fails, the old table is unchanged, and the
 * header still points to it.
 *
 * The entry points and allocate_run take rc.lock.  All other functions are
 * called with it held, and so are allocate_block_at and allocate_larger_table.
 */

#include <config.h>

#include <assert.h>
#include <errno.h>
#include <inttypes.h>
#include <stdlib.h>

#include "qcow2/internal.h"

static int grow_table (struct qcow2 *q, uint64_t block_index);

static uint64_t
block_of (const struct qcow2 *q, uint64_t cluster)
{
  return cluster >> q->rc.block_entries_bits;
}

/* A cluster that is free by its refcount must not be metadata. */
static int
check_free (struct qcow2 *q, uint64_t first, uint64_t nr)
{
  assert (lock_is_mine (&q->rc.lock));
  for (uint64_t c = first; c < first + nr; ++c) {
    const enum qcow2_class class = registry_class (q, c);

    if (class != QCOW2_DATA) {
      report_error ("the cluster at host offset %#" PRIx64 " is part of %s but "
                    "its refcount is 0: the image is corrupt and takes no "
                    "more writes", c << q->cluster_bits,
                    registry_class_name (class));
      gate_set_corrupt (q);
      errno = EIO;
      return -1;
    }
  }
  return 0;
}

static int
reserve (struct qcow2 *q, uint64_t end_cluster)
{
  assert (lock_is_mine (&q->rc.lock));
  if (end_cluster > ENTRY_OFFSET_MASK >> q->cluster_bits) {
    report_error ("the image would exceed the maximum size of its format");
    errno = EFBIG;
    return -1;
  }
  if (container_reserve (q->container, end_cluster << q->cluster_bits) == -1) {
    report_error ("cannot make room for new clusters in the image: %m");
    return -1;
  }
  return 0;
}

/* Make refcount block block_index in the cluster at. */
static int
make_block (struct qcow2 *q, uint64_t block_index, uint64_t at)
{
  struct refcounts *rc = &q->rc;
  const unsigned long lost = qcow2_lost (q);

  assert (lock_is_mine (&q->rc.lock));
  if (check_free (q, at, 1) == -1 || reserve (q, at + 1) == -1)
    return -1;
  if (at < rc->fresh &&
      container_zero (q->container, q->cluster_size, at << q->cluster_bits,
                      false) == -1) {
    report_error ("cannot write a refcount block: %m");
    return -1;
  }
  /* If the zeroes were lost, no other code would write the unused slices of
   * the block again.
   */
  if (at < rc->fresh && qcow2_barrier_since (q, lost) == -1)
    return -1;
  if (registry_set (q, QCOW2_REFCOUNT_BLOCK, at, 1) == -1)
    return -1;
  if (refcount_set_table_entry (q, block_index, at << q->cluster_bits) == -1) {
    registry_set (q, QCOW2_DATA, at, 1);
    return -1;
  }
  if (refcount_set (q, at, 1) == -1) {
    rc->table[block_index] = 0;
    registry_set (q, QCOW2_DATA, at, 1);
    return -1;
  }
  tally_add (&rc->allocated, 1);
  rc->fresh = max_u64 (rc->fresh, at + 1);
  return 0;
}

/* The length of the free run at cluster, which is free, up to max. */
static int
free_run (struct qcow2 *q, uint64_t cluster, uint64_t max, uint64_t *length)
{
  uint64_t c = cluster + 1;

  assert (lock_is_mine (&q->rc.lock));
  while (c - cluster < max) {
    uint64_t count;

    if (!refcount_block_exists (q, block_of (q, c))) {
      c = (block_of (q, c) + 1) << q->rc.block_entries_bits;
      continue;
    }
    if (refcount_get (q, c, &count) == -1)
      return -1;
    if (count != 0)
      break;
    c++;
  }
  *length = min_u64 (c - cluster, max);
  return 0;
}

/* Find a free run of at least min and at most max clusters, from *cluster
 * on, all of which have their refcount blocks.
 */
static int
find_run (struct qcow2 *q, uint64_t min, uint64_t max, uint64_t *cluster,
          uint64_t *length)
{
  assert (lock_is_mine (&q->rc.lock));
  for (;;) {
    uint64_t block, last;

    if (refcount_find_free (q, cluster) == -1 ||
        free_run (q, *cluster, max, length) == -1)
      return -1;
    if (*length < min) {
      *cluster += *length;
      continue;
    }

    last = block_of (q, *cluster + *length - 1);
    for (block = block_of (q, *cluster); block <= last; ++block)
      if (!refcount_block_exists (q, block))
        break;
    if (block > last)
      return 0;
    const uint64_t counted = (block << q->rc.block_entries_bits) - *cluster;
    if ((block << q->rc.block_entries_bits) > *cluster && counted >= min) {
      *length = counted;
      return 0;
    }
    if (block >= q->rc.table_entries) {
      if (grow_table (q, block) == -1)
        return -1;
      continue;
    }
    if (make_block (q, block, *cluster) == -1)
      return -1;
    ++*cluster;
  }
}

static int
set_counts (struct qcow2 *q, uint64_t first, uint64_t nr)
{
  assert (lock_is_mine (&q->rc.lock));
  for (uint64_t c = first; c < first + nr; ++c)
    if (refcount_set (q, c, 1) == -1) {
      while (c-- > first)
        refcount_set (q, c, 0);
      return -1;
    }
  return 0;
}

/* Take a run that find_run found. */
static int
take_run (struct qcow2 *q, enum qcow2_class class, uint64_t first, uint64_t nr)
{
  assert (lock_is_mine (&q->rc.lock));
  if (check_free (q, first, nr) == -1 || reserve (q, first + nr) == -1)
    return -1;
  if (class != QCOW2_DATA && registry_set (q, class, first, nr) == -1)
    return -1;
  if (set_counts (q, first, nr) == -1) {
    registry_set (q, QCOW2_DATA, first, nr);
    return -1;
  }
  tally_add (&q->rc.allocated, nr);
  q->rc.fresh = max_u64 (q->rc.fresh, first + nr);
  return 0;
}

/* Write the larger table: blocks and table first, then the header. */
static int
write_table (struct qcow2 *q, uint64_t first)
{
  struct refcounts *rc = &q->rc;
  const size_t bytes = rc->table_entries * 8;
  const unsigned long lost = qcow2_lost (q);
  CLEANUP_FREE uint64_t *be = malloc (bytes);

  assert (lock_is_mine (&q->rc.lock));
  if (be == NULL) {
    report_error ("malloc: %m");
    return -1;
  }
  for (uint64_t i = 0; i < rc->table_entries; ++i)
    put_be64 (&be[i], rc->table[i]);
  if (refcounts_write_all (q) == -1)
    return -1;
  if (gate_check (q, QCOW2_REFCOUNT_TABLE, first << q->cluster_bits,
                  bytes) == -1)
    return -1;
  if (container_pwrite (q->container, be, bytes,
                        first << q->cluster_bits) == -1) {
    report_error ("cannot write a larger refcount table: %m");
    return -1;
  }
  if (ORDER (TABLE_BEFORE_HEADER) && qcow2_barrier_since (q, lost) == -1)
    return -1;
  return gate_set_reftable (q, first << q->cluster_bits,
                            bytes >> q->cluster_bits);
}

/* Forget everything that was made for a larger table that failed. */
static void
shrink_table (struct qcow2 *q, uint64_t old_entries)
{
  struct refcounts *rc = &q->rc;
  size_t kept = 0;

  assert (lock_is_mine (&q->rc.lock));
  refcount_forget (q, old_entries);
  for (uint64_t i = old_entries; i < rc->table_entries; ++i)
    if (rc->table[i] != 0) {
      registry_set (q, QCOW2_DATA, rc->table[i] >> q->cluster_bits, 1);
      tally_add (&rc->freed, 1);
    }
  rc->table_entries = old_entries;
  for (size_t i = 0; i < rc->nr_dirty_table; ++i)
    if (rc->dirty_table[i] < old_entries)
      rc->dirty_table[kept++] = rc->dirty_table[i];
  rc->nr_dirty_table = kept;
}

static void
give_up_run (struct qcow2 *q, uint64_t first, uint64_t nr)
{
  assert (lock_is_mine (&q->rc.lock));
  tally_add (&q->rc.freed, nr);
  registry_set (q, QCOW2_DATA, first, nr);
  for (uint64_t c = first; c < first + nr; ++c)
    if (refcount_block_exists (q, block_of (q, c)))
      refcount_set (q, c, 0);
}

/* The abandoned table stays while the header may point to it (gate.c). */
static void
forget_abandoned (struct qcow2 *q)
{
  struct refcounts *rc = &q->rc;

  assert (lock_is_mine (&q->rc.lock));
  if (rc->nr_abandoned == 0 || atomic_load (&q->gate.reftable_unknown))
    return;
  give_up_run (q, rc->abandoned, rc->nr_abandoned);
  rc->nr_abandoned = 0;
}

void
allocate_forget_abandoned (struct qcow2 *q)
{
  ACQUIRE_LOCK_FOR_CURRENT_SCOPE (&q->rc.lock);
  forget_abandoned (q);
}

static int
enlarge_in_ram (struct qcow2 *q, uint64_t block_index)
{
  struct refcounts *rc = &q->rc;
  const uint64_t per_cluster = q->cluster_size / 8;
  const uint64_t entries =
    min_u64 (round_up (max_u64 (block_index + 1, rc->table_entries) * 3 / 2 +
                       per_cluster, per_cluster),
             MAX_REFTABLE_BYTES / 8);
  uint64_t *table;

  assert (lock_is_mine (&q->rc.lock));
  if (entries <= block_index) {
    report_error ("the image would exceed the maximum size of its refcount "
                  "table");
    errno = EFBIG;
    return -1;
  }
  table = realloc (rc->table, entries * sizeof table[0]);
  if (table == NULL) {
    report_error ("realloc: %m");
    return -1;
  }
  memset (table + rc->table_entries, 0,
          (entries - rc->table_entries) * sizeof table[0]);
  rc->table = table;
  rc->table_entries = entries;
  return 0;
}

/* Replace the refcount table by one that has an entry for block_index.  The
 * caller must search again: this releases the lock while waiting, and takes
 * clusters for the table, so a run found before may be gone.
 */
static int
grow_table (struct qcow2 *q, uint64_t block_index)
{
  struct refcounts *rc = &q->rc;
  const uint64_t old_entries = rc->table_entries;
  const uint64_t old_first = rc->table_offset >> q->cluster_bits;
  uint64_t first = rc->cursor, nr, length;
  uint8_t *holes;

  assert (lock_is_mine (&q->rc.lock));
  if (rc->growing) {
    report_error ("the refcount table cannot count its own clusters");
    errno = EFBIG;
    return -1;
  }
  if (rc->nr_pinned != 0) {
    while (rc->nr_pinned != 0)
      pthread_cond_wait (&rc->unpinned, &q->rc.lock);
    return 0;
  }
  if (enlarge_in_ram (q, block_index) == -1)
    return -1;
  nr = rc->table_entries * 8 >> q->cluster_bits;
  /* The table is written whole. */
  holes = calloc (1, div_round_up (rc->table_entries * 8, HOLES_CHUNK_BYTES));
  if (holes == NULL) {
    report_error ("calloc: %m");
    shrink_table (q, old_entries);
    return -1;
  }

  rc->growing = true;
  if (find_run (q, nr, nr, &first, &length) == -1 ||
      take_run (q, QCOW2_REFCOUNT_TABLE, first, nr) == -1) {
    rc->growing = false;
    free (holes);
    shrink_table (q, old_entries);
    return -1;
  }
  rc->growing = false;
  if (write_table (q, first) == -1) {
    free (holes);
    shrink_table (q, old_entries);
    rc->abandoned = first;
    rc->nr_abandoned = nr;
    forget_abandoned (q);
    return -1;
  }

  rc->table_offset = first << q->cluster_bits;
  free (rc->table_holes);
  rc->table_holes = holes;
  rc->tables++;
  rc->nr_dirty_table = rc->nr_written_table = 0;
  nr = old_entries * 8 >> q->cluster_bits;
  registry_set (q, QCOW2_DATA, old_first, nr);
  release_clusters (q, old_first, nr);
  return 0;
}

static int
allocate_run (struct qcow2 *q, enum qcow2_class class, uint64_t min,
              uint64_t max, uint64_t *host_offset, uint64_t *got, bool *zeroed)
{
  struct refcounts *rc = &q->rc;
  uint64_t cluster, was_fresh;

  if (qcow2_begin_writing (q) == -1)
    return -1;

  ACQUIRE_LOCK_FOR_CURRENT_SCOPE (&q->rc.lock);
  forget_abandoned (q);
  cluster = rc->cursor;
  if (refcount_find_free (q, &cluster) == -1)
    return -1;
  rc->cursor = cluster;
  if (find_run (q, min, max, &cluster, got) == -1)
    return -1;
  was_fresh = rc->fresh;
  if (take_run (q, class, cluster, *got) == -1)
    return -1;
  if (cluster == rc->cursor)
    rc->cursor = cluster + *got;
  *zeroed = cluster >= was_fresh;
  *host_offset = cluster << q->cluster_bits;
  return 0;
}

int
allocate_clusters (struct qcow2 *q, enum qcow2_class class, uint64_t nr,
                   uint64_t *host_offset, uint64_t *got, bool *zeroed)
{
  return allocate_run (q, class, 1, nr, host_offset, got, zeroed);
}

int
qcow2_alloc (struct qcow2 *q, enum qcow2_class class, uint64_t nr_clusters,
             uint64_t *host_offset, bool *zeroed)
{
  uint64_t got;
  bool unwanted;

  return allocate_run (q, class, nr_clusters, nr_clusters, host_offset, &got,
                       zeroed != NULL ? zeroed : &unwanted);
}

void
allocate_undo (struct qcow2 *q, uint64_t host_offset, uint64_t nr)
{
  const uint64_t first = host_offset >> q->cluster_bits;

  ACQUIRE_LOCK_FOR_CURRENT_SCOPE (&q->rc.lock);
  registry_set (q, QCOW2_DATA, first, nr);
  tally_add (&q->rc.freed, nr);
  for (uint64_t c = first; c < first + nr; ++c)
    if (refcount_set (q, c, 0) == -1)
      report_warning ("a cluster is leaked at host offset %#" PRIx64,
                      c << q->cluster_bits);
  q->rc.cursor = min_u64 (q->rc.cursor, first);
}

/* The most bytes at the end of an image that are read to see whether they
 * are zeroes.
 */
#define MAX_LOOKED_AT (UINT64_C (64) << 20)

/* The end of the last piece of [from, to) that is not known to read as
 * zeroes, or `from` if all of it does.
 */
static int
end_of_data (struct qcow2 *q, uint64_t from, uint64_t to, uint64_t *end)
{
  CLEANUP_FREE uint8_t *bytes = malloc (65536);
  uint64_t looked_at = 0, length;
  unsigned flags;

  assert (lock_is_mine (&q->rc.lock));
  if (bytes == NULL) {
    report_error ("malloc: %m");
    return -1;
  }
  *end = from;
  for (; from < to; from += length) {
    if (container_extent (q->container, from, to - from, &length,
                          &flags) == -1) {
      report_error ("cannot tell where the data in the image end: %m");
      return -1;
    }
    if (flags & CONTAINER_ZERO)
      continue;
    length = min_u64 (length, 65536);
    if ((looked_at += length) > MAX_LOOKED_AT) {
      *end = to;
      return 0;
    }
    if (container_pread (q->container, bytes, length, from) == -1) {
      report_error ("cannot read the end of the image: %m");
      return -1;
    }
    if (bytes[0] != 0 || memcmp (bytes, bytes + 1, length - 1) != 0)
      *end = from + length;
  }
  return 0;
}

int
allocate_block_at (struct qcow2 *q, uint64_t block_index, uint64_t cluster)
{
  assert (lock_is_mine (&q->rc.lock));
  return make_block (q, block_index, cluster);
}

int
allocate_larger_table (struct qcow2 *q, uint64_t block_index, uint64_t cluster)
{
  assert (lock_is_mine (&q->rc.lock));
  q->rc.cursor = cluster;
  return grow_table (q, block_index);
}

/* If the refcounts of an image are wrong, a cluster with refcount 0 may hold
 * the only copy of something.  Clusters that were in the container when it
 * was opened are cut off only if they are no metadata and read as zeroes, as
 * do all clusters that we free.
 */
int
allocate_used_end (struct qcow2 *q, uint64_t *end)
{
  const uint64_t opened = q->rc.opened << q->cluster_bits;
  uint64_t c = div_round_up (container_size (q->container), q->cluster_size);

  ACQUIRE_LOCK_FOR_CURRENT_SCOPE (&q->rc.lock);
  for (; c > 0 && registry_class (q, c - 1) == QCOW2_DATA; --c) {
    uint64_t count;

    if (refcount_get (q, c - 1, &count) == -1)
      return -1;
    if (count != 0)
      break;
  }
  *end = c << q->cluster_bits;
  if (*end < opened) {
    if (end_of_data (q, *end, opened, end) == -1)
      return -1;
    *end = round_up (*end, q->cluster_size);
  }
  return 0;
}
