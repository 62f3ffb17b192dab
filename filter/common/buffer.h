/* nbdkit-dirty-bitmap-filter
 * SPDX-License-Identifier: BSD-3-Clause
 * Copyright the nbdkit-dirty-bitmap-filter authors
 */

#ifndef DIRTY_BITMAP_BUFFER_H
#define DIRTY_BITMAP_BUFFER_H

/* Large buffers that belong to connections.  They are mapped, so that
 * freeing one gives its memory back: malloc would keep most of what many
 * simultaneous connections needed.
 */

#include <stddef.h>
#include <stdlib.h>
#include <sys/mman.h>

/* AddressSanitizer checks the bounds of malloc'ed memory only. */
#if defined __SANITIZE_ADDRESS__
#define MALLOC_BUFFERS 1
#elif defined __has_feature
#if __has_feature (address_sanitizer)
#define MALLOC_BUFFERS 1
#endif
#endif

/* NULL with errno on failure. */
static inline void *
buffer_new (size_t size)
{
#ifdef MALLOC_BUFFERS
  return malloc (size);
#else
  void *p = mmap (NULL, size, PROT_READ | PROT_WRITE,
                  MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);

  return p == MAP_FAILED ? NULL : p;
#endif
}

/* size is what buffer_new was given.  p may be NULL. */
static inline void
buffer_free (void *p, size_t size)
{
#ifdef MALLOC_BUFFERS
  (void) size;
  free (p);
#else
  if (p != NULL)
    munmap (p, size);
#endif
}

#endif /* DIRTY_BITMAP_BUFFER_H */
