/* nbdkit-dirty-bitmap-filter
 * SPDX-License-Identifier: BSD-3-Clause
 * Copyright the nbdkit-dirty-bitmap-filter authors
 */

/* How a unit is kept
 *
 * The thread that is about to change a unit reads it from the disk, writes it
 * to the scratch file, and then sets its state.  The change comes after that.
 * Other threads that are about to change the same unit wait meanwhile.
 * Readers of the view never wait, and no thread waits for them.
 *
 * The scratch file is sparse, so the pieces of a unit that read as zeroes are
 * not written.
 */

#include <config.h>

#include <assert.h>
#include <errno.h>
#include <fcntl.h>
#include <inttypes.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "common/bytes.h"
#include "common/cleanup.h"
#include "common/lock.h"
#include "common/report.h"
#include "container/fd.h"
#include "disk/kept.h"
#include "qcow2/qcow2.h"

/* Units of a block of states. */
#define BLOCK_UNITS UINT64_C (4096)

#define TEMPLATE "/nbdkit-dirty-bitmap-view-XXXXXX"

/* On file systems that cannot make a file without a name. */
static int
open_and_unlink (const char *folder)
{
  CLEANUP_FREE char *path = NULL;
  int fd;

  if (asprintf (&path, "%s" TEMPLATE, folder) == -1) {
    path = NULL;
    return -1;
  }
  fd = mkostemp (path, O_CLOEXEC);
  if (fd != -1)
    unlink (path);
  return fd;
}

static int
open_scratch (const char *folder)
{
  int fd = open (folder, O_TMPFILE | O_RDWR | O_CLOEXEC, 0600);

  if (fd == -1 && (errno == EOPNOTSUPP || errno == EISDIR || errno == EINVAL))
    fd = open_and_unlink (folder);
  if (fd == -1)
    report_error ("cannot make a scratch file for a view in %s: %m", folder);
  return fd;
}

static int
take_memory (struct kept *k, uint64_t bytes)
{
  if (atomic_fetch_add (&k->memory, bytes) + bytes <= k->max_memory)
    return 0;
  atomic_fetch_sub (&k->memory, bytes);
  report_error ("the view would take more than %" PRIu64 " bytes of memory",
                k->max_memory);
  errno = ENOMEM;
  return -1;
}

int
kept_open (struct kept *k, const char *folder, uint64_t size,
           uint64_t max_bytes, uint64_t max_memory)
{
  *k = (struct kept) {
    .fd = -1, .size = size, .max_bytes = max_bytes, .max_memory = max_memory,
    .nr_blocks = div_round_up (size, BLOCK_UNITS * UNIT_BYTES),
  };
  for (unsigned i = 0; i < KEPT_LOCKS; ++i)
    pthread_mutex_init (&k->locks[i], NULL);
  if (take_memory (k, k->nr_blocks * sizeof k->blocks[0]) == -1)
    return -1;
  k->blocks = calloc (k->nr_blocks + 1, sizeof k->blocks[0]);
  if (k->blocks == NULL) {
    report_error ("calloc: %m");
    return -1;
  }
  k->fd = open_scratch (folder);
  return k->fd == -1 ? -1 : 0;
}

void
kept_close (struct kept *k)
{
  if (k->fd != -1)
    close (k->fd);
  for (size_t i = 0; k->blocks != NULL && i < k->nr_blocks; ++i)
    free (atomic_load (&k->blocks[i]));
  free (k->blocks);
  for (unsigned i = 0; i < KEPT_LOCKS; ++i)
    pthread_mutex_destroy (&k->locks[i]);
}

/* The state of a unit, or NULL if no unit of its block is kept. */
static _Atomic uint8_t *
find_state (const struct kept *k, uint64_t unit)
{
  _Atomic uint8_t *block =
    atomic_load_explicit (&k->blocks[unit / BLOCK_UNITS],
                          memory_order_acquire);

  return block == NULL ? NULL : &block[unit % BLOCK_UNITS];
}

static enum kept_state
get_state (const struct kept *k, uint64_t unit)
{
  const _Atomic uint8_t *state = find_state (k, unit);

  return state == NULL ? KEPT_NOT
    : atomic_load_explicit (state, memory_order_acquire);
}

static int
set_state (struct kept *k, uint64_t unit, enum kept_state state)
{
  _Atomic (_Atomic uint8_t *) *place = &k->blocks[unit / BLOCK_UNITS];
  _Atomic uint8_t *expected = NULL, *block = atomic_load (place);

  if (block == NULL) {
    if (take_memory (k, BLOCK_UNITS) == -1)
      return -1;
    block = calloc (BLOCK_UNITS, 1);
    if (block == NULL) {
      report_error ("calloc: %m");
      return -1;
    }
    if (!atomic_compare_exchange_strong (place, &expected, block)) {
      free (block);
      atomic_fetch_sub (&k->memory, BLOCK_UNITS);
      block = expected;
    }
  }
  atomic_store (&block[unit % BLOCK_UNITS], state);
  return 0;
}

