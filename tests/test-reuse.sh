#!/usr/bin/env bash
# nbdkit-dirty-bitmap-filter
# SPDX-License-Identifier: BSD-3-Clause
# Copyright the nbdkit-dirty-bitmap-filter authors

# Trim releases clusters and punches holes below, and freed clusters are
# used again: writing and trimming over and over does not make the file
# grow.

. "${srcdir:-$(dirname "$0")}/lib/functions.sh"
requires qemu-nbd

for cluster in 4k 64k; do
  rm -f disk.qcow2
  qemu-img create -q -f qcow2 -o cluster_size=$cluster disk.qcow2 1G
  qemu-img bitmap --add disk.qcow2 b
  serve disk.qcow2
  shell 'h.pwrite(b"x" * (16 << 20), 0)' 'h.flush()'
  full=$(stat -c %b disk.qcow2)
  shell 'h.trim(16 << 20, 0)' 'h.flush()' 'h.flush()'
  same_allocation "after the trim" "0 1073741824 3"
  empty=$(stat -c %b disk.qcow2)
  [ "$empty" -lt $((full - 24 * 1024)) ] ||
    fail "$full blocks before the trim, $empty after"
  for i in {1..12}; do
    shell "h.pwrite(b'y' * (16 << 20), $i << 24)" 'h.flush()' \
          "h.trim(16 << 20, $i << 24)" 'h.flush()'
  done
  same "dirty" "0 218103808" "$(dirty b)"
  stop_server
  check_image disk.qcow2
  size=$(stat -c %s disk.qcow2)
  [ "$size" -lt $((64 << 20)) ] || fail "the file has grown to $size bytes"
done
