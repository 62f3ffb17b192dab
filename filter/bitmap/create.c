/* nbdkit-dirty-bitmap-filter
 * SPDX-License-Identifier: BSD-3-Clause
 * Copyright the nbdkit-dirty-bitmap-filter authors
 */

/* Bitmaps that the options ask for and the image lacks: a change of the set
 * before anything else is done with it (change.h).
 */

#include <config.h>

#include <errno.h>
#include <string.h>

#include "bitmap/draft.h"
#include "common/bytes.h"
#include "common/report.h"
#include "qcow2/order.h"

uint64_t
bitmap_default_granularity (const struct bitmap_set *set)
{
  return min_u64 (max_u64 (set->geometry.cluster_size_bytes, 4096), 65536);
}

static uint64_t
granularity_of_new (const struct bitmap_set *set,
                    const struct bitmap_options *options)
{
  return options->granularity ? options->granularity
    : bitmap_default_granularity (set);
}

/* Must the i-th required bitmap be created?  False for a repeated name. */
static bool
is_missing (const struct bitmap_set *set,
            const struct bitmap_options *options, size_t i)
{
  if (bitmap_set_find (set, options->require[i]) != NULL)
    return false;
  for (size_t j = 0; j < i; ++j)
    if (strcmp (options->require[i], options->require[j]) == 0)
      return false;
  return true;
}

/* The old directory counts only if it is sound. */
static size_t
old_directory_bytes (const struct bitmap_set *set)
{
  return set->store == STORE_GOOD ? set->directory_bytes : 0;
}

int
bitmap_create_check (const struct bitmap_set *set,
                     const struct bitmap_options *options)
{
  uint64_t nr = set->nr_bitmaps, bytes = old_directory_bytes (set);
  struct bitmap_damage damage;
  bool any = false;

  for (size_t i = 0; i < options->nr_require; ++i) {
    const char *name = options->require[i];
    struct bitmap_shown_name shown = bitmap_show_name (name, strlen (name));
    int r = 0;

    if (!is_missing (set, options, i))
      continue;
    if (set->store == STORE_DAMAGED)
      r = bitmap_damage (&damage, "the bitmaps that the image has are "
                         "damaged: %.400s", set->damage.what);
    else if (qcow2_version (set->image) < 3)
      r = bitmap_damage (&damage, "a version 2 image cannot store bitmaps, "
                         "use qemu-img amend -o compat=1.1");
    else if (set->readonly)
      r = bitmap_damage (&damage, "the image is read-only");
    else
      r = bitmap_directory_check_new (name,
                                      granularity_of_new (set, options),
                                      &set->geometry, nr, bytes, &damage);
    if (r == -1) {
      report_error ("bitmap '%s' is not in the image and cannot be created: "
                    "%s", shown.text, damage.what);
      errno = EINVAL;
      return -1;
    }
    nr++;
    bytes += bitmap_directory_entry_bytes (strlen (name));
    any = true;
  }
  return any ? qcow2_check_bitmaps_extension (set->image) : 0;
}

static int
create (struct bitmap_change *c, const struct bitmap_options *options)
{
  struct bitmap_set *set = c->set;

  for (size_t i = 0; i < options->nr_require; ++i)
    if (draft_find (c, options->require[i]) == NULL &&
        bitmap_change_add (c, options->require[i], true,
                           granularity_of_new (set, options), 0) == -1)
      return -1;
  if (bitmap_change_prepare (c) == -1 || bitmap_change_store (c) == -1 ||
      (ORDER (DIRECTORY_BEFORE_HEADER) && qcow2_flush (set->image) == -1) ||
      bitmap_change_switch (c) == -1)
    return -1;
  bitmap_change_adopt (c);
  return 0;
}

int
bitmap_create_missing (struct bitmap_set *set,
                       const struct bitmap_options *options)
{
  struct bitmap_change *c;
  bool any = false;
  int r;

  for (size_t i = 0; i < options->nr_require; ++i)
    any |= is_missing (set, options, i);
  if (!any)
    return 0;
  c = bitmap_change_begin (set, "the image", NULL, NULL);
  if (c == NULL)
    return -1;
  r = create (c, options);
  bitmap_change_end (c);
  return r;
}
