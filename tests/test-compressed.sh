#!/usr/bin/env bash
# nbdkit-dirty-bitmap-filter
# SPDX-License-Identifier: BSD-3-Clause
# Copyright the nbdkit-dirty-bitmap-filter authors

# Compressed clusters, deflate and zstd, are read; writing over one
# replaces it, whole or in part, and its space is given back.

. "${srcdir:-$(dirname "$0")}/lib/functions.sh"
requires qemu-io qemu-nbd

/usr/bin/python3 -c '
import random
r = random.Random (7)
line = [bytes (r.choices (b"abcdef ", k = 61)) + b"\n" for _ in range (50)]
with open ("raw", "wb") as f:
    while f.tell () < 8 << 20:
        f.write (r.choice (line) * r.randrange (1, 9))
    f.truncate (8 << 20)'

for type in zlib zstd; do
  for cluster in 4k 64k 2M; do
    echo "$type, cluster size $cluster"
    rm -f disk.qcow2 model
    cp raw model
    qemu-img convert -f raw -O qcow2 -c \
             -o cluster_size=$cluster,compression_type=$type raw disk.qcow2
    qemu-img bitmap --add disk.qcow2 b
    serve disk.qcow2
    same_allocation allocation "0 8388608 0"
    nbdcopy "$uri" copy
    cmp raw copy
    same "dirty after reading" "" "$(dirty b)"
    shell 'import os; m = open("model", "r+b")
def write(data, offset):
    h.pwrite(data, offset)
    os.pwrite(m.fileno(), data, offset)' \
          'write(b"x" * 10, 12345)' 'write(b"y" * 70000, 1 << 20)' \
          'write(b"z" * (2 << 20), 4 << 20)' 'write(b"w", (8 << 20) - 1)' \
          'h.zero(1 << 16, 3 << 20)' \
          'os.pwrite(m.fileno(), bytes(1 << 16), 3 << 20)' \
          'h.flush()'
    nbdcopy "$uri" copy
    cmp model copy
    ours=$(map b)
    stop_server
    # Silent: the compressed data that was replaced is not leaked.
    check_image disk.qcow2
    same "QEMU's map" "$ours" "$(qemu_map disk.qcow2 b)"
    qemu-img compare -q -f raw -F qcow2 model disk.qcow2

    # Over and over: what is released is used again.
    serve disk.qcow2
    shell 'h.pwrite(open("model", "rb").read(), 0)' 'h.flush()'
    size=$(stat -c %b disk.qcow2)
    for i in 1 2 3; do
      shell 'h.trim(h.get_size(), 0)' 'h.flush()' \
            'h.pwrite(open("model", "rb").read(), 0)' 'h.flush()'
    done
    [ "$(stat -c %b disk.qcow2)" -le $((size + 8192)) ] ||
      fail "the file takes more and more: $size blocks, then $(stat -c %b disk.qcow2)"
    stop_server
    check_image disk.qcow2
    qemu-img compare -q -f raw -F qcow2 model disk.qcow2
  done
done
