/* nbdkit-dirty-bitmap-filter
 * SPDX-License-Identifier: BSD-3-Clause
 * Copyright the nbdkit-dirty-bitmap-filter authors
 */

/* Each workload does one thing, and little of it, so that each call that
 * it makes to the container can fail in turn.
 *
 * In all images, or disks beside them, the first 4 KiB of the disk are
 * allocated, for a write in place to be tried on them.
 */

#include <config.h>

#include <inttypes.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stdio.h>
#include <string.h>

#include <cmocka.h>

#include "common/bytes.h"
#include "crash-check.h"
#include "fault-workload.h"
#include "image.h"

#define KIB UINT64_C (1024)
#define MIB (1024 * KIB)

#define READ(offset, count) { STEP_READ, offset, count, false }
#define WRITE(offset, count) { STEP_WRITE, offset, count, false }
#define WRITE_FUA(offset, count) { STEP_WRITE, offset, count, true }
#define ZERO(offset, count) { STEP_ZERO, offset, count, false }
#define ZERO_FUA(offset, count) { STEP_ZERO, offset, count, true }
#define ZERO_KEEP(offset, count) { STEP_ZERO_KEEP, offset, count, false }
#define ZERO_FAST(offset, count) { STEP_ZERO_FAST, offset, count, false }
#define TRIM(offset, count) { STEP_TRIM, offset, count, false }
#define TRIM_FUA(offset, count) { STEP_TRIM, offset, count, true }
#define FLUSH { STEP_FLUSH, 0, 0, false }
#define REOPEN { STEP_REOPEN, 0, 0, false }

#define DATA "qemu-io -f qcow2 -c 'write -P 7 0 32k' $f >/dev/null; "
#define DISK "{ yes disk | head -c 32768; } >$d; truncate -s 1000000 $d; "
#define BITMAPS \
  "qemu-img bitmap --add -g 512 $f fine; " \
  "qemu-img bitmap --add -g 64k $f coarse; " \
  "qemu-img bitmap --add --disable -g 4k $f off; "

struct workload workloads[] = {
  { .name = "allocate", .options = "cluster_size=4k", .size = "8M",
    .make = DATA BITMAPS, .windows = { 65536, MIB, 6, 8 * MIB },
    .garbage = 20 * KIB, .whole = true,
    .steps = {
      WRITE (MIB, 4 * KIB), WRITE (2 * MIB, 20 * KIB), FLUSH,
      WRITE (3 * MIB, 4 * KIB), WRITE (5 * MIB, 32 * KIB),
      WRITE (0, 64 * KIB),
    } },

  /* No room inside, so that the container grows. */
  { .name = "grow", .options = "cluster_size=4k", .size = "8M",
    .make = DATA BITMAPS, .windows = { 65536, MIB, 6, 8 * MIB },
    .whole = true,
    .steps = {
      WRITE (MIB, 16 * KIB), WRITE (2 * MIB, 16 * KIB), FLUSH,
      WRITE (3 * MIB, 64 * KIB), WRITE (4 * MIB, 4 * KIB),
    } },

  { .name = "large-clusters", .options = "cluster_size=64k", .size = "64M",
    .make = DATA BITMAPS, .windows = { 262144, 8 * MIB, 6, 64 * MIB },
    .garbage = 512 * KIB,
    .steps = {
      WRITE (8 * MIB + 100, 70000), FLUSH, TRIM (8 * MIB, 64 * KIB),
      WRITE (16 * MIB, 64 * KIB), FLUSH, WRITE_FUA (16 * MIB + 5, 5),
    } },

  { .name = "partial", .options = "cluster_size=4k", .size = "8M",
    .make = DATA BITMAPS, .windows = { 65536, MIB, 6, 8 * MIB },
    .garbage = 40 * KIB,
    .steps = {
      WRITE (MIB + 1000, 300), WRITE (2 * MIB + 3000, 9000), FLUSH,
      WRITE (MIB + 4000, 200), READ (MIB, 8 * KIB),
      WRITE (5 * MIB + 65000, 536), WRITE (3 * MIB + 1, 12000),
    } },

