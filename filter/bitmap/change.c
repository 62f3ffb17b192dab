/* nbdkit-dirty-bitmap-filter
 * SPDX-License-Identifier: BSD-3-Clause
 * Copyright the nbdkit-dirty-bitmap-filter authors
 */

/* The actions of a change: what the set shall be.
 *
 * A change begins with a draft of each bitmap as it is.  Each action checks
 * and alters the drafts, so the next one sees its result, and the set is not
 * touched.  Bits are not touched either: a draft lists the bitmaps whose bits
 * it shall have.
 *
 * Checks come in QEMU's order and have QEMU's texts (blockdev.c,
 * block/dirty-bitmap.c and block/qcow2-bitmap.c there).
 */

#include <config.h>

#include <assert.h>
#include <ctype.h>
#include <errno.h>
#include <stdlib.h>
#include <string.h>

#include "bitmap/draft.h"
#include "common/bytes.h"
#include "common/report.h"
#include "common/vector.h"

static int
invalid (void)
{
  errno = EINVAL;
  return -1;
}

static int
no_memory (void)
{
  report_error ("malloc: %m");
  return -1;
}

static void
draft_free (struct draft *d)
{
  bitmap_put (d->frozen);
  ahead_free (&d->ahead);
  free (d->name);
  free (d->content);
}

static int
add_content (struct draft *d, struct content c)
{
  if (c.shift < d->shift)
    c.shift = d->shift;
  for (size_t i = 0; i < d->nr_content; ++i)
    if (d->content[i].bitmap == c.bitmap) {
      if (d->content[i].shift < c.shift)
        d->content[i].shift = c.shift;
      return 0;
    }
  if (vector_reserve (d->content, d->nr_content, d->max_content, 1) == -1)
    return no_memory ();
  d->content[d->nr_content++] = c;
  return 0;
}

static struct draft *
append_draft (struct bitmap_change *c, const char *name)
{
  struct draft *d;

  if (vector_reserve (c->drafts, c->nr_drafts, c->max_drafts, 1) == -1) {
    no_memory ();
    return NULL;
  }
  d = &c->drafts[c->nr_drafts];
  *d = (struct draft) { .name = strdup (name) };
  if (d->name == NULL) {
    no_memory ();
    return NULL;
  }
  c->nr_drafts++;
  return d;
}

static int
draft_as_it_is (struct bitmap_change *c, struct bitmap *b)
{
  struct draft *d = append_draft (c, b->name);

  if (d == NULL)
    return -1;
  d->shift = b->shift;
  d->enabled = bitmap_is_enabled (b);
  d->in_ram = b->in_ram;
  d->original = b;
  return add_content (d, (struct content) { .bitmap = b, .shift = b->shift });
}

struct bitmap_change *
bitmap_change_begin (struct bitmap_set *set, const char *image,
                     bitmap_is_busy_fn is_busy, void *opaque)
{
  struct bitmap_change *c = calloc (1, sizeof *c);

  if (c == NULL) {
    no_memory ();
    return NULL;
  }
  c->set = set;
  c->image = image;
  c->is_busy = is_busy;
  c->opaque = opaque;
  for (size_t i = 0; i < set->nr_bitmaps; ++i)
    if (draft_as_it_is (c, set->bitmaps[i]) == -1) {
      bitmap_change_end (c);
      return NULL;
    }
  return c;
}

void
bitmap_change_end (struct bitmap_change *c)
{
  const int err = errno;

  if (c == NULL)
    return;
  bitmap_change_give_back (c);
  for (size_t i = 0; i < c->nr_drafts; ++i)
    draft_free (&c->drafts[i]);
  free (c->drafts);
  free (c->goes_on);
  free (c);
  errno = err;
}

struct draft *
draft_find (const struct bitmap_change *c, const char *name)
{
  for (size_t i = 0; i < c->nr_drafts; ++i)
    if (strcmp (c->drafts[i].name, name) == 0)
      return &c->drafts[i];
  return NULL;
}

static int
busy (const char *shown_name)
{
  report_error ("Bitmap '%s' is currently in use by another operation and "
                "cannot be used", shown_name);
  errno = EBUSY;
  return -1;
}

/* What must not be true of a bitmap that an action is for. */
enum { NOT_READONLY = 1, NOT_INCONSISTENT = 2 };

static int
check_state (const struct bitmap_change *c, const struct draft *d,
             unsigned checks, bool force)
{
  const struct bitmap *b = d->original;
  const struct bitmap_shown_name shown =
    bitmap_show_name (d->name, strlen (d->name));

  /* force does not end a backup. */
  if (d->begins_backup || (b != NULL && b->since != NULL && !d->ends_backup))
    return busy (shown.text);
  if (b == NULL)
    return 0;
  if (!force && c->is_busy != NULL && c->is_busy (c->opaque, b))
    return busy (shown.text);
  if ((checks & NOT_READONLY) && c->set->readonly && !d->in_ram) {
    report_error ("Bitmap '%s' is readonly and cannot be modified",
                  shown.text);
    errno = EROFS;
    return -1;
  }
  if ((checks & NOT_INCONSISTENT) && b->inconsistent) {
    report_error ("Bitmap '%s' is inconsistent and cannot be used",
                  shown.text);
    return invalid ();
  }
  return 0;
}

