/* nbdkit-dirty-bitmap-filter
 * SPDX-License-Identifier: BSD-3-Clause
 * Copyright the nbdkit-dirty-bitmap-filter authors
 */

/* Invariants:
 * - A request is in its slot's operations, as SENT, before its first byte
 *   leaves, and is ACKED there before the sectors are changed.  Whatever
 *   the moment at which its process is killed, model_vanished can do what
 *   is left to do, and may itself be interrupted and done again.
 * - A sector's changes that were answered happened in the order in which
 *   they were sent, since none is sent while another is in flight.  Those
 *   that were not may happen at any time, also after later ones that were
 *   answered: the server may have received them, and nothing tells when
 *   it is done with them, until it has no connections at all.
 */

#include <config.h>

#include <errno.h>
#include <fcntl.h>
#include <inttypes.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include "common/bytes.h"
#include "common/cleanup.h"
#include "model.h"

/* In the first quarter of the disk slots take turns every few sectors, so
 * that they meet in every cluster and every granule; in the rest each has
 * a run of its own, whose ends are in the middle of one.
 */
#define STRIP 8

static void __attribute__ ((noreturn))
fail (const char *what)
{
  fprintf (stderr, "soak: %s: %s\n", what, strerror (errno));
  exit (EXIT_FAILURE);
}

static struct model *
map (int fd, size_t size)
{
  struct model *m = mmap (NULL, size, PROT_READ | PROT_WRITE, MAP_SHARED,
                          fd, 0);

  if (m == MAP_FAILED)
    fail ("mmap");
  return m;
}

static void
find_parts (struct model *m)
{
  m->slots = (struct slot *) (m + 1);
  m->sectors = (struct sector *) (m->slots + m->nr_slots);
}

struct model *
model_create (const char *path, uint32_t nr_sectors, uint32_t nr_slots,
              uint64_t seed)
{
  CLEANUP_CLOSE int fd = open (path, O_RDWR | O_CREAT | O_EXCL | O_CLOEXEC,
                               0600);
  const size_t size = sizeof (struct model) +
    nr_slots * sizeof (struct slot) + nr_sectors * sizeof (struct sector);
  struct model *m;

  if (fd == -1 || ftruncate (fd, size) == -1)
    fail (path);
  m = map (fd, size);
  m->size = size;
  m->nr_sectors = nr_sectors;
  m->nr_shared = round_down (nr_sectors / 4, STRIP);
  m->nr_slots = nr_slots;
  find_parts (m);
  for (uint32_t i = 0; i < nr_slots; ++i)
    m->slots[i].random = (seed + i + 1) * UINT64_C (0x9e3779b97f4a7c15) | 1;
  return m;
}

struct model *
model_open (const char *path)
{
  CLEANUP_CLOSE int fd = open (path, O_RDWR | O_CLOEXEC);
  struct stat st;
  struct model *m;

  if (fd == -1 || fstat (fd, &st) == -1)
    fail (path);
  m = map (fd, st.st_size);
  find_parts (m);
  return m;
}

uint64_t
model_random (struct slot *s)
{
  s->random ^= s->random >> 12;
  s->random ^= s->random << 25;
  s->random ^= s->random >> 27;
  return s->random * UINT64_C (0x2545f4914f6cdd1d);
}

uint32_t
model_draw (struct slot *s, uint32_t n)
{
  return (model_random (s) >> 16) % n;
}

/* One strip in each turn, and one sector in each run, is nobody's. */
void
model_place (const struct model *m, struct slot *s, uint32_t max,
             uint32_t *first, uint32_t *count)
{
  const uint32_t number = s - m->slots;
  const uint32_t turn = (m->nr_slots + 1) * STRIP;
  const uint32_t run = (m->nr_sectors - m->nr_shared) / m->nr_slots;
  uint32_t start, length;

  if (model_draw (s, 2) == 0 && m->nr_shared >= turn) {
    start = model_draw (s, m->nr_shared / turn) * turn + number * STRIP;
    length = STRIP;
  }
  else {
    start = m->nr_shared + number * run;
    length = run - 1;
  }
  *count = 1 + model_draw (s, min_u64 (max, length));
  *first = start + model_draw (s, length - *count + 1);
}

struct operation *
model_begin (struct model *m, struct slot *s, enum change change,
             uint32_t first, uint32_t count)
{
  struct operation *op = s->operations;

  for (uint32_t i = first; i < first + count; ++i)
    if (m->sectors[i].nr_stale == MAX_STALE) {
      s->nr_avoided++;
      return NULL;
    }
  while (atomic_load (&op->state) != OPERATION_NONE)
    if (++op == s->operations + DEPTH)
      return NULL;

  op->change = change;
  op->stamp = change == CHANGE_WRITE ? ++s->last_stamp : STAMP_ZERO;
  op->first = first;
  op->count = count;
  for (uint32_t i = first; i < first + count; ++i)
    m->sectors[i].flags |= SECTOR_ISSUED;
  atomic_store (&op->state, OPERATION_SENT);
  return op;
}

