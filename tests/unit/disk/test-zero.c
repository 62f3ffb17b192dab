/* nbdkit-dirty-bitmap-filter
 * SPDX-License-Identifier: BSD-3-Clause
 * Copyright the nbdkit-dirty-bitmap-filter authors
 */

/* Zeroes that have to be fast: the disk refuses them at once, and then nothing
 * is marked, and nothing copied for a view; or it zeroes all of the range.  It
 * never does a part and refuses the rest, whatever other requests do
 * meanwhile.  And views at the end of the disk: no change waits for them.
 */

#include <config.h>

#include <errno.h>
#include <inttypes.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdlib.h>
#include <string.h>

#include <cmocka.h>

#include "bitmap-image.h"
#include "common/bytes.h"
#include "container/container.h"
#include "disk/change.h"
#include "disk/disk.h"
#include "image.h"

#define MIB (UINT64_C (1) << 20)

/* Three parts (disk.c). */
#define SIZE (192 * MIB)
#define LIMIT (64 * MIB)
#define CLUSTER 65536

/* What the disk has at the beginning: data in its first and its last MiB. */
static const uint8_t data[MIB] = { [0] = 1, [1000] = 2, [MIB - 1] = 3 };

/* A disk that counts reads, and zeroes fast only up to some offset. */
struct half_fast {
  struct container c;
  struct container *inner;
  uint64_t fast_end;
  unsigned reads;
};

static struct half_fast *
half_fast (struct container *c)
{
  return (struct half_fast *) c;
}

static int
half_pread (struct container *c, void *buf, size_t count, uint64_t offset)
{
  half_fast (c)->reads++;
  return container_pread (half_fast (c)->inner, buf, count, offset);
}

static int
half_pwrite (struct container *c, const void *buf, size_t count,
             uint64_t offset)
{
  return container_pwrite (half_fast (c)->inner, buf, count, offset);
}

static int
half_zero (struct container *c, uint64_t count, uint64_t offset, bool punch)
{
  return container_zero (half_fast (c)->inner, count, offset, punch);
}

static int
half_zero_fast (struct container *c, uint64_t count, uint64_t offset,
                bool punch)
{
  return offset + count > half_fast (c)->fast_end ? 1
    : half_zero (c, count, offset, punch);
}

static int
half_flush (struct container *c)
{
  return container_flush (half_fast (c)->inner);
}

static void
half_close (struct container *c)
{
  container_close (half_fast (c)->inner);
  free (c);
}

static const struct container_ops half_ops = {
  .pread = half_pread,
  .pwrite = half_pwrite,
  .zero = half_zero,
  .zero_fast = half_zero_fast,
  .flush = half_flush,
  .close = half_close,
};

static struct half_fast *
half_open (uint64_t fast_end)
{
  struct half_fast *h = calloc (1, sizeof *h);

  assert_non_null (h);
  container_init (&h->c, &half_ops, SIZE, false);
  h->inner = container_open_memory (SIZE);
  assert_non_null (h->inner);
  h->fast_end = fast_end;
  return h;
}

/* A disk with a view of the moment after its first writes. */
struct world {
  struct disk *d;
  struct container *beside;     /* or NULL */
  struct disk_view *view;
};

static void
write_data (struct world *w)
{
  assert_int_equal (disk_write (w->d, data, MIB, 0, false), 0);
  assert_int_equal (disk_write (w->d, data, MIB, SIZE - MIB, false), 0);
}

static int
change_backup (struct world *w, enum disk_action_type type)
{
  struct disk_action a = {
    .type = type, .name = "b", .view = true, .success = true, .clear = true,
  };

  return disk_change_bitmaps (w->d, "disk", &a, 1);
}

static void
open_world (struct world *w, struct container *beside)
{
  static const char *const name = "b";
  const struct disk_options o = {
    .scratch = temp_folder (),
    .require = &name, .nr_require = 1, .granularity = CLUSTER,
    .is_beside = beside != NULL, .beside = beside,
  };
  struct container *c = image_create ("", "192M", LIMIT);

  messages_clear ();
  w->beside = beside;
  w->d = disk_open (c, &o);
  assert_non_null (w->d);
  write_data (w);
  /* All bits are cleared. */
  assert_int_equal (change_backup (w, DISK_BACKUP_BEGIN), 0);
  assert_int_equal (change_backup (w, DISK_BACKUP_END), 0);
  assert_int_equal (change_backup (w, DISK_BACKUP_BEGIN), 0);
  w->view = disk_find_view (w->d, "b", 1);
  assert_non_null (w->view);
}

static void
close_world (struct world *w)
{
  disk_view_put (w->view);
  assert_int_equal (disk_stop (w->d), 0);
  disk_close (w->d);
  if (w->beside != NULL)
    container_close (w->beside);
}

static void
get_dirty (const struct disk_bitmap_state *b, void *opaque)
{
  *(uint64_t *) opaque = b->dirty_bytes;
}

static void
get_kept (const struct disk_view_state *v, void *opaque)
{
  *(uint64_t *) opaque = v->kept_bytes;
}

/* So much is dirty, and is kept for the view. */
static void
assert_changed (struct world *w, uint64_t dirty, uint64_t kept)
{
  uint64_t n = 0;

  disk_list_bitmaps (w->d, get_dirty, &n);
  assert_int_equal (n, dirty);
  disk_list_views (w->d, get_kept, &n);
  assert_int_equal (n, kept);
}

static void
assert_data (int (*read) (void *, void *, uint32_t, uint64_t), void *of,
             uint64_t offset)
{
  static uint8_t buf[MIB];

  assert_int_equal (read (of, buf, MIB, offset), 0);
  assert_memory_equal (buf, data, MIB);
}

