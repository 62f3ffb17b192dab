#!/usr/bin/env bash
# nbdkit-dirty-bitmap-filter
# SPDX-License-Identifier: BSD-3-Clause
# Copyright the nbdkit-dirty-bitmap-filter authors

# nbdkit -r: every request works that reads, none that writes, and the
# file stays as it was, byte for byte.  Two such servers at once are fine.

. "${srcdir:-$(dirname "$0")}/lib/functions.sh"
requires qemu-io

qemu-img create -q -f qcow2 disk.qcow2 10M
for b in b c; do qemu-img bitmap --add disk.qcow2 $b; done
qemu-img bitmap --disable disk.qcow2 c
qemu-io -f qcow2 -c 'write -q -P 5 1M 64k' disk.qcow2
before=$(checksum disk.qcow2)
serve -r disk.qcow2
first=$server_pid
same dirty "1048576 65536" "$(dirty b)"
same "dirty in the disabled one" "" "$(dirty c)"
shell 'assert h.is_read_only()' \
      'assert h.pread(65536, 1 << 20) == b"\5" * 65536' \
      'h.set_strict_mode(0)' 'h.flush()
for f in [lambda: h.pwrite(b"x", 0), lambda: h.zero(512, 0),
          lambda: h.trim(65536, 0)]:
    try:
        f()
    except nbd.Error as e:
        assert e.errno in ("EPERM", "EROFS"), e
    else:
        assert False, "a change was accepted"'
if [ "$SERVER" = nbdkit ]; then
  nbdkit -r -f -U "$d/second" --filter="$FILTER" file disk.qcow2 2>second.log &
  pids+=($!)
  second=$!
  wait_until test -S "$d/second"
  same "the second server's" "1048576 65536" \
       "$(dirty b "nbd+unix:///?socket=$d/second")"
  kill -TERM $second
  wait $second
fi
same flags auto "$(bitmap_flags disk.qcow2 b)"
server_pid=$first
stop_server
same "the file" "$before" "$(checksum disk.qcow2)"

# Not even a file that cannot be written must be.
chmod a-w disk.qcow2
serve -r disk.qcow2
same dirty "1048576 65536" "$(dirty b)"
stop_server
