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
 * when told to.  A delta export has base:allocation only.  A view has
 * base:allocation and its own bitmap.  LIST takes "base:", "qemu:" and
 * "qemu:dirty-bitmap:" as prefixes, SET exact names only; what we do not know
 * matches nothing, without an error.
 *
 * Queries are taken one at a time, and what they match is noted in a
 * set of ids.  So a client may send any number of them, and the replies
 * come in the order of the ids and without duplicates.
 *
 * The set of bitmaps may change at any time.  An option is served from one
 * list of them throughout.  What SET selects the session refers to until its
 * end, by the ids that the client was told.
 *
 * Between SET and GO a backup may end and another one of the same bitmap
 * begin.  Then the client opens another view than the one it asked about.  It
 * gets no contexts there, since the old bitmap does not tell what has changed
 * in the new view.
 */

#include <config.h>

#include <assert.h>
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

/* A set of contexts, by their ids. */
struct matches {
  struct disk_offers *offers;   /* that there are while an option is served;
                                   NULL: the export has none */
  uint8_t *bit;
  bool all_bitmaps;
  bool has_depth;               /* the export has qemu:allocation-depth */
};

static size_t
nr_contexts (const struct matches *m)
{
  return CONTEXT_FIRST_BITMAP +
    (m->offers == NULL ? 0 : disk_offers_nr (m->offers));
}

static void
matches_free (struct matches *m)
{
  free (m->bit);
  disk_offers_put (m->offers);
}

#define CLEANUP_MATCHES_FREE __attribute__ ((cleanup (matches_free)))

/* The empty set, of what the export has now. */
static int
matches_init (struct matches *m, const struct disk *disk,
              const struct export *export)
{
  *m = (struct matches) {
    .offers = export_offers (disk, export),
    .has_depth = export_is_disk (export),
  };
  m->bit = calloc (nr_contexts (m) / 8 + 1, 1);
  return m->bit == NULL ? -1 : 0;
}

static void
match (struct matches *m, size_t id)
{
  m->bit[id / 8] |= 1 << id % 8;
}

static bool
matched (const struct matches *m, size_t id)
{
  if (id == CONTEXT_ALLOCATION_DEPTH && !m->has_depth)
    return false;
  return (m->bit[id / 8] & 1 << id % 8) != 0 ||
    (id >= CONTEXT_FIRST_BITMAP && m->all_bitmaps);
}

/* Note what one query matches. */
static void
match_query (const char *query, bool list, struct matches *m)
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
    const char *name = query + strlen (DIRTY_BITMAP);
    size_t i;

    if (m->offers != NULL &&
        disk_offers_find (m->offers, name, strlen (name), &i))
      match (m, CONTEXT_FIRST_BITMAP + i);
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
  match_query (query, list, m);
  return 0;
}

/* The export whose contexts it is about, which the caller puts.  Returns as
 * read_queries.
 */
static int
read_export (struct option *o, char *name, uint32_t *length,
             struct export *export, struct matches *m)
{
  int r = option_export_name (o, name, length);

