/* nbdkit-dirty-bitmap-filter
 * SPDX-License-Identifier: BSD-3-Clause
 * Copyright the nbdkit-dirty-bitmap-filter authors
 */

/* Entries of a refcount block as bits. */

#include <config.h>

#include "common/bytes.h"
#include "qcow2/refcount-format.h"

uint64_t
refcount_format_get (const uint8_t *data, unsigned order, uint64_t i)
{
  switch (order) {
  case 0: return data[i / 8] >> (i % 8) & 1;
  case 1: return data[i / 4] >> (i % 4 * 2) & 3;
  case 2: return data[i / 2] >> (i % 2 * 4) & 15;
  case 3: return data[i];
  case 4: return get_be16 (data + 2 * i);
  case 5: return get_be32 (data + 4 * i);
  default: return get_be64 (data + 8 * i);
  }
}

static void
set_bits (uint8_t *p, unsigned shift, unsigned mask, uint64_t v)
{
  *p = (*p & ~(mask << shift)) | v << shift;
}

void
refcount_format_set (uint8_t *data, unsigned order, uint64_t i, uint64_t v)
{
  switch (order) {
  case 0: set_bits (&data[i / 8], i % 8, 1, v); break;
  case 1: set_bits (&data[i / 4], i % 4 * 2, 3, v); break;
  case 2: set_bits (&data[i / 2], i % 2 * 4, 15, v); break;
  case 3: data[i] = v; break;
  case 4: put_be16 (data + 2 * i, v); break;
  case 5: put_be32 (data + 4 * i, v); break;
  default: put_be64 (data + 8 * i, v);
  }
}

uint64_t
refcount_format_max (unsigned order)
{
  const unsigned bits = 1U << order;

  return bits == 64 ? UINT64_MAX : (UINT64_C (1) << bits) - 1;
}
