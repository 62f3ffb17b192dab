#!/usr/bin/env bash
# nbdkit-dirty-bitmap-filter
# SPDX-License-Identifier: BSD-3-Clause
# Copyright the nbdkit-dirty-bitmap-filter authors

# dirty-bitmap-server=on is fine where nothing is in the way, and filters
# that act on data alone may be below.

. "${srcdir:-$(dirname "$0")}/lib/functions.sh"

qemu-img create -q -f qcow2 disk.qcow2 10M
qemu-img bitmap --add disk.qcow2 b
start_nbdkit --filter="$FILTER" file disk.qcow2 dirty-bitmap-server=on
shell 'h.pwrite(b"x", 65536)'
same dirty "65536 65536" "$(dirty b)"
stop_server
[ ! -s "$log" ] || { cat "$log"; fail "something was said"; }

start_nbdkit --filter="$FILTER" --filter=log --filter=fua file disk.qcow2 \
             logfile="$d/requests" fuamode=emulate dirty-bitmap-server=on
shell 'h.pwrite(b"x", 262144)'
same dirty "65536 65536
262144 65536" "$(dirty b)"
stop_server
check_image disk.qcow2
grep -q Write requests
