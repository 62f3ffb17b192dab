/* nbdkit-dirty-bitmap-filter
 * SPDX-License-Identifier: BSD-3-Clause
 * Copyright the nbdkit-dirty-bitmap-filter authors
 */

/* How this works
 *
 * One context of the plugin, a "view", serves all clients (view.c).
 *
 * - The size of a view never changes, and nbdkit aborts the server on a
 *   request beyond it.  To grow, the file is extended behind the plugin's
 *   back and a new view is opened, which sees the new size.  A request loads
 *   the container's size first (the door does, with acquire order) and the
 *   view second; the view is published before the size; so the view of a
 *   request always covers the range that the door let through, except for
 *   the tail, below.
 * - Requests may still be inside an old view.  It is closed after a grace
 *   period (common/grace.h), by the next flush or growth that finds it
 *   ended.  If the container cannot grow, requests enter no section.
 *
 * The plugin opens its file by name, and by then the name may lead to
 * another file.  So before a view is used, it is checked that the plugin
 * opened a descriptor of the very file that was checked and locked.  If it
 * did not, the view is closed, and nothing was read from it or written to
 * it.
 *
 * The tail is the end of the container that a view does not reach.  If
 * requests must be of whole blocks (a plugin's minimum block size, or
 * nbdkit's blocksize filter), the last bytes may not fill a block.  They are
 * read once, at the start, and kept in memory.  A write to them extends the
 * file first, so that the next view reaches them.
 *
 * A request takes no other lock, unless the thread model is less than
 * parallel (view.c).
 */

#include <config.h>

#include <errno.h>
#include <inttypes.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

#include <nbdkit-filter.h>

#include "common/bytes.h"
#include "common/cleanup.h"
#include "common/grace.h"
#include "common/report.h"
#include "container/container.h"
#include "container/fd.h"
#include "container/next.h"
#include "container/view.h"

struct next {
  struct container c;
  struct grace users;           /* of views, if the container can grow */
  nbdkit_backend *backend;
  bool serialize;

  int fd;                       /* of the plugin's file, or -1 */
  struct stat file;             /* as it was when we were opened */
  const char *path;
  bool same_bytes;
  bool is_disk;

  bool can_grow;
  const char *cannot_grow;      /* the reason, or NULL */
  char *has_moved;              /* the message if the path leads to another
                                   file */
  uint64_t original_size;       /* bytes, when we were opened */

  uint8_t *tail;                /* of tail_bytes, or NULL */
  uint64_t tail_offset;
  uint32_t tail_bytes;

  /* The alignment that zeroes need, as far as is known; 0 if the plugin
   * cannot zero at all.  Only rises, or becomes 0.
   */
  _Atomic uint32_t zero_alignment;

  /* Changed under grow_lock, or before other threads know the container. */
  struct view *_Atomic view;

  /* Replaced views, under grow_lock: those that are closed when a grace
   * period ends, and those that were replaced after it began.
   */
  struct view *leaving, *replaced;
  grace_period period;

  /* Held around each call of the plugin if serialize.  It is taken last: the
   * plugin knows none of our locks.
   */
  pthread_mutex_t serial_lock;
};

static const char zeroes[1 << 20];

static struct view *
current_view (struct next *n)
{
  return atomic_load_explicit (&n->view, memory_order_acquire);
}

/* A view while a request uses it. */
struct use {
  struct view *view;
  grace_ticket ticket;
};

static struct use
begin_use (struct next *n)
{
  struct use u = { 0 };

  if (n->can_grow)
    u.ticket = grace_enter (&n->users);
  u.view = current_view (n);
  return u;
}

static void
end_use (struct next *n, const struct use *u)
{
  if (n->can_grow)
    grace_leave (&n->users, u->ticket);
}

/* Read bytes beyond the view. */
static void
read_tail (const struct next *n, char *buf, uint64_t count, uint64_t offset)
{
  const uint64_t skip = offset - n->tail_offset;
  const uint64_t inside =
    skip < n->tail_bytes ? min_u64 (count, n->tail_bytes - skip) : 0;

  if (inside > 0)
    memcpy (buf, n->tail + skip, inside);
  memset (buf + inside, 0, count - inside);
}

