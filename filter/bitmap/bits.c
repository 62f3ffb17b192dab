/* nbdkit-dirty-bitmap-filter
 * SPDX-License-Identifier: BSD-3-Clause
 * Copyright the nbdkit-dirty-bitmap-filter authors
 */

/* The bits of one bitmap in RAM.
 *
 * The array is zeroed by the kernel when it is first touched, and large
 * parts of it never are: populated says which pieces hold a set bit, and
 * searches for one look only there.
 *
 * An image can say in a few bytes that a bitmap of 512 MiB is all ones.
 * So where a large array is filled with ones, it is one file of them that
 * is mapped, again and again, and copied by the kernel where a bit is
 * changed, if any is.
 *
 * Bits are only ever set while the bitmap is served.  So a search may
 * run against marks: it sees some moment's value of each word, and one
 * that was complete before the search began is always seen.  For this
 * populated is set before the bits (release), and whoever finds a bit
 * set (acquire) finds its piece populated.
 *
 * Bits at and after nr_bits are clear: bits_loaded sees to it for what
 * comes from the image, and marks are clipped to the disk's size.
 */

#include <config.h>

#include <endian.h>
#include <errno.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

#include "bitmap/bits.h"
#include "common/bytes.h"

/* What the system may use for memory that is filled whole: thousands of
 * page faults less.  Elsewhere it is of no use, but does no harm.
 */
#define LARGE_PAGE (UINT64_C (2) << 20)

/* The size of the file of ones.  Arrays that are larger are mapped. */
#define ONES_BYTES (UINT64_C (2) << 20)

