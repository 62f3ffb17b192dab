/* nbdkit-dirty-bitmap-filter
 * SPDX-License-Identifier: BSD-3-Clause
 * Copyright the nbdkit-dirty-bitmap-filter authors
 */

#ifndef DIRTY_BITMAP_BITMAP_DIRECTORY_H
#define DIRTY_BITMAP_BITMAP_DIRECTORY_H

/* The bitmaps extension of qcow2 as it is on disk: the header extension's
 * fields, the directory, and the bitmap tables ("Bitmaps extension" and
 * "Bitmaps" in docs/interop/qcow2.rst).
 *
 * Nothing here reads or writes an image: the functions check and convert
 * bytes that their callers read.  A broken rule is damage, described in
 * words.  The rules are those of the specification, or QEMU's where they are
 * stricter, so that QEMU opens what passes here.
 */

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

struct qcow2_bitmaps_extension;

/* QEMU's limits. */
#define BITMAP_MAX_BITMAPS         65535
#define BITMAP_MAX_DIRECTORY_BYTES 67107840
#define BITMAP_MAX_NAME_BYTES      1023
#define BITMAP_MAX_TABLE_ENTRIES   UINT32_C (0x8000000)
#define BITMAP_MAX_STORED_BYTES    UINT64_C (0x20000000)
#define BITMAP_MIN_GRANULARITY_BITS 9
#define BITMAP_MAX_GRANULARITY_BITS 31

/* Flags of a directory entry.  No other is accepted. */
enum {
  BITMAP_FLAG_IN_USE = 1,
  BITMAP_FLAG_AUTO = 2,
};

/* The offset of the flags word in a directory entry. */
#define BITMAP_ENTRY_FLAGS_OFFSET 12

/* The two table entries that are not the offset of a data cluster. */
#define BITMAP_TABLE_ALL_ZEROES UINT64_C (0)
#define BITMAP_TABLE_ALL_ONES   UINT64_C (1)

/* The properties of the image that the rules depend on. */
struct bitmap_geometry {
  uint64_t disk_size_bytes;
  uint64_t container_size_bytes;
  uint32_t cluster_size_bytes;
};

struct bitmap_directory_entry {
  size_t offset;                /* of the entry in the directory, bytes */
  uint64_t table_offset;
  uint32_t table_entries;
  uint32_t flags;
  unsigned granularity_bits;
  uint16_t name_bytes;
  const char *name;             /* inside the directory, not terminated */
};

/* The damage, as the end of a sentence. */
struct bitmap_damage {
  char what[512];
};

/* Describe the damage.  Always returns -1. */
extern int bitmap_damage (struct bitmap_damage *, const char *fmt, ...)
  __attribute__ ((format (printf, 2, 3)));

/* A name fit for a message: on one line, and of limited length. */
struct bitmap_shown_name {
  char text[256];
};
extern struct bitmap_shown_name bitmap_show_name (const char *name,
                                                  size_t name_bytes);

/* The exact number of table entries that a bitmap of this granularity has. */
extern uint64_t bitmap_table_entries_needed (const struct bitmap_geometry *,
                                             unsigned granularity_bits);

/* The functions that check return 0, or -1 and the damage. */

/* The header extension, of an image whose autoclear bit is set. */
extern int
bitmap_extension_check (const struct qcow2_bitmaps_extension *,
                        const struct bitmap_geometry *,
                        struct bitmap_damage *);

/* Parse and check a directory, which must hold exactly nr_entries.  On
 * damage entries[] is undefined.
 */
extern int
bitmap_directory_parse (const uint8_t *directory, size_t directory_bytes,
                        const struct bitmap_geometry *,
                        struct bitmap_directory_entry *entries,
                        uint32_t nr_entries, struct bitmap_damage *);

/* Can a bitmap of this name and granularity be added to a directory
 * that has nr_entries in directory_bytes?
 */
extern int
bitmap_directory_check_new (const char *name, uint64_t granularity,
                            const struct bitmap_geometry *,
                            uint64_t nr_entries, uint64_t directory_bytes,
                            struct bitmap_damage *);

/* The size of an entry on disk, and the entry's bytes.  put returns the
 * size, and ignores e->offset.
 */
extern size_t bitmap_directory_entry_bytes (size_t name_bytes);
extern size_t bitmap_directory_put (uint8_t *p,
                                    const struct bitmap_directory_entry *e);

/* Is this table entry valid: all zeroes, all ones, or a data cluster? */
extern bool bitmap_table_entry_is_valid (uint64_t entry,
                                         uint32_t cluster_size_bytes);

static inline bool
bitmap_table_entry_is_data (uint64_t entry)
{
  return entry > BITMAP_TABLE_ALL_ONES;
}

/* Convert between the table on disk and numbers. */
extern void bitmap_table_get (uint64_t *table, uint32_t nr_entries);
extern void bitmap_table_put (void *p, const uint64_t *table,
                              uint32_t nr_entries);

#endif /* DIRTY_BITMAP_BITMAP_DIRECTORY_H */
