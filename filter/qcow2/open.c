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
  q->lost_before += container_failed_flushes (q->data);
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
  q->lost_before = container_failed_flushes (c);
  q->readonly = options->readonly || options->snapshot != NULL;
  grace_init (&q->requests);
  pthread_mutex_init (&q->preallocated_lock, NULL);
  pthread_mutex_init (&q->alloc_lock, NULL);
  pthread_mutex_init (&q->release_lock, NULL);
  pthread_mutex_init (&q->flush_lock, NULL);
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
