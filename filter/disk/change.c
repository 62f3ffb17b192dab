/* nbdkit-dirty-bitmap-filter
 * SPDX-License-Identifier: BSD-3-Clause
 * Copyright the nbdkit-dirty-bitmap-filter authors
 */

/* Changing the set of the image's bitmaps while the disk is served.
 *
 * bitmap/change.h has the steps of a change, and what they need.  Here the
 * rest of the disk is kept still meanwhile:
 *
 *   the gate is closed     no mark is under way, so no bit changes
 *   the set is paused      nothing is tidied
 *   the flush lock         no flush is under way
 *   lists_lock             no thread reads the lists; held for a moment, at
 *                          the end
 *
 * in this order, since a thread in a section of the gate may flush.  A change
 * costs three barriers, and time in proportion to the set bits of the bitmaps
 * that are altered.  Changes and flushes of the disk wait for it; reads do
 * not.
 *
 * The flush at the beginning stores all bitmaps, so that those that a change
 * does not alter are not in use in the new directory either.
 */

#include <config.h>

#include <errno.h>
#include <stdlib.h>
#include <string.h>

#include "bitmap/change.h"
#include "common/report.h"
#include "disk/change.h"
#include "disk/data.h"
#include "disk/flush.h"
#include "disk/internal.h"
#include "qcow2/bitmap-directory.h"
#include "qcow2/order.h"
#include "qcow2/steps.h"

/* How long requests under way may take before a change gives up. */
#define GATE_TIMEOUT_MS 10000

/* What belongs to an action. */
struct note {
  struct disk_view *view;       /* made for a backup that begins, or NULL */
  unsigned long lost;           /* data_lost when the backup began that ends */
};

/* A change under way. */
struct run {
  struct disk *d;
  struct bitmap_change *c;
  struct disk_action *actions;
  struct note *notes;           /* of the action of the same index */
  size_t nr_actions;
};

/* A barrier that fails while the gate is being closed counts, too: the client
 * may have written before the backup began.
 */
static int
note_begin (struct run *run, struct disk_action *a, struct note *note)
{
  if (bitmap_change_begin_backup (run->c, a->name, a->create,
                                  a->has_granularity, a->granularity,
                                  a->view, &a->done) == -1)
    return -1;
  bitmap_change_set_lost (run->c, a->name, data_lost (run->d));
  if (!a->view)
    return 0;
  note->view = view_new (run->d, a->name);
  return note->view == NULL ? -1 : 0;
}

static int
note_end (struct bitmap_change *c, const struct disk_action *a,
          struct note *note)
{
  if (bitmap_change_end_backup (c, a->name, a->clear) == -1)
    return -1;
  note->lost = bitmap_change_lost (c, a->name);
  return 0;
}

static int
note_action (struct run *run, struct disk_action *a, struct note *note)
{
  struct bitmap_change *c = run->c;

  switch (a->type) {
  case DISK_BITMAP_ADD:
    return bitmap_change_add (c, a->name,
                              a->has_granularity, a->granularity,
                              (a->disabled ? BITMAP_ADD_DISABLED : 0) |
                              (a->persistent ? 0 : BITMAP_ADD_IN_RAM));
  case DISK_BITMAP_REMOVE:
    return bitmap_change_remove (c, a->name, a->force);
  case DISK_BITMAP_CLEAR:
    return bitmap_change_clear (c, a->name, a->force);
  case DISK_BITMAP_ENABLE:
    return bitmap_change_enable (c, a->name, a->force);
  case DISK_BITMAP_DISABLE:
    return bitmap_change_disable (c, a->name, a->force);
  case DISK_BITMAP_MERGE:
    return bitmap_change_merge (c, a->name, a->sources, a->nr_sources,
                                a->force);
  case DISK_BACKUP_BEGIN:
    return note_begin (run, a, note);
  case DISK_BACKUP_END:
    return note_end (c, a, note);
  }
  abort ();
}

static bool
is_busy (void *opaque, const struct bitmap *b)
{
  const struct disk *d = opaque;

  return offers_is_held (&d->offers, b);
}

