/* nbdkit-dirty-bitmap-filter
 * SPDX-License-Identifier: BSD-3-Clause
 * Copyright the nbdkit-dirty-bitmap-filter authors
 */

/* Writing the statistics in Prometheus's text format.
 *
 * All lines of a metric stand together, below its HELP and TYPE, and a
 * series is there from the beginning, so that its first increase is seen as
 * one.  The exceptions are results and bitmaps: a result other than success
 * is written once it has occurred, and only existing bitmaps are written.
 */

#include <config.h>

#include <inttypes.h>
#include <stdbool.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "common/bytes.h"
#include "common/cleanup.h"
#include "common/utf8.h"
#include "common/vector.h"
#include "disk/disk.h"
#include "stats/internal.h"

#define PREFIX "nbdkit_dirty_bitmap_"

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
head (FILE *f, const char *name, const char *type, const char *help)
{
  fprintf (f, "# HELP " PREFIX "%s %s\n# TYPE " PREFIX "%s %s\n",
           name, help, name, type);
}

/* The end of a line: nanoseconds as seconds, with a decimal point in every
 * locale.
 */
static void
put_ns (FILE *f, uint64_t ns)
{
  fprintf (f, " %" PRIu64 ".%09" PRIu64 "\n",
           ns / 1000000000, ns % 1000000000);
}

static void
put_one (FILE *f, const char *name, const char *type, const char *help,
         uint64_t value)
{
  head (f, name, type, help);
  fprintf (f, PREFIX "%s %" PRIu64 "\n", name, value);
}

void
stats_write_label (FILE *f, const char *value)
{
  const unsigned char *p = (const unsigned char *) value;

  putc ('"', f);
  while (*p != '\0') {
    const unsigned n = utf8_length (p);

    if (*p == '\n')
      fputs ("\\n", f);
    else if (n == 0 || *p < ' ' || *p == 0x7f || (*p == '\\' && p[1] == 'x'))
      fprintf (f, "\\\\x%02x", *p);
    else if (*p == '\\' || *p == '"')
      fprintf (f, "\\%c", *p);
    else
      fwrite (p, 1, n, f);
    p += n == 0 ? 1 : n;
  }
  putc ('"', f);
}

static void
write_requests (FILE *f, const struct stats_totals totals[])
{
  head (f, "requests_total", "counter",
        "Requests that were answered, by command and result.");
  for (unsigned i = 0; i < STATS_NR_COMMANDS; ++i)
    for (unsigned j = 0; j < STATS_NR_RESULTS; ++j)
      if (j == STATS_SUCCESS || totals[i].count[j] > 0)
        fprintf (f, PREFIX "requests_total{command=\"%s\",result=\"%s\"} %"
                 PRIu64 "\n",
                 command_names[i], result_names[j], totals[i].count[j]);

  head (f, "request_bytes_total", "counter",
        "Bytes of the disk that successful requests covered.");
  for (unsigned i = 0; i < STATS_NR_COMMANDS; ++i)
    if (i != STATS_FLUSH && i != STATS_UNKNOWN)
      fprintf (f, PREFIX "request_bytes_total{command=\"%s\"} %" PRIu64 "\n",
               command_names[i], totals[i].bytes);
}

static void
write_durations (FILE *f, const struct stats_totals totals[])
{
  static const struct {
    const char *text;
    double value;
  } quantiles[] = {
    { "0.5", 0.5 }, { "0.9", 0.9 }, { "0.99", 0.99 }, { "0.999", 0.999 },
  };

  head (f, "request_duration_seconds", "summary",
        "Time from a request's receipt to its reply being ready.");
  for (unsigned i = 0; i < STATS_NR_COMMANDS; ++i) {
    const struct stats_totals *t = &totals[i];

    for (unsigned j = 0; j < sizeof quantiles / sizeof quantiles[0]; ++j) {
      fprintf (f, PREFIX "request_duration_seconds"
               "{command=\"%s\",quantile=\"%s\"}",
               command_names[i], quantiles[j].text);
      if (t->all == 0)
        fputs (" NaN\n", f);
      else
        put_ns (f, histogram_quantile_ns (t->duration, t->all,
                                          quantiles[j].value));
    }
    fprintf (f, PREFIX "request_duration_seconds_sum{command=\"%s\"}",
             command_names[i]);
    put_ns (f, t->sum_ns);
    fprintf (f, PREFIX "request_duration_seconds_count{command=\"%s\"} %"
             PRIu64 "\n", command_names[i], t->all);
  }
}

