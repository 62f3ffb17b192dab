/* nbdkit-dirty-bitmap-filter
 * SPDX-License-Identifier: BSD-3-Clause
 * Copyright the nbdkit-dirty-bitmap-filter authors
 */

/* How this works
 *
 * A sector's history is the list of what it has held, as hashes, each
 * with the moments when its request began and was acknowledged.  After a
 * crash it must hold what it held at the beginning of the last flush
 * that was acknowledged, or something later that had begun (I2).
 *
 * A bitmap that is not marked must have a bit for each granule of each
 * change that was acknowledged, and for each sector that is not what it
 * was in the beginning, whoever changed it (I3).  A disabled bitmap, or
 * one that was marked in the beginning, is as it was (I4).  Snapshots are
 * as they were, in any case.  Damaged bitmaps are not trusted once a sector
 * has changed (I7).
 */

#include <config.h>

#include <setjmp.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include <cmocka.h>

#include "common/bytes.h"
#include "common/cleanup.h"
#include "crash-model.h"

#define SECTOR 512

struct version {
  uint64_t hash;
  size_t start, end;
  bool fua;
};

static uint64_t
hash_sector (const uint8_t *p)
{
  uint64_t h = 1, w;

  for (unsigned i = 0; i < SECTOR; i += 8) {
    memcpy (&w, p + i, 8);
    h = (h ^ w) * UINT64_C (0x9e3779b97f4a7c15);
    h ^= h >> 29;
  }
  return h;
}

static void
add_version (struct sector *s, uint64_t hash, size_t start, bool fua)
{
  if (s->nr == s->max) {
    s->max = s->max * 2 + 2;
    s->versions = realloc (s->versions, s->max * sizeof s->versions[0]);
    assert_non_null (s->versions);
  }
  s->versions[s->nr++] = (struct version) { hash, start, SIZE_MAX, fua };
}

uint64_t
model_window (const struct model *m, unsigned nr)
{
  return nr * m->windows_apart;
}

uint8_t *
model_content (const struct model *m, uint64_t offset)
{
  const uint64_t nr = offset / m->windows_apart;
  const uint64_t in_window = offset % m->windows_apart;

  if (nr >= m->nr_windows || in_window >= m->window_size)
    return NULL;
  return m->content + nr * m->window_size + in_window;
}

static struct sector *
sector_at (const struct model *m, const uint8_t *content)
{
  return &m->sectors[(content - m->content) / SECTOR];
}

static void
load_content (struct model *m, const struct checked *base)
{
  const uint64_t unit_size = UINT64_C (1) << m->unit_bits;

  for (unsigned w = 0; w < m->nr_windows; ++w) {
    const uint64_t offset = model_window (m, w);

    for (uint64_t i = 0; i < m->window_size; i += unit_size) {
      const uint8_t *p = checked_unit (base, (offset + i) >> m->unit_bits);

      if (p != NULL)
        memcpy (model_content (m, offset + i), p, unit_size);
    }
  }
  for (size_t i = 0; i < m->nr_windows * m->window_size / SECTOR; ++i) {
    add_version (&m->sectors[i], hash_sector (m->content + i * SECTOR), 0,
                 false);
    m->sectors[i].versions[0].end = 0;
  }
}

struct model *
model_new (struct checked *base, const struct model_windows *windows)
{
  static const uint8_t zeroes[SECTOR];
  struct model *m = calloc (1, sizeof *m);

  assert_non_null (m);
  pthread_mutex_init (&m->lock, NULL);
  m->cluster_bits = base->cluster_bits;
  m->unit_bits = base->unit_bits;
  m->trim_bits = base->trim_bits;
  m->fua_is_own = base->image->beside;
  /* Version 2 has no zeroes that hide what is below. */
  if (base->version == 2 && base->image->backing != NULL)
    m->trim_from = base->image->backing->size;
  m->disk_size = base->disk_size;
  m->active_size = windows->active_size;
  m->window_size = windows->size;
  m->windows_apart = windows->apart;
  m->nr_windows = windows->nr;
  m->content = calloc (m->nr_windows, m->window_size);
  m->sectors = calloc (m->nr_windows * m->window_size / SECTOR,
                       sizeof m->sectors[0]);
  assert_non_null (m->content);
  assert_non_null (m->sectors);
  m->header = base->header;
  m->snapshots = base->snapshots;
  m->hash_of_zeroes = hash_sector (zeroes);
  load_content (m, base);

  for (size_t i = 0; i < base->nr_bitmaps; ++i) {
    const struct checked_bitmap *b = &base->bitmaps[i];

    model_expect_bitmap (m, b->name, b->granularity_bits);
    m->bitmaps[i].created = false;
    m->bitmaps[i].flags = b->flags;
    m->bitmaps[i].frozen = b->flags != 2;
    memcpy (m->bitmaps[i].required, b->bits, div_round_up (b->nr_bits, 8));
  }
  return m;
}

