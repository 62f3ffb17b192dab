/* nbdkit-dirty-bitmap-filter
 * SPDX-License-Identifier: BSD-3-Clause
 * Copyright the nbdkit-dirty-bitmap-filter authors
 */

/* Views: the disk, and a bitmap, as they were when a backup began.
 *
 * A thread that changes the disk first keeps the units concerned for each
 * view (kept.h).  So a view shows what was kept, and for the rest the disk.
 *
 * No view begins while a change of the disk is under way, or ends: the gate
 * is closed then.
 *
 * If a unit cannot be kept, for want of space or memory, or since the storage
 * fails, the view is broken, and the change goes on.  So it is once the time is
 * up for requests to end (disk_hurry).  What was kept is dropped.  Reads look
 * for this last of all, since what they have read may have been dropped
 * meanwhile.
 */

#include <config.h>

#include <assert.h>
#include <errno.h>
#include <stdlib.h>
#include <string.h>

#include "common/bytes.h"
#include "common/cleanup.h"
#include "common/lock.h"
#include "common/report.h"
#include "common/vector.h"
#include "disk/chunk.h"
#include "disk/internal.h"
#include "disk/kept.h"
#include "qcow2/bitmap-directory.h"

struct disk_view {
  struct disk *disk;
  char *name;
  atomic_ulong references;
  atomic_uint clients;
  atomic_ulong second_looks;    /* for the order of reads */
  struct disk_offers *offers;   /* the bitmap alone */
  bool dirty_only;              /* the view shows what is dirty in it */
  struct kept kept;
  atomic_bool has_ended;        /* the backup has */
  atomic_bool is_broken;
  pthread_mutex_t lock;         /* protects what follows until is_broken */
  char *why;                    /* it is broken; NULL if there was no memory */
};

struct disk_view *
disk_view_get (struct disk_view *v)
{
  atomic_fetch_add (&v->references, 1);
  return v;
}

void
disk_view_put (struct disk_view *v)
{
  if (v == NULL || atomic_fetch_sub (&v->references, 1) != 1)
    return;
  disk_offers_put (v->offers);
  kept_close (&v->kept);
  pthread_mutex_destroy (&v->lock);
  free (v->why);
  free (v->name);
  free (v);
}

struct disk_view *
view_new (struct disk *d, const char *name)
{
  struct disk_view *v;

  if (d->view_options.scratch == NULL) {
    report_error ("there is no folder for the scratch file of a view");
    errno = ENOTSUP;
    return NULL;
  }
  v = calloc (1, sizeof *v);
  if (v == NULL) {
    report_error ("calloc: %m");
    return NULL;
  }
  atomic_init (&v->references, 1);
  pthread_mutex_init (&v->lock, NULL);
  v->disk = d;
  v->name = strdup (name);
  if (v->name == NULL)
    report_error ("strdup: %m");
  if (kept_open (&v->kept, d->view_options.scratch, d->size,
                 d->view_options.scratch_max,
                 d->view_options.memory != 0 ? d->view_options.memory
                 : DISK_DEFAULT_VIEW_MEMORY) == -1 || v->name == NULL) {
    const int err = errno;

    disk_view_put (v);
    errno = err;
    return NULL;
  }
  return v;
}

int
view_freeze (struct disk_view *v, const struct bitmap *frozen,
             bool dirty_only)
{
  const struct offer_source source = {
    .bitmap = frozen, .size = v->disk->size,
  };

  v->dirty_only = dirty_only;
  v->offers = offers_prepare_from (&source, 1);
  return v->offers == NULL ? -1 : 0;
}

int
views_reserve (struct disk *d, size_t more)
{
  struct views *views = &d->views;

  assert (write_lock_is_mine (&d->lists_lock));
  if (vector_reserve (views->view, views->nr, views->max, more) == 0)
    return 0;
  report_error ("malloc: %m");
  return -1;
}

void
view_add (struct disk_view *v)
{
  struct views *views = &v->disk->views;

  assert (write_lock_is_mine (&v->disk->lists_lock));
  assert (views->nr < views->max);
  views->view[views->nr++] = v;
}

