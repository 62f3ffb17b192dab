/* nbdkit-dirty-bitmap-filter
 * SPDX-License-Identifier: BSD-3-Clause
 * Copyright the nbdkit-dirty-bitmap-filter authors
 */

#ifndef DIRTY_BITMAP_TEST_IMAGE_H
#define DIRTY_BITMAP_TEST_IMAGE_H

/* Images made by qemu-img in a temporary file, and served to the tests
 * from memory; and what else most tests need.
 */

#include <stdarg.h>
#include <stdint.h>

#include "common/report.h"

struct container;

/* Run a command; the words are put together as by printf.  Returns its
 * exit status.
 */
extern int run_command (const char *fmt, ...)
  __attribute__ ((format (printf, 1, 2)));

/* A folder that is removed at exit, and the name of a file in it. */
extern const char *temp_folder (void);
extern const char *temp_file (const char *name);

/* qemu-img create -f qcow2 OPTIONS FILE SIZE, into memory.  The container
 * may grow up to limit bytes.
 */
extern struct container *image_create (const char *options, const char *size,
                                       uint64_t limit);

/* A file into memory. */
extern struct container *image_load (const char *file, uint64_t limit);

/* Memory into a file. */
extern void image_save (struct container *, const char *file);

/* Save it and let qemu-img check find errors (and leaks, if leaks_too). */
extern void image_check (struct container *, int leaks_too);

/* A report_sink: to stderr with VERBOSE in the environment, else nowhere. */
extern void report_if_verbose (enum report_level, const char *fmt, va_list);

/* A number from the environment; the value stays if there is none. */
extern void get_number (const char *name, uint64_t *value);

/* THOROUGH is in the environment, as it is in CI. */
extern bool is_thorough (void);

/* How often to do what is done again and again: as often as that in a thorough
 * run, and half as often in a plain one; in one with sanitizers
 * (UNDER_SANITIZERS in the environment), or under valgrind (UNDER_VALGRIND),
 * which look for what shows whenever the code is run at all, and not for wrong
 * results.
 */
extern unsigned how_often (unsigned thorough, unsigned with_sanitizers,
                           unsigned under_valgrind);

/* A small random number generator: same seed, same numbers. */
extern uint64_t random_next (uint64_t *state);

#endif /* DIRTY_BITMAP_TEST_IMAGE_H */
