/* nbdkit-dirty-bitmap-filter
 * SPDX-License-Identifier: BSD-3-Clause
 * Copyright the nbdkit-dirty-bitmap-filter authors
 */

#ifndef DIRTY_BITMAP_QCOW2_SNAPSHOT_FORMAT_H
#define DIRTY_BITMAP_QCOW2_SNAPSHOT_FORMAT_H

/* An entry of the snapshot table as it is on disk (qcow2.rst, "Snapshots"):
 * these fields, extra data, the ID, the name, and padding to 8 bytes.
 */

#include <stdbool.h>
#include <stdint.h>

/* All of them are big-endian. */
struct snapshot_on_disk {
  uint8_t l1_offset[8], l1_entries[4];
  uint8_t id_bytes[2], name_bytes[2];
  uint8_t seconds[4], nanoseconds[4], guest_nanoseconds[8];
  uint8_t vm_state_bytes[4], extra_bytes[4];
  /* The known part of the extra data. */
  uint8_t long_vm_state_bytes[8], disk_size[8];
};

#define SNAPSHOT_KNOWN_BYTES sizeof (struct snapshot_on_disk)
#define SNAPSHOT_FIXED_BYTES 40 /* without extra data */

/* The fields that we use, not checked. */
struct snapshot_entry {
  uint64_t l1_offset;
  uint32_t l1_entries;
  uint16_t id_bytes, name_bytes;
  uint32_t extra_bytes;
  bool has_disk_size;
  uint64_t disk_size;           /* if it has one */
};

/* Parse SNAPSHOT_KNOWN_BYTES bytes. */
extern void snapshot_entry_parse (struct snapshot_entry *,
                                  const uint8_t *bytes);

#endif /* DIRTY_BITMAP_QCOW2_SNAPSHOT_FORMAT_H */
