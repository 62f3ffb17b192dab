/* nbdkit-dirty-bitmap-filter
 * SPDX-License-Identifier: BSD-3-Clause
 * Copyright the nbdkit-dirty-bitmap-filter authors
 */

/* The names of exports: what each stands for, its description, and the list of
 * them.
 */

#include <config.h>

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "common/cleanup.h"
#include "common/vector.h"
#include "disk/disk.h"
#include "nbd/exports.h"

size_t exports_list_max = 10000;

static bool
is_name (const char *s, const char *name, size_t length)
{
  return strlen (s) == length && memcmp (s, name, length) == 0;
}

/* Has the name this prefix?  If so, the rest of it is left. */
static bool
take_prefix (const char *prefix, const char **name, size_t *length)
{
  const size_t n = strlen (prefix);

  if (*length < n || memcmp (*name, prefix, n) != 0)
    return false;
  *name += n;
  *length -= n;
  return true;
}

bool
export_find (const struct disk *disk, const struct export_options *o,
             const char *name, size_t length, struct export *e)
{
  *e = (struct export) { .delta = NULL };
  if (take_prefix (EXPORT_DELTA_PREFIX, &name, &length)) {
    e->delta = disk_find_offer (disk, name, length);
    return e->delta != NULL;
  }
  if (take_prefix (EXPORT_VIEW_PREFIX, &name, &length)) {
    e->view = disk_find_view (disk, name, length);
    return e->view != NULL;
  }
  return o->name == NULL || is_name (o->name, name, length);
}

struct export
export_get (const struct export *e)
{
  return (struct export) {
    .delta = e->delta == NULL ? NULL : disk_offer_get (e->delta),
    .view = e->view == NULL ? NULL : disk_view_get (e->view),
  };
}

void
export_put (struct export *e)
{
  disk_offer_put (e->delta);
  disk_view_put (e->view);
  *e = (struct export) { .delta = NULL };
}

void
export_hold (const struct export *e)
{
  if (e->delta != NULL)
    disk_bitmap_hold (e->delta);
  if (e->view != NULL)
    disk_view_hold (e->view);
}

void
export_release (const struct export *e)
{
  if (e->delta != NULL)
    disk_bitmap_release (e->delta);
  if (e->view != NULL)
    disk_view_release (e->view);
}

struct disk_offers *
export_offers (const struct disk *disk, const struct export *e)
{
  if (e->delta != NULL)
    return NULL;
  return e->view != NULL ? disk_view_offers (e->view) : disk_offers_get (disk);
}

/* What asprintf has made of a description or a name. */
static int
made (int r, char **string)
{
  if (r != -1)
    return 0;
  *string = NULL;
  return -1;
}

static int
describe_disk (const struct export_options *o, char **description)
{
  *description = NULL;
  if (o->description == NULL || o->description[0] == '\0')
    return 0;
  *description = strdup (o->description);
  return *description != NULL ? 0 : -1;
}

static int
describe_delta (const char *bitmap, char **description)
{
  return made (asprintf (description, "what was changed according to the "
                         "dirty bitmap %s", bitmap), description);
}

static int
describe_view (const char *bitmap, char **description)
{
  return made (asprintf (description, "the disk as it was when the backup of "
                         "the dirty bitmap %s began", bitmap), description);
}

int
export_describe (const struct export_options *o, const struct export *e,
                 char **description)
{
  if (e->delta != NULL)
    return describe_delta (disk_bitmap_name (e->delta), description);
  if (e->view != NULL)
    return describe_view (disk_view_name (e->view), description);
  return describe_disk (o, description);
}

/* What a list is told to. */
struct listing {
  int (*fn) (void *opaque, const char *name, const char *description);
  void *opaque;
};

static int
list_disk (const struct export_options *o, const struct listing *l)
{
  CLEANUP_FREE char *description = NULL;

  if (describe_disk (o, &description) == -1)
    return -1;
  return l->fn (l->opaque, o->name != NULL ? o->name : "", description);
}

static int
list_one (const struct listing *l, const char *prefix, const char *bitmap,
          int (*describe) (const char *bitmap, char **description))
{
  CLEANUP_FREE char *name = NULL, *description = NULL;

  if (made (asprintf (&name, "%s%s", prefix, bitmap), &name) == -1 ||
      describe (bitmap, &description) == -1)
    return -1;
  return l->fn (l->opaque, name, description);
}

/* The names of the views at one moment.  They are copied, since the function
 * that takes the list may wait for a client, and that of disk_list_views must
 * not.
 */
struct names {
  char **name;
  size_t nr, max;
  bool failed;                  /* no memory for all of them */
};

static void
names_free (struct names *names)
{
  for (size_t i = 0; i < names->nr; ++i)
    free (names->name[i]);
  free (names->name);
}

#define CLEANUP_NAMES_FREE __attribute__ ((cleanup (names_free)))

static void
add_name (const struct disk_view_state *view, void *opaque)
{
  struct names *names = opaque;
  char *name = strdup (view->name);

  if (name == NULL ||
      vector_reserve (names->name, names->nr, names->max, 1) == -1) {
    free (name);
    names->failed = true;
    return;
  }
  names->name[names->nr++] = name;
}

/* List all views, and lower *room by their number.  If there are more than
 * *room, list none, and leave no room for anything else.
 */
static int
list_views (const struct disk *disk, const struct listing *l, size_t *room)
{
  CLEANUP_NAMES_FREE struct names names = { .name = NULL };

  disk_list_views (disk, add_name, &names);
  if (names.failed)
    return -1;
  if (names.nr > *room) {
    *room = 0;
    return 0;
  }
  *room -= names.nr;
  for (size_t i = 0; i < names.nr; ++i)
    if (list_one (l, EXPORT_VIEW_PREFIX, names.name[i], describe_view) == -1)
      return -1;
  return 0;
}

/* List all deltas, or none if there are more than room. */
static int
list_deltas (const struct disk_offers *offers, const struct listing *l,
             size_t room)
{
  const size_t nr = disk_offers_nr (offers);

  if (nr > room)
    return 0;
  for (size_t i = 0; i < nr; ++i)
    if (list_one (l, EXPORT_DELTA_PREFIX,
                  disk_bitmap_name (disk_offers_at (offers, i)),
                  describe_delta) == -1)
      return -1;
  return 0;
}

int
exports_list (const struct disk *disk, const struct export_options *o,
              int (*fn) (void *, const char *, const char *), void *opaque)
{
  const struct listing l = { .fn = fn, .opaque = opaque };
  size_t room = exports_list_max - 1;
  struct disk_offers *offers;
  int r;

  if (list_disk (o, &l) == -1 || list_views (disk, &l, &room) == -1)
    return -1;
  if (!o->list_deltas)
    return 0;
  offers = disk_offers_get (disk);
  r = list_deltas (offers, &l, room);
  disk_offers_put (offers);
  return r;
}
