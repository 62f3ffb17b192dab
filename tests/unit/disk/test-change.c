/* nbdkit-dirty-bitmap-filter
 * SPDX-License-Identifier: BSD-3-Clause
 * Copyright the nbdkit-dirty-bitmap-filter authors
 */

/* Changing the set of bitmaps while the disk is served, beside a model: what
 * is in RAM, what is in the image, what a crash at any moment leaves, what an
 * error at any operation leaves, and writes by other threads.  The same with
 * the disk beside the image.
 *
 * test-change-order is this file, linked with libbrokenorder, where a rule of
 * the order of writes can be broken (qcow2/order.h): it sees that the crash
 * test notices.
 */

#include <config.h>

#include <errno.h>
#include <inttypes.h>
#include <pthread.h>
#include <semaphore.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/wait.h>
#include <unistd.h>

#include <cmocka.h>

#include "common/bytes.h"
#include "common/cleanup.h"
#include "common/report.h"
#include "disk/change.h"
#include "disk/disk.h"
#include "image.h"
#include "qcow2/order.h"
#include "bitmap-image.h"

#define MIB (UINT64_C (1) << 20)
#define SIZE (64 * MIB)
#define LIMIT (2 << 20)

/* The blocks that are written: few, so that the image stays small, and in
 * different clusters of bits.
 */
#define BLOCK 4096
#define NR_BLOCKS 16
#define BLOCK_OFFSET(i) ((i) * (SIZE / NR_BLOCKS) + (i) % 3 * BLOCK)

/* Clusters of 4 KiB: those of bits have 32768 bits. */
static const struct bitmap_spec specs[] = {
  { .name = "a", .granularity_bits = 9, .flags = 2, .table = "d1",
    .fill = 0x11 },
  { .name = "b", .granularity_bits = 16, .flags = 0, .table = "d",
    .fill = 0x80 },
  { .name = "c", .granularity_bits = 20, .flags = 2 },
};

static const char *const names[] = { "a", "b", "c", "d", "e", "f" };
#define NR_NAMES 6

/* One bitmap in the model.  Its bits are those of granules of 512 bytes: a
 * granule that is larger has all of its bits or none.
 */
#define NR_BITS (SIZE / 512)
struct model_bitmap {
  bool exists, enabled, in_ram, has_backup, has_view;
  unsigned shift;
  uint8_t *bits;                /* a byte a bit */
  uint8_t *since;               /* the same, since the backup began */
};

struct model {
  struct model_bitmap bitmaps[NR_NAMES];
  bool is_unflushed;            /* written to since the last flush */
  bool is_written[NR_BLOCKS];
  bool is_durable[NR_BLOCKS];   /* written before that flush */
};

/* All writes so far are durable. */
static void
model_flush (struct model *m)
{
  m->is_unflushed = false;
  memcpy (m->is_durable, m->is_written, sizeof m->is_durable);
}

static void
model_set (struct model_bitmap *b, uint8_t *bits, uint64_t first,
           uint64_t last)
{
  const uint64_t in_granule = UINT64_C (1) << (b->shift - 9);

  first = round_down (first, in_granule);
  last = round_down (last, in_granule) + in_granule - 1;
  memset (&bits[first], 1, min_u64 (last, NR_BITS - 1) - first + 1);
}

static void
model_init (struct model *m)
{
  *m = (struct model) { .is_unflushed = false };
  for (unsigned i = 0; i < NR_NAMES; ++i) {
    m->bitmaps[i].bits = calloc (1, NR_BITS);
    m->bitmaps[i].since = calloc (1, NR_BITS);
  }
  for (unsigned i = 0; i < sizeof specs / sizeof specs[0]; ++i) {
    struct model_bitmap *b = &m->bitmaps[i];
    const uint64_t in_granule = UINT64_C (1) << (specs[i].granularity_bits - 9);

    b->exists = true;
    b->enabled = specs[i].flags & 2;
    b->shift = specs[i].granularity_bits;
    for (uint64_t bit = 0; bit * in_granule < NR_BITS; ++bit) {
      const uint64_t cluster = bit / 32768;
      const char entry = specs[i].table == NULL ||
        cluster >= strlen (specs[i].table) ? '0' : specs[i].table[cluster];

      if (entry == '1' || (entry == 'd' && specs[i].fill >> bit % 8 & 1))
        model_set (b, b->bits, bit * in_granule, bit * in_granule);
    }
  }
}

static uint8_t *
copy_bits (const uint8_t *bits)
{
  return memcpy (malloc (NR_BITS), bits, NR_BITS);
}

static void
model_copy (struct model *to, const struct model *from)
{
  *to = *from;
  for (unsigned i = 0; i < NR_NAMES; ++i) {
    to->bitmaps[i].bits = copy_bits (from->bitmaps[i].bits);
    to->bitmaps[i].since = copy_bits (from->bitmaps[i].since);
  }
}

static void
model_free (struct model *m)
{
  for (unsigned i = 0; i < NR_NAMES; ++i) {
    free (m->bitmaps[i].bits);
    free (m->bitmaps[i].since);
  }
}

static unsigned
number_of (const char *name)
{
  for (unsigned i = 0; i < NR_NAMES; ++i)
    if (strcmp (names[i], name) == 0)
      return i;
  fail ();
  return 0;
}

