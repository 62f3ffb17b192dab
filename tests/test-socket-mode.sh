#!/usr/bin/env bash
# nbdkit-dirty-bitmap-filter
# SPDX-License-Identifier: BSD-3-Clause
# Copyright the nbdkit-dirty-bitmap-filter authors

# Unix sockets have the mode and owner that nbdkit gives them, where the
# filter's server stands in and at dirty-bitmap-listen.

. "${srcdir:-$(dirname "$0")}/lib/functions.sh"

qemu-img create -q -f qcow2 disk.qcow2 1M
qemu-img bitmap --add disk.qcow2 b

for mask in 077 000 022 117; do
  umask $mask
  start_nbdkit null 1M
  expected=$(stat -c '%a %u %g' "$sock")
  stop_server

  start_nbdkit --filter="$FILTER" file disk.qcow2 dirty-bitmap-listen="$d/own"
  same "umask $mask: nbdkit's socket" "$expected" \
       "$(stat -c '%a %u %g' "$sock")"
  same "umask $mask: dirty-bitmap-listen's socket" "$expected" \
       "$(stat -c '%a %u %g' "$d/own")"
  # And still while and after it was used.
  same "dirty" "" "$(dirty b)"
  same "umask $mask, later" "$expected" "$(stat -c '%a %u %g' "$sock")"
  stop_server
  rm -f "$sock"
done

# So it is with the label, and where there can be none that is an error.
if [ -d /sys/fs/selinux/booleans ]; then
  label=$(stat -c %C disk.qcow2)
  start_nbdkit --selinux-label="$label" --filter="$FILTER" file disk.qcow2 \
               dirty-bitmap-listen="$d/own"
  same "dirty" "" "$(dirty b "nbd+unix:///?socket=$d/own")"
  stop_server
else
  refused 'dirty-bitmap-listen: --selinux-label' --selinux-label=a:b:c \
          --filter="$FILTER" file disk.qcow2 dirty-bitmap-listen="$d/own"
  [ ! -e "$d/own" ] || fail "a socket was left behind"
fi
