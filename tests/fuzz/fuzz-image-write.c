/* nbdkit-dirty-bitmap-filter
 * SPDX-License-Identifier: BSD-3-Clause
 * Copyright the nbdkit-dirty-bitmap-filter authors
 */

/* Open whatever it is, read-write, run the input's program on it, stop,
 * and open it anew.  What must hold on any image:
 *
 *   - a change inside one guest cluster that succeeded reads back at once
 *   - the header is as it was, but for the fields that we change
 *   - what is registered as metadata never has guest data in it
 *   - what could be opened can be opened after a clean stop
 *
 * And if the image was sound, by the rules of lib/crash-check.h:
 *
 *   - all of the disk reads as a model of it, after the stop, too
 *   - it is sound whenever the process ends, and after a clean stop no
 *     more is leaked than was
 *   - every bitmap that records is in use or has the bits
 *
 * The program is steps of 8 bytes: what, how, where and how much.
 */

#include <config.h>

#include <errno.h>
#include <stdlib.h>
#include <string.h>

#include "bitmap/bitmap.h"
#include "common/bytes.h"
#include "crash-check.h"
#include "disk/flush.h"
#include "fuzz.h"
#include "qcow2/internal.h"

const char fuzz_target[] = "image-write";

#define MAX_STEPS 64
#define STEP_BYTES 8

/* The most that a step writes, or zeroes with a check. */
#define MAX_CHANGE 65536

/* Bytes that an image can grow by. */
#define ROOM (UINT64_C (3) << 20)

/* Disks and images up to this size are compared with a model. */
#define MAX_MODEL_DISK (UINT64_C (4) << 20)
#define MAX_MODEL_IMAGE (UINT64_C (1) << 19)
#define MAX_CHECKED_IMAGE (MAX_MODEL_IMAGE + ROOM + (UINT64_C (1) << 21))

/* The byte that all guest data are made of. */
#define GUEST 0xd7
#define GUEST_RUN 64

#define SECTOR 512

enum { STEP_WRITE, STEP_ZERO, STEP_TRIM, STEP_FLUSH, STEP_READ,
       STEP_FAIL, STEP_RECLAIM, STEP_KILL, NR_STEPS };

struct run {
  const uint8_t *data;          /* the input */
  size_t size;
  struct container *c, *backing;
  struct container *data_file;
  struct qcow2_options options;
  struct qcow2 *q;
  struct bitmap_set *set;
  uint8_t header[112];          /* as it was */

  /* Fail one change of the container, this many from now; and whether
   * any has failed.
   */
  unsigned fail_in;
  bool failed;

  /* If the image was sound and small. */
  uint8_t *model;
  uint8_t *known;               /* a byte a sector: does the model know? */
  uint8_t *changed;             /* a byte a sector */
  uint64_t leaked;
  bool trusted;                 /* its bitmaps, by the autoclear bit */
};

static uint8_t buf[MAX_CHANGE], guest[MAX_CHANGE];

/* ---------------------------------------------------------------------
 * The image from outside.
 */

static struct crash_image
flat (struct container *c)
{
  const uint64_t size = container_size (c);
  struct crash_image image = {
    .size = size, .room = round_up (size, UINT64_C (1) << 21) + 4096,
  };

  image.bytes = malloc (image.room);
  if (image.bytes == NULL ||
      container_pread (c, image.bytes, image.room, 0) == -1)
    abort ();
  return image;
}

/* Is every bitmap that records in use, or does it have what changed? */
static void
check_bits (const struct run *r, struct checked *k)
{
  for (size_t i = 0; i < k->nr_bitmaps; ++i) {
    const struct checked_bitmap *b = &k->bitmaps[i];

    if (b->flags != 2)
      continue;
    for (uint64_t s = 0; s < k->disk_size / SECTOR; ++s) {
      const uint64_t bit = s * SECTOR >> b->granularity_bits;

      FUZZ_CHECK (!r->changed[s] || (b->bits[bit / 8] >> bit % 8 & 1),
                  "bitmap %s does not say that sector %llu has changed",
                  b->name, (unsigned long long) s);
    }
  }
}

static void
check_sound (const struct run *r, bool stopped)
{
  struct crash_image image;
  struct checked k;

  if (r->model == NULL || container_size (r->c) > MAX_CHECKED_IMAGE)
    return;
  image = flat (r->c);
  FUZZ_CHECK (check_image (&k, &image), "the image was sound, and now: %s",
              k.error);
  /* Bitmaps that were not sound, and are not trusted now, are leaked. */
  FUZZ_CHECK (!stopped || r->failed || k.trusted != r->trusted ||
              k.nr_leaked <= r->leaked,
              "%llu clusters are leaked",
              (unsigned long long) (k.nr_leaked - r->leaked));
  check_bits (r, &k);
  checked_free (&k);
  crash_image_free (&image);
}

