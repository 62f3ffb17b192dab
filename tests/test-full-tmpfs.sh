#!/usr/bin/env bash
# nbdkit-dirty-bitmap-filter
# SPDX-License-Identifier: BSD-3-Clause
# Copyright the nbdkit-dirty-bitmap-filter authors

# A full tmpfs: ENOSPC in the middle of a load, then, with no byte left, a
# stop.  Either the bitmap reached the image, or it is marked and nbdkit's
# exit status tells.

. "${srcdir:-$(dirname "$0")}/lib/functions.sh"
requires qemu-nbd unshare mount

# As root no user namespace is needed for a mount of our own.
private="unshare -m"
$private true 2>/dev/null || private="unshare -rm"
$private true 2>/dev/null || skip "no private mounts here"
cat > inner.sh <<'END'
set -e
mount -t tmpfs -o size=12M tmpfs fs
qemu-img create -q -f qcow2 fs/disk.qcow2 1G
qemu-img bitmap --add -g 512 fs/disk.qcow2 b
nbdkit -f -U "$sock" -P "$d/pid" --filter="$FILTER" file fs/disk.qcow2 2>"$log" &
server=$!
trap 'kill -9 $server 2>/dev/null || :' EXIT
for i in $(seq 500); do [ -s "$d/pid" ] && break; sleep 0.02; done
/usr/bin/python3 -m nbd -u "$uri" -c '
import os
n = 0
try:
    while True:
        h.pwrite (bytes ([n + 1]) * 65536, n << 20)
        n += 1
except nbd.Error as e:
    assert e.errno == "ENOSPC", e
assert n > 50, n
for i in range (n):
    assert h.pread (65536, i << 20) == bytes ([i + 1]) * 65536
open ("written", "w").write (str (n))'
kill -TERM $server
status=0
wait $server || status=$?
echo $status > status
cp --sparse=always fs/disk.qcow2 disk.qcow2
END
mkdir fs
export d sock uri log FILTER
$private bash inner.sh
qemu-img check disk.qcow2 > check.log || [ $? -eq 3 ] || {
  cat check.log; fail "errors"; }
flags=$(bitmap_flags disk.qcow2 b)
echo "status $(cat status), flags $flags"
if [ "$flags" = auto ]; then
  qemu_dirty disk.qcow2 b > dirty
  n=$(cat written)
  awk -v n="$n" '$2 >= 65536 && $1 % 1048576 == 0 { c++ }
    END { if (c < n) { print c " of " n; exit 1 } }' dirty || fail "bits are missing"
else
  same flags "auto in-use" "$flags"
  [ "$(cat status)" -ne 0 ] || fail "the bitmap was lost, and the status is 0"
  [ -s "$log" ] || fail "nothing was said"
fi
