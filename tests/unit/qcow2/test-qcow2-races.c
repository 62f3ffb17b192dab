/* nbdkit-dirty-bitmap-filter
 * SPDX-License-Identifier: BSD-3-Clause
 * Copyright the nbdkit-dirty-bitmap-filter authors
 */

/* The races that writers of qcow2 are known for.
 *
 * Two sequences of requests meet in all ways that interleave.h knows, on
 * clusters of 512 bytes and of 64 KiB that are in all states in which an
 * image can have them.  What may come of it is what any order of whole
 * requests gives, sector by sector.  Then the image is flushed and
 * checked, is cut off power at random moments and checked, is stopped
 * and checked for leaks, and must read the same when it is opened anew.
 */

#include <config.h>

#include <errno.h>
#include <inttypes.h>
#include <malloc.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include <cmocka.h>

#include "common/bytes.h"
#include "common/report.h"
#include "container/container.h"
#include "crash-check.h"
#include "crash-container.h"
#include "image.h"
#include "interleave.h"
#include "qcow2/qcow2.h"

#define SECTOR 512
#define CLUSTERS 8              /* that requests touch */
#define EIGHTHS (8 * CLUSTERS)
#define USED 4                  /* the first of them are in some state */
#define INITIAL 3               /* a byte of data */
#define ROOM (UINT64_C (4) << 20) /* of images, at most */
#define MANY 8                  /* clusters, for which the refcount table
                                   has to grow where few can be counted */
#define MAX_STEPS 6
#define CRASHES 3
#define BEFORE_GROWTH 4         /* clusters that can still be counted */

enum state {
  UNALLOCATED, ZERO, ZERO_ALLOCATED, DATA, COMPRESSED, SHARED,
  NR_ORDINARY,
  NO_ROOM = NR_ORDINARY,        /* as DATA, and every allocation makes the
                                   container grow */
  NO_REFCOUNTS,                 /* as DATA, and the next allocations make
                                   the refcount table grow */
  NR_STATES
};

static const char *const state_names[] = {
  "unallocated", "zero", "zero and allocated", "data", "compressed", "shared",
  "no room", "no refcounts",
};

static const unsigned sizes[] = { 512, 65536 };
#define NR_SIZES 2

/* Of large images, and of small ones, and half of that in a thorough run:
 * RACES_STRIDE in the environment, 1 for really all ways.  THREADS_ONLY leaves
 * out large ones, and crashes, which only one thread sees; with sanitizers most
 * large ones are, too.
 */
static unsigned stride = 10, small_stride = 4;
static bool threads_only;

/* Seconds in which two that do not wait for each other have met. */
#define ONE_MEETING 120

/* An image for each size and state, and its guest's bytes. */
static struct crash_image images[NR_SIZES][NR_STATES];

/* What a request does, to eighths of clusters. */
enum verb { END, WRITE, ZERO_IT, KEEP, TRIM, FLUSH, READ, ALLOCATE };

struct step {
  enum verb verb;
  unsigned from, to;            /* eighths */
};

struct sequence {
  const char *name;
  struct step steps[MAX_STEPS + 1];
};

/* One meeting of two sequences. */
struct scene {
  unsigned cluster_size;
  enum state state;
  const struct sequence *sequence[2];
  struct crash_log *log;
  struct container *c;
  struct qcow2 *q;
  uint8_t initial[EIGHTHS];     /* contents in the beginning */
  uint8_t *now;
  uint8_t *reads[2];            /* what the last READ of each has got */
  unsigned flushed[2];          /* steps before the last FLUSH of each */
  size_t flushed_at[2];         /* when it had ended */
  size_t allocated_at[2];       /* when the last ALLOCATE of each had */
  uint64_t seed;
};

static uint64_t
bytes_of (const struct scene *s)
{
  return (uint64_t) CLUSTERS * s->cluster_size;
}

/* What a step writes. */
static uint8_t
value_of (unsigned actor, unsigned step)
{
  return 0x10 + 0x80 * actor + step;
}

static void
fail_scene (const struct scene *s, int a, int b, const char *what)
{
  fail_msg ("%u bytes, %s: %s, stopped at %d, and %s, at %d: %s",
            s->cluster_size, state_names[s->state], s->sequence[0]->name, a,
            s->sequence[1]->name, b, what);
}