static void *
new_words (struct bits *bits)
{
  const uint64_t bytes = bits->nr_pieces * PIECE_BYTES;
  void *p;

  bits->mapped_bytes = 0;
  if (bytes <= ONES_BYTES)
    return calloc (bits->nr_pieces, PIECE_BYTES);
  p = mmap (NULL, bytes, PROT_READ | PROT_WRITE,
            MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (p == MAP_FAILED)
    return NULL;
  bits->mapped_bytes = bytes;
  return p;
}

int
bits_init (struct bits *bits, uint64_t nr_bits)
{
  bits->nr_bits = nr_bits;
  bits->nr_pieces = div_round_up (nr_bits, PIECE_BITS);
  bits->words = new_words (bits);
  bits->populated = calloc (div_round_up (bits->nr_pieces, 64), 8);
  if (bits->words == NULL || bits->populated == NULL) {
    bits_free (bits);
    errno = ENOMEM;
    return -1;
  }
  return 0;
}

void
bits_free (struct bits *bits)
{
  if (bits->mapped_bytes != 0)
    munmap (bits->words, bits->mapped_bytes);
  else
    free (bits->words);
  bits->mapped_bytes = 0;
  free (bits->populated);
  bits->words = NULL;
  bits->populated = NULL;
}

static inline uint64_t
load (const _Atomic uint64_t *word)
{
  return atomic_load_explicit (word, memory_order_acquire);
}

bool
bits_set_in_piece (struct bits *bits, uint64_t first, uint64_t last)
{
  uint64_t piece = first / PIECE_BITS;
  uint64_t flag = UINT64_C (1) << (piece % 64);
  uint64_t mask = ~UINT64_C (0) << (first % 64);
  bool changed = false;

  if (!(load (&bits->populated[piece / 64]) & flag))
    atomic_fetch_or_explicit (&bits->populated[piece / 64], flag,
                              memory_order_release);

  for (uint64_t w = first / 64; w <= last / 64; ++w, mask = ~UINT64_C (0)) {
    if (w == last / 64)
      mask &= ~UINT64_C (0) >> (63 - last % 64);
    if ((load (&bits->words[w]) & mask) != mask) {
      atomic_fetch_or_explicit (&bits->words[w], mask, memory_order_release);
      changed = true;
    }
  }
  return changed;
}

bool
bits_all_populated (const struct bits *bits, uint64_t first, uint64_t last)
{
  for (; first <= last; ++first) {
    if (first % 64 == 0 && last - first >= 63 &&
        load (&bits->populated[first / 64]) == UINT64_MAX)
      first += 63;
    else if (!bits_is_populated (bits, first))
      return false;
  }
  return true;
}

uint64_t
bits_count (const struct bits *bits, uint64_t *bytes)
{
  uint64_t n = 0, pieces = 0;

  for (uint64_t i = 0; i < div_round_up (bits->nr_pieces, 64); ++i)
    for (uint64_t flags = load (&bits->populated[i]); flags != 0;
         flags &= flags - 1) {
      const uint64_t piece = i * 64 + __builtin_ctzll (flags);

      for (unsigned w = 0; w < PIECE_WORDS; ++w)
        n += __builtin_popcountll (load (&bits->words[piece * PIECE_WORDS
                                                      + w]));
      pieces++;
    }
  *bytes = pieces * PIECE_BYTES;
  return n;
}

/* The first populated piece at or after from, or nr_pieces. */
static uint64_t
next_populated (const struct bits *bits, uint64_t from)
{
  if (from >= bits->nr_pieces)
    return bits->nr_pieces;

  uint64_t nr_flag_words = div_round_up (bits->nr_pieces, 64);
  uint64_t w = from / 64;
  uint64_t v = load (&bits->populated[w]) & (~UINT64_C (0) << (from % 64));

  while (v == 0) {
    if (++w == nr_flag_words)
      return bits->nr_pieces;
    v = load (&bits->populated[w]);
  }
  return w * 64 + __builtin_ctzll (v);
}

uint64_t
bits_next_clear (const struct bits *bits, uint64_t from, uint64_t end)
{
  uint64_t mask = ~UINT64_C (0) << (from % 64);

  for (uint64_t w = from / 64; w * 64 < end; ++w, mask = ~UINT64_C (0)) {
    uint64_t v = ~load (&bits->words[w]) & mask;

    if (v != 0)
      return min_u64 (w * 64 + __builtin_ctzll (v), end);
  }
  return end;
}

/* The first word at or after w that may have a set bit, where w begins
 * a piece; else w itself.
 */
static inline uint64_t
skip_clear_pieces (const struct bits *bits, uint64_t w)
{
  return w % PIECE_WORDS != 0
    ? w : next_populated (bits, w / PIECE_WORDS) * PIECE_WORDS;
}

/* A run ends where a bit differs from the one before it.  A word is
 * loaded once, and all such bits of it are found at once.
 */
size_t
bits_runs (const struct bits *bits, uint64_t from, uint64_t end,
           unsigned shift, uint64_t *ends, size_t max, bool *set)
{
  uint64_t w = from / 64, v = load (&bits->words[w]);
  uint64_t run = v >> (from % 64) & 1; /* of the bit before the next */
  uint64_t mask = ~UINT64_C (1) << (from % 64);
  size_t n = 0;

  *set = run != 0;
  for (;;) {
    uint64_t turns = (v ^ (v << 1 | run)) & mask;

    if (end - w * 64 < 64)
      turns &= (UINT64_C (1) << (end - w * 64)) - 1;
    for (; turns != 0; turns &= turns - 1) {
      ends[n++] = (w * 64 + __builtin_ctzll (turns)) << shift;
      if (n == max)
        return n;
    }
    run = v >> 63;
    mask = ~UINT64_C (0);
    w++;
    if (run == 0)
      w = skip_clear_pieces (bits, w);
    if (w * 64 >= end) {
      ends[n++] = end << shift;
      return n;
    }
    v = load (&bits->words[w]);
  }
}

void
bits_copy_out (const struct bits *bits, void *buf, uint64_t first_word,
               size_t nr_words)
{
  uint64_t *out = buf;

  for (size_t i = 0; i < nr_words; ++i)
    out[i] = htole64 (atomic_load_explicit (&bits->words[first_word + i],
                                            memory_order_relaxed));
}

void *
bits_bytes (struct bits *bits, uint64_t offset)
{
  return (uint8_t *) bits->words + offset;
}

void
bits_expect (struct bits *bits, uint64_t offset, uint64_t count)
{
  const uintptr_t start = (uintptr_t) bits->words + offset;
  const uintptr_t from = round_up (start, LARGE_PAGE);
  const uintptr_t to = round_down (start + count, LARGE_PAGE);

  if (bits->mapped_bytes != 0 && from < to)
    madvise ((void *) from, to - from, MADV_HUGEPAGE);
}

void
bits_loaded (struct bits *bits, uint64_t offset, uint64_t count)
{
  uint64_t *words = (uint64_t *) bits->words;
  uint64_t tail = bits->nr_bits / 64;
  uint64_t first = offset / 8, end = (offset + count) / 8;

  if (first <= tail && tail < end) {
    words[tail] &= htole64 ((UINT64_C (1) << (bits->nr_bits % 64)) - 1);
    memset (&words[tail + 1], 0, 8 * (end - tail - 1));
  }
  for (uint64_t w = first; w < end; w += PIECE_WORDS) {
    const uint64_t piece = w / PIECE_WORDS;
    uint64_t any = 0;

    for (unsigned i = 0; i < PIECE_WORDS; ++i) {
      words[w + i] = le64toh (words[w + i]);
      any |= words[w + i];
    }
    if (any != 0)
      bits->populated[piece / 64] |= UINT64_C (1) << (piece % 64);
  }
}

/* A file of ones, or -1. */
static int
open_ones (void)
{
  const int fd = memfd_create ("ones", MFD_CLOEXEC);
  void *p;

  if (fd == -1)
    return -1;
  if (ftruncate (fd, ONES_BYTES) == 0) {
    p = mmap (NULL, ONES_BYTES, PROT_WRITE, MAP_SHARED, fd, 0);
    if (p != MAP_FAILED) {
      memset (p, 0xff, ONES_BYTES);
      munmap (p, ONES_BYTES);
      return fd;
    }
  }
  close (fd);
  return -1;
}

/* Map ones where they fit into [offset, end).  Returns how far. */
static uint64_t
map_ones (struct bits *bits, uint64_t offset, uint64_t end)
{
  char *const words = (char *) bits->words;
  const int fd = end - offset < ONES_BYTES ? -1 : open_ones ();

  if (fd == -1)
    return offset;
  for (; end - offset >= ONES_BYTES; offset += ONES_BYTES)
    if (mmap (words + offset, ONES_BYTES, PROT_READ | PROT_WRITE,
              MAP_PRIVATE | MAP_FIXED | MAP_NORESERVE, fd, 0) == MAP_FAILED)
      break;
  close (fd);
  return offset;
}

void
bits_fill (struct bits *bits, uint64_t offset, uint64_t count)
{
  uint64_t *words = (uint64_t *) bits->words;
  const uint64_t end = offset + count, tail = bits->nr_bits / 64;
  uint64_t first = end, last = end;

  if (bits->mapped_bytes != 0 && end - offset >= ONES_BYTES) {
    first = round_up (offset, ONES_BYTES);
    last = map_ones (bits, first, end);
  }
  memset ((char *) words + offset, 0xff, first - offset);
  memset ((char *) words + last, 0xff, end - last);
  if (offset / 8 <= tail && tail < end / 8) {
    words[tail] = (UINT64_C (1) << (bits->nr_bits % 64)) - 1;
    memset (&words[tail + 1], 0, 8 * (end / 8 - tail - 1));
  }
  for (uint64_t piece = offset / PIECE_BYTES; piece * PIECE_BYTES < end;
       ++piece)
    bits->populated[piece / 64] |= UINT64_C (1) << (piece % 64);
}
