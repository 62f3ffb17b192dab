/* nbdkit-dirty-bitmap-filter
 * SPDX-License-Identifier: BSD-3-Clause
 * Copyright the nbdkit-dirty-bitmap-filter authors
 */

/* The clients of nbdkit's own server: its callbacks for connections and
 * requests.
 *
 * How this works
 *
 * If nbdkit's own server answers the clients, these are its callbacks.  All
 * connections share one disk, and the plugin below was opened once for all
 * of them.  So open never calls next, next is NULL in every callback, and
 * every callback has to be defined here, since the default of a missing one
 * would use next.  open chooses the export by the name that the client gave.
 *
 * nbdkit calls back from connections that it still accepts while it ends,
 * and from requests that a worker began just before the end.  So every use
 * of the disk goes through a gate: it is counted, and once the gate is
 * closed no thread enters it.  A thread raises the counter before it reads
 * the gate, and the gate is closed before the counter is read, both
 * sequentially consistent: when a closed gate's counter is 0, no thread is
 * inside and none will be.
 *
 * nbdkit may quit because a client disconnects (stop.c), so what the client
 * has written may have to be stored in finalize.  That is done outside the
 * gate: the thread that stores it may be waiting for the gate.
 */

#include <config.h>

#include <errno.h>
#include <stdatomic.h>
#include <stdlib.h>
#include <string.h>

#include <nbdkit-filter.h>

#include "common/bytes.h"
#include "common/report.h"
#include "disk/disk.h"
#include "nbd/contents.h"
#include "nbdkit/clients.h"
#include "stats/stats.h"

/* nbdkit allows 64 MiB, but qemu's servers, and ours, allow this much:
 * clients see the same limit, whichever server answers.
 */
#define MAX_BLOCK_SIZE ((uint32_t) 32 << 20)

#define READING_AT_ONCE ((uint32_t) 64 << 20)
#define MIN_READ ((uint32_t) 128 << 10)

static struct {
  struct disk *disk;
  struct export_options exports;
  struct stats *stats;          /* or NULL */
  void (*store) (void);         /* called when a client disconnects, or NULL */
  atomic_bool closed;           /* the gate */
  atomic_long in_flight;
} gate;

static struct disk *
enter (int *err)
{
  report_limit_thread ();
  atomic_fetch_add (&gate.in_flight, 1);
  if (!atomic_load (&gate.closed))
    return gate.disk;
  atomic_fetch_sub (&gate.in_flight, 1);
  *err = ESHUTDOWN;
  return NULL;
}

/* Leave the gate with the result of a call of the disk. */
static int
leave (int r, int *err)
{
  if (r == -1)
    *err = errno != 0 ? errno : EIO;
  atomic_fetch_sub (&gate.in_flight, 1);
  return r;
}

void
clients_count (struct stats *stats)
{
  gate.stats = stats;
}

/* Leave the gate with the result of a request, and count it. */
static int
leave_request (int r, int *err, uint64_t began, enum stats_command command,
               uint64_t count)
{
  if (r == -1 && errno == 0)
    errno = EIO;
  stats_end (gate.stats, began, command, count, r == -1 ? errno : 0);
  return leave (r, err);
}

void
clients_start (struct disk *disk, const struct export_options *exports)
{
  gate.disk = disk;
  gate.exports = *exports;
  atomic_store (&gate.closed, false);
}

void
clients_store_when_left (void (*store) (void))
{
  gate.store = store;
}

void
clients_refuse (void)
{
  atomic_store (&gate.closed, true);
}

long
clients_in_flight (void)
{
  return atomic_load (&gate.in_flight);
}

static int
add_export (void *exports, const char *name, const char *description)
{
  return nbdkit_add_export (exports, name, description);
}

static int
list_exports_of_disk (nbdkit_next_list_exports *next, nbdkit_backend *nxdata,
                      int readonly, int is_tls,
                      struct nbdkit_exports *exports)
{
  int err, r;
  struct disk *disk = enter (&err);