/* Does the action change the image? */
static bool
is_in_image (const struct model *m, const struct disk_action *a)
{
  const struct model_bitmap *b = &m->bitmaps[number_of (a->name)];

  switch (a->type) {
  case DISK_BITMAP_ADD:
    return a->persistent;
  case DISK_BITMAP_ENABLE:
    return !b->in_ram && !b->enabled;
  case DISK_BITMAP_DISABLE:
    return !b->in_ram && b->enabled;
  case DISK_BITMAP_MERGE:
    return !b->in_ram && a->nr_sources > 0;
  case DISK_BACKUP_BEGIN:
    return !b->exists;
  case DISK_BACKUP_END:
    return !b->in_ram && a->clear;
  default:
    return !b->in_ram;
  }
}

static void
model_act (struct model *m, const struct disk_action *a)
{
  struct model_bitmap *b = &m->bitmaps[number_of (a->name)];

  /* The image is flushed first. */
  if (is_in_image (m, a))
    model_flush (m);
  switch (a->type) {
  case DISK_BITMAP_ADD:
    b->exists = true;
    b->enabled = !a->disabled;
    b->in_ram = !a->persistent;
    b->shift = __builtin_ctz (a->granularity);
    memset (b->bits, 0, NR_BITS);
    break;
  case DISK_BITMAP_REMOVE:
    b->exists = false;
    break;
  case DISK_BITMAP_CLEAR:
    memset (b->bits, 0, NR_BITS);
    break;
  case DISK_BITMAP_ENABLE:
    b->enabled = true;
    break;
  case DISK_BITMAP_DISABLE:
    b->enabled = false;
    break;
  case DISK_BITMAP_MERGE:
    for (size_t i = 0; i < a->nr_sources; ++i) {
      const struct model_bitmap *from =
        &m->bitmaps[number_of (a->sources[i])];

      for (uint64_t bit = 0; bit < NR_BITS; ++bit)
        if (from->bits[bit])
          model_set (b, b->bits, bit, bit);
    }
    break;
  case DISK_BACKUP_BEGIN:
    if (!b->exists) {
      *b = (struct model_bitmap) {
        .exists = true, .enabled = true, .bits = b->bits, .since = b->since,
        .shift = __builtin_ctz (a->granularity),
      };
      memset (b->bits, 1, NR_BITS);
    }
    b->has_backup = true;
    b->has_view = a->view;
    memset (b->since, 0, NR_BITS);
    break;
  case DISK_BACKUP_END:
    b->has_backup = b->has_view = false;
    if (a->clear)
      memcpy (b->bits, b->since, NR_BITS);
    break;
  }
}

static bool
model_has_stored (const struct model *m)
{
  for (unsigned i = 0; i < NR_NAMES; ++i)
    if (m->bitmaps[i].exists && !m->bitmaps[i].in_ram)
      return true;
  return false;
}

/* A disk beside the image.  It tells the image's recorder which blocks are
 * durable: bit n of `durable`, and of the upper half of a stage, for block n.
 */
struct tracked {
  struct container c;
  struct container *inner;
  struct container *recorder;
  unsigned stage;
  atomic_uint written, durable;
};

#define STAGE_BITS 16

static struct tracked *
tracked (struct container *c)
{
  return (struct tracked *) c;
}

static void
tracked_stage (struct tracked *t, unsigned stage)
{
  t->stage = stage;
  recorder_stage (t->recorder,
                  stage | atomic_load (&t->durable) << STAGE_BITS);
}

static int
tracked_pread (struct container *c, void *buf, size_t count, uint64_t offset)
{
  return container_pread (tracked (c)->inner, buf, count, offset);
}

static int
tracked_pwrite (struct container *c, const void *buf, size_t count,
                uint64_t offset)
{
  const int r = container_pwrite (tracked (c)->inner, buf, count, offset);

  atomic_fetch_or (&tracked (c)->written,
                   1U << offset / (SIZE / NR_BLOCKS));
  return r;
}

static int
tracked_flush (struct container *c)
{
  struct tracked *t = tracked (c);
  const unsigned written = atomic_load (&t->written);

  if ((written & ~atomic_fetch_or (&t->durable, written)) != 0)
    tracked_stage (t, t->stage);
  return 0;
}

static void
tracked_close (struct container *c)
{
  container_close (tracked (c)->inner);
  free (c);
}

static struct container *
tracked_open (struct container *recorder)
{
  static const struct container_ops ops = {
    .pread = tracked_pread, .pwrite = tracked_pwrite,
    .flush = tracked_flush, .close = tracked_close,
  };
  struct tracked *t = calloc (1, sizeof *t);

  assert_non_null (t);
  t->inner = container_open_memory (SIZE);
  assert_int_equal (container_reserve (t->inner, SIZE), 0);
  t->recorder = recorder;
  container_init (&t->c, &ops, SIZE, false);
  return &t->c;
}

struct world {
  struct crafted crafted;
  struct container *c;
  struct container *beside;     /* the disk, or NULL if it is in the image */
  struct disk *d;
  struct model model;
  bool keep;
  uint64_t seed;
};

static void
open_disk (struct world *w)
{
  const struct disk_options options = {
    .keep = w->keep, .scratch = temp_folder (),
    .is_beside = w->beside != NULL, .beside = w->beside,
  };

  w->d = disk_open (w->c, &options);
  assert_non_null (w->d);
}

static void
open_world (struct world *w, bool keep, bool beside, uint64_t seed)
{
  *w = (struct world) { .keep = keep, .seed = seed };
  craft (&w->crafted, 12, SIZE, specs, sizeof specs / sizeof specs[0]);
  w->c = recorder_open (&w->crafted.bytes, LIMIT);
  if (beside)
    w->beside = tracked_open (w->c);
  model_init (&w->model);
  open_disk (w);
}

