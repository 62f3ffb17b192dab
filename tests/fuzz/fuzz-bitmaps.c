/* nbdkit-dirty-bitmap-filter
 * SPDX-License-Identifier: BSD-3-Clause
 * Copyright the nbdkit-dirty-bitmap-filter authors
 */

/* The bitmaps extension, directory, tables and bits are the input's, in
 * an image that is sound apart from them.  The program is
 *
 *   4 bytes   a cluster is 2^(9 + n % 8) bytes
 *   4 bytes   sectors of the disk, up to a GiB
 *   then marks of 8 bytes: the sector, and how many; 0: flush
 *
 * and what must hold is
 *
 *   - the disk is served, whatever the bitmaps are
 *   - a process that ends anywhere leaves each bitmap that was offered
 *     and records in use, or with the bits that it had and the marks
 *   - a clean stop leaves all that were offered, with the bits; those
 *     that do not record have the same bits, and the same bytes
 *   - without a mark the image is left as it was, byte for byte
 */

#include <config.h>

#include <stdlib.h>
#include <string.h>

#include "bitmap/bitmap.h"
#include "bitmap/internal.h"
#include "common/bytes.h"
#include "disk/flush.h"
#include "fuzz.h"
#include "qcow2/qcow2.h"

const char fuzz_target[] = "bitmaps";

#define HEADER_LENGTH 104
#define MAX_SECTORS (UINT32_C (1) << 21)
#define MAX_MARKS 16
#define MAX_BITMAPS 16
#define MAX_RUNS 4096

/* Clusters that there are besides those of the empty image. */
#define FREE_CLUSTERS 24

/* Bytes that the image can grow by. */
#define ROOM (UINT64_C (8) << 20)

/* A bitmap that was offered, as it was: its runs. */
struct seen {
  char name[1024];
  bool records;
  size_t nr_runs;
  bool dirty;                   /* is the first run? */
  uint64_t ends[MAX_RUNS];
};

struct run {
  uint8_t program[8 + 8 * MAX_MARKS];
  size_t program_bytes;
  uint32_t cluster_size;
  uint64_t disk_size;
  struct container *c;
  struct qcow2 *q;
  struct bitmap_set *set;
  size_t nr_seen;
  size_t nr_marks, nr_attempted;
  struct { uint64_t offset, count; } marks[MAX_MARKS];
};

static struct seen seen[MAX_BITMAPS];

static void
write_base (struct container *c, const void *bytes, size_t count,
            uint64_t offset)
{
  if (container_pwrite (c, bytes, count, offset) == -1)
    abort ();
}

/* An empty image, in which all clusters are counted. */
static struct container *
make_base (const struct run *r)
{
  const unsigned cluster_bits = __builtin_ctz (r->cluster_size);
  const uint64_t l1_covers = (uint64_t) r->cluster_size
    * (r->cluster_size / 8);
  const uint32_t l1_entries = div_round_up (r->disk_size, l1_covers);
  const uint64_t l1_clusters = div_round_up (8 * (uint64_t) l1_entries,
                                             r->cluster_size);
  const uint64_t nr = 3 + l1_clusters + FREE_CLUSTERS;
  const uint64_t blocks = div_round_up (nr, r->cluster_size / 2);
  const uint64_t end = (nr + blocks) * r->cluster_size;
  struct container *c = container_open_memory (end + ROOM);
  uint8_t header[HEADER_LENGTH] = { 0 }, word[8];

  if (c == NULL || container_reserve (c, end) == -1)
    abort ();
  put_be32 (header, 0x514649fb);
  put_be32 (header + 4, 3);
  put_be32 (header + 20, cluster_bits);
  put_be64 (header + 24, r->disk_size);
  put_be32 (header + 36, l1_entries);
  put_be64 (header + 40, 3 * (uint64_t) r->cluster_size);
  put_be64 (header + 48, r->cluster_size);
  put_be32 (header + 56, 1);
  put_be64 (header + 88, 1);
  put_be32 (header + 96, 4);
  put_be32 (header + 100, HEADER_LENGTH);
  write_base (c, header, sizeof header, 0);
  for (uint64_t i = 0; i < blocks; ++i) {
    put_be64 (word, (i == 0 ? 2 : nr + i) * r->cluster_size);
    write_base (c, word, 8, r->cluster_size + 8 * i);
  }
  for (uint64_t i = 0; i < nr + blocks; ++i) {
    const uint64_t block = i / (r->cluster_size / 2);

    put_be16 (word, 1);
    write_base (c, word, 2, (block == 0 ? 2 : nr + block) * r->cluster_size
                + i % (r->cluster_size / 2) * 2);
  }
  return c;
}

