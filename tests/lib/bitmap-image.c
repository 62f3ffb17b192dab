/* nbdkit-dirty-bitmap-filter
 * SPDX-License-Identifier: BSD-3-Clause
 * Copyright the nbdkit-dirty-bitmap-filter authors
 */

/* Crafted images and their reader.  The recording container is in
 * bitmap-recorder.c.
 */

#include <config.h>

#include <inttypes.h>
#include <pthread.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include <cmocka.h>

#include "common/bytes.h"
#include "common/report.h"
#include "bitmap-image.h"

#define EXTENSION_MAGIC 0x23852875
#define HEADER_LENGTH 104

static uint32_t
table_entries (uint64_t size, unsigned granularity_bits,
               uint32_t cluster_size)
{
  uint64_t nr_bits = div_round_up (size, UINT64_C (1) << granularity_bits);

  return div_round_up (div_round_up (nr_bits, 8), cluster_size);
}

static void
craft_header (struct crafted *c, unsigned cluster_bits, uint64_t size,
              uint32_t l1_entries)
{
  uint8_t *p = c->bytes.p;

  put_be32 (p, 0x514649fb);
  put_be32 (p + 4, 3);
  put_be32 (p + 20, cluster_bits);
  put_be64 (p + 24, size);
  put_be32 (p + 36, l1_entries);
  put_be64 (p + 40, 3 * c->cluster_size);
  put_be64 (p + 48, c->cluster_size);
  put_be32 (p + 56, 1);
  put_be32 (p + 96, 4);
  put_be32 (p + 100, HEADER_LENGTH);
  put_be64 (p + c->cluster_size, 2 * c->cluster_size);
}

/* Count the clusters in use in the one refcount block. */
static void
craft_refcounts (struct crafted *c)
{
  size_t nr = c->bytes.n / c->cluster_size;

  assert_true (nr <= c->cluster_size / 2);
  for (size_t i = 0; i < nr; ++i)
    put_be16 (c->bytes.p + 2 * c->cluster_size + 2 * i, 1);
}

/* Append clusters, zeroed; returns the offset. */
static size_t
append (struct crafted *c, size_t bytes)
{
  size_t offset = c->bytes.n;
  size_t n = round_up (bytes, c->cluster_size);

  c->bytes.p = realloc (c->bytes.p, offset + n);
  assert_non_null (c->bytes.p);
  memset (c->bytes.p + offset, 0, n);
  c->bytes.n += n;
  return offset;
}

static void
craft_table (struct crafted *c, size_t i, const struct bitmap_spec *spec,
             uint32_t nr_entries)
{
  c->table[i] = append (c, 8 * nr_entries);
  for (size_t j = 0; spec->table && spec->table[j]; ++j) {
    uint64_t entry = spec->table[j] == '1';

    assert_true (j < nr_entries);
    if (spec->table[j] == 'd') {
      entry = append (c, c->cluster_size);
      memset (c->bytes.p + entry, spec->fill, c->cluster_size);
      if (c->first_data[i] == 0)
        c->first_data[i] = entry;
    }
    put_be64 (c->bytes.p + c->table[i] + 8 * j, entry);
  }
}

