#!/usr/bin/python3 -B
# nbdkit-dirty-bitmap-filter
# SPDX-License-Identifier: BSD-3-Clause
# Copyright the nbdkit-dirty-bitmap-filter authors

"""A flush on one connection covers what another one wrote (R11): after
kill -9 the data is there, and the bitmap, not in use, with its bits and, if
it was written ahead, some more.
"""

import harness
from harness import CONTEXT, Server, nbd
from qcow2image import Image

harness.create("disk.qcow2", 64 << 20, ("b", 65536))
expected = set()
for turn in range(6):
    mark = turn < 3 and harness.SERVER == "nbdkit"
    server = Server("disk.qcow2", *["dirty-bitmap-crash=mark"] * mark)
    writers = [server.connect() for _ in range(3)]
    flusher = server.connect()
    assert flusher.can_multi_conn()
    for i, h in enumerate(writers):
        h.pwrite(bytes([turn * 8 + i + 1]) * 100000,
                 (turn * 3 + i) << 20)
    flusher.flush()
    server.kill()
    harness.check("disk.qcow2", leaks=True)
    data = harness.contents("disk.qcow2")
    for i in range(3):
        at = (turn * 3 + i) << 20
        assert data[at:at + 100000] == bytes([turn * 8 + i + 1]) * 100000
    if harness.SERVER != "nbdkit":
        break
    bitmap = Image("disk.qcow2").bitmap("b")
    assert not bitmap.marked(), "the bitmap is marked after a flush"
    expected |= {((turn * 3 + i) << 20) // 65536 + k
                 for i in range(3) for k in range(2)}
    assert bitmap.bits() == expected if mark else \
        bitmap.bits() >= expected, (bitmap.bits(), expected)
    assert harness.granules(harness.qemu_extents("disk.qcow2", "b"),
                            65536) == bitmap.bits()

# FUA covers its own write, and the bit of it.
if harness.SERVER == "nbdkit":
    server = Server("disk.qcow2")
    h = server.connect()
    h.pwrite(b"fua" * 512, 50 << 20, nbd.CMD_FLAG_FUA)
    server.kill()
    bitmap = Image("disk.qcow2").bitmap("b")
    assert bitmap.marked() or (50 << 20) // 65536 in bitmap.bits()
    assert not bitmap.marked(), "the bitmap is marked after a FUA write"
    assert harness.contents("disk.qcow2")[50 << 20:][:1536] == b"fua" * 512
