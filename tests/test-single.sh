#!/usr/bin/env bash
# nbdkit-dirty-bitmap-filter
# SPDX-License-Identifier: BSD-3-Clause
# Copyright the nbdkit-dirty-bitmap-filter authors

# nbdkit -s serves one client on stdin and stdout.  There is no socket to
# stand in for: nbdkit's own server answers, and recording works.

. "${srcdir:-$(dirname "$0")}/functions.sh"
requires qemu-nbd

qemu-img create -q -f qcow2 disk.qcow2 10M
qemu-img bitmap --add disk.qcow2 b
/usr/bin/python3 - "$(command -v nbdkit)" "$FILTER" <<'END'
import nbd, sys
h = nbd.NBD ()
h.connect_command ([sys.argv[1], "-s", "--filter=" + sys.argv[2],
                    "file", "disk.qcow2"])
h.pwrite (b"x" * 512, 65536)
assert h.pread (512, 65536) == b"x" * 512
h.shutdown ()
END
# nbdkit may need a moment after its client has left.
wait_until qemu-img info disk.qcow2
wait_until eval "[ \"\$(bitmap_flags disk.qcow2 b)\" = auto ]"
check_image disk.qcow2
same "QEMU's map" "65536 65536" "$(qemu_dirty disk.qcow2 b)"
