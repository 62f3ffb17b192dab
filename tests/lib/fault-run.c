/* nbdkit-dirty-bitmap-filter
 * SPDX-License-Identifier: BSD-3-Clause
 * Copyright the nbdkit-dirty-bitmap-filter authors
 */

/* Faults from below, at every place in turn.
 *
 * A workload is run once without faults, which counts its calls to the
 * container, or the blocks of storage that it takes, and then once for
 * each of them and each kind of fault.  What must hold:
 *
 * - A request that fails has said why, in one line; one that succeeds
 *   has said nothing, and has done what it should.
 * - What a request that failed has touched reads as it was or as it
 *   should have become, sector by sector; all else is untouched.
 * - While only changes fail, all that there is can be read; while the
 *   container cannot grow, what is allocated can be written.
 * - When the fault has ended the same requests succeed, a flush succeeds,
 *   and a power cut right after it leaves a sound image with all of that
 *   and with bitmaps that are marked or lack nothing (I1 to I3).
 * - The stop is clean: no bitmap is marked, nothing is leaked but what a
 *   warning said or a start that failed has left.  Where the fault never
 *   ends the stop says so, and the image is sound.
 * - If a barrier has failed, a flush does: the next that a client asks
 *   for, if its own did not.  Until then he could take for durable what
 *   is lost.  Another client, who asks for one at the end, is told too,
 *   once.
 *
 * Where the disk is beside the image, which has only its bitmaps:
 *
 * - A flush fails only if a barrier of the disk has failed, and a change only
 *   if the disk or a mark has.  Then the disk is as it was, unless its own
 *   calls failed.
 * - While the image has no space, all changes and flushes succeed.
 *
 * - While nothing is lacking but space, all flushes succeed.  What was
 *   acknowledged is there after a flush and a power cut, and after a stop,
 *   which fails only if a bitmap is left marked.
 */

#include <config.h>

#include <errno.h>
#include <inttypes.h>
#include <setjmp.h>
#include <signal.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include <cmocka.h>

#include "common/bytes.h"
#include "common/report.h"
#include "container/container.h"
#include "crash-check.h"
#include "crash-model.h"
#include "disk/disk.h"
#include "fault-run.h"
#include "image.h"

/* Seconds that one run may take: a hang is a failure. */
#define PATIENCE 20

struct run {
  const struct workload *w;
  const struct mode *mode;
  size_t k;
  struct fault_store *store, *below, *data;
  struct container *lower, *data_container;
  struct model *model;
  struct disk *disk;
  struct disk_client client;    /* who makes the requests */
  struct disk_client other;     /* who only flushes, at the end */
  size_t nr_before;             /* barriers that failed before the open */
  size_t now;                   /* moments, as the model has them */
  size_t nr_told;               /* failed barriers that a flush has told */
  unsigned flushed;             /* all steps before it are, in the end */
  bool failed[32];              /* steps that have yet to be done */
  bool may_be_lost;             /* a flush has told, nothing was redone */
  bool leaks;                   /* may be left */
};

unsigned fault_every = 1;
static uint64_t nr_runs, nr_faults, nr_by_qemu, nr_wrong;
static unsigned nr_lines;       /* errors reported */
static bool leak_was_told;
static char what_runs[128], last_line[512];

static void
note_line (enum report_level level, const char *fmt, va_list args)
{
  vsnprintf (last_line, sizeof last_line, fmt, args);
  if (level == REPORT_ERROR)
    nr_lines++;
  if (level == REPORT_WARNING && strstr (last_line, "leaked") != NULL)
    leak_was_told = true;
  if (getenv ("FAULT_RUN") != NULL)
    fprintf (stderr, "  %s: %s\n", level == REPORT_ERROR ? "error"
             : level == REPORT_WARNING ? "warning" : "debug", last_line);
}

static void
hangs (int sig)
{
  (void) sig;
  if (write (2, what_runs, strlen (what_runs)) == -1 ||
      write (2, ": it hangs\n", 11) == -1)
    _exit (2);
  _exit (1);
}

static jmp_buf end_of_run;

/* Say what is wrong, and go on with the next run. */
static void wrong (const char *fmt, ...)
  __attribute__ ((format (printf, 1, 2), noreturn));

static void
wrong (const char *fmt, ...)
{
  va_list args;

  fprintf (stderr, "FAULT_RUN=%s: ", what_runs);
  va_start (args, fmt);
  vfprintf (stderr, fmt, args);
  va_end (args);
  fputc ('\n', stderr);
  nr_wrong++;
  longjmp (end_of_run, 1);
}

