/* nbdkit-dirty-bitmap-filter
 * SPDX-License-Identifier: BSD-3-Clause
 * Copyright the nbdkit-dirty-bitmap-filter authors
 */

/* The header of the image and its extensions (qcow2.rst, "Header",
 * "Header extensions").
 *
 * Reading: every field is checked here, once, so that the rest of qcow2/ can
 * rely on it.  An unsupported feature is refused by name.
 *
 * Writing: a copy of the first cluster as it is on disk is kept, and small
 * changes are patched into both.  A write of up to 512 bytes that does not
 * cross a multiple of 512 is atomic.  So every change is either one such
 * write, or several with barriers between them, of which only the last makes
 * a difference to a reader:
 *
 *   - autoclear bits, incompatible bits, the refcount table: fields of
 *     the first 512 bytes, one write.
 *   - the bitmaps extension, when there was none: it goes where the END
 *     marker is, so nothing behind the marker counts for a reader.
 *     Everything behind its first eight bytes is written first; barrier;
 *     then the eight bytes.
 *   - the bitmaps extension, when there is one: its 24 bytes of data are
 *     patched, in one write if they do not cross a multiple of 512.  If they
 *     do, the autoclear bit is cleared first and set after, so that a crash
 *     in between leaves bitmaps that no program trusts.
 */

#include <config.h>

#include <errno.h>
#include <inttypes.h>
#include <stdio.h>
#include <stdlib.h>

#include "qcow2/internal.h"

#define MAGIC 0x514649fbU       /* "QFI\xfb" */
#define SECTOR 512

#define EXT_END 0
#define EXT_BACKING_FORMAT 0xe2792acaU
#define EXT_FEATURE_NAMES 0x6803f857U
#define EXT_BITMAPS 0x23852875U
#define EXT_CRYPTO 0x0537be77U
#define EXT_DATA_FILE 0x44415441U

enum {                          /* offsets of fields */
  F_VERSION = 4,
  F_BACKING_OFFSET = HEADER_BACKING_OFFSET,
  F_BACKING_SIZE = HEADER_BACKING_SIZE,
  F_CLUSTER_BITS = 20,
  F_SIZE = 24,
  F_CRYPT = 32,
  F_L1_ENTRIES = 36,
  F_L1_OFFSET = 40,
  F_REFTABLE_OFFSET = 48,
  F_REFTABLE_CLUSTERS = 56,
  F_NR_SNAPSHOTS = 60,
  F_SNAPSHOTS_OFFSET = 64,
  F_INCOMPATIBLE = 72,
  F_COMPATIBLE = 80,
  F_AUTOCLEAR = 88,
  F_REFCOUNT_ORDER = 96,
  F_HEADER_LENGTH = 100,
  F_COMPRESSION = 104,
};

#define V2_HEADER_LENGTH 72
#define V3_HEADER_LENGTH 104

static int
invalid (int err)
{
  errno = err;
  return -1;
}

