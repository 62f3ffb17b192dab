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
  const size_t nr = disk_nr_bitmaps (disk);

  *e = (struct export) { .is_delta = false };
  if (length < PREFIX_LENGTH ||
      memcmp (name, EXPORT_DELTA_PREFIX, PREFIX_LENGTH) != 0)
    return o->name == NULL || is_name (o->name, name, length);

  e->is_delta = true;
  for (; e->bitmap < nr; e->bitmap++)
    if (is_name (disk_bitmap_name (disk, e->bitmap),
                 name + PREFIX_LENGTH, length - PREFIX_LENGTH))
      return true;
  return false;
}

int
export_describe (const struct disk *disk, const struct export_options *o,
                 const struct export *e, char **description)
{
  if (e->is_delta) {
    if (asprintf (description, "what was changed according to the dirty "
                  "bitmap %s", disk_bitmap_name (disk, e->bitmap)) != -1)
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
list_one (const struct disk *disk, const struct export_options *o,
          const struct export *e, const char *name,
          int (*fn) (void *, const char *, const char *), void *opaque)
{
  CLEANUP_FREE char *description = NULL;

  if (export_describe (disk, o, e, &description) == -1)
    return -1;
  return fn (opaque, name, description);
}

int
exports_list (const struct disk *disk, const struct export_options *o,
              int (*fn) (void *, const char *, const char *), void *opaque)
{
  struct export e = { .is_delta = false };
  const size_t nr = disk_nr_bitmaps (disk);

  if (list_one (disk, o, &e, o->name != NULL ? o->name : "", fn,
                opaque) == -1)
    return -1;
  if (!o->list_deltas || nr >= exports_list_max)
    return 0;
  e.is_delta = true;
  for (; e.bitmap < nr; e.bitmap++) {
    CLEANUP_FREE char *name = NULL;

    if (asprintf (&name, EXPORT_DELTA_PREFIX "%s",
                  disk_bitmap_name (disk, e.bitmap)) == -1) {
      name = NULL;
      return -1;
    }
    if (list_one (disk, o, &e, name, fn, opaque) == -1)
      return -1;
  }
  return 0;
}
