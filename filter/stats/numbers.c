/* nbdkit-dirty-bitmap-filter
 * SPDX-License-Identifier: BSD-3-Clause
 * Copyright the nbdkit-dirty-bitmap-filter authors
 */

/* All that the statistics tell, one metric after another.
 *
 * A sample is there from the beginning, so that its first increase is seen
 * as one.  The exceptions are results and bitmaps: a result other than
 * success is told once it has occurred, and only existing bitmaps are told.
 */

#include <config.h>

#include <inttypes.h>
#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "common/cleanup.h"
#include "common/vector.h"
#include "disk/disk.h"
#include "stats/internal.h"

static const char *const command_names[STATS_NR_COMMANDS] = {
  [STATS_READ] = "read",
  [STATS_WRITE] = "write",
  [STATS_FLUSH] = "flush",
  [STATS_TRIM] = "trim",
  [STATS_CACHE] = "cache",
  [STATS_WRITE_ZEROES] = "write_zeroes",
  [STATS_BLOCK_STATUS] = "block_status",
  [STATS_UNKNOWN] = "unknown",
};

static const char *const result_names[STATS_NR_RESULTS] = {
  [STATS_SUCCESS] = "success",
  [STATS_EPERM] = "EPERM",
  [STATS_EIO] = "EIO",
  [STATS_ENOMEM] = "ENOMEM",
  [STATS_EINVAL] = "EINVAL",
  [STATS_ENOSPC] = "ENOSPC",
  [STATS_EOVERFLOW] = "EOVERFLOW",
  [STATS_ENOTSUP] = "ENOTSUP",
  [STATS_ESHUTDOWN] = "ESHUTDOWN",
};

/* For counters that are indexed by failure and success. */
static const char *const outcome_names[2] = { "failure", "success" };

static void
put_metric (struct stats_output *o, const char *name, const char *type,
            const char *help)
{
  o->metric (o, name, type, help);
}

static void
put (struct stats_output *o, uint64_t value)
{
  o->sample (o, &(struct stats_sample) { .suffix = "", .value = value });
}

static void
put_ns (struct stats_output *o, uint64_t ns)
{
  o->sample (o, &(struct stats_sample) {
      .suffix = "", .unit = STATS_SECONDS, .value = ns });
}

static void
put_labelled (struct stats_output *o, const char *label, const char *text,
              enum stats_unit unit, uint64_t value)
{
  o->sample (o, &(struct stats_sample) {
      .suffix = "", .nr_labels = 1, .label = { { label, text } },
      .unit = unit, .value = value });
}

static void
put_one (struct stats_output *o, const char *name, const char *type,
         const char *help, uint64_t value)
{
  put_metric (o, name, type, help);
  put (o, value);
}

static void
tell_requests (struct stats_output *o, const struct stats_totals totals[])
{
  put_metric (o, "requests_total", "counter",
        "Requests that were answered, by command and result.");
  for (unsigned i = 0; i < STATS_NR_COMMANDS; ++i)
    for (unsigned j = 0; j < STATS_NR_RESULTS; ++j)
      if (j == STATS_SUCCESS || totals[i].count[j] > 0)
        o->sample (o, &(struct stats_sample) {
            .suffix = "", .nr_labels = 2,
            .label = { { "command", command_names[i] },
                       { "result", result_names[j] } },
            .value = totals[i].count[j] });

  put_metric (o, "request_bytes_total", "counter",
        "Bytes of the disk that successful requests covered.");
  for (unsigned i = 0; i < STATS_NR_COMMANDS; ++i)
    if (i != STATS_FLUSH && i != STATS_UNKNOWN)
      put_labelled (o, "command", command_names[i], STATS_NUMBER,
                    totals[i].bytes);
}

static void
tell_durations (struct stats_output *o, const struct stats_totals totals[])
{
  static const struct {
    const char *text;
    unsigned thousandths;
  } quantiles[] = {
    { "0.5", 500 }, { "0.9", 900 }, { "0.99", 990 }, { "0.999", 999 },
  };

  put_metric (o, "request_duration_seconds", "summary",
        "Time from a request's receipt to its reply being ready.");
  for (unsigned i = 0; i < STATS_NR_COMMANDS; ++i) {
    const struct stats_totals *t = &totals[i];

    for (unsigned j = 0; j < sizeof quantiles / sizeof quantiles[0]; ++j)
      o->sample (o, &(struct stats_sample) {
          .suffix = "", .nr_labels = 2,
          .label = { { "command", command_names[i] },
                     { "quantile", quantiles[j].text } },
          .unit = t->all == 0 ? STATS_NONE : STATS_SECONDS,
          .value = histogram_quantile_ns (t->duration, t->all,
                                          quantiles[j].thousandths) });
    o->sample (o, &(struct stats_sample) {
        .suffix = "_sum", .nr_labels = 1,
        .label = { { "command", command_names[i] } },
        .unit = STATS_SECONDS, .value = t->sum_ns });
    o->sample (o, &(struct stats_sample) {
        .suffix = "_count", .nr_labels = 1,
        .label = { { "command", command_names[i] } }, .value = t->all });
  }
}

