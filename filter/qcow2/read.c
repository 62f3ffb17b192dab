/* nbdkit-dirty-bitmap-filter
 * SPDX-License-Identifier: BSD-3-Clause
 * Copyright the nbdkit-dirty-bitmap-filter authors
 */

/* Reading guest data, and reporting where there are any.
 *
 * A request looks a run up and reads it inside one section of q->requests,
 * so that the clusters are not reused in between (release.c).
 *
 * qcow2_read_chunk finds holes as it reads, from the same look-up that says
 * where the data are.  Only for a run that the image does not have, it looks
 * at the tables of the backing file first.
 *
 * The backing file provides the bytes that the image does not have.  It is
 * another image, which these same functions read, or raw bytes.  It is not
 * changed while we use it, and it may be shorter or longer than the disk.
 */

#include <config.h>

#include <assert.h>
#include <errno.h>
#include <inttypes.h>
#include <stdlib.h>

#include "qcow2/internal.h"

static int
read_compressed (struct qcow2 *q, const struct mapping *m, void *buf,
                 uint64_t count, uint64_t offset)
{
  CLEANUP_FREE uint8_t *cluster = malloc (q->cluster_size);

  if (cluster == NULL) {
    report_error ("malloc: %m");
    return -1;
  }
  if (compressed_read (q, m->descriptor, cluster) == -1)
    return -1;
  memcpy (buf, cluster + (offset & (q->cluster_size - 1)), count);
  return 0;
}

/* Read what the image does not have. */
static int
layer_read (struct qcow2 *q, void *buf, uint64_t count, uint64_t offset)
{
  const uint64_t inside =
    offset < q->backing_size ? min_u64 (count, q->backing_size - offset) : 0;

  memset ((char *) buf + inside, 0, count - inside);
  if (inside == 0)
    return 0;
  if (q->backing.image != NULL)
    return qcow2_read (q->backing.image, buf, inside, offset);
  if (container_pread (q->backing.raw, buf, inside, offset) == -1) {
    report_error ("cannot read %" PRIu64 " bytes at offset %#" PRIx64
                  " of the backing file: %m", inside, offset);
    return -1;
  }
  return 0;
}

static int
read_run (struct qcow2 *q, const struct mapping *m, void *buf,
          uint64_t offset)
{
  switch (m->kind) {
  case MAPPING_DATA:
    if (container_pread (q->data, buf, m->length, m->host) == -1) {
      report_error ("cannot read %" PRIu64 " bytes at host offset %#" PRIx64
                    ": %m", m->length, m->host);
      return -1;
    }
    return 0;
  case MAPPING_COMPRESSED:
    return read_compressed (q, m, buf, m->length, offset);
  case MAPPING_UNALLOCATED:
    return layer_read (q, buf, m->length, offset);
  default:
    memset (buf, 0, m->length);
    return 0;
  }
}

int
read_range (struct qcow2 *q, void *buf, uint64_t count, uint64_t offset)
{
  uint8_t *p = buf;

  if (offset + count > q->size) {
    const uint64_t inside = offset < q->size ? q->size - offset : 0;

    memset (p + inside, 0, count - inside);
    count = inside;
  }
  while (count > 0) {
    struct mapping m;

    if (request_goes_on (q) == -1 ||
        mapping_lookup (q, offset, piece_of (count, offset, DATA_PIECE),
                        &m) == -1 ||
        read_run (q, &m, p, offset) == -1)
      return -1;
    p += m.length;
    offset += m.length;
    count -= m.length;
  }
  return 0;
}

int
qcow2_read (struct qcow2 *q, void *buf, uint64_t count, uint64_t offset)
{
  assert (!range_exceeds (offset, count, q->size));
  const grace_ticket ticket = grace_enter (&q->requests);
  const int r = read_range (q, buf, count, offset);

  grace_leave (&q->requests, ticket);
  return r;
}

static int find_zeroes (struct qcow2 *, uint64_t offset, struct mapping *,
                        bool *zeroes);