/* Fields that depend on no other field except the version. */
static int
read_fields (struct qcow2 *q, const uint8_t *p)
{
  struct header *h = &q->header;

  h->cluster_bits = get_be32 (p + F_CLUSTER_BITS);
  if (h->cluster_bits < 9 || h->cluster_bits > 21) {
    report_error ("the cluster size of the image, 2^%u bytes, is not between "
                  "512 bytes and 2 MiB", h->cluster_bits);
    return invalid (EINVAL);
  }
  h->size = get_be64 (p + F_SIZE);
  h->l1_entries = get_be32 (p + F_L1_ENTRIES);
  h->l1_offset = get_be64 (p + F_L1_OFFSET);
  h->reftable_offset = get_be64 (p + F_REFTABLE_OFFSET);
  h->reftable_clusters = get_be32 (p + F_REFTABLE_CLUSTERS);
  h->nr_snapshots = get_be32 (p + F_NR_SNAPSHOTS);
  h->snapshots_offset = get_be64 (p + F_SNAPSHOTS_OFFSET);
  h->refcount_order = 4;
  h->header_length = V2_HEADER_LENGTH;
  if (h->version == 2)
    return 0;

  h->incompatible = get_be64 (p + F_INCOMPATIBLE);
  h->compatible = get_be64 (p + F_COMPATIBLE);
  h->autoclear = get_be64 (p + F_AUTOCLEAR);
  h->refcount_order = get_be32 (p + F_REFCOUNT_ORDER);
  h->header_length = get_be32 (p + F_HEADER_LENGTH);
  if (h->header_length < V3_HEADER_LENGTH || h->header_length % 8 != 0 ||
      h->header_length > UINT64_C (1) << h->cluster_bits) {
    report_error ("the image's header length, %" PRIu32 ", is invalid",
                  h->header_length);
    return invalid (EINVAL);
  }
  if (h->header_length > F_COMPRESSION)
    h->compression_type = p[F_COMPRESSION];
  if (h->refcount_order > 6) {
    report_error ("the image's refcount width, 2^%" PRIu32 " bits, "
                  "is more than 64 bits", h->refcount_order);
    return invalid (EINVAL);
  }
  return 0;
}

static int
check_compression (const struct header *h)
{
  const bool bit = h->incompatible & INCOMPAT_COMPRESSION;

  if (h->compression_type > 1) {
    report_error ("the image's compression type, %u, is unknown",
                  h->compression_type);
    return invalid (ENOTSUP);
  }
  if (bit != (h->compression_type != 0)) {
    report_error ("the image's compression type, %u, and its incompatible "
                  "feature bit for compression types contradict each other",
                  h->compression_type);
    return invalid (EINVAL);
  }
  return 0;
}

/* Parse the header extensions.  Features that we refuse are checked later;
 * here the list must only be well formed.
 */
static int
read_extensions (struct qcow2 *q)
{
  struct header_state *hs = &q->hs;
  uint64_t pos = q->header.header_length;
  const uint64_t backing = get_be64 (hs->cluster + F_BACKING_OFFSET);

  hs->extensions_limit = q->cluster_size;
  if (backing != 0 && backing < q->cluster_size)
    hs->extensions_limit = backing;

  while (hs->extensions_limit >= 8 && pos <= hs->extensions_limit - 8) {
    uint8_t *p = hs->cluster + pos;
    const uint32_t magic = get_be32 (p), len = get_be32 (p + 4);

    hs->extensions_end = pos;
    if (magic == EXT_END)
      return 0;
    if (len > hs->extensions_limit - pos - 8) {
      report_error ("the header extension 0x%08" PRIx32 " of the image, %"
                    PRIu32 " bytes, reaches beyond the header", magic, len);
      return invalid (EINVAL);
    }
    p += 8;
    if (magic == EXT_FEATURE_NAMES)
      hs->feature_names = (struct header_text) { p, len };
    else if (magic == EXT_BACKING_FORMAT)
      hs->backing_format = (struct header_text) { p, len };
    else if (magic == EXT_DATA_FILE)
      hs->data_file = (struct header_text) { p, len };
    else if (magic == EXT_BITMAPS) {
      hs->bitmaps.count++;
      hs->bitmaps.length = len;
      hs->bitmaps_offset = pos + 8;
      if (len == 24) {
        hs->bitmaps.nr_bitmaps = get_be32 (p);
        hs->bitmaps.reserved = get_be32 (p + 4);
        hs->bitmaps.directory_size_bytes = get_be64 (p + 8);
        hs->bitmaps.directory_offset = get_be64 (p + 16);
      }
    }
    else if (magic != EXT_CRYPTO)
      hs->unknown_extension = true;
    pos += 8 + round_up (len, 8);
  }
  /* Without an END marker the list ends where the room does. */
  hs->extensions_end = pos;
  return 0;
}