/* Barriers that failed of what data depend on. */
static size_t
nr_lost (const struct run *r)
{
  return r->w->beside ? r->data->nr_own_lost : r->store->nr_lost;
}

static const char *
step_name (const struct step *s)
{
  static const char *const names[] = {
    "end", "read", "write", "zero", "zero-keep", "zero-fast", "trim",
    "flush", "reopen",
  };

  return names[s->kind];
}

/* How many bitmaps are offered when all is well? */
static size_t
nr_offered (const struct run *r)
{
  size_t n = 0;

  for (size_t i = 0; i < r->model->nr_bitmaps; ++i)
    n += (r->model->bitmaps[i].flags & 1) == 0;
  return n;
}

static size_t
nr_bitmaps (const struct disk *d)
{
  struct disk_offers *offers = disk_offers_get (d);
  const size_t nr = disk_offers_nr (offers);

  disk_offers_put (offers);
  return nr;
}

static void
close_others (struct run *r)
{
  container_close (r->lower);
  container_close (r->data_container);
  r->lower = r->data_container = NULL;
}

static void
close_disk (struct run *r)
{
  disk_close (r->disk);
  r->disk = NULL;
  close_others (r);
}

static struct disk *
try_to_open (struct run *r)
{
  struct disk_options options = {
    .cache_size = 1, .granularity = 4096,
    .require = &r->w->create, .nr_require = r->w->create != NULL ? 1 : 0,
    .keep = r->w->keep, .is_beside = r->w->beside,
  };
  struct container *c = fault_container_open (r->store);

  if (r->w->files != NULL)
    options.below.raw = r->lower = fault_container_open (r->below);
  if (r->w->data_file)
    options.data_file = r->data_container = fault_container_open (r->data);
  if (r->w->beside)
    options.beside = r->data_container = fault_container_open (r->data);
  struct disk *d = disk_open (c, &options);
  const int err = errno;

  if (d == NULL) {
    container_close (c);
    close_others (r);
  }
  errno = err;
  return d;
}

static void qemu_check (struct run *r, const struct crash_image *image,
                        bool stopped);

/* A repair has failed: it is marked dirty still, or there is nothing left
 * to be done.
 */
static void
check_repaired (struct run *r)
{
  if ((r->store->durable.bytes[79] & 1) == 0)
    qemu_check (r, &r->store->durable, true);
  if ((r->store->live.bytes[79] & 1) == 0)
    qemu_check (r, &r->store->live, true);
}

/* At the start there is nobody to be served yet: a fault may end it, and
 * then it has ended before the next.
 */
static void
open_disk (struct run *r)
{
  const size_t nr_failed = r->store->nr_failed;

  nr_lines = 0;
  r->nr_before = nr_lost (r);
  r->disk = try_to_open (r);
  if (r->disk == NULL) {
    if (r->store->nr_failed == nr_failed)
      wrong ("it does not open, but nothing failed: %s", last_line);
    if (nr_lines == 0)
      wrong ("it does not open and nothing says why");
    if (r->w->dirty)
      check_repaired (r);
    /* Creation may have been half done. */
    r->leaks |= r->w->create != NULL;
    r->model->may_lose |= r->w->create != NULL;
    fault_store_heal (r->store);
    r->disk = try_to_open (r);
    if (r->disk == NULL)
      wrong ("it does not open: %s", last_line);
    r->nr_told = r->nr_before = nr_lost (r);
  }
  else if (r->w->leaks && r->store->nr_failed != nr_failed)
    r->leaks = true;            /* they may not have been found */
  if (nr_bitmaps (r->disk) != nr_offered (r)) {
    /* They could not be read, so the disk is served without. */
    if (r->store->nr_failed == nr_failed && !r->model->may_lose)
      wrong ("there are %zu bitmaps", nr_bitmaps (r->disk));
    r->model->may_lose = r->leaks = true;
  }
  disk_client_begin (r->disk, &r->client);
  disk_client_begin (r->disk, &r->other);
  r->model->opened = r->now++;
}

/* Every sector of every write is told apart. */
static void
make_data (const struct change *c, uint8_t *data)
{
  for (uint64_t i = 0, n; i < c->count; i += n) {
    const uint64_t sector = (c->offset + i) / 512;
    uint64_t tag = (c->start * UINT64_C (0x9e3779b97f4a7c15))
      ^ sector * UINT64_C (0xbf58476d1ce4e5b9);

    n = min_u64 (c->count - i, 512 - (c->offset + i) % 512);
    for (uint64_t j = 0; j < n; j += 8)
      memcpy (data + i + j, &tag, min_u64 (8, n - j));
  }
}

