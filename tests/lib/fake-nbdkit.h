/* nbdkit-dirty-bitmap-filter
 * SPDX-License-Identifier: BSD-3-Clause
 * Copyright the nbdkit-dirty-bitmap-filter authors
 */

#ifndef DIRTY_BITMAP_FAKE_NBDKIT_H
#define DIRTY_BITMAP_FAKE_NBDKIT_H

/* A fake of nbdkit and a plugin, for the test that includes it after
 * container/next.c.  It is as strict as nbdkit: what aborts the server
 * there fails the test here.
 */

/* The plugin: a file, and what it says of itself. */
static struct {
  int fd;
  int opens;                    /* contexts open this file, else that */
  uint32_t minimum, maximum;
  bool takes_parts;             /* of blocks, whatever it says */
  int write, flush, zero, cache, trim, fast_zero, extents, fua;
  bool stale_size;              /* new contexts see the size of the first */
  int64_t first_size;
  int err;                      /* requests fail with it */
  bool fail_open;
  uint32_t cut;                 /* sizes are multiples of it, if not 0 */
  uint32_t zero_block;          /* zeroes are aligned to it, or EINVAL */
  unsigned nr_fast;             /* fast zeroes that succeed before one is */
  int fast_err;                 /* refused with this, if not 0 */
  struct nbdkit_extent extent[4]; /* one after the other; from the first of
                                     no length on, all is data */

  unsigned nr_open, nr_opened, nr_finalized;
  atomic_uint largest_data, largest_zero;
  atomic_uint largest_trim, largest_extents;
  atomic_uint zero_flags, pwrite_flags;
  atomic_uint nr_refused_zeroes;
  atomic_uint nr_pwrites, nr_zeroes, nr_flushes, nr_caches, nr_trims;
  atomic_uint nr_extents;
  atomic_int inside;
  atomic_bool hold_reads;       /* they wait inside */
  atomic_bool overlapped;
} fake;

/* Which questions were asked, as nbdkit remembers it. */
enum {
  PREPARED = 1, SIZE = 2, CAN_WRITE = 4, CAN_FLUSH = 8, CAN_ZERO = 16,
  CAN_CACHE = 32, CAN_TRIM = 64, CAN_FAST_ZERO = 128, CAN_EXTENTS = 256,
  CAN_FUA = 512,
};

/* What a trim leaves: it may be anything. */
#define TRIMMED 0xdd

struct context {
  struct nbdkit_next_ops ops;   /* has to be the first */
  unsigned asked;
  int readonly;
  int fd;
  int64_t size;
};

static struct context *
of (nbdkit_next *next)
{
  return (struct context *) next;
}

static int
fake_prepare (nbdkit_next *next)
{
  of (next)->asked |= PREPARED;
  return 0;
}

static int
fake_finalize (nbdkit_next *next)
{
  (void) next;
  fake.nr_finalized++;
  return 0;
}

static int64_t
fake_get_size (nbdkit_next *next)
{
  struct stat statbuf;

  assert_true (of (next)->asked & PREPARED);
  assert_int_equal (fstat (of (next)->fd, &statbuf), 0);
  if (fake.first_size == -1)
    fake.first_size = statbuf.st_size;
  of (next)->size = fake.stale_size ? fake.first_size : statbuf.st_size;
  if (fake.cut != 0)
    of (next)->size -= of (next)->size % fake.cut;
  of (next)->asked |= SIZE;
  return of (next)->size;
}

static int
fake_block_size (nbdkit_next *next, uint32_t *minimum, uint32_t *preferred,
                 uint32_t *maximum)
{
  assert_true (of (next)->asked & PREPARED);
  *minimum = fake.minimum;
  *preferred = 4096;
  *maximum = fake.maximum;
  return 0;
}

static int
fake_can_write (nbdkit_next *next)
{
  assert_true (of (next)->asked & PREPARED);
  of (next)->asked |= CAN_WRITE;
  return of (next)->readonly ? 0 : fake.write;
}

static int
fake_can_flush (nbdkit_next *next)
{
  of (next)->asked |= CAN_FLUSH;
  return fake.flush;
}

static int
fake_can_zero (nbdkit_next *next)
{
  of (next)->asked |= CAN_ZERO;
  return of (next)->readonly ? NBDKIT_ZERO_NONE : fake.zero;
}

static int
fake_can_cache (nbdkit_next *next)
{
  of (next)->asked |= CAN_CACHE;
  return fake.cache;
}

static int
fake_can_trim (nbdkit_next *next)
{
  of (next)->asked |= CAN_TRIM;
  return of (next)->readonly ? 0 : fake.trim;
}

static int
fake_can_fast_zero (nbdkit_next *next)
{
  of (next)->asked |= CAN_FAST_ZERO;
  return of (next)->readonly ? 0 : fake.fast_zero;
}

static int
fake_can_extents (nbdkit_next *next)
{
  of (next)->asked |= CAN_EXTENTS;
  return fake.extents;
}

