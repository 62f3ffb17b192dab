/* nbdkit-dirty-bitmap-filter
 * SPDX-License-Identifier: BSD-3-Clause
 * Copyright the nbdkit-dirty-bitmap-filter authors
 */

/* The bitmaps that clients are offered, while the set of them changes: what
 * a client has of an offer stays, a client that reads one makes its bitmap
 * busy, and one whose bitmap was changed or removed gets EIO.
 */

#include <config.h>

#include <errno.h>
#include <inttypes.h>
#include <pthread.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include <cmocka.h>

#include "disk/internal.h"
#include "bitmap-image.h"
#include "image.h"

#define LIMIT (1 << 20)
#define GRANULE 512
#define SIZE (UINT64_C (16) << 20)
#define NR_GRANULES (SIZE / GRANULE)

/* The most that a bitmap can have. */
#define MAX_RUNS NR_GRANULES

/* Every other granule is dirty, so that a read of all takes a while. */
#define STRIPED .table = "d", .fill = 0x55

/* An image with its bitmaps.  There are two of them, as of a disk and its
 * backing file.
 */
struct layer {
  struct crafted crafted;
  struct container *c;
  struct qcow2 *q;
};

static struct layer layers[2];
static struct bitmap_set *sets[2];
static uint64_t sizes[2] = { SIZE, SIZE / 2 };

/* Of a disk, only what offers need. */
static struct disk disk;

static void
open_layer (unsigned i, const struct bitmap_spec *specs, size_t nr_specs)
{
  struct layer *l = &layers[i];

  craft (&l->crafted, 12, SIZE, specs, nr_specs);
  l->c = recorder_open (&l->crafted.bytes, LIMIT);
  l->q = open_image (l->c, false);
  sets[i] = open_set (l->q);
}

static void
close_set (unsigned i)
{
  bitmap_set_close (sets[i]);
  sets[i] = NULL;
}

static int
setup (void **state)
{
  static const struct bitmap_spec upper[] = {
    { .name = "tuesday", .granularity_bits = 9, .flags = 2, STRIPED },
    { .name = "monday", .granularity_bits = 9, .flags = 2, STRIPED },
    { .name = "mon", .granularity_bits = 12, .flags = 2 },
  };
  static const struct bitmap_spec lower[] = {
    { .name = "a", .granularity_bits = 9, .flags = 2 },
    { .name = "zulu", .granularity_bits = 16, .flags = 2 },
  };

  (void) state;
  open_layer (0, upper, 3);
  open_layer (1, lower, 2);
  offers_init (&disk.offers);
  messages_clear ();
  return offers_replace (&disk.offers, sets, sizes, 2);
}

static int
teardown (void **state)
{
  (void) state;
  for (unsigned i = 0; i < 2; ++i)
    close_set (i);
  offers_free (&disk.offers);
  for (unsigned i = 0; i < 2; ++i) {
    qcow2_close (layers[i].q);
    container_close (layers[i].c);
    free (layers[i].crafted.bytes.p);
  }
  return 0;
}

/* Offer the bitmaps of the first sets only. */
static void
offer_of (size_t nr_sets)
{
  assert_int_equal (offers_replace (&disk.offers, sets, sizes, nr_sets), 0);
}

static struct disk_offer *
find (const char *name)
{
  return disk_find_offer (&disk, name, strlen (name));
}

static void
check_readable (const struct disk_offer *o)
{
  bool dirty;

  assert_int_equal (disk_bitmap_run (o, 0, GRANULE, &dirty), GRANULE);
}

static void
check_cut (const struct disk_offer *o)
{
  uint8_t buf[GRANULE];
  struct qcow2_chunk chunk = {
    .buf = buf, .count = GRANULE, .limit = GRANULE, .min_hole = 1,
  };
  uint64_t ends[4], length;
  uint32_t flags;
  bool dirty;

  messages_clear ();
  errno = 0;
  assert_int_equal (disk_bitmap_runs (o, 0, SIZE, ends, 4, &dirty), 0);
  assert_int_equal (errno, EIO);
  assert_int_equal (messages_errors (), 1);
  assert_message (disk_bitmap_name (o));
  assert_message ("was changed or removed");
  errno = 0;
  assert_int_equal (disk_bitmap_run (o, 0, SIZE, &dirty), 0);
  assert_int_equal (errno, EIO);

  /* Bytes beyond the bitmap are dirty without one look at it. */
  errno = 0;
  assert_int_equal (disk_bitmap_run (o, SIZE - 1, SIZE, &dirty), 0);
  assert_int_equal (errno, EIO);

  disk.size = SIZE;
  errno = 0;
  assert_int_equal (disk_delta_read (&disk, o, buf, GRANULE, 0), -1);
  assert_int_equal (errno, EIO);
  errno = 0;
  assert_int_equal (disk_delta_read_chunk (&disk, o, 0, &chunk), -1);
  assert_int_equal (errno, EIO);
  errno = 0;
  assert_int_equal (disk_delta_extent (&disk, o, 0, SIZE, &length, &flags),
                    -1);
  assert_int_equal (errno, EIO);
}