static void
close_world (struct world *w)
{
  disk_close (w->d);
  container_close (w->beside);
  model_free (&w->model);
  free (w->crafted.bytes.p);
}

static uint64_t
random_below (struct world *w, uint64_t n)
{
  return random_next (&w->seed) % n;
}

/* May the action be carried out for this bitmap? */
static bool
is_possible (enum disk_action_type type, const struct model_bitmap *b)
{
  switch (type) {
  case DISK_BITMAP_ADD:
    return !b->exists;
  case DISK_BACKUP_BEGIN:
    return !b->exists || (b->enabled && !b->has_backup);
  case DISK_BACKUP_END:
    return b->exists && b->has_backup;
  default:
    return b->exists && !b->has_backup;
  }
}

/* NR_NAMES if there is none. */
static unsigned
random_bitmap (struct world *w, const struct model *m,
               enum disk_action_type type)
{
  const unsigned start = random_below (w, NR_NAMES);

  for (unsigned i = start; i < start + NR_NAMES; ++i)
    if (is_possible (type, &m->bitmaps[i % NR_NAMES]))
      return i % NR_NAMES;
  return NR_NAMES;
}

#define MAX_ACTIONS 4

struct actions {
  struct disk_action list[MAX_ACTIONS];
  const char *sources[MAX_ACTIONS][3];
  size_t nr;
};

static bool
random_action (struct world *w, const struct model *m, struct disk_action *a,
               const char **sources)
{
  static const uint32_t granularities[] = { 512, 4096, 65536, MIB };
  const enum disk_action_type type = random_below (w, DISK_BACKUP_END + 1);
  const unsigned i = random_bitmap (w, m, type);

  if (i == NR_NAMES)
    return false;
  *a = (struct disk_action) { .type = type, .name = names[i] };
  a->has_granularity = true;
  a->granularity = granularities[random_below (w, 4)];
  a->create = true;
  a->clear = random_below (w, 2);
  a->success = a->clear;
  a->view = random_below (w, 2);
  if (type == DISK_BITMAP_ADD) {
    a->persistent = random_below (w, 4) > 0;
    a->disabled = random_below (w, 4) == 0;
  }
  if (type == DISK_BITMAP_MERGE) {
    a->nr_sources = random_below (w, 4);
    a->sources = sources;
    for (size_t j = 0; j < a->nr_sources; ++j)
      sources[j] = names[random_bitmap (w, m, type)];
  }
  return true;
}

/* Some actions that can be carried out, and the model after them. */
static void
random_actions (struct world *w, struct actions *actions, struct model *after)
{
  const unsigned tries = 1 + random_below (w, 2 * MAX_ACTIONS);

  model_copy (after, &w->model);
  actions->nr = 0;
  for (unsigned i = 0; i < tries && actions->nr < MAX_ACTIONS; ++i) {
    struct disk_action *a = &actions->list[actions->nr];

    /* A backup must have begun in an earlier change. */
    if (!random_action (w, after, a, actions->sources[actions->nr]) ||
        (a->type == DISK_BACKUP_END && actions->nr > 0))
      continue;
    model_act (after, a);
    actions->nr++;
  }
}

/* To stderr with VERBOSE in the environment. */
static void trace (const char *, ...)
  __attribute__ ((format (printf, 1, 2)));

static void
trace (const char *fmt, ...)
{
  va_list args;

  va_start (args, fmt);
  report_if_verbose (REPORT_DEBUG, fmt, args);
  va_end (args);
}

static void
write_block (struct world *w, unsigned block)
{
  static const uint8_t data[BLOCK] = { 1, 2, 3 };
  const uint64_t offset = BLOCK_OFFSET ((uint64_t) block);

  trace ("write %u", block);
  assert_int_equal (disk_write (w->d, data, BLOCK, offset, false), 0);
  for (unsigned i = 0; i < NR_NAMES; ++i) {
    struct model_bitmap *b = &w->model.bitmaps[i];

    if (!b->exists || !b->enabled)
      continue;
    model_set (b, b->bits, offset / 512, (offset + BLOCK - 1) / 512);
    if (b->has_backup)
      model_set (b, b->since, offset / 512, (offset + BLOCK - 1) / 512);
  }
  w->model.is_written[block] = true;
  w->model.is_unflushed = true;
}

struct listed {
  const struct model *model;
  unsigned nr;
};

static void
check_listed (const struct disk_bitmap_state *s, void *opaque)
{
  struct listed *l = opaque;
  const struct model_bitmap *b = &l->model->bitmaps[number_of (s->name)];
  uint64_t dirty = 0, since = 0;

  assert_true (b->exists);
  assert_int_equal (s->granularity, 1 << b->shift);
  assert_int_equal (s->is_enabled, b->enabled);
  assert_int_equal (s->is_persistent, !b->in_ram);
  for (uint64_t bit = 0; bit < NR_BITS; ++bit)
    dirty += b->bits[bit] ? 512 : 0;
  assert_int_equal (s->dirty_bytes, dirty);
  assert_int_equal (s->has_backup, b->has_backup);
  for (uint64_t bit = 0; bit < NR_BITS; ++bit)
    since += b->has_backup && b->since[bit] ? 512 : 0;
  assert_int_equal (s->since_bytes, since);
  l->nr++;
}

