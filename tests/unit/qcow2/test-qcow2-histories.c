/* nbdkit-dirty-bitmap-filter
 * SPDX-License-Identifier: BSD-3-Clause
 * Copyright the nbdkit-dirty-bitmap-filter authors
 */

/* What clients see while requests are under way (I8).
 *
 * Three requests meet: the first is stopped at one of its places
 * (interleave.h), the second runs, the third is stopped at one of its
 * places, and then they go on, in either order.  Whenever one has been
 * answered the disk is read.
 *
 * All requests and reads make a history, with the times at which each
 * began and ended.  There has to be an order of them, the same as that of
 * any two of which one ended before the other began, in which each read
 * finds what was written last.  That is asked of each eighth of a unit (a
 * cluster, or a subcluster where an image has them) by itself, as nothing
 * larger than a sector is written whole.
 *
 * It is more than to look at the end: data that were answered for, read
 * as something else, and come back, leave the disk as it should be.
 */

#include <config.h>

#include <errno.h>
#include <inttypes.h>
#include <limits.h>
#include <malloc.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include <cmocka.h>

#include "common/bytes.h"
#include "common/report.h"
#include "container/container.h"
#include "image.h"
#include "interleave.h"
#include "qcow2/qcow2.h"

#define UNIT 512
#define EIGHTH (UNIT / 8)
#define UNITS 32                /* used: one cluster of subclusters */
#define EIGHTHS (8 * UNITS)
#define WATCHED 32              /* eighths, in which requests meet */
#define DISK (UNITS * UNIT)
#define INITIAL 3               /* a byte of data */
#define BELOW 4                 /* a byte of the backing file */
#define ROOM (UINT64_C (4) << 20)
#define MAX_STEPS 6
#define MAX_OPS 32

/* Seconds in which those that do not wait for each other have met. */
#define ONE_MEETING 120

enum verb { END, READ, WRITE, ZERO, KEEP, TRIM, FLUSH };

struct step {
  enum verb verb;
  unsigned from, to;            /* eighths */
};

struct sequence {
  const char *name;
  struct step steps[MAX_STEPS + 1];
};

#define ALL 0, EIGHTHS

/* The unit that they meet in is the second: eighths 8 to 15. */
static const struct sequence firsts[] = {
  { "a write to a part", { { WRITE, 10, 12 } } },
  { "a read", { { READ, 0, WATCHED } } },
  { "zeroes to a part", { { ZERO, 10, 12 } } },
  { "a write across units", { { WRITE, 4, 20 } } },
};

/* What is freed is used for others. */
#define REUSE { FLUSH, 0, 0 }, { FLUSH, 0, 0 }, { WRITE, 64, 160 }, \
    { FLUSH, 0, 0 }

static const struct sequence seconds[] = {
  { "zeroes that keep clusters", { { KEEP, ALL } } },
  { "zeroes", { { ZERO, ALL } } },
  { "a discard", { { TRIM, ALL } } },
  { "zeroes to a unit", { { ZERO, 8, 16 } } },
  { "a discard of a unit", { { TRIM, 8, 16 } } },
  { "a discard, and a use of what it frees", { { TRIM, ALL }, REUSE } },
};

static const struct sequence thirds[] = {
  { "a write to another part", { { WRITE, 13, 15 } } },
  { "a write over it", { { WRITE, 8, 16 } } },
  { "a write to parts of two units", { { WRITE, 11, 18 } } },
  { "zeroes to another part, and a write",
    { { ZERO, 12, 14 }, { WRITE, 14, 15 } } },
};

#define NR(a) (sizeof a / sizeof a[0])

/* An image, and what it holds. */
struct scene {
  const char *name;
  const char *options;          /* of qemu-img create */
  const char *commands;         /* of qemu-io, or NULL */
  uint8_t initial[4];           /* the watched units */
  bool data_file, backing, compressed, snapshot;
  bool in_place;                /* the unit that they meet in has data */

  uint8_t *image;
  uint64_t image_bytes;
};

#define CLUSTERS "-o cluster_size=512"
#define SUBCLUSTERS "-o extended_l2=on,cluster_size=16k"
#define EACH(b) { b, b, b, b }
#define FULL "-c 'write -q -P 3 0 16k'"
#define PART "-c 'write -q -P 3 512 1k'"
#define KEPT FULL " -c 'write -q -z 0 16k'"