static void
tell_connections (struct stats_output *o, struct stats *s)
{
  const long open = atomic_load (&s->connections);

  put_one (o, "connections", "gauge", "Connections that are open.",
           open > 0 ? open : 0);
  put_one (o, "connections_accepted_total", "counter",
           "Connections that were served, from their handshake on.",
           tally_get (&s->accepted));
  put_one (o, "connections_refused_total", "counter",
           "Connections that were closed at once, for lack of room.",
           tally_get (&s->refused));
}

static void
put_outcomes (struct stats_output *o, const char *name, const char *help,
              const uint64_t values[2])
{
  put_metric (o, name, "counter", help);
  for (unsigned i = 0; i < 2; ++i)
    put_labelled (o, "result", outcome_names[i], STATS_NUMBER, values[i]);
}

static void
put_outcomes_ns (struct stats_output *o, const char *name, const char *help,
                 const uint64_t ns[2])
{
  put_metric (o, name, "counter", help);
  for (unsigned i = 0; i < 2; ++i)
    put_labelled (o, "result", outcome_names[i], STATS_SECONDS, ns[i]);
}

/* Bitmaps are listed once, and told under several metrics.  Their names are
 * copies, since bitmaps may be removed meanwhile.
 */
struct bitmap_list {
  struct disk_bitmap_numbers *bitmaps;
  size_t nr, max;
  bool failed;
};

static void
add_bitmap (const struct disk_bitmap_numbers *b, void *opaque)
{
  struct bitmap_list *list = opaque;

  char *name = strdup (b->name);

  if (name == NULL ||
      vector_reserve (list->bitmaps, list->nr, list->max, 1) == -1) {
    free (name);
    list->failed = true;
    return;
  }
  list->bitmaps[list->nr] = *b;
  list->bitmaps[list->nr++].name = name;
}

static void
bitmap_list_free (struct bitmap_list *list)
{
  for (size_t i = 0; i < list->nr; ++i)
    free ((char *) list->bitmaps[i].name);
  free (list->bitmaps);
}

#define CLEANUP_BITMAP_LIST_FREE \
  __attribute__ ((cleanup (bitmap_list_free)))

static uint64_t
dirty_bytes (const struct disk_bitmap_numbers *b)
{
  return b->dirty_bytes;
}

static uint64_t
extra_bytes (const struct disk_bitmap_numbers *b)
{
  return b->extra_bytes;
}

static uint64_t
granularity (const struct disk_bitmap_numbers *b)
{
  return b->granularity;
}

static uint64_t
records (const struct disk_bitmap_numbers *b)
{
  return b->records;
}

static void
put_bitmaps (struct stats_output *o, const struct bitmap_list *list,
             const char *name, const char *help,
             uint64_t (*get) (const struct disk_bitmap_numbers *))
{
  put_metric (o, name, "gauge", help);
  for (size_t i = 0; i < list->nr; ++i)
    put_labelled (o, "bitmap", list->bitmaps[i].name, STATS_NUMBER,
                  get (&list->bitmaps[i]));
}

static void
tell_flushes (struct stats_output *o, const struct disk_numbers *n)
{
  put_outcomes (o, "flushes_total",
                "Flushes of the image, each for one or more requests.",
                n->qcow2.flushes);
  put_outcomes_ns (o, "flush_seconds_total", "Time that flushes took.",
                   n->qcow2.flush_ns);
  put_outcomes (o, "barriers_total",
                "Flushes of the storage below, of which a flush of the "
                "image needs one or more.", n->qcow2.barriers);
  put_metric (o, "barrier_seconds_total", "counter",
        "Time that successful barriers took.");
  put_ns (o, n->qcow2.barrier_ns);
  put_outcomes (o, "syncs_total",
                "Flushes that wrote dirty bitmaps to the image.",
                n->bitmaps.syncs);
  put_outcomes_ns (o, "sync_seconds_total",
                   "Time that syncs took, with the rest of the flush.",
                   n->bitmaps.sync_ns);
  put_outcomes (o, "sync_bytes_total",
                "Bytes of bits and of bitmap tables that syncs wrote.",
                n->bitmaps.sync_bytes);
}

static void
tell_keep (struct stats_output *o, const struct bitmap_list *list,
            const struct bitmap_set_numbers *n)
{
  put_outcomes (o, "ahead_writes_total",
                "How often bits were durably written ahead of changes.",
                n->rounds);
  put_outcomes_ns (o, "ahead_seconds_total",
                   "Time that these writes took.", n->round_ns);
  put_one (o, "ahead_regions_total", "counter",
           "Regions of the disk whose bits were written ahead, in each "
           "bitmap.", n->regions_marked);
  put_one (o, "ahead_tidied_bytes_total", "counter",
           "Bytes of the disk whose bits in the image became exact again, in "
           "each bitmap.", n->bytes_tidied);
  put_bitmaps (o, list, "extra_bytes",
               "Bytes of the disk that the image's bitmap has and that were "
               "not changed: what a crash now would report too much.",
               extra_bytes);
  put_one (o, "fallbacks_total", "counter",
           "How often a bitmap was marked as in use because its bits could "
           "not be written ahead.", n->fallbacks);
}