static void
write_connections (FILE *f, struct stats *s)
{
  const long open = atomic_load (&s->connections);

  put_one (f, "connections", "gauge", "Connections that are open.",
           open > 0 ? open : 0);
  put_one (f, "connections_accepted_total", "counter",
           "Connections that were served, from their handshake on.",
           tally_get (&s->accepted));
  put_one (f, "connections_refused_total", "counter",
           "Connections that were closed at once, for lack of room.",
           tally_get (&s->refused));
}

static void
put_outcomes (FILE *f, const char *name, const char *help,
              const uint64_t values[2])
{
  head (f, name, "counter", help);
  for (unsigned i = 0; i < 2; ++i)
    fprintf (f, PREFIX "%s{result=\"%s\"} %" PRIu64 "\n", name,
             outcome_names[i], values[i]);
}

static void
put_outcomes_ns (FILE *f, const char *name, const char *help,
                 const uint64_t ns[2])
{
  head (f, name, "counter", help);
  for (unsigned i = 0; i < 2; ++i) {
    fprintf (f, PREFIX "%s{result=\"%s\"}", name, outcome_names[i]);
    put_ns (f, ns[i]);
  }
}

/* Bitmaps are listed once, and written under several metrics. */
struct bitmap_list {
  struct disk_bitmap_numbers *bitmaps;
  size_t nr, max;
  bool failed;
};

static void
add_bitmap (const struct disk_bitmap_numbers *b, void *opaque)
{
  struct bitmap_list *list = opaque;

  if (vector_reserve (list->bitmaps, list->nr, list->max, 1) == -1) {
    list->failed = true;
    return;
  }
  list->bitmaps[list->nr++] = *b;
}

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
put_bitmaps (FILE *f, const struct bitmap_list *list, const char *name,
             const char *help,
             uint64_t (*get) (const struct disk_bitmap_numbers *))
{
  head (f, name, "gauge", help);
  for (size_t i = 0; i < list->nr; ++i) {
    fprintf (f, PREFIX "%s{bitmap=", name);
    stats_write_label (f, list->bitmaps[i].name);
    fprintf (f, "} %" PRIu64 "\n", get (&list->bitmaps[i]));
  }
}

static void
write_flushes (FILE *f, const struct disk_numbers *n)
{
  put_outcomes (f, "flushes_total",
                "Flushes of the image, each for one or more requests.",
                n->qcow2.flushes);
  put_outcomes_ns (f, "flush_seconds_total", "Time that flushes took.",
                   n->qcow2.flush_ns);
  put_outcomes (f, "barriers_total",
                "Flushes of the storage below, of which a flush of the "
                "image needs one or more.", n->qcow2.barriers);
  head (f, "barrier_seconds_total", "counter",
        "Time that successful barriers took.");
  fputs (PREFIX "barrier_seconds_total", f);
  put_ns (f, n->qcow2.barrier_ns);
  put_outcomes (f, "syncs_total",
                "Flushes that wrote dirty bitmaps to the image.",
                n->bitmaps.syncs);
  put_outcomes_ns (f, "sync_seconds_total",
                   "Time that syncs took, with the rest of the flush.",
                   n->bitmaps.sync_ns);
  put_outcomes (f, "sync_bytes_total",
                "Bytes of bits and of bitmap tables that syncs wrote.",
                n->bitmaps.sync_bytes);
}

static void
write_keep (FILE *f, const struct bitmap_list *list,
            const struct bitmap_set_numbers *n)
{
  put_outcomes (f, "ahead_writes_total",
                "How often bits were durably written ahead of changes.",
                n->rounds);
  put_outcomes_ns (f, "ahead_seconds_total",
                   "Time that these writes took.", n->round_ns);
  put_one (f, "ahead_regions_total", "counter",
           "Regions of the disk whose bits were written ahead, in each "
           "bitmap.", n->regions_marked);
  put_one (f, "ahead_tidied_bytes_total", "counter",
           "Bytes of the disk whose bits in the image became exact again, in "
           "each bitmap.", n->bytes_tidied);
  put_bitmaps (f, list, "extra_bytes",
               "Bytes of the disk that the image's bitmap has and that were "
               "not changed: what a crash now would report too much.",
               extra_bytes);
  put_one (f, "fallbacks_total", "counter",
           "How often a bitmap was marked as in use because its bits could "
           "not be written ahead.", n->fallbacks);
}