static void
apply (struct sector *sector, const struct operation *op)
{
  if (op->change == CHANGE_TRIM)
    sector->flags |= SECTOR_MAYBE_ZERO;
  else {
    sector->settled = op->stamp;
    sector->flags = (sector->flags & ~SECTOR_MAYBE_ZERO) | SECTOR_CHANGED;
  }
}

void
model_acked (struct model *m, struct operation *op)
{
  atomic_store (&op->state, OPERATION_ACKED);
  for (uint32_t i = op->first; i < op->first + op->count; ++i)
    apply (&m->sectors[i], op);
  atomic_store (&op->state, OPERATION_NONE);
}

void
model_refused (struct operation *op)
{
  atomic_store (&op->state, OPERATION_NONE);
}

static void
add_stale (struct sector *sector, stamp stale)
{
  for (unsigned i = 0; i < sector->nr_stale; ++i)
    if (sector->stale[i] == stale)
      return;
  sector->stale[sector->nr_stale] = stale;
  sector->nr_stale++;
}

void
model_vanished (struct model *m, struct slot *s)
{
  for (struct operation *op = s->operations;
       op < s->operations + DEPTH; ++op) {
    switch (atomic_load (&op->state)) {
    case OPERATION_NONE:
      break;
    case OPERATION_ACKED:
      model_acked (m, op);
      break;
    case OPERATION_SENT:
      for (uint32_t i = op->first; i < op->first + op->count; ++i)
        add_stale (&m->sectors[i], op->stamp);
      atomic_store (&op->state, OPERATION_NONE);
    }
  }
}

void
model_fill (void *bytes, uint32_t number, stamp st)
{
  uint64_t words[SECTOR / sizeof (uint64_t)];
  const uint64_t head = (uint64_t) number << 32 | st;

  if (st == STAMP_ZERO) {
    memset (bytes, 0, SECTOR);
    return;
  }
  words[0] = head;
  for (size_t i = 1; i < sizeof words / sizeof words[0]; ++i)
    words[i] = (head + i) * UINT64_C (0x9e3779b97f4a7c15);
  memcpy (bytes, words, SECTOR);
}

static bool
holds (uint32_t number, stamp st, const void *bytes)
{
  uint8_t expected[SECTOR];

  model_fill (expected, number, st);
  return memcmp (bytes, expected, SECTOR) == 0;
}

bool
model_is_sure (const struct model *m, uint32_t number)
{
  return m->sectors[number].nr_stale == 0;
}

/* Which of its values does a sector hold? */
static bool
find_value (const struct model *m, uint32_t number, const void *bytes,
            stamp *found)
{
  const struct sector *sector = &m->sectors[number];

  *found = sector->settled;
  if (holds (number, *found, bytes))
    return true;
  *found = STAMP_ZERO;
  if ((sector->flags & SECTOR_MAYBE_ZERO) && holds (number, *found, bytes))
    return true;
  for (unsigned i = 0; i < sector->nr_stale; ++i) {
    *found = sector->stale[i];
    if (holds (number, *found, bytes))
      return true;
  }
  return false;
}

bool
model_allows (const struct model *m, uint32_t number, const void *bytes)
{
  stamp ignored;

  return find_value (m, number, bytes, &ignored);
}

void
model_explain (const struct model *m, uint32_t number, const void *bytes)
{
  const struct sector *sector = &m->sectors[number];
  uint64_t head;

  memcpy (&head, bytes, sizeof head);
  fprintf (stderr, "soak: sector %" PRIu32 " holds %016" PRIx64
           ", allowed: stamp %" PRIx32 "%s", number, head, sector->settled,
           sector->flags & SECTOR_MAYBE_ZERO ? ", zero" : "");
  for (unsigned i = 0; i < sector->nr_stale; ++i)
    fprintf (stderr, ", unanswered %" PRIx32, sector->stale[i]);
  fprintf (stderr, "\n");
}

void
model_settle (struct model *m, uint32_t number, const void *bytes)
{
  struct sector *sector = &m->sectors[number];
  stamp found;

  if (!find_value (m, number, bytes, &found))
    return;
  /* It was one without an answer: now it is known to have happened. */
  if (found != sector->settled)
    sector->flags |= SECTOR_CHANGED;
  sector->settled = found;
  sector->nr_stale = 0;
  sector->flags &= ~SECTOR_MAYBE_ZERO;
}
