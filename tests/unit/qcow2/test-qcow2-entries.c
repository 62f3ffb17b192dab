/* nbdkit-dirty-bitmap-filter
 * SPDX-License-Identifier: BSD-3-Clause
 * Copyright the nbdkit-dirty-bitmap-filter authors
 */

/* The L2 cache is read without a lock: what is read is an entry as it was
 * at one time, whatever happens between any two loads of its words, and
 * nothing is believed between any two stores.
 *
 * The code under test is compiled here, with loads and stores that let
 * something happen before a chosen one of them; the linker finds it
 * before that of the library.
 */

#include <config.h>

#include <setjmp.h>
#include <stdarg.h>
#include <stdatomic.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <string.h>

#include <cmocka.h>

#include "common/meter.h"       /* count and ask nothing that is tested */
#include "qcow2/internal.h"     /* here */

/* What happens, before which load or store from now on. */
static void (*meanwhile) (void);
static int places_left = -1;

static void
place (void)
{
  if (places_left >= 0 && places_left-- == 0)
    meanwhile ();
}

static void (*at_each_store) (void);

static void
store_place (void)
{
  void (*const f) (void) = at_each_store;

  if (f == NULL)
    return;
  at_each_store = NULL;         /* looking stores something, too */
  f ();
  at_each_store = f;
}

#undef atomic_load_explicit
#undef atomic_store_explicit
#define atomic_load_explicit(object, order) \
  (place (), atomic_fetch_add (object, 0))
#define atomic_store_explicit(object, value, order) \
  (store_place (), (void) atomic_exchange (object, value))

#include "qcow2/l2-cache.c"

#include "image.h"

#define GIB (UINT64_C (1) << 30)
#define CACHE 65536             /* 16 slices, in one set */
#define NR_SLICES 40
#define NR 3                    /* entries that are read at once */

static struct container *c;
static struct qcow2 *q;
static uint64_t in_slice;       /* entries */
static struct l2_entry old[NR], new[NR];

/* The first entries of each slice are those of data.  Each has its own
 * descriptor, and in extended entries its own bitmap.
 */
static void
open_filled (const char *options)
{
  const struct qcow2_options o = { .cache_size = CACHE };
  uint8_t buf[4096] = { 1 };

  c = image_create (options, "1G", GIB);
  q = qcow2_open (c, &o);
  assert_non_null (q);
  assert_int_equal (q->l2.nr_sets, 1);
  in_slice = UINT64_C (1) << q->l2.slice_bits;
  for (uint64_t i = 0; i < NR_SLICES; ++i)
    for (uint64_t j = 0; j < NR; ++j)
      assert_int_equal
        (qcow2_write (q, buf, sizeof buf,
                      (i * in_slice + j) * q->cluster_size
                      + (i + j) % 4 * 4096), 0);
  assert_int_equal (qcow2_flush (q), 0);
}

static void
close_it (void)
{
  qcow2_close (q);
  container_close (c);
}

static void
set_old (void)
{
  assert_int_equal (l2_set (q, 0, NR, old), 0);
}

static void
set_new (void)
{
  assert_int_equal (l2_set (q, 0, NR, new), 0);
}

/* Put other slices into all slots. */
static void
replace_all (void)
{
  struct l2_entry entries[NR];

  for (uint64_t i = 1; i < NR_SLICES; ++i)
    assert_int_equal (l2_get (q, i * in_slice, NR, entries), 0);
}

/* And the one that is looked for back into its own. */
static void
bring_back (void)
{
  struct l2_entry entries[NR];

  assert_int_equal (l2_get (q, 0, NR, entries), 0);
}

static bool
equal (const struct l2_entry *a, const struct l2_entry *b)
{
  return a->descriptor == b->descriptor && a->bitmap == b->bitmap;
}

static void
assert_old_or_new (const struct l2_entry *entries, int at)
{
  for (unsigned i = 0; i < NR; ++i)
    if (!equal (&entries[i], &old[i]) && !equal (&entries[i], &new[i]))
      fail_msg ("place %d, entry %u: descriptor %#" PRIx64 ", bitmap %#"
                PRIx64, at, i, entries[i].descriptor, entries[i].bitmap);
}