static void
put_caches (FILE *f, const char *name, const char *help,
            uint64_t l2, uint64_t refcounts)
{
  head (f, name, "counter", help);
  fprintf (f, PREFIX "%s{cache=\"l2\"} %" PRIu64 "\n", name, l2);
  fprintf (f, PREFIX "%s{cache=\"refcount\"} %" PRIu64 "\n", name, refcounts);
}

static void
write_image (FILE *f, struct disk *d, const struct disk_numbers *n)
{
  const struct qcow2_cache_numbers *l2 = &n->qcow2.l2;
  const struct qcow2_cache_numbers *refcounts = &n->qcow2.refcounts;

  put_one (f, "disk_size_bytes", "gauge", "Size of the disk.",
           disk_size (d));
  put_one (f, "image_size_bytes", "gauge",
           "Size of the image file, with spare room.", n->image_bytes);
  put_one (f, "image_grown_bytes_total", "counter",
           "Bytes by which the image file has grown.", n->grown_bytes);
  put_one (f, "cluster_size_bytes", "gauge", "Size of a cluster.",
           disk_preferred_block_size (d));
  put_one (f, "clusters_allocated_total", "counter",
           "Clusters of the image that were taken for data or tables.",
           n->qcow2.allocated);
  put_one (f, "clusters_freed_total", "counter",
           "Clusters of the image that became free.", n->qcow2.freed);
  put_caches (f, "cache_hits_total", "Look-ups answered from memory.",
              l2->hits, refcounts->hits);
  put_caches (f, "cache_misses_total", "Look-ups that had to read the image.",
              l2->misses, refcounts->misses);
  put_caches (f, "cache_evictions_total",
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
write_memory (FILE *f, const struct bitmap_list *list,
              const struct disk_numbers *n)
{
  uint64_t bitmaps = 0;

  for (size_t i = 0; i < list->nr; ++i)
    bitmaps += list->bitmaps[i].memory_bytes;
  head (f, "memory_bytes", "gauge", "Memory in use, by purpose.");
  fprintf (f, PREFIX "memory_bytes{use=\"l2_cache\"} %" PRIu64 "\n",
           n->qcow2.l2.bytes);
  fprintf (f, PREFIX "memory_bytes{use=\"refcount_cache\"} %" PRIu64 "\n",
           n->qcow2.refcounts.bytes);
  fprintf (f, PREFIX "memory_bytes{use=\"bitmaps\"} %" PRIu64 "\n", bitmaps);
  put_one (f, "resident_memory_bytes", "gauge",
           "Resident memory of the whole process.",
           resident_bytes ());
}

static void
write_self (FILE *f, const struct stats *s)
{
  head (f, "info", "gauge", "The filter.");
  fputs (PREFIX "info{version=", f);
  stats_write_label (f, PACKAGE_VERSION);
  fputs ("} 1\n", f);
  head (f, "start_time_seconds", "gauge",
        "When the filter began to serve, since the epoch.");
  fprintf (f, PREFIX "start_time_seconds %lld.%03ld\n",
           (long long) s->started.tv_sec, s->started.tv_nsec / 1000000);
}

int
stats_write (struct stats *s, struct disk *d, FILE *f)
{
  struct bitmap_list list = { .nr = 0 };
  CLEANUP_FREE struct stats_totals *totals =
    calloc (STATS_NR_COMMANDS, sizeof *totals);
  CLEANUP_FREE struct disk_bitmap_numbers *bitmaps = NULL;
  struct disk_numbers n;

  disk_each_bitmap (d, add_bitmap, &list);
  bitmaps = list.bitmaps;
  if (totals == NULL || list.failed)
    return -1;
  for (unsigned i = 0; i < STATS_NR_COMMANDS; ++i)
    stats_sum (s, i, &totals[i]);
  disk_get_numbers (d, &n);

  write_self (f, s);
  write_connections (f, s);
  write_requests (f, totals);
  write_durations (f, totals);
  put_bitmaps (f, &list, "dirty_bytes",
               "Bytes of the disk that are dirty in a bitmap.", dirty_bytes);
  put_bitmaps (f, &list, "granularity_bytes",
               "Bytes of the disk that a bit stands for.", granularity);
  put_bitmaps (f, &list, "recording",
               "Whether changes of the disk are recorded into a bitmap.",
               records);
  write_flushes (f, &n);
  write_keep (f, &list, &n.bitmaps);
  write_image (f, d, &n);
  write_memory (f, &list, &n);
  return 0;
}
