/* nbdkit-dirty-bitmap-filter
 * SPDX-License-Identifier: BSD-3-Clause
 * Copyright the nbdkit-dirty-bitmap-filter authors
 */

/* Views: whatever is done with the disk, from however many threads, a view
 * shows the disk and the bitmap of the moment when its backup began (I14); and
 * whatever happens to a view, the disk goes on (I16).  So it is, too, if the
 * disk is beside the image, which has only the bitmaps.
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
#include <time.h>

#include <cmocka.h>

#include "bitmap-image.h"
#include "common/bytes.h"
#include "common/report.h"
#include "container/container.h"
#include "disk/change.h"
#include "disk/disk.h"
#include "image.h"

#define MIB (UINT64_C (1) << 20)

/* Not a multiple of a unit, nor of a cluster. */
#define SIZE (4 * MIB + 1536)
#define LIMIT (64 * MIB)
#define GRANULE 4096
#define NR_GRANULES ((SIZE + GRANULE - 1) / GRANULE)

static const char *const bitmaps[] = { "a", "b" };
#define NR_BITMAPS 2

/* A container over another, of which reads can be made to fail, and some
 * writes slow.
 */
struct shaky {
  struct container c;
  struct container *inner;
  atomic_bool fails, is_slow;
  atomic_uint writes;
};

static struct shaky *
shaky (struct container *c)
{
  return (struct shaky *) c;
}

static int
shaky_pread (struct container *c, void *buf, size_t count, uint64_t offset)
{
  if (atomic_load (&shaky (c)->fails)) {
    errno = EIO;
    return -1;
  }
  return container_pread (shaky (c)->inner, buf, count, offset);
}

static int
shaky_pwrite (struct container *c, const void *buf, size_t count,
              uint64_t offset)
{
  const struct timespec pause = { .tv_nsec = 3000000 };

  if (atomic_load (&shaky (c)->is_slow) &&
      atomic_fetch_add (&shaky (c)->writes, 1) % 16 == 0)
    nanosleep (&pause, NULL);
  return container_pwrite (shaky (c)->inner, buf, count, offset);
}

static int
shaky_zero (struct container *c, uint64_t count, uint64_t offset, bool punch)
{
  return container_zero (shaky (c)->inner, count, offset, punch);
}

static int
shaky_flush (struct container *c)
{
  return container_flush (shaky (c)->inner);
}

static int
shaky_grow (struct container *c, uint64_t size)
{
  if (container_reserve (shaky (c)->inner, size) == -1)
    return -1;
  atomic_store (&c->size, size);
  return 0;
}

static int
shaky_truncate (struct container *c, uint64_t size)
{
  atomic_store (&c->size, size);
  return container_truncate (shaky (c)->inner, size);
}

static void
shaky_close (struct container *c)
{
  container_close (shaky (c)->inner);
  free (c);
}

static const struct container_ops shaky_ops = {
  .pread = shaky_pread,
  .pwrite = shaky_pwrite,
  .zero = shaky_zero,
  .flush = shaky_flush,
  .grow = shaky_grow,
  .truncate = shaky_truncate,
  .close = shaky_close,
};

/* Is the disk beside the image, in all that is opened? */
static bool is_beside;

/* A disk, and what it shall read as. */
struct world {
  struct container *c;          /* that has its data, shaky */
  struct container *image;      /* not shaky */
  struct disk *d;
  uint64_t seed;
  uint8_t *data;                /* SIZE bytes */
  uint8_t dirty[NR_GRANULES];   /* since the image was made */
};

/* What a view shall show. */
struct moment {
  uint8_t *data;
  uint8_t dirty[NR_GRANULES];
  struct disk_view *view;
};

static uint64_t
random_below (struct world *w, uint64_t n)
{
  return random_next (&w->seed) % n;
}

