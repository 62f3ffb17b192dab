/* nbdkit-dirty-bitmap-filter
 * SPDX-License-Identifier: BSD-3-Clause
 * Copyright the nbdkit-dirty-bitmap-filter authors
 */

/* Mutate an input that is a list of runs, knowing a little of what is
 * in them: images are made of big-endian words, most of which are host
 * offsets with flags, and the header says how large a cluster is.
 *
 * What it knows only helps it to find something sooner.  A part of all
 * mutations are libFuzzer's own, of one run or of the whole, so nothing
 * is out of reach.
 */

#include <config.h>

#include <stdlib.h>
#include <string.h>

#include "common/bytes.h"
#include "fuzz.h"

#define MAX_RUNS 256
#define MAX_RUN_BYTES 4096

struct list {
  struct fuzz_run run[MAX_RUNS];
  unsigned nr;
  uint64_t random;
  uint64_t cluster_size;        /* as the image's header has it */
  uint64_t image_end;
};

static uint64_t
any (struct list *l, uint64_t below)
{
  uint64_t z = l->random += UINT64_C (0x9e3779b97f4a7c15);

  z = (z ^ z >> 30) * UINT64_C (0xbf58476d1ce4e5b9);
  z = (z ^ z >> 27) * UINT64_C (0x94d049bb133111eb);
  z ^= z >> 31;
  return below == 0 ? 0 : z % below;
}

/* Runs are copied out, so that one can grow. */
static void
parse (struct list *l, const uint8_t *data, size_t size)
{
  const uint8_t *p = data;

  l->nr = 0;
  l->cluster_size = 512;
  l->image_end = 0;
  while (l->nr < MAX_RUNS && fuzz_next_run (&p, data + size, &l->run[l->nr])) {
    struct fuzz_run *run = &l->run[l->nr];
    uint8_t *bytes = malloc (MAX_RUN_BYTES);

    if (bytes == NULL)
      abort ();
    run->length = min_u64 (run->length, MAX_RUN_BYTES);
    memcpy (bytes, run->bytes, run->length);
    run->bytes = bytes;
    l->nr++;
    if (run->file != FUZZ_IMAGE)
      continue;
    l->image_end = max_u64 (l->image_end, run->offset + run->length);
    if (run->offset == 0 && run->length >= 24)
      l->cluster_size = UINT64_C (1) << (get_be32 (bytes + 20) & 31);
  }
}

static size_t
put (const struct list *l, uint8_t *data, size_t max)
{
  size_t at = 0;

  for (unsigned i = 0; i < l->nr; ++i) {
    const struct fuzz_run *run = &l->run[i];

    if (max - at < FUZZ_RUN_HEAD + run->length)
      break;
    put_be32 (data + at,
              (uint32_t) run->file << 30 | run->offset / FUZZ_OFFSET_UNIT);
    put_be16 (data + at + 4, run->length);
    memcpy (data + at + FUZZ_RUN_HEAD, run->bytes, run->length);
    at += FUZZ_RUN_HEAD + run->length;
  }
  return at;
}

static uint8_t *
bytes_of (const struct fuzz_run *run)
{
  return (uint8_t *) run->bytes;
}

/* A number of the kind that images are made of. */
static uint64_t
interesting (struct list *l, uint64_t old)
{
  static const uint64_t flags[] = {
    UINT64_C (1) << 63, UINT64_C (1) << 63, UINT64_C (1) << 63,
    UINT64_C (1) << 62, 1, 1, 2, 0, 0, UINT64_C (3) << 62, 0x100,
    UINT64_C (1) << 56, UINT64_C (0xffffffff) << 32, 0xffffffff,
  };
  const uint64_t clusters = l->image_end / l->cluster_size + 3;

  switch (any (l, 12)) {
  case 0: return old ^ UINT64_C (1) << any (l, 64);
  case 1: return old + any (l, 17) - 8;
  case 2: return old + (any (l, 9) - 4) * l->cluster_size;
  case 3: return old ^ flags[any (l, sizeof flags / sizeof flags[0])];
  case 4: return any (l, 256);
  case 5: return (UINT64_C (1) << any (l, 64)) + any (l, 3) - 1;
  case 6: return 0;
  case 7: return any (l, 2) ? UINT64_MAX : INT64_MAX;
  default:
    return any (l, clusters) * l->cluster_size
      + flags[any (l, sizeof flags / sizeof flags[0])];
  }
}

static struct fuzz_run *
any_run (struct list *l)
{
  return &l->run[any (l, l->nr)];
}

/* Change a word, or append some. */
static void
mutate_word (struct list *l)
{
  struct fuzz_run *run = any_run (l);
  const unsigned width = run->file == FUZZ_PROGRAM ? 1 << any (l, 3)
    : any (l, 8) == 0 ? 2 : any (l, 4) == 0 ? 4 : 8;
  size_t at = run->length < width ? 0
    : any (l, run->length / width) * width;
  uint8_t word[8];

  if (any (l, 4) == 0)
    at = round_up (run->length, width);
  if (at + width > MAX_RUN_BYTES)
    return;
  if (at + width > run->length) {
    memset (bytes_of (run) + run->length, 0, at + width - run->length);
    run->length = at + width;
  }
  memset (word, 0, sizeof word);
  memcpy (word + 8 - width, run->bytes + at, width);
  put_be64 (word, interesting (l, get_be64 (word)));
  memcpy (bytes_of (run) + at, word + 8 - width, width);
}