/* Clusters in one piece, as tables of bitmaps are, given back at once. */
static int
allocate_many (struct scene *s, unsigned actor)
{
  uint64_t host;

  if (qcow2_alloc (s->q, QCOW2_BITMAP_TABLE, MANY, &host, NULL) == -1)
    return -1;
  s->allocated_at[actor] = crash_log_note (s->log);
  qcow2_release (s->q, host, MANY);
  return 0;
}

static int
do_step (struct scene *s, unsigned actor, unsigned nr)
{
  const struct step *step = &s->sequence[actor]->steps[nr];
  const unsigned eighth = s->cluster_size / 8;
  const uint64_t offset = step->from * eighth;
  const uint64_t count = (step->to - step->from) * eighth;
  uint8_t *buf;
  int r;

  switch (step->verb) {
  case WRITE:
    buf = malloc (count);
    assert_non_null (buf);
    memset (buf, value_of (actor, nr), count);
    r = qcow2_write (s->q, buf, count, offset);
    free (buf);
    return r;
  case ZERO_IT: return qcow2_zero (s->q, count, offset, 0);
  case KEEP: return qcow2_zero (s->q, count, offset, QCOW2_ZERO_KEEP);
  case TRIM: return qcow2_trim (s->q, count, offset);
  case READ:
    return qcow2_read (s->q, s->reads[actor] + offset, count, offset);
  case ALLOCATE: return allocate_many (s, actor);
  default:
    r = qcow2_flush (s->q);
    s->flushed[actor] = nr;
    s->flushed_at[actor] = crash_log_note (s->log);
    return r;
  }
}

static void
act (struct scene *s, unsigned actor)
{
  for (unsigned i = 0; s->sequence[actor]->steps[i].verb != END; ++i)
    if (do_step (s, actor, i) == -1) {
      fprintf (stderr, "%s: step %u failed: %s\n", s->sequence[actor]->name,
               i, strerror (errno));
      abort ();
    }
}

static void
act_first (void *opaque)
{
  act (opaque, 0);
}

static void
act_second (void *opaque)
{
  act (opaque, 1);
}

/* Do to the eighths what a step does to the disk. */
static void
imagine_step (const struct scene *s, unsigned actor, unsigned nr,
              uint8_t eighths[EIGHTHS])
{
  const struct step *step = &s->sequence[actor]->steps[nr];
  unsigned from = step->from, to = step->to;
  uint8_t value = 0;

  switch (step->verb) {
  case WRITE:
    value = value_of (actor, nr);
    break;
  case TRIM:
    from = round_up (from, 8);
    to = round_down (to, 8);
    break;
  case ZERO_IT:
  case KEEP:
    break;
  default:
    return;
  }
  if (from < to)
    memset (eighths + from, value, to - from);
}

static unsigned
nr_steps (const struct scene *s, unsigned actor)
{
  unsigned n = 0;

  while (s->sequence[actor]->steps[n].verb != END)
    n++;
  return n;
}

/* Which sectors are as some order of whole steps has them, at a moment
 * when each has done at least some of its steps?
 */
struct orders {
  const struct scene *s;
  const int *got;               /* by piece, -1 if its bytes differ */
  bool *fine;                   /* by sector */
  unsigned piece;               /* bytes: an eighth, or a sector */
  uint64_t from, to;
  const unsigned *done;         /* steps of each */
};

static void
compare (const struct orders *o, const uint8_t eighths[EIGHTHS])
{
  const unsigned in_sector = SECTOR / o->piece;
  const unsigned in_eighth = o->s->cluster_size / 8 / o->piece;

  for (uint64_t i = o->from / SECTOR; i < o->to / SECTOR; ++i) {
    unsigned n = 0;

    while (n < in_sector && o->got[i * in_sector + n]
           == eighths[(i * in_sector + n) / in_eighth])
      n++;
    o->fine[i] |= n == in_sector;
  }
}

