/* nbdkit-dirty-bitmap-filter
 * SPDX-License-Identifier: BSD-3-Clause
 * Copyright the nbdkit-dirty-bitmap-filter authors
 */

/* The guest's disk.
 *
 * Every change is marked first, and only then made in the image.  That is
 * the whole design: a flush that begins after a request was answered finds
 * its granules set, whether the request succeeded or not.
 *
 * Clients are offered the bitmaps of the image, which record, and then those
 * of its backing files, which are read-only: sets[0] has the former, and
 * each backing file that is a qcow2 image has the next set.
 */

#include <config.h>

#include <errno.h>
#include <inttypes.h>
#include <stdlib.h>
#include <string.h>

#include "bitmap/bitmap.h"
#include "bitmap/change.h"
#include "common/bytes.h"
#include "common/names.h"
#include "common/report.h"
#include "container/container.h"
#include "disk/data.h"
#include "disk/flush.h"
#include "disk/internal.h"
#include "qcow2/order.h"
#include "qcow2/qcow2.h"

/* Open the bitmaps of an image as the next set downward. */
static int
open_set (struct disk *d, struct qcow2 *image,
          const struct bitmap_options *options)
{
  struct bitmap_set *set = bitmap_set_open (image, options);

  if (set == NULL)
    return -1;
  d->sizes[d->nr_sets] = min_u64 (d->size, qcow2_size (image));
  d->sets[d->nr_sets++] = set;
  return 0;
}

/* Check that each requested bitmap was found in one image or another. */
static int
check_expose (const struct disk *d, const struct disk_options *o)
{
  for (size_t i = 0; i < o->nr_expose; ++i) {
    bool found = names_include (o->require, o->nr_require, o->expose[i]);

    for (size_t j = 0; !found && j < d->nr_sets; ++j)
      found = bitmap_set_offers (d->sets[j], o->expose[i]);
    if (!found) {
      report_error ("bitmap '%s' cannot be offered: neither the image nor its "
                    "backing files have a bitmap of this name", o->expose[i]);
      errno = ENOENT;
      return -1;
    }
  }
  return 0;
}

static int
open_sets (struct disk *d, const struct disk_options *o, bool check_only)
{
  /* A snapshot's bitmaps are not offered, nor are those below. */
  const size_t nr_backing = o->snapshot != NULL ? 0 : o->nr_backing;
  const struct bitmap_options top = {
    .granularity = o->granularity,
    .require = o->require, .nr_require = o->nr_require,
    .expose = o->expose, .nr_expose = o->nr_expose,
    .check_only = check_only,
    .load_all = o->load_all,
    .keep = o->keep,
    .flush = image_flush,
    .has_backing = nr_backing > 0,
  };

  d->sets = calloc (1 + nr_backing, sizeof *d->sets);
  d->sizes = calloc (1 + nr_backing, sizeof *d->sizes);
  if (d->sets == NULL || d->sizes == NULL) {
    report_error ("calloc: %m");
    return -1;
  }
  if (open_set (d, d->qcow2, &top) == -1)
    return -1;
  d->bitmaps = d->sets[0];
  for (size_t i = 0; i < nr_backing; ++i) {
    const struct bitmap_options below = {
      .expose = o->expose, .nr_expose = o->nr_expose,
      .check_only = check_only,
      .backing_path = o->backing[i].path,
      .above = (const struct bitmap_set *const *) d->sets,
      .nr_above = d->nr_sets,
    };

    if (open_set (d, o->backing[i].image, &below) == -1)
      return -1;
  }
  return check_expose (d, o);
}

/* A disk beside the image: the cheapest size of a write, unless its storage
 * prefers a larger one.
 */
#define MIN_PREFERRED_BYTES 4096

static int
invalid_beside (void)
{
  errno = EINVAL;
  return -1;
}

