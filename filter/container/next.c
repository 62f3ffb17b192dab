/* nbdkit-dirty-bitmap-filter
 * SPDX-License-Identifier: BSD-3-Clause
 * Copyright the nbdkit-dirty-bitmap-filter authors
 */

/* How this works
 *
 * nbdkit lets a filter open a context of the plugin that belongs to no
 * connection.  One such context, a "view", serves everybody.
 *
 * nbdkit remembers what a context said of itself (its size, what it
 * can do) the first time that it is asked, in plain integers, and
 * aborts the server on a request that was not preceded by the question,
 * or that goes beyond the size.  So:
 *
 * - A view is primed, all questions asked, by the one thread that opens
 *   it, and is published afterwards.
 * - The size of a view is fixed for ever.  To grow, the file is extended
 *   behind the plugin's back and a new view is opened, which sees the
 *   new size.  A request loads the container's size first (the door
 *   does, with acquire order) and the view second; the view is published
 *   before the size; so the view of a request is never smaller than the
 *   range that the door let through.
 * - Requests may still be inside an old view, so the old ones are kept
 *   until the container is closed.  Sizes grow geometrically: there are
 *   few.
 *
 * Nothing else on the way of a request is locked, unless the thread
 * model is less than parallel: nbdkit enforces that model for its
 * connections alone, and requests come from other threads here.
 */

#include <config.h>

#include <errno.h>
#include <inttypes.h>
#include <stdlib.h>
#include <sys/stat.h>
#include <unistd.h>

#include <nbdkit-filter.h>

#include "common/bytes.h"
#include "common/cleanup.h"
#include "common/report.h"
#include "container/container.h"
#include "container/next.h"

/* nbdkit allows 64 MiB in a request that carries data.  One that does
 * not is limited by its 32 bit count alone.
 */
#define MAX_DATA_BYTES ((uint32_t) 64 << 20)
#define MAX_ZERO_BYTES ((uint32_t) 1 << 30)

#define GROW_ALIGN ((uint64_t) 64 << 10)
#define GROW_MIN_STEP ((uint64_t) 16 << 20)
#define GROW_MAX_STEP ((uint64_t) 1 << 30)

struct view {
  nbdkit_next *next;
  uint64_t size;                /* bytes */
  struct view *older;
  uint32_t max_data_bytes;
  uint32_t max_zero_bytes;
  bool can_write;
  bool can_flush;
  bool can_zero;
  bool can_cache;
  bool is_rotational;
};

struct next {
  struct container c;
  nbdkit_backend *backend;
  bool serialize;
  int grow_fd;
  const char *cannot_grow;
  uint64_t original_size;       /* bytes, when we were opened */

  /* Changed under grow_lock, or before others know the container. */
  struct view *_Atomic view;

  /* Held around each call of the plugin if serialize.  The last lock
   * of all: the plugin knows none of ours.
   */
  pthread_mutex_t serial_lock;
};

static const char zeroes[1 << 20];

static struct view *
current_view (struct next *n)
{
  return atomic_load_explicit (&n->view, memory_order_acquire);
}

static void
begin_call (struct next *n)
{
  if (n->serialize)
    pthread_mutex_lock (&n->serial_lock);
}

/* Turn the result of a call into the container's: -1 and an errno. */
static int
end_call (struct next *n, int r, int err)
{
  if (n->serialize)
    pthread_mutex_unlock (&n->serial_lock);
  if (r == 0)
    return 0;
  errno = err != 0 ? err : EIO;
  return -1;
}

static int
next_pread (struct container *c, void *buf, size_t count, uint64_t offset)
{
  struct next *n = (struct next *) c;
  struct view *v = current_view (n);
  char *p = buf;

  while (count > 0) {
    const uint32_t len = min_u64 (count, v->max_data_bytes);
    int r, err = 0;

    begin_call (n);
    r = v->next->pread (v->next, p, len, offset, 0, &err);
    if (end_call (n, r, err) == -1)
      return -1;
    p += len;
    offset += len;
    count -= len;
  }
  return 0;
}

static int
next_pwrite (struct container *c, const void *buf, size_t count,
             uint64_t offset)
{
  struct next *n = (struct next *) c;
  struct view *v = current_view (n);
  const char *p = buf;

  while (count > 0) {
    const uint32_t len = min_u64 (count, v->max_data_bytes);
    int r, err = 0;

    begin_call (n);
    r = v->next->pwrite (v->next, p, len, offset, 0, &err);
    if (end_call (n, r, err) == -1)
      return -1;
    p += len;
    offset += len;
    count -= len;
  }
  return 0;
}

