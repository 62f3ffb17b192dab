#!/usr/bin/env bash
# nbdkit-dirty-bitmap-filter
# SPDX-License-Identifier: BSD-3-Clause
# Copyright the nbdkit-dirty-bitmap-filter authors

# Serving an image read-write without writing to it leaves the file as it
# was, byte for byte, also after a kill (I4).

. "${srcdir:-$(dirname "$0")}/lib/functions.sh"
requires qemu-io

for cluster in 512 64k; do
  rm -f disk.qcow2
  qemu-img create -q -f qcow2 -o cluster_size=$cluster disk.qcow2 100M
  for b in b c; do qemu-img bitmap --add disk.qcow2 $b; done
  qemu-io -f qcow2 -c 'write -q -P 5 1M 300k' disk.qcow2
  qemu-img bitmap --disable disk.qcow2 c
  before=$(checksum disk.qcow2)
  for way in stop kill; do
    serve disk.qcow2
    map b >/dev/null
    allocation >/dev/null
    shell 'h.pread(1 << 20, 0)' 'h.flush()' 'h.cache(1 << 20, 1 << 20)' \
          'assert h.pread(1000, 1 << 20) == b"\5" * 1000'
    same "the file while served" "$before" "$(checksum disk.qcow2)"
    ${way}_server
    same "the file after ${way}_server" "$before" "$(checksum disk.qcow2)"
  done
done
