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

/* The files that an image's header names.  Strings are owned by the struct;
 * NULL if absent.
 */
struct qcow2_references {
  char *backing_name;
  char *backing_format;         /* "raw", "qcow2", or any other text */
  bool has_data_file;           /* guest data are in another file, */
  bool data_file_raw;           /* as they would be in a raw image */
  char *data_file_name;         /* may be absent even so */
};

/* Read only the references, and check no more than that requires.  The names
 * are NUL-terminated and contain no other NUL.
 */
extern int qcow2_read_references (struct container *,
                                  struct qcow2_references *);
extern void qcow2_free_references (struct qcow2_references *);

/* The layer below an image provides the bytes that the image does not have:
 * another image, opened read-only, or raw bytes; none if both are NULL.
 * Beyond its end it reads as zeroes.
 */
struct qcow2_layer {
  struct qcow2 *image;
  struct container *raw;
};

struct qcow2_options {
  bool readonly;
  bool check_only;              /* see whether the image could be opened; do
                                   not repair it */
  uint64_t cache_size;          /* bytes for L2 and refcount tables */

  /* The backing file and the external data file.  The caller opens them
   * where the header refers to them, and closes them after qcow2_close.
   */
  struct qcow2_layer backing;
  struct container *data_file;
  bool is_top_alone;            /* read what the image does not have as zeroes,
                                   though it has a backing file */

  /* Serve this internal snapshot (an ID, or else a name), read-only; NULL
   * for the current disk.
   */
  const char *snapshot;
};

/* Make an image in an empty container, for a disk of size bytes (rounded up to
 * 512) that reads as zeroes: version 3, clusters of 64 KiB, and durable on
 * return.  EFBIG if the disk is too large.
 */
extern int qcow2_create (struct container *, uint64_t size);

/* Open an image: check every field of the header, and load the L1 and
 * refcount tables.  Nothing is written, unless the image is marked dirty and
 * opened for writing: then its refcounts are repaired, or the image is
 * refused.  The container stays the caller's.
 */
extern struct qcow2 *qcow2_open (struct container *,
                                 const struct qcow2_options *);
extern void qcow2_close (struct qcow2 *);

/* The guest's disk in bytes: the header's size rounded down to 512, as in
 * QEMU.
 */
extern uint64_t qcow2_size (const struct qcow2 *);
extern uint32_t qcow2_cluster_size (const struct qcow2 *);
extern unsigned qcow2_version (const struct qcow2 *);
extern bool qcow2_is_readonly (const struct qcow2 *);
extern struct container *qcow2_container (const struct qcow2 *);

/* What is to be said of the image. */
struct qcow2_description {
  unsigned version;             /* 2 or 3 */
  unsigned refcount_bits;
  const char *compression_type; /* "zlib" or "zstd" */
  bool lazy_refcounts, corrupt, extended_l2;
  bool has_data_file, data_file_raw;
  unsigned nr_backing;          /* backing files, of the whole chain */
};
extern void qcow2_describe (const struct qcow2 *, struct qcow2_description *);

/* For an image that was opened read-only: the memory that its tables take
 * besides the cache.
 */
extern uint64_t qcow2_tables_bytes (const struct qcow2 *);

/* Counters since the image was opened.  Times, in nanoseconds, and lookups
 * are counted only while meter_is_on.
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

/* Guest data.  Ranges lie inside qcow2_size, which is asserted.  A failed
 * change may have been made in part.
 */
extern int qcow2_read (struct qcow2 *, void *buf, uint64_t count,
                       uint64_t offset);
extern int qcow2_write (struct qcow2 *, const void *buf, uint64_t count,
                        uint64_t offset);

/* A piece of a read: the data or the hole at an offset.  A hole is a run
 * that the tables say reads as zeroes, and that has at least min_hole bytes
 * or reaches limit.  Zeroes in shorter runs are data.  Bytes in a raw
 * backing file are data, too, since the tables say nothing about them.
 */
struct qcow2_chunk {
  void *buf;                    /* for data; or NULL, only to see whether it
                                   is a hole */
  uint64_t count;               /* the size of buf in bytes, at least 1 */
  uint64_t limit;               /* how far a hole may reach, at least count */
  uint64_t min_hole;