static int
next_zero (struct container *c, uint64_t count, uint64_t offset, bool punch)
{
  struct next *n = (struct next *) c;
  struct view *v = current_view (n);
  const uint32_t flags = punch ? NBDKIT_FLAG_MAY_TRIM : 0;

  while (count > 0) {
    uint32_t len;
    int r, err = 0;

    if (!v->can_zero) {
      len = min_u64 (count, sizeof zeroes);
      if (next_pwrite (c, zeroes, len, offset) == -1)
        return -1;
    }
    else {
      len = min_u64 (count, v->max_zero_bytes);
      begin_call (n);
      r = v->next->zero (v->next, len, offset, flags, &err);
      if (end_call (n, r, err) == -1)
        return -1;
    }
    offset += len;
    count -= len;
  }
  return 0;
}

static int
next_cache (struct container *c, uint64_t count, uint64_t offset)
{
  struct next *n = (struct next *) c;
  struct view *v = current_view (n);

  if (!v->can_cache)
    return 0;
  while (count > 0) {
    const uint32_t len = min_u64 (count, v->max_data_bytes);
    int r, err = 0;

    begin_call (n);
    r = v->next->cache (v->next, len, offset, 0, &err);
    if (end_call (n, r, err) == -1)
      return -1;
    offset += len;
    count -= len;
  }
  return 0;
}

static int
next_flush (struct container *c)
{
  struct next *n = (struct next *) c;
  struct view *v = current_view (n);
  int r, err = 0;

  if (!v->can_flush)
    return 0;                   /* The user was warned at the start. */
  begin_call (n);
  r = v->next->flush (v->next, 0, &err);
  return end_call (n, r, err);
}

/* Ask all that nbdkit wants to have been asked, and keep the answers. */
static int
prime_view (struct view *v)
{
  nbdkit_next *next = v->next;
  int64_t size;
  int write, flush, rotational, zero, cache;
  uint32_t minimum, preferred, maximum;

  if (next->prepare (next) == -1 ||
      (size = next->get_size (next)) == -1 ||
      next->block_size (next, &minimum, &preferred, &maximum) == -1 ||
      (write = next->can_write (next)) == -1 ||
      (flush = next->can_flush (next)) == -1 ||
      (rotational = next->is_rotational (next)) == -1 ||
      next->can_trim (next) == -1 ||
      (zero = next->can_zero (next)) == -1 ||
      next->can_fast_zero (next) == -1 ||
      next->can_extents (next) == -1 ||
      next->can_fua (next) == -1 ||
      next->can_multi_conn (next) == -1 ||
      (cache = next->can_cache (next)) == -1)
    return -1;                  /* nbdkit or the plugin said why. */

  if (minimum > 1) {
    report_error ("the plugin below takes only requests aligned to %u bytes: "
                  "add --filter=blocksize after --filter=dirty-bitmap",
                  minimum);
    return -1;
  }

  v->size = size;
  v->max_data_bytes = MAX_DATA_BYTES;
  v->max_zero_bytes = MAX_ZERO_BYTES;
  if (maximum != 0 && maximum != UINT32_MAX) {
    v->max_data_bytes = min_u64 (maximum, MAX_DATA_BYTES);
    v->max_zero_bytes = min_u64 (maximum, MAX_ZERO_BYTES);
  }
  v->can_write = write;
  v->can_flush = flush;
  v->is_rotational = rotational;
  v->can_zero = zero != NBDKIT_ZERO_NONE;
  v->can_cache = cache == NBDKIT_CACHE_NATIVE;
  return 0;
}

/* Called where no other thread can be inside the plugin if it is not
 * made for that.
 */
static void
close_view (struct view *v)
{
  v->next->finalize (v->next);
  nbdkit_next_context_close (v->next);
  free (v);
}

static struct view *
open_view (struct next *n, bool readonly)
{
  struct view *v = calloc (1, sizeof *v);

  if (v == NULL) {
    report_error ("malloc: %m");
    return NULL;
  }
  v->next = nbdkit_next_context_open (n->backend, readonly, "", 1);
  if (v->next == NULL) {
    free (v);
    return NULL;
  }
  if (prime_view (v) == -1) {
    close_view (v);
    return NULL;
  }
  return v;
}

static int
cannot_grow (const char *why)
{
  report_error ("no space left in the image, and its storage cannot grow: %s",
                why);
  errno = ENOSPC;
  return -1;
}

/* Extend the file, which has file_size bytes, to at least size bytes.
 * Far more than that if the file system lets us, so that it is done
 * seldom: what is added is a hole, and a clean stop cuts off what was
 * not used.
 */