  (void) next; (void) nxdata; (void) readonly; (void) is_tls;
  if (disk == NULL)
    return -1;
  r = exports_list (disk, &gate.exports, add_export, exports);
  leave (0, &err);
  return r;
}

/* The empty name is like any other: open decides whether it is known. */
static const char *
default_export (nbdkit_next_default_export *next, nbdkit_backend *nxdata,
                int readonly, int is_tls)
{
  (void) next; (void) nxdata; (void) readonly; (void) is_tls;
  return "";
}

/* The handle of a connection. */
struct connection {
  bool readonly;
  struct export export;
  char *description;            /* the export's, or NULL */
  struct disk_client client;
};

static void
connection_free (struct connection *c)
{
  if (c == NULL)
    return;
  export_release (&c->export);
  export_put (&c->export);
  free (c->description);
  free (c);
}

static struct connection *
connection_new (struct disk *disk, bool readonly, const char *exportname)
{
  CLEANUP_EXPORT_PUT struct export export = { .delta = NULL };
  struct connection *c;

  if (!export_find (disk, &gate.exports, exportname, strlen (exportname),
                    &export)) {
    nbdkit_error ("there is no export '%s'", exportname);
    return NULL;
  }
  c = calloc (1, sizeof *c);
  if (c == NULL ||
      export_describe (&gate.exports, &export, &c->description) == -1) {
    nbdkit_error ("malloc: %m");
    connection_free (c);
    return NULL;
  }
  c->export = export_get (&export);
  c->readonly = readonly || !export_is_disk (&export);
  export_hold (&c->export);
  disk_client_begin (disk, &c->client);
  return c;
}

static void *
open_connection (nbdkit_next_open *next, nbdkit_context *context,
                 int readonly, const char *exportname, int is_tls)
{
  struct connection *c;
  int err;
  struct disk *disk = enter (&err);

  (void) next; (void) context; (void) is_tls;
  if (disk == NULL) {
    nbdkit_error ("the server is shutting down");
    return NULL;
  }
  c = connection_new (disk, readonly, exportname);
  if (c != NULL)
    stats_connection_opened (gate.stats);
  leave (0, &err);
  return c;
}

static void
close_connection (void *handle)
{
  stats_connection_closed (gate.stats);
  connection_free (handle);
}

static int
finalize_connection (nbdkit_next *next, void *handle)
{
  (void) next; (void) handle;
  if (gate.store != NULL)
    gate.store ();
  return 0;
}

static int64_t
get_size (nbdkit_next *next, void *handle)
{
  int err;
  struct disk *disk = enter (&err);
  int64_t size;

  (void) next; (void) handle;
  if (disk == NULL)
    return -1;
  size = disk_size (disk);
  leave (0, &err);
  return size;
}

static const char *
export_description (nbdkit_next *next, void *handle)
{
  const struct connection *c = handle;

  (void) next;
  return c->description;
}

static int
block_size (nbdkit_next *next, void *handle, uint32_t *minimum,
            uint32_t *preferred, uint32_t *maximum)
{
  int err;
  struct disk *disk = enter (&err);

  (void) next; (void) handle;
  if (disk == NULL)
    return -1;
  *minimum = 1;
  *preferred = max_u64 (disk_preferred_block_size (disk), 4096);
  *maximum = MAX_BLOCK_SIZE;
  return leave (0, &err);
}

static int
can_write (nbdkit_next *next, void *handle)
{
  const struct connection *c = handle;
  int err;
  struct disk *disk = enter (&err);
  int r;

  (void) next;
  if (disk == NULL)
    return -1;
  r = !c->readonly && !disk_is_readonly (disk);
  leave (0, &err);
  return r;
}

static int
yes (nbdkit_next *next, void *handle)
{
  (void) next; (void) handle;
  return 1;
}