static struct scene scenes[] = {
  { .name = "clusters", .in_place = true, .options = CLUSTERS, .commands = FULL,
    .initial = EACH (INITIAL) },
  { .name = "kept clusters", .options = CLUSTERS, .commands = KEPT },
  { .name = "compressed clusters", .options = CLUSTERS, .compressed = true,
    .initial = EACH (INITIAL) },
  { .name = "clusters of a snapshot", .options = CLUSTERS, .commands = FULL,
    .snapshot = true, .initial = EACH (INITIAL) },
  { .name = "subclusters", .in_place = true, .options = SUBCLUSTERS, .commands = FULL,
    .initial = EACH (INITIAL) },
  { .name = "some subclusters", .in_place = true, .options = SUBCLUSTERS, .commands = PART,
    .initial = { 0, INITIAL, INITIAL, 0 } },
  { .name = "kept subclusters", .options = SUBCLUSTERS, .commands = KEPT },
  { .name = "subclusters of a compressed cluster", .options = SUBCLUSTERS,
    .compressed = true, .initial = EACH (INITIAL) },
  { .name = "subclusters of a snapshot", .options = SUBCLUSTERS,
    .commands = PART, .snapshot = true,
    .initial = { 0, INITIAL, INITIAL, 0 } },
  { .name = "a data file", .in_place = true, .options = CLUSTERS, .commands = FULL,
    .data_file = true, .initial = EACH (INITIAL) },
  { .name = "an empty data file", .options = CLUSTERS, .data_file = true },
  { .name = "subclusters in a data file", .in_place = true, .options = SUBCLUSTERS,
    .commands = PART, .data_file = true,
    .initial = { 0, INITIAL, INITIAL, 0 } },
  { .name = "a raw data file", .in_place = true, .options = CLUSTERS " -o data_file_raw=on",
    .commands = PART, .data_file = true,
    .initial = { 0, INITIAL, INITIAL, 0 } },
  { .name = "clusters over a backing file", .options = CLUSTERS,
    .commands = PART, .backing = true,
    .initial = { BELOW, INITIAL, INITIAL, BELOW } },
  { .name = "a backing file", .options = CLUSTERS, .backing = true,
    .initial = EACH (BELOW) },
  { .name = "subclusters over a backing file", .options = SUBCLUSTERS,
    .commands = PART, .backing = true,
    .initial = { BELOW, INITIAL, INITIAL, BELOW } },
  { .name = "subclusters, all in a backing file", .options = SUBCLUSTERS,
    .backing = true, .initial = EACH (BELOW) },
};

/* With RACES_STRIDE=1 in the environment, really all ways.  Else some of
 * the choices of requests, and fewer, at fewer places, where the data that
 * they meet in are not written in place, which test-qcow2-races has, too.
 */
static bool all_ways;

/* The history. */
struct op {
  unsigned began, ended;
  unsigned from, to;            /* eighths, as far as they are watched */
  bool is_read;
  bool optional;                /* perhaps it does nothing */
  int value;                    /* written */
  int got[WATCHED];             /* read, -1 if its bytes differ */
};

static struct op ops[MAX_OPS];
static atomic_uint nr_ops, now;

/* One meeting. */
struct play {
  const struct scene *scene;
  const struct sequence *sequence[3];
  struct container *c, *data, *raw;
  struct qcow2 *q;
  struct actor actors[3];
};

struct part {
  struct play *play;
  unsigned nr;
};

static void
fail_play (const struct play *p, const char *what)
{
  fail_msg ("%s: %s, stopped at %d; %s; %s, stopped at %d: %s",
            p->scene->name, p->sequence[0]->name, p->actors[0].stop_at,
            p->sequence[1]->name, p->sequence[2]->name,
            p->actors[2].stop_at, what);
}

static struct op *
begin_op (unsigned from, unsigned to, bool is_read, int value)
{
  const unsigned i = atomic_fetch_add (&nr_ops, 1);

  assert_true (i < MAX_OPS);
  ops[i] = (struct op) {
    .began = atomic_fetch_add (&now, 1), .ended = UINT_MAX,
    .from = min_u64 (from, WATCHED), .to = min_u64 (to, WATCHED),
    .is_read = is_read, .value = value,
  };
  return &ops[i];
}

