#!/usr/bin/env bash
# nbdkit-dirty-bitmap-filter
# SPDX-License-Identifier: BSD-3-Clause
# Copyright the nbdkit-dirty-bitmap-filter authors

# A bitmap that is in use when the image is opened is kept as it is, not
# offered and not recorded into, and named on stderr.  The others and the
# disk are served.  Asking for it by name is an error with the remedy.

. "${srcdir:-$(dirname "$0")}/lib/functions.sh"
requires qemu-nbd

qemu-img create -q -f qcow2 disk.qcow2 64M
qemu-img bitmap --add disk.qcow2 broken
serve disk.qcow2 dirty-bitmap-crash=mark
shell 'h.pwrite(b"x", 0)'
kill_server
qemu-img bitmap --add disk.qcow2 good
same flags "auto in-use" "$(bitmap_flags disk.qcow2 broken)"

for opt in "" -r; do
  serve $opt disk.qcow2
  nbdinfo --list "$uri" > list
  if grep qemu:dirty-bitmap:broken list; then fail "it is offered"; fi
  grep -q qemu:dirty-bitmap:good list
  grep -q broken "$log" || fail "the log does not name it"
  if [ -z "$opt" ]; then
    shell 'h.pwrite(b"y" * 512, 10 << 20)' 'h.flush()'
    same "the good one" "10485760 65536" "$(dirty good)"
  fi
  stop_server
  same flags "auto in-use" "$(bitmap_flags disk.qcow2 broken)"
done
qemu-img check disk.qcow2 > check.log || [ $? -eq 3 ] || fail "errors"
same "QEMU's map" "10485760 65536" "$(qemu_dirty disk.qcow2 good)"

before=$(checksum disk.qcow2)
refused 'broken.*(inconsistent|in use).*' --filter="$FILTER" \
        file disk.qcow2 dirty-bitmap=broken
grep -E 'remove|--remove' refused.log || fail "the remedy is missing"
refused broken --filter="$FILTER" file disk.qcow2 dirty-bitmap-expose=broken
same "the file" "$before" "$(checksum disk.qcow2)"

# The remedy works.
qemu-img bitmap --remove disk.qcow2 broken
serve disk.qcow2 dirty-bitmap=broken
shell 'h.pwrite(b"z", 0)'
same "made anew" "0 65536" "$(dirty broken)"
stop_server
check_image disk.qcow2