  if (r == 0)
    r = option_find_export (o, name, *length, export);
  if (r == 0)
    r = matches_init (m, o->worker->service->disk, export);
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
reply_context (struct option *o, const struct matches *m, size_t context,
               bool list)
{
  CLEANUP_FREE char *buf = NULL;
  uint32_t id = htobe32 (list ? 0 : context);
  const char *name;
  size_t length;

  if (context < CONTEXT_FIRST_BITMAP) {
    assert (context == CONTEXT_BASE_ALLOCATION ||
            context == CONTEXT_ALLOCATION_DEPTH);
    name = context == CONTEXT_BASE_ALLOCATION ? BASE_ALLOCATION
                                              : ALLOCATION_DEPTH;
    return option_reply2 (o, NBD_REP_META_CONTEXT, &id, sizeof id,
                          name, strlen (name));
  }
  assert (m->offers != NULL);
  name = disk_bitmap_name (disk_offers_at (m->offers,
                                           context - CONTEXT_FIRST_BITMAP));
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
  for (size_t i = 0; i < nr_contexts (m); ++i)
    if (matched (m, i) && reply_context (o, m, i, list) == -1)
      return -1;
  return option_reply (o, NBD_REP_ACK, NULL, 0);
}

int
contexts_list (struct option *o)
{
  CLEANUP_FREE char *name = malloc (NBD_MAX_STRING);
  CLEANUP_MATCHES_FREE struct matches m = { .bit = NULL };
  CLEANUP_EXPORT_PUT struct export export = { .delta = NULL };
  uint32_t length;
  int r;

  if (name == NULL)
    return -1;
  r = read_export (o, name, &length, &export, &m);
  if (r == 0)
    r = read_queries (o, true, &m);
  if (r != 0)
    return r == 1 ? 0 : -1;
  return reply_contexts (o, &m, true);
}

void
contexts_drop (struct session *session)
{
  for (size_t i = 0; i < session->nr_contexts; ++i)
    disk_offer_put (session->offers[i]);
  free (session->contexts);
  free (session->offers);
  session->contexts = NULL;
  session->offers = NULL;
  session->nr_contexts = 0;
}

static void
select_context (struct session *session, const struct matches *m, size_t id)
{
  const size_t i = session->nr_contexts++;

  session->contexts[i] = id;
  session->offers[i] = id < CONTEXT_FIRST_BITMAP ? NULL
    : disk_offer_get (disk_offers_at (m->offers, id - CONTEXT_FIRST_BITMAP));
}

static int
select_contexts (struct session *session, const struct matches *m)
{
  size_t nr = 0;

  for (size_t i = 0; i < nr_contexts (m); ++i)
    nr += matched (m, i);
  if (nr == 0)
    return 0;
  session->contexts = malloc (nr * sizeof session->contexts[0]);
  session->offers = malloc (nr * sizeof session->offers[0]);
  if (session->contexts == NULL || session->offers == NULL)
    return -1;
  for (size_t i = 0; i < nr_contexts (m); ++i)
    if (matched (m, i))
      select_context (session, m, i);
  return 0;
}

int
contexts_set (struct option *o, struct selection *selection)
{
  struct session *session = o->worker->session;
  CLEANUP_MATCHES_FREE struct matches m = { .bit = NULL };
  int r;

  if (!session->structured)
    return option_error (o, NBD_REP_ERR_INVALID,
                         "neither structured replies nor extended headers "
                         "are negotiated");
  contexts_drop (session);
  contexts_forget (selection);
  selection->export_name = malloc (NBD_MAX_STRING);
  if (selection->export_name == NULL)
    return -1;
  r = read_export (o, selection->export_name,
                   &selection->export_name_length, &selection->export, &m);
  if (r == 0)
    r = read_queries (o, false, &m);
  if (r != 0)
    return r == 1 ? 0 : -1;
  if (select_contexts (session, &m) == -1)
    return -1;
  return reply_contexts (o, &m, false);
}

void
contexts_forget (struct selection *selection)
{
  free (selection->export_name);
  export_put (&selection->export);
  *selection = (struct selection) { .export_name = NULL };
}

/* A view has a bitmap of its own, so its name is not enough. */
bool
contexts_selected (const struct session *session,
                   const struct selection *selection,
                   const struct export *export,
                   const char *name, uint32_t length)
{
  return session->nr_contexts > 0 && length == selection->export_name_length &&
    memcmp (name, selection->export_name, length) == 0 &&
    export->view == selection->export.view;
}

struct disk_offer *
contexts_bitmap (const struct session *session, uint32_t id)
{
  size_t low = 0, high = session->nr_contexts;

  while (high - low > 1) {
    const size_t middle = low + (high - low) / 2;

    if (id < session->contexts[middle])
      high = middle;
    else
      low = middle;
  }
  assert (low < high && session->contexts[low] == id);
  return session->offers[low];
}

/* Call fn for each bitmap that the client has selected. */
static void
each_bitmap (const struct session *session, void (*fn) (struct disk_offer *))
{
  for (size_t i = 0; i < session->nr_contexts; ++i)
    if (session->offers[i] != NULL)
      fn (session->offers[i]);
}

void
contexts_bind (struct session *session, const struct selection *selection,
               const char *name, uint32_t length)
{
  if (!contexts_selected (session, selection, &session->export, name, length))
    contexts_drop (session);
  export_hold (&session->export);
  each_bitmap (session, disk_bitmap_hold);
  session->is_holding = true;
}

void
contexts_release (struct session *session)
{
  if (session->is_holding) {
    each_bitmap (session, disk_bitmap_release);
    export_release (&session->export);
  }
  session->is_holding = false;
  contexts_drop (session);
  export_put (&session->export);
}
