#!/usr/bin/env bash
# nbdkit-dirty-bitmap-filter
# SPDX-License-Identifier: BSD-3-Clause
# Copyright the nbdkit-dirty-bitmap-filter authors

# nbdinfo [ nbdkit ... ] and nbdcopy [ nbdkit ... ]: libnbd's tools start
# the server themselves, by socket activation.

. "${srcdir:-$(dirname "$0")}/lib/functions.sh"
requires nbdcopy qemu-io qemu-nbd

qemu-img create -q -f qcow2 disk.qcow2 10M
qemu-img bitmap --add disk.qcow2 b
qemu-io -f qcow2 -c 'write -q -P 5 1M 64k' disk.qcow2
before=$(checksum disk.qcow2)
expected="0 1048576 0
1048576 65536 1
1114112 9371648 0"
same "the map" "$expected" "$(
  nbdinfo --map=qemu:dirty-bitmap:b -- \
    [ nbdkit -r --filter="$FILTER" file disk.qcow2 ] |
    awk '{ print $1, $2, $3 }')"
nbdcopy -- [ nbdkit -r --filter="$FILTER" file disk.qcow2 ] raw
same "the file" "$before" "$(checksum disk.qcow2)"
qemu-img compare -q -f raw -F qcow2 raw disk.qcow2

# Copying into it is recorded.
dd if=/dev/urandom of=raw bs=1M count=4 seek=4 conv=notrunc status=none
nbdcopy --destination-is-zero raw -- [ nbdkit --filter="$FILTER" file disk.qcow2 ] ||
  nbdcopy raw -- [ nbdkit --filter="$FILTER" file disk.qcow2 ]
check_image disk.qcow2
qemu-img compare -q -f raw -F qcow2 raw disk.qcow2
dirty=$(qemu_dirty disk.qcow2 b | awk '{ n += $2 } END { print n }')
[ "$dirty" -ge $((4 << 20)) ] || fail "only $dirty bytes are dirty"