static void
open_disk (struct world *w, const char *options, struct disk_options *o)
{
  struct shaky *s = calloc (1, sizeof *s);
  char size[32];

  *w = (struct world) { .seed = w->seed };
  snprintf (size, sizeof size, "%" PRIu64, SIZE);
  w->image = image_create (options, size, LIMIT);
  s->inner = w->image;
  if (is_beside) {
    s->inner = container_open_memory (SIZE);
    assert_int_equal (container_reserve (s->inner, SIZE), 0);
    o->is_beside = true;
    o->beside = &s->c;
  }
  container_init (&s->c, &shaky_ops, container_size (s->inner), false);
  w->c = &s->c;
  o->require = bitmaps;
  o->nr_require = NR_BITMAPS;
  o->granularity = GRANULE;
  w->d = disk_open (is_beside ? w->image : w->c, o);
  assert_non_null (w->d);
  w->data = calloc (1, SIZE);
}

static void
open_world (struct world *w, const char *options)
{
  struct disk_options o = { .scratch = temp_folder () };

  open_disk (w, options, &o);
}

static void
close_world (struct world *w)
{
  assert_int_equal (disk_stop (w->d), 0);
  image_check (w->image, 1);
  disk_close (w->d);
  if (is_beside)
    container_close (w->c);
  free (w->data);
}

static int
begin (struct world *w, const char *name)
{
  struct disk_action a = {
    .type = DISK_BACKUP_BEGIN, .name = name, .view = true,
  };

  return disk_change_bitmaps (w->d, "disk", &a, 1);
}

static int
end (struct world *w, const char *name, bool success)
{
  struct disk_action a = {
    .type = DISK_BACKUP_END, .name = name, .success = success,
    .clear = success,
  };

  return disk_change_bitmaps (w->d, "disk", &a, 1);
}

/* What a bitmap has, a byte a granule. */
static void
read_dirty (const struct disk_offer *o, uint8_t *dirty)
{
  uint64_t offset = 0;

  while (offset < SIZE) {
    bool is_dirty;
    const uint64_t n = disk_bitmap_run (o, offset, SIZE, &is_dirty);

    assert_true (n > 0);
    memset (&dirty[offset / GRANULE], is_dirty,
            div_round_up (offset + n, GRANULE) - offset / GRANULE);
    offset += n;
  }
}

static void
take_view (struct world *w, const char *name, struct moment *m)
{
  m->view = disk_find_view (w->d, name, strlen (name));
  assert_non_null (m->view);
  assert_string_equal (disk_view_name (m->view), name);
}

static void
drop_moment (struct moment *m)
{
  disk_view_put (m->view);
  free (m->data);
  *m = (struct moment) { .view = NULL };
}

/* The view has the bitmap of its moment. */
static void
check_bitmap (const struct moment *m)
{
  struct disk_offers *list = disk_view_offers (m->view);
  uint8_t dirty[NR_GRANULES];

  assert_int_equal (disk_offers_nr (list), 1);
  assert_string_equal (disk_bitmap_name (disk_offers_at (list, 0)),
                       disk_view_name (m->view));
  read_dirty (disk_offers_at (list, 0), dirty);
  assert_memory_equal (dirty, m->dirty, NR_GRANULES);
  disk_offers_put (list);
}

static bool
is_zero (const uint8_t *p, uint64_t count)
{
  return p[0] == 0 && memcmp (p, p + 1, count - 1) == 0;
}

static void
check_extent (const struct moment *m, uint64_t offset)
{
  uint64_t length;
  uint32_t flags;

  assert_int_equal (disk_view_extent (m->view, offset, SIZE, &length, &flags),
                    0);
  assert_true (length > 0 && length <= SIZE - offset);
  if (flags & DISK_EXTENT_ZERO)
    assert_true (is_zero (&m->data[offset], length));
}

