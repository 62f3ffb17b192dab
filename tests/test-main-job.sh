#!/usr/bin/env bash
# nbdkit-dirty-bitmap-filter
# SPDX-License-Identifier: BSD-3-Clause
# Copyright the nbdkit-dirty-bitmap-filter authors

# The main job, as the README has it: serve an image with a bitmap, write,
# see the dirty granule, stop, and find the same with QEMU's tools.

. "${srcdir:-$(dirname "$0")}/lib/functions.sh"
requires qemu-nbd qemu-io

qemu-img create -q -f qcow2 disk.qcow2 100G
qemu-img bitmap --add disk.qcow2 monday
serve disk.qcow2

nbdinfo --list "$uri" > list
grep 'qemu:dirty-bitmap:monday' list
grep 'base:allocation' list
nbdsh -u "$uri" -c 'h.pwrite(b"x"*512, 1<<30); h.flush()'
expected="0 1073741824 0
1073741824 65536 1
1073807360 106300375040 0"
same "the served map" "$expected" "$(map monday)"
stop_server

same "the map of another server" "$expected" "$(
  nbdinfo --map=qemu:dirty-bitmap:monday -- \
    [ nbdkit -r --filter="$FILTER" file disk.qcow2 ] |
    awk '{ print $1, $2, $3 }')"
check_image disk.qcow2
same "flags" auto "$(bitmap_flags disk.qcow2 monday)"
same "QEMU's map" "$expected" "$(qemu_map disk.qcow2 monday)"

qemu-img create -q -f qcow2 same.qcow2 100G
qemu-io -f qcow2 -c 'write -q -P 0x78 1G 512' same.qcow2
qemu-img compare -f qcow2 -F qcow2 disk.qcow2 same.qcow2