/* In the order of the directories, and found by whole names only. */
static void
test_list (void **state)
{
  static const char *const names[] = {
    "tuesday", "monday", "mon", "a", "zulu"
  };
  static const struct {
    const char *name;
    size_t length;
  } absent[] = {
    { "", 0 }, { "mo", 2 }, { "mond", 4 }, { "mondays", 7 }, { "Monday", 6 },
    { "monday\0", 7 }, { "zulu\0zulu", 9 }, { "zz", 2 }, { "\xff", 1 },
    { "\0", 1 },
  };
  struct disk_offers *list = disk_offers_get (&disk);
  size_t at;

  (void) state;
  assert_int_equal (disk_offers_nr (list), 5);
  for (size_t i = 0; i < 5; ++i) {
    const struct disk_offer *o = disk_offers_at (list, i);

    assert_string_equal (disk_bitmap_name (o), names[i]);
    assert_true (disk_offers_find (list, names[i], strlen (names[i]), &at));
    assert_int_equal (at, i);
    check_readable (o);
  }
  for (size_t i = 0; i < sizeof absent / sizeof absent[0]; ++i)
    assert_false (disk_offers_find (list, absent[i].name, absent[i].length,
                                    &at));
  /* What follows the name in memory does not matter. */
  assert_true (disk_offers_find (list, "monday", 3, &at));
  assert_int_equal (at, 2);
  assert_int_equal (disk_bitmap_granularity (disk_offers_at (list, 2)), 4096);
  disk_offers_put (list);
  assert_null (find ("sunday"));
}

/* A list that a client has taken stays what it was. */
static void
test_list_stays (void **state)
{
  struct disk_offers *before = disk_offers_get (&disk), *after;

  (void) state;
  offer_of (1);
  after = disk_offers_get (&disk);
  assert_int_equal (disk_offers_nr (after), 3);
  assert_int_equal (disk_offers_nr (before), 5);
  close_set (1);
  assert_string_equal (disk_bitmap_name (disk_offers_at (before, 4)), "zulu");
  disk_offers_put (after);
  disk_offers_put (before);
}

/* What a client has can be asked for its name, though the bitmap is gone. */
static void
test_outlives_bitmap (void **state)
{
  struct disk_offer *a = find ("a"), *zulu = find ("zulu");

  (void) state;
  offer_of (1);
  assert_null (find ("a"));
  close_set (1);
  assert_string_equal (disk_bitmap_name (a), "a");
  assert_int_equal (disk_bitmap_granularity (zulu), 65536);
  check_cut (a);
  disk_offer_put (a);
  disk_offer_put (zulu);
}

/* Even all of the disk may be closed. */
static void
test_outlives_disk (void **state)
{
  struct disk_offer *o = find ("monday");

  disk_bitmap_hold (o);
  teardown (state);
  check_readable (o);
  assert_string_equal (disk_bitmap_name (o), "monday");
  disk_bitmap_release (o);
  disk_offer_put (o);
  setup (state);
}

static const struct bitmap *
bitmap_of (const char *name)
{
  struct disk_offer *o = find (name);
  const struct bitmap *b = o->bitmap;

  disk_offer_put (o);
  return b;
}

/* Only who reads makes a bitmap busy, and stays while others come and go. */
static void
test_kept_with_holders (void **state)
{
  const struct bitmap *monday = bitmap_of ("monday"), *zulu;
  struct disk_offer *o = find ("monday"), *again;

  (void) state;
  zulu = bitmap_of ("zulu");
  assert_false (offers_is_held (&disk.offers, monday));
  disk_bitmap_hold (o);
  disk_bitmap_hold (o);
  assert_true (offers_is_held (&disk.offers, monday));
  assert_false (offers_is_held (&disk.offers, zulu));
  offer_of (1);
  assert_true (offers_is_held (&disk.offers, monday));
  assert_false (offers_is_held (&disk.offers, zulu));
  offer_of (2);
  again = find ("monday");
  assert_ptr_equal (again, o);
  disk_offer_put (again);
  check_readable (o);
  disk_bitmap_release (o);
  assert_true (offers_is_held (&disk.offers, monday));
  disk_bitmap_release (o);
  assert_false (offers_is_held (&disk.offers, monday));
  disk_offer_put (o);
}