/* Some piece of the view is that of its moment, however it is read. */
static void
check_piece (uint64_t *seed, const struct moment *m)
{
  static _Thread_local uint8_t buf[MIB];
  const uint64_t offset = random_next (seed) % SIZE;
  const uint64_t count =
    1 + random_next (seed) % min_u64 (sizeof buf, SIZE - offset);
  const unsigned nr_extents = 20;
  struct qcow2_chunk c = {
    .buf = random_next (seed) % 8 == 0 ? NULL : buf,
    .count = count,
    .limit = count + random_next (seed) % (SIZE - offset - count + 1),
    .min_hole = random_next (seed) % 4 == 0 ? UINT64_MAX
      : UINT64_C (512) << random_next (seed) % 10,
  };

  assert_int_equal (disk_view_read_chunk (m->view, offset, &c), 0);
  if (c.is_hole) {
    assert_true (c.length > 0 && c.length <= c.limit);
    assert_true (c.length >= c.min_hole || c.length == c.limit);
    assert_true (is_zero (&m->data[offset], c.length));
  }
  else if (c.buf != NULL) {
    assert_true (c.length > 0 && c.length <= c.count);
    assert_memory_equal (buf, &m->data[offset], c.length);
  }
  assert_int_equal (disk_view_read (m->view, buf, count, offset), 0);
  assert_memory_equal (buf, &m->data[offset], count);

  for (unsigned i = 0; i < nr_extents; ++i)
    check_extent (m, random_next (seed) % SIZE);
}

static void
check_all (const struct moment *m)
{
  uint8_t *buf = malloc (SIZE);

  assert_int_equal (disk_view_read (m->view, buf, SIZE, 0), 0);
  assert_memory_equal (buf, m->data, SIZE);
  free (buf);
  check_bitmap (m);
}

static void
assert_gone (const struct moment *m, const char *why)
{
  struct qcow2_chunk c = { .count = 1, .limit = 1, .min_hole = 1 };
  uint64_t length;
  uint32_t flags;
  uint8_t byte;

  messages_clear ();
  assert_int_equal (disk_view_read (m->view, &byte, 1, 0), -1);
  assert_int_equal (errno, EIO);
  assert_message (why);
  assert_int_equal (disk_view_read_chunk (m->view, 0, &c), -1);
  assert_int_equal (errno, EIO);
  assert_int_equal (disk_view_extent (m->view, 0, SIZE, &length, &flags), -1);
  assert_int_equal (errno, EIO);
}

/* A random change of the disk.  Where it is made in the model, too, no other
 * thread changes the disk.
 */
static int
change_somewhere (struct disk *d, uint64_t *seed, uint8_t *data,
                  uint8_t *dirty)
{
  static _Thread_local uint8_t buf[300000];
  const uint64_t offset = random_next (seed) % SIZE;
  const uint64_t count =
    1 + random_next (seed) % min_u64 (random_next (seed) % 2 ? 4096
                                      : sizeof buf, SIZE - offset);
  const unsigned kind = random_next (seed) % 8;
  int r;

  if (kind == 0)
    r = disk_trim (d, count, offset, false);
  else if (kind < 3)
    r = disk_zero (d, count, offset, kind == 1, false, false);
  else {
    memset (buf, 1 + random_next (seed) % 255, count);
    r = disk_write (d, buf, count, offset, random_next (seed) % 16 == 0);
  }
  if (r == -1 || data == NULL)
    return r;
  /* Only whole clusters are trimmed. */
  if (kind == 0)
    assert_int_equal (disk_read (d, &data[offset], count, offset), 0);
  else if (kind < 3)
    memset (&data[offset], 0, count);
  else
    memcpy (&data[offset], buf, count);
  for (uint64_t i = offset / GRANULE; i <= (offset + count - 1) / GRANULE; ++i)
    dirty[i] = 1;
  return r;
}

static void
begin_here (struct world *w, unsigned i, struct moment *m,
            const uint8_t *dirty)
{
  assert_int_equal (begin (w, bitmaps[i]), 0);
  take_view (w, bitmaps[i], m);
  m->data = memcpy (malloc (SIZE), w->data, SIZE);
  memcpy (m->dirty, dirty, NR_GRANULES);
}

