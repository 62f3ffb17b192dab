#!/usr/bin/env bash
# nbdkit-dirty-bitmap-filter
# SPDX-License-Identifier: BSD-3-Clause
# Copyright the nbdkit-dirty-bitmap-filter authors

# base:allocation of preallocated images: what was never written is told
# as zeroes, as qemu-nbd tells it, and what was written as data; a backup
# that goes by it is complete.

. "${srcdir:-$(dirname "$0")}/lib/functions.sh"
requires qemu-nbd qemu-io

truncate -s 1M hole
[ "$(stat -c %b hole)" -eq 0 ] || skip "the file system has no holes"

# What does not read as zeroes, "offset length": whether zeroes are a hole
# too is told in another way by QEMU.
data ()
{
  awk '$3 < 2 { if ($1 == end && end > 0) n += $2
                else { if (n) print at, n; at = $1; n = $2 }
                end = $1 + $2 }
       END { if (n) print at, n }'
}

qemu_data ()
{
  nbdinfo --map=base:allocation -- [ qemu-nbd -r -f qcow2 "$1" ] | data
}

our_data ()
{
  allocation | data
}

bytes ()
{
  awk '{ n += $2 } END { print n + 0 }' <<<"$1"
}

# as_qemu WHAT [MAX-DATA]: both tell the same, and no more data than that.
as_qemu ()
{
  local max=${2:-2097152} expected

  expected=$(qemu_data disk.qcow2)
  serve -r disk.qcow2
  same "$1" "$expected" "$(our_data)"
  stop_server
  [ "$(bytes "$expected")" -le "$max" ] ||
    fail "$1: QEMU does not look below itself: $expected"
}

write ()
{
  qemu-io -f qcow2 "$@" disk.qcow2 > io.log
  if grep -i fail io.log; then fail "qemu-io: $*"; fi
}

create ()
{
  rm -f disk.qcow2
  qemu-img create -q -f qcow2 -o preallocation=metadata"$1" disk.qcow2 64M
}

create ''
as_qemu "empty" 0
for options in ,cluster_size=8k,compat=0.10 ,cluster_size=2M,refcount_bits=1 \
               ,extended_l2=on,cluster_size=128k; do
  create "$options"
  write -c 'w -q -P 5 4M 1M' -c 'w -q -P 6 20M 512' -c 'w -q -z 4200k 100k' \
        -c 'discard -q 30M 2M'
  as_qemu "$options"
done

# Nothing but zeroes is told as zeroes while it is written, nor after that.
create ''
qemu-img bitmap --add disk.qcow2 b
serve disk.qcow2
shell 'import random
h.shutdown(); h = nbd.NBD(); h.add_meta_context("base:allocation")
h.connect_uri("'"$uri"'")
d = random.Random(1)
model = bytearray(64 << 20)
for i in range(30):
    at = d.randrange(0, len(model) - 100000) & ~511
    n = d.choice((512, 4096, 65536, 99840))
    if i % 5 == 4:
        h.zero(n, at); model[at:at + n] = bytes(n)
    else:
        h.pwrite(bytes([i + 1]) * n, at); model[at:at + n] = bytes([i + 1]) * n
    zero = []
    h.block_status(len(model), 0,
                   lambda m, o, e, err: zero.extend(zip(e[0::2], e[1::2])))
    at = 0
    for length, flags in zero:
        assert not flags & 2 or not any(model[at:at + length]), (i, at, length)
        at += length
    assert at == len(model)
told = sum(l for l, f in zero if not f & 2)
assert told < 8 << 20, told'
same "a bitmap tells what was changed" 1 "$(($(dirty b | wc -l) > 1))"
stop_server
check_image disk.qcow2
same "while it is written" "$(qemu_data disk.qcow2)" "$(
  serve -r disk.qcow2; our_data; stop_server)"

# A preallocated image as a backing file, and one with a snapshot.
mv disk.qcow2 base.qcow2
qemu-img create -q -f qcow2 -b base.qcow2 -F qcow2 disk.qcow2
write -c 'w -q -P 7 40M 1M'
as_qemu "backing file" 8388608
create ''
write -c 'w -q -P 8 1M 1M'
qemu-img snapshot -c one disk.qcow2
write -c 'w -q -P 9 3M 512' -c 'w -q -P 9 5M 64k'
as_qemu "snapshot"

# An image as full as it says: storage is not asked, even if there are holes
# in its file where clusters were freed.
rm -f disk.qcow2
qemu-img create -q -f qcow2 disk.qcow2 64M
write -c 'w -q -P 1 0 32M'
serve disk.qcow2
shell 'h.trim(16 << 20, 8 << 20)'
stop_server
expected=$(qemu_data disk.qcow2)
start_nbdkit -v -r --filter="$FILTER" file disk.qcow2
same "full" "$expected" "$(our_data)"
stop_server
grep 'was not preallocated' "$log" > /dev/null || fail "taken for preallocated"

# A raw data file is referred to as a whole, so how full it is counts.
rm -f disk.qcow2 data
qemu-img create -q -f qcow2 -o data_file=data,data_file_raw=on disk.qcow2 64M
write -c 'w -q -P 3 4M 1M'
serve disk.qcow2
[ "$(bytes "$(our_data)")" -le 2097152 ] ||
  fail "raw data file: $(our_data)"
[ "$(bytes "$(our_data)")" -ge 1048576 ] ||
  fail "raw data file: $(our_data)"
shell 'h.pwrite(b"x" * 65536, 33 << 20)'
our_data | awk '$1 <= 34603008 && $1 + $2 >= 34668544 { n = 1 }
                  END { exit !n }' || fail "raw data file: $(our_data)"
stop_server
