#!/usr/bin/env bash
# nbdkit-dirty-bitmap-filter
# SPDX-License-Identifier: BSD-3-Clause
# Copyright the nbdkit-dirty-bitmap-filter authors

# Block status of 4 GiB - 1 at once on a large disk, with data and dirty
# runs longer than that, and the whole disk in large steps.

. "${srcdir:-$(dirname "$0")}/lib/functions.sh"
requires qemu-nbd

qemu-img create -q -f qcow2 disk.qcow2 12T
qemu-img bitmap --add disk.qcow2 b
serve disk.qcow2
shell 'for i in range(3): h.zero(3 << 30, (1 << 40) + i * (3 << 30))' \
      'h.pwrite(b"x", 6 << 40)'
expected="1099511627776 9663676416
6597069766656 65536"
same dirty "$expected" "$(dirty b)"
cat > ask.py <<'END'
import nbd, sys
count = (1 << 32) - 1
for contexts in (["base:allocation"], ["qemu:dirty-bitmap:b"],
                 ["base:allocation", "qemu:dirty-bitmap:b"]):
    h = nbd.NBD ()
    for c in contexts:
        h.add_meta_context (c)
    h.connect_uri (sys.argv[1])
    for offset in (0, 1 << 40, (1 << 40) + 12345, h.get_size () - count):
        found = {}
        def extent (name, at, entries, error):
            assert at == offset
            found[name] = entries
        h.block_status (count, offset, extent)
        assert sorted (found) == sorted (contexts), found
        for name, entries in found.items ():
            assert sum (entries[0::2]) == count, (name, offset, entries)
            assert 0 not in entries[0::2]
    h.shutdown ()
END
/usr/bin/python3 ask.py "$uri"
stop_server
check_image disk.qcow2
same "QEMU's map" "$expected" "$(qemu_dirty disk.qcow2 b)"

# The same of nbdkit's own server, where 1.32 used to abort (it is told
# nothing beyond the request).
start_nbdkit --filter="$FILTER" file disk.qcow2 dirty-bitmap-server=off
nbdsh --base-allocation -u "$uri" -c '
for offset in (0, 1 << 40, 6 << 40):
    h.block_status((1 << 32) - 1, offset, lambda *a: None)'
shell 'h.pread(512, 0)'
stop_server
