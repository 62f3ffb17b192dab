/* nbdkit-dirty-bitmap-filter
 * SPDX-License-Identifier: BSD-3-Clause
 * Copyright the nbdkit-dirty-bitmap-filter authors
 */

#ifndef DIRTY_BITMAP_QCOW2_INTERNAL_H
#define DIRTY_BITMAP_QCOW2_INTERNAL_H

/* What the files of qcow2/ share.
 *
 *   header.c          the header and its extensions
 *   references.c      the files that the header names
 *   registry.c        which clusters hold metadata
 *   refcount.c        refcount blocks and their cache
 *   allocate.c        finding free clusters; new refcount blocks and tables
 *   release.c         clusters on their way from used to free
 *   reuse.c           places that lost their data and stay the guest's
 *   holes.c           space for metadata that is written later
 *   l2-cache.c        L2 tables in RAM
 *   mapping.c         guest offset to host offset, L1 and L2 entries
 *   compressed.c      compressed clusters
 *   layer.c           the backing file
 *   scan.c            what refers to each cluster
 *   leaks.c           leaks that a crash has left
 *   repair.c          images that are marked dirty
 *   read.c, write.c, discard.c
 *   flush.c           the order of writes
 *   snapshots.c       internal snapshots
 *   open.c            putting it all together
 *
 * Locks, in the order in which they are taken:
 *   range (mapping.c)   guest clusters whose mapping is being changed
 *   flush_lock          one flush at a time
 *   l2_set.lock         one set of the L2 cache
 *   l1_lock             new L2 tables, the list of dirty L1 entries
 *   alloc_lock          refcounts, their cache, the refcount table
 *   release_lock        the lists of clusters on their way to free
 *   registry.lock       changes to the registry
 *   header_state.lock   the copy of the header and its bits
 *   grace.lock          inside of grace.c, for a moment
 * A read, or a write to an allocated cluster, takes none of them unless it
 * has to load an L2 slice.
 *
 * No thread waits for a range lock inside a section of q->requests: a thread
 * that needs both takes the range lock first.  So the holder of a range lock
 * may wait for the end of all sections (reuse.c).
 */

#include <errno.h>
#include <pthread.h>
#include <stdatomic.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "common/bytes.h"
#include "common/cleanup.h"
#include "common/grace.h"
#include "common/report.h"
#include "container/container.h"
#include "qcow2/holes.h"
#include "qcow2/order.h"
#include "qcow2/qcow2.h"

/* Bits of L1 and L2 entries. */
#define OFLAG_COPIED UINT64_C (0x8000000000000000)
#define OFLAG_COMPRESSED UINT64_C (0x4000000000000000)
#define OFLAG_ZERO UINT64_C (1)
#define ENTRY_OFFSET_MASK UINT64_C (0x00fffffffffffe00)
#define L1_RESERVED_MASK UINT64_C (0x7f000000000001ff)
#define L2_RESERVED_MASK UINT64_C (0x3f000000000001fe)
#define L2_SUBCLUSTERS 32
#define REFTABLE_RESERVED_MASK UINT64_C (0x1ff)

/* Bits of the header. */
#define INCOMPAT_DIRTY UINT64_C (1)
#define INCOMPAT_CORRUPT UINT64_C (2)
#define INCOMPAT_DATA_FILE UINT64_C (4)
#define INCOMPAT_COMPRESSION UINT64_C (8)
#define INCOMPAT_EXTENDED_L2 UINT64_C (16)
#define COMPAT_LAZY_REFCOUNTS UINT64_C (1)
#define AUTOCLEAR_BITMAPS UINT64_C (1)
#define AUTOCLEAR_RAW_EXTERNAL UINT64_C (2)

/* QEMU's limits.  They bound what a header can make us allocate. */
#define MAX_L1_BYTES (UINT64_C (32) << 20)
#define MAX_REFTABLE_BYTES (UINT64_C (8) << 20)

/* What the header says, checked. */
struct header {
  unsigned version;
  unsigned cluster_bits;
  uint64_t size;
  uint32_t l1_entries;
  uint64_t l1_offset;
  uint64_t reftable_offset;
  uint32_t reftable_clusters;
  uint32_t nr_snapshots;
  uint64_t snapshots_offset;
  uint64_t incompatible, compatible, autoclear;
  unsigned refcount_order;
  uint32_t header_length;
  unsigned compression_type;
};