static struct disk_view **
find (const struct disk *d, const char *name, size_t length)
{
  const struct views *views = &d->views;

  for (size_t i = 0; i < views->nr; ++i)
    if (strlen (views->view[i]->name) == length &&
        memcmp (views->view[i]->name, name, length) == 0)
      return &views->view[i];
  return NULL;
}

static void
end (struct disk_view *v)
{
  atomic_store (&v->has_ended, true);
  kept_drop (&v->kept);
  disk_view_put (v);
}

void
view_end (struct disk *d, const char *name)
{
  struct disk_view **place = find (d, name, strlen (name)), *v;

  assert (write_lock_is_mine (&d->lists_lock));
  if (place == NULL)
    return;
  v = *place;
  *place = d->views.view[--d->views.nr];
  end (v);
}

void
views_free (struct disk *d)
{
  for (size_t i = 0; i < d->views.nr; ++i)
    end (d->views.view[i]);
  free (d->views.view);
}

static const char *
why_broken (const struct disk_view *v)
{
  return v->why != NULL ? v->why : "no memory";
}

static bool
is_broken (const struct disk_view *v)
{
  return atomic_load (&v->is_broken);
}

int
view_check_whole (const struct disk *d, const char *name)
{
  struct disk_view **place = find (d, name, strlen (name));

  if (place == NULL || !is_broken (*place))
    return 0;
  report_error ("The view of bitmap '%s' is broken: %s",
                bitmap_show_name (name, strlen (name)).text,
                why_broken (*place));
  errno = EIO;
  return -1;
}

static void
break_view (struct disk_view *v, const char *why)
{
  {
    ACQUIRE_LOCK_FOR_CURRENT_SCOPE (&v->lock);
    if (is_broken (v))
      return;
    v->why = strdup (why);
    atomic_store (&v->is_broken, true);
  }
  kept_drop (&v->kept);
  report_warning ("the view of bitmap '%s' is broken, and its backup has to "
                  "be ended as failed: %s", v->name, why);
}

/* At the end of the disk, views do not hold up the changes. */
static int
read_to_keep (void *opaque, uint64_t offset, struct qcow2_chunk *c)
{
  struct disk *d = opaque;

  return qcow2_goes_on (d->qcow2) == -1 ? -1
    : chunk_read_disk (d, offset, c);
}

/* The run of the view's bitmap at offset: where it ends, and whether it is
 * dirty.  Nothing changes the bitmap, so that cannot fail.
 */
static uint64_t
end_of_run (const struct disk_view *v, uint64_t offset, uint64_t limit,
            bool *dirty)
{
  const uint64_t length = disk_bitmap_run (disk_offers_at (v->offers, 0),
                                           offset, limit, dirty);

  assert (length > 0);
  return offset + length;
}

static void
keep (struct disk *d, struct disk_view *v, uint64_t offset, uint64_t count)
{
  struct report_hold hold;
  int r, err;

  report_hold_begin (&hold);
  r = kept_keep (&v->kept, offset, count, read_to_keep, d);
  err = errno;
  report_hold_end (&hold);
  if (r == -1)
    break_view (v, err == ESHUTDOWN ? "the server is stopping"
                : hold.any ? hold.text : strerror (err));
}

/* Keep what is dirty.  A unit that is dirty in part is kept when a change
 * comes to such a part.
 */
static void
keep_dirty (struct disk *d, struct disk_view *v, uint64_t offset,
            uint64_t count)
{
  const uint64_t limit = offset + count;
  uint64_t end;

  for (; offset < limit && !is_broken (v); offset = end) {
    bool dirty;

    end = end_of_run (v, offset, limit, &dirty);
    if (dirty && !kept_has (&v->kept, offset, end - offset))
      keep (d, v, offset, end - offset);
  }
}

