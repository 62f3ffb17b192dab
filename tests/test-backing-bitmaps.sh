#!/usr/bin/env bash
# nbdkit-dirty-bitmap-filter
# SPDX-License-Identifier: BSD-3-Clause
# Copyright the nbdkit-dirty-bitmap-filter authors

# Bitmaps that live in backing files are offered where no image above has
# one of that name, and do not record.

. "${srcdir:-$(dirname "$0")}/lib/functions.sh"
requires qemu-nbd qemu-io

listed ()
{
  nbdinfo --list --json "$uri" | /usr/bin/python3 -c '
import json, sys
e = json.load (sys.stdin)["exports"][0]
print (" ".join (c[18:] for c in e["contexts"] if c[:18] == "qemu:dirty-bitmap:"))'
}

put_flags ()
{
  PYTHONDONTWRITEBYTECODE=1 PYTHONPATH=$tests/lib /usr/bin/python3 -c '
import sys
from qcow2image import Image
Image (sys.argv[1]).bitmap (sys.argv[2]).put ("flags", int (sys.argv[3]))' "$@"
}

qemu-img create -q -f qcow2 low.qcow2 4M
for b in low both hidden; do qemu-img bitmap --add low.qcow2 $b; done
qemu-io -f qcow2 -c 'write -q 0 64k' low.qcow2
qemu-img create -q -f qcow2 -b low.qcow2 -F qcow2 middle.qcow2 8M
for b in middle both; do qemu-img bitmap --add middle.qcow2 $b; done
qemu-io -f qcow2 -c 'write -q 1M 64k' middle.qcow2
qemu-img create -q -f qcow2 -b middle.qcow2 -F qcow2 disk.qcow2 6M
for b in top hidden; do qemu-img bitmap --add disk.qcow2 $b; done
before=$(checksum low.qcow2)$(checksum middle.qcow2)

for r in "" -r; do
  serve $r disk.qcow2
  same "all" "top hidden middle both low" "$(listed)"
  same "the lowest" "0 65536
4194304 2097152" "$(dirty low)"
  same "the middle one" "1048576 65536" "$(dirty middle)"
  same "the upper of two" "1048576 65536" "$(dirty both)"
  # Across the end of the backing file, in requests of any length.
  shell 'h.shutdown()' '
import nbd
def ask(count, offset, flags=0):
    h = nbd.NBD()
    h.add_meta_context("qemu:dirty-bitmap:low")
    h.connect_uri("'"$uri"'")
    got = []
    h.block_status(count, offset,
                   lambda c, o, e, err: got.extend(zip(e[0::2], e[1::2])),
                   flags)
    h.shutdown()
    return got
M = 1 << 20
assert ask(6 * M, 0) == [(65536, 1), (4 * M - 65536, 0), (2 * M, 1)]
assert ask(M, 4 * M - 512) == [(512, 0), (M - 512, 1)]
assert ask(M, 4 * M - 512, nbd.CMD_FLAG_REQ_ONE) == [(512, 0)]
assert ask(M, 4 * M) == [(M, 1)]
assert ask(1, 4 * M) == [(1, 1)]
assert ask(512, 4 * M - 512) == [(512, 0)]'
  stop_server
done

# Only the image itself records.
serve disk.qcow2
shell 'h.pwrite(b"x", 3 << 20)'
same "recorded" "3145728 65536" "$(dirty top)"
same "not recorded" "0 65536
4194304 2097152" "$(dirty low)"
stop_server
same "the backing files" "$before" "$(checksum low.qcow2)$(checksum middle.qcow2)"
same "flags" auto "$(bitmap_flags disk.qcow2 top)"
# As QEMU has it, but that it calls clean what the bitmap does not know.
same "QEMU's view" "0 65536" "$(qemu_dirty disk.qcow2 low)"
same "QEMU's view" "1048576 65536" "$(qemu_dirty disk.qcow2 both)"

# By name.
serve disk.qcow2 dirty-bitmap-expose=low dirty-bitmap-expose=top
same "by name" "top low" "$(listed)"
stop_server
refused "neither the image nor its backing files" --filter="$FILTER" \
        file disk.qcow2 dirty-bitmap-expose=nosuch
# dirty-bitmap=NAME is about the image itself.
serve disk.qcow2 dirty-bitmap=low
same "made in the image" "top hidden low middle both" "$(listed)"
same "empty" "" "$(dirty low)"
stop_server
refused "create|bitmap" -r --filter="$FILTER" file disk.qcow2 dirty-bitmap=middle
qemu-img bitmap --remove disk.qcow2 low

# The last bit of a backing file whose size is no multiple of the
# granularity.
qemu-img create -q -f qcow2 odd.qcow2 100k
qemu-img bitmap --add odd.qcow2 odd
qemu-io -f qcow2 -c 'write -q 64k 36k' odd.qcow2
qemu-img create -q -f qcow2 -b odd.qcow2 -F qcow2 over.qcow2 1M
serve -r over.qcow2
same "an odd size" "65536 983040" "$(dirty odd)"
stop_server
qemu-img bitmap --clear odd.qcow2 odd
serve -r over.qcow2
same "an odd size, clean" "102400 946176" "$(dirty odd)"
stop_server

# Inconsistent ones are not offered, and a name that is above in whatever
# state hides the one below.
put_flags low.qcow2 low 3
serve disk.qcow2
same "in use below" "top hidden middle both" "$(listed)"
grep "backing file '.*low.qcow2': bitmap 'low' is inconsistent" "$log"
stop_server
refused "bitmap 'low' is inconsistent" --filter="$FILTER" file disk.qcow2 \
        dirty-bitmap-expose=low
put_flags middle.qcow2 both 3
serve disk.qcow2
same "in use above" "top hidden middle" "$(listed)"
stop_server
put_flags disk.qcow2 hidden 3
serve -r disk.qcow2
same "in use in the image" "top middle" "$(listed)"
stop_server

# If an image's bitmaps cannot be used, it is not known which names it
# would hide.
put_flags low.qcow2 low 2
put_flags middle.qcow2 middle 64
serve -r disk.qcow2
same "damage" "top" "$(listed)"
grep "backing file '.*middle.qcow2': the image's bitmaps cannot be used" "$log"
stop_server
refused "cannot be offered" -r --filter="$FILTER" file disk.qcow2 \
        dirty-bitmap-expose=low

# A snapshot comes without bitmaps, also without those below.
qemu-img create -q -f qcow2 below.qcow2 1M
qemu-img bitmap --add below.qcow2 b
qemu-io -f qcow2 -c 'write -q -P 5 0 64k' below.qcow2
qemu-img create -q -f qcow2 -b below.qcow2 -F qcow2 snap.qcow2
qemu-img snapshot -c s snap.qcow2
serve snap.qcow2
same "the disk's" "b" "$(listed)"
shell 'h.pwrite(b"x" * 65536, 0)'
stop_server
serve snap.qcow2 dirty-bitmap-snapshot=s
same "the snapshot's" "" "$(listed)"
shell 'assert h.pread(65536, 0) == b"\5" * 65536'
stop_server