/* Bytes of the copy of the header, not NUL-terminated. */
struct header_text {
  const uint8_t *text;
  uint32_t length;
};

/* Offsets of fields that other files than header.c use. */
#define HEADER_BACKING_OFFSET 8
#define HEADER_BACKING_SIZE 16

/* header.c.  The raw first cluster is kept as it is on disk, and every
 * change goes through that copy.
 */
struct header_state {
  pthread_mutex_t lock;         /* protects what follows */
  uint8_t *cluster;
  uint64_t extensions_end;      /* offset of the END extension, or of the
                                   place for it */
  uint64_t extensions_limit;    /* extensions must end before this */
  uint64_t bitmaps_offset;      /* of the extension's data, or 0 */
  struct qcow2_bitmaps_extension bitmaps;
  struct header_text feature_names, backing_format, data_file;
  bool unknown_extension;       /* there is one */
  bool distrust_bitmaps;
};

/* registry.c */
struct registry_table;
struct registry {
  pthread_mutex_t lock;         /* protects changes */
  _Atomic (struct registry_table *) table;
};

/* refcount.c */
struct refcount_slice {
  uint64_t index;               /* UINT64_MAX if unused */
  uint8_t *data;
  uint8_t holes;                /* in this slice of the container (holes.c) */
  bool dirty, pinned, referenced;
  unsigned long written;        /* in which epoch; 0 if the slice is durable */
  struct refcount_slice *next;  /* in its hash chain */
};

struct refcounts {
  tally lookups, misses, evictions, slices_loaded;
  tally allocated, freed;       /* clusters */
  unsigned slice_bytes;
  unsigned slice_entries_bits;  /* log2 of entries in a slice */
  unsigned block_entries_bits;  /* log2 of entries in a refcount block */
  uint64_t *table;              /* host offsets of refcount blocks */
  uint64_t table_entries;
  uint64_t table_offset;        /* on disk */
  uint8_t *table_holes;         /* of the table on disk (holes.c) */
  bool growing;                 /* a larger table is being made */
  uint64_t abandoned, nr_abandoned; /* clusters of a table that failed, kept
                                       while reftable_unknown */
  unsigned long tables;         /* how often the table was replaced */
  uint64_t *dirty_table;        /* indices of entries to write */
  size_t nr_dirty_table, max_dirty_table;
  size_t nr_written_table;      /* the first of those, which are written */
  unsigned long epoch;          /* counts barriers, from 1 on */
  unsigned long lost;           /* qcow2_lost at the last check */
  struct refcount_slice *slices;
  size_t nr_slices, hand, nr_pinned;
  size_t nr_written_slices;     /* written and not durable */
  atomic_size_t nr_dirty;       /* changed under alloc_lock */
  pthread_cond_t unpinned;      /* nr_pinned has fallen to 0 */
  struct refcount_slice **hash;
  size_t hash_mask;
  uint64_t cursor;              /* no cluster below this is free */
  uint64_t opened;              /* clusters when the image was opened */
  uint64_t fresh;               /* clusters from here on were never used,
                                   and read as zeroes */
};

/* release.c */
struct release_range {
  uint64_t cluster, nr;
};

struct release_list {
  struct release_range *ranges;
  size_t nr, max;
  uint64_t nr_clusters;
};

/* An L2 entry: the descriptor of the host cluster and, if the image has
 * extended entries, the bitmap of its subclusters, else 0.  The lower half
 * of the bitmap says which subclusters are allocated, the upper half which
 * read as zeroes.
 */
struct l2_entry {
  uint64_t descriptor;
  uint64_t bitmap;
};

/* l2-cache.c */
#define L2_WAYS 16
#define L2_MAX_SLICE_ENTRIES 512

struct l2_slot {
  _Atomic uint64_t tag;         /* (slice + 1) << 24 | version, or version */
  atomic_uint referenced;       /* since the clock hand passed */
  bool dirty, pinned;           /* protected by the set's lock, as is */
  uint8_t holes;                /* in this slice of the container (holes.c) */
};

struct l2_set {
  pthread_mutex_t lock;         /* protects all changes to the set */
  unsigned hand;
  atomic_uint nr_dirty;         /* changed under lock */
  struct l2_slot way[L2_WAYS];
};

