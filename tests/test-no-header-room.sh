#!/usr/bin/env bash
# nbdkit-dirty-bitmap-filter
# SPDX-License-Identifier: BSD-3-Clause
# Copyright the nbdkit-dirty-bitmap-filter authors

# A header that has no room for the bitmaps extension: dirty-bitmap=NAME
# is refused before nbdkit becomes a daemon, and the image stays as it was.

. "${srcdir:-$(dirname "$0")}/lib/functions.sh"
requires qemu-img

qemu-img create -q -f qcow2 -o cluster_size=512 disk.qcow2 1M
# An extension that nobody knows fills the first cluster, but for the END.
/usr/bin/python3 - <<'END'
import struct
with open("disk.qcow2", "r+b") as f:
    head = bytearray(f.read(512))
    at = struct.unpack(">I", head[100:104])[0]
    while struct.unpack(">I", head[at:at+4])[0] != 0:
        at += 8 + (struct.unpack(">I", head[at+4:at+8])[0] + 7) // 8 * 8
    head[at:at+8] = struct.pack(">II", 0x70616464, 512 - at - 8 - 8)
    f.seek(0)
    f.write(head)
END
qemu-img check -q disk.qcow2
sha256sum disk.qcow2 > before

status=0
nbdkit -U "$sock" -P "$d/pid" --filter="$FILTER" \
    file disk.qcow2 dirty-bitmap=b 2> err || status=$?
cat err
[ "$status" -eq 1 ] || fail "the exit status is $status"
[ ! -e "$d/pid" ] || fail "nbdkit became a daemon"
grep -q "no room for the bitmaps extension" err || fail "the reason is not told"
sha256sum -c --quiet before || fail "the image was changed"