/* May the checker be asked at all?  It trusts sizes more than we do. */
static bool
is_small (const struct run *r)
{
  return container_size (r->c) <= MAX_MODEL_IMAGE &&
    qcow2_size (r->q) <= MAX_MODEL_DISK && qcow2_size (r->q) > 0 &&
    r->q->header.size % SECTOR == 0 && qcow2_version (r->q) == 3 &&
    !r->q->extended_l2 && r->options.data_file == NULL;
}

/* What is in compressed clusters may not be fit to be read. */
static bool
has_compressed (const struct checked *k, uint64_t size)
{
  for (uint64_t c = 0; c << k->cluster_bits < size; ++c)
    if (checked_is_compressed (k, c))
      return true;
  return false;
}

static void
make_model (struct run *r)
{
  struct crash_image image;
  struct checked k;
  const uint64_t size = qcow2_size (r->q);

  if (!is_small (r))
    return;
  image = flat (r->c);
  if (check_image (&k, &image) && !has_compressed (&k, size)) {
    r->model = malloc (size);
    r->known = malloc (size / SECTOR);
    r->changed = calloc (size / SECTOR, 1);
    if (r->model == NULL || r->known == NULL || r->changed == NULL)
      abort ();
    memset (r->known, 1, size / SECTOR);
    r->leaked = k.nr_leaked;
    r->trusted = k.trusted;
    FUZZ_CHECK (qcow2_read (r->q, r->model, size, 0) == 0,
                "a sound image cannot be read");
    for (uint64_t unit = 0; unit << k.unit_bits < size; ++unit) {
      const uint64_t at = unit << k.unit_bits;
      const uint64_t n = min_u64 (UINT64_C (1) << k.unit_bits, size - at);
      const uint8_t *p = checked_unit (&k, unit);

      for (uint64_t i = 0; i < n; ++i)
        FUZZ_CHECK (r->model[at + i] == (p == NULL ? 0 : p[i]),
                    "byte %llu is read wrong", (unsigned long long) (at + i));
    }
  }
  checked_free (&k);
  crash_image_free (&image);
}

static void
compare_model (const struct run *r)
{
  if (r->model == NULL)
    return;
  for (uint64_t at = 0; at < qcow2_size (r->q); at += sizeof buf) {
    const uint64_t n = min_u64 (sizeof buf, qcow2_size (r->q) - at);

    FUZZ_CHECK (qcow2_read (r->q, buf, n, at) == 0,
                "a sound image cannot be read any more");
    for (uint64_t s = 0; s < n; s += SECTOR)
      FUZZ_CHECK (!r->known[(at + s) / SECTOR] ||
                  memcmp (buf + s, r->model + at + s, SECTOR) == 0,
                  "sector %llu is not as the model has it",
                  (unsigned long long) (at + s) / SECTOR);
  }
}

/* ---------------------------------------------------------------------
 * What must hold on any image.
 */

static bool
has_guest_run (const uint8_t *p, size_t n)
{
  size_t run = 0;

  for (size_t i = 0; i < n; ++i) {
    run = p[i] == GUEST ? run + 1 : 0;
    if (run == GUEST_RUN)
      return true;
  }
  return false;
}

/* The metadata have no guest data but what they had. */
static void
check_metadata (const struct run *r, struct container *before)
{
  const uint64_t cluster_size = qcow2_cluster_size (r->q);

  for (uint64_t at = 0; at < container_size (r->c); at += 4096) {
    const enum qcow2_class class =
      registry_class (r->q, at / cluster_size);

    if (class == QCOW2_DATA)
      continue;
    if (container_pread (r->c, buf, 4096, at) == -1 ||
        container_pread (before, buf + 4096, 4096, at) == -1)
      abort ();
    for (uint64_t i = 0; i < 4096; i += 512)
      FUZZ_CHECK (registry_class (r->q, (at + i) / cluster_size)
                  == QCOW2_DATA ||
                  !has_guest_run (buf + i, 512) ||
                  has_guest_run (buf + 4096 + i, 512),
                  "there is guest data in %s at %#llx",
                  registry_class_name (class), (unsigned long long) at + i);
  }
}

