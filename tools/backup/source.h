/* nbdkit-dirty-bitmap-filter
 * SPDX-License-Identifier: BSD-3-Clause
 * Copyright the nbdkit-dirty-bitmap-filter authors
 */

#ifndef DIRTY_BITMAP_BACKUP_SOURCE_H
#define DIRTY_BITMAP_BACKUP_SOURCE_H

/* An NBD server: its connections, what its metadata contexts say, and what is
 * to be copied (source.c, plan.c).
 *
 * Functions return 0, or -1 with the reason reported.
 */

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include <libnbd.h>

#define SOURCE_MAX_CONNECTIONS 4

struct source {
  struct nbd_handle *nbd[SOURCE_MAX_CONNECTIONS];
  unsigned nr_connections;
  uint64_t size;                /* of the disk, bytes */
  uint64_t min_request;         /* bytes; a read is of multiples of it */
  uint64_t max_request;         /* bytes of a read */
  bool has_allocation;          /* the context base:allocation */
};

#define SOURCE_ALLOCATION LIBNBD_CONTEXT_BASE_ALLOCATION

/* The full name of a bitmap's context, for free().  NULL, reported, if there
 * is no memory.
 */
extern char *source_context (const char *bitmap);

/* Connect, as often as is of use but max_connections at most.  export
 * replaces the URI's if it is not NULL.  contexts are full names, besides
 * base:allocation; the server must have them all.
 */
struct source_options {
  const char *uri, *export;
  const char *const *contexts;
  size_t nr_contexts;
  unsigned max_connections;
};
extern int source_open (struct source *, const struct source_options *);
extern void source_close (struct source *);

/* The names of the bitmaps that the server offers, without the prefix. */
struct source_names {
  char **name;
  size_t nr;
};
extern int source_list_bitmaps (const char *uri, struct source_names *);
extern void source_free_names (struct source_names *);

/* Tell what contexts say of the whole disk: of each, in order, from its
 * beginning to its end.  context is an index.  extent returns 0, or -1 with
 * the reason reported.
 */
typedef int source_extent (void *opaque, size_t context, uint64_t begin,
                           uint64_t end, uint32_t flags);
extern int source_walk (struct source *, const char *const *contexts,
                        size_t nr, source_extent *, void *opaque);

/* What a context says of the whole disk.  Neighbours differ. */
struct run {
  uint64_t end;                 /* it begins where the one before ends */
  uint32_t flags;
};

struct runs {
  struct run *run;
  size_t nr, max;
};

/* The same as runs, one for each context, which are empty before, and on
 * error have to be freed, too.
 */
extern int source_runs (struct source *, const char *const *contexts,
                        size_t nr, struct runs *const *runs);

/* One run over all of the disk. */
extern int runs_of_all (struct runs *, uint64_t size, uint32_t flags);
extern void runs_free (struct runs *);

/* What to copy: pieces of whole clusters, but for the end of the disk. */
struct piece {
  uint64_t offset, length;
  bool is_zero;                 /* it is known to read as zeroes */
};

struct plan {
  struct piece *piece;
  size_t nr, max;
  uint64_t all_bytes;           /* in pieces */
  uint64_t data_bytes;          /* in pieces that are not known to be zero */
};

/* dirty: what has changed, or NULL for all.  Clusters that changed in part are
 * copied whole.  Zeroes are left out if all is copied, since an image reads
 * as zeroes where it has nothing.
 */
extern int plan_make (struct plan *, uint64_t size, uint32_t cluster_size,
                      const struct runs *allocation,
                      const struct runs *dirty);
extern void plan_free (struct plan *);

#endif /* DIRTY_BITMAP_BACKUP_SOURCE_H */