static int
make_change (struct run *r, const struct step *s, const uint8_t *data)
{
  struct disk *d = r->disk;
  int ret;

  switch (s->kind) {
  case STEP_WRITE:
    return disk_write (d, data, s->count, s->offset, s->fua);
  case STEP_TRIM:
    return disk_trim (d, s->count, s->offset, s->fua);
  case STEP_ZERO_FAST:
    ret = disk_zero (d, s->count, s->offset, false, true, s->fua);
    if (ret == 0 || errno != ENOTSUP)
      return ret;
    return disk_zero (d, s->count, s->offset, false, false, s->fua);
  default:
    return disk_zero (d, s->count, s->offset, s->kind == STEP_ZERO_KEEP,
                      false, s->fua);
  }
}

/* The sectors of a change, as the model has them or as they are served. */
static uint8_t *
copy_sectors (struct run *r, const struct change *c, bool served)
{
  const uint64_t from = round_down (c->offset, 512);
  const uint64_t to = round_up (c->offset + c->count, 512);
  uint8_t *copy = calloc (1, to - from);

  assert_non_null (copy);
  for (uint64_t at = from; at < to; at += 512) {
    const uint8_t *p = model_content (r->model, at);

    if (p == NULL)
      continue;
    if (!served)
      memcpy (copy + (at - from), p, 512);
    else if (disk_read (r->disk, copy + (at - from), 512, at) == -1) {
      free (copy);
      wrong ("guest offset %#" PRIx64 " cannot be read: %s", at, last_line);
    }
  }
  return copy;
}

/* After a failure nobody knows what is there: each sector is old or new, or
 * old if nothing was changed.  The model is told which.
 */
static void
read_back (struct run *r, const struct change *c, const uint8_t *old,
           bool unchanged)
{
  const uint64_t from = round_down (c->offset, 512);
  const uint64_t to = round_up (c->offset + c->count, 512);
  uint8_t *now;
  uint64_t bad = 0;

  r->store->paused = true;
  now = copy_sectors (r, c, true);
  r->store->paused = false;
  for (uint64_t at = from; at < to; at += 512) {
    uint8_t *p = model_content (r->model, at);
    const uint8_t *is = now + (at - from);

    if (p == NULL)
      continue;
    if ((unchanged || memcmp (is, p, 512) != 0) &&
        memcmp (is, old + (at - from), 512) != 0)
      bad = at + 1;
    memcpy (p, is, 512);
  }
  free (now);
  if (bad != 0)
    wrong ("guest offset %#" PRIx64 " is %s", bad - 1, unchanged
           ? "changed without a mark" : "neither old nor new");
}

/* What a request that failed, or did not, has to say. */
static void
check_lines (const struct step *s, int ret, int err)
{
  if (ret == -1 && nr_lines != 1)
    wrong ("%s failed (%s) and %u lines say why", step_name (s),
           strerror (err), nr_lines);
  if (ret == 0 && nr_lines != 0)
    wrong ("%s succeeded, but: %s", step_name (s), last_line);
}

static bool
do_change (struct run *r, const struct step *s)
{
  struct change c = {
    .kind = s->kind == STEP_WRITE ? CHANGE_WRITE
    : s->kind == STEP_TRIM ? CHANGE_TRIM : CHANGE_ZERO,
    .offset = s->offset, .count = s->count, .fua = s->fua,
    .start = r->now++, .end = SIZE_MAX,
  };
  uint8_t *old = copy_sectors (r, &c, false);
  uint8_t *data = malloc (c.count);
  const size_t nr_failed = r->data->nr_own_failed;
  int ret, err;

  assert_non_null (data);
  make_data (&c, data);
  model_begin (r->model, &c, s->kind == STEP_WRITE ? data : NULL);
  nr_lines = 0;
  ret = make_change (r, s, data);
  err = errno;
  if (ret == -1)
    read_back (r, &c, old,
               r->w->beside && r->data->nr_own_failed == nr_failed);
  c.end = r->now++;
  (ret == 0 ? model_end : model_failed) (r->model, &c);
  free (old);
  free (data);
  check_lines (s, ret, err);
  return ret == 0;
}