static void
end_op (struct op *op)
{
  op->ended = atomic_fetch_add (&now, 1);
}

static void
take_bytes (struct op *op, const uint8_t *buf)
{
  for (unsigned i = op->from; i < op->to; ++i, buf += EIGHTH)
    op->got[i] = memcmp (buf, buf + 1, EIGHTH - 1) == 0 ? buf[0] : -1;
}

static int
read_some (struct qcow2 *q, unsigned from, unsigned to)
{
  uint8_t buf[WATCHED * EIGHTH];
  struct op *op = begin_op (from, to, true, 0);
  const int r = qcow2_read (q, buf, (to - from) * EIGHTH, from * EIGHTH);

  end_op (op);
  take_bytes (op, buf);
  return r;
}

static int
change_some (struct qcow2 *q, const struct step *s, uint8_t value,
             bool optional)
{
  const uint64_t offset = s->from * EIGHTH, count = s->to * EIGHTH - offset;
  uint8_t buf[DISK];
  struct op *op;
  int r;

  memset (buf, value, sizeof buf);
  op = begin_op (s->from, s->to, false, s->verb == WRITE ? value : 0);
  op->optional = optional;
  switch (s->verb) {
  case WRITE: r = qcow2_write (q, buf, count, offset); break;
  case ZERO: r = qcow2_zero (q, count, offset, 0); break;
  case KEEP: r = qcow2_zero (q, count, offset, QCOW2_ZERO_KEEP); break;
  default: r = qcow2_trim (q, count, offset);
  }
  end_op (op);
  return r;
}

static void
act (void *opaque)
{
  const struct part *part = opaque;
  struct qcow2 *q = part->play->q;
  const struct step *s = part->play->sequence[part->nr]->steps;

  for (unsigned i = 0; s[i].verb != END; ++i) {
    const uint8_t value = 0x10 + 0x40 * part->nr + i;
    /* A part of a compressed cluster is not discarded. */
    const bool optional = part->play->scene->compressed &&
      s[i].verb == TRIM && s[i].to - s[i].from < EIGHTHS;
    const int r = s[i].verb == FLUSH ? qcow2_flush (q)
      : s[i].verb == READ ? read_some (q, s[i].from, s[i].to)
      : change_some (q, &s[i], value, optional);

    if (r == -1) {
      fprintf (stderr, "step %u failed: %s\n", i, strerror (errno));
      abort ();
    }
  }
}

/* Is there an order of those that are left in which one eighth is right?
 * Next can be any that began before the first of them ended.
 */
static bool
some_order (unsigned eighth, const unsigned *left, unsigned nr, int value)
{
  unsigned next[MAX_OPS], first_end = UINT_MAX;

  for (unsigned i = 0; i < nr; ++i)
    first_end = min_u64 (first_end, ops[left[i]].ended);
  for (unsigned i = 0; i < nr; ++i) {
    const struct op *op = &ops[left[i]];

    if (op->began > first_end || (op->is_read && op->got[eighth] != value))
      continue;
    memcpy (next, left, nr * sizeof next[0]);
    memmove (next + i, next + i + 1, (nr - 1 - i) * sizeof next[0]);
    if (some_order (eighth, next, nr - 1, op->is_read ? value : op->value) ||
        (op->optional && some_order (eighth, next, nr - 1, value)))
      return true;
  }
  return nr == 0;
}

static void
tell_history (unsigned eighth)
{
  for (unsigned i = 0; i < nr_ops; ++i)
    if (ops[i].from <= eighth && eighth < ops[i].to)
      fprintf (stderr, "eighth %u: from %u to %u %s %#x\n", eighth,
               ops[i].began, ops[i].ended,
               ops[i].is_read ? "reads" : "writes",
               ops[i].is_read ? ops[i].got[eighth] : ops[i].value);
}

