#!/usr/bin/env bash
# nbdkit-dirty-bitmap-filter
# SPDX-License-Identifier: BSD-3-Clause
# Copyright the nbdkit-dirty-bitmap-filter authors

# In an image that has a backing file its name follows upon the header
# extensions, and makes room for the first bitmap.  Where it cannot, the
# image is refused as it is.

. "${srcdir:-$(dirname "$0")}/lib/functions.sh"
requires qemu-io
[ "$SERVER" = nbdkit ] || skip "only the filter makes bitmaps"

for cluster in 512 4k 64k; do
  rm -f disk.qcow2
  qemu-img create -q -f qcow2 base.qcow2 10M
  qemu-io -f qcow2 -c 'write -q -P 1 1M 1M' base.qcow2
  qemu-img create -q -f qcow2 -b base.qcow2 -F qcow2 \
           -o cluster_size=$cluster disk.qcow2
  serve disk.qcow2 dirty-bitmap=b
  shell 'h.pwrite(b"\2" * 512, 1 << 20)'
  stop_server
  check_image disk.qcow2
  qemu-img info disk.qcow2 > info
  grep 'backing file: base.qcow2' info
  grep 'backing file format: qcow2' info
  grep 'name: b' info
  qemu-io -r -f qcow2 -c 'read -P 2 1M 512' \
          -c "read -P 1 $((1048576 + 512)) $((1048576 - 512))" \
          disk.qcow2 > io.log
  if grep -i fail io.log; then fail "QEMU reads something else"; fi
done

# A name that fills the first cluster leaves nowhere to move it.
rm -f disk.qcow2
long=$(printf '%0200d' 0)
mv base.qcow2 "$long"
qemu-img create -q -f qcow2 -b "$long" -F qcow2 -o cluster_size=512 disk.qcow2
before=$(checksum disk.qcow2)
refused 'no room for the bitmaps extension' --filter="$FILTER" \
        file disk.qcow2 dirty-bitmap=b
same "the file" "$before" "$(checksum disk.qcow2)"