/* Two views, which begin and end at any time. */
static void
random_steps (const char *options, uint64_t seed)
{
  struct world w = { .seed = seed };
  struct moment m[NR_BITMAPS] = { 0 };
  uint8_t dirty[NR_BITMAPS][NR_GRANULES] = { 0 };

  open_world (&w, options);
  for (unsigned step = 0; step < 150; ++step) {
    const unsigned i = random_below (&w, NR_BITMAPS);

    if (random_below (&w, 12) > 0) {
      assert_int_equal (change_somewhere (w.d, &w.seed, w.data, w.dirty), 0);
      for (unsigned j = 0; j < NR_BITMAPS; ++j)
        for (unsigned k = 0; k < NR_GRANULES; ++k)
          dirty[j][k] |= w.dirty[k];
      memset (w.dirty, 0, sizeof w.dirty);
    }
    else if (m[i].view == NULL) {
      begin_here (&w, i, &m[i], dirty[i]);
      memset (dirty[i], 0, NR_GRANULES);
    }
    else {
      const bool success = random_below (&w, 2);

      check_all (&m[i]);
      assert_int_equal (end (&w, bitmaps[i], success), 0);
      assert_null (disk_find_view (w.d, bitmaps[i], 1));
      assert_gone (&m[i], "has ended");
      if (!success)
        for (unsigned k = 0; k < NR_GRANULES; ++k)
          dirty[i][k] |= m[i].dirty[k];
      drop_moment (&m[i]);
    }
    for (unsigned j = 0; j < NR_BITMAPS; ++j)
      if (m[j].view != NULL)
        for (unsigned k = 0; k < 3; ++k)
          check_piece (&w.seed, &m[j]);
  }
  for (unsigned i = 0; i < NR_BITMAPS; ++i)
    if (m[i].view != NULL) {
      check_all (&m[i]);
      drop_moment (&m[i]);
    }
  close_world (&w);
}

static void
test_moment (void **state)
{
  static const char *const options[] = {
    "-o cluster_size=64k", "-o cluster_size=512", "-o cluster_size=2M",
    "-o cluster_size=64k,extended_l2=on", "-o preallocation=metadata",
  };

  /* The image's clusters matter little if they have only bitmaps. */
  const unsigned nr = is_beside ? 2 : sizeof options / sizeof options[0];

  (void) state;
  for (unsigned i = 0; i < nr; ++i)
    for (unsigned round = 0; round < how_often (8, 2, 1); ++round)
      random_steps (options[i], 100 * i + round);
}

/* Writers, and readers of the view, at once. */
#define NR_WRITERS 8
#define NR_READERS 3
#define NR_TURNS 200

struct worker {
  struct world *w;
  const struct moment *m;       /* of readers */
  sem_t *turns;                 /* of writers */
  atomic_bool *stop;
  uint64_t seed;
  bool failed;
};

static void *
write_on (void *opaque)
{
  struct worker *me = opaque;

  for (;;) {
    sem_wait (me->turns);
    if (atomic_load (me->stop))
      return NULL;
    if (change_somewhere (me->w->d, &me->seed, NULL, NULL) == -1)
      me->failed = true;
  }
}

static void *
read_on (void *opaque)
{
  struct worker *me = opaque;

  while (!atomic_load (me->stop))
    check_piece (&me->seed, me->m);
  return NULL;
}

/* Begin at any moment: what the view shows first it shows for ever. */
static void
begin_at_once (struct world *w, struct moment *m)
{
  struct disk_offers *list;

  assert_int_equal (begin (w, "a"), 0);
  take_view (w, "a", m);
  m->data = malloc (SIZE);
  assert_int_equal (disk_view_read (m->view, m->data, SIZE, 0), 0);
  list = disk_view_offers (m->view);
  read_dirty (disk_offers_at (list, 0), m->dirty);
  disk_offers_put (list);
}

/* Begin with the gate closed, and so know what the disk is. */
static void
begin_among_writers (struct world *w, struct moment *m)
{
  struct disk_offer *o = disk_find_offer (w->d, "a", 1);

  assert_int_equal (disk_close_gate (w->d), 0);
  m->data = malloc (SIZE);
  assert_int_equal (disk_read (w->d, m->data, SIZE, 0), 0);
  read_dirty (o, m->dirty);
  disk_offer_put (o);
  assert_int_equal (begin (w, "a"), 0);
  disk_open_gate (w->d);
  take_view (w, "a", m);
}

