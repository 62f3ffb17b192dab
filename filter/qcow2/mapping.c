/* nbdkit-dirty-bitmap-filter
 * SPDX-License-Identifier: BSD-3-Clause
 * Copyright the nbdkit-dirty-bitmap-filter authors
 */

/* Guest offset to host offset: L1 and L2 entries (qcow2.rst, "Cluster
 * mapping"), and which threads may change them.
 *
 * The whole L1 table is in RAM.  Looking up a mapping takes no lock.  A
 * thread that changes the mapping of guest clusters holds a range lock on
 * them from its look-up until the entries are set, so that of two writes to
 * one unallocated cluster the second finds what the first has allocated.
 * Writes to allocated clusters, and reads, take no range lock: a cluster
 * that is given up is not reused until they are done (release.c).
 *
 * An L1 entry in RAM changes once, from none to a new L2 table, which has
 * been zeroed in the container by then.  So whichever of the new L1 entry
 * and the new L2 entries are on disk after a crash, the image is consistent.
 * The flush will find space for the entry, as for those of the new table
 * (holes.c).
 *
 * The same holds where an L2 table is shared with snapshots (snapshots.c):
 * the new table is a copy of the old one, in the container.  No entry of a
 * shared table is ever changed, so the cache has no dirty slices of it, and
 * the container has its current entries.  The refcount of the old table
 * falls when no L1 entry on disk refers to it any more, and the snapshots'
 * references remain.  In an image that has snapshots, the flag COPIED of an
 * L1 entry is trusted only after the refcount of the table was found to be
 * 1.
 */

#include <config.h>

#include <assert.h>
#include <errno.h>
#include <inttypes.h>
#include <stdlib.h>

#include "common/vector.h"
#include "qcow2/internal.h"

/* The number of entries looked up at once, at first and at most: a short run
 * must not cost more than needed.
 */
#define FIRST_BATCH 4
#define BATCH 64

/* In the list of dirty L1 entries (at most 2^22): the table was zeroed when
 * it was made.
 */
#define L1_NEW_TABLE (UINT32_C (1) << 31)

static int
load_l1_entry (struct qcow2 *q, uint32_t i, uint64_t entry)
{
  atomic_init (&q->l1.entries[i], entry);
  if (entry == 0 || q->readonly)
    return 0;
  if ((entry & L1_RESERVED_MASK) != 0) {
    report_error ("L1 entry %" PRIu32 " of the image, %#" PRIx64 ", has "
                  "reserved bits set, which qemu-img check calls corrupt: the "
                  "image can only be served read-only (-r)", i, entry);
    errno = EIO;
    return -1;
  }
  if ((entry & ENTRY_OFFSET_MASK) != 0 &&
      qcow2_register (q, QCOW2_L2_TABLE, entry & ENTRY_OFFSET_MASK,
                      q->cluster_size) == -1) {
    report_error ("the image is corrupt: L1 entry %" PRIu32 ", %#" PRIx64
                  ", is invalid or overlaps other metadata; "
                  "see qemu-img check", i, entry);
    errno = EIO;
    return -1;
  }
  return 0;
}

int
mapping_open (struct qcow2 *q)
{
  const uint32_t nr = q->header.l1_entries;
  CLEANUP_FREE uint64_t *raw = malloc (nr * UINT64_C (8) + 1);

  pthread_mutex_init (&q->l1.lock, NULL);
  pthread_mutex_init (&q->ranges.mutex, NULL);
  pthread_cond_init (&q->ranges.cond, NULL);
  q->l1.entries = malloc (nr * sizeof q->l1.entries[0] + 1);
  if (raw == NULL || q->l1.entries == NULL) {
    report_error ("malloc: %m");
    return -1;
  }
  if (q->header.nr_snapshots != 0 && !q->readonly) {
    q->l1.proven = calloc (nr + UINT64_C (1), sizeof q->l1.proven[0]);
    if (q->l1.proven == NULL) {
      report_error ("calloc: %m");
      return -1;
    }
  }
  if (nr == 0)
    return 0;
  if (container_pread (q->container, raw, nr * UINT64_C (8),
                       q->header.l1_offset) == -1) {
    report_error ("cannot read the L1 table: %m");
    return -1;
  }
  if (qcow2_register (q, QCOW2_L1_TABLE, q->header.l1_offset,
                      nr * UINT64_C (8)) == -1) {
    report_error ("the L1 table of the image overlaps other metadata "
                  "or the end of the file");
    return -1;
  }
  for (uint32_t i = 0; i < nr; ++i)
    if (load_l1_entry (q, i, be64toh (raw[i])) == -1)
      return -1;
  if (q->readonly)
    return 0;
  q->l1.holes = holes_in_table (raw, nr * UINT64_C (8));
  return q->l1.holes == NULL ? -1 : 0;
}