static void
try_orders (const struct orders *o, const uint8_t eighths[EIGHTHS],
            unsigned i, unsigned j)
{
  const struct scene *s = o->s;
  uint8_t next[EIGHTHS];

  if (i >= o->done[0] && j >= o->done[1])
    compare (o, eighths);
  if (i < nr_steps (s, 0)) {
    memcpy (next, eighths, sizeof next);
    imagine_step (s, 0, i, next);
    try_orders (o, next, i + 1, j);
  }
  if (j < nr_steps (s, 1)) {
    memcpy (next, eighths, sizeof next);
    imagine_step (s, 1, j, next);
    try_orders (o, next, i, j + 1);
  }
}

/* Is each sector as it may be? */
static bool
all_fine (const struct scene *s, const uint8_t *got, uint64_t from,
          uint64_t to, unsigned first_done, unsigned second_done)
{
  static int values[CLUSTERS * 65536 / SECTOR];
  bool fine[CLUSTERS * 65536 / SECTOR] = { false };
  const unsigned done[2] = { first_done, second_done };
  const unsigned piece = min_u64 (s->cluster_size / 8, SECTOR);
  const struct orders o = { s, values, fine, piece, from, to, done };

  for (uint64_t i = from; i < to; i += piece)
    values[i / piece] =
      memcmp (got + i, got + i + 1, piece - 1) == 0 ? got[i] : -1;
  try_orders (&o, s->initial, 0, 0);
  for (uint64_t i = from; i < to; i += SECTOR)
    if (!fine[i / SECTOR])
      return false;
  return true;
}

static void
prepare (void *opaque)
{
  const struct qcow2_options options = { .cache_size = 65536 };
  struct scene *s = opaque;
  const struct crash_image *image =
    &images[s->cluster_size == sizes[0] ? 0 : 1][s->state];

  /* Two that wait for each other would wait for ever. */
  alarm (ONE_MEETING);
  s->flushed_at[0] = s->flushed_at[1] = 0;
  s->allocated_at[0] = s->allocated_at[1] = 0;
  s->log = crash_log_new (image, s->seed);
  s->c = gate_open (crash_container_open (s->log));
  s->q = qcow2_open (s->c, &options);
  assert_non_null (s->q);
  /* What both would have to do first is none of their business. */
  assert_int_equal (qcow2_trim (s->q, 0, 0), 0);
}

/* Cut off power when the log has come to a point. */
static void
check_crash (struct scene *s, struct crash_replay *replay, size_t point,
             int a, int b)
{
  struct crash_image state =
    crash_image_new (crash_log_live (s->log)->room);
  struct checked k;

  crash_replay_advance (replay, point);
  crash_replay_state (replay, &state, &s->seed);
  if (!check_image (&k, &state)) {
    fprintf (stderr, "%s\n", k.error);
    fail_scene (s, a, b, "a crash damages the image");
  }
  checked_free (&k);
  crash_image_free (&state);
}

static void
check_crashes (struct scene *s, int a, int b)
{
  const size_t length = crash_log_length (s->log);
  struct crash_replay *replay = crash_replay_new (s->log);

  for (unsigned i = 1; i <= CRASHES; ++i)
    check_crash (s, replay, length * i / CRASHES, a, b);
  crash_replay_free (replay);
  /* A larger refcount table is durable when it is first used. */
  for (unsigned actor = 0; actor < 2; ++actor)
    if (s->allocated_at[actor] != 0) {
      replay = crash_replay_new (s->log);
      check_crash (s, replay, s->allocated_at[actor], a, b);
      crash_replay_free (replay);
    }
}

/* Read an image with a reader of its own. */
static void
read_image (const struct scene *s, struct crash_log *log, uint8_t *bytes)
{
  const struct qcow2_options options = { .readonly = true };
  struct container *c = crash_container_open (log);
  struct qcow2 *q = qcow2_open (c, &options);

  assert_non_null (q);
  assert_int_equal (qcow2_read (q, bytes, bytes_of (s), 0), 0);
  qcow2_close (q);
  container_close (c);
}

