/* nbdkit-dirty-bitmap-filter
 * SPDX-License-Identifier: BSD-3-Clause
 * Copyright the nbdkit-dirty-bitmap-filter authors
 */

/* From what the contexts say to what is copied.
 *
 * The two lists of runs are walked side by side, cluster by cluster where a
 * run ends inside of one, else as far as both go.
 */

#include <config.h>

#include <stdlib.h>
#include <string.h>

#include "backup/source.h"
#include "common/bytes.h"
#include "common/report.h"

/* Pieces are not longer than this, so that there are enough of them for all
 * connections.
 */
#define MAX_PIECE_BYTES ((uint64_t) 64 << 20)

#define DIRTY 1

/* A place in a list of runs. */
struct walker {
  const struct runs *runs;
  size_t i;
};

/* What the runs say of [offset, end), together. */
struct seen {
  uint32_t any, all;            /* flags that some part, and each part, has */
};

static struct seen
look (struct walker *w, uint64_t offset, uint64_t end)
{
  struct seen s = { 0, UINT32_MAX };
  size_t i;

  while (w->runs->run[w->i].end <= offset)
    w->i++;
  i = w->i;
  do {
    s.any |= w->runs->run[i].flags;
    s.all &= w->runs->run[i].flags;
  } while (w->runs->run[i++].end < end);
  return s;
}

/* How far from offset on, in whole clusters, the run at offset goes; at least
 * one cluster.
 */
static uint64_t
end_of_run (struct walker *w, uint64_t offset, uint32_t cluster_size,
            uint64_t limit)
{
  uint64_t end;

  while (w->runs->run[w->i].end <= offset)
    w->i++;
  end = w->runs->run[w->i].end;
  end = end == limit ? end : round_down (end, cluster_size);
  return max_u64 (end, min_u64 (offset + cluster_size, limit));
}

static int
add_piece (struct plan *p, uint64_t offset, uint64_t length, bool is_zero)
{
  struct piece *last = p->nr > 0 ? &p->piece[p->nr - 1] : NULL;

  p->all_bytes += length;
  if (!is_zero)
    p->data_bytes += length;
  if (last != NULL && last->offset + last->length == offset &&
      last->is_zero == is_zero && last->length + length <= MAX_PIECE_BYTES) {
    last->length += length;
    return 0;
  }
  if (p->nr == p->max) {
    const size_t max = p->max * 2 + 256;
    struct piece *larger = reallocarray (p->piece, max, sizeof *larger);

    if (larger == NULL) {
      report_error ("realloc: %m");
      return -1;
    }
    p->piece = larger;
    p->max = max;
  }
  p->piece[p->nr++] = (struct piece) { offset, length, is_zero };
  return 0;
}

/* In parts, if it is long. */
static int
add_range (struct plan *p, uint64_t offset, uint64_t length, bool is_zero)
{
  while (length > 0) {
    const uint64_t n = min_u64 (length, MAX_PIECE_BYTES);

    if (add_piece (p, offset, n, is_zero) == -1)
      return -1;
    offset += n;
    length -= n;
  }
  return 0;
}

int
plan_make (struct plan *p, uint64_t size, uint32_t cluster_size,
           const struct runs *allocation, const struct runs *dirty)
{
  struct walker a = { .runs = allocation }, d = { .runs = dirty };
  uint64_t end;

  memset (p, 0, sizeof *p);
  for (uint64_t offset = 0; offset < size; offset = end) {
    bool is_zero;

    end = end_of_run (&a, offset, cluster_size, size);
    if (dirty != NULL)
      end = min_u64 (end, end_of_run (&d, offset, cluster_size, size));
    if (dirty != NULL && !(look (&d, offset, end).any & DIRTY))
      continue;
    is_zero = look (&a, offset, end).all & LIBNBD_STATE_ZERO;
    if ((dirty != NULL || !is_zero) &&
        add_range (p, offset, end - offset, is_zero) == -1) {
      plan_free (p);
      return -1;
    }
  }
  return 0;
}

void
plan_free (struct plan *p)
{
  free (p->piece);
  memset (p, 0, sizeof *p);
}
