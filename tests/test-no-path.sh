#!/usr/bin/env bash
# nbdkit-dirty-bitmap-filter
# SPDX-License-Identifier: BSD-3-Clause
# Copyright the nbdkit-dirty-bitmap-filter authors

# Over a plugin without a path the image uses what is there, then gets
# ENOSPC: a clear message, no damage, the bitmaps intact.

. "${srcdir:-$(dirname "$0")}/lib/functions.sh"
requires qemu-nbd

qemu-img create -q -f qcow2 disk.qcow2 1G
qemu-img bitmap --add disk.qcow2 b
truncate -s +10M disk.qcow2
nbdkit -f -U "$d/below" -P "$d/below.pid" file disk.qcow2 &
pids+=($!)
below=$!
wait_until test -s "$d/below.pid"
start_nbdkit --filter="$FILTER" nbd socket="$d/below"
shell 'written = 0
try:
    while True:
        h.pwrite(b"x" * (1 << 20), written << 20)
        written += 1
except nbd.Error as e:
    assert e.errno == "ENOSPC", e
assert 5 <= written <= 10, written
h.pwrite(b"y" * 512, 0)
h.flush()
assert h.pread(512, 1 << 20) == b"x" * 512
open("written", "w").write(str(written))'
ours=$(map b)
stop_server
grep -i -E 'space|grow' "$log" || fail "no word about it"
kill $below
wait $below || :
check_image disk.qcow2
same flags auto "$(bitmap_flags disk.qcow2 b)"
same "QEMU's map" "$ours" "$(qemu_map disk.qcow2 b)"
written=$(cat written)
dirty=$(qemu_dirty disk.qcow2 b | awk '{ n += $2 } END { print n }')
[ "$dirty" -ge $((written * 1048576)) ] || fail "only $dirty bytes are dirty"
