#!/usr/bin/env bash
# nbdkit-dirty-bitmap-filter
# SPDX-License-Identifier: BSD-3-Clause
# Copyright the nbdkit-dirty-bitmap-filter authors

# The largest disk that clusters of 512 bytes can have: its L1 table is as
# large as QEMU allows, 32 MiB.

. "${srcdir:-$(dirname "$0")}/lib/functions.sh"
requires qemu-io

qemu-img create -q -f qcow2 -o cluster_size=512 disk.qcow2 128G
qemu-img bitmap --add -g 64k disk.qcow2 b
serve disk.qcow2
shell 'h.pwrite(b"\1" * 4096, (128 << 30) - 4096)' \
      'h.pwrite(b"\2" * 512, 64 << 30)' \
      'h.flush()' \
      'assert h.pread(512, 64 << 30) == b"\2" * 512'
stop_server
check_image disk.qcow2
qemu-io -r -f qcow2 -c "read -P 1 $(((128 << 30) - 4096)) 4096" \
        -c 'read -P 2 64G 512' -c 'read -P 0 32G 512' disk.qcow2 > io.log
if grep -i fail io.log; then fail "QEMU reads something else"; fi
