#!/usr/bin/python3
# nbdkit-dirty-bitmap-filter
# SPDX-License-Identifier: BSD-3-Clause
# Copyright the nbdkit-dirty-bitmap-filter authors

"""dirty-bitmap-detect-zeroes: a write of nothing but zeroes is done as a
request to zero: with "on" the range stays allocated, with "unmap" it is given
up, and with "off" it is data.  The bitmap has it in any case.  A write is
judged as a whole: one byte that is not zero makes data of all.  The same holds
for a disk beside its image."""

import json
import os

import nbd

import harness
from harness import Server, create, extents, merge, run
from qmp import Qmp

SIZE = 16 << 20
CLUSTER = 65536
CONTEXT = "qemu:dirty-bitmap:b"
WORDS = ("off", "on", "unmap")


def image_map(path):
    """[(start, length, zero, data, has an offset)]"""
    return [(r["start"], r["length"], r["zero"], r["data"], "offset" in r)
            for r in json.loads(run("qemu-img", "map", "--output=json",
                                    "-f", "qcow2", path))]


def at(path, offset):
    for start, length, *what in image_map(path):
        if start <= offset < start + length:
            return tuple(what)
    raise AssertionError(offset)


def kind_of(h, offset):
    """What base:allocation says of one cluster."""
    return harness.block_status(h, nbd.CONTEXT_BASE_ALLOCATION, CLUSTER,
                                offset)


def dirty(h):
    """The offsets of dirty clusters."""
    offset, found = 0, set()
    for length, flags in extents(h, CONTEXT):
        if flags & 1:
            found.update(range(offset, offset + length, CLUSTER))
        offset += length
    return found


DATA = (False, True, True)
KEPT = (True, False, True)
GONE = (True, False, False)


def in_the_image(word):
    create("d.qcow2", SIZE, ("b", CLUSTER))
    run("qemu-io", "-f", "qcow2", "-c", "write -q -P 1 0 16M", "d.qcow2")
    run("qemu-img", "bitmap", "--clear", "d.qcow2", "b")
    s = Server("d.qcow2", "dirty-bitmap-control=%s/c-%s" % (harness.tmp, word),
               *(["dirty-bitmap-detect-zeroes=" + word]
                 if word != "off" else []))
    q = Qmp("%s/c-%s" % (harness.tmp, word))
    said = q.ask("query-block")[0]["inserted"]["detect_zeroes"]
    assert said == word, said
    q.close()
    h = s.connect(CONTEXT, nbd.CONTEXT_BASE_ALLOCATION)

    zeroes = bytes(CLUSTER)
    h.pwrite(zeroes, 0)
    h.pwrite(zeroes, 2 * CLUSTER, nbd.CMD_FLAG_FUA)
    # Not all zeroes: the first byte, the 17th, the last one.
    for i, byte in enumerate((0, 16, CLUSTER - 1)):
        h.pwrite(zeroes[:byte] + b"x" + zeroes[byte + 1:], (4 + 2 * i) * CLUSTER)
    # Parts of a cluster, and tiny ones.
    h.pwrite(bytes(5000), 10 * CLUSTER + 100)
    for n in 1, 15, 16, 17, 31:
        h.pwrite(bytes(n), 12 * CLUSTER + 100 * n)
    # 4 MiB, with one byte that is not zero; and 1 MiB without.
    large = bytearray(4 << 20)
    large[1 << 20] = 1
    h.pwrite(large, 4 << 20)
    h.pwrite(bytes(1 << 20), 9 << 20)
    changed = {i * CLUSTER for i in (0, 2, 4, 6, 8, 10, 12)}
    changed.update(range(4 << 20, 8 << 20, CLUSTER))
    changed.update(range(9 << 20, 10 << 20, CLUSTER))
    assert dirty(h) == changed, (word, dirty(h) ^ changed)
    expected = bytearray(b"\1" * SIZE)
    for i in 0, 2:
        expected[i * CLUSTER:(i + 1) * CLUSTER] = zeroes
    for i, byte in enumerate((0, 16, CLUSTER - 1)):
        start = (4 + 2 * i) * CLUSTER
        expected[start:start + CLUSTER] = zeroes
        expected[start + byte] = ord("x")
    expected[10 * CLUSTER + 100:10 * CLUSTER + 5100] = bytes(5000)
    for n in 1, 15, 16, 17, 31:
        start = 12 * CLUSTER + 100 * n
        expected[start:start + n] = bytes(n)
    expected[4 << 20:8 << 20] = large
    expected[9 << 20:10 << 20] = bytes(1 << 20)
    assert h.pread(SIZE, 0) == expected, word
    # What was written with FUA is in the image already.
    if word != "off":
        assert at_rest("d.qcow2", 2 * CLUSTER) != DATA
    h.shutdown()
    s.stop()

    harness.check("d.qcow2")
    zeroed = {"off": DATA, "on": KEPT, "unmap": GONE}[word]
    assert at("d.qcow2", 0) == zeroed, (word, image_map("d.qcow2"))
    assert at("d.qcow2", 2 * CLUSTER) == zeroed, word
    for i in 1, 4, 6, 8, 10, 12:
        assert at("d.qcow2", i * CLUSTER) == DATA, (word, i)
    assert at("d.qcow2", 5 << 20) == DATA, word
    assert at("d.qcow2", 7 << 20) == DATA, word
    assert at("d.qcow2", 9 << 20) == zeroed, word


def at_rest(path, offset):
    """As `at`, while the image is served."""
    for r in json.loads(run("qemu-img", "map", "--output=json", "-U",
                            "-f", "qcow2", path)):
        if r["start"] <= offset < r["start"] + r["length"]:
            return r["zero"], r["data"], "offset" in r
    raise AssertionError(offset)


def beside(word):
    """unmap gives up space of the disk, on keeps it."""
    with open("disk.raw", "wb") as f:
        f.write(b"\1" * (4 << 20))
        os.fsync(f.fileno())
    full = os.stat("disk.raw").st_blocks
    if os.path.exists("beside.qcow2"):
        os.unlink("beside.qcow2")
    s = Server("disk.raw", "dirty-bitmap-image=beside.qcow2", "dirty-bitmap=b",
               "dirty-bitmap-detect-zeroes=" + word)
    h = s.connect(CONTEXT)
    h.pwrite(bytes(1 << 20), 1 << 20)
    h.pwrite(b"x" + bytes((1 << 20) - 1), 2 << 20)
    h.flush()
    assert dirty(h) == set(range(1 << 20, 3 << 20, CLUSTER)), word
    expected = b"\1" * (1 << 20) + bytes(1 << 20) + b"x" + \
        bytes((1 << 20) - 1) + b"\1" * (1 << 20)
    assert h.pread(4 << 20, 0) == expected
    freed = full - os.stat("disk.raw").st_blocks
    h.shutdown()
    s.stop()
    harness.check("beside.qcow2")
    with open("disk.raw", "rb") as f:
        assert f.read() == expected
    # Only where the file system can punch holes.
    if word == "unmap":
        with open("hole", "wb") as f:
            f.write(bytes(1 << 20))
        run("fallocate", "-p", "-l", "1M", "hole", status=None)
        if os.stat("hole").st_blocks == 0:
            assert freed >= 2048, freed
    else:
        assert freed == 0, (word, freed)


harness.requires("qemu-io")
for word in WORDS:
    in_the_image(word)
    beside(word)
