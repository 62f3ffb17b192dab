/* nbdkit-dirty-bitmap-filter
 * SPDX-License-Identifier: BSD-3-Clause
 * Copyright the nbdkit-dirty-bitmap-filter authors
 */

#ifndef DIRTY_BITMAP_TEST_CRASH_UNIVERSE_H
#define DIRTY_BITMAP_TEST_CRASH_UNIVERSE_H

/* A universe: an image of some kind, and a random workload on it. */

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "crash-check.h"
#include "crash-container.h"
#include "crash-model.h"
#include "disk/disk.h"
#include "qcow2/qcow2.h"

struct container;

/* A kind of image. */
struct kind {
  const char *options;
  uint64_t disk_mib;
  unsigned disk_rest;           /* bytes of the disk, besides */
  uint64_t room_mib;            /* that the image can grow to */
  bool bare;                    /* it has no bitmaps */
  unsigned pad;                 /* bytes of a header extension nobody knows,
                                   by which the next crosses a sector; and
                                   garbage behind the last one */
  bool unknown_autoclear;       /* a bit that nobody knows is set */
  uint64_t filler_kib;          /* data at the end of the disk, so that
                                   refcounts run out soon */
  unsigned snapshots;           /* how many it has */
  const char *backing;          /* the format of its backing file, which
                                   ends inside of a window, or NULL */
  unsigned name_bytes;          /* of the backing file's name, at least */
  bool data_file;               /* its guest data are in another file */
  bool beside;                  /* the disk is beside it */
  bool ours;                    /* qcow2_create makes it */
  bool damaged;                 /* its bitmaps are */
  struct model_windows windows;
  struct crash_backing bytes_below;
  struct container *backing_container;
  struct qcow2_layer below;     /* the backing file, open */
  struct crash_image image;
  struct crash_image left;      /* by a crash, size 0 if none was yet */
};

/* The kinds that there are, once they are made. */
extern struct kind kinds[];
extern const size_t nr_kinds;
extern void make_kinds (void);
extern void free_kinds (void);

/* The file name of a kind's data file, as the image has it. */
extern const char *data_file_name (const struct kind *);

struct universe {
  struct kind *kind;
  uint64_t seed;                /* it has */
  uint64_t number;              /* the seed it began with */
  struct crash_log *log;
  struct model *model;
  struct disk *disk;
  struct container *data;       /* the disk's data file, or the disk beside
                                   the image, or NULL */
  struct disk_client client;
  const char *create;           /* a bitmap to be created, or NULL */
  unsigned nr_threads;
  unsigned nr_requests;         /* by each thread */
  uint64_t unit;                /* how threads share a window, bytes */
  bool keep;                    /* bitmaps are never marked */
  bool may_fail;
  bool stopped;                 /* cleanly, at the end */
  bool leaks;                   /* there were some in the beginning */
};

/* Say what is wrong, and exit: fail_msg is for the first thread only. */
extern void give_up (const struct universe *, const char *fmt, ...)
  __attribute__ ((format (printf, 2, 3), noreturn));

/* A random number. */
extern uint64_t any (uint64_t *seed, uint64_t below);

/* Make the log and the model of a universe that begins with an image, and
 * free them.  A bitmap that is in the image, or cannot be, is not created.
 */
extern void universe_begin (struct universe *, const struct crash_image *,
                            const char *create);
extern void universe_end (struct universe *);

/* Open the disk of a log, with what it needs besides the image, and
 * close it.
 */
extern struct disk *open_logged_disk (const struct universe *,
                                      struct crash_log *,
                                      const struct disk_options *,
                                      struct container **data);
extern void close_logged_disk (struct disk *, struct container *data);

/* Open the disk, run all requests, and stop or just close it. */
extern void run_workload (struct universe *);

/* What is wrong with what a crash, or a clean stop, has left; NULL if
 * nothing is.
 */
extern const char *state_error (struct universe *, struct checked *,
                                const struct crash_image *);
extern const char *stopped_error (struct universe *, struct checked *,
                                  const struct crash_image *);

/* Does the next open know all that the clusters of an image are used
 * for, so that leaks can be proven?
 */
extern bool leaks_are_provable (const struct universe *,
                                const struct checked *);

/* After run_workload: visit nr states in which a crash may leave the
 * image, and some after a clean stop, if there was one, and a power cut.
 * It ends where visit returns false.
 */
typedef bool visit_fn (struct universe *, const struct crash_image *state,
                       bool stopped, void *opaque);
extern void visit_states (struct universe *, size_t nr, visit_fn *,
                          void *opaque);

/* Compare the windows as the disk serves them with the image, or, if
 * that is NULL, with the model.
 */
extern void compare_served (const struct universe *, struct disk *,
                            const struct checked *);

/* Make many refcount blocks that count each other, and crash everywhere.
 * NULL, or what is wrong with the last of nr_states.
 */
extern const char *crash_refcount_blocks (unsigned *nr_states);

#endif /* DIRTY_BITMAP_TEST_CRASH_UNIVERSE_H */
