#!/usr/bin/env bash
# nbdkit-dirty-bitmap-filter
# SPDX-License-Identifier: BSD-3-Clause
# Copyright the nbdkit-dirty-bitmap-filter authors

# Refcounts of 1 to 64 bits, with enough clusters that refcount blocks
# are added, and where clusters are small the refcount table grows.

. "${srcdir:-$(dirname "$0")}/lib/functions.sh"
requires qemu-nbd

for bits in 1 2 4 8 16 32 64; do
  for cluster in 512 64k; do
    echo "refcounts of $bits bits, cluster size $cluster"
    rm -f disk.qcow2
    qemu-img create -q -f qcow2 -o refcount_bits=$bits,cluster_size=$cluster \
             disk.qcow2 64M
    qemu-img bitmap --add disk.qcow2 b
    serve disk.qcow2
    shell 'import random' 'r = random.Random(1)' \
          'data = r.randbytes(24 << 20)' \
          'h.pwrite(data[:12 << 20], 1 << 20)' \
          'h.pwrite(data[12 << 20:], 13 << 20)' \
          'h.flush()' \
          'h.trim(4 << 20, 2 << 20)' \
          'h.pwrite(b"x" * (3 << 20), 50 << 20)' \
          'h.flush()' \
          'assert h.pread(1 << 20, 1 << 20) == data[:1 << 20]' \
          'assert h.pread(19 << 20, 6 << 20) == data[5 << 20:]'
    ours=$(map b)
    stop_server
    check_image disk.qcow2
    same "QEMU's map" "$ours" "$(qemu_map disk.qcow2 b)"
  done
done