void
model_free (struct model *m)
{
  for (size_t i = 0; i < m->nr_windows * m->window_size / SECTOR; ++i)
    free (m->sectors[i].versions);
  for (size_t i = 0; i < m->nr_bitmaps; ++i)
    free (m->bitmaps[i].required);
  free (m->sectors);
  free (m->content);
  free (m->changes);
  free (m->flushes);
  pthread_mutex_destroy (&m->lock);
  free (m);
}

void
model_expect_bitmap (struct model *m, const char *name,
                     unsigned granularity_bits)
{
  struct model_bitmap *b = &m->bitmaps[m->nr_bitmaps++];

  assert_true (m->nr_bitmaps <= CHECKED_MAX_BITMAPS);
  snprintf (b->name, sizeof b->name, "%s", name);
  b->granularity_bits = granularity_bits;
  b->nr_bits = div_round_up (m->disk_size, UINT64_C (1) << granularity_bits);
  b->created = true;
  b->flags = 2;
  b->required = calloc (div_round_up (b->nr_bits, 8), 1);
  assert_non_null (b->required);
}

/* The bytes that a change changes. */
static void
affected (const struct model *m, const struct change *c, uint64_t *from,
          uint64_t *to)
{
  const uint64_t unit_size = UINT64_C (1) << m->trim_bits;

  *from = c->offset;
  *to = c->offset + c->count;
  if (c->kind == CHANGE_TRIM) {
    *from = round_up (max_u64 (*from, m->trim_from), unit_size);
    if (*to != m->disk_size)
      *to = round_down (*to, unit_size);
  }
}

/* Call fn for each sector of the windows that the change changes: its
 * bytes in content, and the range of it.
 */
static void
for_each_sector (struct model *m, const struct change *c,
                 const uint8_t *data,
                 void (*fn) (struct model *, const struct change *,
                             const uint8_t *data, uint8_t *sector,
                             unsigned first, unsigned count))
{
  uint64_t from, to;

  affected (m, c, &from, &to);
  while (from < to) {
    const unsigned first = from % SECTOR;
    const unsigned count = min_u64 (SECTOR - first, to - from);
    uint8_t *p = model_content (m, from - first);

    if (p == NULL) {
      /* On to the next window. */
      from = (from / m->windows_apart + 1) * m->windows_apart;
      continue;
    }
    fn (m, c, data == NULL ? NULL : data + (from - c->offset), p, first,
        count);
    from += count;
  }
}

static void
begin_sector (struct model *m, const struct change *c, const uint8_t *data,
              uint8_t *sector, unsigned first, unsigned count)
{
  if (data != NULL)
    memcpy (sector + first, data, count);
  else
    memset (sector + first, 0, count);
  add_version (sector_at (m, sector), hash_sector (sector), c->start, c->fua);
}

void
model_begin (struct model *m, const struct change *c, const uint8_t *data)
{
  for_each_sector (m, c, data, begin_sector);
}

static void
end_sector (struct model *m, const struct change *c, const uint8_t *data,
            uint8_t *sector, unsigned first, unsigned count)
{
  struct sector *s = sector_at (m, sector);

  (void) data;
  (void) first;
  (void) count;
  s->versions[s->nr - 1].end = c->end;
}

static void
add_flush (struct model *m, size_t start, size_t end)
{
  if (m->nr_flushes == m->max_flushes) {
    m->max_flushes = m->max_flushes * 2 + 64;
    m->flushes = realloc (m->flushes, m->max_flushes * sizeof m->flushes[0]);
    assert_non_null (m->flushes);
  }
  m->flushes[m->nr_flushes++] = (struct flushed) { start, end };
}

void
model_end (struct model *m, const struct change *c)
{
  for_each_sector (m, c, NULL, end_sector);
  ACQUIRE_LOCK_FOR_CURRENT_SCOPE (&m->lock);
  if (c->fua && !m->fua_is_own)
    add_flush (m, c->start, c->end);
  if (m->nr_changes == m->max_changes) {
    m->max_changes = m->max_changes * 2 + 64;
    m->changes = realloc (m->changes, m->max_changes * sizeof m->changes[0]);
    assert_non_null (m->changes);
  }
  m->changes[m->nr_changes++] = *c;
}