/* For a run that the image does not have: ask its backing file. */
static int
find_zeroes_below (struct qcow2 *q, uint64_t offset, uint64_t *length,
                   bool *zeroes)
{
  struct mapping m;

  if (offset >= q->backing_size) {
    *zeroes = true;
    return 0;
  }
  *length = min_u64 (*length, q->backing_size - offset);
  *zeroes = false;
  if (q->backing.image == NULL)
    return 0;
  if (mapping_lookup_kind (q->backing.image, offset, *length, &m) == -1 ||
      find_zeroes (q->backing.image, offset, &m, zeroes) == -1)
    return -1;
  *length = m.length;
  return 0;
}

/* Do the tables say that a run reads as zeroes?  It may become shorter. */
static int
find_zeroes (struct qcow2 *q, uint64_t offset, struct mapping *m,
             bool *zeroes)
{
  switch (m->kind) {
  case MAPPING_ZERO:
  case MAPPING_ZERO_ALLOCATED:
    *zeroes = true;
    return 0;
  case MAPPING_UNALLOCATED:
    return find_zeroes_below (q, offset, &m->length, zeroes);
  default:
    *zeroes = false;
    return 0;
  }
}

/* Zeroes follow the data read so far, and were not read.  They are the end
 * of the piece, or lie before more data in it.
 */
static uint64_t
fill (const struct qcow2_chunk *c, uint64_t done, uint64_t zeroes)
{
  const uint64_t n = min_u64 (zeroes, c->count - done);

  memset ((uint8_t *) c->buf + done, 0, n);
  return done + n;
}

static int
read_chunk (struct qcow2 *q, uint64_t offset, struct qcow2_chunk *c)
{
  uint64_t done = 0, zeroes = 0, at;

  c->length = 0;
  c->is_hole = false;
  while ((at = done + zeroes) < (done == 0 ? c->limit : c->count)) {
    struct mapping m;
    bool is_zero;

    if (mapping_lookup (q, offset + at,
                        (at < c->count ? c->count : c->limit) - at,
                        &m) == -1 ||
        find_zeroes (q, offset + at, &m, &is_zero) == -1)
      return -1;
    if (is_zero) {
      zeroes += m.length;
      if (done > 0 && zeroes >= c->min_hole)
        break;
      continue;
    }
    if (at >= c->count || (done == 0 && zeroes >= c->min_hole))
      break;
    if (c->buf == NULL)
      return 0;
    done = fill (c, done, zeroes);
    zeroes = 0;
    if (read_run (q, &m, (uint8_t *) c->buf + done, offset + done) == -1)
      return -1;
    done += m.length;
  }
  if (done == 0 && (zeroes >= c->min_hole || zeroes == c->limit)) {
    c->is_hole = true;
    c->length = zeroes;
  }
  else if (c->buf != NULL)
    c->length = zeroes >= c->min_hole ? done : fill (c, done, zeroes);
  return 0;
}

int
qcow2_read_chunk (struct qcow2 *q, uint64_t offset, struct qcow2_chunk *c)
{
  assert (!range_exceeds (offset, c->limit, q->size));
  const grace_ticket ticket = grace_enter (&q->requests);
  const int r = read_chunk (q, offset, c);

  grace_leave (&q->requests, ticket);
  return r;
}

static int
cache_run (struct qcow2 *q, const struct mapping *m)
{
  uint64_t host = m->host, bytes = m->length;

  if (m->kind == MAPPING_COMPRESSED)
    compressed_location (q, m->descriptor, &host, &bytes);
  else if (m->kind != MAPPING_DATA)
    return 0;
  if (container_cache (q->data, bytes, host) == -1) {
    report_error ("cannot cache %" PRIu64 " bytes at host offset %#" PRIx64
                  ": %m", bytes, host);
    return -1;
  }
  return 0;
}