void
mapping_free (struct qcow2 *q)
{
  free (q->l1.entries);
  free (q->l1.proven);
  free (q->l1.holes);
  free (q->l1.dirty);
}

/* The kind of a standard entry, or of a descriptor without regard to the
 * bitmap.  As in QEMU, reserved bits make it invalid for everything that
 * will be written, but not for what is read.
 */
static enum mapping_kind
descriptor_kind (const struct qcow2 *q, uint64_t descriptor)
{
  const uint64_t host = descriptor & ENTRY_OFFSET_MASK;

  if (descriptor & OFLAG_COMPRESSED)
    return q->has_data_file ? MAPPING_INVALID : MAPPING_COMPRESSED;
  if (q->readonly)
    descriptor &=
      ~(L2_RESERVED_MASK | (q->extended_l2 ? OFLAG_ZERO : UINT64_C (0)));
  if ((descriptor & L2_RESERVED_MASK) != 0 || host % q->cluster_size != 0)
    return MAPPING_INVALID;
  if (descriptor & OFLAG_ZERO) {
    if (q->header.version < 3 || q->extended_l2)
      return MAPPING_INVALID;
    return host == 0 ? MAPPING_ZERO : MAPPING_ZERO_ALLOCATED;
  }
  /* A data file has guest data at offset 0, too. */
  if (host == 0 && !(q->has_data_file && (descriptor & OFLAG_COPIED) != 0))
    return MAPPING_UNALLOCATED;
  return MAPPING_DATA;
}

bool
mapping_owns_cluster (const struct qcow2 *q, uint64_t descriptor)
{
  const enum mapping_kind kind = descriptor_kind (q, descriptor);

  return (descriptor & OFLAG_COPIED) != 0 &&
    (kind == MAPPING_DATA || kind == MAPPING_ZERO_ALLOCATED);
}

/* The kind of the subclusters from first on, of a cluster whose descriptor
 * has that kind.  *nr is how many are alike.
 */
static enum mapping_kind
subcluster_kind (enum mapping_kind cluster, uint64_t bitmap, unsigned first,
                 unsigned *nr)
{
  const uint32_t allocated = bitmap >> first & UINT32_MAX >> first;
  const uint32_t zero = bitmap >> 32 >> first;
  const uint32_t neither = ~(allocated | zero);
  const bool has_host = cluster == MAPPING_DATA;
  enum mapping_kind kind;
  uint32_t alike;

  *nr = L2_SUBCLUSTERS - first;
  if (cluster == MAPPING_COMPRESSED || cluster == MAPPING_INVALID)
    return cluster;
  if (((uint32_t) bitmap & bitmap >> 32) != 0 ||
      (!has_host && (uint32_t) bitmap != 0))
    return MAPPING_INVALID;
  if (allocated & 1) {
    kind = MAPPING_DATA;
    alike = allocated;
  }
  else if (zero & 1) {
    kind = has_host ? MAPPING_ZERO_ALLOCATED : MAPPING_ZERO;
    alike = zero;
  }
  else {
    kind = MAPPING_UNALLOCATED;
    alike = neither;
  }
  if (~alike != 0)
    *nr = min_u64 (*nr, __builtin_ctz (~alike));
  return kind;
}

