#!/usr/bin/env bash
# nbdkit-dirty-bitmap-filter
# SPDX-License-Identifier: BSD-3-Clause
# Copyright the nbdkit-dirty-bitmap-filter authors

# The plugin is opened once for all clients, without the name of an export.
# Plugins that choose by the name what they serve are refused with an error
# that says so (some would crash), and the nbd plugin does not complain.

. "${srcdir:-$(dirname "$0")}/lib/functions.sh"

mkdir folder
qemu-img create -q -f qcow2 folder/disk.qcow2 1M
qemu-img bitmap --add folder/disk.qcow2 b
truncate -s +8M folder/disk.qcow2        # to write into

no ()
{
  refused "$@"
  [ "$(grep -c '' refused.log)" -eq 1 ] ||
    fail "not one line: $(cat refused.log)"
}
for server in auto off; do
  no 'folder.*file=' --filter="$FILTER" file dir=folder \
     dirty-bitmap-server=$server
  no 'folder.*file=' --filter="$FILTER" file directory="$d/folder" \
     dirty-bitmap-server=$server
  no 'dynamic-export' --filter="$FILTER" nbd socket="$d/below" \
     dynamic-export=yes dirty-bitmap-server=$server
  no 'ondemand' --filter="$FILTER" ondemand dir=folder size=1M \
     dirty-bitmap-server=$server
  no 'info' --filter="$FILTER" info dirty-bitmap-server=$server
done

nbdkit -f -U below -P below.pid file folder/disk.qcow2 &
pids+=($!)
wait_until test -s below.pid
for parameters in "" export=x shared=true dynamic-export=false; do
  # shellcheck disable=SC2086  # words are meant
  start_nbdkit --filter="$FILTER" nbd socket="$d/below" $parameters
  same dirty "" "$(dirty b)"
  stop_server
  [ ! -s "$log" ] || fail "something was said: $(cat "$log")"
done
start_nbdkit --filter="$FILTER" nbd uri="nbd+unix:///?socket=$d/below"
shell 'h.pwrite(b"x" * 512, 65536)'
same dirty "65536 65536" "$(dirty b)"
stop_server
[ ! -s "$log" ] || fail "something was said: $(cat "$log")"
before=$(checksum folder/disk.qcow2)
start_nbdkit -r --filter="$FILTER" nbd socket="$d/below" dirty-bitmap-server=off
shell 'assert h.is_read_only ()'
stop_server
same "the image" "$before" "$(checksum folder/disk.qcow2)"
