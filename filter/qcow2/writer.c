/* nbdkit-dirty-bitmap-filter
 * SPDX-License-Identifier: BSD-3-Clause
 * Copyright the nbdkit-dirty-bitmap-filter authors
 */

/* How this works
 *
 * The first cluster is the header's.  Data follow in the order in which they
 * come, then the L2 tables, the L1 table, the refcount blocks and the
 * refcount table.  All of that is durable before the header is written, so
 * what a crash leaves is either no image or a whole one.
 *
 * Compressed clusters follow each other byte by byte.  They are kept in RAM
 * until there is a run of them, which then gets its place.  Several of them
 * may share a host cluster, which is why refcounts are counted, and not all 1.
 *
 * So what comes is put at the end of the file, always, and can be told in the
 * order of the file (a checksum needs that) though threads write it in any
 * order.
 */

#include <config.h>

#include <assert.h>
#include <errno.h>
#include <inttypes.h>
#include <pthread.h>
#include <stdlib.h>
#include <string.h>
#include <zstd.h>

#include "common/bytes.h"
#include "common/cleanup.h"
#include "common/lock.h"
#include "common/report.h"
#include "common/vector.h"
#include "container/container.h"
#include "qcow2/entry.h"
#include "qcow2/header-format.h"
#include "qcow2/qcow2.h"
#include "qcow2/writer.h"

#define REFCOUNT_ORDER 4
#define SECTOR 512

/* How much of compressed clusters is written at once. */
#define RUN_CLUSTERS 16

/* Compressed clusters that have no place in the file yet. */
struct run {
  uint8_t *buf;                 /* RUN_CLUSTERS, or NULL */
  uint64_t used;                /* bytes of it */
  struct packed {
    uint64_t cluster;           /* of the guest */
    uint32_t begin, count;      /* bytes in the buffer */
  } *packed;
  size_t nr_packed, max_packed;
};

struct qcow2_writer {
  struct container *container;
  struct qcow2_writer_options o;
  uint64_t size, cluster_size;
  uint64_t l2_entries;          /* of a table */
  uint64_t l1_entries;
  uint64_t **l2;                /* tables in RAM, in host byte order; NULL:
                                   all of it is unallocated */

  /* Protects the rest, and the array above, until the end. */
  pthread_mutex_t lock;
  uint64_t end;                 /* of the host clusters in use, bytes */
  uint64_t told;                /* up to which byte the file was told */
  struct run run;
  uint16_t *refcounts;          /* of host clusters */
  uint64_t nr_refcounts;        /* that there is room for */
};

struct qcow2_writer *
qcow2_writer_new (struct container *c, const struct qcow2_writer_options *o)
{
  struct qcow2_writer *w = calloc (1, sizeof *w);

  assert (o->cluster_bits >= 9 && o->cluster_bits <= 21);
  assert (o->tell == NULL || 1 << o->cluster_bits >= WRITER_HEAD_BYTES);
  if (w == NULL) {
    report_error ("calloc: %m");
    return NULL;
  }
  w->container = c;
  w->o = *o;
  w->cluster_size = UINT64_C (1) << o->cluster_bits;
  w->l2_entries = w->cluster_size / 8;
  w->end = w->cluster_size;
  w->told = WRITER_HEAD_BYTES;
  pthread_mutex_init (&w->lock, NULL);
  if (o->size <= INT64_MAX - SECTOR) {
    w->size = round_up (o->size, SECTOR);
    w->l1_entries = div_round_up (w->size, w->l2_entries * w->cluster_size);
  }
  if (o->size > INT64_MAX - SECTOR || w->l1_entries * 8 > MAX_L1_BYTES) {
    report_error ("a disk of %" PRIu64 " bytes is too large for an image with "
                  "clusters of %" PRIu64 " bytes", o->size, w->cluster_size);
    qcow2_writer_free (w);
    errno = EFBIG;
    return NULL;
  }
  w->l2 = calloc (w->l1_entries + 1, sizeof *w->l2);
  if (w->l2 == NULL) {
    report_error ("calloc: %m");
    qcow2_writer_free (w);
    return NULL;
  }
  return w;
}

static void
free_run (struct run *r)
{
  free (r->buf);
  free (r->packed);
}