/* Decode the units of an entry from first on.  *nr of them are alike. */
static void
decode (const struct qcow2 *q, const struct l2_entry *entry, unsigned first,
        struct mapping *m, unsigned *nr)
{
  m->descriptor = entry->descriptor;
  m->copied = entry->descriptor & OFLAG_COPIED;
  m->host = (entry->descriptor & ENTRY_OFFSET_MASK)
    + ((uint64_t) first << q->unit_bits);
  m->kind = descriptor_kind (q, entry->descriptor);
  if (q->extended_l2)
    m->kind = subcluster_kind (m->kind, entry->bitmap, first, nr);
  else
    *nr = 1;
}

/* May units be added to a run of nr units? */
static bool
continues (const struct qcow2 *q, const struct mapping *run, uint64_t nr,
           const struct mapping *next, bool with_host)
{
  if (!with_host) {
    /* The distinctions of base:allocation: data, zero, unallocated. */
    static const unsigned char group[] = {
      [MAPPING_UNALLOCATED] = 0, [MAPPING_ZERO] = 1,
      [MAPPING_ZERO_ALLOCATED] = 1, [MAPPING_DATA] = 2,
      [MAPPING_COMPRESSED] = 2, [MAPPING_INVALID] = 3,
    };

    return group[run->kind] == group[next->kind];
  }
  if (run->kind != next->kind || run->kind == MAPPING_COMPRESSED)
    return false;
  if (run->kind != MAPPING_DATA)
    return true;
  return run->copied == next->copied &&
    next->host == run->host + (nr << q->unit_bits);
}

uint64_t
mapping_slice_left (const struct qcow2 *q, uint64_t guest_cluster)
{
  const uint64_t in_slice = UINT64_C (1) << q->l2.slice_bits;

  return in_slice - (guest_cluster & (in_slice - 1));
}

/* Get up to nr entries, and up to batch.  If there is no L2 table, *uniform
 * is set: then *got can be any number up to nr, and all entries are 0, like
 * the first.
 */
static int
get_entries (struct qcow2 *q, uint64_t guest_cluster, uint64_t nr,
             unsigned batch, struct l2_entry entries[BATCH], uint64_t *got,
             bool *uniform)
{
  const uint64_t in_l2 = UINT64_C (1) << q->l2_bits;
  const uint64_t l1_entry =
    atomic_load_explicit (&q->l1.entries[guest_cluster >> q->l2_bits],
                          memory_order_acquire);

  *uniform = (l1_entry & ENTRY_OFFSET_MASK) == 0;
  if (*uniform) {
    entries[0] = (struct l2_entry) { 0 };
    *got = min_u64 (nr, in_l2 - (guest_cluster & (in_l2 - 1)));
    return 0;
  }
  *got = min_u64 (min_u64 (nr, batch), mapping_slice_left (q, guest_cluster));
  return l2_get (q, guest_cluster, *got, entries);
}

/* A run that is being looked up. */
struct run {
  struct mapping *mapping;
  uint64_t units;               /* found so far */
  bool with_host;
  bool ended;
};

/* Add the units of one entry, from first on. */
static void
add_entry (const struct qcow2 *q, struct run *run,
           const struct l2_entry *entry, unsigned first)
{
  const unsigned in_cluster = 1U << (q->cluster_bits - q->unit_bits);
  struct mapping next;
  unsigned nr;

  for (; first < in_cluster; first += nr) {
    decode (q, entry, first, &next, &nr);
    if (run->units == 0)
      *run->mapping = next;
    else if (!continues (q, run->mapping, run->units, &next,
                         run->with_host)) {
      run->ended = true;
      return;
    }
    run->units += nr;
  }
}

/* How many entries from i on repeat the one before. */
static unsigned
repeated (const struct l2_entry *entries, unsigned i, unsigned nr)
{
  const unsigned first = i;

  while (i < nr && entries[i].descriptor == entries[i - 1].descriptor)
    i++;
  return i - first;
}

