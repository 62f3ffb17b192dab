#!/usr/bin/env bash
# nbdkit-dirty-bitmap-filter
# SPDX-License-Identifier: BSD-3-Clause
# Copyright the nbdkit-dirty-bitmap-filter authors

# --run: the command finds the server, and when it ends the bitmap is in
# the image and nbdkit's status is the command's.

. "${srcdir:-$(dirname "$0")}/lib/functions.sh"
requires qemu-nbd

qemu-img create -q -f qcow2 disk.qcow2 10M
qemu-img bitmap --add disk.qcow2 b
nbdkit -U - --filter="$FILTER" file disk.qcow2 \
       --run '/usr/bin/python3 -m nbd -u "$uri" -c "h.pwrite(b\"x\" * 512, 65536)" &&
              nbdinfo --map=qemu:dirty-bitmap:b "$uri" > map'
same "the map" "0 65536 0
65536 65536 1
131072 10354688 0" "$(awk '{ print $1, $2, $3 }' map)"
check_image disk.qcow2
same flags auto "$(bitmap_flags disk.qcow2 b)"
same "QEMU's map" "65536 65536" "$(qemu_dirty disk.qcow2 b)"

status=0
nbdkit -U - --filter="$FILTER" file disk.qcow2 --run 'exit 7' || status=$?
same "the status" 7 $status
