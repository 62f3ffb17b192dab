#!/usr/bin/env bash
# nbdkit-dirty-bitmap-filter
# SPDX-License-Identifier: BSD-3-Clause
# Copyright the nbdkit-dirty-bitmap-filter authors

# dirty-bitmap-expose=NAME offers only these to clients (R10); all record.

. "${srcdir:-$(dirname "$0")}/lib/functions.sh"
requires qemu-nbd

qemu-img create -q -f qcow2 disk.qcow2 64M
for b in one two three; do qemu-img bitmap --add disk.qcow2 $b; done
listed ()
{
  nbdinfo --list --json "$uri" |
    /usr/bin/python3 -c '
import json, sys
e = json.load (sys.stdin)["exports"][0]
print (" ".join (c for c in e["contexts"]))'
}

serve disk.qcow2
same "all" "base:allocation qemu:allocation-depth qemu:dirty-bitmap:one qemu:dirty-bitmap:two \
qemu:dirty-bitmap:three" "$(listed)"
stop_server
serve disk.qcow2 dirty-bitmap-expose=two
same "one" "base:allocation qemu:allocation-depth qemu:dirty-bitmap:two" "$(listed)"
shell 'h.pwrite(b"x", 65536)'
if map one 2>/dev/null; then fail "a bitmap that is not exposed"; fi
same two "65536 65536" "$(dirty two)"
stop_server
for b in one two three; do
  same "QEMU's map of $b" "65536 65536" "$(qemu_dirty disk.qcow2 $b)"
done
serve disk.qcow2 dirty-bitmap-expose=three dirty-bitmap-expose=one
same "two of them" "base:allocation qemu:allocation-depth qemu:dirty-bitmap:one \
qemu:dirty-bitmap:three" "$(listed)"
stop_server
refused 'nosuch' --filter="$FILTER" file disk.qcow2 dirty-bitmap-expose=nosuch
serve disk.qcow2 dirty-bitmap=four dirty-bitmap-expose=four
same "one that is made" "base:allocation qemu:allocation-depth qemu:dirty-bitmap:four" "$(listed)"
stop_server
