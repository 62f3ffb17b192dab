/* nbdkit-dirty-bitmap-filter
 * SPDX-License-Identifier: BSD-3-Clause
 * Copyright the nbdkit-dirty-bitmap-filter authors
 */

/* Reading guest data, and telling where there is any.
 *
 * A request looks a run up and reads it inside one section of
 * q->requests, so that the clusters are not used for something else in
 * between (release.c).
 */

#include <config.h>

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
  const grace_ticket ticket = grace_enter (&q->requests);
  const int r = read_range (q, buf, count, offset);

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

/* A run of clusters with data, in an image that was preallocated: the
 * storage knows which parts of them are zeroes.  Inside a section, so that
 * the clusters stay what they are meanwhile.
 */
static int
preallocated_extent (struct qcow2 *q, uint64_t offset, uint64_t limit,
                     uint64_t *length, enum qcow2_extent_type *type)
{
  const grace_ticket ticket = grace_enter (&q->requests);
  struct mapping m;
  bool hole = false;
  int r = mapping_lookup (q, offset, limit - offset, &m);

  if (r == 0) {
    *length = m.length;
    if (m.kind == MAPPING_DATA) {
      r = container_extent (q->data, m.host, m.length, length, &hole);
      if (r == -1)
        report_error ("cannot tell what is data at host offset %#" PRIx64
                      ": %m", m.host);
    }
    /* What has changed since it was data is told as data for once. */
    *type = hole ? QCOW2_EXTENT_ZERO : QCOW2_EXTENT_DATA;
  }
  grace_leave (&q->requests, ticket);
  return r;
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