/* The draft of a bitmap that an action is for, or NULL. */
static struct draft *
take (struct bitmap_change *c, const char *name, unsigned checks, bool force)
{
  struct draft *d = draft_find (c, name);

  if (d == NULL) {
    report_error ("Dirty bitmap '%s' not found",
                  bitmap_show_name (name, strlen (name)).text);
    errno = ENOENT;
    return NULL;
  }
  return check_state (c, d, checks, force) == 0 ? d : NULL;
}

/* The image has to change on account of this bitmap. */
static void
touch (struct bitmap_change *c, struct draft *d, bool force)
{
  d->is_forced |= force;
  c->is_in_image |= !d->in_ram;
}

/* May another bitmap be stored? */
static int
check_can_store (struct bitmap_change *c, const char *name,
                 uint64_t granularity)
{
  struct bitmap_set *set = c->set;
  uint64_t nr = 0, bytes = 0;
  struct bitmap_damage damage;
  int r;

  for (size_t i = 0; i < c->nr_drafts; ++i)
    if (!c->drafts[i].in_ram) {
      nr++;
      bytes += bitmap_directory_entry_bytes (strlen (c->drafts[i].name));
    }
  if (set->store == STORE_DAMAGED)
    r = bitmap_damage (&damage, "The bitmaps that the image has are damaged: "
                       "%.400s", set->damage.what);
  else if (qcow2_version (set->image) < 3)
    r = bitmap_damage (&damage, "Cannot store dirty bitmaps in qcow2 v2 "
                       "files");
  else if (set->readonly)
    r = bitmap_damage (&damage, "The image is read-only");
  else
    r = bitmap_directory_check_new (name, granularity, &set->geometry, nr,
                                    bytes, &damage);
  if (r == 0)
    return 0;
  damage.what[0] = toupper ((unsigned char) damage.what[0]);
  report_error ("Can't make bitmap '%s' persistent in '%s': %s",
                bitmap_show_name (name, strlen (name)).text, c->image,
                damage.what);
  return invalid ();
}

int
bitmap_change_add (struct bitmap_change *c, const char *name,
                   bool has_granularity, uint64_t granularity, unsigned flags)
{
  const struct bitmap_shown_name shown =
    bitmap_show_name (name, strlen (name));
  const bool in_ram = flags & BITMAP_ADD_IN_RAM;
  struct draft *d;

  if (*name == '\0') {
    report_error ("Bitmap name cannot be empty");
    return invalid ();
  }
  if (!has_granularity)
    granularity = bitmap_default_granularity (c->set);
  else if (granularity < 512 || !is_power_of_2 (granularity)) {
    report_error ("Granularity must be power of 2 and at least 512");
    return invalid ();
  }
  if (!in_ram && check_can_store (c, name, granularity) == -1)
    return -1;
  if (draft_find (c, name) != NULL) {
    report_error ("Bitmap already exists: %s", shown.text);
    errno = EEXIST;
    return -1;
  }
  if (strlen (name) > BITMAP_MAX_NAME_BYTES) {
    report_error ("Bitmap name too long: %s", shown.text);
    return invalid ();
  }
  d = append_draft (c, name);
  if (d == NULL)
    return -1;
  d->shift = __builtin_ctzll (granularity);
  d->enabled = !(flags & BITMAP_ADD_DISABLED);
  d->in_ram = in_ram;
  d->is_new = true;
  touch (c, d, false);
  return 0;
}

int
bitmap_change_remove (struct bitmap_change *c, const char *name, bool force)
{
  struct draft *d = take (c, name, NOT_READONLY, force);

  if (d == NULL)
    return -1;
  touch (c, d, force);
  draft_free (d);
  c->nr_drafts--;
  memmove (d, d + 1, (c->nr_drafts - (d - c->drafts)) * sizeof *d);
  return 0;
}

int
bitmap_change_clear (struct bitmap_change *c, const char *name, bool force)
{
  struct draft *d = take (c, name, NOT_READONLY | NOT_INCONSISTENT, force);

  if (d == NULL)
    return -1;
  d->nr_content = 0;
  d->is_new = true;
  touch (c, d, force);
  return 0;
}

/* QEMU allows this of a read-only image, and forgets it. */
static int
set_enabled (struct bitmap_change *c, const char *name, bool enabled,
             bool force)
{
  struct draft *d = take (c, name, NOT_READONLY | NOT_INCONSISTENT, force);

  if (d == NULL)
    return -1;
  if (d->enabled != enabled) {
    d->enabled = enabled;
    touch (c, d, force);
  }
  return 0;
}

