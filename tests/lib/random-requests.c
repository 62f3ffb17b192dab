/* nbdkit-dirty-bitmap-filter
 * SPDX-License-Identifier: BSD-3-Clause
 * Copyright the nbdkit-dirty-bitmap-filter authors
 */

#include <config.h>

#include <inttypes.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include <cmocka.h>

#include "common/bytes.h"
#include "image.h"
#include "qcow2/qcow2.h"
#include "random-requests.h"

/* A trim makes whole clusters zero.  Of the rest each byte may be what
 * it was or zero, and the model takes over what it is.
 */
static void
check_trimmed (struct random_requests *r, uint64_t count, uint64_t offset,
               uint8_t *buf)
{
  const uint64_t cs = qcow2_cluster_size (r->q), end = offset + count;
  const uint64_t first = round_up (max_u64 (offset, r->trim_from), cs);
  const uint64_t last = end == qcow2_size (r->q) ? end : round_down (end, cs);

  assert_int_equal (qcow2_read (r->q, buf, count, offset), 0);
  for (uint64_t i = 0; i < count; ++i) {
    const uint64_t at = offset + i;

    if (buf[i] != 0 && (buf[i] != r->model[at] || (at >= first && at < last)))
      fail_msg ("byte %" PRIu64 " is %u after a trim of %" PRIu64 " bytes at %"
                PRIu64 ", and was %u", at, buf[i], count, offset,
                r->model[at]);
    r->model[at] = buf[i];
  }
}

/* How many bytes of [at, end) from at on the tables say to be zero. */
static uint64_t
zeroes_at (struct qcow2 *q, uint64_t at, uint64_t end)
{
  const uint64_t begin = at;
  enum qcow2_extent_type type;
  uint64_t length;
  unsigned depth;

  for (; at < end; at += length) {
    assert_int_equal (qcow2_extent (q, at, end, &length, &type, &depth), 0);
    if (type == QCOW2_EXTENT_DATA)
      break;
  }
  return at - begin;
}

/* How long the data of a piece have to be. */
static uint64_t
data_length (struct qcow2 *q, uint64_t offset, const struct qcow2_chunk *c)
{
  const uint64_t end = offset + c->count;
  uint64_t at = offset;

  while (at < end) {
    const uint64_t zeroes = zeroes_at (q, at, end);

    if (at > offset && zeroes >= c->min_hole)
      break;
    at += max_u64 (zeroes, 1);
  }
  return at - offset;
}

static void
check_chunk (const struct random_requests *r, uint64_t offset,
             const struct qcow2_chunk *c)
{
  assert_true (c->length > 0 && c->length <= (c->is_hole ? c->limit
                                                         : c->count));
  if (c->is_hole) {
    assert_true (c->length >= c->min_hole || c->length == c->limit);
    for (uint64_t i = 0; i < c->length; ++i)
      if (r->model[offset + i] != 0)
        fail_msg ("the hole at %" PRIu64 " hides the byte at %" PRIu64,
                  offset, offset + i);
  }
  else
    assert_memory_equal (c->buf, r->model + offset, c->length);
  if (!r->all_told)
    return;

  const uint64_t zeroes = zeroes_at (r->q, offset, offset + c->limit);

  assert_int_equal (c->is_hole, zeroes >= c->min_hole || zeroes == c->limit);
  assert_int_equal (c->length,
                    c->is_hole ? zeroes : data_length (r->q, offset, c));
}

/* Piece by piece, and sometimes without a buffer first. */
static int
read_in_chunks (struct random_requests *r, uint8_t *buf, uint64_t count,
                uint64_t offset)
{
  static const uint64_t min_holes[] = { 1, 512, 4096, 32768, UINT64_MAX };
  const uint64_t end = offset + count;
  const uint64_t part = 1 + random_next (&r->seed) % count;
  const uint64_t min_hole = min_holes[random_next (&r->seed) % 5];

  while (offset < end) {
    struct qcow2_chunk c = {
      .buf = random_next (&r->seed) % 2 ? buf : NULL,
      .count = min_u64 (part, end - offset), .limit = end - offset,
      .min_hole = min_hole,
    };
    const bool looked = c.buf == NULL;

    memset (buf, 0xa5, c.count);
    if (qcow2_read_chunk (r->q, offset, &c) == -1)
      return -1;
    if (looked && !c.is_hole) {
      assert_int_equal (c.length, 0);
      c.buf = buf;
      if (qcow2_read_chunk (r->q, offset, &c) == -1)
        return -1;
      /* Only another thread could have made a hole of it. */
      assert_true (!c.is_hole || !r->all_told);
    }
    if (c.is_hole)
      for (uint64_t i = 0; i < c.count; ++i)
        assert_int_equal (buf[i], 0xa5);
    check_chunk (r, offset, &c);
    offset += c.length;
  }
  return 0;
}