static void
do_read (struct run *r, const struct step *s, bool *done)
{
  uint8_t *buf = malloc (s->count);
  int ret, err;

  assert_non_null (buf);
  nr_lines = 0;
  ret = disk_read (r->disk, buf, s->count, s->offset);
  err = errno;
  const bool right = ret == -1 ||
    memcmp (buf, model_content (r->model, s->offset), s->count) == 0;
  free (buf);
  check_lines (s, ret, err);
  if (!right)
    wrong ("guest offset %#" PRIx64 " reads wrong", s->offset);
  *done = ret == 0;
}

static bool do_step (struct run *r, unsigned i);
static bool find_what_is (struct run *r, struct checked *k,
                          const struct crash_image *image);
static void check_one (struct run *r, const struct crash_image *image,
                       const char *when, bool stopped);

/* What a client has to do after a flush failed: write again all that he
 * wrote since the last that did not.
 */
static void
write_again (struct run *r, unsigned end)
{
  for (unsigned i = r->flushed; i < end; ++i) {
    const struct step *s = &r->w->steps[i];

    if (s->kind >= STEP_WRITE && s->kind <= STEP_TRIM && !r->failed[i] &&
        !do_change (r, s))
      wrong ("%s cannot be done again: %s", step_name (s), last_line);
  }
  r->may_be_lost = false;
}

/* A stop failed for want of space: all that a bitmap is marked for. */
static void
must_be_unstored (struct run *r, size_t start)
{
  struct checked k;
  bool marked = false;

  model_flushed (r->model, start, r->now);
  if (!find_what_is (r, &k, &r->store->live))
    wrong ("stopped: %s", k.error);
  for (size_t i = 0; i < k.nr_bitmaps; ++i)
    marked |= (k.bitmaps[i].flags & 1) != 0;
  const uint64_t nr_leaked = k.nr_leaked;
  checked_free (&k);
  if (!marked)
    wrong ("the stop failed, but no bitmap is marked: %s", last_line);
  if (nr_leaked != 0 && !r->leaks && !leak_was_told)
    wrong ("the stop failed, and %" PRIu64 " clusters are leaked", nr_leaked);
}

/* A flush or a stop, after the steps before end. */
static bool
do_flush (struct run *r, unsigned end, bool stop)
{
  const size_t start = r->now++, owed = nr_lost (r) - r->nr_told;
  const size_t nr_failed = r->store->nr_own_failed;
  const struct step step = { .kind = STEP_FLUSH };
  int ret, err;

  nr_lines = 0;
  ret = stop ? disk_stop (r->disk) : disk_flush (r->disk, &r->client);
  err = errno;
  if (r->mode->keeps && ret == -1 && !stop)
    wrong ("a flush failed: %s", last_line);
  if (ret == 0 && nr_lost (r) != r->nr_told)
    wrong ("a flush succeeded, but a barrier failed (%zu before it)", owed);
  if (r->w->beside && ret == -1 && !stop && nr_lost (r) == r->nr_told)
    wrong ("a flush failed, but not of the disk: %s", last_line);
  /* A line says that bitmaps could not be stored. */
  if (!stop && r->w->beside && r->store->nr_own_failed != nr_failed)
    nr_lines = ret == -1;
  /* Another that it has more bits than it need have. */
  if (stop && r->w->keep && ret == 0 && r->store->nr_own_failed != nr_failed)
    nr_lines = 0;
  if (!stop)
    check_lines (&step, ret, err);
  else if ((ret == 0) != (nr_lines == 0))
    wrong ("the stop returned %d and %u lines say why", ret, nr_lines);
  if (ret == -1 && r->mode->keeps)
    must_be_unstored (r, start);
  if (ret == -1) {
    if (stop)                   /* the client has heard of that */
      disk_client_begin (r->disk, &r->client);
    r->may_be_lost |= nr_lost (r) != r->nr_told;
    r->nr_told = nr_lost (r);
    return false;
  }
  model_flushed (r->model, start, r->now++);
  /* What failed is not of those that are flushed. */
  for (r->flushed = 0; r->flushed < end && !r->failed[r->flushed];)
    r->flushed++;
  /* Later writes to the same sectors would make good what is not there. */
  if (r->mode->plan.loses) {
    model_sort (r->model);
    model_advance (r->model, r->now);
    check_one (r, &r->store->durable, "cut off", false);
  }
  return true;
}

static bool
do_reopen (struct run *r, unsigned i)
{
  if (!do_flush (r, i, true))
    return false;
  close_disk (r);
  open_disk (r);
  return true;
}