  { .name = "overwrite", .options = "cluster_size=4k", .size = "8M",
    .make = DATA BITMAPS, .windows = { 65536, MIB, 6, 8 * MIB },
    .steps = {
      WRITE (0, 4 * KIB), WRITE (5000, 700), FLUSH, WRITE (8 * KIB, 16 * KIB),
      READ (0, 32 * KIB), WRITE_FUA (100, 20 * KIB), WRITE (0, 512), FLUSH,
    } },

  { .name = "zeroes", .options = "cluster_size=4k", .size = "8M",
    .make = DATA BITMAPS, .windows = { 65536, MIB, 6, 8 * MIB },
    .garbage = 40 * KIB,
    .steps = {
      ZERO (4 * KIB, 4 * KIB), ZERO_KEEP (8 * KIB, 8 * KIB),
      ZERO_FAST (16 * KIB, 4 * KIB), ZERO (21 * KIB, 1000), FLUSH,
      ZERO_KEEP (MIB, 12 * KIB), WRITE (MIB + 500, 1000),
      ZERO_FAST (24000, 500), ZERO_KEEP (3 * MIB + 100, 6 * KIB),
      WRITE (10000, 100), FLUSH, ZERO_FUA (0, 32 * KIB),
    } },

  { .name = "trim", .options = "cluster_size=4k", .size = "8M",
    .make = "qemu-io -f qcow2 -c 'write -P 7 0 64k' -c 'write -P 8 2M 64k' "
    "$f >/dev/null; " BITMAPS, .windows = { 65536, MIB, 6, 8 * MIB },
    .steps = {
      TRIM (32 * KIB, 16 * KIB), WRITE (MIB, 8 * KIB),
      FLUSH, TRIM (2 * MIB + 100, 30 * KIB), TRIM (5 * MIB, 8 * KIB),
      WRITE (3 * MIB, 24 * KIB), FLUSH, WRITE (4 * MIB, 28 * KIB),
      TRIM_FUA (MIB, MIB), WRITE (36 * KIB, 4 * KIB),
    } },

  { .name = "trim-whole", .options = "cluster_size=4k", .size = "8M",
    .make = "qemu-io -f qcow2 -c 'write -P 7 0 64k' -c 'write -P 8 2M 64k' "
    "$f >/dev/null; " BITMAPS, .windows = { 65536, MIB, 6, 8 * MIB },
    .garbage = 12 * KIB, .whole = true,
    .steps = {
      TRIM (32 * KIB, 16 * KIB), FLUSH, WRITE (3 * MIB, 24 * KIB),
      TRIM (2 * MIB, 24 * KIB), WRITE (4 * MIB, 16 * KIB), FLUSH,
      WRITE (5 * MIB, 28 * KIB), TRIM (3 * MIB, 12 * KIB),
      WRITE (32 * KIB, 16 * KIB), FLUSH, WRITE (MIB, 8 * KIB),
    } },

  { .name = "flush", .options = "cluster_size=4k", .size = "8M",
    .make = DATA BITMAPS, .windows = { 65536, MIB, 6, 8 * MIB },
    .garbage = 16 * KIB,
    .steps = {
      FLUSH, WRITE_FUA (100, 100), FLUSH, WRITE (MIB, 512), FLUSH,
      WRITE_FUA (MIB + 512, 512), FLUSH, WRITE_FUA (2 * MIB, 9000), FLUSH,
    } },

  { .name = "create", .options = "cluster_size=4k", .size = "8M",
    .make = DATA, .create = "new", .windows = { 65536, MIB, 6, 8 * MIB },
    .garbage = 16 * KIB, .whole = true,
    .steps = { WRITE (MIB, 4 * KIB), FLUSH, WRITE (2 * MIB, 4 * KIB) } },

  { .name = "create-another", .options = "cluster_size=512", .size = "2M",
    .make = DATA BITMAPS, .create = "new",
    .windows = { 65536, 256 * KIB, 6, 2 * MIB },
    .steps = { WRITE (256 * KIB + 10, 700), FLUSH } },

  /* in_use, again and again. */
  { .name = "first-write", .options = "cluster_size=4k", .size = "8M",
    .make = DATA BITMAPS, .windows = { 65536, MIB, 6, 8 * MIB },
    .steps = {
      READ (0, 512), WRITE (0, 512), REOPEN, TRIM (4096, 4096), FLUSH,
      WRITE (16 * KIB, 512), FLUSH, ZERO (24 * KIB, 512), REOPEN,
      WRITE (0, 512),
    } },

