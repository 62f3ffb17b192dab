/* nbdkit-dirty-bitmap-filter
 * SPDX-License-Identifier: BSD-3-Clause
 * Copyright the nbdkit-dirty-bitmap-filter authors
 */

/* The header and its extensions as bytes. */

#include <config.h>

#include <errno.h>
#include <inttypes.h>
#include <stdio.h>

#include "common/bytes.h"
#include "common/report.h"
#include "qcow2/header-format.h"

static int
invalid (int err)
{
  errno = err;
  return -1;
}

int
header_parse (struct header *h, const uint8_t *p)
{
  h->cluster_bits = get_be32 (p + HEADER_CLUSTER_BITS);
  if (h->cluster_bits < 9 || h->cluster_bits > 21) {
    report_error ("the cluster size of the image, 2^%u bytes, is not between "
                  "512 bytes and 2 MiB", h->cluster_bits);
    return invalid (EINVAL);
  }
  h->size = get_be64 (p + HEADER_SIZE);
  h->l1_entries = get_be32 (p + HEADER_L1_ENTRIES);
  h->l1_offset = get_be64 (p + HEADER_L1_OFFSET);
  h->reftable_offset = get_be64 (p + HEADER_REFTABLE_OFFSET);
  h->reftable_clusters = get_be32 (p + HEADER_REFTABLE_CLUSTERS);
  h->nr_snapshots = get_be32 (p + HEADER_NR_SNAPSHOTS);
  h->snapshots_offset = get_be64 (p + HEADER_SNAPSHOTS_OFFSET);
  h->refcount_order = 4;
  h->header_length = HEADER_V2_BYTES;
  if (h->version == 2)
    return 0;

  h->incompatible = get_be64 (p + HEADER_INCOMPATIBLE);
  h->compatible = get_be64 (p + HEADER_COMPATIBLE);
  h->autoclear = get_be64 (p + HEADER_AUTOCLEAR);
  h->refcount_order = get_be32 (p + HEADER_REFCOUNT_ORDER);
  h->header_length = get_be32 (p + HEADER_LENGTH);
  if (h->header_length < HEADER_V3_BYTES || h->header_length % 8 != 0 ||
      h->header_length > UINT64_C (1) << h->cluster_bits) {
    report_error ("the image's header length, %" PRIu32 ", is invalid",
                  h->header_length);
    return invalid (EINVAL);
  }
  if (h->header_length > HEADER_COMPRESSION)
    h->compression_type = p[HEADER_COMPRESSION];
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

int
header_parse_extensions (const struct header *h, const uint8_t *cluster,
                         struct header_extensions *ext)
{
  const uint64_t cluster_size = UINT64_C (1) << h->cluster_bits;
  const uint64_t backing = get_be64 (cluster + HEADER_BACKING_OFFSET);
  uint64_t pos = h->header_length;

  ext->limit = cluster_size;
  if (backing != 0 && backing < cluster_size)
    ext->limit = backing;

  while (ext->limit >= 8 && pos <= ext->limit - 8) {
    const uint8_t *p = cluster + pos;
    const uint32_t magic = get_be32 (p), len = get_be32 (p + 4);

    ext->end = pos;
    if (magic == HEADER_EXT_END)
      return 0;
    if (len > ext->limit - pos - 8) {
      report_error ("the header extension 0x%08" PRIx32 " of the image, %"
                    PRIu32 " bytes, reaches beyond the header", magic, len);
      return invalid (EINVAL);
    }
    p += 8;
    if (magic == HEADER_EXT_FEATURE_NAMES)
      ext->feature_names = (struct header_text) { p, len };
    else if (magic == HEADER_EXT_BACKING_FORMAT)
      ext->backing_format = (struct header_text) { p, len };
    else if (magic == HEADER_EXT_DATA_FILE)
      ext->data_file = (struct header_text) { p, len };
    else if (magic == HEADER_EXT_BITMAPS) {
      ext->bitmaps.count++;
      ext->bitmaps.length = len;
      ext->bitmaps_offset = pos + 8;
      if (len == 24) {
        ext->bitmaps.nr_bitmaps = get_be32 (p);
        ext->bitmaps.reserved = get_be32 (p + 4);
        ext->bitmaps.directory_size_bytes = get_be64 (p + 8);
        ext->bitmaps.directory_offset = get_be64 (p + 16);
      }
    }
    else if (magic == HEADER_EXT_REMOVED && len == 24)
      ext->removed_offset = pos + 8;
    else if (magic != HEADER_EXT_CRYPTO)
      ext->unknown = true;
    pos += 8 + round_up (len, 8);
  }
  /* Without an END marker the list ends where the room does. */
  ext->end = pos;
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

int
header_check_features (const struct header *h, const uint8_t *p,
                       const struct header_extensions *ext, bool readonly)
{
  const uint64_t known = INCOMPAT_DIRTY | INCOMPAT_CORRUPT |
    INCOMPAT_DATA_FILE | INCOMPAT_COMPRESSION | INCOMPAT_EXTENDED_L2;
  const uint32_t crypt = get_be32 (p + HEADER_CRYPT);

  for (unsigned bit = 0; bit < 64; ++bit)
    if (h->incompatible & ~known & (UINT64_C (1) << bit)) {
      char name[64];

      feature_name (&ext->feature_names, bit, name);
      report_error ("the image needs the incompatible feature %s, "
                    "which is unknown", name);
      return invalid (ENOTSUP);
    }
  if ((h->incompatible & INCOMPAT_EXTENDED_L2) && h->cluster_bits < 14) {
    report_error ("the image has extended L2 entries and clusters of %" PRIu64
                  " bytes, whose subclusters are smaller than 512 bytes",
                  UINT64_C (1) << h->cluster_bits);
    return invalid (EINVAL);
  }
  if ((h->incompatible & INCOMPAT_DATA_FILE) && h->nr_snapshots != 0) {
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
  if (readonly)
    return 0;

  if (h->incompatible & INCOMPAT_CORRUPT) {
    report_error ("the image is marked corrupt and can only be served "
                  "read-only (-r); repair it with qemu-img check -r all");
    return invalid (EIO);
  }
  return 0;
}
