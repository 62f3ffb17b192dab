/* nbdkit-dirty-bitmap-filter
 * SPDX-License-Identifier: BSD-3-Clause
 * Copyright the nbdkit-dirty-bitmap-filter authors
 */

/* How this works
 *
 * There are two images: what reads back, and what is durable.  A write
 * goes to the first and leaves its sectors pending; a barrier copies
 * what is pending to the second.  A barrier that fails and loses forgets
 * what was pending, which is what Linux does to dirty pages that it
 * cannot write: they are clean afterwards.  A change of the size is
 * durable at once, and with it the zeroes of what is new: it is what
 * hurts most that data is not there.
 *
 * It is for one thread.
 */

#include <config.h>

#include <errno.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stdlib.h>
#include <string.h>

#include <cmocka.h>

#include "common/bytes.h"
#include "container/container.h"
#include "fault-container.h"

#define SECTOR 512

struct faulty {
  struct container c;
  struct fault_store *store;
};

static struct fault_store *
store_of (struct container *c)
{
  return ((struct faulty *) c)->store;
}

struct fault_store *
fault_store_new (uint64_t room, struct fault_store *first)
{
  struct fault_store *s = calloc (1, sizeof *s);

  assert_non_null (s);
  s->first = first == NULL ? s : first;
  s->live = crash_image_new (room);
  s->durable = crash_image_new (room);
  s->pending = calloc (1, room / SECTOR);
  s->backed = calloc (1, room / SECTOR);
  assert_non_null (s->pending);
  assert_non_null (s->backed);
  return s;
}

void
fault_store_free (struct fault_store *s)
{
  crash_image_free (&s->live);
  crash_image_free (&s->durable);
  free (s->pending);
  free (s->backed);
  free (s);
}

static void
resize (struct crash_image *image, uint64_t size)
{
  if (size < image->size)
    memset (image->bytes + size, 0, image->size - size);
  image->size = size;
}

static void
copy_image (struct crash_image *to, const struct crash_image *from)
{
  resize (to, from->size);
  memcpy (to->bytes, from->bytes, from->size);
}

static unsigned
block_size (const struct fault_store *s)
{
  return s->first->plan.block != 0 ? s->first->plan.block : 4096;
}

static bool
is_zero (const uint8_t *p, uint64_t count)
{
  return p[0] == 0 && memcmp (p, p + 1, count - 1) == 0;
}

/* Which blocks has an image that it begins with? */
static void
back_image (struct fault_store *s)
{
  const unsigned block = block_size (s);

  memset (s->backed, 0, s->live.room / SECTOR);
  for (uint64_t at = 0; at < s->live.size; at += block)
    s->backed[at / block] =
      !s->first->plan.sparse ||
      !is_zero (s->live.bytes + at, min_u64 (block, s->live.room - at));
}

void
fault_store_reset (struct fault_store *s, const struct crash_image *base,
                   const struct fault_plan *plan)
{
  copy_image (&s->live, base);
  copy_image (&s->durable, base);
  memset (s->pending, 0, s->live.room / SECTOR);
  s->plan = *plan;
  back_image (s);
  s->paused = false;
  s->counted = s->taken = s->nr_failed = s->nr_lost = 0;
  s->nr_own_failed = s->nr_own_lost = 0;
}

void
fault_store_heal (struct fault_store *s)
{
  s->plan = (struct fault_plan) { .block = s->plan.block };
}

/* Does this call fail? */
static bool
fails (struct fault_store *any, unsigned kind)
{
  struct fault_store *s = any->first;
  const struct fault_plan *p = &s->plan;

  if (s->paused || (p->kinds & kind) == 0)
    return false;
  const size_t number = s->counted++;

  if (p->for_good ? number < p->first : number != p->first)
    return false;
  s->nr_failed++;
  any->nr_own_failed++;
  s->is_first = number == p->first;
  errno = p->error;
  return true;
}

static uint64_t
part_done (const struct fault_store *s, uint64_t count, uint64_t offset)
{
  const uint64_t middle = round_down (offset + count / 2, SECTOR);

  switch (s->first->is_first ? s->first->plan.done : DONE_NOTHING) {
  case DONE_NOTHING: return 0;
  case DONE_WHOLE: return count;
  default: return middle <= offset ? 0 : middle - offset;
  }
}

static void
set_pending (struct fault_store *s, uint64_t count, uint64_t offset)
{
  if (count == 0)
    return;
  const uint64_t first = offset / SECTOR;

  memset (s->pending + first, 1, (offset + count - 1) / SECTOR - first + 1);
}

static bool
is_backed (const struct fault_store *s, uint64_t count, uint64_t offset)
{
  const unsigned block = block_size (s);

  for (uint64_t b = offset / block; b <= (offset + count - 1) / block; ++b)
    if (!s->backed[b])
      return false;
  return true;
}

/* Give a range its blocks.  Returns how much of it has them: less than
 * count, and errno, if there are no more.
 */
