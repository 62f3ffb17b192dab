#!/usr/bin/env bash
# nbdkit-dirty-bitmap-filter
# SPDX-License-Identifier: BSD-3-Clause
# Copyright the nbdkit-dirty-bitmap-filter authors

# What this filter leaves in an image, QEMU reads, for all cluster sizes
# and granularities: the bitmap, its flags, the data, and a silent check.

. "${srcdir:-$(dirname "$0")}/lib/functions.sh"
requires qemu-nbd qemu-io

for cluster in 512 4k 64k 2M; do
  for granularity in 512 64k 2M; do
    echo "cluster size $cluster, granularity $granularity"
    rm -f disk.qcow2 same.qcow2
    for f in disk same; do
      qemu-img create -q -f qcow2 -o cluster_size=$cluster $f.qcow2 300M
    done
    qemu-img bitmap --add -g $granularity disk.qcow2 b
    serve disk.qcow2
    # Pieces of clusters, whole ones, neighbours, and both ends of the disk.
    shell 'h.pwrite(b"a" * 512, 0)' \
          'h.pwrite(b"b" * 70000, 3 * 1024 * 1024 - 35000)' \
          'h.pwrite(b"c" * (4 << 20), 8 << 20)' \
          'h.zero(1 << 20, 9 << 20)' \
          'h.flush()' \
          'h.pwrite(b"d" * 5000, 123456789)' \
          'h.trim(2 << 20, 10 << 20)' \
          'h.pwrite(b"e" * 512, h.get_size() - 512)'
    ours=$(map b)
    [ "$(dirty b | wc -l)" -ge 4 ] || fail "too little is dirty: $ours"
    stop_server
    check_image disk.qcow2
    same flags auto "$(bitmap_flags disk.qcow2 b)"
    same "QEMU's map" "$ours" "$(qemu_map disk.qcow2 b)"

    qemu-io -f qcow2 -c 'write -q -P 97 0 512' \
            -c 'write -q -P 98 3110728 70000' -c 'write -q -P 99 8M 4M' \
            -c 'write -q -z 9M 3M' -c 'write -q -P 100 123456789 5000' \
            -c "write -q -P 101 $((300 * 1048576 - 512)) 512" same.qcow2
    qemu-img compare -q -f qcow2 -F qcow2 disk.qcow2 same.qcow2
  done
done