/* What is in RAM is what the model has. */
static void
check_ram (const struct world *w)
{
  struct listed l = { .model = &w->model };

  disk_list_bitmaps (w->d, check_listed, &l);
  for (unsigned i = 0; i < NR_NAMES; ++i)
    l.nr -= w->model.bitmaps[i].exists;
  assert_int_equal (l.nr, 0);
  for (unsigned i = 0; i < NR_NAMES; ++i) {
    struct disk_view *v = disk_find_view (w->d, names[i], strlen (names[i]));

    assert_int_equal (v != NULL, w->model.bitmaps[i].has_view);
    disk_view_put (v);
  }
}

/* Why the image's bitmap is not that of the model, or NULL. */
static const char *
compare_bitmap (const struct bytes *image, const char *name,
                const struct model_bitmap *b, bool may_be_marked, bool exact)
{
  static char why[64];
  struct disk_bitmap d = disk_bitmap_read (image, name);
  CLEANUP_FREE uint8_t *bits = d.bits;

  if (!b->exists || b->in_ram)
    return d.state == DISK_ABSENT ? NULL : "it is there";
  if (d.state == DISK_ABSENT)
    return "it is absent";
  if (d.granularity_bits != b->shift)
    return "it has another granularity";
  if (!!(d.flags & 2) != b->enabled)
    return "it is enabled or not";
  if (d.state == DISK_MARKED)
    return may_be_marked && b->enabled ? NULL : "it is marked";
  for (uint64_t bit = 0; bit < d.nr_bits; ++bit) {
    const bool have = disk_bitmap_bit (&d, bit);
    const bool want = b->bits[bit << (b->shift - 9)];

    if (have == want || (have && !exact))
      continue;
    snprintf (why, sizeof why, "%s %s bit %" PRIu64, name,
              have ? "should not have" : "lacks", bit);
    return why;
  }
  return NULL;
}

static const char *
compare_image (const struct bytes *image, const struct model *m,
               bool may_be_marked, bool exact)
{
  for (unsigned i = 0; i < NR_NAMES; ++i) {
    const char *why = compare_bitmap (image, names[i], &m->bitmaps[i],
                                      may_be_marked, exact);

    if (why != NULL)
      return why;
  }
  return NULL;
}

static void
assert_image (const struct world *w, bool exact)
{
  const struct bytes image = recorder_image (w->c);
  const char *why = compare_image (&image, &w->model, false, exact);

  if (why != NULL)
    fail_msg ("the image's bitmap is wrong: %s", why);
}

static void
stop_and_check (struct world *w)
{
  assert_int_equal (disk_stop (w->d), 0);
  assert_image (w, true);
  image_check (w->c, 1);
}

/* What a backup that has begun says is dirty is what its view shows, whatever
 * other threads have written since.
 */
static void
check_dirty (const struct world *w, const struct disk_action *a)
{
  struct disk_view *v = disk_find_view (w->d, a->name, strlen (a->name));
  struct disk_offers *offers = disk_view_offers (v);
  uint64_t offset = 0, bytes = 0;

  while (offset < SIZE) {
    bool dirty;
    const uint64_t n = disk_bitmap_run (disk_offers_at (offers, 0), offset,
                                        SIZE, &dirty);

    bytes += dirty ? n : 0;
    offset += n;
  }
  assert_int_equal (a->dirty_bytes, bytes);
  disk_offers_put (offers);
  disk_view_put (v);
}

static void
change (struct world *w)
{
  struct actions actions;
  struct model after;

  random_actions (w, &actions, &after);
  for (size_t i = 0; i < actions.nr; ++i)
    trace ("%s: action %d", actions.list[i].name, actions.list[i].type);
  messages_clear ();
  if (disk_change_bitmaps (w->d, "disk", actions.list, actions.nr) == -1)
    assert_message ("no message");
  for (size_t i = 0; i < actions.nr; ++i)
    if (actions.list[i].type == DISK_BACKUP_BEGIN && actions.list[i].view)
      check_dirty (w, &actions.list[i]);
  model_free (&w->model);
  w->model = after;
}

static void
test_random (void **state)
{
  const unsigned rounds = how_often (16, 6, 2);

  (void) state;
  for (unsigned round = 0; round < rounds; ++round) {
    struct world w;

    open_world (&w, round % 2, round % 4 >= 2, round);
    for (unsigned step = 0; step < 40; ++step) {
      switch (random_below (&w, 4)) {
      case 0:
        change (&w);
        break;
      case 1:
        assert_int_equal (disk_sync (w.d), 0);
        w.model.is_unflushed = false;
        break;
      default:
        write_block (&w, random_below (&w, NR_BLOCKS));
      }
      check_ram (&w);
      if (w.keep || !w.model.is_unflushed)
        assert_image (&w, !w.keep);
    }
    stop_and_check (&w);
    close_world (&w);
  }
}

/* The crash test: an operation a stage. */
#define MAX_OPERATIONS 24

struct history {
  struct world w;
  struct model after[MAX_OPERATIONS + 1]; /* [0]: before all of them */
  bool is_change[MAX_OPERATIONS + 1];
  unsigned nr;
  char *wrong;                  /* what a crash has left, or NULL */
};

/* Is it on the disk beside the image? */
static bool
is_on_disk (unsigned durable, const struct model *m)
{
  for (unsigned i = 0; i < NR_BLOCKS; ++i)
    if (m->is_durable[i] && !(durable >> i & 1))
      return false;
  return true;
}

