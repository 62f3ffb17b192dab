#!/usr/bin/python3
# nbdkit-dirty-bitmap-filter
# SPDX-License-Identifier: BSD-3-Clause
# Copyright the nbdkit-dirty-bitmap-filter authors

"""Extended headers over real images, by a client written from the protocol
document: a disk of 16 TiB in one reply, changes of more than 4 GiB in one
request, and the contexts that a request selects.  What it is told is
compared with what libnbd's client is told in the older form, and with
QEMU's reading of the image.  A libnbd that speaks extended headers is
tried too.
"""

import os
import socket
import struct
import sys

import harness
from harness import CONTEXT, Server, check, create, extents, merge

if harness.SERVER != "nbdkit":
    print("skipped: for our own server")
    sys.exit(77)

TIB, GIB = 1 << 40, 1 << 30
SIZE = 16 * TIB
READ, WRITE, FLUSH, TRIM, CACHE, ZERO, STATUS = 0, 1, 3, 4, 5, 6, 7
FUA, NO_HOLE, REQ_ONE, FAST, PAYLOAD = 1, 2, 8, 16, 32
BASE, DEPTH = "base:allocation", "qemu:allocation-depth"
ALL = [BASE, DEPTH, CONTEXT + "fine", CONTEXT + "coarse"]


class Client:
    """One that has negotiated extended headers, and contexts if it is
    told which."""

    def __init__(self, server, contexts=()):
        self.s = socket.socket(socket.AF_UNIX)
        self.s.settimeout(120)
        self.s.connect(server.socket)
        assert self.read(8) == b"NBDMAGIC"
        self.read(10)
        self.s.sendall(struct.pack(">I", 3))
        assert self.option(11) == [(1, b"")]
        self.ids = {}
        if contexts:
            query = struct.pack(">II", 0, len(contexts)) + b"".join(
                struct.pack(">I", len(c)) + c.encode() for c in contexts)
            for kind, data in self.option(10, query)[:-1]:
                assert kind == 4
                self.ids[struct.unpack(">I", data[:4])[0]] = \
                    data[4:].decode()
        infos = {data[:2]: data[2:]
                 for _, data in self.option(7, struct.pack(">IH", 0, 0))}
        self.size, flags = struct.unpack(">QH", infos[b"\0\0"])
        assert bool(flags & 1 << 12) == bool(contexts)
        self.cookie = 0

    def read(self, count):
        data = bytearray()
        while len(data) < count:
            more = self.s.recv(min(count - len(data), 1 << 20))
            assert more, "the server hung up"
            data += more
        return bytes(data)

    def option(self, number, data=b""):
        self.s.sendall(struct.pack(">8sII", b"IHAVEOPT", number, len(data)) +
                       data)
        replies = []
        while not replies or replies[-1][0] not in (1,):
            _, n, kind, length = struct.unpack(">QIII", self.read(20))
            assert n == number and not kind & 1 << 31
            replies.append((kind, self.read(length)))
        return replies

    def request(self, command, offset=0, length=0, flags=0, payload=b""):
        """The chunks of its reply, [(type, payload)]."""
        self.cookie += 1
        self.s.sendall(struct.pack(">IHHQQQ", 0x21E41C71, flags, command,
                                   self.cookie, offset, length) + payload)
        chunks = []
        while True:
            magic, done, kind, cookie, at, length = struct.unpack(
                ">IHHQQQ", self.read(32))
            assert magic == 0x6E8A278C and cookie == self.cookie
            assert at == offset, "offset %d, not %d" % (at, offset)
            chunks.append((kind, self.read(length)))
            if done & 1:
                return chunks

    def succeeds(self, *args, **kwargs):
        assert self.request(*args, **kwargs) == [(0, b"")]

    def pread(self, length, offset):
        data = bytearray(length)
        got = 0
        for kind, piece in self.request(READ, offset, length):
            assert kind in (1, 2), kind
            at = struct.unpack(">Q", piece[:8])[0] - offset
            if kind == 2:
                piece = piece[:8] + bytes(struct.unpack(">I", piece[8:])[0])
            data[at:at + len(piece) - 8] = piece[8:]
            got += len(piece) - 8
        assert got == length
        return bytes(data)

    def pwrite(self, data, offset, flags=0):
        self.succeeds(WRITE, offset, len(data), PAYLOAD | flags, data)

    def status(self, offset, length, flags=0, ids=None):
        """{context: [(length, flags)]}."""
        if ids is None:
            chunks = self.request(STATUS, offset, length, flags)
        else:
            payload = struct.pack(">Q%dI" % len(ids), length, *ids)
            chunks = self.request(STATUS, offset, len(payload),
                                  flags | PAYLOAD, payload)
        result = {}
        for kind, data in chunks:
            assert kind == 6, (kind, data)
            context, count = struct.unpack(">II", data[:8])
            assert len(data) == 8 + 16 * count
            found = list(struct.iter_unpack(">QQ", data[8:]))
            assert merge(found) == found and all(n for n, _ in found)
            result[self.ids[context]] = found
        return result


