/* nbdkit-dirty-bitmap-filter
 * SPDX-License-Identifier: BSD-3-Clause
 * Copyright the nbdkit-dirty-bitmap-filter authors
 */

/* Metadata contexts: base:allocation, qemu:allocation-depth, and
 * qemu:dirty-bitmap:NAME for every bitmap that clients are offered.
 *
 * The names and ids are qemu-nbd's (base:allocation is 0,
 * qemu:allocation-depth is 1, the bitmaps begin at 2), and so is what the
 * queries match, except that qemu-nbd offers qemu:allocation-depth only
 * when told to.  A delta export has base:allocation only.  LIST takes
 * "base:", "qemu:" and "qemu:dirty-bitmap:" as prefixes, SET exact names
 * only; what we do not know matches nothing, without an error.
 *
 * Queries are taken one at a time, and what they match is noted in a
 * set of ids.  So a client may send any number of them, and the replies
 * come in the order of the ids and without duplicates.
 */

#include <config.h>

#include <stdlib.h>
#include <string.h>

#include "common/bytes.h"
#include "common/cleanup.h"
#include "disk/disk.h"
#include "nbd/contexts.h"

#define BASE_NAMESPACE "base:"
#define BASE_ALLOCATION "base:allocation"
#define QEMU_NAMESPACE "qemu:"
#define ALLOCATION_DEPTH "qemu:allocation-depth"
#define DIRTY_BITMAP "qemu:dirty-bitmap:"

static int
compare_names (const void *a, const void *b)
{
  const struct context_name *x = a, *y = b;

  return strcmp (x->name, y->name);
}

int
contexts_index (struct service *service)
{
  service->nr_bitmaps = disk_nr_bitmaps (service->disk);
  service->contexts = calloc (service->nr_bitmaps + 1,
                             sizeof service->contexts[0]);
  if (service->contexts == NULL)
    return -1;
  for (size_t i = 0; i < service->nr_bitmaps; ++i) {
    service->contexts[i].name = disk_bitmap_name (service->disk, i);
    service->contexts[i].bitmap = i;
  }
  qsort (service->contexts, service->nr_bitmaps, sizeof service->contexts[0],
         compare_names);
  return 0;
}

/* A set of contexts, by their ids. */
struct matches {
  uint8_t *bit;
  bool all_bitmaps;
  bool only_base;               /* the export has no other */
};

static size_t
nr_contexts (const struct service *service)
{
  return CONTEXT_FIRST_BITMAP + service->nr_bitmaps;
}

#define MATCHES_SIZE(service) (nr_contexts (service) / 8 + 1)

static void
match (struct matches *m, size_t id)
{
  m->bit[id / 8] |= 1 << id % 8;
}

static bool
matched (const struct matches *m, size_t id)
{
  if (m->only_base && id != CONTEXT_BASE_ALLOCATION)
    return false;
  return (m->bit[id / 8] & 1 << id % 8) != 0 ||
    (id >= CONTEXT_FIRST_BITMAP && m->all_bitmaps);
}

/* Note what one query matches. */
static void
match_query (const struct service *service, const char *query,
             bool list, struct matches *m)
{
  if (strcmp (query, BASE_ALLOCATION) == 0 ||
      (list && strcmp (query, BASE_NAMESPACE) == 0))
    match (m, CONTEXT_BASE_ALLOCATION);
  else if (strcmp (query, ALLOCATION_DEPTH) == 0)
    match (m, CONTEXT_ALLOCATION_DEPTH);
  else if (list && strcmp (query, QEMU_NAMESPACE) == 0) {
    match (m, CONTEXT_ALLOCATION_DEPTH);
    m->all_bitmaps = true;
  }
  else if (list && strcmp (query, DIRTY_BITMAP) == 0)
    m->all_bitmaps = true;
  else if (strncmp (query, DIRTY_BITMAP, strlen (DIRTY_BITMAP)) == 0) {
    const struct context_name key = { .name = query + strlen (DIRTY_BITMAP) };
    const struct context_name *found =
      bsearch (&key, service->contexts, service->nr_bitmaps, sizeof key,
               compare_names);

    if (found != NULL)
      match (m, CONTEXT_FIRST_BITMAP + found->bitmap);
  }
}

/* Take one query.  The result is option_read's, or 2 for a query that
 * is no string.
 */
static int
read_query (struct option *o, char *query, bool list, struct matches *m)
{
  uint32_t length;
  int r = option_read (o, &length, sizeof length);

  if (r != 0)
    return r;
  length = be32toh (length);
  if (length > NBD_MAX_STRING)
    return option_skip (o, length);
  r = option_read (o, query, length);
  if (r != 0)
    return r;
  if (memchr (query, '\0', length) != NULL)
    return 2;
  query[length] = '\0';
  match_query (o->worker->service, query, list, m);
  return 0;
}

/* The export whose contexts it is about.  Returns as read_queries. */
static int
read_export (struct option *o, char *name, uint32_t *length,
             struct matches *m)
{
  struct export export;
  int r = option_export_name (o, name, length);

  if (r == 0)
    r = option_find_export (o, name, *length, &export);
  if (r == 0)
    m->only_base = export.is_delta;
  return r;
}

/* Take all queries, and nothing must follow.  Returns 0; 1 if the
 * client was told that they are invalid; -1.
 */
