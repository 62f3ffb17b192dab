/* nbdkit-dirty-bitmap-filter
 * SPDX-License-Identifier: BSD-3-Clause
 * Copyright the nbdkit-dirty-bitmap-filter authors
 */

/* Arrays that grow. */

#include <config.h>

#include <errno.h>
#include <stdlib.h>
#include <string.h>

#include "common/bytes.h"
#include "common/vector.h"

#define FIRST_ROOM 16

int
vector_grow (void *array, size_t nr, size_t *max, size_t more,
             size_t element_bytes)
{
  size_t wanted, bytes;
  void *old, *new;

  if (__builtin_add_overflow (nr, more, &wanted)) {
    errno = ENOMEM;
    return -1;
  }
  /* An array in RAM is so small that doubling its size cannot overflow. */
  wanted = max_u64 (wanted, max_u64 (*max * 2, FIRST_ROOM));
  if (__builtin_mul_overflow (wanted, element_bytes, &bytes)) {
    errno = ENOMEM;
    return -1;
  }
  memcpy (&old, array, sizeof old);     /* a pointer of another type */
  new = realloc (old, bytes);
  if (new == NULL)
    return -1;
  memcpy (array, &new, sizeof new);
  *max = wanted;
  return 0;
}