int
bitmap_change_enable (struct bitmap_change *c, const char *name, bool force)
{
  return set_enabled (c, name, true, force);
}

int
bitmap_change_disable (struct bitmap_change *c, const char *name, bool force)
{
  return set_enabled (c, name, false, force);
}

/* Add the content of a source to that of the target. */
static int
merge_one (struct bitmap_change *c, const char *target, const char *source,
           bool force)
{
  struct draft *from = take (c, source, NOT_INCONSISTENT, force);
  struct draft *to = draft_find (c, target);

  if (from == NULL)
    return -1;
  for (size_t i = 0; i < from->nr_content; ++i)
    if (add_content (to, from->content[i]) == -1)
      return -1;
  return 0;
}

/* QEMU looks at the sources first. */
int
bitmap_change_merge (struct bitmap_change *c, const char *target,
                     const char *const *sources, size_t nr_sources,
                     bool force)
{
  struct draft *to = draft_find (c, target);

  if (to == NULL) {
    report_error ("Dirty bitmap '%s' not found",
                  bitmap_show_name (target, strlen (target)).text);
    errno = ENOENT;
    return -1;
  }
  for (size_t i = 0; i < nr_sources; ++i)
    if (take (c, sources[i], NOT_INCONSISTENT, force) == NULL)
      return -1;
  if (check_state (c, to, NOT_READONLY | NOT_INCONSISTENT, force) == -1)
    return -1;
  for (size_t i = 0; i < nr_sources; ++i)
    if (merge_one (c, target, sources[i], force) == -1)
      return -1;
  if (nr_sources > 0) {
    to->is_new = true;
    touch (c, to, force);
  }
  return 0;
}

/* The bitmap does not exist, or cannot be used. */
static int
create_for_backup (struct bitmap_change *c, const char *name,
                   bool has_granularity, uint64_t granularity)
{
  struct draft *d = draft_find (c, name);

  if (d != NULL && bitmap_change_remove (c, name, false) == -1)
    return -1;
  if (bitmap_change_add (c, name, has_granularity, granularity, 0) == -1)
    return -1;
  draft_find (c, name)->is_all_dirty = true;
  return 0;
}

int
bitmap_change_begin_backup (struct bitmap_change *c, const char *name,
                            bool create, bool has_granularity,
                            uint64_t granularity, bool freeze,
                            enum bitmap_backup_action *action)
{
  struct draft *d = draft_find (c, name);
  const bool is_inconsistent =
    d != NULL && d->original != NULL && d->original->inconsistent;

  *action = d == NULL ? BITMAP_BACKUP_CREATED
    : is_inconsistent ? BITMAP_BACKUP_RECREATED : BITMAP_BACKUP_USED;
  if (create && *action != BITMAP_BACKUP_USED &&
      create_for_backup (c, name, has_granularity, granularity) == -1)
    return -1;
  d = take (c, name, NOT_READONLY | NOT_INCONSISTENT, true);
  if (d == NULL)
    return -1;
  if (!d->enabled) {
    report_error ("Bitmap '%s' is disabled and does not record",
                  bitmap_show_name (name, strlen (name)).text);
    return invalid ();
  }
  d->begins_backup = true;
  d->is_to_freeze = freeze;
  return 0;
}

void
bitmap_change_set_lost (struct bitmap_change *c, const char *name,
                        unsigned long lost)
{
  struct draft *d = draft_find (c, name);

  assert (d->begins_backup);
  d->lost = lost;
}

int
bitmap_change_end_backup (struct bitmap_change *c, const char *name,
                          bool clear)
{
  struct draft *d = draft_find (c, name);

  if (d == NULL || d->original == NULL || d->original->since == NULL ||
      d->ends_backup) {
    report_error ("There is no backup of bitmap '%s'",
                  bitmap_show_name (name, strlen (name)).text);
    errno = ENOENT;
    return -1;
  }
  d->ends_backup = true;
  if (!clear)
    return 0;
  d->nr_content = 0;
  if (add_content (d, (struct content) { .bitmap = d->original->since,
                                         .shift = d->shift }) == -1)
    return -1;
  d->is_new = true;
  touch (c, d, true);
  return 0;
}

unsigned long
bitmap_change_lost (const struct bitmap_change *c, const char *name)
{
  const struct draft *d = draft_find (c, name);

  assert (d->ends_backup);
  return d->original->since->lost;
}

bool
bitmap_change_is_in_ram (const struct bitmap_change *c)
{
  return !c->is_in_image;
}

bool
bitmap_change_needs_tidy (const struct bitmap_change *c)
{
  for (size_t i = 0; i < c->nr_drafts; ++i) {
    const struct draft *d = &c->drafts[i];

    if (!d->is_new && !d->in_ram && !d->enabled &&
        bitmap_is_enabled (d->original))
      return true;
  }
  return false;
}
