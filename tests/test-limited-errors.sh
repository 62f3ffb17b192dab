#!/usr/bin/env bash
# nbdkit-dirty-bitmap-filter
# SPDX-License-Identifier: BSD-3-Clause
# Copyright the nbdkit-dirty-bitmap-filter authors

# Writes that all fail for one reason are not as many lines in the log: the
# first ones are there, and at the end how many more there were.

. "${srcdir:-$(dirname "$0")}/lib/functions.sh"

fail_300_times='
for i in range(300):
    try: h.pwrite(b"x" * 65536, i << 16)
    except nbd.Error as e: assert e.errno == "ENOSPC", e
    else: raise SystemExit("a write succeeded")'

# lines PATTERN: how many lines of the log match.
lines ()
{
  grep -c -e "$1" "$log" || true
}

# All space that the image has is in use.
create ()
{
  rm -f disk.qcow2
  qemu-img create -q -f qcow2 disk.qcow2 64M
  qemu-io -f qcow2 -c 'write -q 32M 64k' disk.qcow2
}

# The file cannot grow, since the process may not write a larger one.
for server in on off; do
  create
  blocks=$(($(stat -c %s disk.qcow2) / 1024))
  ulimit -S -f $blocks
  start_nbdkit --filter="$FILTER" file disk.qcow2 dirty-bitmap-server=$server
  ulimit -S -f unlimited
  shell "$fail_300_times"
  same "lines, server $server" 10 "$(lines 'cannot make room')"
  stop_server
  same "lines in all" 11 "$(lines 'cannot make room')"
  same "what is told" 1 \
       "$(lines '290 more errors like this one were not shown: cannot make room')"
done

# Storage that never grows: a filter may show other bytes than the file.
create
start_nbdkit --filter="$FILTER" --filter=offset file disk.qcow2 offset=0
shell "$fail_300_times"
same "lines" 10 "$(lines 'its storage cannot grow')"
stop_server
same "what is told" 1 "$(lines '290 more errors like this one')"
