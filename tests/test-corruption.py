#!/usr/bin/python3 -B
# nbdkit-dirty-bitmap-filter
# SPDX-License-Identifier: BSD-3-Clause
# Copyright the nbdkit-dirty-bitmap-filter authors

"""A write that would overwrite metadata is refused, whichever metadata an
L2 entry points at, and the image gets its corrupt bit.
"""

import shutil
import struct

import harness
from harness import Server, nbd
from qcow2image import Image

harness.requires("qemu-io")
COPIED = 1 << 63
harness.create("base.qcow2", 10 << 20, "b")
harness.run("qemu-io", "-f", "qcow2", "-c", "write -P 1 1M 64k",
            "-c", "write -P 2 2M 64k", "base.qcow2")
base = Image("base.qcow2")


def word(offset):
    return struct.unpack(">Q", base.read(offset, 8))[0]


MASK = 0x00fffffffffffe00
l2 = word(base.get("l1_table_offset")) & MASK
blocks = base.get("refcount_table_offset")
targets = {
    "the L1 table": base.get("l1_table_offset"),
    "the L2 table": l2,
    "the refcount table": blocks,
    "a refcount block": word(blocks) & MASK,
    "the bitmap directory": base.get_ext("bitmap_directory_offset"),
    "a bitmap table": base.bitmap("b").get("bitmap_table_offset"),
    "a bitmap's data": base.bitmap("b").table()[0],
}
for name, target in targets.items():
    if harness.SERVER != "nbdkit" and "bitmap" in name:
        continue
    shutil.copyfile("base.qcow2", "disk.qcow2")
    image = Image("disk.qcow2")
    image.write(l2 + (1 << 20) // 65536 * 8,
                struct.pack(">Q", target | COPIED))
    before = image.read(target, 65536)
    server = Server("disk.qcow2")
    h = server.connect()
    try:
        h.pwrite(b"x" * 512, 1 << 20)
    except nbd.Error as e:
        assert e.errno == "EIO", e
    else:
        raise AssertionError(name + " was overwritten")
    # What the bitmaps need to have written is all that may differ.
    if "bitmap" not in name and "L2" not in name:
        assert image.read(target, 65536) == before, name
    assert image.get("incompatible_features") & 2, \
        name + ": the corrupt bit is not set"
    if harness.SERVER == "nbdkit":
        assert h.pread(512, 2 << 20) == b"\2" * 512
        try:
            h.pwrite(b"x" * 512, 3 << 20)
        except nbd.Error:
            pass
        else:
            raise AssertionError("a corrupt image takes writes")
        h.shutdown()
        server.stop(status=None)
        harness.refused("disk.qcow2", pattern="corrupt")
    else:
        server.kill()
