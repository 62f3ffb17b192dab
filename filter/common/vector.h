/* nbdkit-dirty-bitmap-filter
 * SPDX-License-Identifier: BSD-3-Clause
 * Copyright the nbdkit-dirty-bitmap-filter authors
 */

#ifndef DIRTY_BITMAP_VECTOR_H
#define DIRTY_BITMAP_VECTOR_H

/* Arrays that grow.  The owner keeps the array, the number of elements in
 * use and the number for which there is room: all 0 for an empty one.
 */

#include <stddef.h>

/* Make room for `more` elements beyond the first nr.  max is changed, and
 * array may move.  Returns -1 with ENOMEM, and then changes nothing.
 */
#define vector_reserve(array, nr, max, more)                            \
  (((max) - (nr) >= (more)) ? 0 :                                       \
   vector_grow (&(array), (nr), &(max), (more), sizeof (array)[0]))

extern int vector_grow (void *array, size_t nr, size_t *max, size_t more,
                        size_t element_bytes);

#endif /* DIRTY_BITMAP_VECTOR_H */