struct l2_cache {
  struct meter lookups;         /* counted while meter_is_on */
  _Atomic uint64_t misses, evictions, slots_used;
  unsigned slice_bits;          /* log2 of entries in a slice */
  unsigned entry_bits;          /* log2 of 64-bit words in an entry */
  size_t nr_sets;               /* a power of two */
  struct l2_set *sets;
  _Atomic uint64_t *words;      /* big-endian, as on disk */
  atomic_size_t nr_dirty;
};

/* leaks.c */
struct leak;
struct leaks {
  struct leak *ranges;
  size_t nr;
  bool corrupt;                 /* refcounts are too low: no leaks are
                                   reclaimed */
  atomic_bool released;
};

/* A change of mapping under way (mapping.c). */
struct range_lock {
  uint64_t first, last;         /* guest clusters */
  struct range_lock *next;
};

struct qcow2 {
  struct container *container;
  struct container *data;       /* guest data: the container, or ... */
  bool has_data_file;           /* an external data file */
  bool data_file_raw;           /* which is a raw image of its own */
  struct qcow2_layer backing;
  uint64_t backing_size;        /* 0 if there is none */
  bool readonly;
  struct header header;
  struct header_state hs;
  unsigned cluster_bits;
  uint64_t cluster_size;
  bool extended_l2;
  unsigned unit_bits;           /* of the units that have a kind of mapping
                                   each: clusters, or subclusters */
  unsigned l2_bits;             /* log2 of entries in an L2 table */
  uint64_t size;                /* of the guest's disk */

  pthread_mutex_t preallocated_lock; /* held while finding this out */
  atomic_int preallocated;

  atomic_bool writing;          /* the first change was allowed */
  atomic_bool corrupt;          /* no more writes are allowed */
  atomic_bool hurried;          /* long requests must end, from hurried_at on
                                   (flush.c) */
  _Atomic int64_t hurried_at;

  struct registry registry;

  pthread_mutex_t alloc_lock;   /* protects refcounts */
  struct refcounts rc;

  pthread_mutex_t release_lock; /* protects the lists that follow */
  struct release_list released; /* no longer referred to, in RAM */
  struct release_list flushing; /* the flush under way makes it durable */
  struct release_list durable;  /* no longer referred to, on disk */
  struct release_list waiting;  /* for the requests that might use them */
  bool grace_under_way;
  grace_period retiring;        /* the period that waiting waits for */
  atomic_size_t pending_ranges;         /* in all lists */
  _Atomic uint64_t pending_clusters;
  struct grace requests;        /* requests that use host offsets */
  _Atomic grace_period emptied; /* the period that reuse.c waits for, or 0 */

  struct leaks leaks;

  _Atomic uint64_t *l1;
  atomic_bool *l2_proven;       /* COPIED flags of l1 that are known to be
                                   true, or NULL if all are trusted */
  pthread_mutex_t l1_lock;      /* protects what follows */
  uint8_t *l1_holes;            /* of the table on disk (holes.c) */
  uint32_t *dirty_l1;
  size_t nr_dirty_l1, max_dirty_l1;

  struct l2_cache l2;

  pthread_mutex_t range_mutex;  /* protects ranges */
  pthread_cond_t range_cond;
  struct range_lock *ranges;

  unsigned long lost_before;    /* failed barriers when the image was opened
                                   (flush.c) */
  atomic_bool reftable_unknown; /* see header_set_reftable */

  pthread_mutex_t flush_lock;   /* protects what follows */
  unsigned long lost_redone;    /* the value of qcow2_lost up to which all
                                   losses were redone */
  atomic_ulong flushes_begun;
  unsigned long flush_succeeded[2]; /* without hooks; with hooks, which may
                                       have failed */
  tally flushes[2], flush_ns[2]; /* that have failed, succeeded */
};

/* header.c */
/* Read and parse the header.  header_read also checks whether we support it. */
extern int header_load (struct qcow2 *);
extern int header_read (struct qcow2 *);
extern void header_free (struct qcow2 *);
/* Call before every change.  EROFS; EIO if the image is corrupt. */
extern int header_begin_writing (struct qcow2 *);
extern int header_set_reftable (struct qcow2 *, uint64_t offset,
                                uint32_t clusters);
/* For a dirty image.  The first is called before the repair, which does not
 * change the disk; the second after it, and removes the mark durably.
 */
