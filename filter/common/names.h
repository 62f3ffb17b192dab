/* nbdkit-dirty-bitmap-filter
 * SPDX-License-Identifier: BSD-3-Clause
 * Copyright the nbdkit-dirty-bitmap-filter authors
 */

#ifndef DIRTY_BITMAP_NAMES_H
#define DIRTY_BITMAP_NAMES_H

/* Lists of names. */

#include <stdbool.h>
#include <stddef.h>
#include <string.h>

/* Is name one of these nr names? */
static inline bool
names_include (const char *const *names, size_t nr, const char *name)
{
  for (size_t i = 0; i < nr; ++i)
    if (strcmp (names[i], name) == 0)
      return true;
  return false;
}

#endif /* DIRTY_BITMAP_NAMES_H */
