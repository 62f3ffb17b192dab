/* nbdkit-dirty-bitmap-filter
 * SPDX-License-Identifier: BSD-3-Clause
 * Copyright the nbdkit-dirty-bitmap-filter authors
 */

/* Open whatever it is, read-only, and read what can be reached: the
 * files that it names, its extents from the first to the last, data in
 * each of them, the bitmaps' runs, its first snapshot.  Reading changes
 * nothing.
 */

#include <config.h>

#include <stdlib.h>
#include <string.h>

#include "bitmap/bitmap.h"
#include "common/bytes.h"
#include "fuzz.h"
#include "qcow2/qcow2.h"

const char fuzz_target[] = "image-read";

/* An image may claim any size, so all is bounded. */
#define MAX_EXTENTS 128
#define MAX_READ 65536
#define MAX_RUNS 4096

/* What a client asks for at most. */
#define MAX_REQUEST (UINT64_C (1) << 32)

static uint8_t buf[MAX_READ];

static void
read_at (struct qcow2 *q, uint64_t offset, uint64_t count)
{
  count = min_u64 (count, min_u64 (MAX_READ, qcow2_size (q) - offset));
  if (count == 0)
    return;
  qcow2_read (q, buf, count, offset);
  qcow2_cache (q, count, offset);
}

/* Walk the extents, and read a little of each. */
static void
walk (struct qcow2 *q)
{
  const uint64_t size = qcow2_size (q);
  uint64_t offset = 0, length;

  for (int i = 0; i < MAX_EXTENTS && offset < size; ++i) {
    const uint64_t limit = offset + min_u64 (MAX_REQUEST, size - offset);
    enum qcow2_extent_type type;
    unsigned depth;

    if (qcow2_extent (q, offset, limit, &length, &type, &depth) == -1)
      length = min_u64 (qcow2_cluster_size (q), limit - offset);
    FUZZ_CHECK (length > 0 && length <= limit - offset,
                "an extent of %llu bytes", (unsigned long long) length);
    read_at (q, offset, length);
    read_at (q, offset + length - min_u64 (length, 512), 1000);
    offset += length;
  }
  if (size > 0) {
    read_at (q, size - 1, 1);
    read_at (q, size / 2 + 7, 12345);
  }
}

static void
walk_bitmaps (struct qcow2 *q)
{
  const struct bitmap_options options = { 0 };
  struct bitmap_set *set = bitmap_set_open (q, &options);

  if (set == NULL)
    return;
  for (size_t i = 0; i < bitmap_set_nr_exposed (set); ++i) {
    const struct bitmap *b = bitmap_set_exposed (set, i);
    uint64_t offset = 0;
    bool dirty;

    FUZZ_CHECK (bitmap_name (b)[0] != '\0', "a bitmap without a name");
    for (int runs = 0; runs < MAX_RUNS && offset < qcow2_size (q); ++runs)
      offset += bitmap_run (b, offset, qcow2_size (q), &dirty);
  }
  bitmap_set_close (set);
}

static void
look (struct container *c, const struct qcow2_options *options)
{
  struct qcow2 *q = qcow2_open (c, options);

  if (q == NULL)
    return;
  walk (q);
  walk_bitmaps (q);
  qcow2_close (q);
}

static int
refuse_change (void *opaque, const char *operation, uint64_t offset,
               uint64_t count)
{
  (void) opaque;
  (void) offset;
  (void) count;
  fuzz_fail ("%s of an image that is opened read-only", operation);
}

int
LLVMFuzzerTestOneInput (const uint8_t *data, size_t size)
{
  static const struct container_memory_hook hook = { .before = refuse_change };
  struct qcow2_options options = { .readonly = true, .cache_size = 65536 };
  struct container *c = fuzz_open (FUZZ_IMAGE, data, size, 0);
  struct container *backing = NULL;
  struct qcow2_references names;

  if (c == NULL)
    return 0;
  fuzz_quiet ();
  container_memory_set_hook (c, &hook);
  if (qcow2_read_references (c, &names) == 0) {
    if (names.backing_name != NULL)
      backing = fuzz_open (FUZZ_BACKING, data, size, 0);
    if (names.has_data_file)
      options.data_file = fuzz_open (FUZZ_DATA_FILE, data, size, 0);
    if (backing != NULL &&
        (names.backing_format == NULL ||
         strcmp (names.backing_format, "qcow2") == 0)) {
      const struct qcow2_options below = {
        .readonly = true, .cache_size = 65536,
      };

      options.backing.image = qcow2_open (backing, &below);
    }
    if (backing != NULL && options.backing.image == NULL)
      options.backing.raw = backing;
    qcow2_free_references (&names);
  }
  look (c, &options);
  options.snapshot = "1";
  look (c, &options);
  qcow2_close (options.backing.image);
  if (backing != NULL)
    container_close (backing);
  if (options.data_file != NULL)
    container_close (options.data_file);
  container_close (c);
  return 0;
}

size_t
LLVMFuzzerCustomMutator (uint8_t *data, size_t size, size_t max,
                         unsigned seed)
{
  return fuzz_mutate_runs (data, size, max, seed);
}