/* Find the name of an unknown incompatible feature in the image's own table. */
static void
feature_name (const struct header_text *table, unsigned bit, char name[64])
{
  for (uint32_t i = 0; i + 48 <= table->length; i += 48)
    if (table->text[i] == 0 && table->text[i + 1] == bit) {
      snprintf (name, 64, "\"%.46s\"", (const char *) table->text + i + 2);
      for (char *p = name; *p; ++p)
        if (*p < ' ' || *p == 0x7f)
          *p = '?';
      return;
    }
  snprintf (name, 64, "bit %u", bit);
}

static int
refuse (const char *feature)
{
  report_error ("the image has %s, which is not supported", feature);
  return invalid (ENOTSUP);
}

static int
check_features (struct qcow2 *q)
{
  const struct header *h = &q->header;
  const uint8_t *p = q->hs.cluster;
  const uint64_t known = INCOMPAT_DIRTY | INCOMPAT_CORRUPT |
    INCOMPAT_DATA_FILE | INCOMPAT_COMPRESSION | INCOMPAT_EXTENDED_L2;
  const uint32_t crypt = get_be32 (p + F_CRYPT);

  for (unsigned bit = 0; bit < 64; ++bit)
    if (h->incompatible & ~known & (UINT64_C (1) << bit)) {
      char name[64];

      feature_name (&q->hs.feature_names, bit, name);
      report_error ("the image needs the incompatible feature %s, "
                    "which is unknown", name);
      return invalid (ENOTSUP);
    }
  if (q->extended_l2 && q->cluster_bits < 14) {
    report_error ("the image has extended L2 entries and clusters of %" PRIu64
                  " bytes, whose subclusters are smaller than 512 bytes",
                  q->cluster_size);
    return invalid (EINVAL);
  }
  if (q->has_data_file && h->nr_snapshots != 0) {
    report_error ("the image has both an external data file and internal "
                  "snapshots, which is not supported");
    return invalid (EINVAL);
  }
  if (crypt == 1)
    return refuse ("AES encryption");
  if (crypt == 2)
    return refuse ("LUKS encryption");
  if (crypt != 0)
    return refuse ("an unknown encryption method");
  if (check_compression (h) == -1)
    return -1;
  if (q->readonly)
    return 0;

  if (h->incompatible & INCOMPAT_CORRUPT) {
    report_error ("the image is marked corrupt and can only be served "
                  "read-only (-r); repair it with qemu-img check -r all");
    return invalid (EIO);
  }
  return 0;
}

/* A table that the header points to: aligned, and inside the container
 * (whose last cluster may be short).
 */
static int
check_table (struct qcow2 *q, const char *what, uint64_t offset,
             uint64_t bytes, uint64_t max_bytes)
{
  const uint64_t end = round_up (container_size (q->container),
                                 q->cluster_size);

  if (bytes > max_bytes) {
    report_error ("the %s of the image, %" PRIu64 " bytes, is too large",
                  what, bytes);
    return invalid (EFBIG);
  }
  if (offset % q->cluster_size != 0 || (bytes != 0 && offset == 0)) {
    report_error ("the offset of the %s of the image, %#" PRIx64 ", "
                  "is invalid", what, offset);
    return invalid (EINVAL);
  }
  if (bytes != 0 && range_exceeds (offset, bytes, end)) {
    report_error ("the %s of the image lies beyond the end of the file", what);
    return invalid (EINVAL);
  }
  return 0;
}

static int
check_tables (struct qcow2 *q)
{
  const struct header *h = &q->header;
  /* One L1 entry maps this many bytes. */
  const uint64_t l1_covers = q->cluster_size << q->l2_bits;

  if (h->size > INT64_MAX) {
    report_error ("the size of the image's disk, %" PRIu64 " bytes, "
                  "is too large", h->size);
    return invalid (EFBIG);
  }
  if (div_round_up (h->size, l1_covers) > h->l1_entries) {
    report_error ("the L1 table of the image, %" PRIu32 " entries, is too "
                  "small for a disk of %" PRIu64 " bytes",
                  h->l1_entries, h->size);
    return invalid (EINVAL);
  }
  if (check_table (q, "L1 table", h->l1_offset,
                   h->l1_entries * UINT64_C (8), MAX_L1_BYTES) == -1)
    return -1;
  if (h->reftable_clusters == 0) {
    report_error ("the image has no refcount table");
    return invalid (EINVAL);
  }
  if (q->readonly)
    return 0;                   /* the table is not read */
  return check_table (q, "refcount table", h->reftable_offset,
                      h->reftable_clusters * q->cluster_size,
                      MAX_REFTABLE_BYTES);
}