void
qcow2_writer_free (struct qcow2_writer *w)
{
  if (w == NULL)
    return;
  for (uint64_t i = 0; w->l2 != NULL && i < w->l1_entries; ++i)
    free (w->l2[i]);
  free (w->l2);
  free (w->refcounts);
  free_run (&w->run);
  pthread_mutex_destroy (&w->lock);
  free (w);
}

/* Count what refers to the host clusters of a range.  The lock is held, or
 * this is the end, and no other thread uses the writer.
 */
static int
count_references (struct qcow2_writer *w, uint64_t host, uint64_t bytes)
{
  const uint64_t first = host >> w->o.cluster_bits;
  const uint64_t end = div_round_up (host + bytes, w->cluster_size);

  if (end > w->nr_refcounts) {
    const uint64_t nr = max_u64 (end, w->nr_refcounts * 2 + 1024);
    uint16_t *larger = reallocarray (w->refcounts, nr, sizeof *larger);

    if (larger == NULL) {
      report_error ("realloc: %m");
      return -1;
    }
    memset (larger + w->nr_refcounts, 0,
            (nr - w->nr_refcounts) * sizeof *larger);
    w->refcounts = larger;
    w->nr_refcounts = nr;
  }
  for (uint64_t i = first; i < end; ++i)
    w->refcounts[i]++;
  return 0;
}

/* New host clusters.  The lock is held, or this is the end. */
static int
allocate (struct qcow2_writer *w, uint64_t bytes, uint64_t *host)
{
  bytes = round_up (bytes, w->cluster_size);
  *host = w->end;
  if (count_references (w, *host, bytes) == -1)
    return -1;
  w->end += bytes;
  return 0;
}

/* Tell the next bytes of the file, and the zeroes before them: what was
 * allocated and is not written.  The lock is held, or this is the end.
 */
static void
tell (struct qcow2_writer *w, const void *buf, uint64_t count, uint64_t host)
{
  static const uint8_t zeroes[4096];

  if (w->o.tell == NULL)
    return;
  assert (host >= w->told);
  while (w->told < host) {
    const uint64_t n = min_u64 (host - w->told, sizeof zeroes);

    w->o.tell (w->o.opaque, zeroes, n);
    w->told += n;
  }
  w->o.tell (w->o.opaque, buf, count);
  w->told += count;
}

/* With the lock held: the L2 entry of a guest cluster. */
static uint64_t *
find_entry (struct qcow2_writer *w, uint64_t cluster)
{
  uint64_t **table = &w->l2[cluster / w->l2_entries];

  assert (lock_is_mine (&w->lock));
  if (*table == NULL)
    *table = calloc (w->l2_entries, sizeof **table);
  if (*table == NULL) {
    report_error ("calloc: %m");
    return NULL;
  }
  return *table + cluster % w->l2_entries;
}

/* With the lock held. */
static int
set_entries (struct qcow2_writer *w, uint64_t offset, uint64_t bytes,
             uint64_t entry, uint64_t step)
{
  const uint64_t first = offset >> w->o.cluster_bits;
  const uint64_t end = div_round_up (offset + bytes, w->cluster_size);

  assert (lock_is_mine (&w->lock));
  for (uint64_t i = first; i < end; ++i) {
    uint64_t *e = find_entry (w, i);

    if (e == NULL)
      return -1;
    assert (*e == 0);
    *e = entry;
    entry += step;
  }
  return 0;
}

static int
write_host (struct qcow2_writer *w, const void *buf, uint64_t bytes,
            uint64_t host)
{
  if (container_pwrite (w->container, buf, bytes, host) == 0)
    return 0;
  report_error ("cannot write %" PRIu64 " bytes of the new image: %m", bytes);
  return -1;
}

/* At the end: what is allocated already. */
static int
tell_and_write (struct qcow2_writer *w, const void *buf, uint64_t bytes,
                uint64_t host)
{
  tell (w, buf, bytes, host);
  return write_host (w, buf, bytes, host);
}

/* Data as they are: the end of the last cluster reads as zeroes. */
static int
write_plain (struct qcow2_writer *w, const void *buf, uint64_t count,
             uint64_t offset)
{
  uint64_t host;

  pthread_mutex_lock (&w->lock);
  int r = allocate (w, count, &host);

  if (r == 0)
    r = set_entries (w, offset, count, host | OFLAG_COPIED, w->cluster_size);
  if (r == 0)
    tell (w, buf, count, host);
  pthread_mutex_unlock (&w->lock);
  return r == -1 ? -1 : write_host (w, buf, count, host);
}