static bool
do_step (struct run *r, unsigned i)
{
  const struct step *s = &r->w->steps[i];
  bool done = false;

  switch (s->kind) {
  case STEP_READ:
    do_read (r, s, &done);
    return done;
  case STEP_FLUSH:
    return do_flush (r, i, false);
  case STEP_REOPEN:
    return do_reopen (r, i);
  default:
    return do_change (r, s);
  }
}

/* A step that must succeed now, but for a flush that owes an error. */
static void
must_do (struct run *r, unsigned i)
{
  const struct step *s = &r->w->steps[i];
  const bool owes = nr_lost (r) != r->nr_told;

  if (do_step (r, i)) {
    r->failed[i] = false;
    return;
  }
  if (!owes || (s->kind != STEP_FLUSH && s->kind != STEP_REOPEN))
    wrong ("the fault has ended, but not for %s (step %u): %s",
           step_name (s), i, last_line);
  write_again (r, i);
  if (!do_step (r, i))
    wrong ("the fault has ended, but not for the second %s: %s",
           step_name (s), last_line);
  r->failed[i] = false;
}

static void
compare_served (struct run *r)
{
  const struct model *m = r->model;
  static uint8_t buf[65536];

  for (unsigned w = 0; w < m->nr_windows; ++w)
    for (uint64_t i = 0; i < m->window_size; i += 2048) {
      const uint64_t at = model_window (m, w) + i;

      if (disk_read (r->disk, buf, 2048, at) == -1)
        wrong ("guest offset %#" PRIx64 " is not served: %s", at, last_line);
      if (memcmp (buf, model_content (m, at), 2048) != 0)
        wrong ("guest offset %#" PRIx64 " is served wrong", at);
    }
}

/* What still has to work while the fault lasts. */
static void
try_the_rest (struct run *r)
{
  const struct step in_place = { STEP_WRITE, 512, 512, false };
  const struct fault_plan *p = &r->mode->plan;

  if ((p->kinds & (FAULT_READ | FAULT_READ_BELOW)) == 0)
    compare_served (r);
  if (!r->w->changes_first &&
      (p->thin || r->mode->limits || r->mode->below || r->mode->keeps) &&
      !do_change (r, &in_place))
    wrong ("no write in place: %s", last_line);
}

/* Room for the disks of images that are read by serving them. */
#define SERVED_SIZE (UINT64_C (8) << 20)
static uint8_t served[SERVED_SIZE];

static void
serve_bitmap (struct disk *d, const struct disk_offer *o,
              struct checked_bitmap *b)
{
  const uint64_t granularity = disk_bitmap_granularity (o);
  const uint64_t size = disk_size (d);
  uint64_t length;
  bool dirty;

  snprintf (b->name, sizeof b->name, "%s", disk_bitmap_name (o));
  b->flags = strcmp (b->name, "off") == 0 ? 0 : 2;
  b->granularity_bits = __builtin_ctzll (granularity);
  b->nr_bits = div_round_up (size, granularity);
  b->bits = calloc (1, div_round_up (b->nr_bits, 8));
  assert_non_null (b->bits);
  for (uint64_t at = 0; at < size; at += length) {
    length = disk_bitmap_run (o, at, size, &dirty);
    for (uint64_t j = at / granularity;
         dirty && j < div_round_up (at + length, granularity); ++j)
      b->bits[j / 8] |= 1 << j % 8;
  }
}

/* The same as check_image finds, of what our checker does not know: read
 * by serving it, and what is outside of the windows not at all.
 */
static bool
serve_image (struct checked *k, const struct workload *w,
             const struct crash_image *image, const struct crash_image *data)
{
  struct disk_options options = { .cache_size = 1, .readonly = true };
  struct container *c = fault_container_view (image), *data_file = NULL;
  bool sound = true;

  memset (k, 0, sizeof *k);
  *k = (struct checked) { .image = image, .cluster_bits = 12,
                          .entry_bits = 3, .unit_bits = 12,
                          .trusted = true, .served = served };
  if (w->files != NULL)
    options.below.raw = fault_container_view (&w->below);
  if (w->data_file)
    options.data_file = data_file = fault_container_view (data);
  struct disk *d = disk_open (c, &options);

  if (d == NULL) {
    container_close (c);
    snprintf (k->error, sizeof k->error, "it does not open: %.200s",
              last_line);
    sound = false;
  }
  else {
    k->disk_size = disk_size (d);
    assert_true (k->disk_size <= SERVED_SIZE);
    for (unsigned i = 0; sound && i < w->windows.nr; ++i) {
      const uint64_t at = i * w->windows.apart;

      sound = disk_read (d, served + at, w->windows.size, at) == 0;
      if (!sound)
        snprintf (k->error, sizeof k->error, "window %u: %.200s", i,
                  last_line);
    }
    struct disk_offers *offers = disk_offers_get (d);

    k->nr_bitmaps = disk_offers_nr (offers);
    assert_true (k->nr_bitmaps <= CHECKED_MAX_BITMAPS);
    for (size_t i = 0; i < k->nr_bitmaps; ++i)
      serve_bitmap (d, disk_offers_at (offers, i), &k->bitmaps[i]);
    disk_offers_put (offers);
    disk_close (d);
  }
  container_close (options.below.raw);
  container_close (data_file);
  return sound;
}

