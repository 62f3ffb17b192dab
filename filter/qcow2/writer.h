/* nbdkit-dirty-bitmap-filter
 * SPDX-License-Identifier: BSD-3-Clause
 * Copyright the nbdkit-dirty-bitmap-filter authors
 */

#ifndef DIRTY_BITMAP_QCOW2_WRITER_H
#define DIRTY_BITMAP_QCOW2_WRITER_H

/* Writing an image once, from nothing: version 3, refcounts of 16 bits.
 *
 * The tables are kept in RAM, 8 bytes a cluster with data, and written at the
 * end.  Until qcow2_writer_finish has returned 0 the container has no image.
 *
 * Functions return 0, or -1 with errno set and the reason reported.
 * qcow2_writer_data and qcow2_writer_zero may be called from any thread at
 * any time, for ranges that do not overlap and that begin and end with a
 * cluster or with the disk; each cluster at most once.
 */

#include <stdbool.h>
#include <stdint.h>

struct container;
struct qcow2_writer;

struct qcow2_writer_options {
  uint64_t size;                /* of the disk, bytes; rounded up to 512 */
  unsigned cluster_bits;        /* 9 to 21 */

  /* The backing file's name and format as the header has them; or NULL. */
  const char *backing_name, *backing_format;

  bool compress;                /* clusters, by zstd, where that saves any */

  /* If not NULL: told each byte of the file once, in the order of the file
   * from WRITER_HEAD_BYTES on, and then those before, which are known last.
   * One call at a time, of any thread, and all within qcow2_writer_finish at
   * the latest.  Clusters must not be smaller than that.
   */
  void (*tell) (void *opaque, const void *buf, uint64_t count);
  void *opaque;
};

/* The header, with its extensions and the name of the backing file, is in
 * these, where clusters are large enough.
 */
#define WRITER_HEAD_BYTES 4096

/* The container is empty, can grow, and stays the caller's.  NULL on error:
 * EFBIG if the disk is too large for the size of the clusters.
 */
extern struct qcow2_writer *
qcow2_writer_new (struct container *, const struct qcow2_writer_options *);

extern int qcow2_writer_data (struct qcow2_writer *, const void *buf,
                              uint64_t count, uint64_t offset);

/* The range reads as zeroes, whatever the backing file has. */
extern int qcow2_writer_zero (struct qcow2_writer *, uint64_t count,
                              uint64_t offset);

/* Write the tables, and last the header.  All is durable on return. */
extern int qcow2_writer_finish (struct qcow2_writer *);

extern void qcow2_writer_free (struct qcow2_writer *);

#endif /* DIRTY_BITMAP_QCOW2_WRITER_H */