/* Has the image clusters of its own? */
static int
has_data (struct qcow2 *q, bool *any)
{
  const uint64_t size = qcow2_size (q);
  uint64_t length;
  unsigned depth = 0;

  for (uint64_t at = 0; at < size && depth == 0; at += length)
    if (qcow2_extent (q, at, size, &length, NULL, &depth) == -1)
      return -1;
  *any = depth != 0;
  return 0;
}

/* An image that has only bitmaps, of a disk beside it. */
static int
check_bitmaps_only (const struct disk *d)
{
  bool any;

  if (qcow2_version (d->qcow2) < 3) {
    report_error ("the image beside the disk is of version 2, which can have "
                  "no bitmaps");
    return invalid_beside ();
  }
  if (has_data (d->qcow2, &any) == -1)
    return -1;
  if (!any)
    return 0;
  report_error ("the image beside the disk has data of its own");
  return invalid_beside ();
}

/* The sizes of images are multiples of 512 bytes.  QEMU makes data files of
 * whole clusters, and the image says how much of that is the disk.
 */
static int
set_size (struct disk *d, const struct disk_options *o)
{
  const uint64_t size = qcow2_size (d->qcow2);
  uint64_t beside;
  bool fits;

  d->size = size;
  if (o->beside == NULL)
    return 0;
  beside = container_size (o->beside);
  if (o->beside_is_data_file)
    fits = beside >= size &&
      beside <= round_up (size, qcow2_cluster_size (d->qcow2));
  else {
    fits = round_up (beside, 512) == size;
    d->size = beside;
  }
  if (fits)
    return 0;
  report_error ("the disk has %" PRIu64 " bytes, but the image beside it was "
                "made for %" PRIu64, beside, size);
  return invalid_beside ();
}

static int
open_beside (struct disk *d, const struct disk_options *o)
{
  const struct container_abilities *a;

  if ((!o->beside_is_data_file && check_bitmaps_only (d) == -1) ||
      set_size (d, o) == -1)
    return -1;
  if (o->beside_is_data_file || o->beside == NULL)
    return 0;
  d->beside = o->beside;
  a = &d->beside->abilities;
  d->abilities = (struct disk_abilities) {
    .zero = a->zero, .zero_fast = a->zero_fast, .trim = a->trim,
    .cache = a->cache, .flush = a->flush,
    .is_rotational = a->is_rotational,
  };
  return 0;
}

static int
open_parts (struct disk *d, struct container *c,
            const struct disk_options *options, bool check_only)
{
  const struct qcow2_options image = {
    .readonly = options->readonly,
    .check_only = check_only,
    .cache_size = options->cache_size,
    .snapshot = options->snapshot,
    .backing = options->below,
    .is_top_alone = options->is_top_alone,
    .data_file = options->beside_is_data_file ? options->beside
      : options->data_file,
  };

  offers_init (&d->offers);
  d->qcow2 = qcow2_open (c, &image);
  if (d->qcow2 == NULL)
    return -1;
  d->size = qcow2_size (d->qcow2);
  d->abilities = (struct disk_abilities) {
    .zero = true, .zero_fast = true, .trim = true, .cache = true,
    .flush = true, .is_rotational = c->abilities.is_rotational,
  };
  if (options->is_beside && open_beside (d, options) == -1)
    return -1;
  if (open_sets (d, options, check_only) == -1)
    return -1;
  return check_only ? 0
    : offers_replace (&d->offers, d->sets, d->sizes, d->nr_sets);
}

static void
close_parts (struct disk *d)
{
  const int err = errno;

  for (size_t i = 0; i < d->nr_sets; ++i)
    bitmap_set_close (d->sets[i]);
  free (d->sets);
  free (d->sizes);
  offers_free (&d->offers);
  qcow2_close (d->qcow2);
  errno = err;
}

int
disk_check (struct container *c, const struct disk_options *options)
{
  struct disk d = { 0 };
  const int r = open_parts (&d, c, options, true);

  close_parts (&d);
  return r;
}