void
views_keep_all (struct disk *d, uint64_t offset, uint64_t count)
{
  for (size_t i = 0; i < d->views.nr && count > 0; ++i) {
    struct disk_view *v = d->views.view[i];

    if (is_broken (v) || kept_has (&v->kept, offset, count))
      continue;
    if (v->dirty_only)
      keep_dirty (d, v, offset, count);
    else
      keep (d, v, offset, count);
  }
}

struct disk_view *
disk_find_view (const struct disk *d, const char *name, size_t length)
{
  struct disk_view **place, *v;

  disk_lock_lists (d);
  place = find (d, name, length);
  v = place == NULL ? NULL : disk_view_get (*place);
  disk_unlock_lists (d);
  return v;
}

void
disk_list_views (const struct disk *d,
                 void (*fn) (const struct disk_view_state *, void *),
                 void *opaque)
{
  disk_lock_lists (d);
  for (size_t i = 0; i < d->views.nr; ++i) {
    const struct disk_view *v = d->views.view[i];
    const struct disk_view_state state = {
      .name = v->name,
      .clients = atomic_load (&v->clients),
      .kept_bytes = atomic_load (&v->kept.bytes),
      .broken = is_broken (v) ? why_broken (v) : NULL,
    };

    fn (&state, opaque);
  }
  disk_unlock_lists (d);
}

bool
disk_view_is_dirty_only (const struct disk_view *v)
{
  return v->dirty_only;
}

const char *
disk_view_name (const struct disk_view *v)
{
  return v->name;
}

struct disk_offers *
disk_view_offers (const struct disk_view *v)
{
  return offers_ref (v->offers);
}

void
disk_view_hold (struct disk_view *v)
{
  atomic_fetch_add (&v->clients, 1);
}

void
disk_view_release (struct disk_view *v)
{
  const unsigned old = atomic_fetch_sub (&v->clients, 1);

  assert (old > 0);
  (void) old;
}

/* After a read: is what was read the view's? */
static int
check_readable (const struct disk_view *v)
{
  if (is_broken (v))
    report_error ("the view of bitmap '%s' is broken: %s", v->name,
                  why_broken (v));
  else if (atomic_load (&v->has_ended))
    report_error ("the backup of bitmap '%s' has ended, and its view with it",
                  v->name);
  else
    return 0;
  errno = EIO;
  return -1;
}

/* A piece of what was kept. */
static int
read_kept (struct disk_view *v, uint64_t offset, enum kept_state state,
           uint64_t length, struct qcow2_chunk *c)
{
  c->is_hole = state == KEPT_ZERO;
  if (c->is_hole) {
    c->length = length;
    return 0;
  }
  c->length = c->buf == NULL ? 0 : min_u64 (length, c->count);
  return kept_read (&v->kept, c->buf, c->length, offset);
}

/* What was read comes before this, and the look at the states after it.  That
 * is what a fence is for, but ThreadSanitizer does not know fences.
 */
static void
before_second_look (struct disk_view *v)
{
  atomic_fetch_add (&v->second_looks, 1);
}

/* A piece of what is still on the disk.  1 if it was kept meanwhile. */
static int
read_live (struct disk_view *v, uint64_t offset, uint64_t length,
           struct qcow2_chunk *c)
{
  struct qcow2_chunk piece = *c;
  uint64_t valid;

  piece.count = min_u64 (length, c->count);
  piece.limit = length;
  if (disk_read_chunk (v->disk, offset, &piece) == -1)
    return -1;
  before_second_look (v);
  if (kept_run (&v->kept, offset, offset + max_u64 (piece.length, 1),
                &valid) != KEPT_NOT)
    return 1;
  c->is_hole = piece.is_hole;
  c->length = min_u64 (piece.length, valid);
  return 0;
}

/* A piece in one state, which may be shorter than what is asked for. */
static int
read_piece (void *opaque, uint64_t offset, struct qcow2_chunk *c)
{
  struct disk_view *v = opaque;
  int r;

  do {
    uint64_t length;
    const enum kept_state state = kept_run (&v->kept, offset,
                                            offset + c->limit, &length);

    if (state != KEPT_NOT)
      return read_kept (v, offset, state, length, c);
    r = read_live (v, offset, length, c);
  } while (r == 1);
  return r;
}

