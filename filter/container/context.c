/* nbdkit-dirty-bitmap-filter
 * SPDX-License-Identifier: BSD-3-Clause
 * Copyright the nbdkit-dirty-bitmap-filter authors
 */

/* A context of nbdkit's plugin that belongs to no connection.
 *
 * How this works
 *
 * nbdkit lets a filter open a context of the plugin that belongs to no
 * connection.  nbdkit remembers the context's first answers (its size, what
 * it can do) in plain integers, and aborts the server on a request that was
 * not preceded by the question.  So the thread that opens the context asks all
 * questions before any other thread knows the context.
 *
 * nbdkit enforces the thread model of the plugin for its own connections
 * only.  Here requests come from other threads, so a context can have a lock
 * that is held around each call.
 */

#include <config.h>

#include <errno.h>
#include <stdlib.h>

#include <nbdkit-filter.h>

#include "common/bytes.h"
#include "common/report.h"
#include "container/context.h"
#include "container/fd.h"

/* nbdkit allows 64 MiB in a request that carries data.  A request without
 * data is limited only by its 32 bit count.
 */
#define MAX_DATA_BYTES ((uint32_t) 64 << 20)
#define MAX_ZERO_BYTES ((uint32_t) 1 << 30)

static int
ask_for_flags (struct plugin_context *ctx)
{
  nbdkit_next *next = ctx->next;
  const int write = next->can_write (next);
  const int flush = write == -1 ? -1 : next->can_flush (next);
  const int rotational = flush == -1 ? -1 : next->is_rotational (next);
  int trim, zero, zero_fast, cache, extents, fua;

  if (rotational == -1 ||
      (trim = next->can_trim (next)) == -1 ||
      (zero = next->can_zero (next)) == -1 ||
      (zero_fast = next->can_fast_zero (next)) == -1 ||
      (extents = next->can_extents (next)) == -1 ||
      (fua = next->can_fua (next)) == -1 ||
      next->can_multi_conn (next) == -1 ||
      (cache = next->can_cache (next)) == -1)
    return -1;

  ctx->can_write = write;
  ctx->can_flush = flush;
  ctx->is_rotational = rotational;
  ctx->can_zero = zero != NBDKIT_ZERO_NONE;
  ctx->can_zero_fast = ctx->can_zero && zero_fast;
  ctx->can_trim = trim;
  ctx->can_fua = fua == NBDKIT_FUA_NATIVE;
  ctx->can_cache = cache == NBDKIT_CACHE_NATIVE;
  ctx->can_extents = extents;
  return 0;
}

/* Ask everything that nbdkit requires, and keep the answers. */
static int
prime_context (struct plugin_context *ctx)
{
  nbdkit_next *next = ctx->next;
  uint32_t minimum, preferred, maximum;
  int64_t size;

  if (next->prepare (next) == -1 ||
      (size = next->get_size (next)) == -1 ||
      next->block_size (next, &minimum, &preferred, &maximum) == -1 ||
      ask_for_flags (ctx) == -1)
    return -1;                  /* nbdkit or the plugin reported why. */

  if (minimum == 0)
    minimum = 1;
  if (maximum == 0)
    maximum = UINT32_MAX;
  if (!is_power_of_2 (minimum) || minimum > CONTEXT_MAX_BLOCK_BYTES ||
      maximum < minimum) {
    report_error ("the plugin below asks for blocks of %u to %u bytes, "
                  "which is not possible", minimum, maximum);
    return -1;
  }

  ctx->plugin_size = size;
  ctx->size = round_down (size, minimum);
  ctx->block_bytes = minimum;
  ctx->preferred_bytes = preferred;
  ctx->max_data_bytes = round_down (min_u64 (maximum, MAX_DATA_BYTES),
                                    minimum);
  ctx->max_zero_bytes = maximum == UINT32_MAX ? MAX_ZERO_BYTES
    : ctx->max_data_bytes;
  return 0;
}

void
context_close (struct plugin_context *ctx)
{
  ctx->next->finalize (ctx->next);
  nbdkit_next_context_close (ctx->next);
  free (ctx);
}

void
context_close_all (struct plugin_context *ctx)
{
  while (ctx != NULL) {
    struct plugin_context *older = ctx->older;

    context_close (ctx);
    ctx = older;
  }
}

struct plugin_context *
context_open (nbdkit_backend *backend, bool readonly)
{
  struct plugin_context *ctx = calloc (1, sizeof *ctx);

  if (ctx == NULL) {
    report_error ("malloc: %m");
    return NULL;
  }
  ctx->next = nbdkit_next_context_open (backend, readonly, "", 1);
  if (ctx->next == NULL) {
    free (ctx);
    return NULL;
  }
  if (prime_context (ctx) == -1) {
    context_close (ctx);
    return NULL;
  }
  return ctx;
}

/* The plugin has opened the file if this process has more descriptors of it
 * than before.
 */
struct plugin_context *
context_open_of_file (nbdkit_backend *backend, bool readonly,
                      const struct stat *file, bool *is_ours)
{
  unsigned before = 0, after = 0;
  struct plugin_context *ctx;

  if (fd_count_open (file, &before) == -1) {
    report_error ("/proc/self/fd: %m");
    return NULL;
  }
  ctx = context_open (backend, readonly);
  if (ctx == NULL)
    return NULL;
  if (fd_count_open (file, &after) == -1) {
    report_error ("/proc/self/fd: %m");
    context_close (ctx);
    return NULL;
  }
  *is_ours = after > before;
  return ctx;
}