extern int header_begin_repair (struct qcow2 *);
extern int header_end_repair (struct qcow2 *);
/* The image is damaged, or about to be: allow no more writes. */
extern void header_set_corrupt (struct qcow2 *);

/* references.c: does the header name a backing file, validly or not? */
extern bool references_backing (const struct qcow2 *);

/* registry.c */
extern int registry_init (struct qcow2 *);
extern void registry_free (struct qcow2 *);
extern enum qcow2_class registry_class (struct qcow2 *, uint64_t cluster);
/* -1 with ENOMEM. */
extern int registry_set (struct qcow2 *, enum qcow2_class,
                         uint64_t cluster, uint64_t nr_clusters);
/* Refuse a write that would touch clusters of another class: EIO. */
extern int registry_check (struct qcow2 *, enum qcow2_class,
                           uint64_t offset, uint64_t count);
extern const char *registry_class_name (enum qcow2_class);

/* refcount.c: all with alloc_lock held. */
extern int refcounts_open (struct qcow2 *, uint64_t cache_bytes);
extern void refcounts_free (struct qcow2 *);
extern int refcount_get (struct qcow2 *, uint64_t cluster, uint64_t *count);
/* The refcount block must exist. */
extern int refcount_set (struct qcow2 *, uint64_t cluster, uint64_t count);
/* Find the first free cluster from *cluster on.  Clusters whose refcount
 * block does not exist are free.
 */
extern int refcount_find_free (struct qcow2 *, uint64_t *cluster);
extern bool refcount_block_exists (struct qcow2 *, uint64_t block_index);
/* Forget cached slices of refcount block index and beyond. */
extern void refcount_forget (struct qcow2 *, uint64_t block_index);
/* Set an entry of the refcount table.  The next flush writes it. */
extern int refcount_set_table_entry (struct qcow2 *, uint64_t block_index,
                                     uint64_t host_offset);
/* Write all dirty slices except pinned ones. */
extern int refcounts_write_all (struct qcow2 *);

/* The highest possible refcount. */
extern uint64_t refcount_max (const struct qcow2 *);
/* An entry of a refcount block as it is on disk. */
extern uint64_t refcount_entry (const struct qcow2 *, const uint8_t *block,
                                uint64_t i);
/* Write everything that is dirty, and make it durable. */
extern int refcounts_write_durably (struct qcow2 *);

/* This one without alloc_lock. */
extern void refcounts_get_numbers (const struct qcow2 *,
                                   struct qcow2_cache_numbers *);

/* refcount.c: without alloc_lock, under flush_lock. */
extern int refcounts_flush (struct qcow2 *, unsigned long lost);
/* Around a barrier that follows refcounts_flush.  The second only if the
 * barrier succeeds.
 */
extern unsigned long refcounts_barrier_begins (struct qcow2 *);
extern void refcounts_barrier_done (struct qcow2 *, unsigned long epoch);
/* Make dirty again what a failed barrier may have lost. */
extern void refcounts_redo_lost (struct qcow2 *);

/* allocate.c.  Without alloc_lock.  Allocate at least one and at most nr
 * contiguous clusters: *got of them, *zeroed if they read as zeroes.
 */
extern int allocate_clusters (struct qcow2 *, enum qcow2_class, uint64_t nr,
                              uint64_t *host_offset, uint64_t *got,
                              bool *zeroed);
/* Undo an allocation.  Nothing ever referred to the clusters. */
extern void allocate_undo (struct qcow2 *, uint64_t host_offset, uint64_t nr);
/* With alloc_lock held.  Make a refcount block in a cluster that nothing
 * uses.  Make the refcount table larger, with an entry for block_index, in a
 * place from cluster on, where every cluster with no refcount is free.
 */
extern int allocate_block_at (struct qcow2 *, uint64_t block_index,
                              uint64_t cluster);
extern int allocate_larger_table (struct qcow2 *, uint64_t block_index,
                                  uint64_t cluster);
/* Give back the clusters of an abandoned table, if possible. */
extern void allocate_forget_abandoned (struct qcow2 *);
/* Where the container may be cut, in bytes: the end of the last cluster in
 * use, or of anything else that must not be lost.
 */
extern int allocate_used_end (struct qcow2 *, uint64_t *end);

