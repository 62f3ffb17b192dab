#!/usr/bin/env bash
# nbdkit-dirty-bitmap-filter
# SPDX-License-Identifier: BSD-3-Clause
# Copyright the nbdkit-dirty-bitmap-filter authors

# With dirty-bitmap-crash=mark: when a bitmap is in use, as `qemu-img info -U`
# tells of the live image:
# not before the first write, while the image's bitmap lacks a bit, and
# not after a flush.  A bit that is set already costs nothing (R14).

. "${srcdir:-$(dirname "$0")}/lib/functions.sh"

qemu-img create -q -f qcow2 disk.qcow2 100M
for b in fine:64k coarse:2M; do
  qemu-img bitmap --add -g ${b#*:} disk.qcow2 ${b%:*}
done
flags ()
{
  echo "$(bitmap_flags disk.qcow2 fine), $(bitmap_flags disk.qcow2 coarse)"
}

serve disk.qcow2 dirty-bitmap-crash=mark
exec {in}> >(/usr/bin/python3 -u -c '
import nbd, sys
h = nbd.NBD ()
h.connect_uri (sys.argv[1])
for line in sys.stdin:
    exec (line)
    print ("done")' "$uri" > answers)
number=0
act ()
{
  number=$((number + 1))
  echo "$1" >&$in
  wait_until eval "[ \$(wc -l < answers) -ge $number ]"
}

same "before the first write" "auto, auto" "$(flags)"
act 'h.pread (512, 0)'
same "after a read" "auto, auto" "$(flags)"
act 'h.pwrite (b"x", 0)'
same "after a write" "auto in-use, auto in-use" "$(flags)"
act 'h.flush ()'
same "after a flush" "auto, auto" "$(flags)"
act 'h.pwrite (b"y", 100)'
same "after a write to a dirty granule" "auto, auto" "$(flags)"
act 'h.pwrite (b"z", 65536)'
same "after a write to a granule that one lacks" "auto in-use, auto" "$(flags)"
act 'h.flush ()'
same "after another flush" "auto, auto" "$(flags)"
act 'h.zero (65536, 50 << 20)'
same "after a zero" "auto in-use, auto in-use" "$(flags)"
act 'h.trim (65536, 60 << 20, nbd.CMD_FLAG_FUA)'
same "after a trim with FUA" "auto, auto" "$(flags)"
act 'h.pwrite (b"z", 90 << 20)'
exec {in}>&-
stop_server
same "after a stop" "auto, auto" "$(flags)"
check_image disk.qcow2
