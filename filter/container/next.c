/* nbdkit-dirty-bitmap-filter
 * SPDX-License-Identifier: BSD-3-Clause
 * Copyright the nbdkit-dirty-bitmap-filter authors
 */

/* A container over nbdkit's plugin.
 *
 * How this works
 *
 * One context of the plugin serves all clients (context.c).
 *
 * - The size of a context never changes, and nbdkit aborts the server on a
 *   request beyond it.  To grow, the file is extended behind the plugin's
 *   back and a new context is opened, which sees the new size.  A request
 *   loads the container's size first (the door does, with acquire order) and
 *   the context second; the context is published before the size; so the
 *   context of a request always covers the range that the door let through,
 *   except for the tail, below.
 * - Requests may still be inside an old context.  It is closed after a grace
 *   period (common/grace.h), by the next flush or growth that finds it
 *   ended.  If the container cannot grow, requests enter no section.
 *
 * The plugin opens its file by name, and by then the name may lead to
 * another file.  So before a context is used, it is checked that the plugin
 * opened a descriptor of the very file that was checked and locked.  If it
 * did not, the context is closed, and nothing was read from it or written to
 * it.
 *
 * The tail is the end of an image that a context does not reach.  If
 * requests must be of whole blocks (a plugin's minimum block size, or
 * nbdkit's blocksize filter), the last bytes may not fill a block.  They are
 * read once, at the start, and kept in memory.  A write to them extends the
 * file first, so that the next context reaches them.
 *
 * A request takes no other lock, unless the thread model is less than
 * parallel (context.c).
 */

#include <config.h>

#include <assert.h>
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
#include "common/lock.h"
#include "common/report.h"
#include "container/container.h"
#include "container/context.h"
#include "container/fd.h"
#include "container/next.h"

struct next {
  struct container c;
  struct grace users;           /* of contexts, if the container can grow */
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
  struct plugin_context *_Atomic context;

  /* Replaced contexts, under grow_lock: those that are closed when a grace
   * period ends, and those that were replaced after it began.
   */
  struct plugin_context *leaving, *replaced;
  grace_period period;

  /* Held around each call of the plugin if serialize.  It is taken last: the
   * plugin knows none of our locks.
   */
  pthread_mutex_t serial_lock;
};

static const char zeroes[1 << 20];

static struct plugin_context *
current_context (struct next *n)
{
  return atomic_load_explicit (&n->context, memory_order_acquire);
}

/* A context while a request uses it. */
struct use {
  struct plugin_context *context;
  grace_ticket ticket;
};

static struct use
begin_use (struct next *n)
{
  struct use u = { 0 };

  if (n->can_grow)
    u.ticket = grace_enter (&n->users);
  u.context = current_context (n);
  return u;
}

static void
end_use (struct next *n, const struct use *u)
{
  if (n->can_grow)
    grace_leave (&n->users, u->ticket);
}

/* Read bytes beyond the context. */
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
  const uint64_t inside = offset >= u.context->size ? 0
    : min_u64 (count, u.context->size - offset);
  const int r = context_pread (u.context, buf, inside, offset);

  end_use (n, &u);
  if (r == 0 && inside < count)
    read_tail (n, (char *) buf + inside, count - inside, offset + inside);
  return r;
}

static int grow_over_tail (struct next *n, uint64_t end);

/* Use a context that reaches as far as end. */
static int
begin_change (struct next *n, uint64_t end, struct use *u)
{
  for (;;) {
    *u = begin_use (n);
    if (end <= u->context->size)
      return 0;
    end_use (n, u);
    if (grow_over_tail (n, end) == -1)
      return -1;
  }
}

/* The last block of a disk may end beyond the disk, which never grows.  A
 * plugin that takes only whole blocks refuses what is left.
 */
static uint64_t
clip_to_disk (struct next *n, uint64_t count, uint64_t offset)
{
  return n->is_disk ? min_u64 (count, current_context (n)->size - offset)
    : count;
}

static int
next_pwrite (struct container *c, const void *buf, size_t count,
             uint64_t offset)
{
  struct next *n = (struct next *) c;
  struct use u;
  int r;

  count = clip_to_disk (n, count, offset);
  if (begin_change (n, offset + count, &u) == -1)
    return -1;
  r = context_pwrite (u.context, buf, count, offset);
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
    : tried < CONTEXT_MAX_BLOCK_BYTES ? CONTEXT_MAX_BLOCK_BYTES : 0;

  report_debug ("the storage cannot make zeroes that are aligned to %u bytes",
                tried);
  atomic_compare_exchange_strong (&n->zero_alignment, &tried, next);
}

/* Zero part of a range, at least a byte.  Returns the number of bytes, 0 if
 * the caller must try again, or -1.
 */