/* With the lock held: give a run its place. */
static int
place_run (struct qcow2_writer *w, const struct run *r, uint64_t *host)
{
  const unsigned x = 62 - (w->o.cluster_bits - 8);

  assert (lock_is_mine (&w->lock));
  *host = w->end;
  for (size_t i = 0; i < r->nr_packed; ++i) {
    const struct packed *p = &r->packed[i];
    const uint64_t begin = *host + p->begin;
    const uint64_t first = round_down (begin, SECTOR);
    const uint64_t sectors = div_round_up (begin + p->count - first, SECTOR);
    uint64_t *entry = find_entry (w, p->cluster);

    if (entry == NULL ||
        count_references (w, first, sectors * SECTOR) == -1)
      return -1;
    assert (*entry == 0);
    *entry = begin | (sectors - 1) << x | OFLAG_COMPRESSED;
  }
  w->end += round_up (r->used, w->cluster_size);
  tell (w, r->buf, r->used, *host);
  return 0;
}

/* With the lock held: put a compressed cluster into the run. */
static int
add_to_run (struct qcow2_writer *w, const void *bytes, uint64_t count,
            uint64_t offset)
{
  struct run *r = &w->run;

  assert (lock_is_mine (&w->lock));
  if (r->buf == NULL)
    r->buf = malloc (RUN_CLUSTERS * w->cluster_size);
  if (r->buf == NULL ||
      vector_reserve (r->packed, r->nr_packed, r->max_packed, 1) == -1) {
    report_error ("malloc: %m");
    return -1;
  }
  r->packed[r->nr_packed++] = (struct packed) {
    .cluster = offset >> w->o.cluster_bits, .begin = r->used, .count = count,
  };
  memcpy (r->buf + r->used, bytes, count);
  r->used += count;
  return 0;
}

/* A run that is full is written without the lock. */
static int
write_packed (struct qcow2_writer *w, const void *bytes, uint64_t count,
              uint64_t offset)
{
  struct run full = { 0 };
  uint64_t host;
  int r = 0;

  pthread_mutex_lock (&w->lock);
  if (w->run.used + count > RUN_CLUSTERS * w->cluster_size) {
    full = w->run;
    w->run = (struct run) { 0 };
    r = place_run (w, &full, &host);
  }
  if (r == 0)
    r = add_to_run (w, bytes, count, offset);
  pthread_mutex_unlock (&w->lock);
  if (r == 0 && full.used > 0)
    r = write_host (w, full.buf, full.used, host);
  free_run (&full);
  return r;
}

/* At the end. */
static int
write_last_run (struct qcow2_writer *w)
{
  uint64_t host;
  int r;

  if (w->run.used == 0)
    return 0;
  pthread_mutex_lock (&w->lock);
  r = place_run (w, &w->run, &host);
  pthread_mutex_unlock (&w->lock);
  return r == -1 ? -1 : write_host (w, w->run.buf, w->run.used, host);
}

/* One cluster; the last one of the disk may be short. */
static int
compress (struct qcow2_writer *w, const void *buf, uint64_t count,
          uint64_t offset)
{
  CLEANUP_FREE uint8_t *whole = NULL, *out = NULL;
  size_t n;

  if (count < w->cluster_size) {
    whole = calloc (1, w->cluster_size);
    if (whole != NULL)
      buf = memcpy (whole, buf, count);
  }
  /* It has to save a sector. */
  out = malloc (w->cluster_size - SECTOR + 1);
  if (out == NULL || (count < w->cluster_size && whole == NULL)) {
    report_error ("malloc: %m");
    return -1;
  }
  n = ZSTD_compress (out, w->cluster_size - SECTOR, buf, w->cluster_size, 3);
  return ZSTD_isError (n) ? write_plain (w, buf, count, offset)
    : write_packed (w, out, n, offset);
}

/* Only the end of the disk is not the end of a cluster. */
static void
check_range (const struct qcow2_writer *w, uint64_t count, uint64_t offset)
{
  (void) w;
  (void) count;
  assert (offset % w->cluster_size == 0 && !range_exceeds (offset, count,
                                                           w->size));
  assert ((offset + count) % w->cluster_size == 0 ||
          round_up (offset + count, SECTOR) == w->size);
}