/* release.c */
extern void release_clusters (struct qcow2 *, uint64_t cluster, uint64_t nr);
/* Call before an L2 entry is replaced.  -1 with EIO if it refers to
 * something that cannot be guest data.
 */
extern int release_check_entry (struct qcow2 *, uint64_t entry);
/* An L2 entry no longer refers to its clusters. */
extern void release_entry (struct qcow2 *, uint64_t entry);
extern void release_flush_begins (struct qcow2 *);
extern void release_flush_ends (struct qcow2 *, bool success);
/* Free the clusters that can be freed now, or (wait) once the requests that
 * might use them are done.  -1, with a warning, if some could not be freed:
 * these are kept.  Under flush_lock.
 */
extern int release_retire (struct qcow2 *, bool wait);
/* Forget the clusters that could not be freed. */
extern void release_forget (struct qcow2 *);
/* Should the caller, outside any section, call qcow2_reclaim? */
extern bool release_wants_reclaim (struct qcow2 *);
extern bool release_is_empty (struct qcow2 *);
extern void release_free (struct qcow2 *);

/* l2-cache.c */
extern int l2_cache_open (struct qcow2 *, uint64_t cache_bytes);
extern void l2_cache_free (struct qcow2 *);
/* Read nr entries from guest cluster on, all of one slice. */
extern int l2_get (struct qcow2 *, uint64_t guest_cluster, unsigned nr,
                   struct l2_entry *entries);
extern void l2_get_numbers (const struct qcow2 *,
                            struct qcow2_cache_numbers *);
/* Set nr entries from guest cluster on, all of one slice, whose L2 table
 * exists.  EAGAIN if the cache has to be flushed first.  ENOSPC, and no
 * entry is set, if the table on disk has no space for them.
 */
extern int l2_set (struct qcow2 *, uint64_t guest_cluster, unsigned nr,
                   const struct l2_entry *entries);
/* For the flush: copy up to max_copies dirty slices, from *next_set on,
 * into data, and pin them.
 */
struct l2_copy {
  uint64_t slice;
  size_t slot;
  uint8_t holes;
};
extern size_t l2_copy_dirty (struct qcow2 *, size_t *next_set,
                             struct l2_copy *copies, uint8_t *data,
                             size_t max_copies);
extern int l2_write_copy (struct qcow2 *, const struct l2_copy *,
                          const uint8_t *data);
/* Unpin the slices.  If !written they are dirty again. */
extern void l2_copies_done (struct qcow2 *, const struct l2_copy *copies,
                            size_t nr, bool written);
extern unsigned l2_slice_bytes (const struct qcow2 *);
/* Zero the slices of an L2 table on disk in which no entry was set, under
 * flush_lock.  The table is new: no flush has written its L1 entry.
 */
extern int l2_zero_again (struct qcow2 *, uint32_t l1_index);

/* mapping.c.  A unit is what has one kind: a cluster or, with extended L2
 * entries, a subcluster.
 */
enum mapping_kind {
  MAPPING_UNALLOCATED,          /* the backing file provides it */
  MAPPING_ZERO,                 /* explicit zeroes, no host cluster */
  MAPPING_ZERO_ALLOCATED,       /* explicit zeroes, host cluster kept */
  MAPPING_DATA,
  MAPPING_COMPRESSED,
  MAPPING_INVALID,              /* an entry that is not well formed */
};

struct mapping {
  enum mapping_kind kind;
  bool copied;                  /* only this image uses the host cluster */
  uint64_t host;                /* of the first byte, if it has a host offset */
  uint64_t length;              /* bytes from the guest offset asked for */
  uint64_t descriptor;          /* of the first cluster */
};
extern int mapping_open (struct qcow2 *);
extern void mapping_free (struct qcow2 *);
/* Does the entry have a host cluster that only this image uses, and whose
 * units it can use?
 */
extern bool mapping_owns_cluster (const struct qcow2 *, uint64_t descriptor);
/* The mapping at guest offset, up to count bytes: one kind, and for data
 * one contiguous host range.
 */
extern int mapping_lookup (struct qcow2 *, uint64_t offset, uint64_t count,
                           struct mapping *);
/* The same, without regard to host offsets. */
extern int mapping_lookup_kind (struct qcow2 *, uint64_t offset,
                                uint64_t count, struct mapping *);
/* Make sure that a guest cluster has an L2 table, and that only the disk
 * uses that table.  Call it before an entry in the table is changed.
 */
