#!/usr/bin/env bash
# nbdkit-dirty-bitmap-filter
# SPDX-License-Identifier: BSD-3-Clause
# Copyright the nbdkit-dirty-bitmap-filter authors

# dirty-bitmap-listen=ADDRESS serves the contexts on a socket of its own
# besides, whatever stands in front: a Unix path, or HOST:PORT.

. "${srcdir:-$(dirname "$0")}/lib/functions.sh"

qemu-img create -q -f qcow2 disk.qcow2 10M
qemu-img bitmap --add disk.qcow2 b
port=$(free_port)

# Beside nbdkit's own server, which another filter keeps busy.
for address in "$d/own" "127.0.0.1:$port" "[::1]:$port"; do
  case $address in
    /*) own="nbd+unix:///?socket=$address" ;;
    *) own="nbd://$address" ;;
  esac
  if [[ $address = "[::1]"* ]] && ! grep -q ' lo$' /proc/net/if_inet6; then
    continue
  fi
  start_nbdkit --filter=log --filter="$FILTER" file disk.qcow2 \
               logfile=/dev/null dirty-bitmap-listen="$address"
  nbdsh -u "$own" -c 'h.pwrite(b"a", 65536)'
  shell 'assert h.pread(1, 65536) == b"a"' 'h.pwrite(b"b", 131072)'
  same "dirty at $address" "65536 131072" "$(dirty b "$own")"
  stop_server
  check_image disk.qcow2
done
[ ! -e "$d/own" ] || fail "the socket was left behind"

# Beside itself.
start_nbdkit --filter="$FILTER" file disk.qcow2 dirty-bitmap-listen="$d/own"
own="nbd+unix:///?socket=$d/own"
nbdsh -u "$own" -c 'h.pwrite(b"c", 327680)'
expected="65536 131072
327680 65536"
same "on its own socket" "$expected" "$(dirty b "$own")"
same "on nbdkit's" "$expected" "$(dirty b)"

# An address in use is an error, and before nbdkit is a daemon.
cp disk.qcow2 other.qcow2
status=0
nbdkit -U "$d/second" -P "$d/second.pid" --filter="$FILTER" file other.qcow2 \
       dirty-bitmap-listen="$d/own" 2>second.log || status=$?
[ $status -ne 0 ] || fail "an address in use, and it became a daemon"
grep -i -E 'in use|exists' second.log
stop_server
for address in "" 127.0.0.1:99999 127.0.0.1:x; do
  refused 'dirty-bitmap-listen' --filter="$FILTER" file other.qcow2 \
          dirty-bitmap-listen="$address"
done