/* Copy a word of the image to another place. */
static void
copy_word (struct list *l)
{
  const struct fuzz_run *from = any_run (l);
  struct fuzz_run *to = any_run (l);

  if (from->length >= 8 && to->length >= 8)
    memmove (bytes_of (to) + any (l, to->length / 8) * 8,
             from->bytes + any (l, from->length / 8) * 8, 8);
}

/* The fields of the header, with their sizes, that are more than most
 * words.
 */
static void
mutate_header (struct list *l)
{
  static const struct { uint8_t offset, bytes; } fields[] = {
    { 4, 4 }, { 8, 8 }, { 16, 4 }, { 20, 4 }, { 24, 8 }, { 32, 4 },
    { 36, 4 }, { 40, 8 }, { 48, 8 }, { 56, 4 }, { 60, 4 }, { 64, 8 },
    { 72, 8 }, { 80, 8 }, { 88, 8 }, { 96, 4 }, { 100, 4 }, { 104, 1 },
  };
  const unsigned i = any (l, sizeof fields / sizeof fields[0]);
  const unsigned n = fields[i].bytes;
  uint8_t word[8] = { 0 };

  for (unsigned j = 0; j < l->nr; ++j) {
    struct fuzz_run *run = &l->run[j];

    if (run->file == FUZZ_PROGRAM || run->offset != 0 || run->length < 112)
      continue;
    memcpy (word + 8 - n, run->bytes + fields[i].offset, n);
    put_be64 (word, interesting (l, get_be64 (word)));
    memcpy (bytes_of (run) + fields[i].offset, word + 8 - n, n);
    if (any (l, 2))
      return;
  }
}

static void
add_run (struct list *l)
{
  struct fuzz_run *run = &l->run[l->nr];
  uint8_t *bytes;

  if (l->nr == MAX_RUNS || (bytes = malloc (MAX_RUN_BYTES)) == NULL)
    return;
  if (l->nr > 0 && any (l, 2)) {
    const struct fuzz_run *like = any_run (l);

    *run = *like;
    memcpy (bytes, like->bytes, like->length);
  }
  else {
    run->file = any (l, 4) == 0 ? any (l, FUZZ_NR_FILES) : FUZZ_IMAGE;
    run->length = any (l, 3) == 0 ? 0 : 8 * (1 + any (l, 4));
    for (size_t i = 0; i < run->length; i += 8)
      put_be64 (bytes + i, interesting (l, 0));
  }
  run->bytes = bytes;
  run->offset = any (l, l->image_end / l->cluster_size + 3) * l->cluster_size;
  if (run->file == FUZZ_PROGRAM || any (l, 4) == 0)
    run->offset = 8 * any (l, 64);
  run->offset %= FUZZ_MAX_FILE;
  l->nr++;
}

static void
remove_run (struct list *l)
{
  const unsigned i = any (l, l->nr);

  if (l->nr < 2)
    return;
  free (bytes_of (&l->run[i]));
  l->run[i] = l->run[--l->nr];
}

static void
move_run (struct list *l)
{
  struct fuzz_run *run = any_run (l);

  run->offset += (any (l, 7) - 3) * (any (l, 3) ? l->cluster_size : 8);
  run->offset %= FUZZ_MAX_FILE;
}

/* libFuzzer's mutations within one run. */
static void
mutate_bytes (struct list *l)
{
  struct fuzz_run *run = any_run (l);
  const size_t room = any (l, 2) ? run->length
    : min_u64 (run->length + 64, MAX_RUN_BYTES);

  if (run->length > 0)
    run->length = LLVMFuzzerMutate (bytes_of (run), run->length, room);
}

size_t
fuzz_mutate_runs (uint8_t *data, size_t size, size_t max, unsigned seed)
{
  static struct list l;
  size_t n;

  l.random = seed;
  if (any (&l, 20) == 0)
    return LLVMFuzzerMutate (data, size, max);
  parse (&l, data, size);
  if (l.nr == 0)
    return LLVMFuzzerMutate (data, size, max);
  for (uint64_t i = 1 + any (&l, 4); i > 0; --i)
    switch (any (&l, 14)) {
    case 0: add_run (&l); break;
    case 1: remove_run (&l); break;
    case 2: move_run (&l); break;
    case 3: copy_word (&l); break;
    case 4: mutate_header (&l); break;
    case 5: case 6: case 7: case 8: mutate_bytes (&l); break;
    default: mutate_word (&l);
    }
  n = put (&l, data, max);
  for (unsigned i = 0; i < l.nr; ++i)
    free (bytes_of (&l.run[i]));
  return n;
}