void
craft (struct crafted *c, unsigned cluster_bits, uint64_t size,
       const struct bitmap_spec *specs, size_t nr_specs)
{
  const uint64_t l2_bytes = UINT64_C (1) << (2 * cluster_bits - 3);
  const uint32_t l1_entries = div_round_up (size, l2_bytes);

  memset (c, 0, sizeof *c);
  c->cluster_size = 1U << cluster_bits;
  append (c, 3 * c->cluster_size);
  append (c, 8 * l1_entries);
  craft_header (c, cluster_bits, size, l1_entries);
  c->extension = HEADER_LENGTH;

  for (size_t i = 0; i < nr_specs; ++i) {
    c->entry[i] = c->directory_bytes;
    c->directory_bytes += round_up (24 + strlen (specs[i].name), 8);
  }
  if (nr_specs > 0)
    c->directory = append (c, c->directory_bytes);

  for (size_t i = 0; i < nr_specs; ++i) {
    uint32_t nr_entries = table_entries (size, specs[i].granularity_bits,
                                         c->cluster_size);
    uint8_t *p;

    craft_table (c, i, &specs[i], nr_entries);
    c->entry[i] += c->directory;
    p = c->bytes.p + c->entry[i];
    put_be64 (p, c->table[i]);
    put_be32 (p + 8, nr_entries);
    put_be32 (p + 12, specs[i].flags);
    p[16] = 1;
    p[17] = specs[i].granularity_bits;
    put_be16 (p + 18, strlen (specs[i].name));
    memcpy (p + 24, specs[i].name, strlen (specs[i].name));
  }

  if (nr_specs > 0) {
    uint8_t *p = c->bytes.p + c->extension;

    put_be64 (c->bytes.p + AUTOCLEAR_OFFSET, 1);
    put_be32 (p, EXTENSION_MAGIC);
    put_be32 (p + 4, 24);
    put_be32 (p + 8, nr_specs);
    put_be64 (p + 16, c->directory_bytes);
    put_be64 (p + 24, c->directory);
  }
  craft_refcounts (c);
}

void
craft_garbage (struct crafted *c, unsigned nr_clusters)
{
  size_t bytes = nr_clusters * c->cluster_size;
  size_t at = append (c, bytes);

  memset (c->bytes.p + at, 0xff, bytes);
}

/* A range that must be inside the image, or the test fails.  A short
 * tail is the caller's matter: our images have none.
 */
static const uint8_t *
inside (const struct bytes *image, uint64_t offset, uint64_t count)
{
  if (range_exceeds (offset, count, image->n))
    fail_msg ("%#" PRIx64 "+%#" PRIx64 " is not inside the image", offset,
              count);
  return image->p + offset;
}

static void
read_bits (const struct bytes *image, struct disk_bitmap *d,
           const uint8_t *entry, uint32_t cluster_size)
{
  uint32_t nr_entries = get_be32 (entry + 8);
  const uint8_t *table = inside (image, get_be64 (entry),
                                 8 * (uint64_t) nr_entries);

  assert_int_equal (nr_entries,
                    div_round_up (div_round_up (d->nr_bits, 8),
                                  cluster_size));
  d->nr_bytes = (size_t) nr_entries * cluster_size;
  d->bits = calloc (1, d->nr_bytes);
  for (uint32_t i = 0; i < nr_entries; ++i) {
    uint64_t e = get_be64 (table + 8 * i);
    uint8_t *bits = d->bits + (size_t) i * cluster_size;

    if (e == 0)
      d->nr_zero++;
    else if (e == 1) {
      d->nr_ones++;
      memset (bits, 0xff, cluster_size);
    }
    else {
      assert_int_equal (e % cluster_size, 0);
      d->nr_data++;
      memcpy (bits, inside (image, e, cluster_size), cluster_size);
    }
  }
}

/* The data of the bitmaps extension, or NULL. */
static const uint8_t *
find_extension (const struct bytes *image)
{
  size_t pos = HEADER_LENGTH;

  for (;;) {
    const uint8_t *p = inside (image, pos, 32);

    if (get_be32 (p) == EXTENSION_MAGIC)
      return p + 8;
    if (get_be32 (p) == 0)
      return NULL;
    pos += 8 + round_up (get_be32 (p + 4), 8);
  }
}

struct disk_bitmap
disk_bitmap_read (const struct bytes *image, const char *name)
{
  uint32_t cluster_size = 1U << get_be32 (inside (image, 20, 4));
  const uint8_t *ext = find_extension (image);
  struct disk_bitmap d = { .state = DISK_ABSENT };
  const uint8_t *p;

  if (ext == NULL)
    return d;
  p = inside (image, get_be64 (ext + 16), get_be64 (ext + 8));
  for (uint32_t i = get_be32 (ext); i > 0; --i) {
    size_t name_bytes = get_be16 (p + 18);

    if (name_bytes == strlen (name) &&
        memcmp (p + 24, name, name_bytes) == 0) {
      d.flags = get_be32 (p + 12);
      d.granularity_bits = p[17];
      d.nr_bits = div_round_up (get_be64 (image->p + 24),
                                UINT64_C (1) << p[17]);
      d.state = (d.flags & 1) ||
        !(get_be64 (image->p + AUTOCLEAR_OFFSET) & 1)
        ? DISK_MARKED : DISK_CLEAN;
      read_bits (image, &d, p, cluster_size);
      return d;
    }
    p += round_up (24 + name_bytes, 8);
  }
  return d;
}

