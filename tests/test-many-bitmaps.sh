#!/usr/bin/env bash
# nbdkit-dirty-bitmap-filter
# SPDX-License-Identifier: BSD-3-Clause
# Copyright the nbdkit-dirty-bitmap-filter authors

# Many bitmaps, with short and long names: made, listed, recorded, stored.

. "${srcdir:-$(dirname "$0")}/lib/functions.sh"
requires qemu-nbd

long=$(printf 'x%.0s' {1..1023})
parameters=("dirty-bitmap=$long")
for i in {1..300}; do parameters+=("dirty-bitmap=bitmap $i"); done
qemu-img create -q -f qcow2 disk.qcow2 64M
serve disk.qcow2 "${parameters[@]}"
[ "$(nbdinfo --list --json "$uri" | grep -c '"qemu:dirty-bitmap:')" -eq 301 ] ||
  fail "not all of them are listed"
shell 'h.pwrite(b"x" * 512, 10 << 20)' 'h.flush()' 'h.pwrite(b"x", 1 << 20)'
same "the long one" "1048576 65536
10485760 65536" "$(dirty "$long")"
stop_server
check_image disk.qcow2
[ "$(bitmap_names disk.qcow2 | wc -l)" -eq 301 ] || fail "some are lost"
for b in "bitmap 1" "bitmap 150" "bitmap 300" "$long"; do
  same "flags" auto "$(bitmap_flags disk.qcow2 "$b")"
  same "QEMU's map" "1048576 65536
10485760 65536" "$(qemu_dirty disk.qcow2 "$b")"
done
