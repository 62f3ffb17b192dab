#!/usr/bin/python3 -B
# nbdkit-dirty-bitmap-filter
# SPDX-License-Identifier: BSD-3-Clause
# Copyright the nbdkit-dirty-bitmap-filter authors

"""Every header field with absurd values: the server never crashes; it
refuses with an error or serves, and an image that it refused has not
been written to.
"""

import os
import shutil
import struct

import harness
from harness import Server, nbd
from qcow2image import FIELDS, Image

rnd = harness.seeded()
SIZES = {">B": 8, ">H": 16, ">I": 32, ">Q": 64}


def values(fmt, real):
    top = 1 << SIZES[fmt]
    wanted = [0, 1, 2, 3, real + 1, real - 1, real ^ 0x200, real * 2,
              real << 8, top - 1, top // 2, top // 2 - 1, top - 65536,
              1 << 20, 0xffff0000, 1 << 31, 1 << 55, 1 << 56, 1 << 62]
    return sorted({v for v in wanted if 0 <= v < top and v != real})


def attempt(what):
    """Serve it, poke at it, stop."""
    before = harness.sha256("disk.qcow2")
    try:
        server = Server("disk.qcow2")
    except AssertionError as e:
        text = str(e)
        process = harness.servers[-1].process
        assert process.returncode == 1, "%s: status %d\n%s" % (
            what, process.returncode, text)
        harness.servers[-1].sane()
        errors = [line for line in text.splitlines() if "error" in line]
        assert 1 <= len(errors) <= 2, "%s: %s" % (what, text)
        assert harness.sha256("disk.qcow2") == before, \
            what + ": refused, but written to"
        return 0
    try:
        poke(server)
    except nbd.Error as e:
        # A request may fail, the server may not.
        assert e.errno is not None, what
    server.alive()
    server.stop(status=None)
    return 1


def poke(server):
    h = server.connect("base:allocation", harness.CONTEXT + "b")
    size = h.get_size()
    for request in (lambda: h.pread(4096, 0),
                    lambda: h.pread(512, max(size - 512, 0)),
                    lambda: h.pwrite(b"x" * 512, 0),
                    lambda: h.pwrite(b"x" * 512, size // 2),
                    lambda: harness.block_status(
                        h, "base:allocation", min(size, 1 << 31), 0),
                    h.flush):
        try:
            request()
        except nbd.Error:
            server.alive()


harness.requires("qemu-io")
harness.create("base.qcow2", 10 << 20, "b")
harness.run("qemu-io", "-f", "qcow2", "-c", "write 0 1M", "base.qcow2")
served = refused = 0
for field, (offset, fmt) in FIELDS.items():
    for value in values(fmt, Image("base.qcow2").get(field)):
        shutil.copyfile("base.qcow2", "disk.qcow2")
        Image("disk.qcow2").put(field, value)
        if attempt("%s = %#x" % (field, value)):
            served += 1
        else:
            refused += 1

# Extensions that overlap, have absurd lengths, or never end; and noise.
base = Image("base.qcow2")
start = base.get("header_length")
for length in (0xffffffff, 0xfffffff8, 65536, 65400, 0x7fffffff):
    shutil.copyfile("base.qcow2", "disk.qcow2")
    Image("disk.qcow2").write(start, struct.pack(">II", 0x11223344, length))
    attempt("extension of length %#x" % length)
for turn in range(60):
    shutil.copyfile("base.qcow2", "disk.qcow2")
    # Tables too: an L1, L2 or refcount entry may be anything.
    target = rnd.choice([0, 0, base.get("l1_table_offset"),
                         base.get("refcount_table_offset"),
                         base.get_ext("bitmap_directory_offset"),
                         base.bitmap("b").get("bitmap_table_offset"),
                         2 * 65536, 4 * 65536])
    at = target + rnd.randrange(128)
    noise = rnd.randbytes(rnd.choice([1, 2, 8, 32]))
    if target == 0 and at < 8:
        at += 8
    Image("disk.qcow2").write(at, noise)
    attempt("noise %s at %d" % (noise.hex(), at))
for size in (71, 72, 103, 104, 112, 511, 512, 1000, 65536, 65537, 200000):
    shutil.copyfile("base.qcow2", "disk.qcow2")
    os.truncate("disk.qcow2", size)
    attempt("cut to %d bytes" % size)
print("%d served, %d refused" % (served, refused))
assert refused > 50 and served > 5