/* The offers of the set that is to be, and of the backing files. */
static struct disk_offers *
prepare_offers (struct disk *d, const struct bitmap_change *c)
{
  size_t nr = bitmap_change_nr_exposed (c);
  struct offer_source *sources;
  struct disk_offers *offers;

  for (size_t i = 1; i < d->nr_sets; ++i)
    nr += bitmap_set_nr_exposed (d->sets[i]);
  sources = calloc (nr + 1, sizeof *sources);
  if (sources == NULL) {
    report_error ("calloc: %m");
    return NULL;
  }
  for (nr = 0; nr < bitmap_change_nr_exposed (c); ++nr) {
    sources[nr].size = d->size;
    sources[nr].bitmap = bitmap_change_exposed (c, nr, &sources[nr].goes_on);
  }
  for (size_t i = 1; i < d->nr_sets; ++i)
    nr = offer_sources_add (sources, nr, d->sets[i], d->sizes[i]);
  offers = offers_prepare_from (sources, nr);
  free (sources);
  return offers;
}

static int
put_in_image (struct disk *d, struct bitmap_change *c)
{
  const unsigned long lost = qcow2_lost (d->qcow2);

  if (bitmap_change_store (c) == -1 ||
      (ORDER (DIRECTORY_BEFORE_HEADER) &&
       image_flush_locked (d->qcow2, NULL) == -1))
    return -1;
  if (qcow2_lost (d->qcow2) != lost) {
    report_error ("a flush of the image failed while its bitmaps were "
                  "changed");
    errno = EIO;
    return -1;
  }
  return bitmap_change_switch (c);
}

/* May a backup end so (I11)?  The data that it has read may not be those that
 * the storage has, if a barrier has failed since it began.  Then its bitmap
 * must keep the bits.
 */
static int
check_end (const struct disk *d, const struct disk_action *a,
           const struct note *note)
{
  if (a->success && view_check_whole (d, a->name) == -1)
    return -1;
  if (!a->clear || data_lost (d) == note->lost)
    return 0;
  report_error ("A flush has failed since the backup of bitmap '%s' began: "
                "what it has copied may be lost on the disk",
                bitmap_show_name (a->name, strlen (a->name)).text);
  errno = EIO;
  return -1;
}

/* What can fail in beginning and ending backups and their views. */
static int
prepare_backups (struct run *r)
{
  int reserved;

  pthread_rwlock_wrlock (&r->d->lists_lock);
  reserved = views_reserve (r->d, r->nr_actions);
  pthread_rwlock_unlock (&r->d->lists_lock);
  if (reserved == -1)
    return -1;
  for (size_t i = 0; i < r->nr_actions; ++i) {
    struct disk_action *a = &r->actions[i];

    if (a->type == DISK_BACKUP_BEGIN || a->type == DISK_BACKUP_END)
      a->dirty_bytes = bitmap_change_dirty_bytes (r->c, a->name);
    if (a->type == DISK_BACKUP_END && check_end (r->d, a, &r->notes[i]) == -1)
      return -1;
    if (r->notes[i].view != NULL &&
        view_freeze (r->notes[i].view,
                     bitmap_change_frozen (r->c, a->name),
                     a->dirty_only) == -1)
      return -1;
  }
  return 0;
}

static void
switch_views (struct run *r)
{
  for (size_t i = 0; i < r->nr_actions; ++i) {
    if (r->actions[i].type == DISK_BACKUP_END)
      view_end (r->d, r->actions[i].name);
    if (r->notes[i].view != NULL)
      view_add (r->notes[i].view);
    r->notes[i].view = NULL;
  }
}