/* Lay the input's runs over it: behind the header's fields, and in the
 * clusters that nothing else is in.
 */
static void
overlay (const struct run *r, const uint8_t *data, size_t size)
{
  const uint64_t l1_covers = (uint64_t) r->cluster_size
    * (r->cluster_size / 8);
  const uint64_t first = round_up (3 * (uint64_t) r->cluster_size
                                   + 8 * div_round_up (r->disk_size,
                                                       l1_covers),
                                   r->cluster_size);
  const uint64_t end = first + FREE_CLUSTERS * (uint64_t) r->cluster_size;
  const uint8_t *p = data;
  struct fuzz_run run;

  while (fuzz_next_run (&p, data + size, &run)) {
    if (run.file != FUZZ_IMAGE)
      continue;
    if (run.offset >= HEADER_LENGTH && run.offset < r->cluster_size)
      write_base (r->c, run.bytes,
                  min_u64 (run.length, r->cluster_size - run.offset),
                  run.offset);
    else if (run.offset >= first && run.offset < end)
      write_base (r->c, run.bytes, min_u64 (run.length, end - run.offset),
                  run.offset);
  }
}

static void
open_image (struct run *r, struct container *c, bool readonly)
{
  const struct qcow2_options options = {
    .readonly = readonly, .cache_size = 65536,
  };
  const struct bitmap_options bitmaps = { 0 };

  r->q = qcow2_open (c, &options);
  if (r->q == NULL) {
    /* The extensions may be such that it is none. */
    FUZZ_CHECK (r->nr_seen == 0, "the image cannot be opened any more");
    return;
  }
  r->set = bitmap_set_open (r->q, &bitmaps);
  FUZZ_CHECK (r->set != NULL, "the bitmaps keep the image from being opened");
}

static void
close_image (struct run *r)
{
  bitmap_set_close (r->set);
  qcow2_close (r->q);
  r->set = NULL;
  r->q = NULL;
}

static void
look (struct run *r)
{
  r->nr_seen = min_u64 (bitmap_set_nr_exposed (r->set), MAX_BITMAPS);
  for (size_t i = 0; i < r->nr_seen; ++i) {
    const struct bitmap *b = bitmap_set_exposed (r->set, i);

    FUZZ_CHECK (strlen (bitmap_name (b)) < sizeof seen[i].name,
                "a name is too long");
    strcpy (seen[i].name, bitmap_name (b));
    seen[i].records = b->flags & BITMAP_FLAG_AUTO;
    seen[i].nr_runs = r->disk_size == 0 ? 0
      : bitmap_runs (b, 0, r->disk_size, seen[i].ends, MAX_RUNS,
                     &seen[i].dirty);
  }
}

static const struct bitmap *
find (const struct run *r, const char *name)
{
  for (size_t i = 0; i < bitmap_set_nr_exposed (r->set); ++i)
    if (strcmp (bitmap_name (bitmap_set_exposed (r->set, i)), name) == 0)
      return bitmap_set_exposed (r->set, i);
  return NULL;
}

static bool
is_dirty (const struct bitmap *b, uint64_t offset, uint64_t end)
{
  bool dirty;

  return bitmap_run (b, offset, end, &dirty) == end - offset && dirty;
}

/* It has the bits that it had, and, if it does not record, no others. */
static void
check_kept (const struct bitmap *b, const struct seen *s)
{
  bool dirty = s->dirty;
  uint64_t offset = 0;

  for (size_t i = 0; i < s->nr_runs; ++i, dirty = !dirty) {
    bool now;

    FUZZ_CHECK (!dirty || is_dirty (b, offset, s->ends[i]),
                "bitmap %s has lost bits at %llu", s->name,
                (unsigned long long) offset);
    FUZZ_CHECK (dirty || s->records ||
                (bitmap_run (b, offset, s->ends[i], &now)
                 == s->ends[i] - offset && !now),
                "bitmap %s does not record, but has new bits at %llu",
                s->name, (unsigned long long) offset);
    offset = s->ends[i];
  }
}

/* Look at all bitmaps that there were.  in_use: those that record may be
 * found so, and are not offered then.
 */