/* Does the image have all that is durable in the model, or the disk, if it is
 * beside?
 */
static bool
has_durable (const struct history *h, unsigned durable,
             const struct bytes *image, const struct model *m)
{
  if (h->w.beside != NULL)
    return is_on_disk (durable, m);

  const struct disk_options options = { .readonly = true };
  struct container *c = recorder_open (image, LIMIT);
  struct disk *d = disk_open (c, &options);
  bool has = d != NULL;

  if (d == NULL)
    container_close (c);
  for (unsigned i = 0; has && i < NR_BLOCKS; ++i) {
    uint8_t byte;

    has = !m->is_durable[i] ||
      (disk_read (d, &byte, 1, BLOCK_OFFSET ((uint64_t) i)) == 0 &&
       byte != 0);
  }
  disk_close (d);
  return has;
}

/* Stage 2 * n - 1: operation n is under way; 2 * n: it has ended. */
static void
judge (void *opaque, unsigned number, const struct bytes *image)
{
  struct history *h = opaque;
  const unsigned stage = number & ((1U << STAGE_BITS) - 1);
  const unsigned durable = number >> STAGE_BITS;
  const unsigned n = (stage + 1) / 2;
  const bool under_way = stage % 2 == 1;
  const struct model *new = &h->after[n];
  const struct model *old = under_way ? &h->after[n - 1] : new;
  const bool exact = !h->w.keep && !new->is_unflushed && !old->is_unflushed;
  /* In mode mark a bitmap is marked from a write to the next flush. */
  const bool may_be_marked =
    !h->w.keep && (new->is_unflushed || old->is_unflushed);
  const char *why = compare_image (image, new, may_be_marked, exact), *why_old;
  char *saved = NULL;

  if (h->wrong != NULL)
    return;
  /* What has the new set has all that was written before. */
  if (why == NULL && !has_durable (h, durable, image, old) &&
      asprintf (&h->wrong, "stage %u: a write is lost", stage) == -1)
    abort ();
  if (why == NULL && under_way && h->is_change[n] &&
      compare_image (image, old, may_be_marked, exact) != NULL &&
      !has_durable (h, durable, image, new) && h->wrong == NULL &&
      asprintf (&h->wrong, "stage %u: a bitmap has lost the bits of a write "
                "that is lost", stage) == -1)
    abort ();
  if (why == NULL)
    return;
  saved = strdup (why);
  why_old = compare_image (image, old, may_be_marked, exact);
  /* While the first bitmap comes, or the last one goes, none is trusted. */
  if (why_old != NULL &&
      !(under_way && h->is_change[n] &&
        (!model_has_stored (old) || !model_has_stored (new)) &&
        get_be64 (image->p + AUTOCLEAR_OFFSET) == 0) &&
      asprintf (&h->wrong, "stage %u: new: %s, old: %s", stage, saved,
                why_old) == -1)
    abort ();
  free (saved);
}

static void
begin_stage (struct world *w, unsigned stage)
{
  if (w->beside != NULL)
    tracked_stage (tracked (w->beside), stage);
  else
    recorder_stage (w->c, stage);
}

/* *wrong: what a crash has left that it must not, or NULL. */
static unsigned long
run_history (bool keep, bool beside, uint64_t seed, char **wrong)
{
  struct history *h = calloc (1, sizeof *h);
  unsigned long nr_states;

  open_world (&h->w, keep, beside, seed);
  model_copy (&h->after[0], &h->w.model);
  while (h->nr < MAX_OPERATIONS) {
    const unsigned n = ++h->nr;

    begin_stage (&h->w, 2 * n - 1);
    switch (random_below (&h->w, 4)) {
    case 0:
      assert_int_equal (disk_sync (h->w.d), 0);
      model_flush (&h->w.model);
      break;
    case 1:
    case 2:
      h->is_change[n] = true;
      change (&h->w);
      break;
    default:
      write_block (&h->w, random_below (&h->w, NR_BLOCKS));
    }
    begin_stage (&h->w, 2 * n);
    model_copy (&h->after[n], &h->w.model);
  }
  recorder_judge (h->w.c, judge, h);
  nr_states = recorder_crash (h->w.c, 32, seed);
  for (unsigned i = 0; i <= h->nr; ++i)
    model_free (&h->after[i]);
  close_world (&h->w);
  *wrong = h->wrong;
  free (h);
  return nr_states;
}

static void
test_crash (void **state)
{
  const uint64_t rounds = how_often (12, 4, 4);
  unsigned long nr_states = 0;

  (void) state;
  for (uint64_t round = 0; round < rounds; ++round) {
    char *wrong;

    nr_states += run_history (round % 2, round % 4 >= 2, 1000 + round,
                              &wrong);
    if (wrong != NULL)
      fail_msg ("seed %" PRIu64 ": %s", 1000 + round, wrong);
  }
  print_message ("%lu states\n", nr_states);
  assert_true (nr_states > 100 * rounds);
}

/* Each operation of a change fails, once or all from there on.  The set is
 * the old one then, in RAM and, once writes succeed again, in the image.
 */
