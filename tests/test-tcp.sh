#!/usr/bin/env bash
# nbdkit-dirty-bitmap-filter
# SPDX-License-Identifier: BSD-3-Clause
# Copyright the nbdkit-dirty-bitmap-filter authors

# TCP: -p serves IPv4 and IPv6.

. "${srcdir:-$(dirname "$0")}/lib/functions.sh"

qemu-img create -q -f qcow2 disk.qcow2 10M
qemu-img bitmap --add disk.qcow2 b
port=$(free_port)
start_nbdkit -p "$port" --filter="$FILTER" file disk.qcow2
nbdsh -u "nbd://127.0.0.1:$port" -c 'h.pwrite(b"x" * 512, 65536)'
same "dirty over IPv4" "65536 65536" "$(dirty b "nbd://127.0.0.1:$port")"
if grep -q ' lo$' /proc/net/if_inet6 2>/dev/null; then
  nbdsh -u "nbd://[::1]:$port" -c 'h.pwrite(b"x" * 512, 0)'
  same "dirty over IPv6" "0 131072" "$(dirty b "nbd://[::1]:$port")"
fi
stop_server
check_image disk.qcow2

# One address only.
start_nbdkit -p "$port" -i 127.0.0.1 --filter="$FILTER" file disk.qcow2
nbdinfo --list "nbd://127.0.0.1:$port" | grep qemu:dirty-bitmap:b
if nbdinfo "nbd://[::1]:$port" 2>/dev/null; then fail "it listens on IPv6"; fi
stop_server
