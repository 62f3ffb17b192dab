#!/usr/bin/env bash
# nbdkit-dirty-bitmap-filter
# SPDX-License-Identifier: BSD-3-Clause
# Copyright the nbdkit-dirty-bitmap-filter authors

# The container grows over the file plugin while clients write, and is cut
# to what is used at a clean stop.

. "${srcdir:-$(dirname "$0")}/lib/functions.sh"
requires qemu-nbd

for cluster in 4k 64k; do
  rm -f disk.qcow2
  qemu-img create -q -f qcow2 -o cluster_size=$cluster disk.qcow2 2G
  qemu-img bitmap --add disk.qcow2 b
  serve disk.qcow2
  shell 'import threading
def work(n):
    c = nbd.NBD()
    c.connect_uri("'"$uri"'")
    for i in range(24):
        c.pwrite(bytes([n + 1]) * (1 << 20), (n * 24 + i) << 20)
    for i in range(24):
        assert c.pread(1 << 20, (n * 24 + i) << 20) == bytes([n + 1]) * (1 << 20)
threads = [threading.Thread(target=work, args=(n,)) for n in range(4)]
for t in threads: t.start()
for t in threads: t.join()'
  same dirty "0 100663296" "$(dirty b)"
  stop_server
  check_image disk.qcow2
  same "QEMU's map" "0 100663296" "$(qemu_dirty disk.qcow2 b)"
  size=$(stat -c %s disk.qcow2)
  [ "$size" -ge 100663296 ] || fail "the file has only $size bytes"
  [ "$size" -le $((100663296 + 8 * 1048576)) ] ||
    fail "the file was not cut: $size bytes"
  used=$(qemu-img check --output=json disk.qcow2 | /usr/bin/python3 -c '
import json, sys; print (json.load (sys.stdin)["image-end-offset"])')
  [ "$size" -le $((used + 2097152)) ] ||
    fail "the file has $size bytes, of which $used are used"
done