static uint64_t
take_blocks (struct fault_store *s, uint64_t count, uint64_t offset)
{
  const unsigned block = block_size (s);
  struct fault_store *first = s->first;

  for (uint64_t at = round_down (offset, block); at < offset + count;
       at += block) {
    if (s->backed[at / block])
      continue;
    if (first->plan.space && !first->paused) {
      if (first->taken >= first->plan.first) {
        first->nr_failed++;
        s->nr_own_failed++;
        errno = ENOSPC;
        return at <= offset ? 0 : at - offset;
      }
      if (++first->taken > first->counted)
        first->counted = first->taken;
    }
    s->backed[at / block] = 1;
  }
  return count;
}

static void
give_blocks_back (struct fault_store *s, uint64_t count, uint64_t offset)
{
  const unsigned block = block_size (s);

  for (uint64_t at = round_up (offset, block);
       at + block <= offset + count; at += block) {
    if (s->backed[at / block] && s->first->plan.space)
      s->first->taken -= s->first->taken > 0;
    s->backed[at / block] = 0;
  }
}

static int
faulty_pread (struct container *c, void *buf, size_t count, uint64_t offset)
{
  struct fault_store *s = store_of (c);

  if (fails (s, s->is_below ? FAULT_READ_BELOW : FAULT_READ))
    return -1;
  memcpy (buf, s->live.bytes + offset, count);
  return 0;
}

static int
faulty_pwrite (struct container *c, const void *buf, size_t count,
               uint64_t offset)
{
  struct fault_store *s = store_of (c);
  const bool counts = !s->first->plan.thin || !is_backed (s, count, offset);
  bool fail = counts && fails (s, FAULT_WRITE);

  if (fail)
    count = part_done (s, count, offset);
  const uint64_t n = take_blocks (s, count, offset);

  fail |= n < count;
  memcpy (s->live.bytes + offset, buf, n);
  set_pending (s, n, offset);
  if (s->written != NULL)
    s->written (s->opaque);
  return fail ? -1 : 0;
}

static int
faulty_zero (struct container *c, uint64_t count, uint64_t offset, bool punch)
{
  struct fault_store *s = store_of (c);
  bool fail = !s->first->plan.thin && fails (s, FAULT_ZERO);
  uint64_t n;

  if (fail)
    count = part_done (s, count, offset);
  n = s->first->plan.provisions && !punch
    ? take_blocks (s, count, offset) : count;
  fail |= n < count;
  memset (s->live.bytes + offset, 0, n);
  set_pending (s, n, offset);
  if (punch)
    give_blocks_back (s, n, offset);
  return fail ? -1 : 0;
}

static int
faulty_flush (struct container *c)
{
  struct fault_store *s = store_of (c);
  const bool fail = fails (s, FAULT_FLUSH);

  if (fail) {
    const int err = errno;

    s->first->nr_lost++;
    s->nr_own_lost++;
    if (s->first->plan.loses)
      memset (s->pending, 0, s->live.room / SECTOR);
    errno = err;
    return -1;
  }
  for (uint64_t i = 0; i < div_round_up (s->live.size, SECTOR); ++i)
    if (s->pending[i])
      memcpy (s->durable.bytes + i * SECTOR, s->live.bytes + i * SECTOR,
              SECTOR);
  memset (s->pending, 0, s->live.room / SECTOR);
  return 0;
}

static int
faulty_grow (struct container *c, uint64_t size)
{
  struct fault_store *s = store_of (c);
  const uint64_t limit = s == s->first && s->plan.limit != 0 && !s->paused
    ? s->plan.limit : s->live.room;

  if (size > limit) {
    s->first->nr_failed++;
    s->nr_own_failed++;
    errno = ENOSPC;
    return -1;
  }
  if (fails (s, FAULT_GROW))
    return -1;
  resize (&s->live, size);
  resize (&s->durable, size);
  atomic_store (&c->size, size);
  return 0;
}

static int
faulty_truncate (struct container *c, uint64_t size)
{
  struct fault_store *s = store_of (c);

  if (fails (s, FAULT_TRUNCATE))
    return -1;
  resize (&s->live, size);
  resize (&s->durable, size);
  atomic_store (&c->size, size);
  return 0;
}

static void
faulty_close (struct container *c)
{
  free (c);
}

struct view {
  struct container c;
  const struct crash_image *image;
};

static int
view_pread (struct container *c, void *buf, size_t count, uint64_t offset)
{
  memcpy (buf, ((struct view *) c)->image->bytes + offset, count);
  return 0;
}

struct container *
fault_container_view (const struct crash_image *image)
{
  static const struct container_ops ops = {
    .pread = view_pread, .close = faulty_close,
  };
  struct view *v = calloc (1, sizeof *v);

  assert_non_null (v);
  container_init (&v->c, &ops, image->size, true);
  v->image = image;
  return &v->c;
}

struct container *
fault_container_open (struct fault_store *s)
{
  static const struct container_ops ops = {
    .pread = faulty_pread, .pwrite = faulty_pwrite, .zero = faulty_zero,
    .flush = faulty_flush, .grow = faulty_grow, .truncate = faulty_truncate,
    .close = faulty_close,
  };
  struct faulty *f = calloc (1, sizeof *f);

  assert_non_null (f);
  container_init (&f->c, &ops, s->live.size, false);
  f->store = s;
  return &f->c;
}