static int
read_disk (void *d, void *buf, uint32_t count, uint64_t offset)
{
  return disk_read (d, buf, count, offset);
}

static int
read_view (void *v, void *buf, uint32_t count, uint64_t offset)
{
  return disk_view_read (v, buf, count, offset);
}

static void
assert_zeroes (struct world *w, uint64_t count, uint64_t offset)
{
  static uint8_t buf[MIB];

  for (; count > 0; count -= min_u64 (count, MIB), offset += MIB) {
    const size_t n = min_u64 (count, MIB);

    assert_int_equal (disk_read (w->d, buf, n, offset), 0);
    assert_true (buf[0] == 0 && memcmp (buf, buf + 1, n - 1) == 0);
  }
}

static int
zero_fast (struct world *w, uint64_t count, uint64_t offset)
{
  return disk_zero (w->d, count, offset, false, true, false);
}

static void
assert_view (struct world *w)
{
  assert_data (read_view, w->view, 0);
  assert_data (read_view, w->view, SIZE - MIB);
}

static void
assert_refused (struct world *w, uint64_t count, uint64_t offset,
                uint64_t dirty, uint64_t kept)
{
  assert_int_equal (zero_fast (w, count, offset), -1);
  assert_int_equal (errno, ENOTSUP);
  assert_changed (w, dirty, kept);
  assert_data (read_disk, w->d, 0);
  assert_data (read_disk, w->d, SIZE - MIB);
  assert_view (w);
}

/* Data in a part of a cluster, at either end, has to be overwritten. */
static void
test_refused (void **state)
{
  struct world w;

  (void) state;
  open_world (&w, NULL);
  assert_refused (&w, SIZE - 512, 512, 0, 0);
  assert_refused (&w, SIZE - 512, 0, 0, 0);
  close_world (&w);
}

static void
test_done (void **state)
{
  struct world w;

  (void) state;
  open_world (&w, NULL);
  assert_int_equal (zero_fast (&w, SIZE, 0), 0);
  assert_changed (&w, SIZE, 2 * MIB);
  assert_zeroes (&w, SIZE, 0);
  assert_view (&w);
  close_world (&w);
}

/* The linker puts this in between: another client writes as soon as the disk
 * has looked at the range.
 */
static struct disk *to_write;
static uint64_t write_offset;

extern int __real_qcow2_zero_is_fast (struct qcow2 *, uint64_t, uint64_t,
                                      unsigned);
extern int __wrap_qcow2_zero_is_fast (struct qcow2 *, uint64_t, uint64_t,
                                      unsigned);

int
__wrap_qcow2_zero_is_fast (struct qcow2 *q, uint64_t count, uint64_t offset,
                           unsigned flags)
{
  const int r = __real_qcow2_zero_is_fast (q, count, offset, flags);

  if (to_write != NULL) {
    assert_int_equal (r, 0);
    assert_int_equal (disk_write (to_write, data, 1024, write_offset, false),
                      0);
    to_write = NULL;
  }
  return r;
}

static void
test_written_meanwhile (void **state)
{
  const uint64_t start = 2 * MIB + 512, count = 188 * MIB;
  struct world w;

  (void) state;
  /* Before a part was zeroed, it can still be refused. */
  open_world (&w, NULL);
  to_write = w.d;
  write_offset = start;
  assert_refused (&w, count, start, 64 * MIB - 2 * MIB, 0);
  close_world (&w);

  open_world (&w, NULL);
  to_write = w.d;
  write_offset = start + count - 1024;
  assert_int_equal (zero_fast (&w, count, start), 0);
  assert_zeroes (&w, count, start);
  assert_view (&w);
  close_world (&w);
}

/* What the storage of a disk beside the image says is known only when it was
 * asked to zero.
 */
static void
test_beside (void **state)
{
  struct half_fast *h;
  struct world w;

  (void) state;
  h = half_open (0);
  h->c.abilities.zero_fast = false;
  open_world (&w, &h->c);
  assert_refused (&w, SIZE, 0, 0, 0);
  close_world (&w);

  open_world (&w, &half_open (0)->c);
  assert_refused (&w, SIZE, 0, 64 * MIB, 64 * MIB);
  close_world (&w);

  open_world (&w, &half_open (64 * MIB)->c);
  assert_int_equal (zero_fast (&w, SIZE, 0), 0);
  assert_changed (&w, SIZE, SIZE);
  assert_zeroes (&w, SIZE, 0);
  assert_view (&w);
  close_world (&w);
}

/* Requests have to end: a change does not copy for a view any more. */
static void
test_hurry (void **state)
{
  struct half_fast *h = half_open (0);
  struct world w;
  unsigned reads;
  uint8_t byte;

  (void) state;
  open_world (&w, &h->c);
  disk_hurry (w.d, 0);
  messages_clear ();
  reads = h->reads;
  assert_int_equal (disk_write (w.d, data, MIB, 8 * MIB, false), 0);
  assert_int_equal (h->reads, reads);
  assert_message ("view of bitmap 'b' is broken");
  assert_message ("the server is stopping");
  assert_int_equal (messages_warnings (), 1);
  assert_int_equal (messages_errors (), 0);
  assert_int_equal (disk_view_read (w.view, &byte, 1, 0), -1);
  assert_int_equal (change_backup (&w, DISK_BACKUP_END), -1);
  assert_message ("the server is stopping");
  close_world (&w);
}

int
main (void)
{
  const struct CMUnitTest tests[] = {
    cmocka_unit_test (test_refused),
    cmocka_unit_test (test_done),
    cmocka_unit_test (test_written_meanwhile),
    cmocka_unit_test (test_beside),
    cmocka_unit_test (test_hurry),
  };

  messages_install ();
  return cmocka_run_group_tests (tests, NULL, NULL);
}