static int
fake_can_fua (nbdkit_next *next)
{
  of (next)->asked |= CAN_FUA;
  return of (next)->readonly ? NBDKIT_FUA_NONE : fake.fua;
}

static int
fake_other (nbdkit_next *next)
{
  assert_true (of (next)->asked & PREPARED);
  return 1;
}

/* What nbdkit asserts before each request, and what a plugin that takes
 * whole blocks only asks for.
 */
static int
begin_request (nbdkit_next *next, uint32_t count, uint64_t offset,
               unsigned asked, int *err)
{
  struct context *c = of (next);
  struct timespec moment = { .tv_nsec = 100000 };

  assert_int_equal (c->asked & asked, asked);
  assert_true (count > 0 && offset <= (uint64_t) c->size &&
               count <= c->size - offset);
  if (!fake.takes_parts &&
      (offset % fake.minimum != 0 || count % fake.minimum != 0)) {
    *err = EINVAL;
    return -1;
  }
  if (atomic_fetch_add (&fake.inside, 1) > 0)
    atomic_store (&fake.overlapped, true);
  nanosleep (&moment, NULL);
  atomic_fetch_sub (&fake.inside, 1);
  *err = fake.err;
  return fake.err != 0 ? -1 : 0;
}

static int
fake_pread (nbdkit_next *next, void *buf, uint32_t count, uint64_t offset,
            uint32_t flags, int *err)
{
  assert_int_equal (flags, 0);
  if (begin_request (next, count, offset, SIZE, err) == -1)
    return -1;
  if (atomic_load (&fake.hold_reads)) {
    const struct timespec moment = { .tv_nsec = 100000 };

    atomic_fetch_add (&fake.inside, 1);
    while (atomic_load (&fake.hold_reads))
      nanosleep (&moment, NULL);
    atomic_fetch_sub (&fake.inside, 1);
  }
  fake.largest_data = max_u64 (fake.largest_data, count);
  assert_int_equal (pread (of (next)->fd, buf, count, offset), count);
  return 0;
}

static int
fake_pwrite (nbdkit_next *next, const void *buf, uint32_t count,
             uint64_t offset, uint32_t flags, int *err)
{
  assert_false (flags & ~NBDKIT_FLAG_FUA);
  if (flags & NBDKIT_FLAG_FUA)
    assert_true (of (next)->asked & CAN_FUA && fake.fua != NBDKIT_FUA_NONE);
  if (begin_request (next, count, offset, SIZE | CAN_WRITE, err) == -1)
    return -1;
  fake.nr_pwrites++;
  fake.pwrite_flags = flags;
  fake.largest_data = max_u64 (fake.largest_data, count);
  assert_int_equal (pwrite (of (next)->fd, buf, count, offset), count);
  return 0;
}

static int
fake_flush (nbdkit_next *next, uint32_t flags, int *err)
{
  assert_int_equal (flags, 0);
  assert_true (of (next)->asked & CAN_FLUSH);
  fake.nr_flushes++;
  *err = fake.err;
  return fake.err != 0 ? -1 : 0;
}

static int
fake_zero (nbdkit_next *next, uint32_t count, uint64_t offset, uint32_t flags,
           int *err)
{
  static const char zero_bytes[65536];

  assert_int_not_equal (fake.zero, NBDKIT_ZERO_NONE);
  assert_false (flags & ~(NBDKIT_FLAG_MAY_TRIM | NBDKIT_FLAG_FAST_ZERO));
  if (flags & NBDKIT_FLAG_FAST_ZERO)
    assert_true (of (next)->asked & CAN_FAST_ZERO && fake.fast_zero == 1);
  if (begin_request (next, count, offset, SIZE | CAN_WRITE | CAN_ZERO,
                     err) == -1)
    return -1;
  if (flags & NBDKIT_FLAG_FAST_ZERO && fake.fast_err != 0 &&
      fake.nr_fast-- == 0) {
    *err = fake.fast_err;
    return -1;
  }
  if (fake.zero_block != 0 &&
      (offset % fake.zero_block != 0 || count % fake.zero_block != 0)) {
    fake.nr_refused_zeroes++;
    *err = EINVAL;
    return -1;
  }
  fake.nr_zeroes++;
  fake.zero_flags = flags;
  fake.largest_zero = max_u64 (fake.largest_zero, count);
  while (count > 0) {
    const uint32_t n = min_u64 (count, sizeof zero_bytes);

    assert_int_equal (pwrite (of (next)->fd, zero_bytes, n, offset), n);
    offset += n;
    count -= n;
  }
  return 0;
}

static int
fake_trim (nbdkit_next *next, uint32_t count, uint64_t offset, uint32_t flags,
           int *err)
{
  char trimmed[4096];

  assert_int_equal (flags, 0);
  assert_int_equal (fake.trim, 1);
  if (begin_request (next, count, offset, SIZE | CAN_WRITE | CAN_TRIM,
                     err) == -1)
    return -1;
  fake.nr_trims++;
  fake.largest_trim = max_u64 (fake.largest_trim, count);
  memset (trimmed, TRIMMED, sizeof trimmed);
  while (count > 0) {
    const uint32_t n = min_u64 (count, sizeof trimmed);

    assert_int_equal (pwrite (of (next)->fd, trimmed, n, offset), n);
    offset += n;
    count -= n;
  }
  return 0;
}

