#!/usr/bin/env bash
# nbdkit-dirty-bitmap-filter
# SPDX-License-Identifier: BSD-3-Clause
# Copyright the nbdkit-dirty-bitmap-filter authors

# What QEMU leaves in an image, this filter serves, for all cluster sizes
# and granularities, and recording goes on where QEMU left off.

. "${srcdir:-$(dirname "$0")}/lib/functions.sh"
requires qemu-nbd qemu-io

for cluster in 512 4k 64k 2M; do
  for granularity in 512 64k 2M; do
    echo "cluster size $cluster, granularity $granularity"
    rm -f disk.qcow2
    qemu-img create -q -f qcow2 -o cluster_size=$cluster disk.qcow2 300M
    qemu-img bitmap --add -g $granularity disk.qcow2 b
    qemu-io -f qcow2 -c 'write -q -P 1 0 512' -c 'write -q -P 2 3110728 70000' \
            -c 'write -q -P 3 8M 4M' -c 'write -q -z 9M 1M' \
            -c "write -q -P 4 $((300 * 1048576 - 512)) 512" disk.qcow2
    expected=$(qemu_map disk.qcow2 b)

    serve -r disk.qcow2
    same "the map, read-only" "$expected" "$(map b)"
    stop_server
    serve disk.qcow2
    same "the map" "$expected" "$(map b)"
    shell 'assert h.pread(70000, 3110728) == b"\2" * 70000' \
          'assert h.pread(4 << 20, 8 << 20) == (b"\3" * (1 << 20) +
              bytes(1 << 20) + b"\3" * (2 << 20))' \
          'assert h.pread(1024, h.get_size() - 1024) == bytes(512) + b"\4" * 512' \
          'h.pwrite(b"x", 200 << 20)'
    ours=$(map b)
    [ "$ours" != "$expected" ] || fail "the write was not recorded"
    stop_server
    check_image disk.qcow2
    same "QEMU's map" "$ours" "$(qemu_map disk.qcow2 b)"

    # There and back again.
    qemu-io -f qcow2 -c 'write -q -P 5 100M 512' disk.qcow2
    expected=$(qemu_map disk.qcow2 b)
    serve disk.qcow2
    same "the map after QEMU wrote again" "$expected" "$(map b)"
    stop_server
  done
done