/* Does the view show the range?  Clean parts of the disk may have changed, so
 * what is there now would be of no moment.
 */
static int
check_shown (const struct disk_view *v, uint64_t offset, uint64_t count)
{
  const uint64_t limit = offset + count;
  bool dirty = true;

  if (v->dirty_only)
    while (offset < limit && dirty)
      offset = end_of_run (v, offset, limit, &dirty);
  if (dirty)
    return 0;
  report_error ("the view of bitmap '%s' shows only what is dirty in it",
                v->name);
  errno = EIO;
  return -1;
}

int
disk_view_read_chunk (struct disk_view *v, uint64_t offset,
                      struct qcow2_chunk *c)
{
  int complete = 0;

  if (disk_check_range (v->disk, c->limit, offset) == -1 ||
      check_shown (v, offset, c->count) == -1)
    return -1;
  /* A hole may reach as far as what is shown. */
  if (v->dirty_only)
    c->limit = c->count;
  chunk_begin (c);
  while (complete == 0 && c->length < c->count)
    complete = chunk_add_read (c, chunk_limit (c), read_piece, v,
                               offset + c->length);
  return complete == -1 ? -1 : check_readable (v);
}

int
disk_view_read (struct disk_view *v, void *buf, uint32_t count,
                uint64_t offset)
{
  uint8_t *p = buf;

  if (disk_check_range (v->disk, count, offset) == -1)
    return -1;
  while (count > 0) {
    struct qcow2_chunk c = {
      .buf = p, .count = count, .limit = count, .min_hole = UINT64_MAX,
    };

    if (disk_view_read_chunk (v, offset, &c) == -1)
      return -1;
    if (c.is_hole)
      memset (p, 0, c.length);
    p += c.length;
    offset += c.length;
    count -= c.length;
  }
  return 0;
}

/* The extent of a unit that was kept says data or a hole. */
static int
look_for_extent (struct disk_view *v, uint64_t offset, uint64_t limit,
                 uint64_t *length, uint32_t *flags)
{
  for (;;) {
    enum kept_state state = kept_run (&v->kept, offset, limit, length);
    uint64_t run = *length, valid;

    if (state != KEPT_NOT) {
      *flags = state == KEPT_ZERO ? DISK_EXTENT_HOLE | DISK_EXTENT_ZERO : 0;
      return 0;
    }
    if (disk_extent (v->disk, offset, offset + run, length, flags) == -1)
      return -1;
    before_second_look (v);
    state = kept_run (&v->kept, offset, offset + *length, &valid);
    if (state == KEPT_NOT) {
      *length = valid;
      return 0;
    }
  }
}

/* How far this looks at first.  What was kept and what the disk has end in
 * different places, and neither is walked much further than the other goes.
 */
#define FIRST_REACH ((uint64_t) 1 << 20)

static int
get_extent (struct disk_view *v, uint64_t offset, uint64_t limit,
            uint64_t *length, uint32_t *flags)
{
  for (uint64_t reach = FIRST_REACH;; reach *= 4) {
    const uint64_t n = min_u64 (limit - offset, reach);

    if (look_for_extent (v, offset, offset + n, length, flags) == -1)
      return -1;
    if (*length < n || n == limit - offset)
      return 0;
  }
}

int
disk_view_extent (struct disk_view *v, uint64_t offset, uint64_t limit,
                  uint64_t *length, uint32_t *flags)
{
  if (disk_check_extent (v->disk, offset, limit) == -1)
    return -1;
  if (v->dirty_only) {
    bool dirty;

    limit = end_of_run (v, offset, limit, &dirty);
    if (!dirty) {
      *length = limit - offset;
      *flags = 0;
      return check_readable (v);
    }
  }
  return get_extent (v, offset, limit, length, flags) == -1 ? -1
    : check_readable (v);
}