/* What the disk can do; nothing once the gate is closed. */
static struct disk_abilities
abilities (void)
{
  struct disk_abilities can = { 0 };
  int err;
  struct disk *disk = enter (&err);

  if (disk != NULL) {
    can = disk_can (disk);
    leave (0, &err);
  }
  return can;
}

static int
can_flush (nbdkit_next *next, void *handle)
{
  (void) next; (void) handle;
  return abilities ().flush;
}

static int
is_rotational (nbdkit_next *next, void *handle)
{
  (void) next; (void) handle;
  return abilities ().is_rotational;
}

static int
can_trim (nbdkit_next *next, void *handle)
{
  (void) next; (void) handle;
  return abilities ().trim;
}

static int
can_zero (nbdkit_next *next, void *handle)
{
  (void) next; (void) handle;
  return abilities ().zero ? NBDKIT_ZERO_NATIVE : NBDKIT_ZERO_NONE;
}

static int
can_fast_zero (nbdkit_next *next, void *handle)
{
  (void) next; (void) handle;
  return abilities ().zero_fast;
}

static int
can_fua (nbdkit_next *next, void *handle)
{
  (void) next; (void) handle;
  return abilities ().flush ? NBDKIT_FUA_NATIVE : NBDKIT_FUA_NONE;
}

static int
can_cache (nbdkit_next *next, void *handle)
{
  (void) next; (void) handle;
  return abilities ().cache ? NBDKIT_CACHE_NATIVE : NBDKIT_CACHE_NONE;
}

/* Read, in calls of such a size that all requests under way together ask for
 * READING_AT_ONCE (but each call for at least MIN_READ): when nbdkit is told
 * to end, the storage has to finish the calls under way (disk_hurry), and
 * nbdkit has 16 threads for each client.
 */
static int
read_in_pieces (struct disk *disk, const struct export *export, void *buf,
                uint32_t count, uint64_t offset)
{
  uint8_t *p = buf;

  while (count > 0) {
    const uint32_t piece =
      max_u64 (READING_AT_ONCE / max_u64 (clients_in_flight (), 1), MIN_READ);
    const uint32_t n = min_u64 (count, piece);

    if (contents_read (disk, export, p, n, offset) == -1)
      return -1;
    p += n;
    offset += n;
    count -= n;
  }
  return 0;
}

static int
pread_disk (nbdkit_next *next, void *handle, void *buf, uint32_t count,
            uint64_t offset, uint32_t flags, int *err)
{
  const struct connection *c = handle;
  const uint64_t began = stats_begin (gate.stats);
  struct disk *disk = enter (err);

  (void) next; (void) flags;
  if (disk == NULL)
    return -1;
  return leave_request (read_in_pieces (disk, &c->export, buf, count, offset),
                        err, began, STATS_READ, count);
}

static int
pwrite_disk (nbdkit_next *next, void *handle, const void *buf, uint32_t count,
             uint64_t offset, uint32_t flags, int *err)
{
  const uint64_t began = stats_begin (gate.stats);
  struct disk *disk = enter (err);

  (void) next; (void) handle;
  if (disk == NULL)
    return -1;
  return leave_request (disk_write (disk, buf, count, offset,
                                    flags & NBDKIT_FLAG_FUA), err,
                        began, STATS_WRITE, count);
}

static int
flush_disk (nbdkit_next *next, void *handle, uint32_t flags, int *err)
{
  struct connection *c = handle;
  const uint64_t began = stats_begin (gate.stats);
  struct disk *disk = enter (err);

  (void) next; (void) flags;
  if (disk == NULL)
    return -1;
  return leave_request (disk_flush (disk, &c->client), err,
                        began, STATS_FLUSH, 0);
}

