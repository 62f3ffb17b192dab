#!/usr/bin/env bash
# nbdkit-dirty-bitmap-filter
# SPDX-License-Identifier: BSD-3-Clause
# Copyright the nbdkit-dirty-bitmap-filter authors

# As a daemon: nbdkit returns when clients can connect, the pid file names
# the process, relative paths work, and TERM leaves the bitmap in the image.

. "${srcdir:-$(dirname "$0")}/lib/functions.sh"

qemu-img create -q -f qcow2 disk.qcow2 10M
qemu-img bitmap --add disk.qcow2 b
nbdkit -U "$sock" -P pidfile --filter="$FILTER" file disk.qcow2
wait_until test -s pidfile      # which the daemon writes
pid=$(cat pidfile)
pids+=("$pid")
shell 'h.pwrite(b"x" * 512, 65536)'
same dirty "65536 65536" "$(dirty b)"
kill -TERM "$pid"
wait_until process_ended "$pid"
check_image disk.qcow2
same flags auto "$(bitmap_flags disk.qcow2 b)"

# It can grow there too, where the current directory is another.
rm -f "$sock" pidfile
nbdkit -U "$sock" -P pidfile --filter="$FILTER" file disk.qcow2
wait_until test -s pidfile      # which the daemon writes
pid=$(cat pidfile)
pids+=("$pid")
shell 'h.pwrite(b"y" * (8 << 20), 0)'
kill -TERM "$pid"
wait_until process_ended "$pid"
check_image disk.qcow2
