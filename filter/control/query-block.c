/* nbdkit-dirty-bitmap-filter
 * SPDX-License-Identifier: BSD-3-Clause
 * Copyright the nbdkit-dirty-bitmap-filter authors
 */

/* query-block and query-named-block-nodes: the disk, as one node and as one
 * device of a guest, with the image's dirty bitmaps.
 */

#include <config.h>

#include "control/internal.h"
#include "disk/disk.h"

/* Bitmaps are added to a list. */
struct bitmap_list {
  json_t *list;
  bool failed;
};

static void
add_bitmap (const struct disk_bitmap_state *b, void *opaque)
{
  struct bitmap_list *l = opaque;
  json_t *bitmap =
    json_pack ("{s:o,s:b,s:b,s:b,s:I,s:I}", "name", qmp_string (b->name),
               "recording", b->is_enabled && !b->is_inconsistent,
               "persistent", b->is_persistent, "busy", b->is_in_use,
               "granularity", (json_int_t) b->granularity,
               "count", (json_int_t) b->dirty_bytes);

  if (json_array_append_new (l->list, bitmap) == -1 ||
      (b->is_inconsistent &&
       json_object_set_new (bitmap, "inconsistent", json_true ()) == -1))
    l->failed = true;
}

/* Add "dirty-bitmaps", if there are any. */
static int
add_bitmaps (const struct disk *disk, json_t *node)
{
  struct bitmap_list l = { .list = json_array () };

  if (l.list == NULL)
    return -1;
  disk_list_bitmaps (disk, add_bitmap, &l);
  if (l.failed || json_array_size (l.list) == 0) {
    json_decref (l.list);
    return l.failed ? -1 : 0;
  }
  return json_object_set_new (node, "dirty-bitmaps", l.list);
}

/* What the header says.  A version 2 image is said to be so and no more. */
static json_t *
format_specific (const struct qcow2_description *d)
{
  json_t *data =
    json_pack ("{s:s,s:s,s:i}", "compat", d->version == 2 ? "0.10" : "1.1",
               "compression-type", d->compression_type,
               "refcount-bits", (int) d->refcount_bits);
  json_t *more = d->version == 2 ? json_object ()
    : json_pack ("{s:b,s:b,s:b}", "lazy-refcounts", d->lazy_refcounts,
                 "corrupt", d->corrupt, "extended-l2", d->extended_l2);

  if (more == NULL || data == NULL || json_object_update (data, more) == -1 ||
      (d->has_data_file &&
       json_object_set_new (data, "data-file-raw",
                            json_boolean (d->data_file_raw)) == -1)) {
    json_decref (data);
    data = NULL;
  }
  json_decref (more);
  return json_pack ("{s:s,s:o}", "type", "qcow2", "data", data);
}

/* Of a disk that is beside its image: as QEMU's raw driver. */
static json_t *
raw_image (const struct control_options *o)
{
  return json_pack ("{s:o,s:s,s:I,s:b}",
                    "filename", qmp_string (o->image), "format", "raw",
                    "virtual-size", (json_int_t) disk_size (o->disk),
                    "dirty-flag", 0);
}

static json_t *
image (const struct control_options *o, const struct qcow2_description *d)
{
  if (disk_is_beside (o->disk))
    return raw_image (o);
  return json_pack ("{s:o,s:s,s:I,s:I,s:b,s:o}",
                    "filename", qmp_string (o->image), "format", "qcow2",
                    "virtual-size", (json_int_t) disk_size (o->disk),
                    "cluster-size",
                    (json_int_t) disk_preferred_block_size (o->disk),
                    "dirty-flag", 0, "format-specific", format_specific (d));
}

static const char *
detect_zeroes (const struct disk *disk)
{
  switch (disk_detect_zeroes (disk)) {
  case DISK_ZEROES_ON:
    return "on";
  case DISK_ZEROES_UNMAP:
    return "unmap";
  default:
    return "off";
  }
}

/* QEMU's BlockDeviceInfo.  Nothing limits the speed of the disk. */
static json_t *
make_node (const struct control_options *o)
{
  struct qcow2_description d;
  json_t *node;

  disk_describe (o->disk, &d);
  node =
    json_pack ("{s:s,s:s,s:o,s:b,s:b,s:i,s:s,s:o,s:i,"
               "s:i,s:i,s:i,s:i,s:i,s:i,s:{s:b,s:b,s:b}}",
               "node-name", o->node,
               "drv", disk_is_beside (o->disk) ? "raw" : "qcow2",
               "file", qmp_string (o->image),
               "ro", disk_is_readonly (o->disk), "encrypted", 0,
               "backing_file_depth", (int) d.nr_backing,
               "detect_zeroes", detect_zeroes (o->disk), "image", image (o, &d),
               "write_threshold", 0,
               "bps", 0, "bps_rd", 0, "bps_wr", 0,
               "iops", 0, "iops_rd", 0, "iops_wr", 0,
               "cache", "writeback", 1, "direct", 0, "no-flush", 0);

  if (node != NULL && add_bitmaps (o->disk, node) == -1) {
    json_decref (node);
    return NULL;
  }
  return node;
}

json_t *
command_query_named_block_nodes (struct call *call)
{
  return json_pack ("[o]", make_node (&call->control->options));
}

json_t *
command_query_block (struct call *call)
{
  const struct control_options *o = &call->control->options;

  return json_pack ("[{s:s,s:s,s:s,s:b,s:b,s:o}]", "device", o->node,
                    "qdev", o->node, "type", "unknown", "removable", 0,
                    "locked", 0, "inserted", make_node (o));
}
