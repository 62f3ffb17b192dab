/* nbdkit-dirty-bitmap-filter
 * SPDX-License-Identifier: BSD-3-Clause
 * Copyright the nbdkit-dirty-bitmap-filter authors
 */

/* The images that universes begin with, made by QEMU's tools, but for one
 * that we make.
 */

#include <config.h>

#include <inttypes.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include <cmocka.h>

#include "common/bytes.h"
#include "crash-universe.h"
#include "container/container.h"
#include "image.h"

#define KIB (UINT64_C (1) << 10)
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
  /* The backing file's name has to move, and lies across sectors. */
  { .options = "cluster_size=4k,backing_fmt=raw", .backing = "raw",
    .disk_mib = 10, .room_mib = 4, .bare = true, .name_bytes = 700,
    .windows = { 65536, MIB + 4096, 6, 10 * MIB } },
  { .options = "cluster_size=1k,backing_fmt=qcow2", .backing = "qcow2",
    .disk_mib = 4, .room_mib = 4, .bare = true, .name_bytes = 350,
    .windows = { 65536, 600 * KIB, 6, 4 * MIB } },
  /* What is not written to comes from below. */
  { .options = "cluster_size=512,backing_fmt=raw", .backing = "raw",
    .disk_mib = 6, .room_mib = 6,
    .windows = { 65536, MIB - 512, 6, 6 * MIB } },
  { .options = "cluster_size=4k,backing_fmt=qcow2,refcount_bits=64",
    .backing = "qcow2", .disk_mib = 10, .room_mib = 6,
    .windows = { 65536, MIB + 4096, 6, 10 * MIB } },
  { .options = "compat=0.10,cluster_size=4k,backing_fmt=raw",
    .backing = "raw", .disk_mib = 10, .room_mib = 4, .bare = true,
    .windows = { 65536, MIB + 4096, 6, 10 * MIB } },
  /* Subclusters of 512 bytes. */
  { .options = "cluster_size=16k,extended_l2=on",
    .disk_mib = 24, .room_mib = 8,
    .windows = { 65536, 4 * MIB, 6, 24 * MIB } },
  { .options = "cluster_size=16k,extended_l2=on,backing_fmt=raw",
    .backing = "raw", .disk_mib = 24, .room_mib = 8,
    .windows = { 65536, 4 * MIB, 6, 24 * MIB } },
  { .options = "cluster_size=4k,data_file=", .data_file = true,
    .disk_mib = 4, .room_mib = 4,
    .windows = { 65536, 600 * KIB, 6, 4 * MIB } },
  /* The disk is beside the image.  The last window ends where it ends, or
   * before a part of a sector.
   */
  { .options = "cluster_size=512", .beside = true,
    .disk_mib = 5, .disk_rest = 62976 + 200, .room_mib = 4,
    .windows = { 62976, MIB, 6, 5 * MIB + 62976 + 200 } },
  { .options = "cluster_size=4k,refcount_bits=64", .beside = true,
    .disk_mib = 10, .disk_rest = 62976, .room_mib = 4,
    .windows = { 62976, 2 * MIB, 6, 10 * MIB + 62976 } },
  { .options = "cluster_size=64k", .beside = true, .ours = true,
    .bare = true, .unknown_autoclear = true,
    .disk_mib = 5, .disk_rest = 62976 + 1, .room_mib = 8,
    .windows = { 62976, MIB, 6, 5 * MIB + 62976 + 1 } },
  { .options = "cluster_size=4k", .beside = true, .damaged = true,
    .disk_mib = 5, .disk_rest = 62976, .room_mib = 4,
    .windows = { 62976, MIB, 6, 5 * MIB + 62976 } },
};
const size_t nr_kinds = sizeof kinds / sizeof kinds[0];

static void
save_bytes (const char *file, const uint8_t *bytes, uint64_t size)
{
  FILE *fp = fopen (file, "we");

  assert_non_null (fp);
  assert_int_equal (fwrite (bytes, 1, size, fp), size);
  assert_int_equal (fclose (fp), 0);
}