def compare(server, client):
    """The whole disk in one reply is what compact requests tell."""
    told = client.status(0, client.size)
    assert sorted(told) == sorted(ALL)
    h = server.connect(*ALL)
    for context in ALL:
        assert sum(n for n, _ in told[context]) == client.size, context
        assert told[context] == extents(h, context), context
    h.shutdown()
    return told


create("disk.qcow2", SIZE, ("fine", 65536), ("coarse", 1 << 20))
server = Server("disk.qcow2")
c = Client(server, ALL)
assert c.size == SIZE
told = compare(server, c)
assert told == {BASE: [(SIZE, 3)], DEPTH: [(SIZE, 0)],
                CONTEXT + "fine": [(SIZE, 0)],
                CONTEXT + "coarse": [(SIZE, 0)]}

# Reads and writes of all sizes, and both forms see the same disk.
h = server.connect()
for size in (1, 512, 65536, 65537, 1 << 20, 32 << 20):
    data = (b"%d:" % size * (size // 2 + 1))[:size]
    at = SIZE - (64 << 20) + size
    c.pwrite(data, at, FUA if size == 512 else 0)
    assert c.pread(size, at) == data
    assert h.pread(size, at) == data
# QEMU's client, from 8.2 on, does not say that a WRITE has a payload.
for flags in (0, FUA):
    at = SIZE - (64 << 20) + 7 * flags
    c.succeeds(WRITE, at, 5, flags, b"QEMU%d" % flags)
    assert c.pread(5, at) == h.pread(5, at) == b"QEMU%d" % flags
# Refused ones leave the stream in step, too.
(kind, data), = c.request(WRITE, SIZE - 4, 8, 0, b"too long")
assert kind == 0x8001 and data[:4] == b"\0\0\0\x1c"
(kind, data), = c.request(WRITE, 0, (32 << 20) + 1, 0, bytes((32 << 20) + 1))
assert kind == 0x8001 and data[:4] == b"\0\0\0\x16"
# Data in several places, and holes of more than 4 GiB between them.
for i in range(12):
    c.pwrite(bytes([65 + i]) * 100000, i * 11 * GIB + i * 1000)
compare(server, c)
c.succeeds(FLUSH)

# 40 GiB of zeroes, with data inside and at both ends.
c.succeeds(ZERO, 5 * GIB + 12345, 40 * GIB)
assert h.pread(100000, 11 * GIB + 1000) == bytes(100000)
for i in range(12):
    at = i * 11 * GIB + i * 1000
    zeroed = 5 * GIB + 12345 <= at < 45 * GIB
    expected = bytes(100000) if zeroed else bytes([65 + i]) * 100000
    assert c.pread(100000, at) == expected, i
told = compare(server, c)
dirty = told[CONTEXT + "fine"]
assert any(n >= 40 * GIB and kind for n, kind in dirty), dirty
# Discarded to the end of the disk, from the middle of a granule.
c.succeeds(TRIM, 60 * GIB + 1, SIZE - 60 * GIB - 1, FUA)
for i in range(12):
    at = i * 11 * GIB + i * 1000
    if at > 60 * GIB:
        assert c.pread(100000, at) == bytes(100000), i
assert c.pread(1 << 20, SIZE - (1 << 20)) == bytes(1 << 20)
told = compare(server, c)
assert told[CONTEXT + "fine"][-1] == (SIZE - 60 * GIB, 1)
c.succeeds(ZERO, 45 * GIB, 6 * GIB, FAST | FUA)
c.succeeds(CACHE, 0, SIZE)

# The contexts that are asked for, in any order, and for this time only.
both = c.status(GIB, 9 * TIB, ids=[3, 0])
assert sorted(both) == sorted([BASE, CONTEXT + "coarse"])
whole = c.status(GIB, 9 * TIB)
assert all(whole[name] == both[name] for name in both)
for name, found in c.status(GIB, 9 * TIB, REQ_ONE, [2, 1]).items():
    assert found == whole[name][:1], name
for bad in ([], [4], [0, 0], [0, 1, 2, 3, 0], [1 << 31]):
    payload = struct.pack(">Q%dI" % len(bad), 512, *bad)
    (kind, data), = c.request(STATUS, 0, len(payload), PAYLOAD, payload)
    assert kind == 0x8001 and data[:4] == b"\0\0\0\x16", (bad, data)

# Past the end, or so long that a sum would wrap.
for command, error in ((READ, 22), (TRIM, 22), (CACHE, 22), (ZERO, 28),
                       (STATUS, 22)):
    for at, length in ((0, SIZE + 1), (SIZE, 1), (1 << 20, (1 << 64) - 1),
                       (4096, 1 << 63), ((1 << 64) - 512, 1024)):
        (kind, data), = c.request(command, at, length)
        assert kind == 0x8001, (command, at, length)
        assert struct.unpack(">I", data[:4])[0] == error, (command, data)
told = compare(server, c)

# libnbd's own, where it is new enough.
if hasattr(h, "set_request_extended_headers"):
    import nbd
    n = nbd.NBD()
    n.set_request_extended_headers(True)
    for context in ALL:
        n.add_meta_context(context)
    n.connect_uri(server.uri)
    assert n.get_extended_headers_negotiated()
    found = {}
    n.block_status_64(SIZE, 0, lambda name, _, entries, error:
                      found.setdefault(name, []).extend(entries))
    assert found == told, "libnbd is told something else"
    n.pwrite(b"libnbd", 7 * TIB)
    assert n.pread(6, 7 * TIB) == b"libnbd"
    if hasattr(nbd, "STRICT_AUTO_FLAG"):
        # What is not told to set the flag does not set it.
        n.set_strict_mode(0)
        n.pwrite(b"strict", 7 * TIB)
        assert n.pread(6, 7 * TIB) == b"strict"
        n.pwrite(b"flags!", 7 * TIB, nbd.CMD_FLAG_PAYLOAD_LEN)
        assert n.pread(6, 7 * TIB) == b"flags!"
    n.zero(5 * GIB, 7 * TIB)
    assert n.pread(6, 7 * TIB) == bytes(6)
    n.shutdown()
    told = compare(server, c)
h.shutdown()
server.alive()
server.stop()
check("disk.qcow2")
for name in ("fine", "coarse"):
    assert harness.qemu_extents("disk.qcow2", name) == told[CONTEXT + name]

# A read-only export, and more extents than a reply may have.
server = Server("disk.qcow2", options=["-r"])
c = Client(server, ALL)
again = compare(server, c)
# A tenth of the clusters may have no storage now: then the filter looks
# below, and tells more zeroes than before.
told.pop(BASE)
again.pop(BASE)
assert again == told
for command in (TRIM, ZERO):
    (kind, data), = c.request(command, 0, 5 * GIB)
    assert kind == 0x8001 and data[:4] == b"\0\0\0\1"
(kind, data), = c.request(WRITE, 0, 512, PAYLOAD, bytes(512))
assert kind == 0x8001 and data[:4] == b"\0\0\0\1"
server.stop()