/* The fields that nobody changes. */
static void
check_header (const struct run *r)
{
  static const struct { uint8_t offset, bytes; } fixed[] = {
    { 0, 36 }, { 60, 4 }, { 80, 8 }, { 96, 16 },
  };
  uint8_t now[112];

  if (container_pread (r->c, now, sizeof now, 0) == -1)
    abort ();
  for (size_t i = 0; i < sizeof fixed / sizeof fixed[0]; ++i)
    FUZZ_CHECK (qcow2_version (r->q) < 3 ||
                memcmp (now + fixed[i].offset, r->header + fixed[i].offset,
                        fixed[i].bytes) == 0,
                "the header's bytes at %d have changed", fixed[i].offset);
  FUZZ_CHECK (memcmp (now, r->header, 36) == 0, "the header has changed");
}

/* A change inside one cluster, all of it, and it succeeded. */
static void
check_reads_back (const struct run *r, const uint8_t *expected,
                  uint64_t count, uint64_t offset)
{
  if (offset / qcow2_cluster_size (r->q) !=
      (offset + count - 1) / qcow2_cluster_size (r->q))
    return;
  FUZZ_CHECK (qcow2_read (r->q, buf, count, offset) == 0,
              "what was changed cannot be read");
  for (uint64_t i = 0; i < count; ++i)
    FUZZ_CHECK (buf[i] == (expected == NULL ? 0 : expected[i]),
                "byte %llu does not read back",
                (unsigned long long) (offset + i));
}

/* ---------------------------------------------------------------------
 * The program.
 */

static void
note_change (struct run *r, uint64_t count, uint64_t offset, bool success,
             const uint8_t *bytes)
{
  if (r->model == NULL)
    return;
  for (uint64_t s = offset / SECTOR; s <= (offset + count - 1) / SECTOR; ++s) {
    r->changed[s] = 1;
    if (!success)
      r->known[s] = 0;
  }
  if (bytes == NULL)
    memset (r->model + offset, 0, count);
  else
    memcpy (r->model + offset, bytes, count);
}

/* Of a trim only whole clusters read as zeroes, and only where there is
 * nothing below; the rest is as it was.
 */
static void
note_trim (struct run *r, uint64_t count, uint64_t offset, bool success)
{
  const uint64_t cluster_size = qcow2_cluster_size (r->q);
  const uint64_t first = round_up (offset, cluster_size);
  uint64_t end = offset + count;

  if (r->model == NULL)
    return;
  for (uint64_t s = offset / SECTOR; s <= (end - 1) / SECTOR; ++s)
    r->changed[s] = 1;
  if (end != qcow2_size (r->q))
    end = round_down (end, cluster_size);
  if (first < end)
    note_change (r, end - first, first, success, NULL);
}

static void
run_change (struct run *r, unsigned what, unsigned how, uint64_t count,
            uint64_t offset)
{
  int result;

  if (bitmap_set_mark (r->set, offset, count) == -1)
    return;
  switch (what) {
  case STEP_WRITE:
    count = min_u64 (count, MAX_CHANGE);
    result = qcow2_write (r->q, guest, count, offset);
    note_change (r, count, offset, result == 0, guest);
    if (result == 0)
      check_reads_back (r, guest, count, offset);
    break;
  case STEP_ZERO:
    result = qcow2_zero (r->q, count, offset, how & 3);
    if (result == 0 || errno != ENOTSUP || !(how & QCOW2_ZERO_FAST))
      note_change (r, count, offset, result == 0, NULL);
    if (result == 0)
      check_reads_back (r, NULL, min_u64 (count, MAX_CHANGE), offset);
    break;
  default:
    result = qcow2_trim (r->q, count, offset);
    note_trim (r, count, offset, result == 0);
  }
}

static void
look (struct qcow2 *q, uint64_t count, uint64_t offset)
{
  enum qcow2_extent_type type;
  uint64_t length;
  unsigned depth;

  qcow2_read (q, buf, min_u64 (count, sizeof buf), offset);
  qcow2_cache (q, count, offset);
  if (qcow2_extent (q, offset, offset + count, &length, &type, &depth) == 0)
    FUZZ_CHECK (length > 0 && length <= count, "an extent of %llu bytes",
                (unsigned long long) length);
}

static bool
run_step (struct run *r, const uint8_t *p)
{
  const unsigned what = p[0] % NR_STEPS, how = p[1];
  const uint64_t size = qcow2_size (r->q);
  uint64_t count = get_be16 (p + 2), offset = get_be32 (p + 4);

  if (how & 0x80) {
    count *= SECTOR;
    offset *= SECTOR;
  }
  if (how & 0x40)
    offset = size - 1 - offset % size;
  offset %= size;
  if (how & 0x20) {
    offset = round_down (offset, qcow2_cluster_size (r->q));
    count = qcow2_cluster_size (r->q);
  }
  count = min_u64 (max_u64 (count, 1), size - offset);

  switch (what) {
  case STEP_FLUSH:
    image_flush (r->q, how & 1 ? NULL : r->set);
    return true;
  case STEP_READ:
    look (r->q, count, offset);
    return true;
  case STEP_FAIL:
    r->fail_in = how;
    return true;
  case STEP_RECLAIM:
    qcow2_reclaim (r->q);
    return true;
  case STEP_KILL:
    return false;
  default:
    run_change (r, what, how, count, offset);
    return true;
  }
}