/* Bitmaps that are not served are marked, for all that can be seen. */
static void
add_marked (struct checked *k, const struct model *m)
{
  for (size_t i = 0; i < m->nr_bitmaps; ++i) {
    const struct model_bitmap *b = &m->bitmaps[i];
    struct checked_bitmap *is = &k->bitmaps[k->nr_bitmaps];

    if (checked_find (k, b->name) != NULL)
      continue;
    memcpy (is->name, b->name, sizeof is->name);
    is->flags = 1 | (b->flags & 2);
    is->nr_bits = b->nr_bits;
    k->nr_bitmaps++;
  }
}

/* It is in the store. */
static bool
find_what_is (struct run *r, struct checked *k,
              const struct crash_image *image)
{
  const bool durable = image == &r->store->durable;
  bool sound;

  if (!r->w->by_qemu)
    return check_image (k, image);
  sound = serve_image (k, r->w, image,
                       durable ? &r->data->durable : &r->data->live);
  if (sound && !(r->model->may_lose && k->nr_bitmaps == 0))
    add_marked (k, r->model);
  return sound;
}

static void
check_one (struct run *r, const struct crash_image *image, const char *when,
           bool stopped)
{
  struct checked k;
  const char *error = NULL;
  bool sound = find_what_is (r, &k, image), flags = true;

  if (sound) {
    error = model_check (r->model, &k);
    for (size_t i = 0; stopped && i < k.nr_bitmaps; ++i)
      flags = flags && (k.bitmaps[i].flags & 1) == 0;
  }
  const uint64_t nr_leaked = k.nr_leaked;
  static char text[256];

  memcpy (text, k.error, sizeof text);
  checked_free (&k);
  if (!sound)
    wrong ("%s: %s", when, text);
  if (error != NULL)
    wrong ("%s: %s", when, error);
  if (!flags)
    wrong ("%s: a bitmap is marked", when);
  if (stopped && nr_leaked != 0 && !r->leaks && !leak_was_told)
    wrong ("%s: %" PRIu64 " clusters are leaked", when, nr_leaked);
}

static void
save_image (const struct crash_image *image, const char *file)
{
  FILE *fp = fopen (file, "we");

  assert_non_null (fp);
  assert_int_equal (fwrite (image->bytes, 1, image->size, fp), image->size);
  assert_int_equal (fclose (fp), 0);
}

/* Let QEMU judge it. */
static void
qemu_check (struct run *r, const struct crash_image *image, bool stopped)
{
  const char *file = temp_file ("fault.qcow2");
  const bool leaks = !stopped || r->leaks || leak_was_told;
  int ret;

  save_image (image, file);
  ret = run_command ("qemu-img check -q '%s' >'%s.out' 2>&1", file, file);
  nr_by_qemu++;
  if (ret == 0 || (ret == 3 && leaks))
    return;
  run_command ("cat '%s.out' >&2", file);
  wrong ("qemu-img check says %d", ret);
}

/* The image, as it is and as a power cut would leave it. */
static void
check_images (struct run *r, bool stopped)
{
  model_sort (r->model);
  model_advance (r->model, r->now);
  check_one (r, &r->store->live, stopped ? "stopped" : "killed", stopped);
  check_one (r, &r->store->durable, "cut off", stopped);
  if (nr_runs % (r->w->by_qemu ? 20 : 400) == 0)
    qemu_check (r, &r->store->live, stopped);
}

