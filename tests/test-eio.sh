#!/usr/bin/env bash
# nbdkit-dirty-bitmap-filter
# SPDX-License-Identifier: BSD-3-Clause
# Copyright the nbdkit-dirty-bitmap-filter authors

# EIO from below, by nbdkit's error filter: requests fail, nothing breaks,
# failed writes are recorded, and when the storage has recovered so has
# the disk.  Bits are not written ahead: they would make in_use needless.

. "${srcdir:-$(dirname "$0")}/lib/functions.sh"
requires qemu-nbd

qemu-img create -q -f qcow2 disk.qcow2 64M
qemu-img bitmap --add disk.qcow2 b
start_nbdkit --filter="$FILTER" --filter=error file disk.qcow2 \
             error=EIO error-rate=100% error-file="$d/trouble" \
             dirty-bitmap-crash=mark
shell 'import os
def fails(f):
    try:
        f()
    except nbd.Error as e:
        assert e.errno == "EIO", e
    else:
        assert False, "no error"
h.pwrite(b"x" * 512, 0)
h.flush()
h.pwrite(b"y" * 512, 1 << 20)
open("trouble", "w").close()
fails(lambda: h.pwrite(b"z" * 512, 10 << 20))
fails(lambda: h.pwrite(b"z" * 512, 20 << 20))
fails(lambda: h.pread(512, 1 << 20))
fails(h.flush)
os.unlink("trouble")
assert h.pread(512, 1 << 20) == b"y" * 512
assert h.pread(512, 0) == b"x" * 512
h.flush()
h.pwrite(b"w" * 512, 30 << 20)'
same dirty "0 65536
1048576 65536
10485760 65536
20971520 65536
31457280 65536" "$(dirty b)"
ours=$(map b)
stop_server
qemu-img check -q disk.qcow2 || [ $? -eq 3 ] || fail "errors in the image"
same flags auto "$(bitmap_flags disk.qcow2 b)"
same "QEMU's map" "$ours" "$(qemu_map disk.qcow2 b)"

# Where not even in_use can be written, nothing is changed.
before=$(checksum disk.qcow2)
touch trouble
start_nbdkit --filter="$FILTER" --filter=error file disk.qcow2 \
             error-pwrite=EIO error-pwrite-rate=100% error-file="$d/trouble" \
             dirty-bitmap-crash=mark
shell 'try:
    h.pwrite(b"z" * 512, 40 << 20)
except nbd.Error as e:
    assert e.errno == "EIO", e
else:
    assert False, "no error"
assert h.pread(512, 30 << 20) == b"w" * 512
assert h.pread(512, 40 << 20) == bytes(512)'
kill_server
same "the file" "$before" "$(checksum disk.qcow2)"

# And where the storage fails to the end: the exit status tells, and the
# bitmap is marked.
rm trouble
start_nbdkit --filter="$FILTER" --filter=error file disk.qcow2 \
             error-pwrite=EIO error-pwrite-rate=100% error-file="$d/trouble" \
             dirty-bitmap-crash=mark
shell 'h.pwrite(b"z" * 512, 50 << 20)'
touch trouble
stop_server TERM 1
grep -q "b'" "$log" || fail "the bitmap is not named"
same flags "auto in-use" "$(bitmap_flags disk.qcow2 b)"
qemu-img check -q disk.qcow2 || [ $? -eq 3 ] || fail "errors in the image"
