/* nbdkit-dirty-bitmap-filter
 * SPDX-License-Identifier: BSD-3-Clause
 * Copyright the nbdkit-dirty-bitmap-filter authors
 */

#ifndef DIRTY_BITMAP_STATS_H
#define DIRTY_BITMAP_STATS_H

/* Statistics: what clients asked for, counted by the code that answers them
 * (nbd/, or nbdkit/ where nbdkit's server answers), and the numbers of the
 * disk, written out together.
 *
 * Every function may be called from any thread at any time.  The functions
 * that count do nothing if the statistics are NULL, that is, if the user did
 * not ask for any.
 */

#include <stdint.h>
#include <stdio.h>

#include "common/meter.h"

struct disk;
struct stats;

/* The protocol's commands.  Any other is unknown. */
enum stats_command {
  STATS_READ,
  STATS_WRITE,
  STATS_FLUSH,
  STATS_TRIM,
  STATS_CACHE,
  STATS_WRITE_ZEROES,
  STATS_BLOCK_STATUS,
  STATS_UNKNOWN,
  STATS_NR_COMMANDS,
};

/* NULL with errno.  Durations are counted only if meter_is_on. */
extern struct stats *stats_new (void);
extern void stats_free (struct stats *);

extern void stats_count_request (struct stats *, uint64_t began,
                                 enum stats_command, uint64_t bytes, int err);

/* A request was received whole.  Returns the time for stats_end, in
 * nanoseconds (meter_clock); 0 if nothing is counted.
 */
static inline uint64_t
stats_begin (const struct stats *s)
{
  return __builtin_expect (s != NULL, 0) ? meter_clock () : 0;
}

/* The request is done.  err is an errno, or 0 if it succeeded.  bytes is
 * the length of its range, and counts only if it succeeded.
 */
static inline void
stats_end (struct stats *s, uint64_t began, enum stats_command command,
           uint64_t bytes, int err)
{
  if (__builtin_expect (s != NULL, 0))
    stats_count_request (s, began, command, bytes, err);
}

extern void stats_connection_opened (struct stats *);
extern void stats_connection_closed (struct stats *);
extern void stats_connection_refused (struct stats *);

/* Tell these statistics, and the disk's: each metric (its name has no prefix,
 * and its type is Prometheus's), and then its samples.  -1 with errno.
 */
enum stats_unit {
  STATS_NUMBER,
  STATS_SECONDS,                /* the value is in nanoseconds */
  STATS_NONE,                   /* there is no value yet */
};

struct stats_sample {
  const char *suffix;           /* of the metric's name, or "" */
  unsigned nr_labels;
  struct { const char *name, *text; } label[2];
  enum stats_unit unit;
  uint64_t value;
};

struct stats_output {
  void (*metric) (struct stats_output *, const char *name, const char *type,
                  const char *help);
  void (*sample) (struct stats_output *, const struct stats_sample *);
};
extern int stats_tell (struct stats *, struct disk *, struct stats_output *);

/* Write all that, in Prometheus's text format,
 * version 0.0.4
 * (https://prometheus.io/docs/instrumenting/exposition_formats/).  -1 with
 * errno; fclose reports an error of the stream itself.
 */
extern int stats_write (struct stats *, struct disk *, FILE *);

/* The value of a label: quoted, and escaped so that any bytes give valid
 * UTF-8 and different bytes give different values.  Bytes that are not
 * UTF-8, control characters, and a backslash before an x become \xNN.
 */
extern void stats_write_label (FILE *, const char *value);

#endif /* DIRTY_BITMAP_STATS_H */
