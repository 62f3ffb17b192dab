/* nbdkit-dirty-bitmap-filter
 * SPDX-License-Identifier: BSD-3-Clause
 * Copyright the nbdkit-dirty-bitmap-filter authors
 */

#ifndef DIRTY_BITMAP_BUFFER_H
#define DIRTY_BITMAP_BUFFER_H

/* Large buffers of connections, which come and go.  They are mapped, so
 * that giving back is certain: malloc goes on keeping most of what many
 * connections at once have needed.
 */

#include <stddef.h>
#include <stdlib.h>
#include <sys/mman.h>

/* AddressSanitizer watches the bounds of what is malloc'ed only. */
#if defined __SANITIZE_ADDRESS__
#define MALLOC_BUFFERS 1
#elif defined __has_feature
#if __has_feature (address_sanitizer)
#define MALLOC_BUFFERS 1
#endif
#endif

/* NULL with errno. */
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

/* Of the same size.  NULL is fine. */
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
