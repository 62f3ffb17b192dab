/* nbdkit-dirty-bitmap-filter
 * SPDX-License-Identifier: BSD-3-Clause
 * Copyright the nbdkit-dirty-bitmap-filter authors
 */

#ifndef DIRTY_BITMAP_FUZZ_H
#define DIRTY_BITMAP_FUZZ_H

/* What the fuzz targets share.  README.md says how to run them.
 *
 * The input of all of them but fuzz-control and fuzz-server is a list of runs
 * of bytes, each with the file and the offset where it goes, so that images
 * with large clusters are small inputs and what is in them is meaningful:
 *
 *   4 bytes   file << 30 | offset / 8
 *   2 bytes   length
 *   length bytes, or as many as are left
 *
 * all big endian.  A run of length 0 makes the file at least that long.
 * What no run covers is zeroes.
 */

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "container/container.h"

enum fuzz_file {
  FUZZ_IMAGE,
  FUZZ_BACKING,
  FUZZ_DATA_FILE,
  FUZZ_PROGRAM,                 /* what to do with them */
  FUZZ_NR_FILES,
};

#define FUZZ_RUN_HEAD 6
#define FUZZ_OFFSET_UNIT 8

/* Offsets are taken modulo this: no input makes a file that is longer. */
#define FUZZ_MAX_FILE (UINT64_C (64) << 20)

/* The next run at *p, which moves behind it.  False at the end. */
struct fuzz_run {
  enum fuzz_file file;
  uint64_t offset;
  size_t length;
  const uint8_t *bytes;
};
extern bool fuzz_next_run (const uint8_t **p, const uint8_t *end,
                           struct fuzz_run *);

/* Write all runs of a file into a container, which can hold them. */
extern void fuzz_fill (struct container *, enum fuzz_file,
                       const uint8_t *data, size_t size);

/* The bytes of a file, up to max of them.  Returns how many. */
extern size_t fuzz_bytes (enum fuzz_file, const uint8_t *data, size_t size,
                          uint8_t *bytes, size_t max);

/* The file as a container that can grow by room, or NULL if the input
 * has none.
 */
extern struct container *fuzz_open (enum fuzz_file, const uint8_t *data,
                                    size_t size, uint64_t room);

/* Have messages made, so that a wrong one is found, and not shown, but
 * where FUZZ_VERBOSE is set in the environment.
 */
extern void fuzz_quiet (void);

/* Say what does not hold, and abort: that is a finding. */
extern void fuzz_fail (const char *fmt, ...)
  __attribute__ ((format (printf, 1, 2), noreturn));
#define FUZZ_CHECK(what, ...)                   \
  do {                                          \
    if (!(what))                                \
      fuzz_fail (__VA_ARGS__);                  \
  } while (0)

/* The name of the target, and of the folder of its corpus. */
extern const char fuzz_target[];

/* What a target does at the end of the process, if it has anything to. */
extern void fuzz_finish (void);

/* libFuzzer's side. */
extern int LLVMFuzzerInitialize (int *argc, char ***argv);
extern int LLVMFuzzerTestOneInput (const uint8_t *data, size_t size);
extern size_t LLVMFuzzerMutate (uint8_t *data, size_t size, size_t max);
extern size_t LLVMFuzzerCustomMutator (uint8_t *data, size_t size,
                                       size_t max, unsigned seed);

/* fuzz-mutate.c: change a list of runs so that it stays one. */
extern size_t fuzz_mutate_runs (uint8_t *data, size_t size, size_t max,
                                unsigned seed);

#endif /* DIRTY_BITMAP_FUZZ_H */
