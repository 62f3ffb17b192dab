#!/usr/bin/env bash
# nbdkit-dirty-bitmap-filter
# SPDX-License-Identifier: BSD-3-Clause
# Copyright the nbdkit-dirty-bitmap-filter authors

# nbdinfo --map=qemu:allocation-depth says which image of the chain the
# bytes come from, as it does of qemu-nbd -A; what is written moves to
# depth 1.  base:allocation calls data what a backing file provides (R6).

. "${srcdir:-$(dirname "$0")}/lib/functions.sh"
requires qemu-nbd qemu-io

depth ()
{
  nbdinfo --map=qemu:allocation-depth "$@" |
    awk '{ $1 = $1; print }'
}

qemu_depth ()
{
  depth -- [ qemu-nbd -r -A -f qcow2 "$1" ]
}

qemu-img create -q -f raw base.raw 3M
qemu-io -f raw -c 'write -q -P 1 0 512k' base.raw
qemu-img create -q -f qcow2 -b base.raw -F raw middle.qcow2 5M
qemu-io -f qcow2 -c 'write -q -P 2 1M 1M' -c 'write -q -z 4M 64k' middle.qcow2
qemu-img create -q -f qcow2 -b middle.qcow2 -F qcow2 disk.qcow2 8M
qemu-io -f qcow2 -c 'write -q -P 3 1536k 1M' -c 'write -q -z 256k 64k' disk.qcow2

# A file that is too short provides the zeroes behind its end.
serve disk.qcow2
same "the depth" "0 262144 3 backing depth 3
262144 65536 1 local
327680 720896 3 backing depth 3
1048576 524288 2 backing depth 2
1572864 1048576 1 local
2621440 1572864 3 backing depth 3
4194304 65536 2 backing depth 2
4259840 983040 3 backing depth 3
5242880 3145728 2 backing depth 2" "$(depth "$uri")"
same_allocation "base:allocation" "0 262144 0
262144 65536 2
327680 196608 0
524288 524288 2
1048576 1572864 0
2621440 524288 2
3145728 1048576 3
4194304 65536 2
4259840 4128768 3"
shell 'h.pwrite(b"x" * 100, 1 << 20); h.zero(1 << 20, 7 << 20)'
ours=$(depth "$uri")
same "what was written" "1048576 65536 1 local" "$(grep '^1048576 ' <<< "$ours")"
same "what was zeroed" "7340032 1048576 1 local" "$(tail -n 1 <<< "$ours")"
stop_server
same "QEMU's view" "$ours" "$(qemu_depth disk.qcow2)"
check_image disk.qcow2

# Without a backing file there are 0 and 1.
qemu-img create -q -f qcow2 alone.qcow2 1M
qemu-io -f qcow2 -c 'write -q 0 64k' alone.qcow2
serve -r alone.qcow2
same "no backing file" "0 65536 1 local
65536 983040 0 absent" "$(depth "$uri")"
same "QEMU's" "$(qemu_depth alone.qcow2)" "$(depth "$uri")"
stop_server