static int
next_pread (struct container *c, void *buf, size_t count, uint64_t offset)
{
  struct next *n = (struct next *) c;
  const struct use u = begin_use (n);
  const uint64_t inside = offset >= u.view->size ? 0
    : min_u64 (count, u.view->size - offset);
  const int r = view_pread (u.view, buf, inside, offset);

  end_use (n, &u);
  if (r == 0 && inside < count)
    read_tail (n, (char *) buf + inside, count - inside, offset + inside);
  return r;
}

static int grow_over_tail (struct next *n, uint64_t end);

/* Use a view that reaches as far as end. */
static int
begin_change (struct next *n, uint64_t end, struct use *u)
{
  for (;;) {
    *u = begin_use (n);
    if (end <= u->view->size)
      return 0;
    end_use (n, u);
    if (grow_over_tail (n, end) == -1)
      return -1;
  }
}

static int
next_pwrite (struct container *c, const void *buf, size_t count,
             uint64_t offset)
{
  struct next *n = (struct next *) c;
  struct use u;
  int r;

  if (begin_change (n, offset + count, &u) == -1)
    return -1;
  r = view_pwrite (u.view, buf, count, offset);
  end_use (n, &u);
  return r;
}

/* The plugin has refused to zero, as it does for ranges that are not aligned
 * to blocks of the storage.  The size of these blocks is not known.
 */
static void
raise_zero_alignment (struct next *n, uint32_t tried)
{
  const uint32_t next = tried < 4096 ? 4096
    : tried < VIEW_MAX_BLOCK_BYTES ? VIEW_MAX_BLOCK_BYTES : 0;

  report_debug ("the storage cannot make zeroes that are aligned to %u bytes",
                tried);
  atomic_compare_exchange_strong (&n->zero_alignment, &tried, next);
}

/* Zero part of a range, at least a byte.  Returns the number of bytes, 0 if
 * the caller must try again, or -1.
 */
static int64_t
zero_some (struct next *n, struct view *v, uint64_t count, uint64_t offset,
           bool punch)
{
  const uint32_t alignment =
    v->can_zero ? atomic_load_explicit (&n->zero_alignment,
                                        memory_order_relaxed) : 0;
  uint32_t len = 0;

  if (alignment != 0 && offset % alignment == 0)
    len = round_down (min_u64 (count, v->max_zero_bytes), alignment);
  if (len == 0) {
    len = min_u64 (count, sizeof zeroes);
    if (alignment > 1)
      len = min_u64 (len, alignment - offset % alignment);
    return view_pwrite (v, zeroes, len, offset) == -1 ? -1 : (int64_t) len;
  }

  if (view_zero (v, len, offset, punch) == 0)
    return len;
  if (errno != EINVAL && errno != EOPNOTSUPP)
    return -1;
  raise_zero_alignment (n, alignment);
  return 0;
}

static int
next_zero (struct container *c, uint64_t count, uint64_t offset, bool punch)
{
  struct next *n = (struct next *) c;
  struct use u;
  int64_t done = 0;

  if (begin_change (n, offset + count, &u) == -1)
    return -1;
  while (count > 0 && done != -1) {
    done = zero_some (n, u.view, count, offset, punch);
    if (done > 0) {
      offset += done;
      count -= done;
    }
  }
  end_use (n, &u);
  return done == -1 ? -1 : 0;
}

/* The next three use the current view outside a section: a disk has only one.
 *
 * If the plugin refuses after a part is done, that has changed no more than
 * the client asked for.
 */
static int
next_zero_fast (struct container *c, uint64_t count, uint64_t offset,
                bool punch)
{
  struct view *v = current_view ((struct next *) c);
  int r = 0;

  if (!v->can_zero_fast)
    return 1;
  while (count > 0 && r == 0) {
    const uint32_t len = min_u64 (count, v->max_zero_bytes);

    r = view_zero_fast (v, len, offset, punch);
    offset += len;
    count -= len;
  }
  return r;
}

static int
next_trim (struct container *c, uint64_t count, uint64_t offset)
{
  struct view *v = current_view ((struct next *) c);

  return v->can_trim ? view_trim (v, count, offset) : 0;
}

static int
next_pwrite_durable (struct container *c, const void *buf, size_t count,
                     uint64_t offset)
{
  struct next *n = (struct next *) c;
  struct view *v = current_view (n);

  return n->is_disk && v->can_fua ? view_pwrite_durable (v, buf, count, offset) : 1;
}