/* What was answered before a flush began is there when it has ended. */
static void
check_flushed (struct scene *s, unsigned actor, int a, int b)
{
  struct crash_replay *replay = crash_replay_new (s->log);
  struct crash_image state =
    crash_image_new (crash_log_live (s->log)->room);
  uint8_t *bytes = malloc (bytes_of (s));
  struct crash_log *log;

  assert_non_null (bytes);
  crash_replay_advance (replay, s->flushed_at[actor]);
  crash_replay_state (replay, &state, &s->seed);
  log = crash_log_new (&state, s->seed);
  read_image (s, log, bytes);
  if (!all_fine (s, bytes, 0, bytes_of (s), actor == 0 ? s->flushed[0] : 0,
                 actor == 1 ? s->flushed[1] : 0))
    fail_scene (s, a, b, "after a flush and a crash something is gone");
  crash_log_free (log);
  free (bytes);
  crash_image_free (&state);
  crash_replay_free (replay);
}

static uint64_t
leaked (struct scene *s, int a, int b, const struct crash_image *image)
{
  struct checked k;

  if (!check_image (&k, image)) {
    fprintf (stderr, "%s\n", k.error);
    fail_scene (s, a, b, "the image is damaged");
  }
  checked_free (&k);
  return k.nr_leaked;
}

static void
check_reads (struct scene *s, int a, int b)
{
  for (unsigned actor = 0; actor < 2; ++actor)
    for (unsigned i = 0; i < nr_steps (s, actor); ++i) {
      const struct step *step = &s->sequence[actor]->steps[i];
      const unsigned eighth = s->cluster_size / 8;

      if (step->verb == READ &&
          !all_fine (s, s->reads[actor], step->from * eighth,
                     step->to * eighth, 0, 0))
        fail_scene (s, a, b, "something was read that never was there");
    }
}

/* Open it anew and compare. */
static void
check_reopened (struct scene *s, int a, int b)
{
  uint8_t *bytes = malloc (bytes_of (s));

  assert_non_null (bytes);
  read_image (s, s->log, bytes);
  if (memcmp (bytes, s->now, bytes_of (s)) != 0)
    fail_scene (s, a, b, "it reads differently when it is opened anew");
  free (bytes);
}

static void
check (void *opaque, int a, int b)
{
  struct scene *s = opaque;

  if (qcow2_read (s->q, s->now, bytes_of (s), 0) == -1)
    fail_scene (s, a, b, "it cannot be read");
  if (!all_fine (s, s->now, 0, bytes_of (s), nr_steps (s, 0),
                 nr_steps (s, 1)))
    fail_scene (s, a, b, "no order of the requests gives this");
  check_reads (s, a, b);
  if (qcow2_flush (s->q) == -1)
    fail_scene (s, a, b, "it cannot be flushed");
  leaked (s, a, b, crash_log_live (s->log));
  if (qcow2_stop (s->q) == -1)
    fail_scene (s, a, b, "it cannot be stopped");
  /* Those shared have one more reference than there is. */
  if (leaked (s, a, b, crash_log_live (s->log))
      > (s->state == SHARED ? USED : 0))
    fail_scene (s, a, b, "clusters are leaked");
  if (!threads_only)
    check_crashes (s, a, b);
  for (unsigned actor = 0; !threads_only && actor < 2; ++actor)
    if (s->flushed_at[actor] != 0)
      check_flushed (s, actor, a, b);
  qcow2_close (s->q);
  container_close (s->c);
  check_reopened (s, a, b);
  crash_log_free (s->log);
  s->seed++;
}

static unsigned
run_scene_in (unsigned cluster_size, enum state state,
              const struct sequence *first, const struct sequence *second,
              unsigned first_stride, unsigned second_stride)
{
  struct scene s = {
    .cluster_size = cluster_size, .state = state,
    .sequence = { first, second },
  };
  const struct meeting m = {
    prepare, { act_first, act_second }, check, &s
  };
  unsigned n;

  s.now = malloc (bytes_of (&s));
  s.reads[0] = malloc (bytes_of (&s));
  s.reads[1] = malloc (bytes_of (&s));
  assert_non_null (s.now);
  assert_non_null (s.reads[0]);
  assert_non_null (s.reads[1]);
  if (state >= DATA)
    memset (s.initial, INITIAL, 8 * USED);
  n = meet_in_all_ways (&m, first_stride, second_stride);
  free (s.now);
  free (s.reads[0]);
  free (s.reads[1]);
  return n;
}

