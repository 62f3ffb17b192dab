#!/usr/bin/env bash
# nbdkit-dirty-bitmap-filter
# SPDX-License-Identifier: BSD-3-Clause
# Copyright the nbdkit-dirty-bitmap-filter authors

# Clusters that a crash has leaked are reclaimed when the image is served
# and written the next time; if it is only served, the file stays as it
# was.  An image that is too large to look for leaks starts no later.

. "${srcdir:-$(dirname "$0")}/lib/functions.sh"
requires qemu-io

# check_leaks FILE: qemu-img check, which may find leaks; how many.
leaks ()
{
  local status=0

  qemu-img check -U --output=json "$1" >check.json 2>/dev/null || status=$?
  [ $status -eq 0 ] || [ $status -eq 3 ] || fail "errors in $1 ($status)"
  /usr/bin/python3 -c '
import json
print (json.load (open ("check.json")).get ("leaks", 0))'
}

# A server that is killed between its writes of refcounts and of L2
# entries leaks.  Kill a few, with much in flight.
some=0
for i in {1..12}; do
  rm -f disk.qcow2
  qemu-img create -q -f qcow2 -o cluster_size=$((4096 << i % 5)) disk.qcow2 1G
  [ $((i % 3)) -eq 0 ] || qemu-img bitmap --add disk.qcow2 b
  serve disk.qcow2
  shell "
import random
random.seed($i)
for j in range(400):
    at = random.randrange(1 << 14) << 16
    h.aio_pwrite(nbd.Buffer.from_bytearray(bytearray(b'x' * 40000)), at)
    if j % 7 == 0:
        h.aio_flush()
    if j % 11 == 0:
        h.aio_trim(1 << 17, at)
while h.aio_in_flight() > $((i * 25)):
    h.poll(-1)
import os, signal
os.kill($server_pid, signal.SIGKILL)"
  wait "$server_pid" 2>/dev/null || :
  server_pid=
  n=$(leaks disk.qcow2)
  some=$((some + n))
  before=$(checksum disk.qcow2)

  serve disk.qcow2
  shell 'h.pread(65536, 0)' 'h.flush()'
  stop_server
  same "the file, unwritten" "$before" "$(checksum disk.qcow2)"
  same "leaks" "$n" "$(leaks disk.qcow2)"

  serve disk.qcow2
  shell 'h.pwrite(b"y", 0)'
  stop_server
  check_image disk.qcow2
done
[ $some -gt 0 ] || fail "nothing was leaked"
echo "$some clusters were leaked"

# Leaks made by hand, in a file that tells of nothing.
# leak FILE CLUSTER...: raise their refcounts.
leak ()
{
  PYTHONDONTWRITEBYTECODE=1 PYTHONPATH=$tests/lib /usr/bin/python3 -c '
import sys
from qcow2image import Image
image = Image (sys.argv[1])
size = image.cluster_size
table = image.get ("refcount_table_offset")
for c in map (int, sys.argv[2:]):
    block = int.from_bytes (image.read (table + c // (size // 2) * 8, 8), "big")
    at = block + c % (size // 2) * 2
    count = int.from_bytes (image.read (at, 2), "big")
    image.write (at, (count + 1).to_bytes (2, "big"))' "$@"
}

# start_time: serve disk.qcow2, not longer than a few seconds, also where
# others use the machine.
start_time ()
{
  local start

  start=$(now)
  serve disk.qcow2
  shell 'h.get_size()'
  [ -n "${ASAN_PRELOAD-}" ] || elapsed_less "$start" 5
}

rm -f disk.qcow2
qemu-img create -q -f qcow2 disk.qcow2 16T
qemu-io -f qcow2 -c 'write -q 5T 1M' -c 'write -q 15T 1M' disk.qcow2
clusters=$(($(stat -c %s disk.qcow2) / 65536))
# The last is the end of the file, so that this is none of a crash.
truncate -s $(((clusters + 1) * 65536)) disk.qcow2
leak disk.qcow2 0 $clusters
same "leaks" 2 "$(leaks disk.qcow2)"
start_time
shell 'h.trim(1 << 20, 15 << 40)'
stop_server
check_image disk.qcow2

# 64 MiB of L2 tables: nobody looks, and a leak stays.
rm -f disk.qcow2
qemu-img create -q -f qcow2 -o preallocation=metadata disk.qcow2 512G
qemu-img bitmap --add disk.qcow2 b
clusters=$(($(stat -c %s disk.qcow2) / 65536))
leak disk.qcow2 0
for i in 1 2; do
  start_time
  shell 'h.pwrite(b"y" * 512, 1 << 30)' 'h.flush()'
  # The second time a bitmap tells of a crash.
  if [ $i -eq 1 ]; then kill_server; else stop_server; fi
done
same "leaks" 1 "$(leaks disk.qcow2)"