  /* The result. */
  uint64_t length;              /* of a hole up to limit, of data up to
                                   count; 0 for data without a buffer */
  bool is_hole;
};

/* Read the piece at offset.  For a hole, nothing is read from the container
 * and buf is not touched.  Data end where a hole begins.  Each run is looked
 * up once: the result was true at some moment during the call.
 */
extern int qcow2_read_chunk (struct qcow2 *, uint64_t offset,
                             struct qcow2_chunk *);

enum {
  QCOW2_ZERO_KEEP = 1,          /* leave (or make) the clusters allocated */
  QCOW2_ZERO_FAST = 2,          /* ENOTSUP rather than write zeroes */
};
extern int qcow2_zero (struct qcow2 *, uint64_t count, uint64_t offset,
                       unsigned flags);

/* Would qcow2_zero do that without writing zeroes?  0, or -1, with ENOTSUP if
 * not.  This only looks: what other requests do at the same time may change
 * the answer.
 */
extern int qcow2_zero_is_fast (struct qcow2 *, uint64_t count,
                               uint64_t offset, unsigned flags);

/* Discard: whole clusters become unallocated, parts of clusters are
 * left alone.
 */
extern int qcow2_trim (struct qcow2 *, uint64_t count, uint64_t offset);
extern int qcow2_cache (struct qcow2 *, uint64_t count, uint64_t offset);

enum qcow2_extent_type {
  QCOW2_EXTENT_DATA,
  QCOW2_EXTENT_ZERO,            /* explicit zero clusters, or clusters that
                                   were never written since the image was
                                   preallocated */
  QCOW2_EXTENT_UNALLOCATED,
};

/* The run at guest offset, clipped to limit: its type, and the depth in the
 * chain of the image that provides it, 1 for this one, 2 for its backing
 * file and so on, 0 if none does.  A backing file that is too short provides
 * the zeroes beyond its end.  The run may end before its type or depth
 * changes.  The type may be NULL: then the storage is not queried.
 */
extern int qcow2_extent (struct qcow2 *, uint64_t offset, uint64_t limit,
                         uint64_t *length, enum qcow2_extent_type *,
                         unsigned *depth);

/* In grace_ms milliseconds, begin to end long requests early, here and in
 * backing images, between two of their pieces: with ESHUTDOWN, and nothing
 * reported.  Flushing and stopping are not affected.
 */
extern void qcow2_hurry (struct qcow2 *, unsigned grace_ms);

/* May a long request still go on?  -1 with errno ESHUTDOWN if not. */
extern int qcow2_goes_on (const struct qcow2 *);

/* Flush the image alone, without the bitmaps that bitmap/ keeps in it;
 * disk/flush.c flushes both.  If another flush began after this one was
 * called, and succeeded, this one succeeds, too.
 */
extern int qcow2_flush (struct qcow2 *);

/* A clean stop of the image alone: flush, free the released clusters so that
 * nothing is leaked, and cut the container to the used part.  No request is
 * under way.  If nothing was ever written, this writes nothing.
 */
extern int qcow2_stop (struct qcow2 *);

/* Metadata that other rooms keep in the image.
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

/* Register the clusters of [offset, offset + bytes), found in an image that
 * is being opened.  -1 with errno EEXIST, and nothing reported or
 * registered, if one of them has a class already; EINVAL if offset is not
 * cluster aligned, or is 0, or the first byte of the last cluster lies
 * beyond the end of the container.
 */
extern int qcow2_register (struct qcow2 *, enum qcow2_class,
                           uint64_t offset, uint64_t bytes);

/* Forget the classes of [offset, offset + bytes), after a failure to
 * load what they were registered for.
 */
extern void qcow2_unregister (struct qcow2 *, uint64_t offset,
                              uint64_t bytes);

/* Forget everything that is registered as bitmaps, so that they can be
 * loaded again.  The image is open read-only.
 */
extern void qcow2_unregister_bitmaps (struct qcow2 *);

