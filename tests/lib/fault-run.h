/* nbdkit-dirty-bitmap-filter
 * SPDX-License-Identifier: BSD-3-Clause
 * Copyright the nbdkit-dirty-bitmap-filter authors
 */

#ifndef DIRTY_BITMAP_TEST_FAULT_RUN_H
#define DIRTY_BITMAP_TEST_FAULT_RUN_H

/* Runs of a workload, with a fault of one kind at each place in turn
 * (fault-run.c says what must hold).
 */

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "fault-container.h"
#include "fault-workload.h"

/* A kind of fault. */
struct mode {
  const char *name;
  struct fault_plan plan;
  bool limits;                  /* one run for each size */
  bool below;                   /* only with something below */
  bool never_ends;

  /* Nothing is lacking but space: so nothing that was acknowledged is
   * lost, and all flushes succeed.  In the end comes a stop; or, if it is
   * cut off, a flush and no stop.
   */
  bool keeps;
  bool cut_off;
};

/* One place, or as many, gets a run of its own. */
extern unsigned fault_every;

/* Around all runs.  The end prints how many there were, and fails the
 * test if anything was wrong.
 */
extern void fault_runs_begin (void);
extern void fault_runs_end (void);

/* A workload that was made, with all faults of these kinds. */
extern void fault_runs (const struct workload *, const struct mode *,
                        size_t nr_modes);

/* If FAULT_RUN=WORKLOAD:MODE:PLACE is in the environment and names one of
 * them: this run alone, with its messages.  Else false.
 */
extern bool fault_run_chosen (const struct workload *, const struct mode *,
                              size_t nr_modes);

#endif /* DIRTY_BITMAP_TEST_FAULT_RUN_H */