int
qcow2_cache (struct qcow2 *q, uint64_t count, uint64_t offset)
{
  int r = 0;

  while (count > 0 && r == 0) {
    const grace_ticket ticket = grace_enter (&q->requests);
    struct mapping m;

    r = request_goes_on (q);
    if (r == 0)
      r = mapping_lookup (q, offset, piece_of (count, offset, ZERO_PIECE),
                          &m);
    if (r == 0) {
      r = cache_run (q, &m);
      offset += m.length;
      count -= m.length;
    }
    grace_leave (&q->requests, ticket);
  }
  return r;
}

/* A run of clusters with data, in a preallocated image: the storage knows
 * which parts of them are zeroes.  Inside a section, so that the clusters
 * are not reused meanwhile.
 */
static int
preallocated_extent (struct qcow2 *q, uint64_t offset, uint64_t limit,
                     uint64_t *length, enum qcow2_extent_type *type)
{
  const grace_ticket ticket = grace_enter (&q->requests);
  struct mapping m;
  unsigned flags = 0;
  int r = mapping_lookup (q, offset, limit - offset, &m);

  if (r == 0) {
    *length = m.length;
    if (m.kind == MAPPING_DATA) {
      r = container_extent (q->data, m.host, m.length, length, &flags);
      if (r == -1)
        report_error ("cannot tell what is data at host offset %#" PRIx64
                      ": %m", m.host);
    }
    /* A run that has changed since the look-up is still reported as data. */
    *type = flags & CONTAINER_ZERO ? QCOW2_EXTENT_ZERO : QCOW2_EXTENT_DATA;
  }
  grace_leave (&q->requests, ticket);
  return r;
}

static int
raw_extent (struct qcow2 *q, uint64_t offset, uint64_t count,
            uint64_t *length, enum qcow2_extent_type *type)
{
  unsigned flags;

  if (container_extent (q->backing.raw, offset, count, length,
                        &flags) == -1) {
    report_error ("cannot tell what is data at offset %#" PRIx64 " of the "
                  "backing file: %m", offset);
    return -1;
  }
  /* Report them as explicit zeroes, since the backing file has them. */
  *type = flags & CONTAINER_ZERO ? QCOW2_EXTENT_ZERO : QCOW2_EXTENT_DATA;
  return 0;
}

static int
layer_extent (struct qcow2 *q, uint64_t offset, uint64_t limit,
              uint64_t *length, enum qcow2_extent_type *type,
              unsigned *depth)
{
  const bool none = q->backing.image == NULL && q->backing.raw == NULL;

  if (offset >= q->backing_size) {
    *length = limit - offset;
    if (type != NULL)
      *type = QCOW2_EXTENT_UNALLOCATED;
    *depth = none ? 0 : 2;
    return 0;
  }
  limit = min_u64 (limit, q->backing_size);
  if (q->backing.image == NULL) {
    *depth = 2;
    *length = limit - offset;
    return type == NULL ? 0
      : raw_extent (q, offset, limit - offset, length, type);
  }
  if (qcow2_extent (q->backing.image, offset, limit, length, type,
                    depth) == -1)
    return -1;
  if (*depth != 0)
    ++*depth;
  return 0;
}

int
qcow2_extent (struct qcow2 *q, uint64_t offset, uint64_t limit,
              uint64_t *length, enum qcow2_extent_type *type, unsigned *depth)
{
  struct mapping m;

  if (mapping_lookup_kind (q, offset, limit - offset, &m) == -1)
    return -1;
  *length = m.length;
  *depth = 1;
  if (m.kind == MAPPING_UNALLOCATED)
    return layer_extent (q, offset, offset + m.length, length, type, depth);
  if (type == NULL)
    return 0;
  if (m.kind == MAPPING_ZERO || m.kind == MAPPING_ZERO_ALLOCATED) {
    *type = QCOW2_EXTENT_ZERO;
    return 0;
  }
  *type = QCOW2_EXTENT_DATA;
  return is_preallocated (q)
    ? preallocated_extent (q, offset, offset + m.length, length, type) : 0;
}