/* Allocate contiguous clusters, registered with the class, refcount 1.
 * Their bytes are not changed; *zeroed (if not NULL) says whether they are
 * known to be zeroes.
 *
 * This, qcow2_release, qcow2_write_metadata and qcow2_barrier never wait
 * for a flush, so they can be called with a lock held that the bitmaps'
 * steps of a flush take.
 */
extern int qcow2_alloc (struct qcow2 *, enum qcow2_class,
                        uint64_t nr_clusters, uint64_t *host_offset,
                        bool *zeroed);

/* Give clusters back, and unregister them.  Their refcounts drop, and they
 * can be reused, only after a flush has made durable all references that
 * were changed up to now.
 */
extern void qcow2_release (struct qcow2 *, uint64_t host_offset,
                           uint64_t nr_clusters);

/* Bytes beyond the end of the container read as zeroes. */
extern int qcow2_read_metadata (struct qcow2 *, void *buf, size_t count,
                                uint64_t host_offset);
extern int qcow2_write_metadata (struct qcow2 *, enum qcow2_class,
                                 const void *buf, size_t count,
                                 uint64_t host_offset);

/* The same, and it is durable on return; or 1 if it needs a barrier
 * (container_pwrite_durable).
 */
extern int qcow2_write_metadata_durable (struct qcow2 *, enum qcow2_class,
                                         const void *buf, size_t count,
                                         uint64_t host_offset);

/* Make sure that the image may be changed.  qcow2_alloc and
 * qcow2_write_metadata do this first; a caller that writes in another way
 * (holes.h) must call it.
 */
extern int qcow2_begin_writing (struct qcow2 *);

/* A barrier of the container, for callers that must order their own writes
 * outside a flush.
 */
extern int qcow2_barrier (struct qcow2 *);

/* A barrier that fails, for whichever caller, may lose for ever what was
 * written before it, and the next barrier does not report that.  So a caller
 * that orders writes must: n = qcow2_lost (); write;
 * qcow2_barrier_since (n).  The last fails if another barrier has failed
 * since n was read.
 */
extern unsigned long qcow2_lost (const struct qcow2 *);
extern int qcow2_barrier_since (struct qcow2 *, unsigned long lost);

/* The bitmaps extension of the header. */
struct qcow2_bitmaps_extension {
  unsigned count;               /* how many the header has */
  uint32_t length;              /* of its data, as the header says */
  uint32_t nr_bitmaps;          /* the fields, if length is 24 */
  uint32_t reserved;
  uint64_t directory_size_bytes;
  uint64_t directory_offset;
  bool autoclear;               /* the autoclear bit that says it is valid */
};
extern void qcow2_get_bitmaps_extension (struct qcow2 *,
                                         struct qcow2_bitmaps_extension *);

/* Can the header be pointed at a directory?  0 if so.  If not, reports why:
 * ENOTSUP in a version 2 image, ENOSPC if the header has no room, EINVAL if
 * the extension that it has is damaged.
 */
extern int qcow2_check_bitmaps_extension (struct qcow2 *);

/* Point the header at a directory whose clusters and tables are durable
 * already, and set the autoclear bit.  After a crash either all of this is
 * on disk, or none of it, or the autoclear bit is clear.  Durable on return.
 * Errors as above.
 */
extern int qcow2_set_bitmaps_extension (struct qcow2 *, uint32_t nr_bitmaps,
                                        uint64_t directory_size_bytes,
                                        uint64_t directory_offset);

/* Take the extension out of the header, durably: the image has no bitmaps.
 * After a crash the autoclear bit may be clear, and the extension still there.
 */
extern int qcow2_remove_bitmaps_extension (struct qcow2 *);

/* After one of the two has failed: make the header durably say again what it
 * said before.  If this fails, it can be tried again.
 */
extern int
qcow2_restore_bitmaps_extension (struct qcow2 *,
                                 const struct qcow2_bitmaps_extension *);

/* From now on the bitmaps in the image may not reflect what is written:
 * clear the autoclear bit, durably, before the first change (a write, or an
 * allocation) reaches the container.
 */
extern void qcow2_distrust_bitmaps (struct qcow2 *);

#endif /* DIRTY_BITMAP_QCOW2_H */