int
qcow2_writer_data (struct qcow2_writer *w, const void *buf, uint64_t count,
                   uint64_t offset)
{
  const uint8_t *p = buf;
  int r = 0;

  check_range (w, count, offset);
  if (count == 0)
    return 0;
  if (!w->o.compress || w->cluster_size <= SECTOR)
    return write_plain (w, p, count, offset);
  while (count > 0 && r == 0) {
    const uint64_t n = min_u64 (count, w->cluster_size);

    r = compress (w, p, n, offset);
    p += n;
    offset += n;
    count -= n;
  }
  return r;
}

int
qcow2_writer_zero (struct qcow2_writer *w, uint64_t count, uint64_t offset)
{
  int r;

  check_range (w, count, offset);
  if (count == 0 || w->o.backing_name == NULL)
    return 0;
  pthread_mutex_lock (&w->lock);
  r = set_entries (w, offset, count, OFLAG_ZERO, 0);
  pthread_mutex_unlock (&w->lock);
  return r;
}

/* Write a table of 64 bit entries to new clusters. */
static int
write_table (struct qcow2_writer *w, const uint64_t *entries, uint64_t nr,
             uint64_t *host)
{
  const uint64_t bytes = round_up (nr * 8, w->cluster_size);
  CLEANUP_FREE uint8_t *table = calloc (1, bytes + 1);

  if (table == NULL) {
    report_error ("calloc: %m");
    return -1;
  }
  for (uint64_t i = 0; i < nr; ++i)
    put_be64 (table + 8 * i, entries[i]);
  return allocate (w, bytes, host) == -1 ? -1
    : tell_and_write (w, table, bytes, *host);
}

static int
write_mapping (struct qcow2_writer *w, uint64_t *l1_host)
{
  CLEANUP_FREE uint64_t *l1 = calloc (w->l1_entries + 1, sizeof *l1);

  if (l1 == NULL) {
    report_error ("calloc: %m");
    return -1;
  }
  for (uint64_t i = 0; i < w->l1_entries; ++i) {
    if (w->l2[i] == NULL)
      continue;
    if (write_table (w, w->l2[i], w->l2_entries, &l1[i]) == -1)
      return -1;
    l1[i] |= OFLAG_COPIED;
  }
  return write_table (w, l1, w->l1_entries, l1_host);
}

/* The refcount blocks and the table, which count themselves. */
struct refcounts {
  uint64_t nr_blocks, table_clusters;
  uint64_t blocks_host, table_host;
};

static void
lay_out_refcounts (const struct qcow2_writer *w, struct refcounts *r)
{
  const uint64_t per_block = w->cluster_size / 2;
  const uint64_t used = w->end >> w->o.cluster_bits;

  r->nr_blocks = r->table_clusters = 0;
  for (;;) {
    const uint64_t all = used + r->nr_blocks + r->table_clusters;
    const uint64_t blocks = div_round_up (all, per_block);
    const uint64_t table = div_round_up (blocks * 8, w->cluster_size);

    if (blocks == r->nr_blocks && table == r->table_clusters)
      return;
    r->nr_blocks = blocks;
    r->table_clusters = table;
  }
}

static int
write_blocks (struct qcow2_writer *w, const struct refcounts *r)
{
  const uint64_t per_block = w->cluster_size / 2;
  CLEANUP_FREE uint8_t *block = malloc (w->cluster_size);

  if (block == NULL) {
    report_error ("malloc: %m");
    return -1;
  }
  for (uint64_t b = 0; b < r->nr_blocks; ++b) {
    for (uint64_t i = 0; i < per_block; ++i) {
      const uint64_t cluster = b * per_block + i;

      put_be16 (block + 2 * i, cluster < w->nr_refcounts
                ? w->refcounts[cluster] : 0);
    }
    if (tell_and_write (w, block, w->cluster_size,
                        r->blocks_host + b * w->cluster_size) == -1)
      return -1;
  }
  return 0;
}

static int
write_refcounts (struct qcow2_writer *w, struct refcounts *r)
{
  CLEANUP_FREE uint8_t *table = NULL;

  lay_out_refcounts (w, r);
  table = calloc (r->table_clusters, w->cluster_size);
  if (table == NULL) {
    report_error ("calloc: %m");
    return -1;
  }
  if (count_references (w, 0, w->cluster_size) == -1 ||
      allocate (w, r->nr_blocks * w->cluster_size, &r->blocks_host) == -1 ||
      allocate (w, r->table_clusters * w->cluster_size, &r->table_host) == -1)
    return -1;
  for (uint64_t b = 0; b < r->nr_blocks; ++b)
    put_be64 (table + 8 * b, r->blocks_host + b * w->cluster_size);
  return write_blocks (w, r) == -1 ? -1
    : tell_and_write (w, table, r->table_clusters * w->cluster_size,
                      r->table_host);
}