  /* Bits in many clusters, some of them full. */
  { .name = "bitmaps", .options = "cluster_size=512", .size = "8M",
    .make = DATA BITMAPS, .windows = { 32768, MIB, 6, 8 * MIB },
    .garbage = 3 * KIB, .whole = true,
    .steps = {
      TRIM (MIB, 2 * MIB), WRITE (5 * MIB, 512), FLUSH,
      TRIM (2 * MIB, 2 * MIB), WRITE (MIB, 512), FLUSH,
      TRIM (4 * MIB, 4 * MIB), WRITE (0, 1024), FLUSH, TRIM (0, MIB),
    } },

  /* A new L2 table, of which most slices are never set. */
  { .name = "large-table", .options = "cluster_size=64k", .size = "1G",
    .make = DATA "qemu-img bitmap --add -g 64k $f coarse; ",
    .windows = { 65536, 256 * MIB, 4, 1024 * MIB },
    .garbage = 512 * KIB, .whole = true,
    .steps = {
      WRITE (512 * MIB, 64 * KIB), FLUSH, WRITE (768 * MIB, 64 * KIB),
    } },

  { .name = "blocks", .options = "cluster_size=512,refcount_bits=64",
    .size = "2M", .make = DATA BITMAPS,
    .windows = { 65536, 256 * KIB, 6, 2 * MIB }, .whole = true,
    .garbage = 8 * KIB,
    .steps = {
      WRITE (256 * KIB, 40 * KIB), FLUSH, WRITE (512 * KIB, 40 * KIB),
    } },

  /* Refcount blocks and, at 2 MiB, the table. */
  { .name = "refcounts", .options = "cluster_size=512,refcount_bits=64",
    .size = "4M",
    .make = DATA BITMAPS
    "qemu-io -f qcow2 -c 'write -P 9 2100k 1860k' $f >/dev/null; ",
    .windows = { 65536, 256 * KIB, 6, 2 * MIB }, .whole = true,
    .steps = {
      WRITE (256 * KIB, 24 * KIB), FLUSH, WRITE (512 * KIB, 32 * KIB),
      WRITE (768 * KIB, 32 * KIB), FLUSH, WRITE (MIB, 32 * KIB),
    } },

  /* More slices of refcounts than the cache has room for. */
  { .name = "evict", .options = "cluster_size=512,refcount_bits=64",
    .size = "2M", .make = DATA
    "qemu-io -f qcow2 -c 'write -P 9 256k 1500k' $f >/dev/null; " BITMAPS,
    .windows = { 2048, 64 * KIB, 32, 0 }, .whole = true,
    .steps = {
      TRIM (256 * KIB, 1024), TRIM (320 * KIB, 1024), TRIM (384 * KIB, 1024),
      TRIM (448 * KIB, 1024), TRIM (512 * KIB, 1024), TRIM (576 * KIB, 1024),
      TRIM (640 * KIB, 1024), TRIM (704 * KIB, 1024), TRIM (768 * KIB, 1024),
      TRIM (832 * KIB, 1024), TRIM (896 * KIB, 1024), TRIM (960 * KIB, 1024),
      TRIM (MIB, 1024), TRIM (1088 * KIB, 1024), TRIM (1152 * KIB, 1024),
      TRIM (1216 * KIB, 1024), TRIM (1280 * KIB, 1024),
      TRIM (1344 * KIB, 1024), FLUSH, WRITE (256 * KIB, 2048),
      WRITE (64 * KIB, 2048), FLUSH, TRIM (0, 2048),
    } },

  /* More L2 slices. */
  { .name = "l2", .options = "cluster_size=512", .size = "2M",
    .make = DATA BITMAPS, .windows = { 2048, 64 * KIB, 32, 0 },
    .garbage = 4 * KIB, .whole = true,
    .steps = {
      WRITE (64 * KIB, 512), WRITE (128 * KIB, 512), WRITE (192 * KIB, 512),
      WRITE (256 * KIB, 512), WRITE (320 * KIB, 512), WRITE (384 * KIB, 512),
      WRITE (448 * KIB, 512), WRITE (512 * KIB, 512), WRITE (576 * KIB, 512),
      WRITE (640 * KIB, 512), WRITE (704 * KIB, 512), WRITE (768 * KIB, 512),
      WRITE (832 * KIB, 512), WRITE (896 * KIB, 512), WRITE (960 * KIB, 512),
      WRITE (MIB, 512), WRITE (1088 * KIB, 512), WRITE (1152 * KIB, 512),
      FLUSH, WRITE (1216 * KIB, 512), READ (64 * KIB, 2048),
    } },

