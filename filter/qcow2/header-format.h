/* nbdkit-dirty-bitmap-filter
 * SPDX-License-Identifier: BSD-3-Clause
 * Copyright the nbdkit-dirty-bitmap-filter authors
 */

#ifndef DIRTY_BITMAP_QCOW2_HEADER_FORMAT_H
#define DIRTY_BITMAP_QCOW2_HEADER_FORMAT_H

/* The header and its extensions as they are on disk (qcow2.rst, "Header",
 * "Header extensions").  Nothing here reads or writes an image: the
 * functions check and convert bytes that their callers read.  They return 0,
 * or -1 with errno set and the reason reported.
 */

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "qcow2/qcow2.h"

/* A write within one sector is atomic. */
#define HEADER_SECTOR_BYTES 512

#define HEADER_MAGIC 0x514649fbU /* "QFI\xfb" */

/* The fields, in their order.  All of them are big-endian. */
struct header_on_disk {
  uint8_t magic[4], version[4];
  uint8_t backing_offset[8], backing_size[4];
  uint8_t cluster_bits[4];
  uint8_t size[8];
  uint8_t crypt[4];
  uint8_t l1_entries[4], l1_offset[8];
  uint8_t reftable_offset[8], reftable_clusters[4];
  uint8_t nr_snapshots[4], snapshots_offset[8];
  /* From version 3 on. */
  uint8_t incompatible[8], compatible[8], autoclear[8];
  uint8_t refcount_order[4], header_length[4];
  /* If the header is that long. */
  uint8_t compression, padding[7];
};

enum {                          /* their offsets */
  HEADER_VERSION = offsetof (struct header_on_disk, version),
  HEADER_BACKING_OFFSET = offsetof (struct header_on_disk, backing_offset),
  HEADER_BACKING_SIZE = offsetof (struct header_on_disk, backing_size),
  HEADER_CLUSTER_BITS = offsetof (struct header_on_disk, cluster_bits),
  HEADER_SIZE = offsetof (struct header_on_disk, size),
  HEADER_CRYPT = offsetof (struct header_on_disk, crypt),
  HEADER_L1_ENTRIES = offsetof (struct header_on_disk, l1_entries),
  HEADER_L1_OFFSET = offsetof (struct header_on_disk, l1_offset),
  HEADER_REFTABLE_OFFSET = offsetof (struct header_on_disk, reftable_offset),
  HEADER_REFTABLE_CLUSTERS =
    offsetof (struct header_on_disk, reftable_clusters),
  HEADER_NR_SNAPSHOTS = offsetof (struct header_on_disk, nr_snapshots),
  HEADER_SNAPSHOTS_OFFSET =
    offsetof (struct header_on_disk, snapshots_offset),
  HEADER_INCOMPATIBLE = offsetof (struct header_on_disk, incompatible),
  HEADER_COMPATIBLE = offsetof (struct header_on_disk, compatible),
  HEADER_AUTOCLEAR = offsetof (struct header_on_disk, autoclear),
  HEADER_REFCOUNT_ORDER = offsetof (struct header_on_disk, refcount_order),
  HEADER_LENGTH = offsetof (struct header_on_disk, header_length),
  HEADER_COMPRESSION = offsetof (struct header_on_disk, compression),

  HEADER_V2_BYTES = HEADER_INCOMPATIBLE,
  HEADER_V3_BYTES = HEADER_COMPRESSION,
  HEADER_FIXED_BYTES = sizeof (struct header_on_disk),
};

_Static_assert (HEADER_V2_BYTES == 72, "the header of version 2");
_Static_assert (HEADER_V3_BYTES == 104, "the header of version 3");
_Static_assert (HEADER_FIXED_BYTES == 112, "all of the header");

/* A header extension begins with its magic and the length of its data. */
struct header_extension_on_disk {
  uint8_t magic[4], length[4];
};

_Static_assert (sizeof (struct header_extension_on_disk) == 8,
                "the head of a header extension");

#define HEADER_EXT_END 0
#define HEADER_EXT_BACKING_FORMAT 0xe2792acaU
#define HEADER_EXT_FEATURE_NAMES 0x6803f857U
#define HEADER_EXT_BITMAPS 0x23852875U
#define HEADER_EXT_CRYPTO 0x0537be77U
#define HEADER_EXT_DATA_FILE 0x44415441U

/* Ours: the place of a bitmaps extension that was removed.  Other programs
 * skip it, as they must with an extension that they do not know.
 */
#define HEADER_EXT_REMOVED 0x6e626472U /* "nbdr" */

/* The data of the bitmaps extension. */
struct bitmaps_extension_on_disk {
  uint8_t nr_bitmaps[4], reserved[4];
  uint8_t directory_size_bytes[8], directory_offset[8];
};

_Static_assert (sizeof (struct bitmaps_extension_on_disk) == 24,
                "the data of the bitmaps extension");

/* Bits of the header. */
#define INCOMPAT_DIRTY UINT64_C (1)
#define INCOMPAT_CORRUPT UINT64_C (2)
#define INCOMPAT_DATA_FILE UINT64_C (4)
#define INCOMPAT_COMPRESSION UINT64_C (8)
#define INCOMPAT_EXTENDED_L2 UINT64_C (16)
#define COMPAT_LAZY_REFCOUNTS UINT64_C (1)
#define AUTOCLEAR_BITMAPS UINT64_C (1)
#define AUTOCLEAR_RAW_EXTERNAL UINT64_C (2)

/* What the header says, checked. */
struct header {
  unsigned version;
  unsigned cluster_bits;
  uint64_t size;
  uint32_t l1_entries;
  uint64_t l1_offset;
  uint64_t reftable_offset;
  uint32_t reftable_clusters;
  uint32_t nr_snapshots;
  uint64_t snapshots_offset;
  uint64_t incompatible, compatible, autoclear;
  unsigned refcount_order;
  uint32_t header_length;
  unsigned compression_type;
};

/* Bytes of the first cluster, not NUL-terminated. */
struct header_text {
  const uint8_t *text;
  uint32_t length;
};

/* What the extensions say. */
struct header_extensions {
  uint64_t end;                 /* offset of the END extension, or of the
                                   place for it */
  uint64_t limit;               /* extensions must end before this */
  uint64_t bitmaps_offset;      /* of that extension's data, or 0 */
  uint64_t removed_offset;      /* the same of a place for it, or 0 */
  struct qcow2_bitmaps_extension bitmaps;
  struct header_text feature_names, backing_format, data_file;
  bool unknown;                 /* there is an unknown one */
};

/* Parse HEADER_FIXED_BYTES bytes, and check the fields that depend on no
 * other field except h->version, which the caller has set.
 */
extern int header_parse (struct header *h, const uint8_t *bytes);

/* Parse the extensions in the first cluster.  Features that we refuse are
 * checked later; here the list must only be well formed.
 */
extern int header_parse_extensions (const struct header *,
                                    const uint8_t *cluster,
                                    struct header_extensions *);

/* Refuse by its name what we do not support. */
extern int header_check_features (const struct header *,
                                  const uint8_t *cluster,
                                  const struct header_extensions *,
                                  bool readonly);

#endif /* DIRTY_BITMAP_QCOW2_HEADER_FORMAT_H */