/* A list that is prepared and not used changes nothing. */
static void
test_abandoned (void **state)
{
  struct disk_offer *a = find ("a");
  struct disk_offers *prepared = offers_prepare (sets, sizes, 1);

  (void) state;
  assert_non_null (prepared);
  offers_abandon (prepared);
  check_readable (a);
  disk_offer_put (a);
  a = find ("a");
  assert_non_null (a);
  disk_offer_put (a);
}

/* A list of the bitmaps of both sets.  Clients that read "monday" may not go
 * on with it.  Without the striped ones it has neither this nor "tuesday".
 */
static struct disk_offers *
prepare_anew (bool striped)
{
  struct offer_source all[5], sources[5];
  size_t nr = offer_sources_add (all, 0, sets[0], sizes[0]), n = 0;
  struct disk_offers *prepared;

  nr = offer_sources_add (all, nr, sets[1], sizes[1]);
  assert_int_equal (nr, 5);
  for (size_t i = 0; i < nr; ++i) {
    const char *name = bitmap_name (all[i].bitmap);

    if (strcmp (name, "monday") == 0)
      all[i].goes_on = false;
    if (striped || strstr (name, "day") == NULL)
      sources[n++] = all[i];
  }
  prepared = offers_prepare_from (sources, n);
  assert_non_null (prepared);
  return prepared;
}

/* A bitmap that was changed is offered anew. */
static void
test_cut (void **state)
{
  const struct bitmap *monday = bitmap_of ("monday");
  struct disk_offer *old = find ("monday"), *other = find ("mon"), *o;
  struct disk_offers *prepared = prepare_anew (true);

  (void) state;
  disk_bitmap_hold (old);
  disk_bitmap_hold (other);
  check_readable (old);
  offers_switch (&disk.offers, prepared);

  o = find ("monday");
  assert_ptr_not_equal (o, old);
  assert_ptr_equal (o->bitmap, monday);
  check_readable (o);
  check_cut (old);
  check_readable (other);
  assert_false (offers_is_held (&disk.offers, monday));
  assert_true (offers_is_held (&disk.offers, other->bitmap));
  disk_bitmap_release (old);
  disk_bitmap_release (other);
  disk_offer_put (old);
  disk_offer_put (other);
  disk_offer_put (o);
}

/* It was cut because its bitmap went, and the bitmap comes back. */
static void
test_comes_back (void **state)
{
  struct disk_offer *old = find ("a"), *o;

  (void) state;
  offer_of (1);
  check_cut (old);
  offer_of (2);
  o = find ("a");
  assert_ptr_not_equal (o, old);
  check_cut (old);
  check_readable (o);
  disk_offer_put (old);
  disk_offer_put (o);
}

/* The lower image covers a half of the disk. */
static void
test_sizes (void **state)
{
  struct disk_offer *a = find ("a");
  uint64_t ends[4];
  bool dirty;

  (void) state;
  assert_int_equal (disk_bitmap_runs (a, 0, SIZE, ends, 4, &dirty), 2);
  assert_false (dirty);
  assert_int_equal (ends[0], SIZE / 2);
  assert_int_equal (ends[1], SIZE);
  disk_offer_put (a);
}

/* Threads.  The bits of "monday" and "tuesday" change only while these are not
 * offered, so two reads of one offer find the same, or an error.  "mon"
 * changes, too, as by writes, and is never cut.
 */
#define NR_READERS 3
#define NR_ROUNDS 6000
#define NR_SEEN 1000