static bool
fail_at (bool keep, bool beside, unsigned n, bool for_ever, bool applied)
{
  static const char *const sources[] = { "a", "c" };
  struct disk_action actions[] = {
    { .type = DISK_BITMAP_MERGE, .name = "b", .sources = sources,
      .nr_sources = 2 },
    { .type = DISK_BITMAP_REMOVE, .name = "a" },
    { .type = DISK_BITMAP_ADD, .name = "a", .persistent = true,
      .has_granularity = true, .granularity = 4096 },
    { .type = DISK_BITMAP_ADD, .name = "d", .persistent = true,
      .has_granularity = true, .granularity = 512, .disabled = true },
    { .type = DISK_BACKUP_BEGIN, .name = "c", .view = true },
  };
  struct world w;
  bool failed;
  int r;

  open_world (&w, keep, beside, 1);
  write_block (&w, 3);
  assert_int_equal (disk_sync (w.d), 0);
  write_block (&w, 5);

  recorder_fail (w.c, n, for_ever, applied);
  messages_clear ();
  r = disk_change_bitmaps (w.d, "disk", actions,
                           sizeof actions / sizeof actions[0]);
  failed = recorder_failures (w.c) > 0;
  if (r == 0)
    for (size_t i = 0; i < sizeof actions / sizeof actions[0]; ++i)
      model_act (&w.model, &actions[i]);
  else
    assert_true (failed && messages_errors () > 0);
  check_ram (&w);
  /* If bitmaps could not be stored, the change goes on, and they are marked
   * in the new directory, too.
   */
  if (r == 0) {
    const struct bytes image = recorder_image (w.c);

    const char *why = compare_image (&image, &w.model, true, false);

    if (why != NULL)
      fail_msg ("after the change: %s", why);
  }
  recorder_stop_failing (w.c);

  /* A granule that is dirty in one of the two sets, and one that is new. */
  write_block (&w, 5);
  write_block (&w, 7);
  /* The first may fail, or, with the disk beside, not store them. */
  if (disk_sync (w.d) == -1 || beside)
    assert_int_equal (disk_sync (w.d), 0);
  assert_image (&w, !keep);
  check_ram (&w);
  /* It can be tried again. */
  if (r == -1) {
    assert_int_equal (disk_change_bitmaps (w.d, "disk", actions,
                                           sizeof actions / sizeof actions[0]),
                      0);
    for (size_t i = 0; i < sizeof actions / sizeof actions[0]; ++i)
      model_act (&w.model, &actions[i]);
    assert_image (&w, !keep);
  }
  write_block (&w, 9);
  disk_stop (w.d);              /* It may report the flush that failed. */
  assert_image (&w, true);
  image_check (w.c, 0);
  close_world (&w);
  return failed;
}

static void
test_errors (void **state)
{
  (void) state;
  for (unsigned i = 0; i < 12; ++i) {
    unsigned n = 0;

    while (fail_at (i & 1, i & 8, n, i & 2, i & 4))
      n++;
    assert_true (n > 8);
  }
}

/* Writers and flushes all the while. */
#define NR_WRITERS 3

/* What all of them write in the time of a change: the recorder keeps it, and
 * a scheduler need not be fair.
 */
#define NR_TURNS 300

struct writer {
  struct world *w;
  unsigned number;
  sem_t *turns;
  atomic_bool *stop;
  bool failed;
};

static void *
write_all_the_time (void *opaque)
{
  static const uint8_t data[BLOCK] = { 4, 5, 6 };
  struct writer *writer = opaque;
  uint64_t seed = writer->number;

  for (;;) {
    const uint64_t block = random_next (&seed) % NR_BLOCKS;

    sem_wait (writer->turns);
    if (atomic_load (writer->stop))
      return NULL;
    if (disk_write (writer->w->d, data, BLOCK, BLOCK_OFFSET (block),
                    random_next (&seed) % 8 == 0) == -1 ||
        (random_next (&seed) % 16 == 0 && disk_sync (writer->w->d) == -1))
      writer->failed = true;
    if (random_next (&seed) % 32 == 0)
      disk_tidy (writer->w->d, random_next (&seed) % 2);
  }
}

/* All blocks are written after the last change: so each bitmap that records
 * has at least these.
 */
static void
test_threads (void **state)
{
  const unsigned rounds = how_often (6, 2, 2);
  const unsigned nr_changes = how_often (100, 30, 5);

  (void) state;
  for (unsigned round = 0; round < rounds; ++round) {
    struct writer writers[NR_WRITERS];
    pthread_t threads[NR_WRITERS];
    atomic_bool stop;
    struct bytes image;
    struct world w;
    sem_t turns;

    open_world (&w, round % 2, round % 4 >= 2, 77 + round);
    atomic_init (&stop, false);
    sem_init (&turns, 0, 0);
    for (unsigned i = 0; i < NR_WRITERS; ++i) {
      writers[i] = (struct writer) {
        .w = &w, .number = i, .turns = &turns, .stop = &stop,
      };
      pthread_create (&threads[i], NULL, write_all_the_time, &writers[i]);
    }
    for (unsigned i = 0; i < nr_changes; ++i) {
      for (unsigned turn = 0; turn < NR_TURNS; ++turn)
        sem_post (&turns);
      change (&w);
    }
    atomic_store (&stop, true);
    for (unsigned i = 0; i < NR_WRITERS; ++i)
      sem_post (&turns);
    for (unsigned i = 0; i < NR_WRITERS; ++i) {
      pthread_join (threads[i], NULL);
      assert_false (writers[i].failed);
    }
    sem_destroy (&turns);
    /* Only what comes from here on is in the model. */
    for (unsigned i = 0; i < NR_NAMES; ++i) {
      memset (w.model.bitmaps[i].bits, 0, NR_BITS);
      memset (w.model.bitmaps[i].since, 0, NR_BITS);
    }
    for (unsigned i = 0; i < NR_BLOCKS; ++i)
      write_block (&w, i);
    assert_int_equal (disk_stop (w.d), 0);
    image = recorder_image (w.c);
    assert_null (compare_image (&image, &w.model, false, false));
    image_check (w.c, 1);
    close_world (&w);
  }
}

