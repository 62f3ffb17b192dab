/* nbdkit-dirty-bitmap-filter
 * SPDX-License-Identifier: BSD-3-Clause
 * Copyright the nbdkit-dirty-bitmap-filter authors
 */

#ifndef DIRTY_BITMAP_QCOW2_H
#define DIRTY_BITMAP_QCOW2_H

/* The qcow2 format over a container (docs/interop/qcow2.rst in QEMU).
 *
 * "Guest offset" is a byte of the disk that the image holds, "host
 * offset" a byte of the container.  Functions return 0, or -1 with errno
 * set and the reason reported, unless said otherwise.  All of them may
 * be called from any thread at any time once qcow2_open has returned,
 * with no lock held.
 */

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

struct container;
struct qcow2;

/* What an image refers to by name, in its header.  Strings are owned by
 * the struct; NULL if absent.
 */
struct qcow2_references {
  char *backing_name;
  char *backing_format;         /* "raw", "qcow2", or whatever it says */
  bool has_data_file;           /* guest data are in another file, */
  bool data_file_raw;           /* as they would be in a raw image */
  char *data_file_name;         /* may be absent all the same */
};

/* Read only these, checking no more than that takes.  The names are
 * NUL-terminated and contain no other NUL.
 */
extern int qcow2_read_references (struct container *,
                                  struct qcow2_references *);
extern void qcow2_free_references (struct qcow2_references *);

/* What provides the bytes that an image does not have itself: another
 * image, opened read-only, or raw bytes; none if both are NULL.  Beyond
 * its end it reads as zeroes.
 */
struct qcow2_layer {
  struct qcow2 *image;
  struct container *raw;
};

struct qcow2_options {
  bool readonly;
  bool check_only;              /* see whether it could be opened: an image
                                   that has to be repaired is not */
  uint64_t cache_size;          /* bytes for L2 and refcount tables */

  /* The backing file and the external data file, opened by the caller
   * where the header refers to them, and closed by him after qcow2_close.
   */
  struct qcow2_layer backing;
  struct container *data_file;

  /* Serve this internal snapshot (an ID, or else a name), read-only;
   * NULL for the disk as it is.
   */
  const char *snapshot;
};

/* Open an image: check every field of the header, and load the L1 and
 * refcount tables.  Nothing is written, unless the image is marked dirty
 * and opened for writing: then its refcounts are repaired, or it is
 * refused.  The container stays the caller's.
 */
extern struct qcow2 *qcow2_open (struct container *,
                                 const struct qcow2_options *);
extern void qcow2_close (struct qcow2 *);

/* The guest's disk in bytes: the header's size rounded down to 512, as
 * QEMU has it.
 */
extern uint64_t qcow2_size (const struct qcow2 *);
extern uint32_t qcow2_cluster_size (const struct qcow2 *);
extern unsigned qcow2_version (const struct qcow2 *);
extern bool qcow2_is_readonly (const struct qcow2 *);
extern struct container *qcow2_container (const struct qcow2 *);

/* Of an image that was opened read-only: how much memory its tables
 * take besides the cache.
 */
extern uint64_t qcow2_tables_bytes (const struct qcow2 *);

/* What has been going on since the image was opened.  Times, in
 * nanoseconds, and lookups are counted only while meter_is_on.
 */
struct qcow2_cache_numbers {
  uint64_t hits, misses, evictions, bytes;
};

struct qcow2_numbers {
  struct qcow2_cache_numbers l2, refcounts; /* slices of tables, in RAM */
  uint64_t allocated, freed;    /* clusters */
  uint64_t flushes[2], flush_ns[2]; /* that have failed, succeeded */
  uint64_t barriers[2];         /* the same */
  uint64_t barrier_ns;          /* of those that have succeeded */
};
extern void qcow2_get_numbers (const struct qcow2 *, struct qcow2_numbers *);

/* Guest data.  Ranges lie inside qcow2_size.  A change that fails may be
 * made in part.
 */
extern int qcow2_read (struct qcow2 *, void *buf, uint64_t count,
                       uint64_t offset);
extern int qcow2_write (struct qcow2 *, const void *buf, uint64_t count,
                        uint64_t offset);

/* A piece of a read: what lies at an offset, data or a hole.  A hole is a
 * run that the tables say reads as zeroes, and that is at least min_hole
 * long or all that is asked for.  Zeroes in shorter runs are data.  What
 * lies in a raw backing file is data, too, since the tables say nothing
 * of it.
 */
struct qcow2_chunk {
  void *buf;                    /* for data; NULL: see whether it is a hole */
  uint64_t count;               /* its size in bytes, at least 1 */
  uint64_t limit;               /* how far a hole may reach, at least count */
  uint64_t min_hole;