  { .name = "compressed", .options = "cluster_size=4k", .size = "8M",
    .make = DATA "qemu-io -f qcow2 -c 'write -c -P 5 1M 4k' "
    "-c 'write -c -P 6 1028k 4k' -c 'write -c -P 7 1032k 4k' "
    "-c 'write -c -P 8 1036k 4k' $f >/dev/null; " BITMAPS,
    .windows = { 65536, MIB, 6, 8 * MIB }, .by_qemu = true,
    .steps = {
      READ (MIB, 16 * KIB), WRITE (MIB + 700, 700), FLUSH,
      TRIM (MIB + 4096, 4096), ZERO (MIB + 8192, 512), FLUSH,
      WRITE (MIB + 12288, 4096), WRITE (2 * MIB, 8192),
    } },

  { .name = "subclusters", .options = "cluster_size=16k,extended_l2=on",
    .size = "8M", .make = DATA BITMAPS,
    .windows = { 65536, MIB, 6, 8 * MIB }, .by_qemu = true,
    .garbage = 64 * KIB,
    .steps = {
      WRITE (MIB + 100, 700), WRITE (4096, 512), FLUSH,
      ZERO (8192, 1024), TRIM (16 * KIB, 4096), WRITE (MIB + 5000, 12000),
      FLUSH, ZERO_KEEP (32 * KIB, 16 * KIB), TRIM (16 * KIB, 16 * KIB),
      WRITE (33 * KIB, 300), FLUSH, WRITE (2 * MIB, 32 * KIB),
    } },

  { .name = "v2", .options = "compat=0.10,cluster_size=4k", .size = "8M",
    .make = DATA, .windows = { 65536, MIB, 6, 8 * MIB }, .by_qemu = true,
    .garbage = 16 * KIB,
    .steps = {
      ZERO (4096, 8192), ZERO_KEEP (16 * KIB, 4096), WRITE (MIB, 700), FLUSH,
      ZERO_KEEP (2 * MIB, 8192), TRIM (24576, 4096), WRITE (5000, 100),
    } },

  /* L2 tables and clusters in common with snapshots. */
  { .name = "snapshots", .options = "cluster_size=4k", .size = "8M",
    .make = DATA BITMAPS "qemu-img snapshot -c one $f; "
    "qemu-io -f qcow2 -c 'write -P 8 0 4k' -c 'write -P 8 1M 4k' "
    "$f >/dev/null; qemu-img snapshot -c two $f; "
    "qemu-io -f qcow2 -c 'write -P 9 0 4k' $f >/dev/null; ",
    .windows = { 65536, MIB, 6, 8 * MIB }, .garbage = 20 * KIB,
    .whole = true,
    .steps = {
      WRITE (MIB, 4 * KIB), WRITE (8 * KIB, 8 * KIB), FLUSH,
      TRIM (20 * KIB, 4 * KIB), WRITE (8 * KIB, 4 * KIB), FLUSH,
      WRITE (2 * MIB, 16 * KIB),
    } },
  { .name = "snapshots-partial", .options = "cluster_size=4k", .size = "8M",
    .make = DATA BITMAPS "qemu-img snapshot -c one $f; "
    "qemu-io -f qcow2 -c 'write -P 9 0 4k' $f >/dev/null; ",
    .windows = { 65536, MIB, 6, 8 * MIB },
    .steps = {
      WRITE (9 * KIB, 700), WRITE (13 * KIB, 5 * KIB), FLUSH,
      ZERO (20 * KIB, 1024), WRITE_FUA (24 * KIB + 512, 512),
    } },

