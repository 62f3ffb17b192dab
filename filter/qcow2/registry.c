/* nbdkit-dirty-bitmap-filter
 * SPDX-License-Identifier: BSD-3-Clause
 * Copyright the nbdkit-dirty-bitmap-filter authors
 */

/* Which clusters of the container hold metadata.
 *
 * A hash table from cluster to class.  Every write reads it without a lock;
 * it is changed under registry.lock.  A slot holds (cluster << 8 | class)
 * and is 0 while unused.  Once a slot has a cluster it keeps it: when a
 * cluster ceases to be metadata, its class is set to QCOW2_DATA.  So a
 * reader, which walks from the hash to the first unused slot, never misses a
 * cluster that is not being changed at that moment.
 *
 * When the table gets full, a larger one replaces it.  Readers may still be
 * walking the old one, which is kept until the image is closed; all old
 * tables together are smaller than the current one.
 */

#include <config.h>

#include <errno.h>
#include <inttypes.h>
#include <stdlib.h>

#include "qcow2/internal.h"

struct registry_table {
  struct registry_table *older;
  size_t mask;
  size_t used;                  /* slots with a cluster */
  _Atomic uint64_t slot[];
};

static struct registry_table *
table_new (size_t slots, struct registry_table *older)
{
  struct registry_table *t;

  t = calloc (1, sizeof *t + slots * sizeof t->slot[0]);
  if (t == NULL) {
    report_error ("calloc: %m");
    return NULL;
  }
  t->older = older;
  t->mask = slots - 1;
  return t;
}

int
registry_init (struct qcow2 *q)
{
  struct registry_table *t = table_new (1024, NULL);

  if (t == NULL)
    return -1;
  pthread_mutex_init (&q->registry.lock, NULL);
  atomic_init (&q->registry.table, t);
  return 0;
}

void
registry_free (struct qcow2 *q)
{
  struct registry_table *t = atomic_load (&q->registry.table);

  if (t == NULL)
    return;
  while (t != NULL) {
    struct registry_table *older = t->older;

    free (t);
    t = older;
  }
  pthread_mutex_destroy (&q->registry.lock);
}

static size_t
hash (uint64_t cluster)
{
  return (cluster * UINT64_C (0x9e3779b97f4a7c15)) >> 20;
}

/* The slot of a cluster, or the unused slot where it would go. */
static size_t
find (struct registry_table *t, uint64_t cluster, uint64_t *value)
{
  for (size_t i = hash (cluster) & t->mask;; i = (i + 1) & t->mask) {
    *value = atomic_load_explicit (&t->slot[i], memory_order_acquire);
    if (*value == 0 || *value >> 8 == cluster)
      return i;
  }
}

enum qcow2_class
registry_class (struct qcow2 *q, uint64_t cluster)
{
  struct registry_table *t =
    atomic_load_explicit (&q->registry.table, memory_order_acquire);
  uint64_t value;

  find (t, cluster, &value);
  return value & 0xff;
}

static int
grow (struct qcow2 *q)
{
  struct registry_table *old = atomic_load (&q->registry.table);
  struct registry_table *t = table_new ((old->mask + 1) * 4, old);

  if (t == NULL)
    return -1;
  for (size_t i = 0; i <= old->mask; ++i) {
    uint64_t value = atomic_load (&old->slot[i]), unused;

    if ((value & 0xff) == QCOW2_DATA)
      continue;
    atomic_store (&t->slot[find (t, value >> 8, &unused)], value);
    t->used++;
  }
  atomic_store (&q->registry.table, t);
  return 0;
}

int
registry_set (struct qcow2 *q, enum qcow2_class class,
              uint64_t cluster, uint64_t nr_clusters)
{
  ACQUIRE_LOCK_FOR_CURRENT_SCOPE (&q->registry.lock);

  for (uint64_t c = cluster; c < cluster + nr_clusters; ++c) {
    struct registry_table *t = atomic_load (&q->registry.table);
    uint64_t value;
    size_t i;

    if (class != QCOW2_DATA && t->used > t->mask / 2) {
      if (grow (q) == -1)
        return -1;
      t = atomic_load (&q->registry.table);
    }
    i = find (t, c, &value);
    if (value == 0 && class == QCOW2_DATA)
      continue;
    if (value == 0)
      t->used++;
    atomic_store_explicit (&t->slot[i], c << 8 | class, memory_order_release);
  }
  return 0;
}

const char *
registry_class_name (enum qcow2_class class)
{
  static const char *const names[] = {
    [QCOW2_DATA] = "guest data",
    [QCOW2_HEADER] = "the header",
    [QCOW2_REFCOUNT_TABLE] = "the refcount table",
    [QCOW2_REFCOUNT_BLOCK] = "a refcount block",
    [QCOW2_L1_TABLE] = "the L1 table",
    [QCOW2_L2_TABLE] = "an L2 table",
    [QCOW2_BITMAP_DIRECTORY] = "the bitmap directory",
    [QCOW2_BITMAP_TABLE] = "a bitmap table",
    [QCOW2_BITMAP_DATA] = "a bitmap's data",
    [QCOW2_SNAPSHOT_TABLE] = "the snapshot table",
  };

  return names[class];
}

int
qcow2_register (struct qcow2 *q, enum qcow2_class class,
                uint64_t offset, uint64_t bytes)
{
  const uint64_t first = offset >> q->cluster_bits;
  const uint64_t nr = div_round_up (bytes, q->cluster_size);

  if (offset == 0 || bytes == 0 || offset % q->cluster_size != 0 ||
      range_exceeds (offset, (nr - 1) * q->cluster_size + 1,
                     container_size (q->container))) {
    errno = EINVAL;
    return -1;
  }
  for (uint64_t c = first; c < first + nr; ++c)
    if (registry_class (q, c) != QCOW2_DATA) {
      errno = EEXIST;
      return -1;
    }
  return registry_set (q, class, first, nr);
}

void
qcow2_unregister (struct qcow2 *q, uint64_t offset, uint64_t bytes)
{
  /* Setting to QCOW2_DATA adds no slot, so it cannot fail. */
  registry_set (q, QCOW2_DATA, offset >> q->cluster_bits,
                div_round_up (bytes, q->cluster_size));
}

void
qcow2_unregister_bitmaps (struct qcow2 *q)
{
  struct registry_table *t;

  ACQUIRE_LOCK_FOR_CURRENT_SCOPE (&q->registry.lock);
  t = atomic_load (&q->registry.table);
  for (size_t i = 0; i <= t->mask; ++i) {
    const uint64_t value = atomic_load (&t->slot[i]);

    switch (value & 0xff) {
    case QCOW2_BITMAP_DIRECTORY:
    case QCOW2_BITMAP_TABLE:
    case QCOW2_BITMAP_DATA:
      atomic_store (&t->slot[i], (value & ~UINT64_C (0xff)) | QCOW2_DATA);
    }
  }
}