/* Add entries, the first of them from a unit on.  In a thin disk most entries
 * are empty, and so repeat each other: these need not be decoded.
 */
static void
add_entries (const struct qcow2 *q, struct run *run,
             const struct l2_entry *entries, unsigned nr, unsigned first)
{
  for (unsigned i = 0; i < nr && !run->ended; ++i) {
    add_entry (q, run, &entries[i], i == 0 ? first : 0);
    if (!run->with_host && !q->extended_l2 && !run->ended) {
      const unsigned nr_alike = repeated (entries, i + 1, nr);

      run->units += nr_alike;
      i += nr_alike;
    }
  }
}

static int
check_run (const struct qcow2 *q, const struct mapping *m, uint64_t offset)
{
  const char *why = "is invalid";

  if (m->kind == MAPPING_DATA && q->has_data_file &&
      m->host != offset)
    why = "does not point to the same offset in the data file";
  else if (m->kind != MAPPING_INVALID)
    return 0;
  report_error ("the image is corrupt: the L2 entry for guest offset %#"
                PRIx64 ", %#" PRIx64 ", %s; see qemu-img check",
                round_down (offset, q->cluster_size), m->descriptor, why);
  errno = EIO;
  return -1;
}

static int
lookup (struct qcow2 *q, uint64_t offset, uint64_t count, bool with_host,
        struct mapping *m)
{
  const unsigned sub_bits = q->cluster_bits - q->unit_bits;
  const uint64_t first_unit = offset >> q->unit_bits;
  const uint64_t in_unit = offset & ((UINT64_C (1) << q->unit_bits) - 1);
  const uint64_t first = offset >> q->cluster_bits;
  const uint64_t nr = ((offset + count - 1) >> q->cluster_bits) - first + 1;
  struct run run = { .mapping = m, .units = 0, .with_host = with_host };
  unsigned skip = first_unit & ((1U << sub_bits) - 1), batch = FIRST_BATCH;
  struct l2_entry entries[BATCH];
  uint64_t done = 0, got;
  bool uniform;

  if (nr == 1 && sub_bits == 0) {
    /* By far the most common case: no need to look for the end of the run. */
    if (get_entries (q, first, 1, 1, entries, &got, &uniform) == -1)
      return -1;
    decode (q, &entries[0], 0, m, &batch);
    m->host += in_unit;
    m->length = count;
    return check_run (q, m, offset);
  }

  do {
    if (get_entries (q, first + done, nr - done, batch, entries, &got,
                     &uniform) == -1)
      return -1;
    if (done > 0 && request_goes_on (q) == -1)
      return -1;
    batch = min_u64 (batch * 4, BATCH);
    add_entries (q, &run, entries, uniform ? 1 : got, skip);
    skip = 0;
    if (uniform && !run.ended)
      run.units += (got - 1) << sub_bits;
    done += got;
  } while (!run.ended && done < nr);

  m->host += in_unit;
  m->length = min_u64 (count, (run.units << q->unit_bits) - in_unit);
  return check_run (q, m, offset);
}

int
mapping_lookup (struct qcow2 *q, uint64_t offset, uint64_t count,
                struct mapping *m)
{
  return lookup (q, offset, count, true, m);
}

int
mapping_lookup_kind (struct qcow2 *q, uint64_t offset, uint64_t count,
                     struct mapping *m)
{
  return lookup (q, offset, count, false, m);
}

static int
note_dirty_l1 (struct qcow2 *q, uint32_t index)
{
  if (vector_reserve (q->l1.dirty, q->l1.nr_dirty, q->l1.max_dirty, 1) == -1) {
    report_error ("realloc: %m");
    return -1;
  }
  q->l1.dirty[q->l1.nr_dirty++] = index;
  return 0;
}

/* Is there an L2 table that only the disk uses?  If so, that does not
 * change.
 */
