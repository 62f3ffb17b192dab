#!/usr/bin/python3 -B
# nbdkit-dirty-bitmap-filter
# SPDX-License-Identifier: BSD-3-Clause
# Copyright the nbdkit-dirty-bitmap-filter authors

"""Images that break the rules of the format, and that QEMU opens all the
same: which of them are served, read-only or for writing, and what is read
from them.  What QEMU does is asked, too, so that a new one which does
something else is noticed.
"""

import shutil
import subprocess

import harness
from harness import Server, nbd, refused
from qcow2image import Image

MIB = 1 << 20
OFFSET = 0x00fffffffffffe00


def entry(image, at):
    return int.from_bytes(image.read(at, 8), "big")


def put_entry(image, at, value):
    image.write(at, value.to_bytes(8, "big"))


def l1(image):
    return image.get("l1_table_offset")


def l2(image):
    return entry(image, l1(image)) & OFFSET


def reserved_l1(image):
    put_entry(image, l1(image), entry(image, l1(image)) | 1 << 56)


def reserved_l2(image):
    put_entry(image, l2(image), entry(image, l2(image)) | 1 << 57 | 2)


def no_backing_name(image):
    image.put("backing_file_offset", image.end_of_extensions() + 8)
    image.put("backing_file_size", 0)


def padded_backing_name(image):
    image.set_backing_name(b"base.raw" + bytes(8))
    put_entry(image, l2(image), 0)


def nul_backing_name(image):
    image.set_backing_name(bytes(8))


def split_backing_name(image):
    image.set_backing_name(b"base.raw\0.sneaky")


def far_refcount_table(image):
    image.put("refcount_table_offset", 1 << 30)


def far_l1_table(image):
    image.put("l1_table_offset", 1 << 30)


def far_l2_table(image):
    put_entry(image, l1(image), 1 << 63 | 1 << 30)


def odd_header_length(image):
    extensions = image.read(112, 512)
    image.put("header_length", 117)
    image.write(112, bytes(5) + extensions)


def snapshots_and_no_table(image):
    image.put("nb_snapshots", 1)
    image.put("snapshots_offset", 1 << 30)


# The image, whether it is served read-only and for writing (or what the
# error says), whether QEMU opens it, and the first byte that is read (None
# if that fails).
READ_BACK = 7
BASE = 9
QUIRKS = [
    (no_backing_name, True, True, True, READ_BACK, READ_BACK),
    (nul_backing_name, True, True, True, READ_BACK, READ_BACK),
    (padded_backing_name, True, "which format", True, BASE, None),
    (split_backing_name, "NUL byte", "NUL byte", True, None, None),
    (reserved_l1, True, "reserved bits", True, READ_BACK, None),
    (reserved_l2, True, True, True, READ_BACK, None),
    (far_refcount_table, True, "beyond the end", True, READ_BACK, None),
    (far_l1_table, "beyond the end", "beyond the end", True, None, None),
    (far_l2_table, True, "corrupt", True, 0, None),
    (odd_header_length, "header length", "header length", True, None, None),
    (snapshots_and_no_table, True, "snapshots", True, READ_BACK, None),
]


def qemu_opens():
    return subprocess.run(
        ["qemu-io", "-f", "qcow2", "-c", "read 0 512", "disk.qcow2"],
        stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL).returncode == 0


def read_first(h):
    try:
        return h.pread(512, 0)[0]
    except nbd.Error:
        return None


def attempt(name, served, first, options):
    if served is not True:
        refused("disk.qcow2", options=options, pattern=served)
        return
    server = Server("disk.qcow2", options=options)
    h = server.connect()
    assert read_first(h) == first, "%s, %s: it reads %s" % (
        name, options, read_first(h))
    if not options:
        # What is elsewhere can be written, whatever this cluster is.
        h.pwrite(b"w" * 512, 2 * MIB)
        assert h.pread(512, 2 * MIB) == b"w" * 512
        h.flush()
    h.shutdown()
    server.stop()


harness.requires("qemu-io")
harness.create("good.qcow2", 10 * MIB)
harness.run("qemu-io", "-f", "qcow2", "-c", "write -q -P 7 0 1M",
            "good.qcow2")
with open("base.raw", "wb") as f:
    f.write(bytes([BASE]) * MIB)
for quirk, readonly, writable, qemu, first_ro, first_rw in QUIRKS:
    def make():
        shutil.copyfile("good.qcow2", "disk.qcow2")
        quirk(Image("disk.qcow2"))

    make()
    attempt(quirk.__name__, readonly, first_ro, ("-r",))
    before = harness.sha256("disk.qcow2")
    attempt(quirk.__name__, writable, first_rw, ())
    if writable is not True:
        assert harness.sha256("disk.qcow2") == before, quirk.__name__
    make()
    assert qemu_opens() == qemu, "%s: QEMU has changed" % quirk.__name__