extern int mapping_need_l2 (struct qcow2 *, uint64_t guest_cluster);
/* Set the entries of guest clusters that belong to one L2 slice. */
extern int mapping_set (struct qcow2 *, uint64_t guest_cluster, unsigned nr,
                        const struct l2_entry *entries);
/* The number of guest clusters from guest_cluster to the end of its slice. */
extern uint64_t mapping_slice_left (const struct qcow2 *,
                                    uint64_t guest_cluster);
extern void range_lock_take (struct qcow2 *, struct range_lock *,
                             uint64_t first, uint64_t last);
extern void range_lock_drop (struct qcow2 *, struct range_lock *);
/* The dirty L1 entries, added to those that the flush has taken already.
 * The flush writes them, then calls mapping_l1_done.
 */
struct l1_copies {
  uint32_t *indices;
  size_t nr, max;
};
extern int mapping_take_dirty_l1 (struct qcow2 *, struct l1_copies *);
extern int mapping_write_l1 (struct qcow2 *, const struct l1_copies *);
extern void mapping_l1_done (struct qcow2 *, struct l1_copies *,
                             bool written);
/* Zero the new L2 tables once more, where no entry was set. */
extern int mapping_zero_again (struct qcow2 *);

/* reuse.c.  With a range lock held that covers the clusters: */
/* L2 entries were replaced.  The new entries have no data that the old ones
 * did not have.
 */
extern void reuse_entries_changed (struct qcow2 *, unsigned nr,
                                   const struct l2_entry *old,
                                   const struct l2_entry *new);
/* The caller is about to fill the place of a mapping that is not data.  May
 * a request be under way that takes the place for data?  Then the caller
 * must wait for it, outside any section.
 */
extern bool reuse_must_wait (struct qcow2 *, const struct mapping *);
extern void reuse_wait (struct qcow2 *);

/* compressed.c: read a whole compressed cluster into buf. */
extern int compressed_read (struct qcow2 *, uint64_t descriptor, void *buf);
extern void compressed_location (const struct qcow2 *, uint64_t descriptor,
                                 uint64_t *host, uint64_t *bytes);

/* scan.c: for an image that is being opened, with its tables loaded and
 * nothing changed yet.
 */
struct scan_limits {
  uint64_t bytes;               /* of metadata to be read */
  uint64_t clusters;            /* of the container */
  unsigned ms;                  /* 0 for no limit of time */
};

enum scan_result {
  SCAN_DONE, SCAN_TOO_MUCH, SCAN_INCONSISTENT, SCAN_FAILED,
};

struct scan {
  uint32_t *references;         /* by cluster */
  uint64_t nr;                  /* clusters of the container */
  uint64_t end;                 /* the end of the last cluster that is
                                   referred to */
  bool complete;                /* nothing else can refer to a cluster */
  bool crashed;                 /* a bitmap is in use */
  char why[600];                /* why it was not done, or is not complete */

  struct scan_limits limits;
  uint64_t spent, reads, began;
  uint64_t nr_trees, nr_blocks, max_count;
};

/* First scan everything except mappings; then the mappings of the disk and
 * of its snapshots, perhaps with other limits.  Call scan_free whatever they
 * return.
 */
extern enum scan_result scan_begin (struct qcow2 *, struct scan *,
                                    struct scan_limits);
extern enum scan_result scan_finish (struct qcow2 *, struct scan *);
extern void scan_free (struct scan *);
extern uint64_t scan_count (const struct scan *, uint64_t cluster);
/* Does the disk use it as an L2 table or data, so that its entry has the
 * COPIED flag if its refcount is 1?
 */
extern bool scan_wants_copied (const struct scan *, uint64_t cluster);
/* The size of an L2 entry in bytes. */
extern unsigned scan_entry_bytes (const struct qcow2 *);
/* Call differs for each cluster whose refcount on disk is not the counted
 * one, in ascending order.  It returns 0, or -1 with errno to end.
 */
typedef int (*scan_differs) (void *opaque, uint64_t cluster,
                             uint64_t stored, uint64_t counted);
extern enum scan_result scan_compare (struct qcow2 *, struct scan *,
                                      scan_differs, void *opaque);

/* leaks.c: look for leaks before anything is changed, and give them to
 * release.c at the first change.
 */