static int
next_cache (struct container *c, uint64_t count, uint64_t offset)
{
  struct next *n = (struct next *) c;
  const struct use u = begin_use (n);
  const uint64_t first = round_down (offset, c->block_bytes);
  const uint64_t end = min_u64 (round_up (offset + count, c->block_bytes),
                                u.view->size);
  int r = 0;

  if (u.view->can_cache && first < end)
    r = view_cache (u.view, end - first, first);
  end_use (n, &u);
  return r;
}

/* The extents of a disk are the plugin's.  Blocks that the request covers in
 * part are data.
 */
static int
disk_extent (struct next *n, uint64_t offset, uint64_t count,
             uint64_t *length, unsigned *flags)
{
  const uint32_t block = n->c.block_bytes;
  const uint64_t first = round_up (offset, block);
  struct view *v = current_view (n);

  if (first > offset || count < block) {
    *length = min_u64 (count, first > offset ? first - offset : count);
    return 0;
  }
  return view_extent (v, offset, round_down (count, block), length, flags);
}

/* Where the bytes are the file's, so are the holes. */
static int
next_extent (struct container *c, uint64_t offset, uint64_t count,
             uint64_t *length, unsigned *flags)
{
  struct next *n = (struct next *) c;
  const struct use u = begin_use (n);
  const bool can = u.view->can_extents;

  end_use (n, &u);
  *length = count;
  *flags = 0;
  if (can && n->is_disk)
    return disk_extent (n, offset, count, length, flags);
  if (can && n->same_bytes)
    fd_extent (n->fd, offset, count, length, flags);
  return 0;
}

static int
next_allocated (struct container *c, uint64_t *bytes)
{
  struct next *n = (struct next *) c;

  if (n->same_bytes)
    return fd_allocated (n->fd, bytes);
  errno = ENOTSUP;
  return -1;
}

/* Held while a view is opened or closed: no other thread may be inside the
 * plugin then, if the plugin is not made for that.
 */
static void
lock_serial (struct next *n)
{
  if (n->serialize)
    pthread_mutex_lock (&n->serial_lock);
}

static void
unlock_serial (struct next *n)
{
  if (n->serialize)
    pthread_mutex_unlock (&n->serial_lock);
}

/* With grow_lock held: close the views that no request can be using. */
static void
close_unused_views (struct next *n)
{
  if (n->leaving != NULL && grace_ended (&n->users, n->period)) {
    lock_serial (n);
    view_close_all (n->leaving);
    unlock_serial (n);
    n->leaving = NULL;
  }
  if (n->leaving == NULL && n->replaced != NULL) {
    n->leaving = n->replaced;
    n->replaced = NULL;
    n->period = grace_begin (&n->users);
  }
}

static int
next_flush (struct container *c)
{
  struct next *n = (struct next *) c;
  const struct use u = begin_use (n);
  /* If the plugin cannot flush, the user was warned at the start. */
  const int r = u.view->can_flush ? view_flush (u.view) : 0;
  const int err = errno;

  end_use (n, &u);
  if (n->can_grow && pthread_mutex_trylock (&c->grow_lock) == 0) {
    close_unused_views (n);
    pthread_mutex_unlock (&c->grow_lock);
  }
  errno = err;
  return r;
}

/* Does the path that the plugin opens still lead to the file? */
static bool
is_in_place (const struct next *n)
{
  struct stat statbuf;

  return stat (n->path, &statbuf) == 0 &&
    statbuf.st_dev == n->file.st_dev && statbuf.st_ino == n->file.st_ino;
}

static int
cannot_grow (const char *why)
{
  report_error ("no space left in the image, and its storage cannot grow: %s",
                why);
  errno = ENOSPC;
  return -1;
}

/* Open a view of the extended file.  NULL with errno if the plugin does not
 * show at least size bytes, of this file, writable.
 */