static void
check_history (const struct play *p)
{
  for (unsigned eighth = 0; eighth < WATCHED; ++eighth) {
    unsigned left[MAX_OPS], nr = 0;

    for (unsigned i = 0; i < nr_ops; ++i)
      if (ops[i].from <= eighth && eighth < ops[i].to)
        left[nr++] = i;
    if (!some_order (eighth, left, nr, p->scene->initial[eighth / 8])) {
      tell_history (eighth);
      fail_play (p, "no order of the requests gives what was read");
    }
  }
}

static struct container *
copy_of (const uint8_t *bytes, uint64_t count)
{
  struct container *c = container_open_memory (ROOM);

  assert_non_null (c);
  assert_int_equal (container_pwrite (c, bytes, count, 0), 0);
  return c;
}

static struct qcow2 *
open_play (struct play *p)
{
  const struct qcow2_options options = {
    .cache_size = 65536, .data_file = p->data, .backing.raw = p->raw,
  };
  struct qcow2 *q = qcow2_open (p->c, &options);

  assert_non_null (q);
  return q;
}

static void
begin_play (struct play *p)
{
  uint8_t buf[DISK];

  /* Two that wait for each other would wait for ever. */
  alarm (ONE_MEETING);
  nr_ops = now = 0;
  p->c = gate_open (copy_of (p->scene->image, p->scene->image_bytes));
  memset (buf, INITIAL, sizeof buf);
  for (unsigned i = 0; i < 4; ++i)
    memset (buf + i * UNIT, p->scene->initial[i], UNIT);
  p->data = p->scene->data_file ? gate_open (copy_of (buf, DISK)) : NULL;
  memset (buf, BELOW, sizeof buf);
  p->raw = p->scene->backing ? gate_open (copy_of (buf, DISK)) : NULL;
  p->q = open_play (p);
  /* Tables are in RAM, and what has to be done first has been done: so
   * nobody is stopped with a lock that a read wants.
   */
  assert_int_equal (qcow2_trim (p->q, 0, 0), 0);
  assert_int_equal (qcow2_read (p->q, buf, DISK, 0), 0);
}

/* It reads the same when it is opened anew. */
static void
end_play (struct play *p)
{
  check_history (p);
  if (qcow2_stop (p->q) == -1)
    fail_play (p, "the image cannot be stopped");
  qcow2_close (p->q);
  p->q = open_play (p);
  assert_int_equal (read_some (p->q, 0, WATCHED), 0);
  check_history (p);
  qcow2_close (p->q);
  container_close (p->c);
  container_close (p->data);
  container_close (p->raw);
}

/* They go on in one order or the other.  Returns whether the third was
 * ever stopped at its place.
 */
static bool
play (struct play *p, int first_place, int third_place, bool third_ends_first,
      bool *first_came)
{
  struct part parts[3] = { { p, 0 }, { p, 1 }, { p, 2 } };
  const int stop_at[3] = { first_place, NEVER, third_place };
  struct actor *const a = p->actors;
  bool came;

  begin_play (p);
  for (unsigned i = 0; i < 3; ++i)
    a[i] = (struct actor) {
      .act = act, .opaque = &parts[i], .stop_at = stop_at[i],
    };
  actor_start (&a[0]);
  *first_came = actor_is_stopped (&a[0]);
  actor_start (&a[1]);
  assert_int_equal (read_some (p->q, 0, WATCHED), 0);
  actor_start (&a[2]);
  came = actor_is_stopped (&a[2]);
  assert_int_equal (read_some (p->q, 0, WATCHED), 0);
  actor_go_on (&a[third_ends_first ? 2 : 0]);
  came |= actor_is_stopped (&a[2]);
  assert_int_equal (read_some (p->q, 0, WATCHED), 0);
  actor_go_on (&a[third_ends_first ? 0 : 2]);
  assert_int_equal (read_some (p->q, 0, WATCHED), 0);
  for (unsigned i = 0; i < 3; ++i)
    actor_join (&a[i]);
  assert_int_equal (read_some (p->q, 0, WATCHED), 0);
  end_play (p);
  return came;
}

