#!/usr/bin/python3
# nbdkit-dirty-bitmap-filter
# SPDX-License-Identifier: BSD-3-Clause
# Copyright the nbdkit-dirty-bitmap-filter authors

"""READs of what reads as zeroes: clients with structured replies are told
holes, as by qemu-nbd, over images of all kinds.  The chunks of replies are
compared with qemu-nbd's: they are the same where these are few, and where
they are many ours are fewer.  The bytes are always the same.
"""

import sys

import harness
import nbd
from harness import Server, create, requires, run, seeded

if harness.SERVER != "nbdkit":
    print("skipped: compares the two servers")
    sys.exit(77)
requires("qemu-nbd", "qemu-io")
dice = seeded()

KIB, MIB = 1 << 10, 1 << 20
DATA, HOLE = nbd.READ_DATA, nbd.READ_HOLE


def structured(h, length, offset, flags=0):
    """The chunks of a READ in order, [(is_hole, length)], and its bytes."""
    chunks = []

    def chunk(data, at, status, error):
        assert status in (DATA, HOLE), status
        assert status == DATA or not any(data)
        chunks.append((at, status == HOLE, len(data)))

    data = h.pread_structured(length, offset, chunk, flags)
    at = offset
    for where, _, n in chunks:
        assert where == at and n > 0, chunks
        at += n
    assert at == offset + length, chunks
    return [(hole, n) for _, hole, n in chunks], bytes(data)


def io(path, *commands):
    args = []
    for c in commands:
        args += ["-c", c]
    run("qemu-io", "-d", "unmap", "-f", "qcow2", *args, path)


def libnbds():
    """The image of libnbd's interop/structured-read.sh."""
    create("disk", 3 * KIB, options="cluster_size=512")
    io("disk", "write -P 1 0 3k", "write -z -u 2k 512")


def plain():
    create("disk", 16 * MIB)
    io("disk", "write -P 1 64k 128k", "write -P 2 1M 2M", "write -z 1536k 64k",
       "write -z -u 2M 256k", "discard 2560k 64k", "write -P 3 10M 512",
       "write -P 4 12M 64k", "write -P 5 12416k 64k")


def subclusters():
    create("disk", 4 * MIB, options="extended_l2=on,cluster_size=64k")
    io("disk", "write -P 1 0 2k", "write -P 2 8k 4k", "write -P 3 64k 64k",
       "write -z 80k 4k", "write -P 4 1M 512k", "write -z -u 1200k 100k")


def compressed():
    create("disk", 4 * MIB)
    io("disk", "write -c -P 1 64k 64k", "write -c -P 2 256k 64k",
       "write -P 3 320k 64k")


def backed():
    create("base", 3 * MIB)
    io("base", "write -P 1 128k 64k", "write -P 2 1M 1M", "write -z 1280k 128k")
    run("qemu-img", "create", "-q", "-f", "qcow2", "-b", "base", "-F",
        "qcow2", "disk", "4M")
    io("disk", "write -P 3 256k 64k", "write -z 1M 64k")


def many():
    create("disk", 4 * MIB, options="cluster_size=512")
    io("disk", *["write -P %d %d 512" % (1 + i % 255, i * 1024)
                 for i in range(200)],
       *["write -P 9 %d 4096" % (MIB + i * 8192) for i in range(100)])


def ranges(size):
    """Of few holes, mostly, and of many."""
    for length in (512, 1024, 4096, 64 * KIB, 128 * KIB, 256 * KIB, MIB,
                   2 * MIB, 4 * MIB):
        for _ in range(12):
            if length <= size:
                align = dice.choice([512, 4096, 64 * KIB])
                at = dice.randrange(size - length + 1) // align * align
                yield length, at
    for _ in range(30):
        at = dice.randrange(size)
        yield min(1 + dice.randrange(300 * KIB), size - at), at
    yield size, 0


def joined(chunks):
    """qemu-nbd sends neighbours of one kind one by one."""
    result = []
    for hole, n in chunks:
        if result and result[-1][0] == hole:
            n += result.pop()[1]
        result.append((hole, n))
    return result


def fits(chunks, length):
    """Would we tell these?"""
    if len(chunks) == 1:
        return True
    smallest = min([n for hole, n in chunks if hole], default=length)
    if length <= 64 * KIB:
        return smallest >= 512 and len(chunks) <= 4
    # Longer ones, above 1 MiB, come in parts.
    return smallest >= 32 * KIB and length <= MIB


def check(make):
    make()
    theirs = Server("disk", kind="qemu-nbd")
    h = theirs.connect()
    size = h.get_size()
    asked = list(ranges(size))
    expected = [structured(h, *a) for a in asked]
    h.shutdown()
    theirs.stop(status=None)

    ours = Server("disk", options=["-r"])
    h = ours.connect()
    same = holes = 0
    for (length, at), (told, data) in zip(asked, expected):
        told = joined(told)
        chunks, got = structured(h, length, at)
        assert got == data, (length, at)
        if fits(told, length):
            assert chunks == told, (length, at, chunks, told)
            same += 1
            holes += any(hole for hole, _ in told)
        else:
            assert length > 64 * KIB or len(chunks) <= 4, chunks
            assert len(chunks) <= max(4, 2 * len(told) + length // (128 * KIB))
        whole, got = structured(h, length, at, nbd.CMD_FLAG_DF)
        assert whole == [(False, length)] and got == data
    h.shutdown()
    # Without structured replies there are only bytes.
    h = nbd.NBD()
    h.set_request_structured_replies(False)
    h.connect_uri(ours.uri)
    for (length, at), (_, data) in zip(asked, expected):
        assert h.pread(length, at) == data
    h.shutdown()
    ours.stop()
    print("%s: %d of %d replies as qemu-nbd's, %d with holes" %
          (make.__name__, same, len(asked), holes), flush=True)
    assert holes > 0


for kind in libnbds, plain, subclusters, compressed, backed, many:
    check(kind)
    run("rm", "-f", "disk", "base")

# libnbd's own expectation, word for word.
libnbds()
server = Server("disk")
h = server.connect()
assert structured(h, 1024, 2048)[0] == [(True, 512), (False, 512)]
assert structured(h, 1024, 2048, nbd.CMD_FLAG_DF)[0] == [(False, 1024)]
# What is written is data from then on, and what is zeroed a hole.
h.pwrite(b"x", 2100)
assert structured(h, 1024, 2048)[0] == [(False, 1024)]
h.zero(1024, 2048)
assert structured(h, 1024, 2048)[0] == [(True, 1024)]
h.shutdown()
server.stop()