bool
disk_bitmap_bit (const struct disk_bitmap *d, uint64_t bit)
{
  assert_true (bit < d->nr_bits);
  return d->bits[bit / 8] >> (bit % 8) & 1;
}

/* Reports come from several threads in some tests. */
static pthread_mutex_t messages_lock = PTHREAD_MUTEX_INITIALIZER;
static char messages[65536];
static size_t messages_used;
static unsigned nr_warnings, nr_errors;

static void
collect (enum report_level level, const char *fmt, va_list args)
{
  if (level == REPORT_DEBUG)
    return;
  pthread_mutex_lock (&messages_lock);
  if (level == REPORT_WARNING)
    nr_warnings++;
  else
    nr_errors++;
  if (messages_used < sizeof messages / 2)
    messages_used += vsnprintf (messages + messages_used,
                                sizeof messages / 4, fmt, args);
  pthread_mutex_unlock (&messages_lock);
}

void
messages_install (void)
{
  report_sink = collect;
}

void
messages_clear (void)
{
  messages_used = 0;
  messages[0] = '\0';
  nr_warnings = nr_errors = 0;
}

unsigned
messages_warnings (void)
{
  return nr_warnings;
}

unsigned
messages_errors (void)
{
  return nr_errors;
}

void
assert_message (const char *part)
{
  if (strstr (messages, part) == NULL)
    fail_msg ("\"%s\" is not in \"%s\"", part, messages);
}

struct qcow2 *
open_image (struct container *c, bool readonly)
{
  const struct qcow2_options options = {
    .readonly = readonly, .cache_size = 1 << 20,
  };
  struct qcow2 *q = qcow2_open (c, &options);

  assert_non_null (q);
  return q;
}

struct bitmap_set *
open_set (struct qcow2 *q)
{
  const struct bitmap_options options = { 0 };
  struct bitmap_set *set = bitmap_set_open (q, &options);

  assert_non_null (set);
  return set;
}

struct bitmap_set *
open_set_requiring (struct qcow2 *q, const char *name, uint32_t granularity)
{
  const struct bitmap_options options = {
    .granularity = granularity, .require = &name, .nr_require = 1,
  };

  return bitmap_set_open (q, &options);
}

bool
ram_bit (const struct bitmap *b, uint64_t bit)
{
  uint64_t granularity = bitmap_granularity (b);
  bool dirty;

  bitmap_run (b, bit * granularity, bit * granularity + 1, &dirty);
  return dirty;
}

const struct bitmap *
find_exposed (struct bitmap_set *set, const char *name)
{
  for (size_t i = 0; i < bitmap_set_nr_exposed (set); ++i)
    if (strcmp (bitmap_name (bitmap_set_exposed (set, i)), name) == 0)
      return bitmap_set_exposed (set, i);
  fail_msg ("bitmap %s is not offered", name);
  return NULL;
}

void
note_mark (struct bitmap_set *set, struct container *c,
           uint64_t offset, uint64_t count)
{
  for (size_t i = 0; i < bitmap_set_nr_exposed (set); ++i) {
    const struct bitmap *b = bitmap_set_exposed (set, i);
    uint64_t granularity = bitmap_granularity (b);

    if (strcmp (bitmap_name (b), "off") == 0)
      continue;
    recorder_note (c, bitmap_name (b), offset / granularity,
                   (offset + count - 1) / granularity);
  }
}

void
mark_and_note (struct bitmap_set *set, struct container *c,
               uint64_t offset, uint64_t count)
{
  assert_int_equal (bitmap_set_mark (set, offset, count), 0);
  note_mark (set, c, offset, count);
}
