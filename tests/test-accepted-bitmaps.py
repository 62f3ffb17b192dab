#!/usr/bin/python3 -B
# nbdkit-dirty-bitmap-filter
# SPDX-License-Identifier: BSD-3-Clause
# Copyright the nbdkit-dirty-bitmap-filter authors

"""What looks odd in the bitmaps of an image but is allowed: all-one
tables, padding that is not zero, names in any encoding, bits past the
end, unknown autoclear bits and header extensions (I6).
"""

import shutil
import struct

import harness
from harness import CONTEXT, Server
from qcow2image import Image, MAGIC_BITMAPS

BASE = "base.qcow2"
# One cluster of bits covers 256 MiB.
harness.create(BASE, (256 << 20) + (1 << 20), ("b", 512), ("c", 65536))
harness.run("qemu-io", "-f", "qcow2", "-c", "write -P 5 1M 64k", BASE)


def serve(write=True):
    """What b's dirty granules are, before and after a write at 3M."""
    server = Server("disk.qcow2")
    h = server.connect(CONTEXT + "b")
    before = harness.granules(harness.extents(h, CONTEXT + "b"), 512)
    if write:
        h.pwrite(b"x" * 512, 3 << 20)
    after = harness.granules(harness.extents(h, CONTEXT + "b"), 512)
    assert after == before | {(3 << 20) // 512} if write else before
    h.shutdown()
    server.stop()
    harness.check("disk.qcow2", leaks=True)
    assert harness.granules(harness.qemu_extents("disk.qcow2", "b"),
                            512) == after
    return before


def table_at(image, index):
    return image.bitmap("b").get("bitmap_table_offset") + 8 * index


# An entry of all ones, also one that reaches past the end of the disk.
shutil.copyfile(BASE, "disk.qcow2")
image = Image("disk.qcow2")
image.write(table_at(image, 1), struct.pack(">Q", 1))
got = serve()
assert set(range(256 << 11, 257 << 11)) <= got and len(got) == 2048 + 128

# A whole cluster of bits is written as one entry, and read by QEMU.
shutil.copyfile(BASE, "disk.qcow2")
if harness.SERVER == "nbdkit":
    server = Server("disk.qcow2", "dirty-bitmap-crash=mark")
    h = server.connect()
    for at in range(0, 256 << 20, 32 << 20):
        h.zero(32 << 20, at)
    h.shutdown()
    server.stop()
    harness.check("disk.qcow2")
    assert Image("disk.qcow2").bitmap("b").table() == [1, 0]
    assert harness.qemu_extents("disk.qcow2", "b") == [(256 << 20, 1),
                                                       (1 << 20, 0)]

# Bits past the end are not dirty, and are not written back.
shutil.copyfile(BASE, "disk.qcow2")
harness.run("qemu-io", "-f", "qcow2", "-c", "write 256M 512", "disk.qcow2")
image = Image("disk.qcow2")
data = image.bitmap("b").table()[1]
image.write(data + 256, b"\xff" * 8)
server = Server("disk.qcow2")
h = server.connect(CONTEXT + "b")
assert harness.extents(h, CONTEXT + "b")[-1] == ((1 << 20) - 512, 0)
h.pwrite(b"x" * 512, (257 << 20) - 512)
h.shutdown()
server.stop()
Image("disk.qcow2").bitmap("b").bits()      # Asserts that there are none.

# Padding, and a name that is not UTF-8.
shutil.copyfile(BASE, "disk.qcow2")
image = Image("disk.qcow2")
if harness.SERVER == "nbdkit":
    image.write(image.bitmap("c").pos + 24, b"\xff")
image.write(image.bitmap("b").pos + 25, b"padding")
assert serve() == set(range(2048, 2048 + 128))
if harness.SERVER == "nbdkit":
    assert list(Image("disk.qcow2").bitmaps()) == ["b", "\udcff"]

# Extensions and autoclear bits that nobody knows: the extension stays,
# the bit is left alone by reading and cleared by the first write.
shutil.copyfile(BASE, "disk.qcow2")
image = Image("disk.qcow2")
end = image.end_of_extensions()
image.write(end, struct.pack(">II", 0x12345678, 5) + b"hello\0\0\0" + bytes(8))
image.put("autoclear_features", 1 | 1 << 33)
before = harness.sha256("disk.qcow2")
if harness.SERVER == "nbdkit":
    server = Server("disk.qcow2")
    server.connect().flush()
    server.stop()
    assert harness.sha256("disk.qcow2") == before
    server = Server("disk.qcow2")
    server.connect().pwrite(b"x", 0)
    assert Image("disk.qcow2").get("autoclear_features") == 1
    server.stop()
serve()
image = Image("disk.qcow2")
assert image.get("autoclear_features") == 1
assert image.read(image.extension_offset(0x12345678), 5) == b"hello"
assert image.extension_offset(MAGIC_BITMAPS) is not None
server = Server("disk.qcow2", *(["dirty-bitmap=another"]
                                if harness.SERVER == "nbdkit" else []))
server.stop()
image = Image("disk.qcow2")
assert image.read(image.extension_offset(0x12345678), 5) == b"hello"