static void
check_bitmaps (struct run *r, struct container *c, bool may_be_in_use)
{
  open_image (r, c, true);
  for (size_t i = 0; r->q != NULL && i < r->nr_seen; ++i) {
    const struct bitmap *b = find (r, seen[i].name);

    FUZZ_CHECK (b != NULL || (may_be_in_use && seen[i].records),
                "bitmap %s is gone", seen[i].name);
    if (b == NULL)
      continue;
    check_kept (b, &seen[i]);
    for (size_t j = 0; seen[i].records && j < r->nr_marks; ++j)
      FUZZ_CHECK (is_dirty (b, r->marks[j].offset,
                            r->marks[j].offset + r->marks[j].count),
                  "bitmap %s lacks a mark at %llu", seen[i].name,
                  (unsigned long long) r->marks[j].offset);
  }
  if (r->q != NULL)
    close_image (r);
}

static struct container *
copy (struct container *c)
{
  static const uint8_t zeroes[65536];
  static uint8_t bytes[65536];
  const uint64_t size = container_size (c);
  struct container *to = container_open_memory (size);

  if (to == NULL || container_reserve (to, size) == -1)
    abort ();
  for (uint64_t at = 0; at < size; at += sizeof bytes) {
    const size_t n = min_u64 (sizeof bytes, size - at);

    if (container_pread (c, bytes, n, at) == -1)
      abort ();
    if (memcmp (bytes, zeroes, n) != 0)
      write_base (to, bytes, n, at);
  }
  return to;
}

static bool
same (struct container *a, struct container *b)
{
  static uint8_t p[4096], q[4096];

  if (container_size (a) != container_size (b))
    return false;
  for (uint64_t at = 0; at < container_size (a); at += sizeof p) {
    if (container_pread (a, p, sizeof p, at) == -1 ||
        container_pread (b, q, sizeof q, at) == -1)
      abort ();
    if (memcmp (p, q, sizeof p) != 0)
      return false;
  }
  return true;
}

/* The process ends here, and all that it wrote is there. */
static void
check_killed (const struct run *r)
{
  struct container *killed = copy (r->c);
  struct run other = *r;

  other.set = NULL;
  check_bitmaps (&other, killed, true);
  container_close (killed);
}

static void
run_program (struct run *r)
{
  for (size_t i = 8; i + 8 <= r->program_bytes; i += 8) {
    const uint64_t sector = get_be32 (r->program + i);
    uint64_t count = get_be32 (r->program + i + 4) * UINT64_C (512);
    const uint64_t offset = sector * 512 % r->disk_size;

    count = min_u64 (count, r->disk_size - offset);
    if (count == 0)
      image_flush (r->q, r->set);
    else {
      r->nr_attempted++;
      if (bitmap_set_mark (r->set, offset, count) == 0) {
        r->marks[r->nr_marks].offset = offset;
        r->marks[r->nr_marks++].count = count;
      }
    }
    if (i % 3 == 0)
      check_killed (r);
  }
  check_killed (r);
}

static void
live (struct run *r)
{
  struct container *before = copy (r->c);
  bool stopped;

  look (r);
  if (r->disk_size > 0)
    run_program (r);
  stopped = image_stop (r->q, r->set) == 0 &&
    bitmap_set_all_stored (r->set);
  FUZZ_CHECK (stopped || r->nr_attempted > 0, "stopping fails");
  close_image (r);
  FUZZ_CHECK (r->nr_attempted > 0 || same (r->c, before),
              "the image has changed, though nothing was marked");
  container_close (before);
  check_bitmaps (r, r->c, !stopped);
}

int
LLVMFuzzerTestOneInput (const uint8_t *data, size_t size)
{
  struct run r = { 0 };

  fuzz_quiet ();
  r.program_bytes = fuzz_bytes (FUZZ_PROGRAM, data, size,
                                r.program, sizeof r.program);
  r.cluster_size = 512U << get_be32 (r.program) % 8;
  r.disk_size = get_be32 (r.program + 4) % MAX_SECTORS * UINT64_C (512);
  /* An L1 table of many clusters is another target's matter. */
  r.disk_size = min_u64 (r.disk_size, (uint64_t) r.cluster_size
                         * (r.cluster_size / 8) * (r.cluster_size / 8));
  r.c = make_base (&r);
  overlay (&r, data, size);
  open_image (&r, r.c, false);
  if (r.q != NULL)
    live (&r);
  container_close (r.c);
  return 0;
}

size_t
LLVMFuzzerCustomMutator (uint8_t *data, size_t size, size_t max,
                         unsigned seed)
{
  return fuzz_mutate_runs (data, size, max, seed);
}
