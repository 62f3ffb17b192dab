/* nbdkit-dirty-bitmap-filter
 * SPDX-License-Identifier: BSD-3-Clause
 * Copyright the nbdkit-dirty-bitmap-filter authors
 */

/* Opening and closing an image. */

#include <config.h>

#include <errno.h>
#include <stdlib.h>

#include "qcow2/internal.h"

/* The container that holds guest data. */
static int
data_file_open (struct qcow2 *q, const struct qcow2_options *options)
{
  q->data = q->container;
  if (!q->has_data_file)
    return 0;
  if (options->data_file == NULL) {
    report_error ("the image has an external data file, which was not "
                  "opened");
    errno = EINVAL;
    return -1;
  }
  q->data = options->data_file;
  q->gate.lost_before += container_failed_flushes (q->data);
  return 0;
}

static int
layer_open (struct qcow2 *q, const struct qcow2_options *options)
{
  const bool opened =
    options->backing.image != NULL || options->backing.raw != NULL;

  if (!opened) {
    if (options->is_top_alone || !references_backing (q))
      return 0;
    report_error ("the image has a backing file, which was not opened");
    errno = EINVAL;
    return -1;
  }
  q->backing = options->backing;
  q->backing_size = q->backing.image != NULL
    ? q->backing.image->size : container_size (q->backing.raw);
  return 0;
}

/* Handle what a crash may have left. */
static int
mend (struct qcow2 *q, bool check_only)
{
  if (q->header.incompatible & INCOMPAT_DIRTY)
    return repair_dirty (q, check_only);
  if (!check_only)
    leaks_find (q);
  return 0;
}

static int
open_parts (struct qcow2 *q, const struct qcow2_options *options)
{
  const uint64_t cache_size = options->cache_size;

  if (header_read (q) == -1 || data_file_open (q, options) == -1 ||
      (options->snapshot != NULL &&
       snapshots_select (q, options->snapshot) == -1) ||
      layer_open (q, options) == -1 || registry_init (q) == -1 ||
      registry_set (q, QCOW2_HEADER, 0, 1) == -1)
    return -1;
  /* Refcounts are of no use to a reader. */
  if (!q->readonly && refcounts_open (q, cache_size / 5) == -1)
    return -1;
  if (mapping_open (q) == -1 ||
      (!q->readonly && snapshots_register (q) == -1))
    return -1;
  if (l2_cache_open (q, cache_size / 5 * 4) == -1)
    return -1;
  return q->readonly ? 0 : mend (q, options->check_only);
}

struct qcow2 *
qcow2_open (struct container *c, const struct qcow2_options *options)
{
  struct qcow2 *q = aligned_alloc (64, round_up (sizeof *q, 64));

  if (q == NULL) {
    report_error ("aligned_alloc: %m");
    return NULL;
  }
  memset (q, 0, sizeof *q);
  q->container = c;
  q->gate.lost_before = container_failed_flushes (c);
  q->readonly = options->readonly || options->snapshot != NULL;
  grace_init (&q->requests);
  pthread_mutex_init (&q->preallocated.lock, NULL);
  pthread_mutex_init (&q->rc.lock, NULL);
  pthread_mutex_init (&q->release.lock, NULL);
  pthread_mutex_init (&q->flush.lock, NULL);
  if (open_parts (q, options) == -1) {
    const int err = errno;

    qcow2_close (q);
    errno = err;
    return NULL;
  }
  return q;
}

void
qcow2_close (struct qcow2 *q)
{
  if (q == NULL)
    return;
  l2_cache_free (q);
  mapping_free (q);
  refcounts_free (q);
  release_free (q);
  leaks_free (q);
  registry_free (q);
  header_free (q);
  grace_free (&q->requests);
  free (q);
}

uint64_t
qcow2_size (const struct qcow2 *q)
{
  return q->size;
}

uint32_t
qcow2_cluster_size (const struct qcow2 *q)
{
  return q->cluster_size;
}

unsigned
qcow2_version (const struct qcow2 *q)
{
  return q->header.version;
}

void
qcow2_describe (const struct qcow2 *q, struct qcow2_description *d)
{
  const struct header *h = &q->header;

  *d = (struct qcow2_description) {
    .version = h->version,
    .refcount_bits = 1U << h->refcount_order,
    .compression_type = h->compression_type == 1 ? "zstd" : "zlib",
    .lazy_refcounts = (h->compatible & COMPAT_LAZY_REFCOUNTS) != 0,
    .corrupt = (h->incompatible & INCOMPAT_CORRUPT) != 0 ||
      atomic_load (&q->gate.corrupt),
    .extended_l2 = q->extended_l2,
    .has_data_file = q->has_data_file,
    .data_file_raw = q->data_file_raw,
  };
  for (; q->backing.image != NULL; q = q->backing.image)
    d->nr_backing++;
  if (q->backing.raw != NULL)
    d->nr_backing++;
}

bool
qcow2_is_readonly (const struct qcow2 *q)
{
  return q->readonly;
}

struct container *
qcow2_container (const struct qcow2 *q)
{
  return q->container;
}

uint64_t
qcow2_tables_bytes (const struct qcow2 *q)
{
  return q->header.l1_entries * UINT64_C (8);
}

void
qcow2_get_numbers (const struct qcow2 *q, struct qcow2_numbers *n)
{
  l2_get_numbers (q, &n->l2);
  refcounts_get_numbers (q, &n->refcounts);
  n->allocated = tally_get (&q->rc.allocated);
  n->freed = tally_get (&q->rc.freed);
  for (unsigned i = 0; i < 2; ++i) {
    n->flushes[i] = tally_get (&q->flush.flushes[i]);
    n->flush_ns[i] = tally_get (&q->flush.ns[i]);
  }
  n->barriers[0] = qcow2_lost (q);
  n->barriers[1] = tally_get (&q->container->flushes);
  n->barrier_ns = tally_get (&q->container->flush_ns);
  if (q->data != q->container) {
    n->barriers[1] += tally_get (&q->data->flushes);
    n->barrier_ns += tally_get (&q->data->flush_ns);
  }
}
