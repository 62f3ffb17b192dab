#!/usr/bin/env bash
# nbdkit-dirty-bitmap-filter
# SPDX-License-Identifier: BSD-3-Clause
# Copyright the nbdkit-dirty-bitmap-filter authors

# The file system below is full: the write fails, the image and its
# bitmaps stay intact, and after space was made all is recorded.

. "${srcdir:-$(dirname "$0")}/lib/functions.sh"
requires qemu-nbd

# A limit on the size of files is a full disk that needs no privileges.
qemu-img create -q -f qcow2 disk.qcow2 1G
qemu-img bitmap --add disk.qcow2 b
(ulimit -f $((20 * 1024)); trap '' XFSZ
 exec nbdkit -f -U "$sock" -P "$d/pid" --filter="$FILTER" file disk.qcow2) \
  2>"$log" &
server_pid=$!
wait_until test -s "$d/pid"
shell 'n = 0
try:
    while n < 100:
        h.pwrite(bytes([n + 1]) * (1 << 20), n << 20)
        n += 1
except nbd.Error as e:
    assert e.errno in ("ENOSPC", "EFBIG"), e
assert 10 <= n < 20, n
h.pwrite(b"y" * 512, 0)
h.flush()
for i in range(1, n):
    assert h.pread(512, i << 20) == bytes([i + 1]) * 512
open("written", "w").write(str(n))'
stop_server
check_image disk.qcow2
same flags auto "$(bitmap_flags disk.qcow2 b)"
dirty=$(qemu_dirty disk.qcow2 b | awk '{ n += $2 } END { print n }')
[ "$dirty" -ge $(($(cat written) << 20)) ] || fail "only $dirty bytes are dirty"
serve disk.qcow2
shell 'h.pwrite(b"z" * (1 << 20), 500 << 20)'
stop_server
check_image disk.qcow2
