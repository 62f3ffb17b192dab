#!/usr/bin/env bash
# nbdkit-dirty-bitmap-filter
# SPDX-License-Identifier: BSD-3-Clause
# Copyright the nbdkit-dirty-bitmap-filter authors

# Version 2 images are served read-write.  They have no bitmaps and no
# zero clusters.

. "${srcdir:-$(dirname "$0")}/lib/functions.sh"
requires qemu-io

for cluster in 512 64k; do
  rm -f disk.qcow2
  qemu-img create -q -f qcow2 -o compat=0.10,cluster_size=$cluster disk.qcow2 64M
  qemu-io -f qcow2 -c 'write -q -P 1 0 1M' disk.qcow2
  serve disk.qcow2
  nbdinfo --list "$uri" > list
  if grep qemu:dirty-bitmap list; then fail "a bitmap in a version 2 image"; fi
  shell 'assert h.pread(1 << 20, 0) == b"\1" * (1 << 20)' \
        'h.pwrite(b"\2" * 100000, 500000)' \
        'h.zero(1 << 17, 1 << 17)' \
        'h.zero(1000, 10)' \
        'h.trim(1 << 17, 1 << 18)' \
        'h.flush()' \
        'h.pwrite(b"\3" * 512, h.get_size() - 512)' \
        'assert h.pread(1 << 17, 1 << 17) == bytes(1 << 17)' \
        'assert h.pread(1020, 0) == b"\1" * 10 + bytes(1000) + b"\1" * 10' \
        'assert h.pread(100000, 500000) == b"\2" * 100000'
  stop_server
  check_image disk.qcow2
  qemu-img info disk.qcow2 | grep 'compat: 0.10'
  qemu-io -r -f qcow2 -c 'read -P 0 128k 128k' -c 'read -P 2 500000 100000' \
          -c "read -P 3 $((64 * 1048576 - 512)) 512" disk.qcow2 > io.log
  if grep -i fail io.log; then fail "QEMU reads something else"; fi
done

[ "$SERVER" = nbdkit ] || exit 0

# No bitmap can be made in one.
refused 'version 2|v2' --filter="$FILTER" file disk.qcow2 dirty-bitmap=new
