/* nbdkit-dirty-bitmap-filter
 * SPDX-License-Identifier: BSD-3-Clause
 * Copyright the nbdkit-dirty-bitmap-filter authors
 */

#include <config.h>

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "common/cleanup.h"
#include "disk/disk.h"
#include "nbd/exports.h"

size_t exports_list_max = 10000;

#define PREFIX_LENGTH (sizeof EXPORT_DELTA_PREFIX - 1)

static bool
is_name (const char *s, const char *name, size_t length)
{
  return strlen (s) == length && memcmp (s, name, length) == 0;
}

bool
export_find (const struct disk *disk, const struct export_options *o,
             const char *name, size_t length, struct export *e)
{
  *e = (struct export) { .delta = NULL };
  if (length < PREFIX_LENGTH ||
      memcmp (name, EXPORT_DELTA_PREFIX, PREFIX_LENGTH) != 0)
    return o->name == NULL || is_name (o->name, name, length);

  e->delta = disk_find_offer (disk, name + PREFIX_LENGTH,
                              length - PREFIX_LENGTH);
  return e->delta != NULL;
}

struct export
export_get (const struct export *e)
{
  return (struct export) {
    .delta = e->delta == NULL ? NULL : disk_offer_get (e->delta),
  };
}

void
export_put (struct export *e)
{
  disk_offer_put (e->delta);
  e->delta = NULL;
}

void
export_hold (const struct export *e)
{
  if (e->delta != NULL)
    disk_bitmap_hold (e->delta);
}

void
export_release (const struct export *e)
{
  if (e->delta != NULL)
    disk_bitmap_release (e->delta);
}

int
export_describe (const struct export_options *o, const struct export *e,
                 char **description)
{
  if (e->delta != NULL) {
    if (asprintf (description, "what was changed according to the dirty "
                  "bitmap %s", disk_bitmap_name (e->delta)) != -1)
      return 0;
    *description = NULL;
    return -1;
  }
  *description = NULL;
  if (o->description == NULL || o->description[0] == '\0')
    return 0;
  *description = strdup (o->description);
  return *description != NULL ? 0 : -1;
}

static int
list_one (const struct export_options *o, const struct export *e,
          const char *name,
          int (*fn) (void *, const char *, const char *), void *opaque)
{
  CLEANUP_FREE char *description = NULL;

  if (export_describe (o, e, &description) == -1)
    return -1;
  return fn (opaque, name, description);
}

static int
list_deltas (const struct disk_offers *offers, const struct export_options *o,
             int (*fn) (void *, const char *, const char *), void *opaque)
{
  const size_t nr = disk_offers_nr (offers);

  if (nr >= exports_list_max)
    return 0;
  for (size_t i = 0; i < nr; ++i) {
    /* The reference is the list's. */
    const struct export e = { .delta = disk_offers_at (offers, i) };
    CLEANUP_FREE char *name = NULL;

    if (asprintf (&name, EXPORT_DELTA_PREFIX "%s",
                  disk_bitmap_name (e.delta)) == -1) {
      name = NULL;
      return -1;
    }
    if (list_one (o, &e, name, fn, opaque) == -1)
      return -1;
  }
  return 0;
}

int
exports_list (const struct disk *disk, const struct export_options *o,
              int (*fn) (void *, const char *, const char *), void *opaque)
{
  const struct export e = { .delta = NULL };
  struct disk_offers *offers;
  int r;

  if (list_one (o, &e, o->name != NULL ? o->name : "", fn, opaque) == -1)
    return -1;
  if (!o->list_deltas)
    return 0;
  offers = disk_offers_get (disk);
  r = list_deltas (offers, o, fn, opaque);
  disk_offers_put (offers);
  return r;
}