static void
fail_sector (struct model *m, const struct change *c, const uint8_t *data,
             uint8_t *sector, unsigned first, unsigned count)
{
  struct sector *s = sector_at (m, sector);

  (void) data;
  (void) first;
  (void) count;
  add_version (s, hash_sector (sector), c->start, false);
  s->versions[s->nr - 1].end = c->end;
}

void
model_failed (struct model *m, const struct change *c)
{
  for_each_sector (m, c, NULL, fail_sector);
}

void
model_flushed (struct model *m, size_t start, size_t end)
{
  ACQUIRE_LOCK_FOR_CURRENT_SCOPE (&m->lock);
  add_flush (m, start, end);
}

static int
compare_changes (const void *a, const void *b)
{
  const struct change *x = a, *y = b;

  return (x->end > y->end) - (x->end < y->end);
}

static int
compare_flushes (const void *a, const void *b)
{
  const struct flushed *x = a, *y = b;

  return (x->end > y->end) - (x->end < y->end);
}

void
model_sort (struct model *m)
{
  if (m->nr_changes > 0)
    qsort (m->changes, m->nr_changes, sizeof m->changes[0], compare_changes);
  if (m->nr_flushes > 0)
    qsort (m->flushes, m->nr_flushes, sizeof m->flushes[0], compare_flushes);
}

static void
require_bits (struct model_bitmap *b, const struct change *c)
{
  const uint64_t last = (c->offset + c->count - 1) >> b->granularity_bits;

  for (uint64_t i = c->offset >> b->granularity_bits; i <= last; ++i)
    if (i % 8 == 0 && i + 7 <= last) {
      b->required[i / 8] = 0xff;
      i += 7;
    }
    else
      b->required[i / 8] |= 1 << i % 8;
}

void
model_advance (struct model *m, size_t moment)
{
  m->moment = moment;
  for (; m->next_change < m->nr_changes; ++m->next_change) {
    const struct change *c = &m->changes[m->next_change];

    if (c->end >= moment)
      break;
    for (size_t i = 0; i < m->nr_bitmaps; ++i)
      if (!m->bitmaps[i].frozen)
        require_bits (&m->bitmaps[i], c);
  }
  for (; m->next_flush < m->nr_flushes; ++m->next_flush) {
    if (m->flushes[m->next_flush].end >= moment)
      break;
    if (m->flushes[m->next_flush].start > m->last_flush)
      m->last_flush = m->flushes[m->next_flush].start;
  }
}

static char message[512];

static const char *
check_bitmap (const struct model *m, struct checked *k, size_t i,
              struct checked_bitmap **unmarked)
{
  const struct model_bitmap *b = &m->bitmaps[i];
  struct checked_bitmap *is = checked_find (k, b->name);
  const uint64_t bytes = div_round_up (b->nr_bits, 8);

  if (is == NULL && m->may_lose)
    return NULL;
  if (is == NULL) {
    /* It may be yet to be created, and the others hidden meanwhile. */
    if (m->moment <= m->opened && (b->created || !k->trusted))
      return NULL;
    snprintf (message, sizeof message, "bitmap %s is gone", b->name);
    return message;
  }
  if (is->nr_bits != b->nr_bits ||
      (is->flags & 2) != (b->flags & 2) ||
      (b->frozen && (is->flags != b->flags ||
                     memcmp (is->bits, b->required, bytes) != 0))) {
    snprintf (message, sizeof message, "bitmap %s is not what it was",
              b->name);
    return message;
  }
  if (!b->frozen && m->never_marked && (is->flags & 1) != 0) {
    snprintf (message, sizeof message, "bitmap %s is marked", b->name);
    return message;
  }
  if (b->frozen || (is->flags & 1) != 0)
    return NULL;
  for (uint64_t j = 0; j < bytes; ++j)
    if ((b->required[j] & ~is->bits[j]) != 0) {
      snprintf (message, sizeof message, "bitmap %s is not marked and lacks "
                "bit %llu or one near to it", b->name,
                (unsigned long long) j * 8);
      return message;
    }
  unmarked[i] = is;
  return NULL;
}