static int64_t
zero_some (struct next *n, struct plugin_context *ctx, uint64_t count,
           uint64_t offset, bool punch)
{
  const uint32_t alignment =
    ctx->can_zero ? atomic_load_explicit (&n->zero_alignment,
                                        memory_order_relaxed) : 0;
  uint32_t len = 0;

  if (alignment != 0 && offset % alignment == 0)
    len = round_down (min_u64 (count, ctx->max_zero_bytes), alignment);
  if (len == 0) {
    len = min_u64 (count, sizeof zeroes);
    if (alignment > 1)
      len = min_u64 (len, alignment - offset % alignment);
    return context_pwrite (ctx, zeroes, len, offset) == -1 ? -1
      : (int64_t) len;
  }

  if (context_zero (ctx, len, offset, punch) == 0)
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

  count = clip_to_disk (n, count, offset);
  if (begin_change (n, offset + count, &u) == -1)
    return -1;
  while (count > 0 && done != -1) {
    done = zero_some (n, u.context, count, offset, punch);
    if (done > 0) {
      offset += done;
      count -= done;
    }
  }
  end_use (n, &u);
  return done == -1 ? -1 : 0;
}

/* The next three use the current context outside a section: a disk has only
 * one.
 *
 * If the plugin refuses after a part is done, that has changed no more than
 * the client asked for.
 */
static int
next_zero_fast (struct container *c, uint64_t count, uint64_t offset,
                bool punch)
{
  struct plugin_context *ctx = current_context ((struct next *) c);
  int r = 0;

  if (!ctx->can_zero_fast)
    return 1;
  while (count > 0 && r == 0) {
    const uint32_t len = min_u64 (count, ctx->max_zero_bytes);

    r = context_zero_fast (ctx, len, offset, punch);
    offset += len;
    count -= len;
  }
  return r;
}

static int
next_trim (struct container *c, uint64_t count, uint64_t offset)
{
  struct plugin_context *ctx = current_context ((struct next *) c);

  return ctx->can_trim ? context_trim (ctx, count, offset) : 0;
}

static int
next_pwrite_durable (struct container *c, const void *buf, size_t count,
                     uint64_t offset)
{
  struct next *n = (struct next *) c;
  struct plugin_context *ctx = current_context (n);

  return n->is_disk && ctx->can_fua
    ? context_pwrite_durable (ctx, buf, count, offset) : 1;
}

static int
next_cache (struct container *c, uint64_t count, uint64_t offset)
{
  struct next *n = (struct next *) c;
  const struct use u = begin_use (n);
  const uint64_t first = round_down (offset, c->block_bytes);
  const uint64_t end = min_u64 (round_up (offset + count, c->block_bytes),
                                u.context->size);
  int r = 0;

  if (u.context->can_cache && first < end)
    r = context_cache (u.context, end - first, first);
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
  struct plugin_context *ctx = current_context (n);

  if (first > offset || count < block) {
    *length = min_u64 (count, first > offset ? first - offset : count);
    return 0;
  }
  return context_extent (ctx, offset, round_down (count, block), length,
                         flags);
}