static unsigned
run_scene (unsigned cluster_size, enum state state,
           const struct sequence *first, const struct sequence *second)
{
  /* Large images take long, and differ little. */
  const unsigned n = cluster_size == sizes[0] && state != NO_REFCOUNTS
    ? small_stride : stride;

  return run_scene_in (cluster_size, state, first, second, n, n);
}

/* Each of the one with each of the others, both ways. */
static unsigned
run_state (unsigned size, enum state state,
           const struct sequence *a, size_t nr_a,
           const struct sequence *b, size_t nr_b)
{
  unsigned n = 0;

  for (size_t i = 0; i < nr_a; ++i)
    for (size_t j = 0; j < nr_b; ++j) {
      n += run_scene (size, state, &a[i], &b[j]);
      n += run_scene (size, state, &b[j], &a[i]);
    }
  return n;
}

/* The same in all ordinary states. */
static void
run_all (const struct sequence *a, size_t nr_a, const struct sequence *b,
         size_t nr_b)
{
  const unsigned nr_sizes = threads_only ? 1 : how_often (NR_SIZES, 1, 1);
  unsigned n = 0;

  for (unsigned i = 0; i < nr_sizes; ++i)
    for (enum state state = 0; state < NR_ORDINARY; ++state)
      n += run_state (sizes[i], state, a, nr_a, b, nr_b);
  print_message ("%u meetings\n", n);
}

/* The clusters that requests meet in are 1 and 2: eighths 8 to 23. */
static const struct sequence writes[] = {
  { "a write to a part of a cluster", { { WRITE, 10, 12 } } },
  { "a write across clusters", { { WRITE, 4, 20 } } },
};
#define NR_WRITES (sizeof writes / sizeof writes[0])

/* The freed clusters are used for others. */
#define FLUSHED { .verb = FLUSH }
#define REUSE FLUSHED, FLUSHED, { WRITE, 32, 48 }, FLUSHED

static const struct sequence discards[] = {
  { "a discard", { { TRIM, 8, 24 } } },
  { "a discard, and a use of what it frees", { { TRIM, 0, 32 }, REUSE } },
};

static void
test_discard_during_copy_on_write (void **unused)
{
  (void) unused;
  run_all (writes, NR_WRITES, discards, 2);
}

static void
test_two_writes_to_one_cluster (void **unused)
{
  static const struct sequence others[] = {
    { "a write to another part", { { WRITE, 13, 15 } } },
    { "a write over it all", { { WRITE, 8, 24 } } },
    { "a write that is flushed, and one more",
      { { WRITE, 14, 18 }, FLUSHED, { WRITE, 9, 10 } } },
  };

  (void) unused;
  run_all (writes, NR_WRITES, others, 3);
}

static void
test_zeroes_against_write (void **unused)
{
  static const struct sequence zeroes[] = {
    { "write-zeroes", { { ZERO_IT, 8, 24 } } },
    { "write-zeroes that keeps clusters", { { KEEP, 8, 24 } } },
    { "write-zeroes to parts", { { ZERO_IT, 11, 18 } } },
    { "write-zeroes, and a use of what it frees",
      { { ZERO_IT, 0, 32 }, REUSE } },
  };

  (void) unused;
  run_all (writes, NR_WRITES, zeroes, 4);
}

static void
test_read_against_changes (void **unused)
{
  static const struct sequence reads[] = {
    { "a read", { { READ, 0, 32 } } },
  };

  (void) unused;
  run_all (reads, 1, discards, 2);
  run_all (reads, 1, writes, NR_WRITES);
}

static void
test_flush_against_allocation (void **unused)
{
  static const struct sequence flushes[] = {
    { "a flush", { FLUSHED } },
    { "a write, flushed", { { WRITE, 34, 38 }, FLUSHED } },
    { "a discard, flushed", { { TRIM, 0, 32 }, FLUSHED } },
  };

  (void) unused;
  run_all (writes, NR_WRITES, flushes, 3);
  run_all (discards + 1, 1, flushes, 2);
}

/* What may be under way while something grows. */
static const struct sequence growing = {
  "a write that makes it grow", { { WRITE, 32, 60 }, FLUSHED }
};
static const struct sequence others_work[] = {
  { "a write in place", { { WRITE, 10, 12 }, { READ, 0, 32 } } },
  { "a write that allocates, flushed", { { WRITE, 60, 64 }, FLUSHED } },
  { "a flush", { { WRITE, 4, 5 }, FLUSHED } },
  { "a discard, and a use of what it frees",
    { { TRIM, 0, 32 }, FLUSHED, FLUSHED, { WRITE, 48, 60 }, FLUSHED } },
};
#define NR_OTHERS (sizeof others_work / sizeof others_work[0])