static int
trim_disk (nbdkit_next *next, void *handle, uint32_t count, uint64_t offset,
           uint32_t flags, int *err)
{
  const uint64_t began = stats_begin (gate.stats);
  struct disk *disk = enter (err);

  (void) next; (void) handle;
  if (disk == NULL)
    return -1;
  return leave_request (disk_trim (disk, count, offset,
                                   flags & NBDKIT_FLAG_FUA), err,
                        began, STATS_TRIM, count);
}

static int
zero_disk (nbdkit_next *next, void *handle, uint32_t count, uint64_t offset,
           uint32_t flags, int *err)
{
  const uint64_t began = stats_begin (gate.stats);
  struct disk *disk = enter (err);

  (void) next; (void) handle;
  if (disk == NULL)
    return -1;
  return leave_request (disk_zero (disk, count, offset,
                                   !(flags & NBDKIT_FLAG_MAY_TRIM),
                                   flags & NBDKIT_FLAG_FAST_ZERO,
                                   flags & NBDKIT_FLAG_FUA), err,
                        began, STATS_WRITE_ZEROES, count);
}

/* Add the extents of [offset, end) and nothing beyond: nbdkit before 1.44
 * aborts on some that go further.  nbdkit's flags are NBD's, and it merges
 * neighbours.  If there are too many extents it ends its reply early, which
 * is also right for a delta (build_exactly of nbd/).
 */
static int
add_extents (struct disk *disk, const struct export *export, uint64_t offset,
             uint64_t end, bool only_one, struct nbdkit_extents *extents)
{
  bool is_first = true;
  uint32_t first_flags = 0;

  while (offset < end) {
    uint64_t length;
    uint32_t flags;

    if (contents_extent (disk, export, offset, end, &length, &flags) == -1)
      return -1;
    if (is_first)
      first_flags = flags;
    else if (only_one && flags != first_flags)
      break;
    if (nbdkit_add_extent (extents, offset, length, flags) == -1)
      return -1;
    is_first = false;
    offset += length;
  }
  return 0;
}

static int
extents_disk (nbdkit_next *next, void *handle, uint32_t count, uint64_t offset,
              uint32_t flags, struct nbdkit_extents *extents, int *err)
{
  const struct connection *c = handle;
  const uint64_t began = stats_begin (gate.stats);
  struct disk *disk = enter (err);

  (void) next;
  if (disk == NULL)
    return -1;
  return leave_request (add_extents (disk, &c->export, offset,
                                     offset + count,
                                     flags & NBDKIT_FLAG_REQ_ONE, extents),
                        err, began, STATS_BLOCK_STATUS, count);
}

static int
cache_disk (nbdkit_next *next, void *handle, uint32_t count, uint64_t offset,
            uint32_t flags, int *err)
{
  const struct connection *c = handle;
  const uint64_t began = stats_begin (gate.stats);
  struct disk *disk = enter (err);

  (void) next; (void) flags;
  if (disk == NULL)
    return -1;
  return leave_request (contents_cache (disk, &c->export, count, offset), err,
                        began, STATS_CACHE, count);
}

void
clients_set_callbacks (struct nbdkit_filter *f)
{
  atomic_store (&gate.closed, true);

  f->list_exports = list_exports_of_disk;
  f->default_export = default_export;
  f->open = open_connection;
  f->finalize = finalize_connection;
  f->close = close_connection;
  f->get_size = get_size;
  f->export_description = export_description;
  f->block_size = block_size;
  f->can_write = can_write;
  f->can_flush = can_flush;
  f->is_rotational = is_rotational;
  f->can_trim = can_trim;
  f->can_zero = can_zero;
  f->can_fast_zero = can_fast_zero;
  f->can_extents = yes;
  f->can_fua = can_fua;
  f->can_multi_conn = yes;
  f->can_cache = can_cache;
  f->pread = pread_disk;
  f->pwrite = pwrite_disk;
  f->flush = flush_disk;
  f->trim = trim_disk;
  f->zero = zero_disk;
  f->extents = extents_disk;
  f->cache = cache_disk;
}