/* The fault never ended. */
static void
end_badly (struct run *r)
{
  const size_t nr_failed = r->store->nr_failed;
  bool stopped;

  nr_lines = 0;
  stopped = disk_stop (r->disk) == 0;
  if (stopped && r->w->keep && r->store->nr_failed != nr_failed)
    nr_lines = 0;
  if (stopped != (nr_lines == 0))
    wrong ("the stop says %d and %u lines why", stopped, nr_lines);
  if (!stopped && r->store->nr_failed == 0)
    wrong ("the stop failed, but nothing else: %s", last_line);
  close_disk (r);
  /* Nothing was left to be done, but what it failed to give back. */
  if (stopped && r->store->nr_failed != nr_failed)
    r->leaks = true;
  check_images (r, stopped);
}

/* There never was any more space. */
static void
end_full (struct run *r, unsigned nr_steps)
{
  const bool stop = !r->mode->cut_off;
  const bool done = do_flush (r, nr_steps, stop);

  compare_served (r);
  close_disk (r);
  check_images (r, stop && done);
}

/* What was told to one client is told to the other, and not to one that
 * comes after that.
 */
static void
ask_the_other (struct run *r)
{
  const bool owes = nr_lost (r) != r->nr_before;
  struct disk_client next;

  disk_client_begin (r->disk, &next);
  if ((disk_flush (r->disk, &r->other) == -1) != owes)
    wrong ("the other client's flush %s", owes ? "succeeded" : "failed");
  if (disk_flush (r->disk, &r->other) == -1)
    wrong ("the other client's second flush failed: %s", last_line);
  if (disk_flush (r->disk, &next) == -1)
    wrong ("the next client's flush failed: %s", last_line);
}

/* The fault has ended. */
static void
end_well (struct run *r, unsigned nr_steps)
{
  fault_store_heal (r->store);
  if (r->may_be_lost)
    write_again (r, nr_steps);
  /* Changes first: what a write that failed has left is not promised to
   * be durable.
   */
  for (unsigned i = 0; i < nr_steps; ++i)
    if (r->failed[i] && r->w->steps[i].kind < STEP_FLUSH)
      must_do (r, i);
  for (unsigned i = 0; i < nr_steps; ++i)
    if (r->failed[i])
      must_do (r, i);
  if (!do_flush (r, nr_steps, false)) {
    write_again (r, nr_steps);
    if (!do_flush (r, nr_steps, false))
      wrong ("the fault has ended, but not for a flush: %s", last_line);
  }
  ask_the_other (r);
  compare_served (r);
  check_images (r, false);
  if (!do_flush (r, nr_steps, true))
    wrong ("no clean stop: %s", last_line);
  close_disk (r);
  check_images (r, true);
  open_disk (r);
  compare_served (r);
}

static void
run_steps (struct run *r)
{
  const struct step *s = r->w->steps;
  const bool for_good = r->mode->plan.for_good || r->mode->limits;
  unsigned i;

  open_disk (r);
  for (i = 0; s[i].kind != STEP_END; ++i) {
    const size_t nr_failed = r->store->nr_failed, nr_told = r->nr_told;

    if (do_step (r, i))
      continue;
    r->failed[i] = true;
    if (r->store->nr_failed == nr_failed && nr_lost (r) == nr_told)
      wrong ("%s (step %u) failed, but nothing below it: %s",
             step_name (&s[i]), i, last_line);
    if (r->w->beside && (r->mode->limits || r->mode->plan.thin) &&
        s[i].kind != STEP_REOPEN)
      wrong ("%s (step %u) failed for want of space: %s", step_name (&s[i]),
             i, last_line);
    if (for_good || r->mode->keeps)
      try_the_rest (r);
    else {
      if (s[i].kind == STEP_FLUSH || s[i].kind == STEP_REOPEN)
        write_again (r, i);
      must_do (r, i);
    }
  }
  if (r->mode->never_ends && r->mode->keeps)
    end_full (r, i);
  else if (r->mode->never_ends)
    end_badly (r);
  else
    end_well (r, i);
}

static struct model *
make_model (const struct workload *w)
{
  struct checked base;
  struct model *m;

  if (!(w->by_qemu ? serve_image (&base, w, &w->image, &w->data)
        : check_image (&base, &w->image)))
    fail_msg ("%s: %s", w->name, base.error);
  m = model_new (&base, &w->windows);
  if (w->by_qemu)
    m->active_size = 0;
  if (w->create != NULL)
    model_expect_bitmap (m, w->create, 12);
  checked_free (&base);
  return m;
}

/* The first, and those that share its plan. */
static struct fault_store *first_store, *below_store, *data_store;