static bool
has_own_l2 (struct qcow2 *q, uint32_t index)
{
  const uint64_t l1_entry =
    atomic_load_explicit (&q->l1.entries[index], memory_order_acquire);

  return (l1_entry & OFLAG_COPIED) != 0 &&
    (l1_entry & ENTRY_OFFSET_MASK) != 0 &&
    (q->l1.proven == NULL ||
     atomic_load_explicit (&q->l1.proven[index], memory_order_acquire));
}

/* With l1.lock held: from now on this is the table. */
static void
set_own_l2 (struct qcow2 *q, uint32_t index, uint64_t table)
{
  assert (lock_is_mine (&q->l1.lock));
  atomic_store_explicit (&q->l1.entries[index], table | OFLAG_COPIED,
                         memory_order_release);
  if (q->l1.proven != NULL)
    atomic_store_explicit (&q->l1.proven[index], true, memory_order_release);
}

static int
count_references (struct qcow2 *q, uint64_t table, uint64_t *count)
{
  ACQUIRE_LOCK_FOR_CURRENT_SCOPE (&q->rc.lock);
  return refcount_get (q, table >> q->cluster_bits, count);
}

/* Copy the old table, or zeroes, into a new one. */
static int
fill_l2 (struct qcow2 *q, uint64_t old, uint64_t host, bool zeroed)
{
  const unsigned long lost = qcow2_lost (q);
  CLEANUP_FREE void *table = NULL;

  if (old == 0) {
    if (zeroed ||
        container_zero (q->container, q->cluster_size, host, false) == 0)
      return 0;
    report_error ("cannot write a new L2 table: %m");
    return -1;
  }
  table = malloc (q->cluster_size);
  if (table == NULL) {
    report_error ("malloc: %m");
    return -1;
  }
  if (qcow2_read_metadata (q, table, q->cluster_size, old) == -1 ||
      gate_write_metadata (q, QCOW2_L2_TABLE, table, q->cluster_size,
                           host) == -1)
    return -1;
  /* If it were lost (flush.c), no other code could write it again. */
  return qcow2_barrier_since (q, lost);
}

static int
make_l2 (struct qcow2 *q, uint32_t index, uint64_t old)
{
  uint64_t host, got;
  bool zeroed;

  if (allocate_clusters (q, QCOW2_L2_TABLE, 1, &host, &got, &zeroed) == -1)
    return -1;
  if (fill_l2 (q, old, host, zeroed) == -1 ||
      holes_fill_table (q, QCOW2_L1_TABLE, q->l1.holes, q->header.l1_offset,
                        q->header.l1_entries * UINT64_C (8),
                        index * UINT64_C (8)) == -1 ||
      note_dirty_l1 (q, index | (old == 0 ? L1_NEW_TABLE : 0)) == -1) {
    const int err = errno;

    allocate_undo (q, host, 1);
    errno = err;
    return -1;
  }
  set_own_l2 (q, index, host);
  return 0;
}

/* There is an L2 table, and it is not known whether only the disk uses it. */
static int
make_own_l2 (struct qcow2 *q, uint32_t index, uint64_t l1_entry)
{
  const uint64_t table = l1_entry & ENTRY_OFFSET_MASK;
  const bool claimed = l1_entry & OFLAG_COPIED;
  uint64_t count;

  if (count_references (q, table, &count) == -1)
    return -1;
  if (count == 1 && (claimed || q->header.nr_snapshots == 0)) {
    if (!claimed && note_dirty_l1 (q, index) == -1)
      return -1;
    set_own_l2 (q, index, table);
    return 0;
  }
  if (make_l2 (q, index, table) == -1)
    return -1;
  /* With a count of 1 the flag, or the count, is wrong.  If it is the count,
   * a snapshot uses the table: better leak it than free it.
   */
  if (count > 1)
    release_clusters (q, table >> q->cluster_bits, 1);
  return 0;
}

