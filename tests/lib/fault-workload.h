/* nbdkit-dirty-bitmap-filter
 * SPDX-License-Identifier: BSD-3-Clause
 * Copyright the nbdkit-dirty-bitmap-filter authors
 */

#ifndef DIRTY_BITMAP_TEST_FAULT_WORKLOAD_H
#define DIRTY_BITMAP_TEST_FAULT_WORKLOAD_H

/* The images and requests that faults are tried on. */

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "crash-container.h"
#include "crash-model.h"

enum step_kind {
  STEP_END,
  STEP_READ,
  STEP_WRITE,
  STEP_ZERO,
  STEP_ZERO_KEEP,               /* ... and leave it allocated */
  STEP_ZERO_FAST,               /* ... or say that it is not fast */
  STEP_TRIM,
  STEP_FLUSH,
  STEP_REOPEN,                  /* a clean stop, and another start */
};

struct step {
  enum step_kind kind;
  uint64_t offset, count;
  bool fua;
};

struct workload {
  const char *name;
  const char *options;          /* of qemu-img create */
  const char *size;
  const char *files;            /* shell commands that make the raw file
                                   below the image, $b; or NULL */
  bool data_file;               /* it has one, $d */
  bool beside;                  /* $d is the disk, and the image has only its
                                   bitmaps */
  bool keep;                    /* bits are written ahead */
  const char *make;             /* shell commands, the image is $f */
  uint64_t garbage;             /* bytes at the end, free and not zero */
  const char *create;           /* a bitmap, when it is opened */
  struct model_windows windows;

  /* It writes whole clusters only, with no FUA: then a client can write
   * again all that a failed flush may have lost.
   */
  bool whole;
  bool by_qemu;                 /* our own checker does not know this: QEMU
                                   has to say whether it is sound, and
                                   what it holds is read by serving it */
  bool dirty;                   /* it is marked so */
  bool leaks;                   /* it has some */
  bool changes_first;           /* the first 4 KiB of the disk can not be
                                   relied on to stay allocated */
  struct step steps[32];

  /* Once it is made; of the others the size is 0 if there is none. */
  struct crash_image image, below, data;
};

extern struct workload workloads[];
extern const size_t nr_workloads;
extern void make_workload (struct workload *);
extern void free_workload (struct workload *);

/* What images can grow to. */
#define FAULT_ROOM (UINT64_C (5) << 20)

#endif /* DIRTY_BITMAP_TEST_FAULT_WORKLOAD_H */
