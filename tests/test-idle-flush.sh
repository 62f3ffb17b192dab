#!/usr/bin/env bash
# nbdkit-dirty-bitmap-filter
# SPDX-License-Identifier: BSD-3-Clause
# Copyright the nbdkit-dirty-bitmap-filter authors

# A flush with nothing to flush does not reach the storage, whoever asks
# for it; a flush after a change does.

. "${srcdir:-$(dirname "$0")}/lib/functions.sh"

qemu-img create -q -f qcow2 -o preallocation=full disk.qcow2 16M
qemu-img bitmap --add disk.qcow2 b

# flushes: how many the plugin has seen.
flushes ()
{
  grep -c ' Flush .*\.\.\.$\|^.* Flush id=.*{$' plugin.log || :
}

# costs N WHAT CODE...: how many flushes of the plugin some code needs.
costs ()
{
  local expected=$1 what=$2 before

  shift 2
  before=$(flushes)
  shell "$@"
  same "$what" "$expected" "$(($(flushes) - before))"
}

start_nbdkit --filter="$FILTER" --filter=log file disk.qcow2 \
             logfile="$d/plugin.log"
costs 1 "the first flushes" 'for i in range(20): h.flush()'
costs 0 "idle flushes" 'for i in range(20): h.flush()'
costs 0 "idle flushes of others" 'for i in range(5):
    c = nbd.NBD()
    c.connect_uri("'"$uri"'")
    c.pread(512, 0)
    c.flush()
    c.shutdown()'
shell 'h.pwrite(b"x" * 512, 0)'
[ "$(flushes)" -gt 1 ] || fail "the bitmap was not marked"
before=$(flushes)
shell 'h.flush()'
[ "$(flushes)" -gt "$before" ] || fail "a write was not flushed"
costs 0 "idle flushes after that" 'for i in range(20): h.flush()'
costs 20 "writes to dirty granules, and idle flushes" \
      'for i in range(20): h.pwrite(b"y" * 512, 512); h.flush(); h.flush()'
costs 20 "FUA" \
      'for i in range(20): h.pwrite(b"y" * 512, 512, nbd.CMD_FLAG_FUA)'
costs 1 "flushes at once, of one write" 'h.pwrite(b"z" * 512, 1024)
clients = []
for i in range(8):
    c = nbd.NBD()
    c.connect_uri("'"$uri"'")
    clients.append((c, c.aio_flush()))
for c, cookie in clients:
    while not c.aio_command_completed(cookie): c.poll(-1)'
stop_server
check_image disk.qcow2
