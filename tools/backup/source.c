/* nbdkit-dirty-bitmap-filter
 * SPDX-License-Identifier: BSD-3-Clause
 * Copyright the nbdkit-dirty-bitmap-filter authors
 */

/* An NBD server, through libnbd. */

#include <config.h>

#include <errno.h>
#include <inttypes.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "backup/backup.h"
#include "backup/source.h"
#include "common/bytes.h"
#include "common/cleanup.h"
#include "common/report.h"

/* The most that is asked of a context at once.  The protocol's lengths have
 * 32 bits, and some servers refuse more than 2 GiB.
 */
#define STATUS_BYTES ((uint64_t) 1 << 30)

/* What a server must take if it says nothing. */
#define MAX_READ_BYTES ((uint64_t) 32 << 20)

#define BITMAP_PREFIX "qemu:dirty-bitmap:"

static int
nbd_failed (void)
{
  report_error ("%s", nbd_get_error ());
  errno = nbd_get_errno () != 0 ? nbd_get_errno () : EIO;
  return -1;
}

/* Connect, and stop before an export is chosen. */
static struct nbd_handle *
begin_connection (const char *uri, const char *export)
{
  struct nbd_handle *nbd = nbd_create ();

  if (nbd == NULL) {
    nbd_failed ();
    return NULL;
  }
  /* The buffer of a read that has failed is never used. */
  nbd_set_pread_initialize (nbd, false);
  nbd_set_uri_allow_local_file (nbd, true);
  if (nbd_set_opt_mode (nbd, true) == -1 || nbd_connect_uri (nbd, uri) == -1 ||
      (export != NULL && nbd_set_export_name (nbd, export) == -1)) {
    report_error ("%s: %s", uri, nbd_get_error ());
    nbd_close (nbd);
    return NULL;
  }
  if (nbd_aio_is_negotiating (nbd) != 1) {
    report_error ("%s: the server's protocol is too old", uri);
    nbd_close (nbd);
    return NULL;
  }
  return nbd;
}

static int
choose_export (struct nbd_handle *nbd, const struct source_options *o)
{
  if (nbd_clear_meta_contexts (nbd) == -1 ||
      nbd_add_meta_context (nbd, SOURCE_ALLOCATION) == -1)
    return nbd_failed ();
  for (size_t i = 0; i < o->nr_contexts; ++i)
    if (nbd_add_meta_context (nbd, o->contexts[i]) == -1)
      return nbd_failed ();
  if (nbd_opt_go (nbd) == -1) {
    report_error ("%s: %s", o->uri, nbd_get_error ());
    return -1;
  }
  for (size_t i = 0; i < o->nr_contexts; ++i)
    if (nbd_can_meta_context (nbd, o->contexts[i]) != 1) {
      report_error ("%s: the server does not offer %s", o->uri,
                    o->contexts[i]);
      errno = ENOENT;
      return -1;
    }
  return 0;
}

static struct nbd_handle *
open_connection (const struct source_options *o)
{
  struct nbd_handle *nbd = begin_connection (o->uri, o->export);

  if (nbd != NULL && choose_export (nbd, o) == -1) {
    nbd_close (nbd);
    return NULL;
  }
  return nbd;
}

static int
ask_first (struct source *s)
{
  struct nbd_handle *nbd = s->nbd[0];
  const int64_t size = nbd_get_size (nbd);
  const int64_t min = nbd_get_block_size (nbd, LIBNBD_SIZE_MINIMUM);
  const int64_t max = nbd_get_block_size (nbd, LIBNBD_SIZE_MAXIMUM);

  if (size == -1)
    return nbd_failed ();
  s->size = size;
  s->min_request = min > 0 ? (uint64_t) min : 1;
  s->max_request = max > 0 ? (uint64_t) max : MAX_READ_BYTES;
  s->max_request = max_u64 (round_down (s->max_request, s->min_request),
                            s->min_request);
  s->has_allocation = nbd_can_meta_context (nbd, SOURCE_ALLOCATION) == 1;
  return 0;
}

int
source_open (struct source *s, const struct source_options *o)
{
  memset (s, 0, sizeof *s);
  s->nbd[0] = open_connection (o);
  if (s->nbd[0] == NULL)
    return -1;
  s->nr_connections = 1;
  if (ask_first (s) == -1) {
    source_close (s);
    return -1;
  }
  while (nbd_can_multi_conn (s->nbd[0]) == 1 &&
         s->nr_connections < min_u64 (o->max_connections,
                                      SOURCE_MAX_CONNECTIONS)) {
    struct nbd_handle *nbd = open_connection (o);

    if (nbd == NULL || nbd_get_size (nbd) != (int64_t) s->size) {
      if (nbd != NULL)
        report_error ("%s: the size of the disk has changed", o->uri);
      nbd_close (nbd);
      source_close (s);
      return -1;
    }
    s->nbd[s->nr_connections++] = nbd;
  }
  return 0;
}

void
source_close (struct source *s)
{
  for (unsigned i = 0; i < s->nr_connections; ++i) {
    /* A server that does not answer is not waited for. */
    if (nbd_aio_is_ready (s->nbd[i]) == 1 &&
        nbd_aio_in_flight (s->nbd[i]) == 0)
      nbd_shutdown (s->nbd[i], 0);
    nbd_close (s->nbd[i]);
  }
  memset (s, 0, sizeof *s);
}

char *
source_context (const char *bitmap)
{
  char *context;

  if (asprintf (&context, BITMAP_PREFIX "%s", bitmap) != -1)
    return context;
  report_error ("asprintf: %m");
  return NULL;
}