static void
ignore_numbers (const struct disk_bitmap_numbers *n, void *opaque)
{
  (void) n;
  (void) opaque;
}

struct reader {
  struct disk *d;
  sem_t started;
  atomic_bool stop;
};

static void *
read_all_the_time (void *opaque)
{
  struct reader *r = opaque;

  do {
    disk_each_bitmap (r->d, ignore_numbers, NULL);
    sem_post (&r->started);
  } while (!atomic_load (&r->stop));
  return NULL;
}

/* A bitmap that clients are offered begins to record, while its numbers are
 * read: they are of before that, or of after it.
 */
static void
test_numbers (void **state)
{
  const unsigned rounds = how_often (40, 20, 4);

  (void) state;
  for (unsigned round = 0; round < rounds; ++round) {
    struct reader r;
    pthread_t thread;
    struct world w;

    open_world (&w, true, false, 1);
    r.d = w.d;
    sem_init (&r.started, 0, 0);
    atomic_init (&r.stop, false);
    pthread_create (&thread, NULL, read_all_the_time, &r);
    sem_wait (&r.started);
    assert_int_equal (disk_change_bitmaps (w.d, "disk",
                        &(struct disk_action) { .type = DISK_BITMAP_ENABLE,
                                                .name = "b" }, 1), 0);
    atomic_store (&r.stop, true);
    pthread_join (thread, NULL);
    sem_destroy (&r.started);
    w.model.bitmaps[1].enabled = true;
    write_block (&w, 3);
    check_ram (&w);
    stop_and_check (&w);
    close_world (&w);
  }
}

static void
assert_refused (struct world *w, struct disk_action *a, const char *why)
{
  const unsigned writes = recorder_writes (w->c);

  messages_clear ();
  assert_int_equal (disk_change_bitmaps (w->d, "disk", a, 1), -1);
  assert_message (why);
  assert_int_equal (messages_errors (), 1);
  assert_int_equal (recorder_writes (w->c), writes);
  check_ram (w);
}

