#!/usr/bin/python3 -B
# nbdkit-dirty-bitmap-filter
# SPDX-License-Identifier: BSD-3-Clause
# Copyright the nbdkit-dirty-bitmap-filter authors

"""A bitmap with more runs than a reply may have: one request is answered
with at most 2^20 - 1 extents, that cover all of the range in every
context, and what is dirty is never told to be clean (R1, R2, R8).
"""

import harness
from harness import CONTEXT, Server, block_status
from qcow2image import Image

SIZE = 2 << 30
FINE, BASE = CONTEXT + "fine", "base:allocation"
harness.create("disk.qcow2", SIZE, ("fine", 512))
server = Server("disk.qcow2")
h = server.connect()
# Give each cluster of bits, which covers 256 MiB, room in the file.
for at in range(0, SIZE, 256 << 20):
    h.pwrite(b"x", at)
h.shutdown()
server.stop()
image = Image("disk.qcow2")
for host in image.bitmap("fine").table():
    assert host > 1
    image.write(host, b"\x55" * image.cluster_size)

server = Server("disk.qcow2", options=["-r"])
for contexts in ((FINE,), (BASE, FINE)):
    h = server.connect(*contexts)
    for offset, count in ((0, SIZE), (512, SIZE - 512), (0, 1 << 30),
                          (12345, (1 << 30) + 7)):
        got = {}
        h.block_status(count, offset,
                       lambda name, at, e, err: got.setdefault(name, e))
        for name in contexts:
            lengths, kinds = got[name][0::2], got[name][1::2]
            if harness.SERVER != "nbdkit":
                continue
            assert sum(lengths) == count, (name, sum(lengths), count)
            assert len(lengths) < 1 << 20, len(lengths)
            assert 0 not in lengths
        # No clean extent may touch an even granule.
        at = offset
        for length, kind in zip(got[FINE][0::2], got[FINE][1::2]):
            if not kind:
                assert length <= 512 and at // 512 % 2 == 1, (at, length)
            at += length
    # In smaller pieces it is exact.
    runs = harness.extents(h, FINE, 64 << 20) if len(contexts) == 1 else []
    assert all(n == 512 and kind == i % 2 ^ 1
               for i, (n, kind) in enumerate(runs))
    h.shutdown()
server.stop()
