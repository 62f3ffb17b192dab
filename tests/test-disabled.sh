#!/usr/bin/env bash
# nbdkit-dirty-bitmap-filter
# SPDX-License-Identifier: BSD-3-Clause
# Copyright the nbdkit-dirty-bitmap-filter authors

# A disabled bitmap is served and never changes, neither its bits nor its
# flags nor its bytes, whatever is written (I4).

. "${srcdir:-$(dirname "$0")}/lib/functions.sh"
requires qemu-io

qemu-img create -q -f qcow2 disk.qcow2 64M
for b in on off; do qemu-img bitmap --add disk.qcow2 $b; done
qemu-io -f qcow2 -c 'write -q -P 5 1M 64k' disk.qcow2
qemu-img bitmap --disable disk.qcow2 off

bytes ()
{
  PYTHONDONTWRITEBYTECODE=1 PYTHONPATH=$tests/lib /usr/bin/python3 -c '
import hashlib
from qcow2image import Image
b = Image ("disk.qcow2").bitmap ("off")
print (b.get ("flags"), b.get ("bitmap_table_offset"),
       hashlib.sha256 (b.raw ()).hexdigest ())'
}

before=$(bytes)
serve disk.qcow2
shell 'h.pwrite(b"x" * (4 << 20), 2 << 20)' 'h.zero(1 << 20, 10 << 20)' \
      'h.flush()' 'h.pwrite(b"y", 0)'
same on "0 65536
1048576 65536
2097152 4194304
10485760 1048576" "$(dirty on)"
same off "1048576 65536" "$(dirty off)"
same "its bytes while served" "$before" "$(bytes)"
same "its flags while served" "" "$(bitmap_flags disk.qcow2 off)"
stop_server
same "its bytes" "$before" "$(bytes)"
check_image disk.qcow2
same "QEMU's map" "1048576 65536" "$(qemu_dirty disk.qcow2 off)"