static void
test_refcount_table_growth (void **unused)
{
  (void) unused;
  if (threads_only)
    skip ();
  print_message ("%u meetings\n",
                 run_state (sizes[0], NO_REFCOUNTS, &growing, 1, others_work,
                            NR_OTHERS));
}

/* While a flush writes refcounts the table is replaced, by one whose
 * clusters, or the blocks for them, are counted in what is being written.
 */
static void
test_table_growth_during_flush (void **unused)
{
  static const struct sequence flushed = {
    "a write that allocates, flushed", { { WRITE, 60, 64 }, FLUSHED }
  };
  static const struct sequence many = {
    "an allocation of many clusters", { { .verb = ALLOCATE } }
  };

  (void) unused;
  if (threads_only)
    skip ();
  print_message ("%u meetings\n",
                 run_scene_in (sizes[0], NO_REFCOUNTS, &flushed, &many, 1,
                               100));
}

static void
test_container_growth (void **unused)
{
  (void) unused;
  if (threads_only)
    skip ();
  for (unsigned i = 0; i < NR_SIZES; ++i)
    print_message ("%u meetings\n",
                   run_state (sizes[i], NO_ROOM, &growing, 1, others_work,
                              NR_OTHERS));
}

/* Images. */

static void
take_bytes (struct container *c, struct crash_image *image)
{
  image->size = container_size (c);
  assert_true (image->size <= image->room);
  assert_int_equal (container_pread (c, image->bytes, image->size, 0), 0);
}

/* Give the data clusters one more reference. */
static void
share (struct crash_image *image)
{
  uint8_t *header = image->bytes;
  uint8_t *l2 = header
    + (get_be64 (header + get_be64 (header + 40)) & 0xfffffffffffe00);

  for (unsigned i = 0; i < USED; ++i) {
    const uint64_t host = get_be64 (l2 + 8 * i) & 0xfffffffffffe00;
    const uint64_t cluster = host >> get_be32 (header + 20);
    uint8_t *block = header + get_be64 (header + get_be64 (header + 48));

    put_be64 (l2 + 8 * i, host);
    assert_int_equal (get_be16 (block + 2 * cluster), 1);
    put_be16 (block + 2 * cluster, 2);
  }
}

/* Write until the refcount table grows, and take what was a few clusters
 * before that.
 */
static void
use_refcounts_up (struct crash_image *image)
{
  const struct qcow2_options options = { .cache_size = 65536 };
  struct crash_log *log = crash_log_new (image, 0);
  struct container *c = crash_container_open (log);
  struct qcow2 *q = qcow2_open (c, &options);
  const struct crash_image *live = crash_log_live (log);
  static const uint8_t buf[1900 << 10] = { 1 };
  struct crash_image before[BEFORE_GROWTH];
  uint64_t at = 65536, n = 0;

  assert_non_null (q);
  for (unsigned i = 0; i < BEFORE_GROWTH; ++i)
    before[i] = crash_image_new (image->room);
  assert_int_equal (qcow2_write (q, buf, sizeof buf, at), 0);
  assert_int_equal (qcow2_flush (q), 0);
  at += sizeof buf;
  do {
    crash_image_copy (&before[n % BEFORE_GROWTH], live);
    assert_int_equal (qcow2_write (q, buf, 512, at), 0);
    assert_int_equal (qcow2_flush (q), 0);
    at += 512;
    n++;
  } while (memcmp (image->bytes + 48, live->bytes + 48, 8) == 0 ||
           n < BEFORE_GROWTH);
  /* The one that is the next to be replaced is the oldest. */
  crash_image_copy (image, &before[n % BEFORE_GROWTH]);
  for (unsigned i = 0; i < BEFORE_GROWTH; ++i)
    crash_image_free (&before[i]);
  qcow2_close (q);
  container_close (c);
  crash_log_free (log);
}