static void
one_view_among_threads (struct world *w, sem_t *turns, unsigned round)
{
  struct worker readers[NR_READERS];
  pthread_t threads[NR_READERS];
  struct moment m;
  atomic_bool stop;

  for (unsigned i = 0; i < NR_TURNS; ++i)
    sem_post (turns);
  if (round % 2 == 0)
    begin_at_once (w, &m);
  else
    begin_among_writers (w, &m);
  atomic_init (&stop, false);
  for (unsigned i = 0; i < NR_READERS; ++i) {
    readers[i] = (struct worker) {
      .w = w, .m = &m, .stop = &stop, .seed = random_next (&w->seed),
    };
    pthread_create (&threads[i], NULL, read_on, &readers[i]);
  }
  for (unsigned i = 0; i < NR_TURNS; ++i)
    sem_post (turns);
  check_all (&m);
  /* Until the writers have done most of it. */
  for (int left = NR_TURNS; left > NR_TURNS / 4; sem_getvalue (turns, &left))
    check_piece (&w->seed, &m);
  check_all (&m);
  atomic_store (&stop, true);
  for (unsigned i = 0; i < NR_READERS; ++i)
    pthread_join (threads[i], NULL);
  assert_int_equal (end (w, "a", round % 3 > 0), 0);
  drop_moment (&m);
}

static void
test_threads (void **state)
{
  struct world w = { .seed = 5 };
  struct worker writers[NR_WRITERS];
  pthread_t threads[NR_WRITERS];
  atomic_bool stop;
  sem_t turns;

  (void) state;
  open_world (&w, "-o cluster_size=16k");
  atomic_store (&shaky (w.c)->is_slow, true);
  atomic_init (&stop, false);
  sem_init (&turns, 0, 0);
  for (unsigned i = 0; i < NR_WRITERS; ++i) {
    writers[i] = (struct worker) {
      .w = &w, .turns = &turns, .stop = &stop, .seed = i,
    };
    pthread_create (&threads[i], NULL, write_on, &writers[i]);
  }
  for (unsigned round = 0; round < how_often (40, 6, 2); ++round)
    one_view_among_threads (&w, &turns, round);
  atomic_store (&stop, true);
  for (unsigned i = 0; i < NR_WRITERS; ++i)
    sem_post (&turns);
  for (unsigned i = 0; i < NR_WRITERS; ++i) {
    pthread_join (threads[i], NULL);
    assert_false (writers[i].failed);
  }
  sem_destroy (&turns);
  close_world (&w);
}

/* A view that breaks: changes of the disk go on, and success is refused. */
static void
break_by_changes (struct world *w, const char *why)
{
  struct moment m = { 0 };
  uint64_t seed = 9;

  messages_clear ();
  begin_here (w, 0, &m, w->dirty);
  for (unsigned i = 0; i < 200; ++i)
    assert_int_equal (change_somewhere (w->d, &seed, w->data, w->dirty), 0);
  assert_message (why);
  assert_int_equal (messages_warnings (), 1);
  assert_gone (&m, why);
  messages_clear ();
  assert_int_equal (end (w, "a", true), -1);
  assert_message ("The view of bitmap 'a' is broken");
  assert_message (why);
  assert_gone (&m, why);
  assert_int_equal (end (w, "a", false), 0);
  drop_moment (&m);
}

static void
test_scratch_full (void **state)
{
  struct disk_options o = {
    .scratch = temp_folder (), .scratch_max = 200000,
  };
  struct world w = { .seed = 1 };
  uint64_t seed = 7;

  (void) state;
  open_disk (&w, "", &o);
  for (unsigned i = 0; i < 100; ++i)
    assert_int_equal (change_somewhere (w.d, &seed, w.data, w.dirty), 0);
  break_by_changes (&w, "would keep more than 200000 bytes");
  close_world (&w);
}

static void
test_memory (void **state)
{
  struct disk_options o = {
    .scratch = temp_folder (), .view_memory = 4000,
  };
  struct world w = { .seed = 1 };

  (void) state;
  open_disk (&w, "", &o);
  break_by_changes (&w, "would take more than 4000 bytes of memory");
  close_world (&w);

  o.view_memory = 7;
  open_disk (&w, "", &o);
  messages_clear ();
  assert_int_equal (begin (&w, "a"), -1);
  assert_message ("would take more than 7 bytes of memory");
  assert_null (disk_find_view (w.d, "a", 1));
  close_world (&w);
}

