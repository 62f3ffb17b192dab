/* nbdkit-dirty-bitmap-filter
 * SPDX-License-Identifier: BSD-3-Clause
 * Copyright the nbdkit-dirty-bitmap-filter authors
 */

/* Creating an image.
 *
 * It is of version 3, and has these clusters, in this order: the header, the
 * refcount table, refcount blocks, the L1 table.  What is not said here is
 * zero.
 */

#include <config.h>

#include <errno.h>
#include <inttypes.h>
#include <stdlib.h>

#include "common/bytes.h"
#include "common/cleanup.h"
#include "common/report.h"
#include "container/container.h"
#include "qcow2/header-format.h"
#include "qcow2/qcow2.h"

#define CLUSTER_BITS 16
#define CLUSTER_BYTES (UINT64_C (1) << CLUSTER_BITS)

/* Refcounts of 16 bits, as in QEMU. */
#define REFCOUNT_ORDER 4
#define REFCOUNTS_PER_BLOCK (CLUSTER_BYTES / 2)

/* Guest bytes of an L2 table, and QEMU's limit for an L1 table. */
#define L2_COVERS (CLUSTER_BYTES / 8 * CLUSTER_BYTES)
#define MAX_L1_BYTES (UINT64_C (32) << 20)

struct layout {
  uint64_t size;                /* of the disk */
  uint64_t l1_entries, l1_clusters;
  uint64_t nr_blocks;           /* refcount blocks */
  uint64_t nr_clusters;         /* in all */
};

/* Enough refcount blocks for all clusters, themselves included. */
static int
lay_out (struct layout *l, uint64_t size)
{
  const uint64_t fixed = 2;     /* the header, and the refcount table */

  l->size = round_up (size, 512);
  l->l1_entries = div_round_up (l->size, L2_COVERS);
  l->l1_clusters = div_round_up (l->l1_entries * 8, CLUSTER_BYTES);
  if (l->l1_entries * 8 > MAX_L1_BYTES) {
    report_error ("a disk of %" PRIu64 " bytes is too large for an image",
                  size);
    errno = EFBIG;
    return -1;
  }
  l->nr_blocks = 1;
  while ((l->nr_clusters = fixed + l->nr_blocks + l->l1_clusters) >
         l->nr_blocks * REFCOUNTS_PER_BLOCK)
    l->nr_blocks++;
  return 0;
}

static void
fill_header (uint8_t *cluster, const struct layout *l)
{
  struct header_on_disk *h = (struct header_on_disk *) cluster;

  put_be32 (h->magic, HEADER_MAGIC);
  put_be32 (h->version, 3);
  put_be32 (h->cluster_bits, CLUSTER_BITS);
  put_be64 (h->size, l->size);
  put_be32 (h->l1_entries, l->l1_entries);
  put_be64 (h->l1_offset, (2 + l->nr_blocks) * CLUSTER_BYTES);
  put_be64 (h->reftable_offset, CLUSTER_BYTES);
  put_be32 (h->reftable_clusters, 1);
  put_be32 (h->refcount_order, REFCOUNT_ORDER);
  put_be32 (h->header_length, HEADER_FIXED_BYTES);
}

static void
fill_refcounts (uint8_t *clusters, const struct layout *l)
{
  uint8_t *table = clusters + CLUSTER_BYTES;
  uint8_t *blocks = clusters + 2 * CLUSTER_BYTES;

  for (uint64_t i = 0; i < l->nr_blocks; ++i)
    put_be64 (table + 8 * i, (2 + i) * CLUSTER_BYTES);
  for (uint64_t i = 0; i < l->nr_clusters; ++i)
    put_be16 (blocks + 2 * i, 1);
}

int
qcow2_create (struct container *c, uint64_t size)
{
  CLEANUP_FREE uint8_t *clusters = NULL;
  struct layout l;

  if (lay_out (&l, size) == -1)
    return -1;
  clusters = calloc (2 + l.nr_blocks, CLUSTER_BYTES);
  if (clusters == NULL) {
    report_error ("calloc: %m");
    return -1;
  }
  fill_refcounts (clusters, &l);
  fill_header (clusters, &l);
  if (container_reserve (c, l.nr_clusters * CLUSTER_BYTES) == 0 &&
      container_pwrite (c, clusters, (2 + l.nr_blocks) * CLUSTER_BYTES,
                        0) == 0 &&
      container_flush (c) == 0)
    return 0;
  report_error ("cannot create an image: %m");
  return -1;
}
