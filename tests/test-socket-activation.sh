#!/usr/bin/env bash
# nbdkit-dirty-bitmap-filter
# SPDX-License-Identifier: BSD-3-Clause
# Copyright the nbdkit-dirty-bitmap-filter authors

# systemd's socket activation, with a Unix and a TCP socket at once.

. "${srcdir:-$(dirname "$0")}/lib/functions.sh"
requires systemd-socket-activate

qemu-img create -q -f qcow2 disk.qcow2 10M
qemu-img bitmap --add disk.qcow2 b
port=$(free_port)
systemd-socket-activate -l "$sock" -l "127.0.0.1:$port" \
  -E PATH -E LD_LIBRARY_PATH \
  "$(command -v nbdkit)" --filter="$FILTER" file disk.qcow2 2>"$log" &
server_pid=$!
wait_until test -S "$sock"
shell 'h.pwrite(b"x" * 512, 65536)'
same "over TCP" "65536 65536" "$(dirty b "nbd://127.0.0.1:$port")"
nbdsh -u "nbd://127.0.0.1:$port" -c 'h.pwrite(b"x" * 512, 131072)'
same "over Unix" "65536 131072" "$(dirty b)"
stop_server
check_image disk.qcow2
same flags auto "$(bitmap_flags disk.qcow2 b)"