static int
keep_name (void *opaque, const char *name)
{
  struct source_names *names = opaque;
  const size_t prefix = strlen (BITMAP_PREFIX);
  char **larger;

  if (strncmp (name, BITMAP_PREFIX, prefix) != 0)
    return 0;
  larger = reallocarray (names->name, names->nr + 1, sizeof *larger);
  if (larger == NULL)
    return -1;
  names->name = larger;
  names->name[names->nr] = strdup (name + prefix);
  if (names->name[names->nr] == NULL)
    return -1;
  names->nr++;
  return 0;
}

int
source_list_bitmaps (const char *uri, struct source_names *names)
{
  struct nbd_handle *nbd = begin_connection (uri, NULL);
  int r;

  memset (names, 0, sizeof *names);
  if (nbd == NULL)
    return -1;
  r = nbd_add_meta_context (nbd, BITMAP_PREFIX) == -1 ? -1
    : nbd_opt_list_meta_context (nbd, (nbd_context_callback) {
        .callback = keep_name, .user_data = names });
  /* It has no structured replies, so no contexts either. */
  if (r == -1 && nbd_get_errno () == ENOTSUP)
    r = 0;
  if (r == -1) {
    nbd_failed ();
    source_free_names (names);
  }
  else
    nbd_opt_abort (nbd);
  nbd_close (nbd);
  return r == -1 ? -1 : 0;
}

void
source_free_names (struct source_names *names)
{
  for (size_t i = 0; i < names->nr; ++i)
    free (names->name[i]);
  free (names->name);
  memset (names, 0, sizeof *names);
}

static int
add_run (struct runs *runs, uint64_t end, uint32_t flags)
{
  if (runs->nr > 0 && runs->run[runs->nr - 1].flags == flags) {
    runs->run[runs->nr - 1].end = end;
    return 0;
  }
  if (runs->nr == runs->max) {
    const size_t max = runs->max * 2 + 256;
    struct run *larger = reallocarray (runs->run, max, sizeof *larger);

    if (larger == NULL) {
      report_error ("realloc: %m");
      return -1;
    }
    runs->run = larger;
    runs->max = max;
  }
  runs->run[runs->nr++] = (struct run) { end, flags };
  return 0;
}

/* How far each context is known, while the disk is walked. */
struct walk {
  const char *const *contexts;
  size_t nr;
  uint64_t *known;              /* bytes from the beginning, of each */
  uint64_t asked, limit;        /* offset of the request, end of the disk */
  source_extent *extent;
  void *opaque;
  bool failed;                  /* extent has */
};

/* What is known already is said again if another context was behind. */
static int
take_extents (void *opaque, const char *context, uint64_t offset,
              uint32_t *entries, size_t nr_entries, int *error)
{
  struct walk *w = opaque;
  size_t n = 0;

  (void) error;
  while (n < w->nr && strcmp (context, w->contexts[n]) != 0)
    n++;
  if (n == w->nr || offset != w->asked)
    return 0;
  for (size_t i = 0; i + 1 < nr_entries && offset < w->limit; i += 2) {
    const uint64_t before = max_u64 (offset, w->known[n]);

    offset += min_u64 (entries[i], w->limit - offset);
    if (offset <= before)
      continue;
    w->known[n] = offset;
    w->failed = w->failed ||
      w->extent (w->opaque, n, before, offset, entries[i + 1]) == -1;
  }
  return 0;
}

/* The context that is known least far. */
static size_t
last_of (const struct walk *w)
{
  size_t last = 0;

  for (size_t i = 1; i < w->nr; ++i)
    if (w->known[i] < w->known[last])
      last = i;
  return last;
}

/* One request, from where something is not known on. */
static int
ask_for_extents (struct source *s, struct walk *w)
{
  const size_t last = last_of (w);
  const nbd_extent_callback callback = {
    .callback = take_extents, .user_data = w
  };

  w->asked = w->known[last];
  if (nbd_block_status (s->nbd[0], min_u64 (STATUS_BYTES,
                                            w->limit - w->asked), w->asked,
                        callback, 0) == -1)
    return nbd_failed ();
  if (w->failed)
    return -1;
  if (w->known[last] > w->asked)
    return 0;
  report_error ("the server does not say what %s is at offset %" PRIu64,
                w->contexts[last], w->asked);
  return -1;
}

/* Ask for all of the disk, piece by piece.  A server may say less than it was
 * asked, or more, and not as much of each context.
 */
int
source_walk (struct source *s, const char *const *contexts, size_t nr,
             source_extent *extent, void *opaque)
{
  CLEANUP_FREE uint64_t *known = calloc (nr, sizeof *known);
  struct walk w = {
    .contexts = contexts, .nr = nr, .known = known, .limit = s->size,
    .extent = extent, .opaque = opaque,
  };

  if (known == NULL) {
    report_error ("calloc: %m");
    return -1;
  }
  while (known[last_of (&w)] < s->size)
    if (is_interrupted || ask_for_extents (s, &w) == -1)
      return -1;
  return 0;
}

static int
keep_run (void *opaque, size_t context, uint64_t begin, uint64_t end,
          uint32_t flags)
{
  struct runs *const *runs = opaque;

  (void) begin;
  return add_run (runs[context], end, flags);
}

int
source_runs (struct source *s, const char *const *contexts, size_t nr,
             struct runs *const *runs)
{
  return nr == 0 ? 0 : source_walk (s, contexts, nr, keep_run, (void *) runs);
}

int
runs_of_all (struct runs *runs, uint64_t size, uint32_t flags)
{
  memset (runs, 0, sizeof *runs);
  return size == 0 ? 0 : add_run (runs, size, flags);
}

void
runs_free (struct runs *runs)
{
  free (runs->run);
  memset (runs, 0, sizeof *runs);
}