static void
load_image (const char *file, struct crash_image *image)
{
  FILE *fp = fopen (file, "re");

  assert_non_null (fp);
  image->size = fread (image->bytes, 1, image->room, fp);
  assert_true (image->size < image->room);
  fclose (fp);
}

/* So is the first half of a data file, where nothing is; and it ends
 * there.
 */
static void
add_data_garbage (const struct checked *k, struct crash_image *data)
{
  const uint64_t cluster_size = UINT64_C (1) << k->cluster_bits;

  data->size = k->disk_size / 2;
  for (uint64_t c = 0; c < data->room >> k->cluster_bits; ++c)
    if (c << k->cluster_bits >= data->size)
      assert_null (checked_unit (k, c));
    else if (checked_unit (k, c) == NULL)
      memset (data->bytes + (c << k->cluster_bits), 0xaa, cluster_size);
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
  if (image->data != NULL && !image->beside)
    add_data_garbage (&k, image->data);
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

/* What is in a backing file: in the windows every sector of some runs is
 * told apart, the rest is zero.  It ends in the last window, between two
 * clusters.
 */
static void
fill_backing (struct kind *kind)
{
  struct crash_backing *b = &kind->bytes_below;
  const struct model_windows *w = &kind->windows;
  uint64_t seed = 7;

  b->size = (w->nr - 1) * w->apart + 20480 + 3 * 512;
  b->room = kind->disk_mib * MIB;
  b->bytes = calloc (1, b->room);
  assert_non_null (b->bytes);
  for (uint64_t at = 0; at < b->size; at += 512)
    if (at % w->apart < w->size && (at >> 11) % 3 != 0)
      for (unsigned i = 0; i < 512; i += 8)
        put_be64 (b->bytes + at + i, random_next (&seed));
}

/* Make the backing file, open it, and give it a name: its file name, with
 * "./" as often as it takes.
 */
static void
make_backing (struct kind *kind, char *options, size_t max)
{
  const struct qcow2_options readonly = { .readonly = true,
                                          .cache_size = 65536 };
  struct crash_backing *b = &kind->bytes_below;
  const size_t number = kind - kinds;
  char base[32], *raw;

  fill_backing (kind);
  snprintf (base, sizeof base, "below%zu.%s", number, kind->backing);
  while (strlen (b->name) + strlen (base) < kind->name_bytes)
    strcat (b->name, "./");
  strcat (b->name, base);
  raw = strdup (temp_file ("below.raw"));
  assert_non_null (raw);
  save_bytes (raw, b->bytes, b->size);
  assert_int_equal (
    run_command ("qemu-img convert -f raw -O %s '%s' '%s'", kind->backing,
                 raw, temp_file (base)), 0);
  free (raw);
  kind->backing_container = image_load (temp_file (base), b->room + MIB);
  if (strcmp (kind->backing, "raw") == 0)
    kind->below.raw = kind->backing_container;
  else {
    kind->below.image = qcow2_open (kind->backing_container, &readonly);
    assert_non_null (kind->below.image);
  }
  snprintf (options, max, "%s,backing_file=%s", kind->options, b->name);
}

const char *
data_file_name (const struct kind *kind)
{
  static char name[32];

  snprintf (name, sizeof name, "data%zu.raw", (size_t) (kind - kinds));
  return name;
}

static void
load_data_file (struct kind *kind)
{
  struct crash_image *data = malloc (sizeof *data);

  assert_non_null (data);
  *data = crash_image_new (kind->disk_mib * MIB + 1);
  load_image (temp_file (data_file_name (kind)), data);
  kind->image.data = data;
}

/* The disk beside the image: data in two windows. */
static void
make_disk (struct kind *kind)
{
  const struct model_windows *w = &kind->windows;
  const uint64_t size = kind->disk_mib * MIB + kind->disk_rest;
  struct crash_image *disk = malloc (sizeof *disk);

  assert_non_null (disk);
  *disk = crash_image_new (round_up (size, 65536));
  disk->size = size;
  memset (disk->bytes, 7, 30 * KIB);
  memset (disk->bytes + (w->nr - 1) * w->apart, 9, w->size);
  kind->image.data = disk;
  kind->image.beside = true;
}

static void
create_image (const char *file, uint64_t size)
{
  struct container *c = container_open_memory (MIB);

  assert_int_equal (qcow2_create (c, size), 0);
  image_save (c, file);
  container_close (c);
}

/* The image of a disk beside: the same bitmaps, with bits from an image that
 * has data.
 */
static void
make_bitmaps_only (struct kind *kind)
{
  const uint64_t size = kind->disk_mib * MIB + kind->disk_rest;
  const char *file = temp_file ("kind.qcow2");

  if (kind->ours)
    create_image (file, size);
  else
    assert_int_equal (
      run_command ("qemu-img create -q -f qcow2 -o %s '%s' %" PRIu64,
                   kind->options, file, round_up (size, 512)), 0);
  if (!kind->bare)
    assert_int_equal (
      run_command ("set -e; exec >/dev/null; f='%s'; "
                   "qemu-img create -q -f qcow2 $f.from %" PRIu64 "; "
                   "qemu-img bitmap --add -g 512 $f.from bits; "
                   "qemu-io -f qcow2 -c 'write -P 7 0 30k' $f.from; "
                   "qemu-img bitmap --add -g 512 "
                   "--merge bits -b $f.from -F qcow2 $f fine; "
                   "qemu-img bitmap --add -g 4k $f off; "
                   "qemu-img bitmap --merge fine --disable $f off; "
                   "qemu-img bitmap --add -g 4k $f medium; "
                   "qemu-img bitmap --add -g 64k $f coarse",
                   file, round_up (size, 512)), 0);
  kind->image = crash_image_new (kind->room_mib * MIB);
  load_image (file, &kind->image);
  make_disk (kind);
}

/* The first cluster of bits of the first bitmap is beyond the end. */
static void
damage_bitmaps (struct crash_image *image)
{
  uint8_t *p = image->bytes + get_be32 (image->bytes + 100);

  while (get_be32 (p) != 0x23852875) {
    assert_int_not_equal (get_be32 (p), 0);
    p += 8 + round_up (get_be32 (p + 4), 8);
  }
  p = image->bytes + get_be64 (p + 24);
  put_be64 (image->bytes + get_be64 (p), image->room);
  image->damaged = true;
}

/* Data in a window, bitmaps, one of them disabled with something in it. */
static void
make_image (struct kind *kind)
{
  char options[1200];
  const char *file;
  const uint64_t filler = kind->filler_kib << 10;
  const char *skip = kind->bare ? ":" : "";

  snprintf (options, sizeof options, "%s%s", kind->options,
            kind->data_file ? data_file_name (kind) : "");
  if (kind->backing != NULL)
    make_backing (kind, options, sizeof options);
  file = temp_file ("kind.qcow2");
  assert_int_equal (
    run_command ("set -e; exec >/dev/null; f='%s'; cd \"${f%%/*}\"; "
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
                 file, options, kind->disk_mib, skip, skip, skip, skip,
                 skip, filler, kind->disk_mib * MIB - filler, filler), 0);
  for (unsigned i = 0; i < kind->snapshots; ++i)
    take_snapshot (kind, file, i);
  kind->image = crash_image_new (kind->room_mib * MIB);
  load_image (file, &kind->image);
  if (kind->backing != NULL)
    kind->image.backing = &kind->bytes_below;
  if (kind->data_file)
    load_data_file (kind);
}

static void
make_kind (struct kind *kind)
{
  (kind->beside ? make_bitmaps_only : make_image) (kind);
  if (kind->pad != 0)
    add_pad (&kind->image, kind->pad);
  if (kind->unknown_autoclear)
    kind->image.bytes[88] |= UNKNOWN_AUTOCLEAR;
  add_garbage (&kind->image);
  if (kind->damaged)
    damage_bitmaps (&kind->image);
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
    qcow2_close (kinds[i].below.image);
    if (kinds[i].backing_container != NULL)
      container_close (kinds[i].backing_container);
    free (kinds[i].bytes_below.bytes);
  }
}