static void
free_disk (struct disk *d)
{
  views_free (d);
  close_parts (d);
  disk_gate_free (&d->gate);
  pthread_rwlock_destroy (&d->lists_lock);
  free (d);
}

struct disk *
disk_open (struct container *c, const struct disk_options *options)
{
  /* The alignment puts the gate's counters on cache lines of their own. */
  struct disk *d = aligned_alloc (_Alignof (struct disk), sizeof *d);

  if (d == NULL) {
    report_error ("aligned_alloc: %m");
    return NULL;
  }
  memset (d, 0, sizeof *d);
  disk_gate_init (&d->gate);
  pthread_rwlock_init (&d->lists_lock, NULL);
  if (open_parts (d, c, options, false) == -1) {
    free_disk (d);
    return NULL;
  }
  d->container = c;
  d->detect_zeroes = options->detect_zeroes;
  d->view_options.scratch = options->scratch;
  d->view_options.scratch_max = options->scratch_max;
  d->view_options.memory = options->view_memory;
  return d;
}

static int
fail_lost (void)
{
  report_error ("an earlier flush failed: what was written before it may be "
                "lost");
  errno = EIO;
  return -1;
}

/* A bitmap that is not tidy is right, and only less exact. */
void
disk_tidy (struct disk *d, bool all)
{
  struct report_hold hold;
  int r;

  report_hold_begin (&hold);
  r = bitmap_set_tidy (d->bitmaps, all);
  report_hold_end (&hold);
  if (r == -1)
    report_limited_error ("bitmaps in the image have more bits than what was "
                          "changed: %s", hold.any ? hold.text : "no reason");
}

int
disk_tidy_ms (const struct disk *d)
{
  return bitmap_set_keeps (d->bitmaps) ? 10 * 1000 : -1;
}

int
disk_stop (struct disk *d)
{
  if (qcow2_is_readonly (d->qcow2))
    return 0;
  disk_tidy (d, true);
  int r = data_flush (d);
  if (bitmap_set_settle_doubt (d->bitmaps) == -1)
    r = -1;
  if (image_stop (d->qcow2, d->bitmaps) == -1)
    r = -1;
  if (bitmap_set_give_back_reserved (d->bitmaps) &&
      qcow2_stop (d->qcow2) == -1)
    r = -1;
  /* This reports which bitmaps could not be stored. */
  const bool stored = bitmap_set_all_stored (d->bitmaps);
  const unsigned long lost = data_lost (d);
  const bool is_told = atomic_exchange (&d->told, lost) == lost;

  if (r == -1 || !stored)
    return -1;
  return is_told ? 0 : fail_lost ();
}

void
disk_close (struct disk *d)
{
  struct container *c;

  if (d == NULL)
    return;
  c = d->container;
  free_disk (d);
  container_close (c);
}

uint64_t
disk_size (const struct disk *d)
{
  return d->size;
}

bool
disk_is_readonly (const struct disk *d)
{
  return qcow2_is_readonly (d->qcow2);
}

bool
disk_is_beside (const struct disk *d)
{
  return d->beside != NULL;
}

enum disk_zeroes
disk_detect_zeroes (const struct disk *d)
{
  return d->detect_zeroes;
}

struct disk_abilities
disk_can (const struct disk *d)
{
  return d->abilities;
}

uint32_t
disk_preferred_block_size (const struct disk *d)
{
  if (d->beside == NULL)
    return qcow2_cluster_size (d->qcow2);
  return max_u64 (d->beside->abilities.preferred_bytes, MIN_PREFERRED_BYTES);
}

void
disk_describe (const struct disk *d, struct qcow2_description *description)
{
  qcow2_describe (d->qcow2, description);
}

static int
fail_range (uint64_t count, uint64_t offset, const char *why)
{
  report_error ("a request for %" PRIu64 " bytes at offset %" PRIu64 " %s",
                count, offset, why);
  errno = EINVAL;
  return -1;
}