extern void leaks_find (struct qcow2 *);
extern void leaks_release (struct qcow2 *);
extern void leaks_free (struct qcow2 *);

/* repair.c: if the image is marked dirty, repair it; or, if check_only,
 * check whether that is possible.
 */
extern int repair_dirty (struct qcow2 *, bool check_only);

/* preallocated.c: does the image have far more clusters than storage for
 * them, so that asking the storage which of them are zeroes is worthwhile?
 */
extern bool is_preallocated (struct qcow2 *);

/* layer.c: provides the bytes that the image does not have.  Everything
 * beyond its end is zeroes.
 */
extern int layer_open (struct qcow2 *, const struct qcow2_options *);
extern int layer_read (struct qcow2 *, void *buf, uint64_t count,
                       uint64_t offset);
extern int layer_extent (struct qcow2 *, uint64_t offset, uint64_t limit,
                         uint64_t *length, enum qcow2_extent_type *,
                         unsigned *depth);
/* Do unallocated bytes from offset on certainly read as zeroes?  *length is
 * cut to how far the answer holds.
 */
static inline bool
layer_is_zero (const struct qcow2 *q, uint64_t offset, uint64_t *length)
{
  if (offset >= q->backing_size)
    return true;
  *length = min_u64 (*length, q->backing_size - offset);
  return false;
}

/* read.c: guest data, inside a section of q->requests.  Bytes beyond the end
 * of the disk read as zeroes.
 */
extern int read_range (struct qcow2 *, void *buf, uint64_t count,
                       uint64_t offset);

/* write.c.  Check a host range that is about to be changed in place. */
extern int write_check_host (struct qcow2 *, uint64_t host, uint64_t count);
/* Does a run of a kind read as zeroes, from offset on?  *length is cut to
 * how far the answer holds.
 */
extern bool reads_as_zeroes (const struct qcow2 *, enum mapping_kind,
                             uint64_t offset, uint64_t *length);
/* Call after a request failed.  Frees what can be freed and returns true if
 * the request can be tried once more; else reports why it failed.
 */
extern bool write_may_retry (struct qcow2 *, const struct report_hold *,
                             bool *retried);

/* snapshots.c */
/* Serve a snapshot's L1 table and disk size.  Call before mapping_open.
 * ENOENT if no snapshot has that ID or name.
 */
extern int snapshots_select (struct qcow2 *, const char *id_or_name);
/* Call before anything is written, and after mapping_open: makes sure that
 * nothing of the snapshots can be written or freed.
 */
extern int snapshots_register (struct qcow2 *);
/* Read the entry of snapshot i at *offset, which says where its L1 table is,
 * and move *offset on to the next entry.
 */
extern int snapshots_next (struct qcow2 *, uint32_t i, uint64_t *offset,
                           uint64_t *l1_offset, uint32_t *l1_entries);

/* flush.c */
extern int flush_metadata (struct qcow2 *);
/* Flush, and wait until released clusters are free.  Outside sections, with
 * no range lock held.
 */
extern int qcow2_reclaim (struct qcow2 *);
/* The same, but a failure is not reported as an error: the caller that needs
 * the space reports it.
 */
extern int reclaim_quietly (struct qcow2 *);

/* flush.c */
extern bool is_time_up (const struct qcow2 *);

/* Call in each loop of a request that may be long: -1 with errno if the
 * request must end here.
 */
static inline int
request_goes_on (const struct qcow2 *q)
{
  if (!atomic_load_explicit (&q->hurried, memory_order_acquire) ||
      !is_time_up (q))
    return 0;
  errno = ESHUTDOWN;
  return -1;
}

/* How many bytes of the guest's disk a request processes between two such
 * calls: with data to move, and without.  The first is no less than the
 * largest cluster.
 */
#define DATA_PIECE (UINT64_C (2) << 20)
#define ZERO_PIECE (UINT64_C (32) << 20)

/* The bytes from offset to the next multiple of piece, or count if that is
 * less.
 */
static inline uint64_t
piece_of (uint64_t count, uint64_t offset, uint64_t piece)
{
  return min_u64 (count, piece - (offset & (piece - 1)));
}

static inline uint64_t
guest_cluster_of (const struct qcow2 *q, uint64_t offset)
{
  return offset >> q->cluster_bits;
}

#endif /* DIRTY_BITMAP_QCOW2_INTERNAL_H */
