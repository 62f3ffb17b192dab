#!/usr/bin/env bash
# nbdkit-dirty-bitmap-filter
# SPDX-License-Identifier: BSD-3-Clause
# Copyright the nbdkit-dirty-bitmap-filter authors

# Disks whose size is no multiple of the cluster or the granule: the end
# can be written, zeroed and trimmed, and its bit is right.

. "${srcdir:-$(dirname "$0")}/lib/functions.sh"
requires qemu-nbd

for size in 512 1536 1000448 $((64 * 1048576 + 512)) $((1 << 32 | 512)); do
  for cluster in 512 64k 2M; do
    if [ "$size" -gt $((1 << 32)) ] && [ $cluster = 512 ]; then continue; fi
    echo "size $size, cluster size $cluster"
    rm -f disk.qcow2
    qemu-img create -q -f qcow2 -o cluster_size=$cluster disk.qcow2 "$size"
    qemu-img bitmap --add -g 64k disk.qcow2 b
    serve disk.qcow2
    same size "$size" "$(nbdinfo --size "$uri")"
    shell 'size = h.get_size()' \
          'h.pwrite(b"e" * 512, size - 512)' \
          'assert h.pread(512, size - 512) == b"e" * 512'
    last=$(((size - 1) / 65536 * 65536))
    same dirty "$last $((size - last))" "$(dirty b)"
    shell 'h.flush()' 'size = h.get_size()' \
          'n = min(size, 100000)' \
          'h.zero(n, size - n)' 'assert h.pread(n, size - n) == bytes(n)' \
          'h.trim(n, size - n)' 'h.pwrite(b"f" * 512, size - 512)'
    expected=$(allocation)
    ours=$(map b)
    stop_server
    check_image disk.qcow2
    same "QEMU's map" "$ours" "$(qemu_map disk.qcow2 b)"
    serve -r disk.qcow2
    same allocation "$expected" "$(allocation)"
    shell 'assert h.pread(512, h.get_size() - 512) == b"f" * 512'
    stop_server
  done
done
