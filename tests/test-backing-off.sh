#!/usr/bin/env bash
# nbdkit-dirty-bitmap-filter
# SPDX-License-Identifier: BSD-3-Clause
# Copyright the nbdkit-dirty-bitmap-filter authors

# dirty-bitmap-backing=off serves what the image itself has, as qemu-nbd does
# with "backing": null.  The rest is zeroes, a hole, and of depth 0.  Backing
# files are not looked for, and their bitmaps are not offered.  An image that
# has a backing file is refused for writing.

. "${srcdir:-$(dirname "$0")}/lib/functions.sh"
requires qemu-nbd qemu-io
ctl=${CTL:-$top_builddir/tools/nbdkit-dirty-bitmap-ctl}

qemu-img create -q -f qcow2 base.qcow2 4M
qemu-io -f qcow2 -c 'write -q -P 1 0 2M' base.qcow2
qemu-img bitmap --add base.qcow2 below
qemu-img create -q -f qcow2 -b base.qcow2 -F qcow2 disk.qcow2 4M
qemu-img bitmap --add disk.qcow2 own
qemu-io -f qcow2 -c 'write -q -P 2 64k 64k' -c 'write -q -z 256k 64k' disk.qcow2

map ()
{
  nbdinfo --map="$1" "${@:2}" | awk '{ print $1, $2, $3 }'
}
theirs ()
{
  map "$1" -- [ qemu-nbd -r -A -B own \
    'json:{"driver": "qcow2", "backing": null, "file": {"driver": "file", "filename": "disk.qcow2"}}' ]
}
before=$(checksum disk.qcow2)

for kind in there missing; do
  [ $kind = there ] || mv base.qcow2 away.qcow2
  serve -r disk.qcow2 dirty-bitmap-backing=off dirty-bitmap-control="$d/ctl"
  for context in qemu:allocation-depth qemu:dirty-bitmap:own; do
    same "$context ($kind)" "$(theirs $context)" "$(map $context "$uri")"
  done
  # R7: QEMU takes a zero cluster for a hole if there is nothing below.
  same "allocation ($kind)" "0 65536 3
65536 65536 0
131072 131072 3
262144 65536 2
327680 3866624 3" "$(map base:allocation "$uri")"
  same "depth" "0 65536 0
65536 65536 1
131072 131072 0
262144 65536 1
327680 3866624 0" "$(map qemu:allocation-depth "$uri")"
  shell 'assert h.pread(65536, 0) == bytes(65536)
assert h.pread(65536, 65536) == b"\2" * 65536
assert h.pread(65536, 131072) == bytes(65536)'
  ! nbdinfo "$uri" | finds 'dirty-bitmap:below' ||
    fail "a bitmap of the backing file is offered"
  "$ctl" --json ctl query-block | finds '"backing_file_depth": 0' ||
    fail "query-block counts backing files"
  # No other process is kept from the backing file.
  [ $kind = missing ] || qemu-io -f qcow2 -c 'write -q -P 9 3M 64k' base.qcow2
  stop_server
done
same "the image" "$before" "$(checksum disk.qcow2)"

# For writing it is refused, and the error says why.
refused 'dirty-bitmap-backing=off: .*read-only' --filter="$FILTER" file \
        disk.qcow2 dirty-bitmap-backing=off
[ "$(grep -c error refused.log)" -eq 1 ] || fail "$(cat refused.log)"
same "the image" "$before" "$(checksum disk.qcow2)"

# By default the backing file is needed.
refused 'base.qcow2' -r --filter="$FILTER" file disk.qcow2
mv away.qcow2 base.qcow2
serve -r disk.qcow2 dirty-bitmap-backing=on
shell 'assert h.pread(65536, 0) == b"\1" * 65536'
stop_server

# Without a backing file there is nothing to leave out.
qemu-img create -q -f qcow2 alone.qcow2 4M
serve alone.qcow2 dirty-bitmap-backing=off
shell 'h.pwrite(b"x" * 100, 0)'
stop_server
check_image alone.qcow2

# A disk beside its image has none.
truncate -s 1M raw
refused dirty-bitmap-backing=off --filter="$FILTER" file raw \
        dirty-bitmap-image="$d/tracks.qcow2" dirty-bitmap-backing=off