static void
make_image (unsigned size, enum state state, struct crash_image *image)
{
  static const char *const commands[] = {
    [UNALLOCATED] = "read 0 512",
    [ZERO] = "write -z -u 0 %u",
    [ZERO_ALLOCATED] = "write -z 0 %u",
    [DATA] = "write -P 3 0 %u",
    [COMPRESSED] = "write -c -P 3 0 %u",
    [SHARED] = "write -P 3 0 %u",
    [NO_ROOM] = "write -P 3 0 %u",
    [NO_REFCOUNTS] = "write -P 3 0 %u",
  };
  const char *file = temp_file ("race.qcow2");
  char command[64], commands_of_all[512] = "";
  struct container *c;

  /* Compressed clusters are written one at a time. */
  for (unsigned i = 0; i < USED; ++i) {
    snprintf (command, sizeof command, commands[state], size);
    char *zero = strstr (command, " 0 ");

    snprintf (commands_of_all + strlen (commands_of_all),
              sizeof commands_of_all - strlen (commands_of_all),
              " -c '%.*s %u %s'", (int) (zero - command), command, i * size,
              zero + 3);
  }
  assert_int_equal (
    run_command ("set -e; exec >/dev/null; "
                 "qemu-img create -q -f qcow2 "
                 "-o cluster_size=%u,refcount_bits=%u '%s' %s; "
                 "qemu-io -f qcow2 %s '%s'", size,
                 state == NO_REFCOUNTS ? 64 : 16, file,
                 state == NO_REFCOUNTS ? "3M" : "4M", commands_of_all, file),
    0);
  c = image_load (file, ROOM);
  *image = crash_image_new (size == sizes[0] && state != NO_REFCOUNTS
                            ? ROOM / 16 : ROOM);
  take_bytes (c, image);
  container_close (c);
  image->size = round_up (image->size, size);
  if (state == SHARED)
    share (image);
  if (state == NO_REFCOUNTS)
    use_refcounts_up (image);
  if (state >= NO_ROOM)
    return;
  /* Free clusters are full of garbage. */
  memset (image->bytes + image->size, 0xaa, 4 * size);
  image->size += 4 * size;
}

static int
make_images (void **unused)
{
  (void) unused;
  for (unsigned i = 0; i < NR_SIZES; ++i)
    for (enum state state = 0; state < NR_STATES; ++state)
      if (state != NO_REFCOUNTS || i == 0)
        make_image (sizes[i], state, &images[i][state]);
  return 0;
}

static int
free_images (void **unused)
{
  (void) unused;
  for (unsigned i = 0; i < NR_SIZES; ++i)
    for (enum state state = 0; state < NR_STATES; ++state)
      crash_image_free (&images[i][state]);
  return 0;
}

static void
quiet (enum report_level level, const char *fmt, va_list args)
{
  (void) level;
  (void) fmt;
  (void) args;
}

int
main (int argc, char *argv[])
{
  const struct CMUnitTest tests[] = {
    cmocka_unit_test (test_discard_during_copy_on_write),
    cmocka_unit_test (test_two_writes_to_one_cluster),
    cmocka_unit_test (test_zeroes_against_write),
    cmocka_unit_test (test_read_against_changes),
    cmocka_unit_test (test_flush_against_allocation),
    cmocka_unit_test (test_refcount_table_growth),
    cmocka_unit_test (test_table_growth_during_flush),
    cmocka_unit_test (test_container_growth),
  };

  if (run_command ("qemu-img --version >/dev/null 2>&1 && "
                   "qemu-io --version >/dev/null 2>&1") != 0)
    return 77;
  if (is_thorough ()) {
    stride /= 2;
    small_stride /= 2;
  }
  if (getenv ("RACES_STRIDE") != NULL)
    stride = small_stride = max_u64 (atoi (getenv ("RACES_STRIDE")), 1);
  threads_only = getenv ("THREADS_ONLY") != NULL;
  if (argc > 1)
    cmocka_set_test_filter (argv[1]);
  report_sink = quiet;
  /* Images come and go all the time: keep their memory. */
  mallopt (M_MMAP_THRESHOLD, 64 << 20);
  mallopt (M_TRIM_THRESHOLD, 256 << 20);
  return cmocka_run_group_tests (tests, make_images, free_images);
}