#define ADD(...) (&(struct disk_action) { .type = DISK_BITMAP_ADD, __VA_ARGS__ })
#define TO(what, ...) \
  (&(struct disk_action) { .type = DISK_BITMAP_##what, __VA_ARGS__ })
#define BACKUP(what, ...) \
  (&(struct disk_action) { .type = DISK_BACKUP_##what, __VA_ARGS__ })

static void
test_refused (void **state)
{
  static const char *const nowhere[] = { "a", "nowhere" };
  char long_name[1025];
  struct world w;

  (void) state;
  memset (long_name, 'n', 1024);
  long_name[1024] = '\0';
  open_world (&w, false, false, 1);
  assert_refused (&w, ADD (.name = ""), "Bitmap name cannot be empty");
  assert_refused (&w, ADD (.name = "a", .persistent = true),
                  "Bitmap already exists: a");
  assert_refused (&w, ADD (.name = "a"), "Bitmap already exists: a");
  assert_refused (&w, ADD (.name = "n", .has_granularity = true,
                           .granularity = 0),
                  "Granularity must be power of 2 and at least 512");
  assert_refused (&w, ADD (.name = "n", .has_granularity = true,
                           .granularity = 256),
                  "Granularity must be power of 2 and at least 512");
  assert_refused (&w, ADD (.name = "n", .has_granularity = true,
                           .granularity = 1000),
                  "Granularity must be power of 2 and at least 512");
  assert_refused (&w, ADD (.name = long_name), "Bitmap name too long: nnn");
  assert_refused (&w, ADD (.name = long_name, .persistent = true),
                  "persistent in 'disk': Name length exceeds maximum");
  assert_refused (&w, TO (REMOVE, .name = "x"), "Dirty bitmap 'x' not found");
  assert_refused (&w, TO (CLEAR, .name = "x"), "Dirty bitmap 'x' not found");
  assert_refused (&w, TO (ENABLE, .name = "x"), "Dirty bitmap 'x' not found");
  assert_refused (&w, TO (DISABLE, .name = "x"), "Dirty bitmap 'x' not found");
  assert_refused (&w, TO (MERGE, .name = "x"), "Dirty bitmap 'x' not found");
  assert_refused (&w, TO (MERGE, .name = "b", .sources = nowhere,
                          .nr_sources = 2),
                  "Dirty bitmap 'nowhere' not found");

  assert_refused (&w, BACKUP (END, .name = "x"),
                  "There is no backup of bitmap 'x'");
  assert_refused (&w, BACKUP (END, .name = "a"),
                  "There is no backup of bitmap 'a'");
  assert_refused (&w, BACKUP (BEGIN, .name = "x"),
                  "Dirty bitmap 'x' not found");
  assert_refused (&w, BACKUP (BEGIN, .name = "b"),
                  "Bitmap 'b' is disabled and does not record");
  assert_int_equal (disk_change_bitmaps (w.d, "disk",
                                         BACKUP (BEGIN, .name = "a"), 1), 0);
  w.model.bitmaps[0].has_backup = true;
  /* Not even by force. */
  assert_refused (&w, BACKUP (BEGIN, .name = "a"), "in use by another");
  assert_refused (&w, TO (CLEAR, .name = "a", .force = true),
                  "in use by another");
  assert_refused (&w, TO (REMOVE, .name = "a", .force = true),
                  "in use by another");
  assert_refused (&w, TO (DISABLE, .name = "a", .force = true),
                  "in use by another");
  assert_refused (&w, TO (MERGE, .name = "b", .sources = nowhere,
                          .nr_sources = 1, .force = true),
                  "in use by another");
  close_world (&w);
}

static int
change_one (struct world *w, struct disk_action *a)
{
  messages_clear ();
  return disk_change_bitmaps (w->d, "disk", a, 1);
}

/* A barrier fails, and the next one succeeds: what was written before them
 * may be lost, though it reads back.
 */
static void
lose_barrier (struct world *w)
{
  write_block (w, 3);
  recorder_fail (w->c, 0, false, false);
  assert_int_equal (disk_sync (w->d), -1);
  assert_int_equal (recorder_failures (w->c), 1);
  recorder_stop_failing (w->c);
  assert_int_equal (disk_sync (w->d), 0);
  model_flush (&w->model);
}

/* Carry out an action, which succeeds. */
static void
act (struct world *w, struct disk_action *a)
{
  assert_int_equal (change_one (w, a), 0);
  model_act (&w->model, a);
  check_ram (w);
}

/* What a backup has copied may be lost on the disk: its bitmap keeps the
 * bits (I11).
 */
static void
test_lost_barrier (void **state)
{
  struct disk_action *const success =
    BACKUP (END, .name = "a", .success = true, .clear = true);
  struct disk_action *const ends[] = {
    BACKUP (END, .name = "a"),
    BACKUP (END, .name = "a", .success = true),
  };

  (void) state;
  for (unsigned i = 0; i < 4; ++i) {
    struct disk_action *const end = ends[i / 2];
    struct world w;

    open_world (&w, i % 2, false, 1);
    write_block (&w, 3);
    assert_int_equal (disk_sync (w.d), 0);
    model_flush (&w.model);

    act (&w, BACKUP (BEGIN, .name = "a", .view = i % 2));
    lose_barrier (&w);
    for (unsigned times = 0; times < 2; ++times) {
      assert_int_equal (change_one (&w, success), -1);
      assert_int_equal (errno, EIO);
      assert_message ("A flush has failed since the backup of bitmap 'a'");
      assert_int_equal (messages_errors (), 1);
      check_ram (&w);
      assert_image (&w, !w.keep);
    }
    act (&w, end);
    assert_image (&w, !w.keep);

    /* One that begins after the loss can succeed. */
    act (&w, BACKUP (BEGIN, .name = "a"));
    write_block (&w, 5);
    act (&w, success);
    disk_stop (w.d);            /* It reports the flush that failed. */
    assert_image (&w, true);
    image_check (w.c, 1);
    close_world (&w);
  }
}

#ifdef BROKEN_ORDER
int broken_order = -1;

/* What a crash in some history leaves, by a process of its own: images that
 * are broken end it in any way.
 */
enum { ALL_WELL, WRONG = 40, THIS_IS_WRONG };

static int
run_broken (enum order_rule rule, const char *symptom, bool beside,
            uint64_t seed)
{
  const pid_t pid = fork ();
  char *wrong;
  int status;

  assert_true (pid != -1);
  if (pid == 0) {
    if (freopen ("/dev/null", "w", stdout) == NULL ||
        freopen ("/dev/null", "w", stderr) == NULL)
      _exit (EXIT_FAILURE);
    broken_order = rule;
    run_history (seed % 2, beside, seed, &wrong);
    _exit (wrong == NULL ? ALL_WELL
           : strstr (wrong, symptom) != NULL ? THIS_IS_WRONG : WRONG);
  }
  assert_int_equal (waitpid (pid, &status, 0), pid);
  return WIFEXITED (status) ? WEXITSTATUS (status) : -1;
}

static void
assert_caught (enum order_rule rule, const char *symptom, bool beside)
{
  for (uint64_t seed = 0; seed < 60; ++seed)
    if (run_broken (rule, symptom, beside, seed) == THIS_IS_WRONG) {
      print_message ("rule %d, %s: seed %" PRIu64 "\n", (int) rule, symptom,
                     seed);
      return;
    }
  fail_msg ("rule %d is not caught: %s", (int) rule, symptom);
}

static void
test_order (void **state)
{
  (void) state;
  for (unsigned beside = 0; beside <= 1; ++beside) {
    assert_caught (ORDER_DIRECTORY_BEFORE_HEADER, "it is absent", beside);
    assert_caught (ORDER_MARK_BEFORE_CHANGE, "lacks bit", beside);
  }
}
#endif

int
main (void)
{
  const struct CMUnitTest tests[] = {
    cmocka_unit_test (test_refused),
    cmocka_unit_test (test_random),
    cmocka_unit_test (test_errors),
    cmocka_unit_test (test_lost_barrier),
    cmocka_unit_test (test_crash),
    cmocka_unit_test (test_threads),
    cmocka_unit_test (test_numbers),
  };
#ifdef BROKEN_ORDER
  const struct CMUnitTest order_tests[] = { cmocka_unit_test (test_order) };

  (void) tests;
  messages_install ();
  return cmocka_run_group_tests (order_tests, NULL, NULL);
#else

  messages_install ();
  return cmocka_run_group_tests (tests, NULL, NULL);
#endif
}
