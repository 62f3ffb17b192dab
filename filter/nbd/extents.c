/* nbdkit-dirty-bitmap-filter
 * SPDX-License-Identifier: BSD-3-Clause
 * Copyright the nbdkit-dirty-bitmap-filter authors
 */

/* The extents of one metadata context over a range.
 *
 * Invariants (the rules are those of the wire that clients depend on):
 * - The extents cover the range exactly: the first begins where it
 *   begins, the last ends where it ends, none is empty (R1, R2, R3).
 * - Neighbours have different flags.
 * - There are at most extents_max of them (R8).
 * - They are in the form of the wire from the beginning: 32 bits for
 *   length and flags, or 64 where extended headers were negotiated.
 * (build_exactly has other rules.)
 *
 * Where a range has more, it is told coarser, over its whole length and
 * by one measure: a run shorter than the minimum run length is told as
 * what is safe to believe, dirty for a bitmap, data for base:allocation,
 * and for qemu:allocation-depth that the image has it itself: a client
 * that copies an image without its backing files copies such a run too, and
 * none takes it for one that may be left out.
 * The minimum begins at the granularity and doubles until the extents
 * fit, and what was built before is coarsened in place, so no part of
 * the disk is walked twice.  With a minimum above the length of the
 * range a single extent is left, so this always ends.
 *
 * If memory for more extents is not to be had, those that there is room
 * for are the maximum.  So only the first context of a reply can fail
 * for want of memory, and nothing of the reply has been sent then.
 */

#include <config.h>

#include <assert.h>
#include <errno.h>
#include <stdlib.h>

#include "common/bytes.h"
#include "disk/disk.h"
#include "nbd/contents.h"
#include "nbd/extents.h"

size_t extents_max = (1 << 20) - 1;

/* Flags of the bitmaps' contexts. */
#define STATE_DIRTY 1

/* A depth: the run is in the image itself. */
#define DEPTH_LOCAL 1

struct builder {
  const struct socket *socket;
  struct extents *extents;
  bool extended;                /* their form */
  bool full;                    /* no memory for more was to be had */
  uint64_t length;              /* of the last extent */
  uint32_t flags;
  uint64_t min_run;             /* 0: tell all */
  uint64_t granularity;
  uint32_t safe;                /* the flags that are safe to believe */
};

#define MIN_CAPACITY 512

/* Make room for more.  There is always room for one more than may be
 * kept, see add.  It may have to be waited for, so where there is none it
 * is asked for once.
 */
static bool
grow (struct builder *b)
{
  struct extents *e = b->extents;
  size_t capacity = e->capacity == 0 ? MIN_CAPACITY : e->capacity * 2;
  const size_t size = wire_extent_size (b->extended);
  void *p;

  if (b->full)
    return false;
  b->full = true;
  if (!worker_extents_room (e, capacity * size))
    return false;
  p = reallocarray (e->wire, capacity, size);
  if (p == NULL)
    return false;
  b->full = false;
  e->wire = p;
  e->capacity = capacity;
  return true;
}

static inline void
store (const struct builder *b, size_t i, uint64_t length, uint32_t flags)
{
  if (b->extended)
    b->extents->extended[i] =
      (struct nbd_extent_ext) { htobe64 (length), htobe64 (flags) };
  else
    b->extents->compact[i] =
      (struct nbd_extent) { htobe32 (length), htobe32 (flags) };
}

static void
load (const struct builder *b, size_t i, uint64_t *length, uint32_t *flags)
{
  if (b->extended) {
    const struct nbd_extent_ext *extent = &b->extents->extended[i];

    *length = be64toh (extent->length);
    *flags = be64toh (extent->flags);
  }
  else {
    const struct nbd_extent *extent = &b->extents->compact[i];

    *length = be32toh (extent->length);
    *flags = be32toh (extent->flags);
  }
}

static void
put (struct builder *b, uint64_t length, uint32_t flags)
{
  struct extents *e = b->extents;

  if (length < b->min_run)
    flags = b->safe;
  if (e->nr > 0 && b->flags == flags)
    b->length += length;
  else {
    e->nr++;
    b->length = length;
    b->flags = flags;
  }
  store (b, e->nr - 1, b->length, b->flags);
}