static unsigned
play_in_all_ways (struct play *p)
{
  const unsigned stride =
    all_ways ? 1 : p->scene->in_place ? how_often (1, 2, 2) : 3;
  unsigned n = 0;
  bool first_came = true, third_came;

  for (int first = 0; first_came; first += stride) {
    /* Where the third ends first it matters little where it is stopped. */
    play (p, first, first, true, &first_came);
    third_came = first_came;
    for (int third = 0; third_came; third += stride, ++n)
      third_came = play (p, first, third, false, &first_came);
    n++;
  }
  return n;
}

static unsigned
run_scene (const struct scene *scene)
{
  const unsigned sample = all_ways ? 1 : scene->in_place ? 3 : 5;
  struct play p = { .scene = scene };
  unsigned n = 0;

  for (unsigned i = 0; i < NR (firsts); ++i)
    for (unsigned j = 0; j < NR (seconds); ++j)
      for (unsigned k = 0; k < NR (thirds); ++k) {
        if ((i + j + k) % sample != 0)
          continue;
        p.sequence[0] = &firsts[i];
        p.sequence[1] = &seconds[j];
        p.sequence[2] = &thirds[k];
        n += play_in_all_ways (&p);
      }
  return n;
}

static void
run_scenes (unsigned from, unsigned to)
{
  for (unsigned i = from; i < to; ++i)
    print_message ("%s: %u meetings\n", scenes[i].name,
                   run_scene (&scenes[i]));
}

static void
test_all (void **unused)
{
  (void) unused;
  run_scenes (0, NR (scenes));
}

/* Images. */

static void
make_image (struct scene *s)
{
  char file[512], data[512], below[512], more[1200] = "";
  struct container *c;

  snprintf (file, sizeof file, "%s", temp_file ("top.qcow2"));
  snprintf (data, sizeof data, "%s", temp_file ("data"));
  snprintf (below, sizeof below, "%s", temp_file ("below"));
  assert_int_equal (run_command ("rm -f '%s' '%s'; truncate -s %u '%s'",
                                 file, data, DISK, below), 0);
  if (s->data_file)
    snprintf (more, sizeof more, "-o data_file='%s'", data);
  else if (s->backing)
    snprintf (more, sizeof more, "-b '%s' -F raw", below);
  /* Something beyond what is looked at, so that there is an L2 table. */
  assert_int_equal (run_command ("qemu-img create -q -f qcow2 %s %s '%s' %u &&"
                                 "qemu-io -f qcow2 -c 'write -q %u %u' %s '%s'",
                                 s->options, more, file, 2 * DISK, DISK, UNIT,
                                 s->commands != NULL ? s->commands : "", file),
                    0);
  if (s->compressed)
    assert_int_equal (run_command ("yes cc | tr -d '\\n' | tr c '\\003' | "
                                   "head -c %u >'%s' && "
                                   "qemu-img convert -n -c -f raw -O qcow2 "
                                   "'%s' '%s'", DISK, data, data, file), 0);
  if (s->snapshot)
    assert_int_equal (run_command ("qemu-img snapshot -c s '%s'", file), 0);
  c = image_load (file, ROOM);
  s->image_bytes = container_size (c);
  s->image = malloc (s->image_bytes);
  assert_non_null (s->image);
  assert_int_equal (container_pread (c, s->image, s->image_bytes, 0), 0);
  container_close (c);
}

static int
make_images (void **unused)
{
  (void) unused;
  for (unsigned i = 0; i < NR (scenes); ++i)
    make_image (&scenes[i]);
  return 0;
}

static int
free_images (void **unused)
{
  (void) unused;
  for (unsigned i = 0; i < NR (scenes); ++i)
    free (scenes[i].image);
  return 0;
}

int
main (void)
{
  const struct CMUnitTest tests[] = {
    cmocka_unit_test (test_all),
  };

  if (run_command ("qemu-img --version >/dev/null 2>&1 && "
                   "qemu-io --version >/dev/null 2>&1") != 0)
    return 77;
  all_ways = getenv ("RACES_STRIDE") != NULL &&
    strcmp (getenv ("RACES_STRIDE"), "1") == 0;
  report_sink = report_if_verbose;
  /* Images come and go all the time: keep their memory. */
  mallopt (M_MMAP_THRESHOLD, 64 << 20);
  mallopt (M_TRIM_THRESHOLD, 256 << 20);
  return cmocka_run_group_tests (tests, make_images, free_images);
}