static bool
run_program (struct run *r)
{
  uint8_t program[MAX_STEPS * STEP_BYTES];
  const size_t n = fuzz_bytes (FUZZ_PROGRAM, r->data, r->size,
                               program, sizeof program);

  for (size_t i = 0; i + STEP_BYTES <= n; i += STEP_BYTES)
    if (!run_step (r, program + i))
      return false;
  return true;
}

/* ---------------------------------------------------------------------
 * One input.
 */

static int
fail_some (void *opaque, const char *operation, uint64_t offset,
           uint64_t count)
{
  struct run *r = opaque;

  (void) operation;
  (void) offset;
  (void) count;
  if (r->fail_in == 0 || --r->fail_in > 0)
    return 0;
  r->failed = true;
  return EIO;
}

static void
open_below (struct run *r)
{
  struct qcow2_references names;

  if (qcow2_read_references (r->c, &names) == -1)
    return;
  if (names.backing_name != NULL)
    r->options.backing.raw = r->backing =
      fuzz_open (FUZZ_BACKING, r->data, r->size, 0);
  if (r->backing != NULL && names.backing_format != NULL &&
      strcmp (names.backing_format, "qcow2") == 0) {
    const struct qcow2_options below = { .readonly = true,
                                         .cache_size = 65536 };

    r->options.backing.image = qcow2_open (r->backing, &below);
    if (r->options.backing.image != NULL)
      r->options.backing.raw = NULL;
  }
  if (names.has_data_file)
    r->options.data_file = fuzz_open (FUZZ_DATA_FILE, r->data, r->size, ROOM);
  qcow2_free_references (&names);
}

static bool
open_image (struct run *r)
{
  const struct bitmap_options options = { 0 };

  r->q = qcow2_open (r->c, &r->options);
  if (r->q == NULL)
    return false;
  r->set = bitmap_set_open (r->q, &options);
  FUZZ_CHECK (r->set != NULL, "the bitmaps keep the image from being opened");
  return true;
}

static void
close_image (struct run *r)
{
  bitmap_set_close (r->set);
  qcow2_close (r->q);
  r->set = NULL;
  r->q = NULL;
}

/* Everything between open and close, and a second look. */
static void
live (struct run *r)
{
  const struct container_memory_hook hook = { fail_some, r };
  struct container *before = fuzz_open (FUZZ_IMAGE, r->data, r->size, 0);
  bool stopped, corrupt;

  if (container_pread (r->c, r->header, sizeof r->header, 0) == -1)
    abort ();
  make_model (r);
  container_memory_set_hook (r->c, &hook);
  stopped = qcow2_size (r->q) == 0 || run_program (r);
  compare_model (r);
  if (stopped)
    stopped = image_stop (r->q, r->set) == 0 &&
      bitmap_set_all_stored (r->set);
  r->fail_in = 0;
  corrupt = atomic_load (&r->q->gate.corrupt);
  FUZZ_CHECK (!corrupt || r->model == NULL || r->failed,
              "a sound image is found corrupt");
  check_metadata (r, before);
  check_header (r);
  check_sound (r, stopped);
  close_image (r);
  container_close (before);

  if (!stopped && r->model == NULL)
    return;
  FUZZ_CHECK (open_image (r) || corrupt, "the image cannot be opened again");
  if (r->q == NULL)
    return;
  if (stopped)
    compare_model (r);
  close_image (r);
}

int
LLVMFuzzerTestOneInput (const uint8_t *data, size_t size)
{
  struct run r = {
    .data = data, .size = size, .options.cache_size = 65536,
    .c = fuzz_open (FUZZ_IMAGE, data, size, ROOM),
  };

  if (r.c == NULL)
    return 0;
  fuzz_quiet ();
  memset (guest, GUEST, sizeof guest);
  open_below (&r);
  if (open_image (&r))
    live (&r);
  free (r.model);
  free (r.known);
  free (r.changed);
  qcow2_close (r.options.backing.image);
  if (r.backing != NULL)
    container_close (r.backing);
  if (r.options.data_file != NULL)
    container_close (r.options.data_file);
  container_close (r.c);
  return 0;
}

size_t
LLVMFuzzerCustomMutator (uint8_t *data, size_t size, size_t max,
                         unsigned seed)
{
  return fuzz_mutate_runs (data, size, max, seed);
}