int
disk_check_range (const struct disk *d, uint64_t count, uint64_t offset)
{
  return range_exceeds (offset, count, d->size)
    ? fail_range (count, offset, "exceeds the disk") : 0;
}

int
disk_check_extent (const struct disk *d, uint64_t offset, uint64_t limit)
{
  return limit > offset ? disk_check_range (d, limit - offset, offset)
    : fail_range (0, offset, "is empty");
}

int
disk_read (struct disk *d, void *buf, uint32_t count, uint64_t offset)
{
  if (disk_check_range (d, count, offset) == -1)
    return -1;
  return data_read (d, buf, count, offset);
}

int
disk_read_chunk (struct disk *d, uint64_t offset, struct qcow2_chunk *c)
{
  if (disk_check_range (d, c->limit, offset) == -1)
    return -1;
  return data_read_chunk (d, offset, c);
}

/* May the range be changed? */
static int
check_change (const struct disk *d, uint64_t count, uint64_t offset)
{
  if (qcow2_is_readonly (d->qcow2)) {
    report_error ("the disk is read-only");
    errno = EROFS;
    return -1;
  }
  return disk_check_range (d, count, offset);
}

/* Called before every change, in a section of the gate. */
static int
begin_change (struct disk *d, uint64_t count, uint64_t offset)
{
  if (data_begin_change (d) == -1 ||
      (count > 0 && ORDER (MARK_BEFORE_CHANGE) &&
       bitmap_set_mark (d->bitmaps, offset, count) == -1))
    return -1;
  views_keep (d, &d->views, offset, count);
  return 0;
}

/* A flush after a change with FUA, of what the data depend on. */
static int
flush_change (struct disk *d)
{
  return d->beside != NULL ? data_flush (d) : disk_sync (d);
}

/* If a barrier has failed since `lost` was read, before the change, the
 * change may be lost, and a barrier that succeeds here would not report
 * that.
 */
static int
end_change (struct disk *d, int r, bool fua, unsigned long lost)
{
  if (r == -1 || !fua || !ORDER (FUA_BEFORE_RETURN))
    return r;
  if (flush_change (d) == -1)
    return -1;
  return data_lost (d) == lost ? 0 : fail_lost ();
}

/* Zeroes are found here, and not by the server, so that it does not matter
 * which server it is.  A write ends within few clusters, so it needs no parts
 * as other zeroing does.
 */
static int
write_data (struct disk *d, const void *buf, uint32_t count, uint64_t offset,
            bool *durable)
{
  if (d->detect_zeroes == DISK_ZEROES_OFF || !d->abilities.zero ||
      !bytes_are_zero (buf, count))
    return data_write (d, buf, count, offset, durable);
  *durable = false;
  return data_zero (d, count, offset,
                    d->detect_zeroes == DISK_ZEROES_ON ? QCOW2_ZERO_KEEP : 0);
}

int
disk_write (struct disk *d, const void *buf, uint32_t count, uint64_t offset,
            bool fua)
{
  bool is_durable = fua && ORDER (FUA_BEFORE_RETURN);
  grace_ticket ticket;
  unsigned long lost;
  int r;

  if (check_change (d, count, offset) == -1)
    return -1;
  ticket = disk_gate_enter (&d->gate);
  r = begin_change (d, count, offset);
  lost = data_lost (d);
  if (r == 0)
    r = write_data (d, buf, count, offset, &is_durable);
  disk_gate_leave (&d->gate, ticket);
  return end_change (d, r, fua && !is_durable, lost);
}

/* Zeroes and trims pass the gate in parts, since one may be of any length:
 * up to the next multiple of this, which no cluster crosses.
 */
#define PART_BYTES (UINT64_C (64) << 20)

struct zeroing {
  bool is_trim;
  unsigned flags;               /* of qcow2_zero */
};