static struct view *
open_larger_view (struct next *n, uint64_t size)
{
  bool is_ours = true;
  struct view *v;
  int err;

  lock_serial (n);
  v = view_open_of_file (n->backend, false, &n->file, &is_ours);
  err = v == NULL ? EIO : ENOSPC;
  if (v != NULL && !is_ours) {
    cannot_grow (n->has_moved);
    view_close (v);
    v = NULL;
  }
  else if (v != NULL && (v->size < size || !v->can_write ||
                         v->block_bytes > n->c.block_bytes)) {
    n->cannot_grow = "the plugin does not see that its file was extended";
    cannot_grow (n->cannot_grow);
    view_close (v);
    v = NULL;
  }
  unlock_serial (n);
  if (v != NULL)
    v->serial_lock = n->serialize ? &n->serial_lock : NULL;
  errno = err;
  return v;
}

static int
next_grow (struct container *c, uint64_t size)
{
  struct next *n = (struct next *) c;
  struct stat statbuf;
  struct view *v;

  if (n->cannot_grow != NULL)
    return cannot_grow (n->cannot_grow);
  if (!is_in_place (n))
    return cannot_grow (n->has_moved);
  close_unused_views (n);
  if (fstat (n->fd, &statbuf) == -1 || fd_extend (n->fd, size) == -1)
    return -1;

  v = open_larger_view (n, size);
  if (v == NULL) {
    const int err = errno;

    if (ftruncate (n->fd, statbuf.st_size) == -1)
      report_warning ("ftruncate: cannot undo an extension: %m");
    errno = err;
    return -1;
  }

  report_debug ("extended the image's file from %" PRIu64 " to %" PRIu64
                " bytes", container_size (c), v->size);
  struct view *old = current_view (n);

  atomic_store_explicit (&n->view, v, memory_order_release);
  atomic_store_explicit (&c->size, v->size, memory_order_release);
  old->older = n->replaced;
  n->replaced = old;
  close_unused_views (n);
  return 0;
}

/* Extend the file to whole blocks, and more.  The door did not ask for this,
 * since the container is large enough.
 */
static int
grow_over_tail (struct next *n, uint64_t end)
{
  struct container *c = &n->c;

  ACQUIRE_LOCK_FOR_CURRENT_SCOPE (&c->grow_lock);
  if (end <= current_view (n)->size)
    return 0;                   /* Another thread was faster. */

  const uint64_t before = container_size (c);
  const int r = next_grow (c, round_up (end, VIEW_MAX_BLOCK_BYTES));

  tally_add (&c->grown_bytes, container_size (c) - before);
  return r;
}

static int
next_truncate (struct container *c, uint64_t size)
{
  struct next *n = (struct next *) c;

  /* Do not cut what was there before us. */
  size = max_u64 (size, n->original_size);
  if (!n->can_grow || size >= container_size (c))
    return 0;
  if (ftruncate (n->fd, size) == -1)
    return -1;
  atomic_store_explicit (&c->size, size, memory_order_release);
  return 0;
}

static void
free_next (struct next *n)
{
  free (n->tail);
  free (n->has_moved);
  free (n);
}

static void
next_close (struct container *c)
{
  struct next *n = (struct next *) c;

  view_close (current_view (n));
  view_close_all (n->leaving);
  view_close_all (n->replaced);
  pthread_mutex_destroy (&n->serial_lock);
  grace_free (&n->users);
  free_next (n);
}

static const struct container_ops next_ops = {
  .pread = next_pread,
  .pwrite = next_pwrite,
  .pwrite_durable = next_pwrite_durable,
  .zero = next_zero,
  .zero_fast = next_zero_fast,
  .trim = next_trim,
  .cache = next_cache,
  .flush = next_flush,
  .extent = next_extent,
  .allocated = next_allocated,
  .grow = next_grow,
  .truncate = next_truncate,
  .close = next_close,
};

/* Called before there is a container. */
static struct next *
new_next (const struct container_next_options *options)
{
  struct next *n = aligned_alloc (64, round_up (sizeof *n, 64));

  if (n == NULL) {
    report_error ("malloc: %m");
    return NULL;
  }
  memset (n, 0, sizeof *n);
  n->backend = options->backend;
  n->serialize = options->serialize;
  n->fd = options->fd;
  n->path = options->path;
  n->same_bytes = options->fd != -1 && options->same_bytes &&
    !options->is_disk;
  n->is_disk = options->is_disk;
  n->cannot_grow = options->is_disk ? "it is a disk" : "no file is known";
  atomic_init (&n->zero_alignment, 1);
  if (n->fd == -1)
    return n;

  if (fstat (n->fd, &n->file) == -1 ||
      asprintf (&n->has_moved, "'%s' no longer leads to the file that is "
                "served", n->path) == -1) {
    report_error ("%s: %m", n->path);
    n->has_moved = NULL;
    free_next (n);
    return NULL;
  }
  if (S_ISBLK (n->file.st_mode) && n->same_bytes)
    atomic_init (&n->zero_alignment, fd_zero_alignment (n->fd));
  return n;
}