/* Where the bytes are the file's, so are the holes. */
static int
next_extent (struct container *c, uint64_t offset, uint64_t count,
             uint64_t *length, unsigned *flags)
{
  struct next *n = (struct next *) c;
  const struct use u = begin_use (n);
  const bool can = u.context->can_extents;

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

/* Held while a context is opened or closed: no other thread may be inside the
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

/* With grow_lock held: close the contexts that no request can be using. */
static void
close_unused_contexts (struct next *n)
{
  assert (lock_is_mine (&n->c.grow_lock));
  if (n->leaving != NULL && grace_ended (&n->users, n->period)) {
    lock_serial (n);
    context_close_all (n->leaving);
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

  assert (lock_is_mine (&c->flush_lock));
  const struct use u = begin_use (n);
  /* If the plugin cannot flush, the user was warned at the start. */
  const int r = u.context->can_flush ? context_flush (u.context) : 0;
  const int err = errno;

  end_use (n, &u);
  if (n->can_grow && pthread_mutex_trylock (&c->grow_lock) == 0) {
    close_unused_contexts (n);
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

/* Open a context of the extended file.  NULL with errno if the plugin does not
 * show at least size bytes, of this file, writable.
 */
static struct plugin_context *
open_larger_context (struct next *n, uint64_t size)
{
  bool is_ours = true;
  struct plugin_context *ctx;
  int err;

  lock_serial (n);
  ctx = context_open_of_file (n->backend, false, &n->file, &is_ours);
  err = ctx == NULL ? EIO : ENOSPC;
  if (ctx != NULL && !is_ours) {
    cannot_grow (n->has_moved);
    context_close (ctx);
    ctx = NULL;
  }
  else if (ctx != NULL && (ctx->size < size || !ctx->can_write ||
                           ctx->block_bytes > n->c.block_bytes)) {
    n->cannot_grow = "the plugin does not see that its file was extended";
    cannot_grow (n->cannot_grow);
    context_close (ctx);
    ctx = NULL;
  }
  unlock_serial (n);
  if (ctx != NULL)
    ctx->serial_lock = n->serialize ? &n->serial_lock : NULL;
  errno = err;
  return ctx;
}

static int
next_grow (struct container *c, uint64_t size)
{
  struct next *n = (struct next *) c;
  struct stat statbuf;
  struct plugin_context *ctx;

  assert (lock_is_mine (&c->grow_lock));
  if (n->cannot_grow != NULL)
    return cannot_grow (n->cannot_grow);
  if (!is_in_place (n))
    return cannot_grow (n->has_moved);
  close_unused_contexts (n);
  if (fstat (n->fd, &statbuf) == -1 || fd_extend (n->fd, size) == -1)
    return -1;

  ctx = open_larger_context (n, size);
  if (ctx == NULL) {
    const int err = errno;

    if (ftruncate (n->fd, statbuf.st_size) == -1)
      report_warning ("ftruncate: cannot undo an extension: %m");
    errno = err;
    return -1;
  }

  report_debug ("extended the image's file from %" PRIu64 " to %" PRIu64
                " bytes", container_size (c), ctx->size);
  struct plugin_context *old = current_context (n);

  atomic_store_explicit (&n->context, ctx, memory_order_release);
  atomic_store_explicit (&c->size, ctx->size, memory_order_release);
  old->older = n->replaced;
  n->replaced = old;
  close_unused_contexts (n);
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
  if (end <= current_context (n)->size)
    return 0;                   /* Another thread was faster. */

  const uint64_t before = container_size (c);
  const int r = next_grow (c, round_up (end, CONTEXT_MAX_BLOCK_BYTES));

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

  context_close (current_context (n));
  context_close_all (n->leaving);
  context_close_all (n->replaced);
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
static struct plugin_context *
open_first_context (struct next *n, bool readonly)
{
  bool is_ours = true;
  struct plugin_context *ctx = n->fd == -1
    ? context_open (n->backend, readonly)
    : context_open_of_file (n->backend, readonly, &n->file, &is_ours);

  if (ctx == NULL || is_ours || is_in_place (n))
    return ctx;
  report_error ("%s: the plugin did not open the file that was checked and "
                "locked: it was renamed or replaced while nbdkit started",
                n->path);
  context_close (ctx);
  return NULL;
}

/* The size of the file, if the context shows the file up to its last whole
 * block, for blocks of some size.  Else the size of the context.
 */
static uint64_t
size_with_tail (const struct next *n, const struct plugin_context *ctx)
{
  const off_t file_size = n->same_bytes ? lseek (n->fd, 0, SEEK_END) : -1;

  if (file_size == -1)
    return ctx->plugin_size;
  for (uint32_t block = 1; block <= CONTEXT_MAX_BLOCK_BYTES; block *= 2)
    if (ctx->plugin_size == round_down (file_size, block))
      return file_size;
  return ctx->plugin_size;
}

static int
read_first_tail (struct next *n, struct plugin_context *ctx)
{
  struct container *file;
  int r;

  if (!n->same_bytes) {
    r = context_pread (ctx, n->tail, n->tail_bytes, n->tail_offset);
    if (r == -1)
      report_error ("the plugin below takes only requests of whole blocks of "
                    "%u bytes, so its last %u bytes cannot be read",
                    ctx->block_bytes, n->tail_bytes);
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
find_tail (struct next *n, struct plugin_context *ctx)
{
  n->original_size = size_with_tail (n, ctx);
  n->tail_offset = ctx->size;
  n->tail_bytes = n->original_size - ctx->size;
  if (n->tail_bytes == 0)
    return 0;
  report_debug ("the last %u bytes are not a whole block of the plugin's",
                n->tail_bytes);
  n->tail = malloc (n->tail_bytes);
  if (n->tail == NULL) {
    report_error ("malloc: %m");
    return -1;
  }
  return read_first_tail (n, ctx);
}

struct container *
container_open_next (const struct container_next_options *options)
{
  struct next *n = new_next (options);
  struct plugin_context *ctx;
  bool readonly = options->readonly;

  if (n == NULL)
    return NULL;
  ctx = open_first_context (n, readonly);
  if (ctx != NULL && n->is_disk)
    ctx->size = ctx->plugin_size;
  if (ctx == NULL || find_tail (n, ctx) == -1) {
    context_close_all (ctx);
    free_next (n);
    return NULL;
  }
  if (!readonly && !ctx->can_write) {
    report_warning ("the storage below is read-only, "
                    "so the disk is served read-only");
    readonly = true;
  }
  if (!readonly && !ctx->can_flush)
    report_warning ("the storage below cannot flush: "
                    "a crash may lose what clients write");

  ctx->serial_lock = n->serialize ? &n->serial_lock : NULL;
  container_init (&n->c, &next_ops, n->original_size, readonly);
  n->c.block_bytes = ctx->block_bytes;
  n->c.abilities = (struct container_abilities) {
    .zero = ctx->can_zero, .zero_fast = ctx->can_zero_fast,
    .trim = ctx->can_trim, .cache = ctx->can_cache, .flush = ctx->can_flush,
    .is_rotational = ctx->is_rotational,
    .preferred_bytes = ctx->preferred_bytes,
  };
  grace_init (&n->users);
  pthread_mutex_init (&n->serial_lock, NULL);
  atomic_init (&n->context, ctx);
  return &n->c;
}

void
container_next_set_growth (struct container *c, const char *why_not)
{
  struct next *n = (struct next *) c;

  n->can_grow = why_not == NULL;
  n->cannot_grow = why_not;
}