static int
zero_part (struct disk *d, uint64_t count, uint64_t offset,
           const struct zeroing *z)
{
  const grace_ticket ticket = disk_gate_enter (&d->gate);
  int r = begin_change (d, count, offset);

  if (r == 0)
    r = z->is_trim ? data_trim (d, count, offset)
      : data_zero (d, count, offset, z->flags);
  disk_gate_leave (&d->gate, ticket);
  return r;
}

/* One that has to be fast is refused whole, or not at all.  So all of the
 * range is looked at before anything is marked, and the first part may still
 * be refused; the others are zeroed in any case.  They are slow only if
 * another request wrote there meanwhile, or if a disk beside the image zeroes
 * some parts faster than others.
 */
static int
zero_in_parts (struct disk *d, uint64_t count, uint64_t offset,
               struct zeroing z, bool fua)
{
  unsigned long lost;
  int r = 0;

  if (check_change (d, count, offset) == -1 ||
      ((z.flags & QCOW2_ZERO_FAST) != 0 &&
       data_zero_is_fast (d, count, offset, z.flags) == -1))
    return -1;
  lost = data_lost (d);
  while (count > 0 && r == 0) {
    const uint64_t n = min_u64 (count, PART_BYTES - offset % PART_BYTES);

    r = zero_part (d, n, offset, &z);
    z.flags &= ~QCOW2_ZERO_FAST;
    offset += n;
    count -= n;
  }
  return end_change (d, r, fua, lost);
}

int
disk_zero (struct disk *d, uint64_t count, uint64_t offset,
           bool no_hole, bool fast, bool fua)
{
  const struct zeroing z = {
    .flags = (no_hole ? QCOW2_ZERO_KEEP : 0) | (fast ? QCOW2_ZERO_FAST : 0),
  };

  return zero_in_parts (d, count, offset, z, fua);
}

int
disk_trim (struct disk *d, uint64_t count, uint64_t offset, bool fua)
{
  const struct zeroing z = { .is_trim = true };

  return zero_in_parts (d, count, offset, z, fua);
}

/* Flush both with fn.  If the data are beside the image, it is reported as a
 * matter of its own that the bitmaps could not be stored.
 */
static int
sync_with (struct disk *d, int (*fn) (struct qcow2 *, struct bitmap_set *))
{
  struct report_hold hold;
  int r;

  if (d->beside == NULL)
    r = fn (d->qcow2, d->bitmaps);
  else {
    report_hold_begin (&hold);
    r = fn (d->qcow2, d->bitmaps);
    report_hold_end (&hold);
    if (r == -1)
      report_limited_error ("the bitmaps could not be stored: %s",
                            hold.any ? hold.text : "no reason");
    r = data_flush (d);
  }
  bitmap_set_tell_unstored (d->bitmaps);
  return r;
}

int
disk_sync (struct disk *d)
{
  return sync_with (d, image_flush);
}

int
disk_settle (struct disk *d)
{
  disk_tidy (d, true);
  return sync_with (d, image_settle);
}

void
disk_hurry (struct disk *d, unsigned grace_ms)
{
  qcow2_hurry (d->qcow2, grace_ms);
}

void
disk_client_begin (struct disk *d, struct disk_client *client)
{
  atomic_store (&client->told, atomic_load (&d->told));
}

static void
raise_to (atomic_ulong *counter, unsigned long n)
{
  unsigned long old = atomic_load (counter);

  while (old < n && !atomic_compare_exchange_weak (counter, &old, n))
    ;
}

/* If several flushes of one client are under way at once, each of them
 * fails, since each covers the same writes.
 */
int
disk_flush (struct disk *d, struct disk_client *client)
{
  const unsigned long told = atomic_load (&client->told);
  const int r = disk_sync (d), err = errno;
  const unsigned long lost = data_lost (d);

  if (r == 0 && lost == told)
    return 0;
  raise_to (&client->told, lost);
  raise_to (&d->told, lost);
  errno = err;
  return r == -1 ? -1 : fail_lost ();
}