static void
begin_run (struct run *r, const struct fault_plan *plan)
{
  const struct workload *w = r->w;

  r->below = below_store;
  r->data = data_store;
  r->model = make_model (w);
  if (w->files != NULL)
    fault_store_reset (r->below, &w->below, plan);
  if (w->data_file)
    fault_store_reset (r->data, &w->data, plan);
  if (w->beside)
    fault_store_reset (r->data, &w->data, plan);
  fault_store_reset (r->store, &w->image, plan);
  r->store->live.beside = r->store->durable.beside = w->beside;
  r->store->live.data = w->beside ? &r->data->live : NULL;
  r->store->durable.data = w->beside ? &r->data->durable : NULL;
  leak_was_told = false;
}

/* One run.  Returns how many calls, or blocks, were counted. */
static size_t
run_one (const struct workload *w, const struct mode *mode, size_t k)
{
  struct fault_store *store = first_store;
  static struct run r;
  struct fault_plan plan = mode->plan;

  plan.first = k;
  if (mode->limits)
    plan.limit = k;
  snprintf (what_runs, sizeof what_runs, "%s:%s:%zd", w->name, mode->name, k);
  alarm (PATIENCE);
  r = (struct run) { .w = w, .mode = mode, .k = k, .store = store, .now = 2 };
  begin_run (&r, &plan);
  if (setjmp (end_of_run) == 0)
    run_steps (&r);
  close_disk (&r);
  model_free (r.model);
  nr_runs++;
  nr_faults += store->nr_failed;
  return store->counted;
}

/* The size that the image comes to have without faults. */
static uint64_t
largest_size (const struct workload *w)
{
  const struct mode none = { .name = "none", .plan = { .kinds = 0 },
                             .never_ends = true };
  struct run r = { .w = w, .mode = &none, .store = first_store, .now = 2 };

  begin_run (&r, &none.plan);
  open_disk (&r);
  for (unsigned i = 0; w->steps[i].kind != STEP_END; ++i)
    if (!do_step (&r, i))
      fail_msg ("%s: %s (step %u) fails without a fault: %s", w->name,
                step_name (&w->steps[i]), i, last_line);
  const uint64_t size = first_store->live.size;
  close_disk (&r);
  model_free (r.model);
  return size;
}

static void
run_limits (const struct workload *w, const struct mode *mode)
{
  const uint64_t largest = largest_size (w);

  for (uint64_t limit = w->image.size; limit <= largest;
       limit += 1024 * fault_every)
    run_one (w, mode, limit);
}

static void
run_mode (const struct workload *w, const struct mode *mode)
{
  size_t nr;

  if ((mode->plan.loses && !w->whole) || (mode->below && w->files == NULL))
    return;
  if (mode->limits) {
    run_limits (w, mode);
    return;
  }
  nr = run_one (w, mode, SIZE_MAX);
  for (size_t k = 0; k < nr; k += fault_every)
    run_one (w, mode, k);
}

void
fault_runs (const struct workload *w, const struct mode *modes,
            size_t nr_modes)
{
  const uint64_t runs = nr_runs;

  for (size_t i = 0; i < nr_modes; ++i)
    run_mode (w, &modes[i]);
  print_message ("%s: %" PRIu64 " runs\n", w->name, nr_runs - runs);
}

bool
fault_run_chosen (const struct workload *w, const struct mode *modes,
                  size_t nr_modes)
{
  const char *only = getenv ("FAULT_RUN");

  for (size_t i = 0; only != NULL && i < nr_modes; ++i) {
    char name[128];
    const int n = snprintf (name, sizeof name, "%s:%s:", w->name,
                            modes[i].name);

    if (strncmp (only, name, n) == 0) {
      run_one (w, &modes[i], strtoull (only + n, NULL, 0));
      return true;
    }
  }
  return false;
}

void
fault_runs_begin (void)
{
  first_store = fault_store_new (FAULT_ROOM, NULL);
  below_store = fault_store_new (FAULT_ROOM, first_store);
  below_store->is_below = true;
  data_store = fault_store_new (FAULT_ROOM, first_store);
  report_sink = note_line;
  signal (SIGALRM, hangs);
}

void
fault_runs_end (void)
{
  alarm (0);
  fault_store_free (below_store);
  fault_store_free (data_store);
  first_store->live.data = first_store->durable.data = NULL;
  fault_store_free (first_store);
  print_message ("%" PRIu64 " runs, %" PRIu64 " failures below, %" PRIu64
                 " images judged by QEMU\n", nr_runs, nr_faults, nr_by_qemu);
  assert_int_equal (nr_wrong, 0);
}
