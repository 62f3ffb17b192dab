#!/usr/bin/python3 -B
# nbdkit-dirty-bitmap-filter
# SPDX-License-Identifier: BSD-3-Clause
# Copyright the nbdkit-dirty-bitmap-filter authors

"""A damaged bitmaps extension, directory or table: the disk is served, no
bitmap is offered, the log says what is wrong, reading leaves the file
alone, and before the first write the bitmaps that could go stale are
marked (I7).
"""

import shutil
import struct

import harness
from harness import Server
from qcow2image import Image

if harness.SERVER != "nbdkit":
    raise SystemExit("QEMU refuses these images")
harness.requires("qemu-io")
BASE = "base.qcow2"
harness.create(BASE, 64 << 20, ("b0", 65536), ("b1", 4096))
harness.run("qemu-io", "-f", "qcow2", "-c", "write -P 5 1M 64k", BASE)
harness.run("qemu-img", "bitmap", "--disable", BASE, "b1")


def ext(**fields):
    def damage(image):
        for name, value in fields.items():
            image.put_ext(name, value)
    return damage


def entry(which="b0", **fields):
    def damage(image):
        bitmap = image.bitmap(which)
        for name, value in fields.items():
            bitmap.put(name, value)
    return damage


def extension_length(value):
    def damage(image):
        at = image.extension_offset()
        image.write(at - 4, struct.pack(">I", value))
    return damage


def table(value):
    def damage(image):
        at = image.bitmap("b0").get("bitmap_table_offset")
        image.write(at, struct.pack(">Q", value))
    return damage


def rename(image):
    image.write(image.bitmap("b1").pos + 24, b"b0")


def nul_in_name(image):
    image.write(image.bitmap("b0").pos + 24, b"b\0")


def table_shared(image):
    """Two bitmaps with one table."""
    image.bitmap("b1").put("bitmap_table_offset",
                           image.bitmap("b0").get("bitmap_table_offset"))


def data_is_metadata(image):
    """Bits that lie in the L1 table."""
    table(image.get("l1_table_offset"))(image)


def twice(image):
    """The extension stands in the header two times."""
    start = image.extension_offset() - 8
    copy = image.read(start, 32)
    end = image.end_of_extensions()
    image.write(end, copy + bytes(8))


real = Image(BASE)
directory = real.get_ext("bitmap_directory_offset")
size = real.get_ext("bitmap_directory_size")
far = 1 << 40
CASES = {
    "extension length": extension_length(16),
    "reserved field": ext(reserved=1),
    "no bitmaps": ext(nb_bitmaps=0),
    "too many bitmaps": ext(nb_bitmaps=65536),
    "directory unaligned": ext(bitmap_directory_offset=directory + 512),
    "directory too large": ext(bitmap_directory_size=67107848),
    "directory of no size": ext(bitmap_directory_size=0),
    "directory at 0": ext(bitmap_directory_offset=0),
    "directory past the end": ext(bitmap_directory_offset=far),
    "directory at 2^64": ext(bitmap_directory_offset=(1 << 64) - 65536),
    "more entries than said": ext(nb_bitmaps=1),
    "fewer entries than said": ext(nb_bitmaps=3),
    "an entry does not fit": ext(bitmap_directory_size=size - 8),
    "extra data": entry(extra_data_size=8),
    "table at 0": entry(bitmap_table_offset=0),
    "table unaligned": entry(
        bitmap_table_offset=real.bitmap("b0").get("bitmap_table_offset") + 8),
    "table past the end": entry(bitmap_table_offset=far),
    "table of no size": entry(bitmap_table_size=0),
    "table too large": entry(bitmap_table_size=0x8000001),
    "table over 512 MiB": entry(bitmap_table_size=8193),
    "table one too large": entry(bitmap_table_size=2),
    "granularity 256": entry(granularity_bits=8),
    "granularity 4 GiB": entry(granularity_bits=32),
    "granularity 2^255": entry(granularity_bits=255),
    "flag extra_data_compatible": entry(flags=2 | 4),
    "flag reserved": entry(flags=2 | 8),
    "type": entry(type=2),
    "name too long": entry(name_size=1024),
    "name empty": entry(name_size=0),
    "names not unique": rename,
    "NUL in a name": nul_in_name,
    "table entry reserved bits": table(2),
    "table entry high bits": table(1 << 60),
    "table entry offset and all ones": table(65536 * 3 + 1),
    "table entry unaligned": table(65536 * 3 + 512),
    "table entry past the end": table(far),
    "table shared": table_shared,
    "data is metadata": data_is_metadata,
    "the extension twice": twice,
    "autoclear bit clear": lambda image: image.put("autoclear_features", 0),
    "in a version 2 image": lambda image: harness.run(
        "qemu-img", "amend", "-f", "qcow2", "-o", "compat=0.10", image.path),
}


def listed(server):
    h = harness.nbd.NBD()
    h.set_opt_mode(True)
    h.connect_uri(server.uri)
    names = []
    h.opt_list_meta_context(names.append)
    h.opt_abort()
    return [n for n in names if n.startswith(harness.CONTEXT)]


def stale(path):
    """Would anyone who reads the image trust b0?"""
    image = Image(path)
    if image.get("version") < 3 or image.get("autoclear_features") & 1 == 0:
        return True
    return image.bitmap("b0").in_use


def one_case(name, damage):
    shutil.copyfile(BASE, "disk.qcow2")
    damage(Image("disk.qcow2"))
    before = harness.sha256("disk.qcow2")
    for options in (["-r"], []):
        server = Server("disk.qcow2", options=options)
        h = server.connect("base:allocation")
        assert h.pread(65536, 1 << 20) == b"\5" * 65536, name
        assert h.pread(512, 0) == bytes(512), name
        assert listed(server) == [], "%s: %s are offered" % (
            name, listed(server))
        assert "bitmap" in server.messages(), \
            "%s: the log is silent: %r" % (name, server.messages())
        assert harness.sha256("disk.qcow2") == before, name
        if not options:
            h.pwrite(b"x" * 512, 2 << 20)
            assert stale("disk.qcow2"), \
                name + ": written to, and the bitmap is not marked"
            h.flush()
        h.shutdown()
        server.stop()
        if options:
            assert harness.sha256("disk.qcow2") == before, name
    assert stale("disk.qcow2"), name + ": the mark is gone"
    server = Server("disk.qcow2", options=["-r"])
    h = server.connect()
    assert h.pread(512, 2 << 20) == b"x" * 512
    assert h.pread(65536, 1 << 20) == b"\5" * 65536
    assert listed(server) == [], name
    h.shutdown()
    server.stop()
    # Nothing may be made on top of damage without a word.
    try:
        server = Server("disk.qcow2", "dirty-bitmap=b0")
    except AssertionError:
        assert harness.servers[-1].process.returncode == 1, name
    else:
        server.stop()


bad = 0
for name, damage in CASES.items():
    try:
        one_case(name, damage)
    except (AssertionError, harness.nbd.Error) as e:
        print("--- %s: %s\n%s" % (name, e, harness.servers[-1].messages()))
        bad += 1
assert bad == 0, "%d of %d cases" % (bad, len(CASES))