/* The backing file: an extension with its format, the end, and its name. */
static int
fill_backing (const struct qcow2_writer *w, uint8_t *cluster)
{
  struct header_on_disk *h = (struct header_on_disk *) cluster;
  const size_t format_bytes = strlen (w->o.backing_format);
  const size_t name_bytes = strlen (w->o.backing_name);
  const size_t ext = HEADER_FIXED_BYTES;
  const size_t end = ext + 8 + round_up (format_bytes, 8);
  const size_t name = end + 8;

  if (name_bytes > 1023 || name + name_bytes > w->cluster_size) {
    report_error ("the name of the backing file is too long: %s",
                  w->o.backing_name);
    errno = ENAMETOOLONG;
    return -1;
  }
  put_be32 (cluster + ext, HEADER_EXT_BACKING_FORMAT);
  put_be32 (cluster + ext + 4, format_bytes);
  memcpy (cluster + ext + 8, w->o.backing_format, format_bytes);
  put_be32 (cluster + end, HEADER_EXT_END);
  memcpy (cluster + name, w->o.backing_name, name_bytes);
  put_be64 (h->backing_offset, name);
  put_be32 (h->backing_size, name_bytes);
  return 0;
}

static int
write_header (struct qcow2_writer *w, uint64_t l1_host,
              const struct refcounts *r)
{
  CLEANUP_FREE uint8_t *cluster = calloc (1, w->cluster_size);
  struct header_on_disk *h = (struct header_on_disk *) cluster;

  if (cluster == NULL) {
    report_error ("calloc: %m");
    return -1;
  }
  put_be32 (h->magic, HEADER_MAGIC);
  put_be32 (h->version, 3);
  put_be32 (h->cluster_bits, w->o.cluster_bits);
  put_be64 (h->size, w->size);
  put_be32 (h->l1_entries, w->l1_entries);
  put_be64 (h->l1_offset, w->l1_entries == 0 ? 0 : l1_host);
  put_be64 (h->reftable_offset, r->table_host);
  put_be32 (h->reftable_clusters, r->table_clusters);
  put_be32 (h->refcount_order, REFCOUNT_ORDER);
  put_be32 (h->header_length, HEADER_FIXED_BYTES);
  if (w->o.compress) {
    put_be64 (h->incompatible, INCOMPAT_COMPRESSION);
    h->compression = 1;
  }
  if (w->o.backing_name != NULL && fill_backing (w, cluster) == -1)
    return -1;
  if (w->o.tell != NULL)
    w->o.tell (w->o.opaque, cluster, WRITER_HEAD_BYTES);
  return write_host (w, cluster, w->cluster_size, 0);
}

/* The file may have grown by more than was needed. */
static int
cut (struct qcow2_writer *w)
{
  if (container_truncate (w->container, w->end) == 0)
    return 0;
  report_error ("cannot cut the new image: %m");
  return -1;
}

static int
flush (struct qcow2_writer *w)
{
  if (container_flush (w->container) == 0)
    return 0;
  report_error ("cannot flush the new image: %m");
  return -1;
}

int
qcow2_writer_finish (struct qcow2_writer *w)
{
  struct refcounts r;
  uint64_t l1_host = 0;

  return write_last_run (w) == -1 ||
    write_mapping (w, &l1_host) == -1 ||
    write_refcounts (w, &r) == -1 ||
    cut (w) == -1 ||
    flush (w) == -1 ||
    write_header (w, l1_host, &r) == -1 ||
    flush (w) == -1 ? -1 : 0;
}

int
qcow2_create (struct container *c, uint64_t size)
{
  const struct qcow2_writer_options o = { .size = size, .cluster_bits = 16 };
  struct qcow2_writer *w = qcow2_writer_new (c, &o);
  const int r = w == NULL ? -1 : qcow2_writer_finish (w);
  const int err = errno;

  qcow2_writer_free (w);
  errno = err;
  return r;
}