int
header_load (struct qcow2 *q)
{
  uint8_t first[V3_HEADER_LENGTH + 8];

  if (container_size (q->container) < V2_HEADER_LENGTH) {
    report_error ("this is not a qcow2 image: it has only %" PRIu64 " bytes",
                  container_size (q->container));
    return invalid (EINVAL);
  }
  if (container_pread (q->container, first, sizeof first, 0) == -1) {
    report_error ("cannot read the header of the image: %m");
    return -1;
  }
  if (get_be32 (first) != MAGIC) {
    report_error ("this is not a qcow2 image: it does not begin with the "
                  "qcow2 magic");
    return invalid (EINVAL);
  }
  q->header.version = get_be32 (first + F_VERSION);
  if (q->header.version != 2 && q->header.version != 3) {
    report_error ("qcow2 version %u is not supported", q->header.version);
    return invalid (ENOTSUP);
  }
  if (read_fields (q, first) == -1)
    return -1;

  q->cluster_bits = q->header.cluster_bits;
  q->cluster_size = UINT64_C (1) << q->cluster_bits;
  q->extended_l2 = q->header.incompatible & INCOMPAT_EXTENDED_L2;
  q->unit_bits = q->cluster_bits - (q->extended_l2 ? 5 : 0);
  q->l2_bits = q->cluster_bits - (q->extended_l2 ? 4 : 3);
  q->has_data_file = q->header.incompatible & INCOMPAT_DATA_FILE;
  q->data_file_raw = q->has_data_file &&
    (q->header.autoclear & AUTOCLEAR_RAW_EXTERNAL) != 0;
  q->size = round_down (q->header.size, SECTOR);
  pthread_mutex_init (&q->hs.lock, NULL);
  q->hs.cluster = malloc (q->cluster_size);
  if (q->hs.cluster == NULL) {
    report_error ("malloc: %m");
    return -1;
  }
  if (container_pread (q->container, q->hs.cluster, q->cluster_size, 0) == -1) {
    report_error ("cannot read the header of the image: %m");
    return -1;
  }
  return read_extensions (q);
}

int
header_read (struct qcow2 *q)
{
  if (header_load (q) == -1 || check_features (q) == -1 ||
      check_tables (q) == -1)
    return -1;
  q->hs.bitmaps.autoclear =
    q->header.version >= 3 && (q->header.autoclear & AUTOCLEAR_BITMAPS);
  return 0;
}

void
header_free (struct qcow2 *q)
{
  if (q->hs.cluster != NULL)
    pthread_mutex_destroy (&q->hs.lock);
  free (q->hs.cluster);
}

/* Write [offset, offset + count) of the copy to the container. */
static int
write_header (struct qcow2 *q, uint64_t offset, size_t count)
{
  if (container_pwrite (q->container, q->hs.cluster + offset, count,
                        offset) == -1) {
    report_error ("cannot write the header of the image: %m");
    return -1;
  }
  return 0;
}

static int
write_durably (struct qcow2 *q, uint64_t offset, size_t count)
{
  const unsigned long lost = qcow2_lost (q);

  return write_header (q, offset, count) == -1 ? -1
    : qcow2_barrier_since (q, lost);
}