int
random_request (struct random_requests *r)
{
  const uint64_t dice = random_next (&r->seed);
  const uint64_t align = (dice >> 8) % 3 == 0 ? 1
    : (dice >> 8) % 3 == 1 ? 512 : qcow2_cluster_size (r->q);
  uint64_t offset = r->low + random_next (&r->seed) % (r->high - r->low);
  uint64_t count = 1 + random_next (&r->seed) % r->max;
  int ret;

  offset = max_u64 (r->low, round_down (offset, align));
  count = min_u64 (round_up (count, align), r->high - offset);
  uint8_t *buf = malloc (count);
  assert_non_null (buf);

  switch (dice % 10) {
  case 0: case 1: case 2: case 3:
    memset (buf, 1 + (dice >> 16) % 255, count);
    ret = qcow2_write (r->q, buf, count, offset);
    if (ret == 0)
      memcpy (r->model + offset, buf, count);
    break;
  case 4: case 5:
    ret = qcow2_zero (r->q, count, offset,
                      dice >> 20 & 1 ? QCOW2_ZERO_KEEP : 0);
    if (ret == 0)
      memset (r->model + offset, 0, count);
    break;
  case 6:
    ret = qcow2_trim (r->q, count, offset);
    if (ret == 0)
      check_trimmed (r, count, offset, buf);
    break;
  case 7:
    ret = qcow2_flush (r->q);
    break;
  case 8:
    ret = read_in_chunks (r, buf, count, offset);
    break;
  default:
    ret = qcow2_read (r->q, buf, count, offset);
    if (ret == 0)
      assert_memory_equal (buf, r->model + offset, count);
  }
  free (buf);
  return ret;
}

static void
check_extents (struct qcow2 *q, const uint8_t *model)
{
  const uint64_t size = qcow2_size (q);
  uint64_t length;

  for (uint64_t at = 0; at < size; at += length) {
    enum qcow2_extent_type type;
    unsigned depth;

    assert_int_equal (qcow2_extent (q, at, size, &length, &type, &depth), 0);
    assert_true (length > 0 && length <= size - at);
    if (type == QCOW2_EXTENT_DATA)
      continue;
    for (uint64_t i = at; i < at + length; ++i)
      if (model[i] != 0)
        fail_msg ("the extent at %" PRIu64 " hides the byte at %" PRIu64,
                  at, i);
  }
}

void
compare_all (struct qcow2 *q, const uint8_t *model)
{
  const uint64_t size = qcow2_size (q);
  uint8_t *buf = malloc (size);

  assert_non_null (buf);
  assert_int_equal (qcow2_read (q, buf, size, 0), 0);
  assert_memory_equal (buf, model, size);
  free (buf);
  check_extents (q, model);
}

uint8_t *
read_by_qemu (uint64_t size)
{
  char raw[512];
  uint8_t *buf = malloc (size);
  FILE *fp;

  snprintf (raw, sizeof raw, "%s", temp_file ("check.raw"));
  assert_int_equal (run_command ("qemu-img convert -O raw '%s' '%s'",
                                 temp_file ("check.qcow2"), raw), 0);
  fp = fopen (raw, "re");
  assert_non_null (fp);
  assert_non_null (buf);
  assert_int_equal (fread (buf, 1, size, fp), size);
  fclose (fp);
  return buf;
}

void
compare_with_qemu (struct container *c, const uint8_t *model, uint64_t size)
{
  uint8_t *buf;

  image_check (c, 1);
  buf = read_by_qemu (size);
  assert_memory_equal (buf, model, size);
  free (buf);
}
