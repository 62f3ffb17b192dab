/* nbdkit-dirty-bitmap-filter
 * SPDX-License-Identifier: BSD-3-Clause
 * Copyright the nbdkit-dirty-bitmap-filter authors
 */

/* The test of the crash test.
 *
 * This program is linked with libbrokenorder, where each rule of the
 * order of writes (qcow2/order.h) can be broken.  Under each broken rule
 * random universes are run, on a kind of image that gives the rule
 * something to do, and the states that crashes may leave are judged as
 * test-crash judges them, until one is found wrong in the way that the
 * rule is there to prevent.  A rule that protects several things is
 * broken once for each.  If no state is found wrong, or the kind is
 * wrong with the rules kept, the test fails.
 *
 * The seeds are fixed.  ORDER_SEED is another one, ORDER_RULE the only
 * rule to be broken; ORDER_TIMES says how often each is broken, with new
 * seeds.
 */

#include <config.h>

#include <inttypes.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include <cmocka.h>

#include "common/report.h"
#include "crash-universe.h"
#include "image.h"
#include "qcow2/order.h"

#define STATES_PER_UNIVERSE 120

/* A rule that is not caught in so many states is not caught. */
#define MAX_STATES 30000

int broken_order = -1;

static uint64_t first_seed = 1, times = 1;

struct trial {
  int rule;
  const char *name;
  const char *kind;             /* a part of its options; NULL if it takes
                                   no universe, but crash-blocks.c */
  const char *symptom;          /* a part of what is wrong */
  unsigned nr_threads;          /* 1 if 0 */
  unsigned nr_requests;         /* 120 if 0 */
  bool create;                  /* a bitmap */
  bool keep;
  bool beside;                  /* the disk is beside the image */
};