static void
test_no_scratch (void **state)
{
  struct disk_options o = { .scratch = NULL };
  struct world w = { .seed = 1 };

  (void) state;
  open_disk (&w, "", &o);
  messages_clear ();
  assert_int_equal (begin (&w, "a"), -1);
  assert_message ("no folder");
  close_world (&w);

  o.scratch = "/nonexistent";
  open_disk (&w, "", &o);
  messages_clear ();
  assert_int_equal (begin (&w, "a"), -1);
  assert_message ("cannot make a scratch file for a view in /nonexistent");
  /* There is no backup either. */
  assert_int_equal (end (&w, "a", false), -1);
  assert_message ("There is no backup of bitmap 'a'");
  close_world (&w);
}

/* The old bytes cannot be read: a write that does not need them goes on. */
static void
test_unreadable (void **state)
{
  static const uint8_t cluster[65536] = { 1 };
  struct world w = { .seed = 1 };
  struct moment m = { 0 };

  (void) state;
  open_world (&w, "");
  assert_int_equal (disk_write (w.d, cluster, sizeof cluster, 0, false), 0);
  assert_int_equal (disk_sync (w.d), 0);
  begin_here (&w, 0, &m, w.dirty);
  atomic_store (&shaky (w.c)->fails, true);
  messages_clear ();
  assert_int_equal (disk_write (w.d, cluster, sizeof cluster, 0, false), 0);
  assert_int_equal (messages_warnings (), 1);
  assert_int_equal (messages_errors (), 0);
  atomic_store (&shaky (w.c)->fails, false);
  assert_gone (&m, "is broken");
  assert_int_equal (end (&w, "a", true), -1);
  assert_int_equal (end (&w, "a", false), 0);
  drop_moment (&m);
  close_world (&w);
}

#define assert_einval(call)                     \
  do {                                          \
    messages_clear ();                          \
    errno = 0;                                  \
    assert_int_equal (call, -1);                \
    assert_int_equal (errno, EINVAL);           \
    assert_int_equal (messages_errors (), 1);   \
  } while (0)

static void
check_hole (struct moment *m, uint64_t offset, uint64_t limit, uint64_t end)
{
  uint64_t length;
  uint32_t flags;

  assert_int_equal (disk_view_extent (m->view, offset, limit, &length, &flags),
                    0);
  assert_int_equal (flags, DISK_EXTENT_HOLE | DISK_EXTENT_ZERO);
  assert_int_equal (length, end - offset);
}

/* An extent goes as far as it can, until something was kept. */
static void
test_long_extents (void **state)
{
  static const uint8_t byte = 1;
  struct world w = { .seed = 1 };
  struct moment m = { 0 };

  (void) state;
  open_world (&w, "");
  begin_here (&w, 0, &m, w.dirty);
  check_hole (&m, 0, SIZE, SIZE);
  check_hole (&m, 7, SIZE, SIZE);
  check_hole (&m, 0, MIB, MIB);
  check_hole (&m, 512, MIB + 513, MIB + 513);
  assert_int_equal (disk_write (w.d, &byte, 1, 3 * MIB + 7, false), 0);
  check_hole (&m, 0, SIZE, 3 * MIB);
  check_hole (&m, 3 * MIB, SIZE, 3 * MIB + 65536);
  check_hole (&m, 3 * MIB + 65536, SIZE, SIZE);
  assert_int_equal (end (&w, "a", false), 0);
  drop_moment (&m);
  close_world (&w);
}

/* What is not a range of the disk is refused, with the reason, by the disk, a
 * view of it, and its delta.
 */
