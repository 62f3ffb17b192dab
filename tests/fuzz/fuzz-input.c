/* nbdkit-dirty-bitmap-filter
 * SPDX-License-Identifier: BSD-3-Clause
 * Copyright the nbdkit-dirty-bitmap-filter authors
 */

/* From an input to files. */

#include <config.h>

#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "common/bytes.h"
#include "common/report.h"
#include "fuzz.h"

bool
fuzz_next_run (const uint8_t **p, const uint8_t *end, struct fuzz_run *run)
{
  if (end - *p < FUZZ_RUN_HEAD)
    return false;

  const uint32_t place = get_be32 (*p);
  const size_t length = get_be16 (*p + 4);

  *p += FUZZ_RUN_HEAD;
  run->file = place >> 30;
  run->offset = (uint64_t) (place & 0x3fffffff) * FUZZ_OFFSET_UNIT
    % FUZZ_MAX_FILE;
  run->length = min_u64 (length, min_u64 (end - *p,
                                          FUZZ_MAX_FILE - run->offset));
  run->bytes = *p;
  *p += min_u64 (length, end - *p);
  return true;
}

void
fuzz_fill (struct container *c, enum fuzz_file file, const uint8_t *data,
           size_t size)
{
  const uint8_t *p = data;
  struct fuzz_run run;

  while (fuzz_next_run (&p, data + size, &run))
    if (run.file == file &&
        (container_reserve (c, run.offset + run.length) == -1 ||
         container_pwrite (c, run.bytes, run.length, run.offset) == -1))
      fuzz_fail ("cannot fill a container");
}

size_t
fuzz_bytes (enum fuzz_file file, const uint8_t *data, size_t size,
            uint8_t *bytes, size_t max)
{
  const uint8_t *p = data;
  struct fuzz_run run;
  size_t end = 0;

  memset (bytes, 0, max);
  while (fuzz_next_run (&p, data + size, &run))
    if (run.file == file && run.offset < max) {
      const size_t n = min_u64 (run.length, max - run.offset);

      memcpy (bytes + run.offset, run.bytes, n);
      end = max_u64 (end, run.offset + n);
    }
  return end;
}

struct container *
fuzz_open (enum fuzz_file file, const uint8_t *data, size_t size,
           uint64_t room)
{
  const uint8_t *p = data;
  struct fuzz_run run;
  struct container *c;
  uint64_t end = 0;

  while (fuzz_next_run (&p, data + size, &run))
    if (run.file == file)
      end = max_u64 (end, run.offset + run.length);
  if (end == 0)
    return NULL;
  c = container_open_memory (end + room);
  if (c == NULL)
    abort ();
  fuzz_fill (c, file, data, size);
  return c;
}

static void
swallow (enum report_level level, const char *fmt, va_list args)
{
  static _Thread_local char text[4096];
  static int verbose = -1;

  vsnprintf (text, sizeof text, fmt, args);
  if (verbose == -1)
    verbose = getenv ("FUZZ_VERBOSE") != NULL;
  if (verbose)
    fprintf (stderr, "%s: %s\n", level == REPORT_ERROR ? "error"
             : level == REPORT_WARNING ? "warning" : "debug", text);
}

void
fuzz_quiet (void)
{
  report_sink = swallow;
}

void
fuzz_fail (const char *fmt, ...)
{
  va_list args;

  va_start (args, fmt);
  fprintf (stderr, "%s: ", fuzz_target);
  vfprintf (stderr, fmt, args);
  fprintf (stderr, "\n");
  va_end (args);
  abort ();
}