/* A filter may open the plugin later, when this cannot check the file. */
static struct view *
open_first_view (struct next *n, bool readonly)
{
  bool is_ours = true;
  struct view *v = n->fd == -1 ? view_open (n->backend, readonly)
    : view_open_of_file (n->backend, readonly, &n->file, &is_ours);

  if (v == NULL || is_ours || is_in_place (n))
    return v;
  report_error ("%s: the plugin did not open the file that was checked and "
                "locked: it was renamed or replaced while nbdkit started",
                n->path);
  view_close (v);
  return NULL;
}

/* The size of the file, if the view shows the file up to its last whole
 * block, for blocks of some size.  Else the size of the view.
 */
static uint64_t
size_with_tail (const struct next *n, const struct view *v)
{
  const off_t file_size = n->same_bytes ? lseek (n->fd, 0, SEEK_END) : -1;

  if (file_size == -1)
    return v->plugin_size;
  for (uint32_t block = 1; block <= VIEW_MAX_BLOCK_BYTES; block *= 2)
    if (v->plugin_size == round_down (file_size, block))
      return file_size;
  return v->plugin_size;
}

static int
read_first_tail (struct next *n, struct view *v)
{
  struct container *file;
  int r;

  if (!n->same_bytes) {
    r = view_pread (v, n->tail, n->tail_bytes, n->tail_offset);
    if (r == -1)
      report_error ("the plugin below takes only requests of whole blocks of "
                    "%u bytes, so its last %u bytes cannot be read",
                    v->block_bytes, n->tail_bytes);
    return r;
  }
  file = container_open_file (n->fd);
  r = file == NULL ? -1 : container_pread (file, n->tail, n->tail_bytes,
                                           n->tail_offset);
  if (r == -1)
    report_error ("%s: %m", n->path);
  container_close (file);
  return r;
}

static int
find_tail (struct next *n, struct view *v)
{
  n->original_size = size_with_tail (n, v);
  n->tail_offset = v->size;
  n->tail_bytes = n->original_size - v->size;
  if (n->tail_bytes == 0)
    return 0;
  report_debug ("the last %u bytes are not a whole block of the plugin's",
                n->tail_bytes);
  n->tail = malloc (n->tail_bytes);
  if (n->tail == NULL) {
    report_error ("malloc: %m");
    return -1;
  }
  return read_first_tail (n, v);
}

struct container *
container_open_next (const struct container_next_options *options)
{
  struct next *n = new_next (options);
  struct view *v;
  bool readonly = options->readonly;

  if (n == NULL)
    return NULL;
  v = open_first_view (n, readonly);
  if (v == NULL || find_tail (n, v) == -1) {
    view_close_all (v);
    free_next (n);
    return NULL;
  }
  if (!readonly && !v->can_write) {
    report_warning ("the storage below is read-only, "
                    "so the disk is served read-only");
    readonly = true;
  }
  if (!readonly && !v->can_flush)
    report_warning ("the storage below cannot flush: "
                    "a crash may lose what clients write");

  v->serial_lock = n->serialize ? &n->serial_lock : NULL;
  container_init (&n->c, &next_ops, n->original_size, readonly);
  n->c.block_bytes = v->block_bytes;
  n->c.abilities = (struct container_abilities) {
    .zero = v->can_zero, .zero_fast = v->can_zero_fast,
    .trim = v->can_trim, .cache = v->can_cache, .flush = v->can_flush,
    .is_rotational = v->is_rotational, .preferred_bytes = v->preferred_bytes,
  };
  grace_init (&n->users);
  pthread_mutex_init (&n->serial_lock, NULL);
  atomic_init (&n->view, v);
  return &n->c;
}

void
container_next_set_growth (struct container *c, const char *why_not)
{
  struct next *n = (struct next *) c;

  n->can_grow = why_not == NULL;
  n->cannot_grow = why_not;
}