  /* Over a shorter file. */
  { .name = "overlay",
    .options = "cluster_size=4k,backing_file=$b,backing_fmt=raw",
    .size = "1M", .files = "yes below | head -c 600000 >$b; ",
    .make = DATA BITMAPS, .windows = { 32768, 128 * KIB, 6, 0 },
    .by_qemu = true, .garbage = 12 * KIB,
    .steps = {
      READ (128 * KIB, 8 * KIB), WRITE (128 * KIB + 700, 700),
      WRITE (256 * KIB + 100, 9000), FLUSH, TRIM (128 * KIB, 8 * KIB),
      ZERO (384 * KIB + 512, 5 * KIB), READ (384 * KIB, 8 * KIB), FLUSH,
      WRITE (597 * KIB, 512), ZERO_KEEP (512 * KIB, 4 * KIB),
    } },

  /* The name of the file below gives way to the bitmaps. */
  { .name = "overlay-create",
    .options = "cluster_size=4k,backing_file=$b,backing_fmt=raw",
    .size = "1M", .files = "yes below | head -c 600000 >$b; ",
    .make = DATA, .create = "new", .windows = { 32768, 128 * KIB, 6, 0 },
    .by_qemu = true,
    .steps = { WRITE (128 * KIB + 700, 700), FLUSH, REOPEN, FLUSH } },

  { .name = "data-file", .options = "cluster_size=4k,data_file=$d",
    .size = "1M", .data_file = true, .make = DATA BITMAPS,
    .windows = { 32768, 128 * KIB, 6, 0 }, .by_qemu = true, .whole = true,
    .garbage = 8 * KIB,
    .steps = {
      WRITE (128 * KIB, 8 * KIB), FLUSH, WRITE (0, 4 * KIB),
      READ (0, 8 * KIB), FLUSH, TRIM (8 * KIB, 4 * KIB),
      WRITE (256 * KIB, 4 * KIB), FLUSH, WRITE (128 * KIB, 4 * KIB),
    } },
  { .name = "data-file-raw",
    .options = "cluster_size=4k,data_file=$d,data_file_raw=on",
    .size = "1M", .data_file = true, .make = DATA BITMAPS,
    .windows = { 32768, 128 * KIB, 6, 0 }, .by_qemu = true,
    .steps = {
      WRITE (128 * KIB + 100, 5000), FLUSH, WRITE_FUA (512, 512),
      ZERO (4 * KIB, 4 * KIB), TRIM (8 * KIB, 4 * KIB), FLUSH,
      WRITE (256 * KIB, 100), FLUSH,
    } },

  /* The disk is beside the image, and ends inside of a sector. */
  { .name = "beside", .options = "cluster_size=4k", .size = "1000448",
    .beside = true, .make = DISK BITMAPS,
    .windows = { 32768, 128 * KIB, 6, 1000000 }, .garbage = 8 * KIB,
    .steps = {
      READ (128 * KIB, 8 * KIB), WRITE (128 * KIB + 700, 700),
      WRITE_FUA (256 * KIB + 100, 9000), FLUSH, TRIM (12300, 8000),
      ZERO_FUA (384 * KIB + 512, 5 * KIB), FLUSH, TRIM_FUA (512 * KIB, 4096),
      ZERO_FAST (16384, 4096), WRITE (640 * KIB, 512), REOPEN,
      WRITE (640 * KIB, 512), ZERO_KEEP (990000, 10000), FLUSH,
    } },
  { .name = "beside-whole", .options = "cluster_size=512", .size = "1000448",
    .beside = true, .make = DISK BITMAPS,
    .windows = { 32768, 128 * KIB, 6, 1000000 }, .whole = true,
    .steps = {
      WRITE (128 * KIB, 8 * KIB), FLUSH, WRITE (0, 4 * KIB),
      READ (0, 8 * KIB), FLUSH, TRIM (8 * KIB, 4 * KIB),
      WRITE (256 * KIB, 512), FLUSH, ZERO (128 * KIB, 4 * KIB), REOPEN,
      WRITE (512 * KIB, 32 * KIB),
    } },
  { .name = "beside-keep", .options = "cluster_size=4k", .size = "1000448",
    .beside = true, .keep = true, .make = DISK BITMAPS,
    .windows = { 32768, 128 * KIB, 6, 1000000 }, .whole = true,
    .steps = {
      WRITE (128 * KIB, 8 * KIB), FLUSH, WRITE (0, 512),
      TRIM (8 * KIB, 4 * KIB), FLUSH, REOPEN, ZERO (256 * KIB, 4 * KIB),
      WRITE (512 * KIB, 512),
    } },
  { .name = "beside-create", .options = "cluster_size=4k", .size = "1000448",
    .beside = true, .make = DISK, .create = "new",
    .windows = { 32768, 128 * KIB, 6, 1000000 }, .whole = true,
    .steps = { WRITE (128 * KIB, 4 * KIB), FLUSH, WRITE (0, 512) } },

