#!/usr/bin/env bash
# nbdkit-dirty-bitmap-filter
# SPDX-License-Identifier: BSD-3-Clause
# Copyright the nbdkit-dirty-bitmap-filter authors

# Preallocated images: writing changes data in place, allocates nothing,
# and is recorded all the same.

. "${srcdir:-$(dirname "$0")}/lib/functions.sh"
requires qemu-io

for mode in metadata falloc full; do
  # The storage of the first has nothing of it yet (test-preallocation-map.sh
  # has more of that).
  case $mode in metadata) kind=2 ;; *) kind=0 ;; esac
  rm -f disk.qcow2
  qemu-img create -q -f qcow2 -o preallocation=$mode disk.qcow2 40M
  qemu-img bitmap --add disk.qcow2 b
  before=$(stat -c %s disk.qcow2)
  serve disk.qcow2
  same_allocation allocation "0 41943040 $kind"
  shell 'h.pwrite(b"x" * 1000000, 10 << 20)' 'h.flush()' \
        'assert h.pread(1000, 0) == bytes(1000)'
  same dirty "10485760 1048576" "$(dirty b)"
  stop_server
  check_image disk.qcow2
  # Only a few clusters for bits are what may have been added.
  after=$(stat -c %s disk.qcow2)
  [ "$after" -le $((before + 65536 * 3)) ] ||
    fail "preallocation=$mode: the file grew from $before to $after"
  qemu-io -r -f qcow2 -c 'read -P 0x78 10M 1000000' disk.qcow2 > io.log
  if grep -i fail io.log; then fail "QEMU reads something else"; fi
done
