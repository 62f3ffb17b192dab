/* nbdkit-dirty-bitmap-filter
 * SPDX-License-Identifier: BSD-3-Clause
 * Copyright the nbdkit-dirty-bitmap-filter authors
 */

/* Reading the header of the image and its extensions.
 *
 * Every field is checked, here or in header-format.c, once, so that the rest
 * of qcow2/ can rely on it.  An unsupported feature is refused by name.
 */

#include <config.h>

#include <errno.h>
#include <inttypes.h>
#include <stdio.h>
#include <stdlib.h>

#include "qcow2/internal.h"

#define SECTOR 512

static int
invalid (int err)
{
  errno = err;
  return -1;
}

/* A table that the header points to: aligned, and inside the container
 * (whose last cluster may be short).
 */
static int
check_table (struct qcow2 *q, const char *what, uint64_t offset,
             uint64_t bytes, uint64_t max_bytes)
{
  const uint64_t end = round_up (container_size (q->container),
                                 q->cluster_size);

  if (bytes > max_bytes) {
    report_error ("the %s of the image, %" PRIu64 " bytes, is too large",
                  what, bytes);
    return invalid (EFBIG);
  }
  if (offset % q->cluster_size != 0 || (bytes != 0 && offset == 0)) {
    report_error ("the offset of the %s of the image, %#" PRIx64 ", "
                  "is invalid", what, offset);
    return invalid (EINVAL);
  }
  if (bytes != 0 && range_exceeds (offset, bytes, end)) {
    report_error ("the %s of the image lies beyond the end of the file", what);
    return invalid (EINVAL);
  }
  return 0;
}

static int
check_tables (struct qcow2 *q)
{
  const struct header *h = &q->header;
  /* One L1 entry maps this many bytes. */
  const uint64_t l1_covers = q->cluster_size << q->l2_bits;

  if (h->size > INT64_MAX) {
    report_error ("the size of the image's disk, %" PRIu64 " bytes, "
                  "is too large", h->size);
    return invalid (EFBIG);
  }
  if (div_round_up (h->size, l1_covers) > h->l1_entries) {
    report_error ("the L1 table of the image, %" PRIu32 " entries, is too "
                  "small for a disk of %" PRIu64 " bytes",
                  h->l1_entries, h->size);
    return invalid (EINVAL);
  }
  if (check_table (q, "L1 table", h->l1_offset,
                   h->l1_entries * UINT64_C (8), MAX_L1_BYTES) == -1)
    return -1;
  if (h->reftable_clusters == 0) {
    report_error ("the image has no refcount table");
    return invalid (EINVAL);
  }
  if (q->readonly)
    return 0;                   /* the table is not read */
  return check_table (q, "refcount table", h->reftable_offset,
                      h->reftable_clusters * q->cluster_size,
                      MAX_REFTABLE_BYTES);
}

int
header_load (struct qcow2 *q)
{
  uint8_t first[HEADER_FIXED_BYTES];

  if (container_size (q->container) < HEADER_V2_BYTES) {
    report_error ("this is not a qcow2 image: it has only %" PRIu64 " bytes",
                  container_size (q->container));
    return invalid (EINVAL);
  }
  if (container_pread (q->container, first, sizeof first, 0) == -1) {
    report_error ("cannot read the header of the image: %m");
    return -1;
  }
  if (get_be32 (first) != HEADER_MAGIC) {
    report_error ("this is not a qcow2 image: it does not begin with the "
                  "qcow2 magic");
    return invalid (EINVAL);
  }
  q->header.version = get_be32 (first + HEADER_VERSION);
  if (q->header.version != 2 && q->header.version != 3) {
    report_error ("qcow2 version %u is not supported", q->header.version);
    return invalid (ENOTSUP);
  }
  if (header_parse (&q->header, first) == -1)
    return -1;

  q->cluster_bits = q->header.cluster_bits;
  q->cluster_size = UINT64_C (1) << q->cluster_bits;
  q->extended_l2 = q->header.incompatible & INCOMPAT_EXTENDED_L2;
  q->unit_bits = q->cluster_bits - (q->extended_l2 ? 5 : 0);
  q->l2_bits = q->cluster_bits - (q->extended_l2 ? 4 : 3);
  q->has_data_file = q->header.incompatible & INCOMPAT_DATA_FILE;
  q->data_file_raw = q->has_data_file &&
    (q->header.autoclear & AUTOCLEAR_RAW_EXTERNAL) != 0;
  q->size = round_down (q->header.size, SECTOR);
  pthread_mutex_init (&q->hs.lock, NULL);
  q->hs.cluster = malloc (q->cluster_size);
  if (q->hs.cluster == NULL) {
    report_error ("malloc: %m");
    return -1;
  }
  if (container_pread (q->container, q->hs.cluster, q->cluster_size, 0) == -1) {
    report_error ("cannot read the header of the image: %m");
    return -1;
  }
  return header_parse_extensions (&q->header, q->hs.cluster, &q->hs.ext);
}

int
header_read (struct qcow2 *q)
{
  if (header_load (q) == -1 ||
      header_check_features (&q->header, q->hs.cluster, &q->hs.ext,
                             q->readonly) == -1 ||
      check_tables (q) == -1)
    return -1;
  q->hs.ext.bitmaps.autoclear =
    q->header.version >= 3 && (q->header.autoclear & AUTOCLEAR_BITMAPS);
  return 0;
}

void
header_free (struct qcow2 *q)
{
  if (q->hs.cluster != NULL)
    pthread_mutex_destroy (&q->hs.lock);
  free (q->hs.cluster);
}

void
qcow2_get_bitmaps_extension (struct qcow2 *q,
                             struct qcow2_bitmaps_extension *ext)
{
  ACQUIRE_LOCK_FOR_CURRENT_SCOPE (&q->hs.lock);
  *ext = q->hs.ext.bitmaps;
}