/* Let it happen before each load in turn, until there is no such load. */
static void
disturb_reader (void (*prepare) (void), void (*happens) (void))
{
  struct l2_entry entries[NR];
  int at = 0;

  for (bool disturbed = true; disturbed; ++at) {
    prepare ();
    /* So that it is in the cache. */
    assert_int_equal (l2_get (q, 0, NR, entries), 0);
    meanwhile = happens;
    places_left = at;
    assert_int_equal (l2_get (q, 0, NR, entries), 0);
    disturbed = places_left < 0;
    places_left = -1;
    assert_old_or_new (entries, at);
  }
  /* A tag, the words, and the tag again. */
  assert_true (at > 2 + NR * (q->extended_l2 ? 2 : 1));
}

static void
nothing (void)
{
}

static void
take_entries (void)
{
  assert_int_equal (l2_get (q, 0, NR, old), 0);
  for (unsigned i = 0; i < NR; ++i)
    assert_int_not_equal (old[i].descriptor, 0);
  memset (new, 0, sizeof new);
}

static void
test_change_while_read (void **state)
{
  (void) state;
  open_filled ("-o extended_l2=on,cluster_size=16k");
  take_entries ();
  for (unsigned i = 0; i < NR; ++i)
    assert_int_not_equal (old[i].bitmap, 0);
  disturb_reader (set_old, set_new);
  /* And those where only the one word or the other changes. */
  for (unsigned i = 0; i < NR; ++i)
    new[i] = (struct l2_entry) { old[i].descriptor, ~old[i].bitmap };
  disturb_reader (set_old, set_new);
  close_it ();
}

static void
test_replacement_while_read (void **state)
{
  static const char *const options[] = {
    "-o cluster_size=16k", "-o extended_l2=on,cluster_size=16k",
  };

  (void) state;
  for (unsigned i = 0; i < 2; ++i) {
    open_filled (options[i]);
    take_entries ();
    memcpy (new, old, sizeof new);
    disturb_reader (nothing, replace_all);
    close_it ();
  }
}

/* A reader that comes while there is a writer. */
static unsigned nr_believed, nr_looks;

static void
look (void)
{
  struct l2_entry entries[NR];

  nr_looks++;
  if (peek (q, &q->l2.sets[0], 0, 0, NR, entries)) {
    nr_believed++;
    assert_old_or_new (entries, nr_looks);
  }
  /* It is none the less the next to be replaced. */
  for (unsigned way = 0; way < L2_WAYS; ++way)
    q->l2.sets[0].way[way].referenced = 0;
}

static void
look_meanwhile (void (*happens) (void))
{
  nr_looks = nr_believed = 0;
  at_each_store = look;
  happens ();
  at_each_store = NULL;
  assert_true (nr_looks > 2 * NR);
  assert_true (nr_believed > 0);
}

static void
test_read_while_changed (void **state)
{
  (void) state;
  open_filled ("-o extended_l2=on,cluster_size=16k");
  take_entries ();
  set_old ();
  look_meanwhile (set_new);
  look_meanwhile (set_old);
  close_it ();
}

static void
test_read_while_replaced (void **state)
{
  struct l2_entry entries[NR];

  (void) state;
  open_filled ("-o extended_l2=on,cluster_size=16k");
  take_entries ();
  memcpy (new, old, sizeof new);
  look_meanwhile (replace_all);
  assert_false (peek (q, &q->l2.sets[0], 0, 0, NR, entries));
  look_meanwhile (bring_back);
  close_it ();
}

int
main (void)
{
  const struct CMUnitTest tests[] = {
    cmocka_unit_test (test_change_while_read),
    cmocka_unit_test (test_replacement_while_read),
    cmocka_unit_test (test_read_while_changed),
    cmocka_unit_test (test_read_while_replaced),
  };

  if (run_command ("qemu-img --version >/dev/null 2>&1") != 0)
    return 77;
  report_sink = report_if_verbose;
  return cmocka_run_group_tests (tests, NULL, NULL);
}
