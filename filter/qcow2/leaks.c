/* nbdkit-dirty-bitmap-filter
 * SPDX-License-Identifier: BSD-3-Clause
 * Copyright the nbdkit-dirty-bitmap-filter authors
 */

/* Leaks left by a crash: clusters whose refcount is higher than the number
 * of references to them.
 *
 * When an image is opened for writing, its references are counted (scan.c),
 * if that does not delay the start: always within small limits, and within
 * larger ones if there are signs of a crash.  Proven leaks are noted, and
 * nothing is written: without a change the file must stay as it was.  At the
 * first change the clusters are released like any others (release.c), which
 * gives their storage back and lowers their refcounts by one.  So a refcount
 * that is too high by more is first lowered to one more than is right.
 *
 * A cluster of the disk that is used once, but has a higher refcount and
 * hence no COPIED flag, is left alone: flag and refcount would no longer
 * agree.
 *
 * Refcounts that are too low are another matter.  Such an image is corrupt,
 * but it is served: no leak is reclaimed, and with the first change those
 * refcounts are raised, so that no cluster in use is taken for a free one.
 * If they cannot be raised, nothing is changed.
 */

#include <config.h>

#include <errno.h>
#include <inttypes.h>
#include <stdlib.h>

#include "common/vector.h"
#include "qcow2/internal.h"

#define MIB (UINT64_C (1) << 20)

/* The limits.  A counter is 4 bytes, so the scan takes 256 MiB of RAM at
 * worst, while it lasts.
 */
static const struct scan_limits always = {
  .bytes = 4 * MIB, .clusters = 64 * MIB, .ms = 500,
};
static const struct scan_limits after_crash = {
  .bytes = 64 * MIB, .clusters = 64 * MIB, .ms = 2000,
};

/* At most so many are noted. */
#define MAX_RANGES 65536

struct leak {
  uint64_t cluster, nr;
  uint64_t count;               /* the refcount to set first, if set */
  bool set;
};

struct search {
  struct qcow2 *q;
  const struct scan *scan;
  struct leak *ranges;
  size_t nr, max;
  uint64_t nr_clusters;
  uint64_t nr_low, first_low;   /* refcounts that are too low */
};

static int
note (struct search *search, struct leak leak)
{
  struct leak *last = search->nr > 0 ? &search->ranges[search->nr - 1] : NULL;

  if (last != NULL && last->cluster + last->nr == leak.cluster &&
      last->set == leak.set && last->count == leak.count) {
    last->nr++;
    return 0;
  }
  if (vector_reserve (search->ranges, search->nr, search->max, 1) == -1)
    return -1;
  search->ranges[search->nr++] = leak;
  return 0;
}

static int
leak_found (void *opaque, uint64_t cluster, uint64_t stored, uint64_t counted)
{
  struct search *search = opaque;

  if (stored < counted) {
    if (search->nr_low++ == 0) {
      search->first_low = cluster;
      search->nr = 0;
    }
    /* A missing refcount block is not repaired here. */
    if (search->nr >= MAX_RANGES ||
        !refcount_block_exists (search->q, cluster >>
                                search->q->rc.block_entries_bits))
      return 0;
    return note (search, (struct leak) { cluster, 1, counted, true });
  }
  if (search->nr_low != 0 || search->nr >= MAX_RANGES ||
      (counted == 1 && scan_wants_copied (search->scan, cluster)))
    return 0;
  search->nr_clusters++;
  return note (search, (struct leak) { cluster, 1, counted + 1,
                                       stored != counted + 1 });
}

/* Does the file reach beyond the last cluster in use?  A clean stop cuts it
 * there; until then it grows ahead of use.
 */
static bool
has_spare_end (struct qcow2 *q, const struct scan *s)
{
  uint64_t count;

  ACQUIRE_LOCK_FOR_CURRENT_SCOPE (&q->rc.lock);
  return s->nr > 0 && refcount_get (q, s->nr - 1, &count) == 0 && count == 0;
}

/* Count, with the limits that apply. */
static enum scan_result
count_references (struct qcow2 *q, struct scan *s)
{
  enum scan_result r = scan_begin (q, s, always);

  if (r == SCAN_TOO_MUCH && (s->crashed || has_spare_end (q, s))) {
    scan_free (s);
    r = scan_begin (q, s, after_crash);
  }
  if (r != SCAN_DONE || !s->complete)
    return r;
  if (s->crashed || has_spare_end (q, s))
    s->limits = after_crash;
  return scan_finish (q, s);
}

static void
report (const struct search *search)
{
  const unsigned bits = search->q->cluster_bits;

  if (search->nr_low != 0)
    report_warning ("the image is corrupt: %" PRIu64 " clusters that are in "
                    "use, the first at host offset %#" PRIx64 ", have "
                    "refcounts that are too low; repair it with "
                    "qemu-img check -r all", search->nr_low,
                    search->first_low << bits);
  else if (search->nr_clusters != 0)
    report_debug ("%" PRIu64 " leaked clusters were found, to be reclaimed "
                  "with the first change", search->nr_clusters);
}

void
leaks_find (struct qcow2 *q)
{
  struct scan s;
  struct search search = { .q = q, .scan = &s };
  enum scan_result r = count_references (q, &s);

  if (r == SCAN_DONE && s.complete)
    r = scan_compare (q, &s, leak_found, &search);
  if (r != SCAN_DONE || !s.complete) {
    if (r == SCAN_INCONSISTENT)
      report_warning ("the image is corrupt: %s; see qemu-img check", s.why);
    else
      report_debug ("no search for leaks: %s", s.why);
    search.nr = 0;
  }
  else
    report (&search);
  scan_free (&s);

  if (search.nr == 0)
    free (search.ranges);
  else {
    q->leaks.ranges = search.ranges;
    q->leaks.nr = search.nr;
    q->leaks.corrupt = search.nr_low != 0;
  }
}

static void
release_leak (struct qcow2 *q, const struct leak *leak)
{
  if (leak->set) {
    ACQUIRE_LOCK_FOR_CURRENT_SCOPE (&q->rc.lock);
    for (uint64_t c = leak->cluster; c < leak->cluster + leak->nr; ++c)
      if (refcount_set (q, c, leak->count) == -1) {
        if (q->leaks.corrupt)
          gate_set_corrupt (q);
        return;
      }
  }
  if (!q->leaks.corrupt)
    release_clusters (q, leak->cluster, leak->nr);
}

void
leaks_release (struct qcow2 *q)
{
  if (q->leaks.ranges == NULL || atomic_exchange (&q->leaks.released, true))
    return;
  for (size_t i = 0; i < q->leaks.nr; ++i)
    release_leak (q, &q->leaks.ranges[i]);
}

void
leaks_free (struct qcow2 *q)
{
  free (q->leaks.ranges);
}