static int
read_queries (struct option *o, bool list, struct matches *m)
{
  CLEANUP_FREE char *query = malloc (NBD_MAX_STRING + 1);
  uint32_t nr;
  int r;

  if (query == NULL)
    return -1;
  r = option_read (o, &nr, sizeof nr);
  if (r == 0) {
    nr = be32toh (nr);
    if (nr == 0 && list) {
      match (m, CONTEXT_BASE_ALLOCATION);
      match (m, CONTEXT_ALLOCATION_DEPTH);
      m->all_bitmaps = true;
    }
    for (uint32_t i = 0; r == 0 && i < nr; ++i)
      r = read_query (o, query, list, m);
  }
  if (r == -1)
    return -1;
  if (r == 0 && o->remaining == 0)
    return 0;
  if (option_error (o, NBD_REP_ERR_INVALID, r == 2
                    ? "unexpected embedded NUL in a query"
                    : "inconsistent lengths of queries") == -1)
    return -1;
  return 1;
}

static int
reply_context (struct option *o, size_t context, bool list)
{
  const struct service *service = o->worker->service;
  CLEANUP_FREE char *buf = NULL;
  uint32_t id = htobe32 (list ? 0 : context);
  const char *name;
  size_t length;

  if (context < CONTEXT_FIRST_BITMAP) {
    name = context == CONTEXT_BASE_ALLOCATION ? BASE_ALLOCATION
                                              : ALLOCATION_DEPTH;
    return option_reply2 (o, NBD_REP_META_CONTEXT, &id, sizeof id,
                          name, strlen (name));
  }
  name = disk_bitmap_name (service->disk, context - CONTEXT_FIRST_BITMAP);
  length = strlen (DIRTY_BITMAP) + strlen (name);
  buf = malloc (length + 1);
  if (buf == NULL)
    return -1;
  strcpy (buf, DIRTY_BITMAP);
  strcat (buf, name);
  return option_reply2 (o, NBD_REP_META_CONTEXT, &id, sizeof id, buf, length);
}

static int
reply_contexts (struct option *o, const struct matches *m, bool list)
{
  const struct service *service = o->worker->service;

  for (size_t i = 0; i < nr_contexts (service); ++i)
    if (matched (m, i) && reply_context (o, i, list) == -1)
      return -1;
  return option_reply (o, NBD_REP_ACK, NULL, 0);
}

int
contexts_list (struct option *o)
{
  const struct service *service = o->worker->service;
  CLEANUP_FREE char *name = malloc (NBD_MAX_STRING);
  CLEANUP_FREE uint8_t *bits = calloc (MATCHES_SIZE (service), 1);
  struct matches m = { .bit = bits };
  uint32_t length;
  int r;

  if (name == NULL || bits == NULL)
    return -1;
  r = read_export (o, name, &length, &m);
  if (r == 0)
    r = read_queries (o, true, &m);
  if (r != 0)
    return r == 1 ? 0 : -1;
  return reply_contexts (o, &m, true);
}

void
contexts_drop (struct session *session)
{
  free (session->contexts);
  session->contexts = NULL;
  session->nr_contexts = 0;
}

static int
select_contexts (const struct service *service, struct session *session,
                 const struct matches *m)
{
  size_t nr = 0;

  for (size_t i = 0; i < nr_contexts (service); ++i)
    nr += matched (m, i);
  if (nr == 0)
    return 0;
  session->contexts = malloc (nr * sizeof session->contexts[0]);
  if (session->contexts == NULL)
    return -1;
  for (size_t i = 0; i < nr_contexts (service); ++i)
    if (matched (m, i))
      session->contexts[session->nr_contexts++] = i;
  return 0;
}

int
contexts_set (struct option *o, struct selection *selection)
{
  const struct service *service = o->worker->service;
  struct session *session = o->worker->session;
  CLEANUP_FREE uint8_t *bits = calloc (MATCHES_SIZE (service), 1);
  struct matches m = { .bit = bits };
  int r;

  if (!session->structured)
    return option_error (o, NBD_REP_ERR_INVALID,
                         "neither structured replies nor extended headers "
                         "are negotiated");
  contexts_drop (session);
  if (selection->export_name == NULL)
    selection->export_name = malloc (NBD_MAX_STRING);
  if (selection->export_name == NULL || bits == NULL)
    return -1;
  r = read_export (o, selection->export_name,
                   &selection->export_name_length, &m);
  if (r == 0)
    r = read_queries (o, false, &m);
  if (r != 0)
    return r == 1 ? 0 : -1;
  if (select_contexts (service, session, &m) == -1)
    return -1;
  return reply_contexts (o, &m, false);
}

bool
contexts_selected (const struct session *session,
                   const struct selection *selection,
                   const char *name, uint32_t length)
{
  return session->nr_contexts > 0 && length == selection->export_name_length &&
    memcmp (name, selection->export_name, length) == 0;
}

/* Call fn for each bitmap that the client has. */
static void
each_bitmap (struct disk *disk, const struct session *session,
             void (*fn) (struct disk *, size_t))
{
  if (session->export.is_delta)
    fn (disk, session->export.bitmap);
  for (size_t i = 0; i < session->nr_contexts; ++i)
    if (session->contexts[i] >= CONTEXT_FIRST_BITMAP)
      fn (disk, session->contexts[i] - CONTEXT_FIRST_BITMAP);
}

void
contexts_bind (struct disk *disk, struct session *session,
               const struct selection *selection, const char *name,
               uint32_t length)
{
  if (!contexts_selected (session, selection, name, length))
    contexts_drop (session);
  each_bitmap (disk, session, disk_bitmap_hold);
  session->holds_bitmaps = true;
}

void
contexts_release (struct disk *disk, struct session *session)
{
  if (session->holds_bitmaps)
    each_bitmap (disk, session, disk_bitmap_release);
  session->holds_bitmaps = false;
}