  /* Refcounts are too low and too high, and it is marked dirty. */
  { .name = "repair", .options = "cluster_size=4k", .size = "8M",
    .make = DATA BITMAPS "truncate -s 200k $f; "
    "{ printf '\\1' | dd of=$f bs=1 seek=79 conv=notrunc; "
    "head -c 12 /dev/zero | dd of=$f bs=1 seek=8204 conv=notrunc; "
    "printf '\\0\\3' | dd of=$f bs=1 seek=8282 conv=notrunc; } "
    "2>/dev/null; ", .windows = { 65536, MIB, 6, 0 }, .by_qemu = true,
    .dirty = true,
    .steps = { WRITE (MIB, 4 * KIB), FLUSH, WRITE (4 * KIB, 512) } },

  /* Clusters that nothing uses. */
  { .name = "leaks", .options = "cluster_size=4k", .size = "8M",
    .make = DATA BITMAPS "truncate -s 200k $f; "
    "printf '\\0\\1\\0\\3\\0\\2' | "
    "dd of=$f bs=1 seek=8280 conv=notrunc 2>/dev/null; ",
    .windows = { 65536, MIB, 6, 8 * MIB }, .leaks = true,
    .steps = { READ (0, 512), WRITE (MIB, 16 * KIB), FLUSH,
               WRITE (4 * KIB, 4 * KIB) } },
};
const size_t nr_workloads = sizeof workloads / sizeof workloads[0];

static void
load_image (const char *file, struct crash_image *image)
{
  FILE *fp = fopen (file, "re");

  *image = crash_image_new (FAULT_ROOM);
  assert_non_null (fp);
  image->size = fread (image->bytes, 1, image->room, fp);
  assert_true (image->size < image->room);
  fclose (fp);
}

/* Free clusters are full of garbage. */
static void
add_garbage (struct workload *w)
{
  struct crash_image *image = &w->image;
  struct checked k;
  uint64_t cluster_size;

  if (!check_image (&k, image))
    fail_msg ("%s: %s", w->name, k.error);
  cluster_size = UINT64_C (1) << k.cluster_bits;
  image->size = round_up (image->size, cluster_size) + w->garbage;
  assert_true (image->size < image->room);
  for (uint64_t c = 0; c < image->size >> k.cluster_bits; ++c)
    if (k.references[c] == 0)
      memset (image->bytes + (c << k.cluster_bits), 0xaa, cluster_size);
  checked_free (&k);
}

void
make_workload (struct workload *w)
{
  char file[512], below[512], data[512];

  snprintf (file, sizeof file, "%s", temp_file ("workload.qcow2"));
  snprintf (below, sizeof below, "%s", temp_file ("below.raw"));
  snprintf (data, sizeof data, "%s", temp_file ("data.raw"));
  assert_int_equal (run_command ("set -e; f='%s'; b='%s'; d='%s'; "
                                 "rm -f $f $b $d; %s"
                                 "qemu-img create -q -f qcow2 -o %s $f %s; "
                                 "%s", file, below, data,
                                 w->files != NULL ? w->files : "",
                                 w->options, w->size, w->make), 0);
  load_image (file, &w->image);
  if (w->files != NULL)
    load_image (below, &w->below);
  if (w->data_file || w->beside)
    load_image (data, &w->data);
  if (w->beside) {
    w->image.data = &w->data;
    w->image.beside = true;
  }
  if (!w->by_qemu)
    add_garbage (w);
  else if (w->garbage != 0) {
    const uint64_t end = round_up (w->image.size, 4096);

    memset (w->image.bytes + end, 0xaa, w->garbage);
    w->image.size = end + w->garbage;
  }
}

void
free_workload (struct workload *w)
{
  w->image.data = NULL;
  crash_image_free (&w->image);
  if (w->files != NULL)
    crash_image_free (&w->below);
  if (w->data_file || w->beside)
    crash_image_free (&w->data);
}