/* All else is still. */
static int
carry_out (struct run *r)
{
  const bool in_ram = bitmap_change_is_in_ram (r->c);
  struct disk *d = r->d;
  struct bitmap_change *c = r->c;
  struct disk_offers *offers;

  if (!in_ram && (data_flush (d) == -1 ||
                  image_flush_locked (d->qcow2, d->bitmaps) == -1))
    return -1;
  if (bitmap_change_prepare (c) == -1 || prepare_backups (r) == -1)
    return -1;
  offers = prepare_offers (d, c);
  if (offers == NULL)
    return -1;
  if (!in_ram && put_in_image (d, c) == -1) {
    offers_abandon (offers);
    return -1;
  }
  pthread_rwlock_wrlock (&d->lists_lock);
  bitmap_change_adopt (c);
  offers_switch (&d->offers, offers);
  switch_views (r);
  pthread_rwlock_unlock (&d->lists_lock);
  return 0;
}

static int
close_gate (struct disk *d)
{
  if (disk_gate_close (&d->gate, GATE_TIMEOUT_MS) == 0)
    return 0;
  report_error ("requests under way did not end within %d seconds",
                GATE_TIMEOUT_MS / 1000);
  return -1;
}

int
disk_close_gate (struct disk *d)
{
  if (!d->gate_is_held && close_gate (d) == -1)
    return -1;
  d->gate_is_held = true;
  return 0;
}

void
disk_open_gate (struct disk *d)
{
  if (d->gate_is_held)
    disk_gate_open (&d->gate);
  d->gate_is_held = false;
}

/* With the gate closed. */
static int
change_paused (struct run *run)
{
  struct disk *d = run->d;
  int r = 0, err;

  bitmap_set_pause (d->bitmaps);
  if (bitmap_change_needs_tidy (run->c))
    r = bitmap_set_tidy_paused (d->bitmaps);
  qcow2_flush_lock (d->qcow2);
  if (r == 0)
    r = carry_out (run);
  bitmap_change_end (run->c);
  err = errno;
  qcow2_flush_unlock (d->qcow2);
  bitmap_set_resume (d->bitmaps);
  errno = err;
  return r;
}

/* Note the actions, and make what needs no closed gate. */
static int
begin (struct run *run)
{
  for (size_t i = 0; i < run->nr_actions; ++i)
    if (note_action (run, &run->actions[i], &run->notes[i]) == -1)
      return -1;
  return 0;
}

static int
change_with_views (struct run *run)
{
  struct disk *d = run->d;
  const bool is_closed = d->gate_is_held;
  int r = begin (run), err;

  if (r == 0 && !is_closed)
    r = close_gate (d);
  if (r == -1) {
    bitmap_change_end (run->c);
    return -1;
  }
  r = change_paused (run);
  err = errno;
  if (!is_closed)
    disk_gate_open (&d->gate);
  bitmap_set_tell_unstored (d->bitmaps);
  errno = err;
  return r;
}

static int
change (struct disk *d, const char *image, struct disk_action *actions,
        size_t nr_actions)
{
  struct run run = {
    .d = d, .actions = actions, .nr_actions = nr_actions,
    .c = bitmap_change_begin (d->bitmaps, image, is_busy, d),
  };
  int r, err;

  if (run.c == NULL)
    return -1;
  run.notes = calloc (nr_actions + 1, sizeof run.notes[0]);
  if (run.notes == NULL) {
    report_error ("calloc: %m");
    bitmap_change_end (run.c);
    return -1;
  }
  r = change_with_views (&run);
  err = errno;
  for (size_t i = 0; i < nr_actions; ++i)
    disk_view_put (run.notes[i].view);
  free (run.notes);
  errno = err;
  return r;
}

int
disk_change_bitmaps (struct disk *d, const char *image,
                     struct disk_action *actions, size_t nr_actions)
{
  struct report_hold hold;
  int r;

  if (bitmap_set_settle_doubt (d->bitmaps) == -1)
    return -1;
  report_hold_begin (&hold);
  r = change (d, image, actions, nr_actions);
  if (r == -1 && errno == ENOSPC && qcow2_can_reclaim (d->qcow2) &&
      qcow2_reclaim_quietly (d->qcow2) == 0) {
    report_hold_end (&hold);
    return change (d, image, actions, nr_actions);
  }
  return report_hold_result (&hold, r);
}