/* cmocka's assertions are for its own thread. */
#define expect(condition)                                               \
  do {                                                                  \
    if (!(condition)) {                                                 \
      fprintf (stderr, "line %d: not so: %s\n", __LINE__, #condition); \
      abort ();                                                         \
    }                                                                   \
  } while (0)

static atomic_bool changer_is_done;
static atomic_ulong nr_same, nr_errors, nr_gone;

struct runs {
  uint64_t ends[MAX_RUNS];
  size_t nr;
  bool first;
};

static bool
read_runs (const struct disk_offer *o, struct runs *r)
{
  errno = 0;
  r->nr = disk_bitmap_runs (o, 0, SIZE, r->ends, MAX_RUNS, &r->first);
  if (r->nr > 0) {
    expect (r->ends[r->nr - 1] == SIZE);
    return true;
  }
  expect (errno == EIO);
  atomic_fetch_add (&nr_errors, 1);
  return false;
}

static void
read_twice (const struct disk_offer *o, struct runs *r)
{
  if (strcmp (disk_bitmap_name (o), "mon") == 0) {
    expect (read_runs (o, &r[0]));
    return;
  }
  if (!read_runs (o, &r[0]) || !read_runs (o, &r[1]))
    return;
  expect (r[0].nr == r[1].nr && r[0].first == r[1].first);
  expect (memcmp (r[0].ends, r[1].ends,
                  r[0].nr * sizeof r[0].ends[0]) == 0);
  atomic_fetch_add (&nr_same, 1);
}

/* Some client, from its first option to its end. */
static void
be_client (uint64_t *seed, struct runs *r)
{
  static const char *const names[] = { "monday", "tuesday", "mon", "a" };
  const char *name = names[random_next (seed) % 4];
  struct disk_offers *list = disk_offers_get (&disk);
  struct disk_offer *o = NULL;
  size_t i;

  if (disk_offers_find (list, name, strlen (name), &i))
    o = disk_offer_get (disk_offers_at (list, i));
  for (i = 0; i < disk_offers_nr (list); ++i)
    expect (disk_bitmap_name (disk_offers_at (list, i))[0] != '\0');
  disk_offers_put (list);
  if (o == NULL) {
    expect (strcmp (name, "mon") != 0);
    atomic_fetch_add (&nr_gone, 1);
    return;
  }
  disk_bitmap_hold (o);
  for (unsigned n = random_next (seed) % 4; n > 0; --n)
    read_twice (o, r);
  expect (strcmp (disk_bitmap_name (o), name) == 0);
  disk_bitmap_release (o);
  disk_offer_put (o);
}

static void *
reader (void *seed)
{
  struct runs *r = calloc (2, sizeof *r);

  expect (r != NULL);
  while (!atomic_load (&changer_is_done))
    be_client (seed, r);
  free (r);
  return NULL;
}

static void
quiet (enum report_level level, const char *fmt, va_list args)
{
  (void) level;
  (void) fmt;
  (void) args;
}

/* Change bits while they are not offered: where a read comes to last. */
static void
change_bits (unsigned round)
{
  offers_switch (&disk.offers, prepare_anew (false));
  assert_int_equal (bitmap_set_mark (sets[0],
                                     SIZE - 1 - 2 * round * GRANULE % SIZE,
                                     1), 0);
}

static void
change (unsigned round)
{
  struct disk_offers *prepared;

  if (round % 3 == 0)
    change_bits (round);
  prepared = round % 3 == 1 ? prepare_anew (true)
    : offers_prepare (sets, sizes, 1 + round % 2);
  assert_non_null (prepared);
  if (round % 7 == 0)
    offers_abandon (prepared);
  else
    offers_switch (&disk.offers, prepared);
}

/* Have readers met each case often enough? */
static bool
was_seen (void)
{
  return nr_same >= NR_SEEN && nr_errors >= NR_SEEN && nr_gone >= NR_SEEN;
}

static void
test_threads (void **state)
{
  pthread_t threads[NR_READERS];
  uint64_t seeds[NR_READERS];
  struct disk_offer *mon = find ("mon"), *again;

  (void) state;
  report_sink = quiet;
  disk_bitmap_hold (mon);
  for (unsigned i = 0; i < NR_READERS; ++i) {
    seeds[i] = i + 1;
    assert_int_equal (pthread_create (&threads[i], NULL, reader, &seeds[i]),
                      0);
  }
  /* A round is short, and a machine may be slow to let the readers in. */
  for (unsigned round = 0;
       round < NR_ROUNDS || (round < 100 * NR_ROUNDS && !was_seen ());
       ++round) {
    change (round);
    assert_true (offers_is_held (&disk.offers, mon->bitmap));
  }
  atomic_store (&changer_is_done, true);
  for (unsigned i = 0; i < NR_READERS; ++i)
    pthread_join (threads[i], NULL);
  messages_install ();

  print_message ("%lu times the same, %lu errors, %lu times gone\n",
                 nr_same, nr_errors, nr_gone);
  assert_true (nr_same > 0 && nr_errors > 0 && nr_gone > 0);
  check_readable (mon);
  again = find ("mon");
  assert_ptr_equal (again, mon);
  disk_offer_put (again);
  disk_bitmap_release (mon);
  assert_false (offers_is_held (&disk.offers, mon->bitmap));
  disk_offer_put (mon);
}

int
main (void)
{
#define TEST(name) cmocka_unit_test_setup_teardown (name, setup, teardown)
  const struct CMUnitTest tests[] = {
    TEST (test_list),
    TEST (test_list_stays),
    TEST (test_outlives_bitmap),
    TEST (test_outlives_disk),
    TEST (test_kept_with_holders),
    TEST (test_abandoned),
    TEST (test_cut),
    TEST (test_comes_back),
    TEST (test_sizes),
    TEST (test_threads),
  };

  messages_install ();
  return cmocka_run_group_tests (tests, NULL, NULL);
}
