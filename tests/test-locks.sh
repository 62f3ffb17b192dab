#!/usr/bin/env bash
# nbdkit-dirty-bitmap-filter
# SPDX-License-Identifier: BSD-3-Clause
# Copyright the nbdkit-dirty-bitmap-filter authors

# The image is locked as QEMU locks it: a second writer of either kind is
# refused with the reason, and before nbdkit becomes a daemon.

. "${srcdir:-$(dirname "$0")}/lib/functions.sh"
requires qemu-nbd qemu-io

qemu-img create -q -f qcow2 disk.qcow2 10M
qemu-img bitmap --add disk.qcow2 b

qemu_refused ()
{
  if "$@" > out 2>&1; then cat out; fail "not refused: $*"; fi
  grep -q lock out || { cat out; fail "no word about a lock: $*"; }
}

# While it is served read-write.
serve disk.qcow2
qemu_refused qemu-img info disk.qcow2
qemu_refused qemu-img bitmap --add disk.qcow2 c
qemu_refused qemu-io -f qcow2 -c 'write 0 512' disk.qcow2
qemu_refused qemu-io -r -f qcow2 -c 'read 0 512' disk.qcow2
qemu_refused qemu-nbd -f qcow2 -k "$d/q" disk.qcow2
qemu-img info -U disk.qcow2 >/dev/null
refused lock --filter="$FILTER" file disk.qcow2
refused lock -r --filter="$FILTER" file disk.qcow2
status=0
nbdkit -U "$d/second" -P "$d/second.pid" --filter="$FILTER" file disk.qcow2 \
       2>second.log || status=$?
[ $status -ne 0 ] || fail "a second instance became a daemon"
grep -q lock second.log
shell 'h.pwrite(b"x", 0)'
stop_server
qemu-img info disk.qcow2 >/dev/null

# While it is served read-only.
serve -r disk.qcow2
qemu_refused qemu-io -f qcow2 -c 'write 0 512' disk.qcow2
qemu-img info disk.qcow2 >/dev/null
refused lock --filter="$FILTER" file disk.qcow2
stop_server

# While QEMU has it.
before=$(checksum disk.qcow2)
for opt in "" -r; do
  qemu-nbd $opt -t -f qcow2 -k "$d/qemu" --pid-file="$d/qemu.pid" disk.qcow2 &
  qemu=$!
  pids+=($qemu)
  wait_until test -s "$d/qemu.pid"
  refused lock --filter="$FILTER" file disk.qcow2
  if [ -z "$opt" ]; then
    refused lock -r --filter="$FILTER" file disk.qcow2
  else
    serve -r disk.qcow2
    stop_server
  fi
  kill $qemu
  wait $qemu || :
  rm -f "$d/qemu.pid"
done