static void
put_caches (struct stats_output *o, const char *name, const char *help,
            uint64_t l2, uint64_t refcounts)
{
  put_metric (o, name, "counter", help);
  put_labelled (o, "cache", "l2", STATS_NUMBER, l2);
  put_labelled (o, "cache", "refcount", STATS_NUMBER, refcounts);
}

static void
tell_image (struct stats_output *o, struct disk *d,
            const struct disk_numbers *n)
{
  const struct qcow2_cache_numbers *l2 = &n->qcow2.l2;
  const struct qcow2_cache_numbers *refcounts = &n->qcow2.refcounts;

  put_one (o, "disk_size_bytes", "gauge", "Size of the disk.",
           disk_size (d));
  put_one (o, "image_size_bytes", "gauge",
           "Size of the image file, with spare room.", n->image_bytes);
  put_one (o, "image_grown_bytes_total", "counter",
           "Bytes by which the image file has grown.", n->grown_bytes);
  put_one (o, "cluster_size_bytes", "gauge", "Size of a cluster.",
           disk_preferred_block_size (d));
  put_one (o, "clusters_allocated_total", "counter",
           "Clusters of the image that were taken for data or tables.",
           n->qcow2.allocated);
  put_one (o, "clusters_freed_total", "counter",
           "Clusters of the image that became free.", n->qcow2.freed);
  put_caches (o, "cache_hits_total", "Look-ups answered from memory.",
              l2->hits, refcounts->hits);
  put_caches (o, "cache_misses_total", "Look-ups that had to read the image.",
              l2->misses, refcounts->misses);
  put_caches (o, "cache_evictions_total",
              "Parts of tables that made room for others.",
              l2->evictions, refcounts->evictions);
}

static uint64_t
resident_bytes (void)
{
  uint64_t pages = 0;
  FILE *f = fopen ("/proc/self/statm", "re");

  if (f == NULL)
    return 0;
  if (fscanf (f, "%*u %" SCNu64, &pages) != 1)
    pages = 0;
  fclose (f);
  return pages * sysconf (_SC_PAGESIZE);
}

static void
tell_memory (struct stats_output *o, const struct bitmap_list *list,
              const struct disk_numbers *n)
{
  uint64_t bitmaps = 0;

  for (size_t i = 0; i < list->nr; ++i)
    bitmaps += list->bitmaps[i].memory_bytes;
  put_metric (o, "memory_bytes", "gauge", "Memory in use, by purpose.");
  put_labelled (o, "use", "l2_cache", STATS_NUMBER, n->qcow2.l2.bytes);
  put_labelled (o, "use", "refcount_cache", STATS_NUMBER,
                n->qcow2.refcounts.bytes);
  put_labelled (o, "use", "bitmaps", STATS_NUMBER, bitmaps);
  put_one (o, "resident_memory_bytes", "gauge",
           "Resident memory of the whole process.",
           resident_bytes ());
}

static void
tell_self (struct stats_output *o, const struct stats *s)
{
  put_metric (o, "info", "gauge", "The filter.");
  put_labelled (o, "version", PACKAGE_VERSION, STATS_NUMBER, 1);
  put_metric (o, "start_time_seconds", "gauge",
        "When the filter began to serve, since the epoch.");
  put_ns (o, s->started.tv_sec * UINT64_C (1000000000) + s->started.tv_nsec);
}

int
stats_tell (struct stats *s, struct disk *d, struct stats_output *o)
{
  CLEANUP_BITMAP_LIST_FREE struct bitmap_list list = { .nr = 0 };
  CLEANUP_FREE struct stats_totals *totals =
    calloc (STATS_NR_COMMANDS, sizeof *totals);
  struct disk_numbers n;

  disk_each_bitmap (d, add_bitmap, &list);
  if (totals == NULL || list.failed)
    return -1;
  for (unsigned i = 0; i < STATS_NR_COMMANDS; ++i)
    stats_sum (s, i, &totals[i]);
  disk_get_numbers (d, &n);

  tell_self (o, s);
  tell_connections (o, s);
  tell_requests (o, totals);
  tell_durations (o, totals);
  put_bitmaps (o, &list, "dirty_bytes",
               "Bytes of the disk that are dirty in a bitmap.", dirty_bytes);
  put_bitmaps (o, &list, "granularity_bytes",
               "Bytes of the disk that a bit stands for.", granularity);
  put_bitmaps (o, &list, "recording",
               "Whether changes of the disk are recorded into a bitmap.",
               records);
  tell_flushes (o, &n);
  tell_keep (o, &list, &n.bitmaps);
  tell_image (o, d, &n);
  tell_memory (o, &list, &n);
  return 0;
}