static int
write_scratch (struct kept *k, const uint8_t *buf, size_t count,
               uint64_t offset)
{
  if (atomic_fetch_add (&k->bytes, count) + count > k->max_bytes &&
      k->max_bytes != 0) {
    report_error ("the view would keep more than %" PRIu64 " bytes",
                  k->max_bytes);
    errno = ENOSPC;
    return -1;
  }
  if (fd_pwrite (k->fd, buf, count, offset) == 0)
    return 0;
  report_error ("cannot write to the scratch file: %m");
  return -1;
}

/* Copy a unit to the scratch file, with its lock held. */
static int
copy_unit (struct kept *k, uint64_t unit, uint8_t *buf, chunk_read_fn read_fn,
           void *opaque)
{
  const uint64_t end = min_u64 ((unit + 1) * UNIT_BYTES, k->size);
  uint64_t offset = unit * UNIT_BYTES;
  enum kept_state state = KEPT_ZERO;

  assert (lock_is_mine (&k->locks[unit % KEPT_LOCKS]));
  while (offset < end) {
    struct qcow2_chunk chunk = {
      .buf = buf, .count = end - offset, .limit = end - offset,
      .min_hole = 4096,
    };

    if (read_fn (opaque, offset, &chunk) == -1)
      return -1;
    if (!chunk.is_hole) {
      if (write_scratch (k, buf, chunk.length, offset) == -1)
        return -1;
      state = KEPT_DATA;
    }
    offset += chunk.length;
  }
  return set_state (k, unit, state);
}

static int
keep_unit (struct kept *k, uint64_t unit, uint8_t *buf, chunk_read_fn read_fn,
           void *opaque)
{
  ACQUIRE_LOCK_FOR_CURRENT_SCOPE (&k->locks[unit % KEPT_LOCKS]);
  if (get_state (k, unit) != KEPT_NOT)
    return 0;
  return copy_unit (k, unit, buf, read_fn, opaque);
}

int
kept_keep (struct kept *k, uint64_t offset, uint64_t count,
           chunk_read_fn read_fn, void *opaque)
{
  CLEANUP_FREE uint8_t *buf = NULL;

  for (uint64_t unit = offset / UNIT_BYTES;
       unit * UNIT_BYTES < offset + count; ++unit) {
    if (get_state (k, unit) != KEPT_NOT)
      continue;
    if (buf == NULL)
      buf = malloc (UNIT_BYTES);
    if (buf == NULL) {
      report_error ("malloc: %m");
      return -1;
    }
    if (keep_unit (k, unit, buf, read_fn, opaque) == -1)
      return -1;
  }
  return 0;
}

bool
kept_has (const struct kept *k, uint64_t offset, uint64_t count)
{
  for (uint64_t unit = offset / UNIT_BYTES;
       unit * UNIT_BYTES < offset + count; ++unit)
    if (get_state (k, unit) == KEPT_NOT)
      return false;
  return true;
}

/* The units behind this one that have no block: all of a block at once. */
static uint64_t
next_unit (const struct kept *k, uint64_t unit)
{
  return find_state (k, unit) == NULL
    ? round_down (unit, BLOCK_UNITS) + BLOCK_UNITS : unit + 1;
}

enum kept_state
kept_run (const struct kept *k, uint64_t offset, uint64_t limit,
          uint64_t *length)
{
  const uint64_t first = offset / UNIT_BYTES;
  const uint64_t end = div_round_up (limit, UNIT_BYTES);
  const enum kept_state state = get_state (k, first);
  uint64_t unit = first + 1;

  /* A block may come while this looks: the first is looked at once. */
  while (unit < end && get_state (k, unit) == state)
    unit = next_unit (k, unit);
  *length = min_u64 (unit * UNIT_BYTES, limit) - offset;
  return state;
}

int
kept_read (const struct kept *k, void *buf, size_t count, uint64_t offset)
{
  const ssize_t n = fd_pread (k->fd, buf, count, offset);

  if (n == -1) {
    report_error ("cannot read the scratch file: %m");
    return -1;
  }
  /* The file ends where the last data do. */
  if ((size_t) n < count)
    memset ((uint8_t *) buf + n, 0, count - n);
  return 0;
}

void
kept_drop (struct kept *k)
{
  if (ftruncate (k->fd, 0) == -1)
    report_debug ("view: cannot empty the scratch file: %m");
}
