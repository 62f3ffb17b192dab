/* nbdkit-dirty-bitmap-filter
 * SPDX-License-Identifier: BSD-3-Clause
 * Copyright the nbdkit-dirty-bitmap-filter authors
 */

#ifndef DIRTY_BITMAP_PARAMETERS_H
#define DIRTY_BITMAP_PARAMETERS_H

/* The parameters of the filter. */

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "disk/disk.h"
#include "nbd/nbd.h"
#include "nbdkit/listen.h"

enum server_mode { SERVER_AUTO, SERVER_ON, SERVER_FORCE, SERVER_OFF };

struct names {
  char **name;
  size_t nr;
};

struct parameters {
  struct names require;         /* dirty-bitmap */
  struct names expose;          /* dirty-bitmap-expose */
  struct names allow;           /* dirty-bitmap-allow-path, true paths */
  uint32_t granularity;         /* dirty-bitmap-granularity, or 0 */
  uint64_t cache_size;          /* dirty-bitmap-cache-size */
  enum server_mode server;      /* dirty-bitmap-server */
  char *snapshot;               /* dirty-bitmap-snapshot, or NULL */
  char *exportname;             /* dirty-bitmap-exportname, or NULL */
  char *description;            /* dirty-bitmap-description, or NULL */
  bool list_deltas;             /* dirty-bitmap-delta */
  bool keep;                    /* dirty-bitmap-crash=keep, the default */
  enum disk_zeroes detect_zeroes; /* dirty-bitmap-detect-zeroes */
  bool is_top_alone;            /* dirty-bitmap-backing=off */
  char *image;                  /* dirty-bitmap-image, absolute, or NULL */
  char *stats;                  /* dirty-bitmap-stats, absolute, or NULL */
  unsigned stats_interval;      /* dirty-bitmap-stats-interval, or 0 */
  bool listens;                 /* dirty-bitmap-listen */
  struct listen_address listen;
  bool is_controlled;           /* dirty-bitmap-control */
  struct listen_address control;
  char *node;                   /* dirty-bitmap-node, or NULL */
  char *scratch;                /* dirty-bitmap-scratch, true path, or NULL */
  uint64_t scratch_size;        /* dirty-bitmap-scratch-size, or 0 */
  uint64_t view_memory;         /* dirty-bitmap-view-memory */

  bool exit_last;               /* dirty-bitmap-exit-last */

  /* dirty-bitmap-max-connections and others; 0: not given. */
  struct nbd_limits limits;

  bool cache_size_given, crash_given, delta_given, server_given;
  bool idle_timeout_given, detect_zeroes_given, backing_given;
  bool exit_last_given, when_full_given;
};

#define PARAMETERS_DEFAULT_CACHE_SIZE ((uint64_t) 40 << 20)
#define PARAMETERS_DEFAULT_VIEW_MEMORY DISK_DEFAULT_VIEW_MEMORY

/* Take a parameter.  1 if it belongs to this filter, 0 if not, or -1 with
 * the reason reported.
 */
extern int parameters_take (struct parameters *,
                            const char *key, const char *value);

/* All parameters have been taken: fill in the defaults.  -1, with the reason
 * reported, if they contradict each other.
 */
extern int parameters_complete (struct parameters *);
extern void parameters_free (struct parameters *);

extern const char parameters_help[];

#endif /* DIRTY_BITMAP_PARAMETERS_H */