static void
test_range (void **state)
{
  struct qcow2_chunk c = { .count = 1, .limit = 2, .min_hole = 1 };
  struct world w = { .seed = 1 };
  struct moment m = { 0 };
  struct disk_offer *o;
  uint64_t length;
  uint32_t flags;
  uint8_t buf[2];

  (void) state;
  open_world (&w, "");
  begin_here (&w, 0, &m, w.dirty);
  o = disk_find_offer (w.d, "a", 1);
  assert_einval (disk_read (w.d, buf, 2, SIZE - 1));
  assert_einval (disk_view_read (m.view, buf, 2, SIZE - 1));
  assert_einval (disk_delta_read (w.d, o, buf, 2, SIZE - 1));
  assert_einval (disk_read_chunk (w.d, SIZE - 1, &c));
  assert_einval (disk_view_read_chunk (m.view, SIZE - 1, &c));
  assert_einval (disk_delta_read_chunk (w.d, o, SIZE - 1, &c));
  for (uint64_t limit = 7; limit <= SIZE + 1; limit += SIZE - 6) {
    assert_einval (disk_extent (w.d, 7, limit, &length, &flags));
    assert_einval (disk_view_extent (m.view, 7, limit, &length, &flags));
    assert_einval (disk_delta_extent (w.d, o, 7, limit, &length, &flags));
  }
  disk_offer_put (o);
  assert_int_equal (end (&w, "a", false), 0);
  drop_moment (&m);
  close_world (&w);
}

/* The linker puts these two in between: they zero the first unit of the disk
 * between the moment when a view finds that it is not kept, and the moment
 * when it asks the disk.
 */
static _Thread_local struct disk *to_zero;

extern int __real_disk_extent (struct disk *, uint64_t, uint64_t, uint64_t *,
                               uint32_t *);
extern int __wrap_disk_extent (struct disk *, uint64_t, uint64_t, uint64_t *,
                               uint32_t *);
extern int __real_disk_read_chunk (struct disk *, uint64_t,
                                   struct qcow2_chunk *);
extern int __wrap_disk_read_chunk (struct disk *, uint64_t,
                                   struct qcow2_chunk *);

static void
zero_first_unit (void)
{
  struct disk *d = to_zero;

  to_zero = NULL;
  if (d != NULL)
    assert_int_equal (disk_zero (d, 65536, 0, false, false, false), 0);
}

int
__wrap_disk_extent (struct disk *d, uint64_t offset, uint64_t limit,
                    uint64_t *length, uint32_t *flags)
{
  zero_first_unit ();
  return __real_disk_extent (d, offset, limit, length, flags);
}

int
__wrap_disk_read_chunk (struct disk *d, uint64_t offset,
                        struct qcow2_chunk *c)
{
  zero_first_unit ();
  return __real_disk_read_chunk (d, offset, c);
}

static void
test_changed_meanwhile (void **state)
{
  static const uint8_t data[2 * 65536] = { 1, 2, 3 };
  struct world w = { .seed = 1 };
  struct moment m = { 0 };
  uint8_t buf[sizeof data];
  uint64_t length;
  uint32_t flags;

  (void) state;
  open_world (&w, "");
  assert_int_equal (disk_write (w.d, data, sizeof data, 0, false), 0);
  memset (w.dirty, 1, sizeof data / GRANULE);
  for (unsigned round = 0; round < 2; ++round) {
    begin_here (&w, 0, &m, w.dirty);
    memset (w.dirty, 0, sizeof w.dirty);
    to_zero = w.d;
    if (round == 0) {
      assert_int_equal (disk_view_extent (m.view, 0, SIZE, &length, &flags),
                        0);
      assert_int_equal (flags, 0);
    }
    assert_int_equal (disk_view_read (m.view, buf, sizeof buf, 0), 0);
    assert_memory_equal (buf, data, sizeof buf);
    assert_null (to_zero);
    assert_int_equal (end (&w, "a", true), 0);
    drop_moment (&m);
    assert_int_equal (disk_write (w.d, data, sizeof data, 0, false), 0);
    memset (w.dirty, 1, sizeof data / GRANULE);
  }
  close_world (&w);
}

static void
note_state (const struct disk_view_state *v, void *opaque)
{
  struct disk_view_state *states = opaque;

  states[strcmp (v->name, "b") == 0] = *v;
}