int
disk_cache (struct disk *d, uint64_t count, uint64_t offset)
{
  if (disk_check_range (d, count, offset) == -1)
    return -1;
  return data_cache (d, count, offset);
}

int
disk_extent (struct disk *d, uint64_t offset, uint64_t limit,
             uint64_t *length, uint32_t *flags)
{
  return disk_check_extent (d, offset, limit) == -1 ? -1
    : data_extent (d, offset, limit, length, flags);
}

int
disk_extent_depth (struct disk *d, uint64_t offset, uint64_t limit,
                   uint64_t *length, uint32_t *depth)
{
  return disk_check_extent (d, offset, limit) == -1 ? -1
    : data_extent_depth (d, offset, limit, length, depth);
}

void
disk_get_numbers (const struct disk *d, struct disk_numbers *n)
{
  qcow2_get_numbers (d->qcow2, &n->qcow2);
  bitmap_set_get_numbers (d->bitmaps, &n->bitmaps);
  n->image_bytes = container_size (d->container);
  n->grown_bytes = tally_get (&d->container->grown_bytes);
}

void
disk_lock_lists (const struct disk *d)
{
  pthread_rwlock_rdlock ((pthread_rwlock_t *) &d->lists_lock);
}

void
disk_unlock_lists (const struct disk *d)
{
  pthread_rwlock_unlock ((pthread_rwlock_t *) &d->lists_lock);
}

static void
get_bitmap_numbers (const struct bitmap *b, uint64_t size,
                    struct disk_bitmap_numbers *n)
{
  n->name = bitmap_name (b);
  n->granularity = bitmap_granularity (b);
  n->records = bitmap_is_recording (b);
  n->dirty_bytes = bitmap_dirty_bytes (b, size, &n->memory_bytes);
  n->extra_bytes = bitmap_extra_bytes (b);
}

void
disk_each_bitmap (const struct disk *d,
                  void (*fn) (const struct disk_bitmap_numbers *, void *),
                  void *opaque)
{
  struct disk_offers *offers;
  struct disk_bitmap_numbers n;

  disk_lock_lists (d);
  offers = disk_offers_get (d);
  for (size_t i = 0; i < disk_offers_nr (offers); ++i) {
    const struct disk_offer *o = disk_offers_at (offers, i);

    get_bitmap_numbers (o->bitmap, o->size, &n);
    fn (&n, opaque);
  }
  for (size_t i = 0; i < bitmap_set_nr_recording (d->bitmaps); ++i) {
    const struct bitmap *b = bitmap_set_recording (d->bitmaps, i);

    if (offers_of (offers, b) != NULL)
      continue;
    get_bitmap_numbers (b, d->size, &n);
    fn (&n, opaque);
  }
  disk_offers_put (offers);
  disk_unlock_lists (d);
}

void
disk_list_bitmaps (const struct disk *d,
                   void (*fn) (const struct disk_bitmap_state *, void *),
                   void *opaque)
{
  struct disk_offers *offers;

  disk_lock_lists (d);
  offers = disk_offers_get (d);
  for (size_t i = 0; i < bitmap_set_nr_all (d->bitmaps); ++i) {
    const struct bitmap *b = bitmap_set_get (d->bitmaps, i);
    uint64_t ignored;
    const struct disk_bitmap_state state = {
      .name = bitmap_name (b),
      .granularity = bitmap_granularity (b),
      .dirty_bytes = bitmap_dirty_bytes (b, UINT64_MAX, &ignored),
      .is_enabled = bitmap_is_enabled (b),
      .is_inconsistent = bitmap_is_inconsistent (b),
      .is_in_use = offers_is_held_on (offers, b),
      .is_persistent = !bitmap_is_in_ram (b),
      .has_backup = bitmap_has_backup (b),
      .since_bytes = bitmap_since_bytes (b, UINT64_MAX),
    };

    fn (&state, opaque);
  }
  disk_offers_put (offers);
  disk_unlock_lists (d);
}
