/* nbdkit-dirty-bitmap-filter
 * SPDX-License-Identifier: BSD-3-Clause
 * Copyright the nbdkit-dirty-bitmap-filter authors
 */

/* An entry of the snapshot table as bytes. */

#include <config.h>

#include <stddef.h>

#include "common/bytes.h"
#include "qcow2/snapshot-format.h"

_Static_assert (offsetof (struct snapshot_on_disk, long_vm_state_bytes) ==
                SNAPSHOT_FIXED_BYTES, "the fixed part of an entry");
_Static_assert (sizeof (struct snapshot_on_disk) == 56,
                "what is known of an entry");

void
snapshot_entry_parse (struct snapshot_entry *e, const uint8_t *bytes)
{
  const struct snapshot_on_disk *d = (const struct snapshot_on_disk *) bytes;

  e->l1_offset = get_be64 (d->l1_offset);
  e->l1_entries = get_be32 (d->l1_entries);
  e->id_bytes = get_be16 (d->id_bytes);
  e->name_bytes = get_be16 (d->name_bytes);
  e->extra_bytes = get_be32 (d->extra_bytes);
  e->has_disk_size =
    e->extra_bytes >= SNAPSHOT_KNOWN_BYTES - SNAPSHOT_FIXED_BYTES;
  e->disk_size = get_be64 (d->disk_size);
}
