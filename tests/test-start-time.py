#!/usr/bin/python3 -B
# nbdkit-dirty-bitmap-filter
# SPDX-License-Identifier: BSD-3-Clause
# Copyright the nbdkit-dirty-bitmap-filter authors

"""The socket answers within a second of the start, however large the
bitmaps are, and a stop takes no longer (R12).
"""

import time

import harness
from harness import CONTEXT, Server

LIMIT = 3.0 if not harness.PRELOAD else 10.0
PERIOD = 2 << 30        # What a cluster of bits covers.
SIZE = 1 << 40
harness.create("disk.qcow2", SIZE, ("b", 4096), ("c", 65536))

# Dirty but for one granule in each: 32 MiB of bits that must be stored
# and loaded.
server = Server("disk.qcow2")
h = server.connect()
for at in range(0, SIZE, PERIOD):
    h.trim(PERIOD - 4096, at)
h.shutdown()
took = server.stop()
assert took < LIMIT * 2, "the stop took %.2f seconds" % took
harness.check("disk.qcow2")

start = time.monotonic()
server = Server("disk.qcow2")
h = server.connect(CONTEXT + "b")
assert h.get_size() == SIZE
took = time.monotonic() - start
assert took < LIMIT, "the start took %.2f seconds" % took
if harness.SERVER == "nbdkit":
    assert harness.extents(h, CONTEXT + "b", PERIOD) == \
        [(PERIOD - 4096, 1), (4096, 0)] * (SIZE // PERIOD)
h.pwrite(b"x", SIZE - 1)
h.shutdown()
took = server.stop()
assert took < LIMIT, "the stop took %.2f seconds" % took