/* Has this sector one of the contents that it may have? */
static bool
sector_may_be (const struct model *m, const struct sector *s, uint64_t hash)
{
  size_t base = 0;

  for (size_t i = 1; i < s->nr; ++i) {
    const struct version *v = &s->versions[i];

    if (v->end < m->last_flush || (v->fua && v->end < m->moment))
      base = i;
  }
  for (size_t i = base; i < s->nr; ++i)
    if (s->versions[i].hash == hash &&
        (i == base || s->versions[i].start < m->moment))
      return true;
  return false;
}

/* Without data it is zeroes. */
static const char *
check_sector (struct model *m, const struct checked *k, uint64_t offset,
              const uint8_t *data, struct checked_bitmap **unmarked)
{
  const struct sector *s = sector_at (m, model_content (m, offset));
  const uint64_t hash = data == NULL ? m->hash_of_zeroes : hash_sector (data);

  if (!sector_may_be (m, s, hash)) {
    snprintf (message, sizeof message, "the data at guest offset %#llx is "
              "neither old nor new", (unsigned long long) offset);
    return message;
  }
  if (hash == s->versions[0].hash)
    return NULL;
  if (k->stale) {
    snprintf (message, sizeof message, "an unknown autoclear bit is set, "
              "though guest offset %#llx has changed",
              (unsigned long long) offset);
    return message;
  }
  if (k->trusts_damaged) {
    snprintf (message, sizeof message, "damaged bitmaps are trusted, though "
              "guest offset %#llx has changed", (unsigned long long) offset);
    return message;
  }
  for (size_t i = 0; i < m->nr_bitmaps; ++i) {
    const uint64_t bit = offset >> m->bitmaps[i].granularity_bits;

    if (unmarked[i] != NULL &&
        (unmarked[i]->bits[bit / 8] >> bit % 8 & 1) == 0) {
      snprintf (message, sizeof message, "bitmap %s is not marked and knows "
                "nothing of a change at guest offset %#llx",
                m->bitmaps[i].name, (unsigned long long) offset);
      return message;
    }
  }
  return NULL;
}

/* Data outside of windows is all zeroes. */
static const char *
check_outside (const struct model *m, uint64_t offset, const uint8_t *data)
{
  static const uint8_t zeroes[65536];

  if (offset >= m->active_size ||
      memcmp (data, zeroes, UINT64_C (1) << m->unit_bits) == 0)
    return NULL;
  snprintf (message, sizeof message, "there is data at guest offset %#llx, "
            "where nobody wrote", (unsigned long long) offset);
  return message;
}

static const char *
check_unit (struct model *m, const struct checked *k, uint64_t offset,
            struct checked_bitmap **unmarked)
{
  const uint8_t *p = checked_unit (k, offset >> m->unit_bits);
  const uint64_t unit_size = UINT64_C (1) << m->unit_bits;

  if (model_content (m, offset) == NULL)
    return p == NULL ? NULL : check_outside (m, offset, p);
  for (uint64_t i = 0; i < unit_size; i += SECTOR) {
    const char *error = check_sector (m, k, offset + i,
                                      p == NULL ? NULL : p + i, unmarked);

    if (error != NULL)
      return error;
  }
  return NULL;
}

const char *
model_check (struct model *m, struct checked *k)
{
  struct checked_bitmap *unmarked[CHECKED_MAX_BITMAPS] = { NULL };
  const uint64_t unit_size = UINT64_C (1) << m->unit_bits;
  const char *error;

  for (size_t i = 0; i < m->nr_bitmaps; ++i) {
    error = check_bitmap (m, k, i, unmarked);
    if (error != NULL)
      return error;
  }
  if (k->header != m->header)
    return "the header is not what it was";
  if (k->snapshots != m->snapshots)
    return "a snapshot is not what it was";
  if (k->nr_bitmaps > m->nr_bitmaps)
    return "there are more bitmaps than there should be";
  for (uint64_t at = 0; at < m->disk_size; at += unit_size) {
    error = check_unit (m, k, at, unmarked);
    if (error != NULL)
      return error;
  }
  return NULL;
}

const char *
model_check_stopped (struct model *m, struct checked *k)
{
  const char *error = model_check (m, k);

  if (error != NULL)
    return error;
  for (size_t i = 0; i < m->nr_bitmaps; ++i) {
    const struct model_bitmap *b = &m->bitmaps[i];
    const struct checked_bitmap *is = checked_find (k, b->name);

    if (is->flags != b->flags ||
        memcmp (is->bits, b->required, div_round_up (b->nr_bits, 8)) != 0) {
      snprintf (message, sizeof message, "bitmap %s is not as it should be "
                "after a clean stop", b->name);
      return message;
    }
  }
  return NULL;
}