int
mapping_need_l2 (struct qcow2 *q, uint64_t guest_cluster)
{
  const uint64_t index = guest_cluster >> q->l2_bits;
  uint64_t l1_entry;

  if (has_own_l2 (q, index))
    return 0;

  ACQUIRE_LOCK_FOR_CURRENT_SCOPE (&q->l1.lock);
  if (has_own_l2 (q, index))
    return 0;
  l1_entry = atomic_load (&q->l1.entries[index]);
  return (l1_entry & ENTRY_OFFSET_MASK) == 0
    ? make_l2 (q, index, 0) : make_own_l2 (q, index, l1_entry);
}

int
mapping_take_dirty_l1 (struct qcow2 *q, struct l1_copies *copies)
{
  ACQUIRE_LOCK_FOR_CURRENT_SCOPE (&q->l1.lock);
  if (q->l1.nr_dirty == 0)
    return 0;

  if (vector_reserve (copies->indices, copies->nr, copies->max,
                      q->l1.nr_dirty) == -1) {
    report_error ("realloc: %m");
    return -1;
  }
  memcpy (copies->indices + copies->nr, q->l1.dirty,
          q->l1.nr_dirty * sizeof q->l1.dirty[0]);
  copies->nr += q->l1.nr_dirty;
  q->l1.nr_dirty = 0;
  return 0;
}

int
mapping_zero_again (struct qcow2 *q)
{
  CLEANUP_FREE uint32_t *indices = NULL;
  size_t nr;

  pthread_mutex_lock (&q->l1.lock);
  nr = q->l1.nr_dirty;
  indices = malloc (nr * sizeof indices[0] + 1);
  if (indices != NULL && nr > 0)
    memcpy (indices, q->l1.dirty, nr * sizeof indices[0]);
  pthread_mutex_unlock (&q->l1.lock);
  if (indices == NULL) {
    report_error ("malloc: %m");
    return -1;
  }
  for (size_t i = 0; i < nr; ++i)
    if ((indices[i] & L1_NEW_TABLE) != 0 &&
        l2_zero_again (q, indices[i] & ~L1_NEW_TABLE) == -1)
      return -1;
  return 0;
}

int
mapping_write_l1 (struct qcow2 *q, const struct l1_copies *copies)
{
  for (size_t i = 0; i < copies->nr; ++i) {
    const uint32_t index = copies->indices[i] & ~L1_NEW_TABLE;
    uint64_t entry;

    put_be64 (&entry, atomic_load (&q->l1.entries[index]));
    if (gate_write_metadata (q, QCOW2_L1_TABLE, &entry, sizeof entry,
                             q->header.l1_offset + index * UINT64_C (8))
        == -1)
      return -1;
  }
  return 0;
}

void
mapping_l1_done (struct qcow2 *q, struct l1_copies *copies, bool written)
{
  if (!written) {
    ACQUIRE_LOCK_FOR_CURRENT_SCOPE (&q->l1.lock);
    for (size_t i = 0; i < copies->nr; ++i)
      if (note_dirty_l1 (q, copies->indices[i]) == -1)
        /* No L1 entry on disk would ever point to the table. */
        gate_set_corrupt (q);
  }
  free (copies->indices);
}

static bool
overlaps_any (const struct qcow2 *q, const struct range_lock *r)
{
  for (const struct range_lock *p = q->ranges.first; p != NULL; p = p->next)
    if (p->first <= r->last && r->first <= p->last)
      return true;
  return false;
}

void
range_lock_take (struct qcow2 *q, struct range_lock *r, uint64_t first,
                 uint64_t last)
{
  r->first = first;
  r->last = last;
  ACQUIRE_LOCK_FOR_CURRENT_SCOPE (&q->ranges.mutex);
  while (overlaps_any (q, r))
    pthread_cond_wait (&q->ranges.cond, &q->ranges.mutex);
  r->next = q->ranges.first;
  q->ranges.first = r;
}

void
range_lock_drop (struct qcow2 *q, struct range_lock *r)
{
  ACQUIRE_LOCK_FOR_CURRENT_SCOPE (&q->ranges.mutex);
  struct range_lock **p = &q->ranges.first;

  while (*p != r)
    p = &(*p)->next;
  *p = r->next;
  pthread_cond_broadcast (&q->ranges.cond);
}