/* Set the autoclear bits durably, if they differ. */
static int
set_autoclear (struct qcow2 *q, uint64_t bits)
{
  if (q->header.autoclear == bits)
    return 0;
  put_be64 (q->hs.cluster + F_AUTOCLEAR, bits);
  if (write_durably (q, F_AUTOCLEAR, 8) == -1) {
    /* It is unknown whether they are on disk: the next call writes again. */
    put_be64 (q->hs.cluster + F_AUTOCLEAR, q->header.autoclear);
    return -1;
  }
  q->header.autoclear = bits;
  q->hs.bitmaps.autoclear = bits & AUTOCLEAR_BITMAPS;
  return 0;
}

/* With hs.lock held: clear the autoclear bits of unknown features. */
static int
clear_unknown (struct qcow2 *q)
{
  uint64_t bits = q->header.autoclear &
    (AUTOCLEAR_BITMAPS | AUTOCLEAR_RAW_EXTERNAL);

  if (q->hs.distrust_bitmaps)
    bits &= ~AUTOCLEAR_BITMAPS;
  return q->header.version < 3 ? 0 : set_autoclear (q, bits);
}

/* With hs.lock held: make sure that the header on disk points to the
 * refcount table in RAM (header_set_reftable).
 */
static int
restore_reftable (struct qcow2 *q)
{
  if (!atomic_load (&q->reftable_unknown))
    return 0;
  if (write_durably (q, F_REFTABLE_OFFSET, 12) == -1)
    return -1;
  atomic_store (&q->reftable_unknown, false);
  return 0;
}

static int
begin_writing (struct qcow2 *q)
{
  ACQUIRE_LOCK_FOR_CURRENT_SCOPE (&q->hs.lock);
  if (restore_reftable (q) == -1 ||
      (ORDER (AUTOCLEAR_BEFORE_CHANGE) && clear_unknown (q) == -1))
    return -1;
  atomic_store_explicit (&q->writing, true, memory_order_release);
  return 0;
}

int
header_begin_writing (struct qcow2 *q)
{
  if (atomic_load_explicit (&q->corrupt, memory_order_relaxed)) {
    report_error ("the image is corrupt and takes no more writes");
    errno = EIO;
    return -1;
  }
  if (atomic_load_explicit (&q->writing, memory_order_acquire))
    return 0;
  if (q->readonly) {
    errno = EROFS;
    return -1;
  }

  if (begin_writing (q) == -1)
    return -1;
  leaks_release (q);
  if (!atomic_load (&q->corrupt))
    return 0;
  errno = EIO;                  /* The function above reported why. */
  return -1;
}

int
header_begin_repair (struct qcow2 *q)
{
  ACQUIRE_LOCK_FOR_CURRENT_SCOPE (&q->hs.lock);
  return clear_unknown (q);
}

int
header_end_repair (struct qcow2 *q)
{
  ACQUIRE_LOCK_FOR_CURRENT_SCOPE (&q->hs.lock);
  q->header.incompatible &= ~INCOMPAT_DIRTY;
  put_be64 (q->hs.cluster + F_INCOMPATIBLE, q->header.incompatible);
  return write_durably (q, F_INCOMPATIBLE, 8);
}

void
header_set_corrupt (struct qcow2 *q)
{
  if (q->readonly || atomic_exchange (&q->corrupt, true) ||
      q->header.version < 3)
    return;

  ACQUIRE_LOCK_FOR_CURRENT_SCOPE (&q->hs.lock);
  q->header.incompatible |= INCOMPAT_CORRUPT;
  put_be64 (q->hs.cluster + F_INCOMPATIBLE, q->header.incompatible);
  write_durably (q, F_INCOMPATIBLE, 8);
}

/* If this fails, it is unknown which table the header on disk points to, and
 * later changes would be in one of the two only.  So the header is set back,
 * at the latest before the next change.
 */