static void
test_list (void **state)
{
  static const uint8_t byte[1] = { 1 };
  struct world w = { .seed = 1 };
  struct disk_view_state states[2] = { 0 };
  struct moment a = { 0 }, b = { 0 };

  (void) state;
  open_world (&w, "");
  disk_list_views (w.d, note_state, states);
  assert_null (states[0].name);
  assert_null (disk_find_view (w.d, "a", 1));
  assert_int_equal (disk_write (w.d, byte, 1, 0, false), 0);
  w.data[0] = w.dirty[0] = 1;
  begin_here (&w, 0, &a, w.dirty);
  begin_here (&w, 1, &b, w.dirty);
  assert_null (disk_find_view (w.d, "ab", 2));
  assert_null (disk_find_view (w.d, "", 0));
  disk_view_hold (b.view);
  assert_int_equal (disk_write (w.d, byte, 1, 5, false), 0);
  /* What reads as zeroes takes no room. */
  assert_int_equal (disk_write (w.d, byte, 1, 3 * MIB, false), 0);
  disk_list_views (w.d, note_state, states);
  for (unsigned i = 0; i < 2; ++i) {
    assert_int_equal (states[i].clients, i);
    assert_int_equal (states[i].kept_bytes, 65536);
    assert_null (states[i].broken);
  }
  disk_view_release (b.view);
  check_all (&a);
  check_all (&b);
  /* A backup is under way: there is no second one. */
  assert_int_equal (begin (&w, "a"), -1);
  check_all (&a);
  assert_int_equal (end (&w, "a", true), 0);
  check_all (&b);
  drop_moment (&a);
  drop_moment (&b);
  close_world (&w);
}

/* A view of a bitmap that the backup makes: all of it is dirty. */
static void
test_created (void **state)
{
  struct disk_action a[] = {
    { .type = DISK_BACKUP_BEGIN, .name = "a", .view = true },
    { .type = DISK_BACKUP_BEGIN, .name = "new", .view = true, .create = true,
      .has_granularity = true, .granularity = GRANULE },
    { .type = DISK_BACKUP_BEGIN, .name = "b" },
  };
  struct world w = { .seed = 1 };
  struct moment m = { 0 };

  (void) state;
  open_world (&w, "");
  assert_int_equal (disk_change_bitmaps (w.d, "disk", a, 3), 0);
  assert_null (disk_find_view (w.d, "b", 1));
  m.data = calloc (1, SIZE);
  take_view (&w, "a", &m);
  check_all (&m);
  disk_view_put (m.view);
  take_view (&w, "new", &m);
  memset (m.dirty, 1, sizeof m.dirty);
  check_all (&m);
  assert_int_equal (end (&w, "new", true), 0);
  drop_moment (&m);

  /* One that fails leaves no view of those before it. */
  assert_int_equal (end (&w, "a", false), 0);
  assert_int_equal (end (&w, "b", false), 0);
  a[1].name = "";
  assert_int_equal (disk_change_bitmaps (w.d, "disk", a, 3), -1);
  assert_null (disk_find_view (w.d, "a", 1));
  close_world (&w);
}

int
main (void)
{
  const struct CMUnitTest tests[] = {
    cmocka_unit_test (test_moment),
    cmocka_unit_test (test_threads),
    cmocka_unit_test (test_changed_meanwhile),
    cmocka_unit_test (test_scratch_full),
    cmocka_unit_test (test_memory),
    cmocka_unit_test (test_no_scratch),
    cmocka_unit_test (test_unreadable),
    cmocka_unit_test (test_long_extents),
    cmocka_unit_test (test_range),
    cmocka_unit_test (test_list),
    cmocka_unit_test (test_created),
  };

  const struct CMUnitTest beside_tests[] = {
    cmocka_unit_test (test_moment),
    cmocka_unit_test (test_threads),
    cmocka_unit_test (test_changed_meanwhile),
    cmocka_unit_test (test_unreadable),
  };
  int nr_failed;

  messages_install ();
  nr_failed = cmocka_run_group_tests (tests, NULL, NULL);
  is_beside = true;
  return nr_failed + cmocka_run_group_tests (beside_tests, NULL, NULL);
}