static void
begin_call (struct plugin_context *ctx)
{
  if (ctx->serial_lock != NULL)
    pthread_mutex_lock (ctx->serial_lock);
}

/* Turn the result of a call into the container's: -1 and an errno. */
static int
end_call (struct plugin_context *ctx, int r, int err)
{
  if (ctx->serial_lock != NULL)
    pthread_mutex_unlock (ctx->serial_lock);
  if (r == 0)
    return 0;
  errno = err != 0 ? err : EIO;
  return -1;
}

int
context_pread (struct plugin_context *ctx, void *buf, uint64_t count,
               uint64_t offset)
{
  char *p = buf;

  while (count > 0) {
    const uint32_t len = min_u64 (count, ctx->max_data_bytes);
    int r, err = 0;

    begin_call (ctx);
    r = ctx->next->pread (ctx->next, p, len, offset, 0, &err);
    if (end_call (ctx, r, err) == -1)
      return -1;
    p += len;
    offset += len;
    count -= len;
  }
  return 0;
}

static int
pwrite_with_flags (struct plugin_context *ctx, const void *buf, uint64_t count,
                   uint64_t offset, uint32_t flags)
{
  const char *p = buf;

  while (count > 0) {
    const uint32_t len = min_u64 (count, ctx->max_data_bytes);
    int r, err = 0;

    begin_call (ctx);
    r = ctx->next->pwrite (ctx->next, p, len, offset, flags, &err);
    if (end_call (ctx, r, err) == -1)
      return -1;
    p += len;
    offset += len;
    count -= len;
  }
  return 0;
}

int
context_pwrite (struct plugin_context *ctx, const void *buf, uint64_t count,
                uint64_t offset)
{
  return pwrite_with_flags (ctx, buf, count, offset, 0);
}

int
context_pwrite_durable (struct plugin_context *ctx, const void *buf,
                        uint64_t count, uint64_t offset)
{
  return pwrite_with_flags (ctx, buf, count, offset, NBDKIT_FLAG_FUA);
}

static int
zero_with_flags (struct plugin_context *ctx, uint32_t count, uint64_t offset,
                 uint32_t flags)
{
  int r, err = 0;

  begin_call (ctx);
  r = ctx->next->zero (ctx->next, count, offset, flags, &err);
  return end_call (ctx, r, err);
}

int
context_zero (struct plugin_context *ctx, uint32_t count, uint64_t offset,
              bool punch)
{
  return zero_with_flags (ctx, count, offset,
                          punch ? NBDKIT_FLAG_MAY_TRIM : 0);
}

int
context_zero_fast (struct plugin_context *ctx, uint32_t count,
                   uint64_t offset, bool punch)
{
  const int r = zero_with_flags (ctx, count, offset, NBDKIT_FLAG_FAST_ZERO |
                                 (punch ? NBDKIT_FLAG_MAY_TRIM : 0));

  return r == -1 && (errno == ENOTSUP || errno == EOPNOTSUPP) ? 1 : r;
}

/* Trim, or cache, in parts of at most max_bytes. */
static int
in_parts (struct plugin_context *ctx,
          int (*call) (nbdkit_next *, uint32_t, uint64_t, uint32_t, int *),
          uint32_t max_bytes, uint64_t count, uint64_t offset)
{
  while (count > 0) {
    const uint32_t len = min_u64 (count, max_bytes);
    int r, err = 0;

    begin_call (ctx);
    r = call (ctx->next, len, offset, 0, &err);
    if (end_call (ctx, r, err) == -1)
      return -1;
    offset += len;
    count -= len;
  }
  return 0;
}

int
context_trim (struct plugin_context *ctx, uint64_t count, uint64_t offset)
{
  return in_parts (ctx, ctx->next->trim, ctx->max_zero_bytes, count, offset);
}

/* nbdkit has the extents of a plugin in a list, and merges neighbours. */
int
context_extent (struct plugin_context *ctx, uint64_t offset, uint64_t count,
                uint64_t *length, unsigned *flags)
{
  const uint32_t len = min_u64 (count, ctx->max_zero_bytes);
  struct nbdkit_extents *extents = nbdkit_extents_new (offset, offset + len);
  int r, err = 0;

  if (extents == NULL) {
    errno = ENOMEM;
    return -1;
  }
  begin_call (ctx);
  r = ctx->next->extents (ctx->next, len, offset, NBDKIT_FLAG_REQ_ONE, extents,
                          &err);
  r = end_call (ctx, r, err);
  *length = len;
  *flags = 0;
  if (r == 0 && nbdkit_extents_count (extents) > 0) {
    const struct nbdkit_extent e = nbdkit_get_extent (extents, 0);

    *length = min_u64 (e.length, len);
    *flags = e.type;
  }
  nbdkit_extents_free (extents);
  return r;
}

int
context_cache (struct plugin_context *ctx, uint64_t count, uint64_t offset)
{
  return in_parts (ctx, ctx->next->cache, ctx->max_data_bytes, count, offset);
}

int
context_flush (struct plugin_context *ctx)
{
  int r, err = 0;

  begin_call (ctx);
  r = ctx->next->flush (ctx->next, 0, &err);
  return end_call (ctx, r, err);
}
