#!/usr/bin/env bash
# nbdkit-dirty-bitmap-filter
# SPDX-License-Identifier: BSD-3-Clause
# Copyright the nbdkit-dirty-bitmap-filter authors

# Requests of one connection run in parallel: with a slow storage below,
# eight of them take little longer than one.

. "${srcdir:-$(dirname "$0")}/lib/functions.sh"

qemu-img create -q -f qcow2 -o preallocation=full disk.qcow2 10M
qemu-img bitmap --add disk.qcow2 b
start_nbdkit --filter="$FILTER" --filter=delay file disk.qcow2 rdelay=300ms
shell 'import time
h.pread(512, 0)
start = time.monotonic()
buffers = [nbd.Buffer(512) for _ in range(8)]
cookies = [h.aio_pread(b, i << 20) for i, b in enumerate(buffers)]
while h.aio_in_flight(): h.poll(-1)
for c in cookies: assert h.aio_command_completed(c)
took = time.monotonic() - start
assert took < 8 * 0.3 / 2, "%.1f seconds" % took'

# And a quick one is not held up by a slow one.
shell 'import time
b = nbd.Buffer(512)
start = time.monotonic()
slow = h.aio_pread(b, 0)
quick = h.aio_block_status(1 << 20, 0, lambda *a: None) \
    if h.can_meta_context("base:allocation") else \
    h.aio_flush()
while not h.aio_command_completed(quick): h.poll(-1)
took = time.monotonic() - start
assert took < 0.27, "%.2f seconds" % took
while not h.aio_command_completed(slow): h.poll(-1)'
stop_server
