/* nbdkit-dirty-bitmap-filter
 * SPDX-License-Identifier: BSD-3-Clause
 * Copyright the nbdkit-dirty-bitmap-filter authors
 */

#ifndef DIRTY_BITMAP_BYTES_H
#define DIRTY_BITMAP_BYTES_H

/* Big-endian integers at any alignment, and arithmetic on untrusted numbers. */

#include <endian.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <string.h>

static inline uint16_t
get_be16 (const void *p)
{
  uint16_t v;

  memcpy (&v, p, sizeof v);
  return be16toh (v);
}

static inline uint32_t
get_be32 (const void *p)
{
  uint32_t v;

  memcpy (&v, p, sizeof v);
  return be32toh (v);
}

static inline uint64_t
get_be64 (const void *p)
{
  uint64_t v;

  memcpy (&v, p, sizeof v);
  return be64toh (v);
}

static inline void
put_be16 (void *p, uint16_t v)
{
  v = htobe16 (v);
  memcpy (p, &v, sizeof v);
}

static inline void
put_be32 (void *p, uint32_t v)
{
  v = htobe32 (v);
  memcpy (p, &v, sizeof v);
}

static inline void
put_be64 (void *p, uint64_t v)
{
  v = htobe64 (v);
  memcpy (p, &v, sizeof v);
}

/* True if [offset, offset+count) does not lie inside [0, size). */
static inline bool
range_exceeds (uint64_t offset, uint64_t count, uint64_t size)
{
  return offset > size || count > size - offset;
}

static inline bool
is_power_of_2 (uint64_t v)
{
  return v != 0 && (v & (v - 1)) == 0;
}

static inline uint64_t
div_round_up (uint64_t n, uint64_t d)
{
  return n / d + (n % d != 0);
}

/* Alignments are powers of two.  round_up may wrap for numbers near 2^64:
 * check the range of untrusted numbers first.
 */
static inline uint64_t
round_down (uint64_t n, uint64_t align)
{
  return n & ~(align - 1);
}

static inline uint64_t
round_up (uint64_t n, uint64_t align)
{
  return round_down (n + align - 1, align);
}

static inline uint64_t
min_u64 (uint64_t a, uint64_t b)
{
  return a < b ? a : b;
}

static inline uint64_t
max_u64 (uint64_t a, uint64_t b)
{
  return a > b ? a : b;
}

/* Are all bytes zero?  Most data are not, and are known by their first bytes;
 * then each byte is compared with the one 16 before it.
 */
static inline bool
bytes_are_zero (const void *buf, size_t count)
{
  static const uint8_t zeroes[16];
  const size_t first = count < sizeof zeroes ? count : sizeof zeroes;
  const uint8_t *p = buf;

  return memcmp (p, zeroes, first) == 0 &&
    memcmp (p, p + first, count - first) == 0;
}

#endif /* DIRTY_BITMAP_BYTES_H */
