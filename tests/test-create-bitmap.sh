#!/usr/bin/env bash
# nbdkit-dirty-bitmap-filter
# SPDX-License-Identifier: BSD-3-Clause
# Copyright the nbdkit-dirty-bitmap-filter authors

# dirty-bitmap=NAME makes the bitmap if it is absent: it is in the image,
# durable, before the first client is answered, and QEMU sees it.

. "${srcdir:-$(dirname "$0")}/lib/functions.sh"
requires qemu-nbd

qemu-img create -q -f qcow2 disk.qcow2 64M
qemu-img bitmap --add disk.qcow2 old
serve disk.qcow2 dirty-bitmap=new dirty-bitmap=newer
nbdinfo --size "$uri" >/dev/null
kill_server
same names "old
new
newer" "$(bitmap_names disk.qcow2)"
for b in old new newer; do
  same "flags of $b" auto "$(bitmap_flags disk.qcow2 $b)"
  same "QEMU's map of $b" "0 67108864 0" "$(qemu_map disk.qcow2 $b)"
done
qemu-img check disk.qcow2 >/dev/null || [ $? -eq 3 ] || fail "errors"

# It is there now: nothing to make, and it records.
serve disk.qcow2 dirty-bitmap=new
shell 'h.pwrite(b"x", 1 << 20)'
stop_server
same names "old
new
newer" "$(bitmap_names disk.qcow2)"
same "QEMU's map" "1048576 65536" "$(qemu_dirty disk.qcow2 new)"

# In an image that has none; granularities, given and QEMU's own.
for spec in 512::4096 64k::65536 2M::65536 64k:512:512 64k:2M:2097152; do
  IFS=: read -r cluster option granularity <<< "$spec"
  rm -f disk.qcow2
  qemu-img create -q -f qcow2 -o cluster_size=$cluster disk.qcow2 64M
  serve disk.qcow2 dirty-bitmap=b \
        ${option:+dirty-bitmap-granularity=$option}
  shell 'h.pwrite(b"x", 8 << 20)'
  same "dirty, $spec" "8388608 $granularity" "$(dirty b)"
  stop_server
  check_image disk.qcow2
  same "QEMU's, $spec" "8388608 $granularity" "$(qemu_dirty disk.qcow2 b)"
  qemu-img info disk.qcow2 | finds "granularity: $granularity"
done

# What cannot be made, and what does not record.
qemu-img bitmap --add --disable disk.qcow2 off
before=$(checksum disk.qcow2)
refused disabled --filter="$FILTER" file disk.qcow2 dirty-bitmap=off
refused 'read-only|readonly' -r --filter="$FILTER" file disk.qcow2 dirty-bitmap=absent
refused 'name' --filter="$FILTER" file disk.qcow2 \
        dirty-bitmap="$(printf %01024d 0)"
refused 'name|empty' --filter="$FILTER" file disk.qcow2 dirty-bitmap=
same "the file" "$before" "$(checksum disk.qcow2)"

# More bits than QEMU takes.
qemu-img create -q -f qcow2 large.qcow2 4T
before=$(checksum large.qcow2)
refused granularity --filter="$FILTER" file large.qcow2 dirty-bitmap=b \
        dirty-bitmap-granularity=512
same "the file" "$before" "$(checksum large.qcow2)"
