/* nbdkit-dirty-bitmap-filter
 * SPDX-License-Identifier: BSD-3-Clause
 * Copyright the nbdkit-dirty-bitmap-filter authors
 */

/* The images that universes begin with, made by QEMU's tools. */

#include <config.h>

#include <inttypes.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stdio.h>
#include <string.h>

#include <cmocka.h>

#include "common/bytes.h"
#include "crash-universe.h"
#include "image.h"

#define MIB (UINT64_C (1) << 20)

struct kind kinds[] = {
  /* Many L2 tables and refcount blocks. */
  { .options = "cluster_size=512", .disk_mib = 24, .room_mib = 6,
    .windows = { 65536, 3 * MIB + 512, 6, 24 * MIB } },
  /* The refcount table grows, refcount slices are evicted. */
  { .options = "cluster_size=512,refcount_bits=64",
    .disk_mib = 24, .room_mib = 6, .filler_kib = 1880,
    .windows = { 65536, 3 * MIB, 6, 20 * MIB } },
  { .options = "cluster_size=4k,refcount_bits=64",
    .disk_mib = 96, .room_mib = 8, .filler_kib = 1300,
    .windows = { 65536, 15 * MIB, 6, 90 * MIB } },
  { .options = "cluster_size=4k,refcount_bits=1",
    .disk_mib = 45, .room_mib = 6, .unknown_autoclear = true,
    .windows = { 65536, 7 * MIB, 6, 45 * MIB } },
  /* The bitmaps extension lies across two sectors. */
  { .options = "cluster_size=4k,refcount_bits=8",
    .disk_mib = 10, .room_mib = 4, .bare = true, .pad = 880,
    .windows = { 65536, MIB + 4096, 6, 10 * MIB } },
  /* The same, with bitmaps. */
  { .options = "cluster_size=4k,refcount_bits=32",
    .disk_mib = 10, .room_mib = 4, .pad = 880,
    .windows = { 65536, MIB + 4096, 6, 10 * MIB } },
  /* L2 tables and clusters in common with snapshots. */
  { .options = "cluster_size=512", .disk_mib = 8, .room_mib = 8,
    .snapshots = 2, .windows = { 65536, MIB + 512, 6, 8 * MIB } },
  { .options = "cluster_size=4k", .disk_mib = 20, .room_mib = 8,
    .snapshots = 3, .windows = { 65536, 3 * MIB, 6, 20 * MIB } },
  { .options = "cluster_size=64k", .disk_mib = 700, .room_mib = 16,
    .windows = { 262144, 100 * MIB, 6, 700 * MIB } },
};
const size_t nr_kinds = sizeof kinds / sizeof kinds[0];

static void
load_image (const char *file, struct crash_image *image)
{
  FILE *fp = fopen (file, "re");

  assert_non_null (fp);
  image->size = fread (image->bytes, 1, image->room, fp);
  assert_true (image->size < image->room);
  fclose (fp);
}

/* Free clusters are full of garbage, and there are some at the end. */
static void
add_garbage (struct crash_image *image)
{
  struct checked k;
  uint64_t cluster_size;

  if (!check_image (&k, image))
    fail_msg ("%s", k.error);
  cluster_size = UINT64_C (1) << k.cluster_bits;
  image->size = round_up (image->size, cluster_size)
    + max_u64 (200000, 2 * cluster_size);
  assert_true (image->size < image->room);
  for (uint64_t c = 0; c < image->size >> k.cluster_bits; ++c)
    if (k.references[c] == 0)
      memset (image->bytes + (c << k.cluster_bits), 0xaa, cluster_size);
  checked_free (&k);
}

/* Add a header extension, before that of the bitmaps, which is the last,
 * if there is one, and garbage behind the END marker.
 */
static void
add_pad (struct crash_image *image, unsigned bytes)
{
  uint8_t *p = image->bytes + get_be32 (image->bytes + 100);
  uint8_t *end = image->bytes
    + (UINT64_C (1) << get_be32 (image->bytes + 20));

  while (get_be32 (p) != 0 && get_be32 (p) != 0x23852875)
    p += 8 + round_up (get_be32 (p + 4), 8);
  memmove (p + 8 + bytes, p, 32);
  memset (p, 0, 8 + bytes);
  put_be32 (p, 0x70616464);
  put_be32 (p + 4, bytes);
  p += 8 + bytes;
  p += get_be32 (p) != 0 ? 40 : 8;
  memset (p, 0xaa, end - p);
}

/* Data and zeroes in all windows, and a snapshot of that. */
static void
take_snapshot (const struct kind *kind, const char *file, unsigned i)
{
  for (unsigned w = 0; w < kind->windows.nr; ++w)
    assert_int_equal (
      run_command ("qemu-io -f qcow2 -c 'write -q -P %u %" PRIu64 " %u' "
                   "-c 'write -q -z %" PRIu64 " 8k' '%s' >/dev/null",
                   10 + i, w * kind->windows.apart + 12288 * i, 40000,
                   w * kind->windows.apart + 49152, file), 0);
  assert_int_equal (run_command ("qemu-img snapshot -c s%u '%s'", i, file), 0);
}

/* Data in a window, bitmaps, one of them disabled with something in it. */
static void
make_kind (struct kind *kind)
{
  const char *file = temp_file ("kind.qcow2");
  const uint64_t filler = kind->filler_kib << 10;
  const char *skip = kind->bare ? ":" : "";

  assert_int_equal (
    run_command ("set -e; exec >/dev/null; f='%s'; "
                 "qemu-img create -q -f qcow2 -o %s $f %" PRIu64 "M; "
                 "%s qemu-img bitmap --add -g 512 $f fine; "
                 "qemu-io -f qcow2 -c 'write -P 7 0 30k' $f; "
                 "%s qemu-img bitmap --add -g 4k $f off; "
                 "%s qemu-img bitmap --merge fine --disable $f off; "
                 "%s qemu-img bitmap --add -g 4k $f medium; "
                 "%s qemu-img bitmap --add -g 64k $f coarse; "
                 "if test %" PRIu64 " != 0; then "
                 "qemu-io -f qcow2 -c 'write -P 9 %" PRIu64 " %" PRIu64 "'"
                 " $f; fi",
                 file, kind->options, kind->disk_mib, skip, skip, skip, skip,
                 skip, filler, kind->disk_mib * MIB - filler, filler), 0);
  for (unsigned i = 0; i < kind->snapshots; ++i)
    take_snapshot (kind, file, i);
  kind->image = crash_image_new (kind->room_mib * MIB);
  load_image (file, &kind->image);
  if (kind->pad != 0)
    add_pad (&kind->image, kind->pad);
  if (kind->unknown_autoclear)
    kind->image.bytes[88] |= UNKNOWN_AUTOCLEAR;
  add_garbage (&kind->image);
  kind->left = crash_image_new (kind->image.room);
}

void
make_kinds (void)
{
  for (size_t i = 0; i < nr_kinds; ++i)
    make_kind (&kinds[i]);
}

void
free_kinds (void)
{
  for (size_t i = 0; i < nr_kinds; ++i) {
    crash_image_free (&kinds[i].image);
    crash_image_free (&kinds[i].left);
  }
}