/* Double the minimum run length.  A run that is safe already stays as
 * it is, so what is told so far is what it would be had this minimum
 * been in force from the beginning.
 */
static void
coarsen (struct builder *b)
{
  const size_t nr = b->extents->nr;

  b->min_run = b->min_run == 0 ? b->granularity : b->min_run * 2;
  b->extents->nr = 0;
  for (size_t i = 0; i < nr; ++i) {
    uint64_t length;
    uint32_t flags;

    load (b, i, &length, &flags);
    put (b, length, flags);
  }
}

/* Add a run, of which neither neighbour has the same flags. */
static void
add (struct builder *b, uint64_t length, uint32_t flags)
{
  struct extents *e = b->extents;

  put (b, length, flags);
  if (e->nr == e->capacity && e->nr <= extents_max)
    grow (b);
  while (e->nr == e->capacity || e->nr > extents_max)
    coarsen (b);
}

/* Is there room for nr more extents, each of which is told? */
static bool
has_room (struct builder *b, size_t nr)
{
  const struct extents *e = b->extents;

  if (b->min_run != 0 || e->nr + nr > extents_max)
    return false;
  while (e->nr + nr >= e->capacity)
    if (!grow (b))
      return false;
  return true;
}

/* Add runs that follow the last extent, which has the opposite flags of
 * the first of them: dirty and clean in turn.  There is room for them.
 */
static void
append_runs (struct builder *b, uint64_t offset, const uint64_t *ends,
             size_t nr, uint32_t flags)
{
  struct extents *e = b->extents;

  if (b->extended) {
    struct nbd_extent_ext *out = e->extended + e->nr;

    for (size_t i = 0; i < nr; ++i) {
      out[i].length = htobe64 (ends[i] - offset);
      out[i].flags = htobe64 (flags);
      offset = ends[i];
      flags ^= STATE_DIRTY;
    }
  }
  else {
    struct nbd_extent *out = e->compact + e->nr;

    for (size_t i = 0; i < nr; ++i) {
      out[i] = (struct nbd_extent) {
        htobe32 (ends[i] - offset), htobe32 (flags)
      };
      offset = ends[i];
      flags ^= STATE_DIRTY;
    }
  }
  e->nr += nr;
  load (b, e->nr - 1, &b->length, &b->flags);
}

/* contents_extent, with flags that we may tell (R5, R6).  0 or an errno. */
static int
base_extent (struct worker *w, uint64_t offset, uint64_t limit,
             uint64_t *length, uint32_t *flags)
{
  if (contents_extent (w->service->disk, &w->session->export, offset, limit,
                       length, flags) == -1)
    return errno;
  *flags &= DISK_EXTENT_HOLE | DISK_EXTENT_ZERO;
  if (*flags == DISK_EXTENT_HOLE)
    *flags = 0;
  return 0;
}

/* 0 or an errno. */
static int
depth_extent (struct worker *w, uint64_t offset, uint64_t limit,
              uint64_t *length, uint32_t *flags)
{
  return disk_extent_depth (w->service->disk, offset, limit, length,
                            flags) == -1 ? errno : 0;
}

/* The client that would get the answer is gone. */
static bool
is_abandoned (const struct builder *b)
{
  return socket_is_dead (b->socket);
}

/* What get tells, all of it or the first run. */
static int
build_allocation (struct builder *b, struct worker *w,
                  int (*get) (struct worker *, uint64_t offset,
                              uint64_t limit, uint64_t *length,
                              uint32_t *flags),
                  uint64_t offset, uint64_t limit, bool req_one)
{
  uint64_t length = 0, n;
  uint32_t flags = 0, f;

  while (offset < limit) {
    int err = is_abandoned (b) ? ESHUTDOWN : get (w, offset, limit, &n, &f);

    if (err != 0)
      return err;
    if (length > 0 && f != flags) {
      if (req_one)
        break;
      add (b, length, flags);
      length = 0;
    }
    flags = f;
    length += n;
    offset += n;
  }
  add (b, length, flags);
  return 0;
}