  /* What is found. */
  uint64_t length;              /* of a hole up to limit, of data up to
                                   count; 0 for data without a buffer */
  bool is_hole;
};

/* Read the piece at offset.  Nothing is read from the container for a hole,
 * and buf is left alone.  Data end where a hole begins.  Each run is looked
 * up once: it was what is told at a moment of the call.
 */
extern int qcow2_read_chunk (struct qcow2 *, uint64_t offset,
                             struct qcow2_chunk *);

enum {
  QCOW2_ZERO_KEEP = 1,          /* leave (or make) the clusters allocated */
  QCOW2_ZERO_FAST = 2,          /* ENOTSUP rather than write zeroes */
};
extern int qcow2_zero (struct qcow2 *, uint64_t count, uint64_t offset,
                       unsigned flags);

/* Discard: whole clusters become unallocated, parts of clusters are
 * left alone.
 */
extern int qcow2_trim (struct qcow2 *, uint64_t count, uint64_t offset);
extern int qcow2_cache (struct qcow2 *, uint64_t count, uint64_t offset);

enum qcow2_extent_type {
  QCOW2_EXTENT_DATA,
  QCOW2_EXTENT_ZERO,            /* explicit zero clusters, or such as have
                                   never been written since the image was
                                   preallocated */
  QCOW2_EXTENT_UNALLOCATED,
};

/* The run at guest offset, clipped to limit: its type, and the depth in
 * the chain of the image that provides it, 1 for this one, 2 for its
 * backing file and so on, 0 if none does.  A backing file that is too
 * short provides the zeroes beyond its end.  The run may end before its
 * type or depth changes.  The type may be NULL: then the storage is not
 * asked.
 */
extern int qcow2_extent (struct qcow2 *, uint64_t offset, uint64_t limit,
                         uint64_t *length, enum qcow2_extent_type *,
                         unsigned *depth);

/* From so long from now on requests that take long, here or in a backing
 * image, end early, between two of their pieces: with ESHUTDOWN, and
 * nothing reported.  Flushing and stopping go on as ever.
 */
extern void qcow2_hurry (struct qcow2 *, unsigned grace_ms);

/* Flushing, in the order of writes of the design.
 *
 * Others who keep things in the image (the bitmaps) take part by hooks,
 * called in this order, one flush at a time:
 *
 *   data        write what may be on disk before the references are:
 *               new clusters, and contents safe to overwrite.  Returns 1
 *               if it left something for the next flush, for want of
 *               space, else 0
 *   - refcount blocks are written; barrier -
 *   references  write what refers to them.  Returns 1 if it wrote
 *               anything, 0 if not
 *   - L2 and L1 entries are written; barrier if anything was -
 *   settle      the references are durable.  It may write what may only
 *               be on disk after them, and then returns 1
 *   - barrier if settle returned 1 -
 *   done        all of it is durable
 *   failed      called instead of all that would have followed, after
 *               any hook or write or barrier failed
 *
 * Where one of the first three fails the flush goes on without hooks, and
 * says nothing of that: they know what they could not do.
 *
 * Hooks may call qcow2_alloc, qcow2_release, qcow2_read_metadata and
 * qcow2_write_metadata, but not flush.  hooks may be NULL.
 *
 * A flush that began after this one was called, and succeeded, counts.
 * After hooks that lacked space, and if what was released up to now may
 * help, there is another flush.
 */
struct qcow2_flush_hooks {
  int (*data) (void *opaque);
  int (*references) (void *opaque);
  int (*settle) (void *opaque);
  void (*done) (void *opaque);
  void (*failed) (void *opaque);
  void *opaque;
};
extern int qcow2_flush (struct qcow2 *, const struct qcow2_flush_hooks *);

/* Flush, and bring freed clusters home, so that if nothing is written
 * after it qcow2_stop has nothing to write either.
 */
extern int qcow2_settle (struct qcow2 *, const struct qcow2_flush_hooks *);

/* A clean stop: flush, bring freed clusters home so that nothing is
 * leaked, and cut the container to what is used.  No request is under
 * way.  Where nothing was ever written this writes nothing.  Hooks that
 * fail are no failure of it.
 */
extern int qcow2_stop (struct qcow2 *, const struct qcow2_flush_hooks *);

/* Metadata that others keep in the image.
 *
 * Every cluster of metadata is registered with its class, and no write
 * may touch a cluster registered with another class: such a write fails
 * with EIO and sets the image's corrupt bit, after which the image
 * takes no writes.
 */