static int
extend_file (struct next *n, uint64_t file_size, uint64_t size)
{
  const uint64_t step =
    min_u64 (max_u64 (file_size / 8, GROW_MIN_STEP), GROW_MAX_STEP);
  const uint64_t max = round_down (INT64_MAX, GROW_ALIGN);
  uint64_t target;

  if (size <= file_size)
    return 0;                   /* Never cut what we do not know. */
  if (size < max - step - GROW_ALIGN) {
    target = round_up (max_u64 (size, file_size + step), GROW_ALIGN);
    if (ftruncate (n->grow_fd, target) == 0)
      return 0;
  }
  if (ftruncate (n->grow_fd, size) == 0)
    return 0;
  if (errno == EFBIG || errno == EDQUOT)
    errno = ENOSPC;
  return -1;
}

/* Open a view of the file that was extended.  NULL with errno if the
 * plugin does not show at least size bytes, writable.
 */
static struct view *
open_larger_view (struct next *n, uint64_t size)
{
  struct view *v;

  begin_call (n);
  v = open_view (n, false);
  if (v != NULL && (v->size < size || !v->can_write)) {
    close_view (v);
    v = NULL;
    n->grow_fd = -1;
    n->cannot_grow = "the plugin does not see that its file was extended";
  }
  end_call (n, 0, 0);
  if (v == NULL)
    errno = EIO;
  return v;
}

static int
next_grow (struct container *c, uint64_t size)
{
  struct next *n = (struct next *) c;
  const int fd = n->grow_fd;
  struct stat statbuf;
  struct view *v;

  if (fd == -1)
    return cannot_grow (n->cannot_grow);
  if (fstat (fd, &statbuf) == -1 ||
      extend_file (n, statbuf.st_size, size) == -1)
    return -1;

  v = open_larger_view (n, size);
  if (v == NULL) {
    const int err = errno;

    if (ftruncate (fd, statbuf.st_size) == -1)
      report_warning ("ftruncate: cannot undo an extension: %m");
    if (n->grow_fd == -1)
      return cannot_grow (n->cannot_grow);
    errno = err;
    return -1;
  }

  report_debug ("extended the image's file from %" PRIu64 " to %" PRIu64
                " bytes", container_size (c), v->size);
  v->older = current_view (n);
  atomic_store_explicit (&n->view, v, memory_order_release);
  atomic_store_explicit (&c->size, v->size, memory_order_release);
  return 0;
}

static int
next_truncate (struct container *c, uint64_t size)
{
  struct next *n = (struct next *) c;

  /* What was there before us is not ours to cut. */
  size = max_u64 (size, n->original_size);
  if (n->grow_fd == -1 || size >= container_size (c))
    return 0;
  if (ftruncate (n->grow_fd, size) == -1)
    return -1;
  atomic_store_explicit (&c->size, size, memory_order_release);
  return 0;
}

static void
next_close (struct container *c)
{
  struct next *n = (struct next *) c;
  struct view *v, *older;

  for (v = current_view (n); v != NULL; v = older) {
    older = v->older;
    close_view (v);
  }
  pthread_mutex_destroy (&n->serial_lock);
  free (n);
}

static const struct container_ops next_ops = {
  .pread = next_pread,
  .pwrite = next_pwrite,
  .zero = next_zero,
  .cache = next_cache,
  .flush = next_flush,
  .grow = next_grow,
  .truncate = next_truncate,
  .close = next_close,
};

struct container *
container_open_next (const struct container_next_options *options)
{
  struct next *n = calloc (1, sizeof *n);
  struct view *v;
  bool readonly = options->readonly;

  if (n == NULL) {
    report_error ("malloc: %m");
    return NULL;
  }
  n->backend = options->backend;
  n->serialize = options->serialize;
  n->grow_fd = -1;
  n->cannot_grow = "no file is known";

  v = open_view (n, readonly);
  if (v == NULL) {
    free (n);
    return NULL;
  }
  if (!readonly && !v->can_write) {
    report_warning ("the storage below is read-only, "
                    "and so is the disk that is served");
    readonly = true;
  }
  if (!readonly && !v->can_flush)
    report_warning ("the storage below cannot flush: "
                    "what clients write may be lost by a crash");

  container_init (&n->c, &next_ops, v->size, readonly);
  pthread_mutex_init (&n->serial_lock, NULL);
  n->original_size = v->size;
  atomic_init (&n->view, v);
  return &n->c;
}

void
container_next_set_growth (struct container *c, int fd, const char *why_not)
{
  struct next *n = (struct next *) c;

  n->grow_fd = fd;
  n->cannot_grow = why_not;
}

bool
container_next_is_rotational (struct container *c)
{
  return current_view ((struct next *) c)->is_rotational;
}