/* Between two calls the bitmap may have changed, so the first run of
 * each may be of the kind of the last one before it.  0 or an errno.
 */
static int
build_bitmap (struct builder *b, const struct disk_offer *bitmap,
              uint64_t offset, uint64_t limit, bool req_one)
{
  uint64_t ends[256];

  do {
    bool dirty;
    const size_t nr = disk_bitmap_runs (bitmap, offset, limit, ends,
                                        req_one ? 1 : 256, &dirty);
    uint32_t flags;

    if (nr == 0)
      return errno;
    flags = dirty ? STATE_DIRTY : 0;
    add (b, ends[0] - offset, flags);
    if (nr > 1 && has_room (b, nr - 1))
      append_runs (b, ends[0], ends + 1, nr - 1, flags ^ STATE_DIRTY);
    else
      for (size_t i = 1; i < nr; ++i) {
        flags ^= STATE_DIRTY;
        add (b, ends[i] - ends[i - 1], flags);
      }
    offset = ends[nr - 1];
  } while (offset < limit && !req_one && !is_abandoned (b));
  return 0;
}

static uint32_t
bitmap_flags (bool dirty)
{
  return dirty ? STATE_DIRTY : 0;
}

/* The runs of a bitmap, never coarsened: where there is no room for more
 * extents the reply ends early, as the protocol allows.  0 or an errno.
 *
 * Of a delta export this is base:allocation.  What is clean must not be told
 * as data, of which a client would put zeroes over what it has, nor what is
 * dirty as a hole.  Of a view that shows only what is dirty it is the bitmap's
 * context: what is told as dirty is read.
 */
static int
build_exactly (struct builder *b, const struct disk_offer *bitmap,
               uint32_t (*flags_of) (bool dirty), uint64_t offset,
               uint64_t limit, bool req_one)
{
  const struct extents *e = b->extents;
  uint64_t ends[256];

  do {
    bool dirty;
    size_t nr;

    if (!has_room (b, 1))
      break;
    nr = min_u64 (extents_max, e->capacity - 1) - e->nr;
    nr = disk_bitmap_runs (bitmap, offset, limit, ends,
                           req_one ? 1 : min_u64 (nr, 256), &dirty);
    if (nr == 0)
      return errno;
    for (size_t i = 0; i < nr; ++i) {
      put (b, ends[i] - offset, flags_of (dirty));
      offset = ends[i];
      dirty = !dirty;
    }
  } while (offset < limit && !req_one && !is_abandoned (b));
  return 0;
}

int
extents_build (struct worker *w, uint32_t id, const struct disk_offer *bitmap,
               uint64_t offset, uint64_t length, bool req_one)
{
  struct disk *disk = w->service->disk;
  const struct export *export = &w->session->export;
  const uint64_t limit = offset + length;
  struct builder b = {
    .socket = &w->stream->socket,
    .extents = &w->extents,
    .extended = w->session->extended,
  };

  w->extents.nr = 0;
  if (w->extents.capacity == 0 && !grow (&b))
    return ENOMEM;
  switch (id) {
  case CONTEXT_BASE_ALLOCATION:
    if (export->delta != NULL)
      return build_exactly (&b, export->delta, disk_delta_flags, offset,
                            limit, req_one);
    b.granularity = disk_preferred_block_size (disk);
    b.safe = 0;
    return build_allocation (&b, w, base_extent, offset, limit, req_one);
  case CONTEXT_ALLOCATION_DEPTH:
    b.granularity = disk_preferred_block_size (disk);
    b.safe = DEPTH_LOCAL;
    return build_allocation (&b, w, depth_extent, offset, limit, req_one);
  default:
    assert (id >= CONTEXT_FIRST_BITMAP && bitmap != NULL);
    if (export->view != NULL && disk_view_is_dirty_only (export->view))
      return build_exactly (&b, bitmap, bitmap_flags, offset, limit, req_one);
    b.granularity = disk_bitmap_granularity (bitmap);
    b.safe = STATE_DIRTY;
    return build_bitmap (&b, bitmap, offset, limit, req_one);
  }
}