#define BREAK(r, k, s, ...) \
  { .rule = ORDER_##r, .name = #r, .kind = k, .symptom = s, __VA_ARGS__ }

static const struct trial trials[] = {
  BREAK (AUTOCLEAR_BEFORE_CHANGE, "refcount_bits=1",
         "an unknown autoclear bit is set"),
  BREAK (EXTENSION_BEFORE_MAGIC, "refcount_bits=8", "a header extension of",
         .create = true),
  BREAK (EXTENSION_BEFORE_AUTOCLEAR, "refcount_bits=8",
         "there are no bitmaps", .create = true),
  BREAK (EXTENSION_BEFORE_AUTOCLEAR, "refcount_bits=32",
         "directory entry", .create = true),
  BREAK (DISTRUST_WHILE_PATCHING, "refcount_bits=32",
         "directory entry", .create = true),
  BREAK (DIRECTORY_BEFORE_HEADER, "cluster_size=512", "directory entry",
         .create = true),
  BREAK (DIRECTORY_BEFORE_HEADER, "cluster_size=512", "a cluster of bits at",
         .create = true),
  BREAK (DIRECTORY_BEFORE_HEADER, "cluster_size=512",
         "has the refcount 0 and is used", .create = true),
  BREAK (TABLE_BEFORE_HEADER, "cluster_size=512,refcount_bits=64",
         "refcount table entry"),
  BREAK (BLOCK_BEFORE_TABLE_ENTRY, NULL, "a refcount block"),
  BREAK (COUNTING_ENTRY_FIRST, NULL, "has the refcount 0 and is used"),
  BREAK (REFCOUNTS_BEFORE_REFERENCES, "cluster_size=64k",
         "has the refcount 0 and is used"),
  BREAK (DATA_BEFORE_REFERENCES, "cluster_size=64k", "neither old nor new"),
  BREAK (DATA_BEFORE_REFERENCES, "cluster_size=64k",
         "has the refcount 0 and is used"),
  BREAK (DATA_BEFORE_REFERENCES, "cluster_size=512", "L2 entry"),
  BREAK (DATA_BEFORE_REFERENCES, "cluster_size=4k", "is not marked"),
  BREAK (REFERENCES_BEFORE_RETURN, "cluster_size=64k",
         "neither old nor new"),
  BREAK (REFERENCES_BEFORE_RETURN, "cluster_size=512", "is not marked"),
  BREAK (SETTLED_BEFORE_RETURN, "cluster_size=512",
         "not as it should be after a clean stop", .nr_requests = 4),
  BREAK (REFERENCES_BEFORE_FREE, "cluster_size=64k",
         "is wrong about being copied"),
  BREAK (REFERENCES_BEFORE_FREE, "cluster_size=64k", "neither old nor new",
         .nr_threads = 3),
  BREAK (RELEASED_BEFORE_FLUSH, "cluster_size=64k", "neither old nor new",
         .nr_threads = 3),
  BREAK (MARK_BEFORE_CHANGE, "cluster_size=4k", "is not marked"),
  BREAK (IN_USE_BEFORE_CHANGE, "cluster_size=64k", "is not marked"),
  BREAK (ENTRIES_BEFORE_CLEARED, "cluster_size=512", "is not marked"),
  BREAK (MARK_BEFORE_CHANGE, "cluster_size=4k", "is not marked",
         .keep = true),
  BREAK (AHEAD_BEFORE_CHANGE, "cluster_size=64k", "is not marked",
         .keep = true),
  BREAK (FUA_BEFORE_RETURN, "cluster_size=64k", "neither old nor new"),
  BREAK (NAME_BEFORE_OFFSET, "cluster_size=4k,backing_fmt=raw",
         "the backing file's name", .create = true),
  BREAK (NAME_BEFORE_OFFSET, "cluster_size=1k,backing_fmt=qcow2",
         "the backing file's name", .create = true),
  BREAK (DATA_BEFORE_REFERENCES, "data_file", "neither old nor new"),
  BREAK (DATA_BEFORE_REFERENCES, "extended_l2=on", "neither old nor new"),
  BREAK (DATA_BEFORE_REFERENCES, "extended_l2=on,backing_fmt=raw",
         "neither old nor new"),
  BREAK (AUTOCLEAR_BEFORE_CHANGE, "cluster_size=64k",
         "an unknown autoclear bit is set", .beside = true),
  BREAK (DIRECTORY_BEFORE_HEADER, "cluster_size=512", "directory entry",
         .beside = true, .create = true),
  BREAK (REFCOUNTS_BEFORE_REFERENCES, "cluster_size=512",
         "has the refcount 0 and is used", .beside = true),
  BREAK (DATA_BEFORE_REFERENCES, "cluster_size=4k", "is not marked",
         .beside = true),
  BREAK (REFERENCES_BEFORE_RETURN, "cluster_size=512", "is not marked",
         .beside = true),
  BREAK (SETTLED_BEFORE_RETURN, "cluster_size=512",
         "not as it should be after a clean stop", .beside = true,
         .nr_requests = 4),
  BREAK (MARK_BEFORE_CHANGE, "cluster_size=4k", "is not marked",
         .beside = true),
  BREAK (MARK_BEFORE_CHANGE, "cluster_size=4k", "is not marked",
         .beside = true, .keep = true),
  BREAK (IN_USE_BEFORE_CHANGE, "cluster_size=4k", "is not marked",
         .beside = true),
  BREAK (ENTRIES_BEFORE_CLEARED, "cluster_size=512", "is not marked",
         .beside = true),
  BREAK (AHEAD_BEFORE_CHANGE, "cluster_size=4k", "is not marked",
         .beside = true, .keep = true),
  BREAK (FUA_BEFORE_RETURN, "cluster_size=4k", "neither old nor new",
         .beside = true),
};

struct search {
  const struct trial *trial;
  uint64_t nr_states, nr_wrong;
  bool found;
};

/* Without the rule broken every state is as it should be, and with it
 * some may be wrong in ways that another trial looks for.
 */
static bool
visit_state (struct universe *u, const struct crash_image *state,
             bool stopped, void *opaque)
{
  struct search *s = opaque;
  struct checked k;
  const char *error = (stopped ? stopped_error : state_error) (u, &k, state);

  s->nr_states++;
  if (error != NULL) {
    s->nr_wrong++;
    if (getenv ("VERBOSE") != NULL)
      fprintf (stderr, "%s: %s\n", s->trial->name, error);
    if (broken_order == -1)
      give_up (u, "moment %zu, with all rules kept: %s", u->model->moment,
               error);
    s->found = strstr (error, s->trial->symptom) != NULL;
  }
  checked_free (&k);
  return !s->found;
}

static struct kind *
find_kind (const struct trial *t)
{
  for (size_t i = 0; i < nr_kinds; ++i)
    if (kinds[i].beside == t->beside &&
        strstr (kinds[i].options, t->kind) != NULL)
      return &kinds[i];
  fail_msg ("there is no kind %s", t->kind);
  return NULL;
}

static void
run_universe (struct search *s, uint64_t seed)
{
  const struct trial *t = s->trial;
  struct universe u = {
    .kind = find_kind (t), .seed = seed, .number = seed,
    .nr_threads = t->nr_threads ? t->nr_threads : 1,
    .nr_requests = t->nr_requests ? t->nr_requests : 120, .unit = 2048,
    .keep = t->keep,
  };

  universe_begin (&u, &u.kind->image, t->create ? "new" : NULL);
  run_workload (&u);
  visit_states (&u, STATES_PER_UNIVERSE, visit_state, s);
  universe_end (&u);
}

static bool
report (const struct trial *t, bool found, uint64_t nr_states)
{
  print_message ("%s: %s %" PRIu64 ": %s\n", t->name,
                 found ? "caught in state" : "NOT CAUGHT in", nr_states,
                 t->symptom);
  return found;
}

static bool
run_blocks (const struct trial *t)
{
  unsigned nr_states;
  const char *error;

  broken_order = t->rule;
  error = crash_refcount_blocks (&nr_states);
  broken_order = -1;
  return report (t, error != NULL && strstr (error, t->symptom) != NULL,
                 nr_states);
}

static bool
run_trial (const struct trial *t, uint64_t seed)
{
  struct search s = { .trial = t };

  if (t->kind == NULL)
    return run_blocks (t);

  /* The kind itself is not at fault. */
  run_universe (&s, seed);
  s.nr_states = 0;

  broken_order = t->rule;
  while (!s.found && s.nr_states < MAX_STATES)
    run_universe (&s, random_next (&seed));
  broken_order = -1;
  return report (t, s.found, s.nr_states);
}

static void
test_each_rule (void **state)
{
  const size_t nr_trials = sizeof trials / sizeof trials[0];
  const char *only = getenv ("ORDER_RULE");
  bool tried[NR_ORDER_RULES] = { false };
  uint64_t seed = first_seed;
  bool all = true;

  (void) state;
  make_kinds ();
  for (uint64_t n = 0; n < times; ++n)
    for (size_t i = 0; i < nr_trials; ++i) {
      tried[trials[i].rule] = true;
      if (only == NULL || strcmp (only, trials[i].name) == 0)
        all &= run_trial (&trials[i], random_next (&seed));
    }
  for (size_t i = 0; i < NR_ORDER_RULES; ++i)
    if (!tried[i])
      fail_msg ("rule %zu of qcow2/order.h is never broken", i);
  free_kinds ();
  assert_true (all);
}

static void
quiet (enum report_level level, const char *fmt, va_list args)
{
  (void) level;
  (void) fmt;
  (void) args;
}

int
main (void)
{
  const struct CMUnitTest tests[] = {
    cmocka_unit_test (test_each_rule),
  };

  if (run_command ("qemu-img --version >/dev/null 2>&1 && "
                   "qemu-io --version >/dev/null 2>&1") != 0)
    return 77;
  report_sink = quiet;
  get_number ("ORDER_SEED", &first_seed);
  get_number ("ORDER_TIMES", &times);
  print_message ("ORDER_SEED=%" PRIu64 "\n", first_seed);
  return cmocka_run_group_tests (tests, NULL, NULL);
}