int
header_set_reftable (struct qcow2 *q, uint64_t offset, uint32_t clusters)
{
  ACQUIRE_LOCK_FOR_CURRENT_SCOPE (&q->hs.lock);
  uint8_t old[12];

  memcpy (old, q->hs.cluster + F_REFTABLE_OFFSET, sizeof old);
  put_be64 (q->hs.cluster + F_REFTABLE_OFFSET, offset);
  put_be32 (q->hs.cluster + F_REFTABLE_CLUSTERS, clusters);
  if (write_durably (q, F_REFTABLE_OFFSET, 12) == -1) {
    const int err = errno;
    struct report_hold hold;

    memcpy (q->hs.cluster + F_REFTABLE_OFFSET, old, sizeof old);
    report_hold_begin (&hold);
    if (write_durably (q, F_REFTABLE_OFFSET, 12) == -1) {
      atomic_store (&q->reftable_unknown, true);
      atomic_store (&q->writing, false);
    }
    report_hold_end (&hold);
    errno = err;
    return -1;
  }
  q->header.reftable_offset = offset;
  q->header.reftable_clusters = clusters;
  return 0;
}

void
qcow2_get_bitmaps_extension (struct qcow2 *q,
                             struct qcow2_bitmaps_extension *ext)
{
  ACQUIRE_LOCK_FOR_CURRENT_SCOPE (&q->hs.lock);
  *ext = q->hs.bitmaps;
}

void
qcow2_distrust_bitmaps (struct qcow2 *q)
{
  ACQUIRE_LOCK_FOR_CURRENT_SCOPE (&q->hs.lock);
  q->hs.distrust_bitmaps = true;
}

/* The size of the bitmaps extension with the END marker. */
#define END_MARKER_SIZE 8
#define BITMAPS_EXTENSION_ROOM (32 + END_MARKER_SIZE)

/* The backing file's name usually follows the extensions, and then has to
 * make room for a new extension.  It moves to right behind itself, so that
 * the name is whole in one of the two places whenever a crash comes.
 * Its old bytes then lie behind the END marker.  Returns the new offset, or
 * 0 if the name cannot move or is not in the way.
 */
static uint64_t
backing_name_can_move (const struct qcow2 *q)
{
  const struct header_state *hs = &q->hs;
  const uint64_t name = get_be64 (hs->cluster + F_BACKING_OFFSET);
  const uint64_t size = get_be32 (hs->cluster + F_BACKING_SIZE);
  uint64_t to;

  if (name == 0 || name != hs->extensions_limit ||
      hs->extensions_end + END_MARKER_SIZE > name ||
      size > q->cluster_size - name)
    return 0;
  to = round_up (max_u64 (name + size,
                          hs->extensions_end + BITMAPS_EXTENSION_ROOM), 8);
  return to <= q->cluster_size && size <= q->cluster_size - to ? to : 0;
}

/* With hs.lock held: is there room for another extension, or can room be
 * made?
 */
static bool
has_room (const struct qcow2 *q)
{
  const struct header_state *hs = &q->hs;

  return hs->extensions_end <= hs->extensions_limit &&
    hs->extensions_limit - hs->extensions_end >= 32;
}

static int
move_backing_name (struct qcow2 *q)
{
  struct header_state *hs = &q->hs;
  const uint64_t name = hs->extensions_limit, to = backing_name_can_move (q);
  const uint32_t size = get_be32 (hs->cluster + F_BACKING_SIZE);

  memcpy (hs->cluster + to, hs->cluster + name, size);
  if ((ORDER (NAME_BEFORE_OFFSET) ? write_durably : write_header)
      (q, to, size) == -1)
    return -1;
  put_be64 (hs->cluster + F_BACKING_OFFSET, to);
  if (write_durably (q, F_BACKING_OFFSET, 8) == -1) {
    /* Either offset may be on disk, and both are valid. */
    put_be64 (hs->cluster + F_BACKING_OFFSET, name);
    return -1;
  }
  hs->extensions_limit = to;
  return 0;
}

