#!/usr/bin/env bash
# nbdkit-dirty-bitmap-filter
# SPDX-License-Identifier: BSD-3-Clause
# Copyright the nbdkit-dirty-bitmap-filter authors

# Bad parameters: one clear error that names the parameter, and a status
# that is not 0.

. "${srcdir:-$(dirname "$0")}/lib/functions.sh"

qemu-img create -q -f qcow2 disk.qcow2 10M
qemu-img bitmap --add disk.qcow2 b
before=$(checksum disk.qcow2)
no ()
{
  local pattern=$1

  shift
  refused "$pattern" --filter="$FILTER" file disk.qcow2 "$@"
  [ "$(grep -c error refused.log)" -eq 1 ] ||
    fail "not one error: $(cat refused.log)"
}

for size in 0 511 513 3000 256 4G -1 x "" 99999999999999999999; do
  no granularity dirty-bitmap=new dirty-bitmap-granularity="$size"
done
for size in 0 -1 x "" 99999999999999999999; do
  no cache-size dirty-bitmap-cache-size="$size"
done
for number in "" -1 x 1x " 1" 0x10 10001 4294967297 99999999999999999999; do
  no max-connections dirty-bitmap-max-connections="$number"
  no max-requests dirty-bitmap-max-requests="$number"
done
for seconds in "" -1 x 1s 86401 4294967297; do
  no handshake-timeout dirty-bitmap-handshake-timeout="$seconds"
  no idle-timeout dirty-bitmap-idle-timeout="$seconds"
done
for parameter in max-connections max-requests handshake-timeout; do
  no "$parameter" dirty-bitmap-$parameter=0
done
no max-requests dirty-bitmap-max-requests=17
for size in 0 -1 x "" 127M 2T 99999999999999999999; do
  no max-memory dirty-bitmap-max-memory="$size"
done
for word in "" yes 1 ON maybe; do
  no dirty-bitmap-server dirty-bitmap-server="$word"
done
for word in "" yes 1 ON auto; do
  no dirty-bitmap-delta dirty-bitmap-delta="$word"
done
for parameter in dirty-bitmap-granularity=64k dirty-bitmap-cache-size=8M \
                 dirty-bitmap-server=auto dirty-bitmap-listen=x \
                 dirty-bitmap-max-connections=9 dirty-bitmap-max-requests=9 \
                 dirty-bitmap-handshake-timeout=9 dirty-bitmap-max-memory=1G \
                 dirty-bitmap-idle-timeout=0 dirty-bitmap-delta=on \
                 dirty-bitmap-exportname=x dirty-bitmap-description=x; do
  no "${parameter%=*}" dirty-bitmap=b "$parameter" "$parameter"
done
for parameter in dirty-bitmap-stats=s.prom dirty-bitmap-stats-interval=1; do
  no "${parameter%=*}" dirty-bitmap-stats=t.prom "$parameter" "$parameter"
done
for seconds in 0 -1 x "" 1.5 1s 604801 99999999999999999999; do
  no stats-interval dirty-bitmap-stats=s.prom \
     dirty-bitmap-stats-interval="$seconds"
done
no 'stats-interval.*dirty-bitmap-stats' dirty-bitmap-stats-interval=1
no 'dirty-bitmap-stats.*empty' dirty-bitmap-stats=
no 'name|empty' dirty-bitmap=
no 'expose.*empty|name' dirty-bitmap-expose=
for dir in "" nosuch disk.qcow2; do
  no allow-path dirty-bitmap-allow-path="$dir"
done
for dir in "" nosuch disk.qcow2; do
  no scratch dirty-bitmap-control=c dirty-bitmap-scratch="$dir"
done
for size in 0 -1 x "" 1023k 99999999999999999999; do
  no scratch-size dirty-bitmap-control=c dirty-bitmap-scratch-size="$size"
  no view-memory dirty-bitmap-control=c dirty-bitmap-view-memory="$size"
done
for parameter in dirty-bitmap-scratch=. dirty-bitmap-scratch-size=1M \
                 dirty-bitmap-view-memory=1M; do
  no "${parameter%=*}.*dirty-bitmap-control" "$parameter"
  no "${parameter%=*}.*once" dirty-bitmap-control=c "$parameter" "$parameter"
done
[ ! -e c ] || fail "a socket was left behind"
no dirty-bitmap-nonsense dirty-bitmap-nonsense=1
same "the file" "$before" "$(checksum disk.qcow2)"

# Good ones.
for size in 1M 32M 1G; do
  serve disk.qcow2 dirty-bitmap-cache-size=$size
  shell 'h.pwrite(b"x", 0)'
  stop_server
done
serve disk.qcow2 dirty-bitmap-max-connections=1 dirty-bitmap-max-requests=1 \
      dirty-bitmap-handshake-timeout=1 dirty-bitmap-idle-timeout=1 \
      dirty-bitmap-max-memory=128M
shell 'h.pwrite(b"x" * 10485760, 0)'
stop_server
check_image disk.qcow2