/* Lists of extents, as nbdkit has them: of a range, without gaps, and with
 * neighbours of one type merged.
 */
struct nbdkit_extents {
  uint64_t start, end;
  struct nbdkit_extent extent[4];
  size_t nr;
};

static unsigned nr_extents_lists; /* that are not freed yet */

struct nbdkit_extents *
nbdkit_extents_new (uint64_t start, uint64_t end)
{
  struct nbdkit_extents *e = calloc (1, sizeof *e);

  assert_non_null (e);
  assert_true (start < end && end <= INT64_MAX);
  e->start = start;
  e->end = end;
  nr_extents_lists++;
  return e;
}

void
nbdkit_extents_free (struct nbdkit_extents *e)
{
  nr_extents_lists--;
  free (e);
}

size_t
nbdkit_extents_count (const struct nbdkit_extents *e)
{
  return e->nr;
}

struct nbdkit_extent
nbdkit_get_extent (const struct nbdkit_extents *e, size_t i)
{
  assert_true (i < e->nr);
  return e->extent[i];
}

/* Of the fake plugin's extents, what is in the list's range or after it:
 * nbdkit leaves the last one as long as the plugin said.
 */
static void
add_extents (struct nbdkit_extents *e)
{
  uint64_t at = 0;

  for (size_t i = 0; at < e->end; ++i) {
    struct nbdkit_extent x = i < 4 ? fake.extent[i]
      : (struct nbdkit_extent) { 0 };

    x.offset = at;
    if (x.length == 0)
      x = (struct nbdkit_extent) { .offset = at, .length = INT64_MAX - at };
    at += x.length;
    if (at <= e->start)
      continue;
    if (x.offset < e->start) {
      x.length -= e->start - x.offset;
      x.offset = e->start;
    }
    if (e->nr > 0 && e->extent[e->nr - 1].type == x.type)
      e->extent[e->nr - 1].length += x.length;
    else
      e->extent[e->nr++] = x;
  }
  assert_true (e->nr > 0 && e->extent[0].offset == e->start);
}

static int
fake_extents (nbdkit_next *next, uint32_t count, uint64_t offset,
              uint32_t flags, struct nbdkit_extents *e, int *err)
{
  assert_int_equal (flags, NBDKIT_FLAG_REQ_ONE);
  assert_int_equal (fake.extents, 1);
  assert_true (e->start == offset && e->end == offset + count);
  if (begin_request (next, count, offset, SIZE | CAN_EXTENTS, err) == -1)
    return -1;
  fake.nr_extents++;
  fake.largest_extents = max_u64 (fake.largest_extents, count);
  add_extents (e);
  return 0;
}

static int
fake_cache (nbdkit_next *next, uint32_t count, uint64_t offset,
            uint32_t flags, int *err)
{
  assert_int_equal (flags, 0);
  fake.nr_caches++;
  return begin_request (next, count, offset, SIZE | CAN_CACHE, err);
}

nbdkit_next *
nbdkit_next_context_open (nbdkit_backend *backend, int readonly,
                          const char *exportname, int shared)
{
  struct context *c;

  assert_ptr_equal (backend, &fake);
  assert_string_equal (exportname, "");
  assert_int_equal (shared, 1);
  if (fake.fail_open)
    return NULL;
  c = calloc (1, sizeof *c);
  assert_non_null (c);
  c->readonly = readonly;
  c->fd = dup (fake.opens != 0 ? fake.opens : fake.fd);
  assert_true (c->fd >= 0);
  c->ops = (struct nbdkit_next_ops) {
    .prepare = fake_prepare,
    .finalize = fake_finalize,
    .get_size = fake_get_size,
    .block_size = fake_block_size,
    .can_write = fake_can_write,
    .can_flush = fake_can_flush,
    .is_rotational = fake_other,
    .can_trim = fake_can_trim,
    .can_zero = fake_can_zero,
    .can_fast_zero = fake_can_fast_zero,
    .can_extents = fake_can_extents,
    .can_fua = fake_can_fua,
    .can_multi_conn = fake_other,
    .can_cache = fake_can_cache,
    .pread = fake_pread,
    .pwrite = fake_pwrite,
    .flush = fake_flush,
    .trim = fake_trim,
    .zero = fake_zero,
    .extents = fake_extents,
    .cache = fake_cache,
  };
  fake.nr_open++;
  fake.nr_opened++;
  return &c->ops;
}

void
nbdkit_next_context_close (nbdkit_next *next)
{
  fake.nr_open--;
  close (of (next)->fd);
  free (next);
}

#endif /* DIRTY_BITMAP_FAKE_NBDKIT_H */