/* Put an extension where the END marker is. */
static int
append_extension (struct qcow2 *q, const uint8_t data[24])
{
  struct header_state *hs = &q->hs;
  const uint64_t at = hs->extensions_end;
  bool room_for_end;

  if (!has_room (q) && move_backing_name (q) == -1)
    return -1;
  room_for_end = hs->extensions_limit - at >= BITMAPS_EXTENSION_ROOM;

  /* No program trusts it yet. */
  if (set_autoclear (q, q->header.autoclear & ~AUTOCLEAR_BITMAPS) == -1)
    return -1;

  memcpy (hs->cluster + at + 8, data, 24);
  if (room_for_end)
    memset (hs->cluster + at + 32, 0, 8);
  if ((ORDER (EXTENSION_BEFORE_MAGIC) ? write_durably : write_header)
      (q, at + 8, room_for_end ? 32 : 24) == -1)
    return -1;
  put_be32 (hs->cluster + at, EXT_BITMAPS);
  put_be32 (hs->cluster + at + 4, 24);
  if ((ORDER (EXTENSION_BEFORE_AUTOCLEAR) ? write_durably : write_header)
      (q, at, 8) == -1) {
    /* The marker may or may not be gone: another attempt must put the
     * extension in the same place.
     */
    memset (hs->cluster + at, 0, 8);
    return -1;
  }
  hs->extensions_end = at + 32;
  hs->bitmaps_offset = at + 8;
  hs->bitmaps.count = 1;
  return 0;
}

static int
patch_extension (struct qcow2 *q, const uint8_t data[24])
{
  const uint64_t at = q->hs.bitmaps_offset;
  const bool crosses = at / SECTOR != (at + 23) / SECTOR;

  if (crosses && ORDER (DISTRUST_WHILE_PATCHING) &&
      set_autoclear (q, q->header.autoclear & ~AUTOCLEAR_BITMAPS) == -1)
    return -1;
  memcpy (q->hs.cluster + at, data, 24);
  if ((ORDER (EXTENSION_BEFORE_AUTOCLEAR) ? write_durably : write_header)
      (q, at, 24) == -1)
    return -1;
  return 0;
}

int
qcow2_check_bitmaps_extension (struct qcow2 *q)
{
  const struct header_state *hs = &q->hs;

  if (q->header.version < 3) {
    report_error ("a qcow2 image of version 2 cannot keep dirty bitmaps; "
                  "qemu-img amend -o compat=1.1 makes it version 3");
    return invalid (ENOTSUP);
  }
  ACQUIRE_LOCK_FOR_CURRENT_SCOPE (&q->hs.lock);
  if (hs->bitmaps.count > 1 ||
      (hs->bitmaps.count == 1 && hs->bitmaps.length != 24)) {
    report_error ("the bitmaps extension of the image is damaged");
    return invalid (EINVAL);
  }
  if (hs->bitmaps.count == 0 && !has_room (q) &&
      backing_name_can_move (q) == 0) {
    report_error ("the header of the image has no room for the bitmaps "
                  "extension");
    return invalid (ENOSPC);
  }
  return 0;
}

int
qcow2_set_bitmaps_extension (struct qcow2 *q, uint32_t nr_bitmaps,
                             uint64_t directory_size_bytes,
                             uint64_t directory_offset)
{
  uint8_t data[24] = { 0 };

  if (qcow2_check_bitmaps_extension (q) == -1)
    return -1;
  if (header_begin_writing (q) == -1)
    return -1;

  ACQUIRE_LOCK_FOR_CURRENT_SCOPE (&q->hs.lock);
  put_be32 (data, nr_bitmaps);
  put_be64 (data + 8, directory_size_bytes);
  put_be64 (data + 16, directory_offset);
  if ((q->hs.bitmaps.count == 0 ? append_extension (q, data)
                                : patch_extension (q, data)) == -1)
    return -1;
  q->hs.bitmaps.length = 24;
  q->hs.bitmaps.reserved = 0;
  q->hs.bitmaps.nr_bitmaps = nr_bitmaps;
  q->hs.bitmaps.directory_size_bytes = directory_size_bytes;
  q->hs.bitmaps.directory_offset = directory_offset;
  return set_autoclear (q, q->header.autoclear | AUTOCLEAR_BITMAPS);
}