enum qcow2_class {
  QCOW2_DATA = 0,               /* not metadata */
  QCOW2_HEADER,
  QCOW2_REFCOUNT_TABLE,
  QCOW2_REFCOUNT_BLOCK,
  QCOW2_L1_TABLE,
  QCOW2_L2_TABLE,
  QCOW2_BITMAP_DIRECTORY,
  QCOW2_BITMAP_TABLE,
  QCOW2_BITMAP_DATA,
  QCOW2_SNAPSHOT_TABLE,
};

/* Register the clusters of [offset, offset + bytes), found in an image
 * that is being opened.  -1 with errno EEXIST, and nothing reported or
 * registered, if one of them has a class already; EINVAL if offset is
 * not cluster aligned, or is 0, or the first byte of the last cluster
 * lies beyond the end of the container.
 */
extern int qcow2_register (struct qcow2 *, enum qcow2_class,
                           uint64_t offset, uint64_t bytes);

/* Forget the classes of [offset, offset + bytes), after a failure to
 * load what they were registered for.
 */
extern void qcow2_unregister (struct qcow2 *, uint64_t offset,
                              uint64_t bytes);

/* Forget all that is registered as bitmaps, of an image that is open
 * read-only, so that they can be loaded anew.
 */
extern void qcow2_unregister_bitmaps (struct qcow2 *);

/* Allocate contiguous clusters, registered with the class, refcount 1.
 * Their bytes are whatever they were; *zeroed (if not NULL) says whether
 * that is known to be zeroes.
 *
 * This, qcow2_release, qcow2_write_metadata and qcow2_barrier never wait
 * for a flush, so they can be called with a lock held that the hooks of
 * a flush take.
 */
extern int qcow2_alloc (struct qcow2 *, enum qcow2_class,
                        uint64_t nr_clusters, uint64_t *host_offset,
                        bool *zeroed);

/* Give clusters back, and unregister them.  Their refcounts drop, and
 * they can be used anew, only after references that were changed up to
 * now have been made durable by a flush.
 */
extern void qcow2_release (struct qcow2 *, uint64_t host_offset,
                           uint64_t nr_clusters);

/* Bytes beyond the end of the container read as zeroes. */
extern int qcow2_read_metadata (struct qcow2 *, void *buf, size_t count,
                                uint64_t host_offset);
extern int qcow2_write_metadata (struct qcow2 *, enum qcow2_class,
                                 const void *buf, size_t count,
                                 uint64_t host_offset);

/* What the two that allocate and write do first, for a caller that writes in
 * another way (holes.h): see to it that the image may be changed.
 */
extern int qcow2_begin_writing (struct qcow2 *);

/* A barrier of the container, for those who must order writes of their
 * own outside a flush.
 */
extern int qcow2_barrier (struct qcow2 *);

/* A barrier that fails, whoever asked for it, may lose for ever what was
 * written before it: the next says nothing about that.  So whoever writes
 * and then orders compares: qcow2_lost, the writes, and a barrier that
 * fails if another has failed since.
 */
extern unsigned long qcow2_lost (const struct qcow2 *);
extern int qcow2_barrier_since (struct qcow2 *, unsigned long lost);

/* The bitmaps extension of the header. */
struct qcow2_bitmaps_extension {
  unsigned count;               /* how often it stands in the header */
  uint32_t length;              /* of its data, as the header says */
  uint32_t nr_bitmaps;          /* the fields, if length is 24 */
  uint32_t reserved;
  uint64_t directory_size_bytes;
  uint64_t directory_offset;
  bool autoclear;               /* the autoclear bit that says it is valid */
};
extern void qcow2_get_bitmaps_extension (struct qcow2 *,
                                         struct qcow2_bitmaps_extension *);

/* Can the header be pointed at a directory?  Says so, or why not: ENOTSUP
 * in a version 2 image, ENOSPC if the header has no room, EINVAL if the
 * extension that it has is damaged.
 */
extern int qcow2_check_bitmaps_extension (struct qcow2 *);

/* Point the header at a directory whose clusters and tables are durable
 * already, and set the autoclear bit: all of it or nothing is on disk
 * after a crash, or the autoclear bit is clear.  Durable on return.
 * Errors as above.
 */
extern int qcow2_set_bitmaps_extension (struct qcow2 *, uint32_t nr_bitmaps,
                                        uint64_t directory_size_bytes,
                                        uint64_t directory_offset);

/* The bitmaps in the image may not reflect what is written from now on:
 * clear the autoclear bit, durably, before the first change (a write,
 * or an allocation) reaches the container.
 */
extern void qcow2_distrust_bitmaps (struct qcow2 *);

#endif /* DIRTY_BITMAP_QCOW2_H */
