#!/usr/bin/python3 -B
# nbdkit-dirty-bitmap-filter
# SPDX-License-Identifier: BSD-3-Clause
# Copyright the nbdkit-dirty-bitmap-filter authors

"""The handshake byte by byte, as the protocol document has it: replies,
their types and order, errors that leave the connection usable, context
ids, EXPORT_NAME, and what the replies to requests look like.
"""

import socket
import struct

import harness
from harness import CONTEXT, Server

harness.create("disk.qcow2", 10 << 20, "one", "two")
server = Server("disk.qcow2")
OURS = harness.SERVER == "nbdkit"
OPT, REPLY = 0x49484156454F5054, 0x0003E889045565A9
EXPORT_NAME, ABORT, LIST, PEEK, STARTTLS, INFO, GO, STRUCTURED, LIST_META, \
    SET_META = range(1, 11)
ACK, REP_SERVER, REP_INFO, REP_META = 1, 2, 3, 4
UNSUP, INVALID = 0x80000001, 0x80000003


class Client:
    def __init__(self, flags=3):
        self.s = socket.socket(socket.AF_UNIX)
        self.s.settimeout(10)
        self.s.connect(server.socket)
        magic, opt, offered = struct.unpack(">8sQH", self.read(18))
        assert magic == b"NBDMAGIC" and opt == OPT and offered & 3 == 3
        self.s.sendall(struct.pack(">I", flags))

    def read(self, count):
        data = b""
        while len(data) < count:
            more = self.s.recv(count - len(data))
            assert more, "the server hung up"
            data += more
        return data

    def option(self, number, payload=b""):
        """Send an option; the replies, [(type, payload)]."""
        self.s.sendall(struct.pack(">QII", OPT, number, len(payload)) +
                       payload)
        replies = []
        while True:
            magic, opt, kind, length = struct.unpack(">QIII", self.read(20))
            assert magic == REPLY and opt == number
            replies.append((kind, self.read(length)))
            if kind == ACK or kind & 0x80000000:
                return replies

    def request(self, command, offset=0, count=0, flags=0, payload=b""):
        self.s.sendall(struct.pack(">IHHQQI", 0x25609513, flags, command,
                                   0x1122334455667788, offset, count) +
                       payload)

    def simple(self):
        magic, error, cookie = struct.unpack(">IIQ", self.read(16))
        assert magic == 0x67446698 and cookie == 0x1122334455667788
        return error

    def chunks(self):
        """A structured reply: [(type, payload)]."""
        result = []
        while True:
            magic, flags, kind, cookie, length = struct.unpack(
                ">IHHQI", self.read(20))
            assert magic == 0x668e33ef and cookie == 0x1122334455667788
            result.append((kind, self.read(length)))
            if flags & 1:
                return result

    def error(self, structured=False):
        """The error in a reply; READ and BLOCK_STATUS must have it in a
        chunk, others may."""
        magic = self.s.recv(4, socket.MSG_PEEK | socket.MSG_WAITALL)
        if magic == b"\x67\x44\x66\x98":
            assert not structured, "a simple reply"
            return self.simple()
        (kind, payload), = self.chunks()
        assert kind == 0x8001, kind
        error, length = struct.unpack(">IH", payload[:6])
        assert length == len(payload) - 6
        return error

    def gone(self):
        try:
            return self.s.recv(1) == b""
        except ConnectionError:
            return True


def query(*queries, name=b""):
    return struct.pack(">I", len(name)) + name + \
        struct.pack(">I", len(queries)) + \
        b"".join(struct.pack(">I", len(q)) + q for q in queries)


def contexts(replies):
    assert replies[-1] == (ACK, b"")
    return [(struct.unpack(">I", p[:4])[0], p[4:].decode())
            for kind, p in replies[:-1] if kind == REP_META]


ONE, TWO = (CONTEXT + n for n in ("one", "two"))
DEPTH = "qemu:allocation-depth"
NO_NAME = struct.pack(">IH", 0, 0)

c = Client()
assert c.option(77, b"payload")[0][0] == UNSUP
assert c.option(STARTTLS)[0][0] & 0x80000000
assert c.option(PEEK)[0][0] == UNSUP
assert c.option(12)[0][0] == UNSUP
assert c.option(LIST)[0] == (REP_SERVER, struct.pack(">I", 0))
assert c.option(LIST, b"junk")[0][0] == INVALID
assert c.option(SET_META, query(b"base:allocation"))[0][0] == INVALID
assert len(contexts(c.option(LIST_META, query()))) == 4
assert c.option(STRUCTURED, b"junk")[0][0] == INVALID
assert c.option(STRUCTURED) == [(ACK, b"")]
got = contexts(c.option(LIST_META, query()))
assert all(number == 0 for number, _ in got)
order = [name for _, name in got]
assert order[:2] == ["base:allocation", DEPTH]
assert sorted(order[2:]) == [ONE, TWO]
if OURS:
    assert order[2:] == [ONE, TWO]
ids = {name: i for i, name in enumerate(order)}
# In the order of the ids, whatever that of the queries; each once.
got = contexts(c.option(SET_META, query(*[n.encode() for n in (
    TWO, DEPTH, "base:allocation", ONE, TWO, "x:y")])))
assert got == sorted((ids[n], n) for n in ids), got
for bad in (query(b"a\0b"), b"", b"\0\0\0\x09name", query(b"x")[:-1],
            struct.pack(">II", 0, 3)):
    assert c.option(SET_META, bad)[0][0] == INVALID, bad
# A SET that fails has cleared the selection; one that is good replaces.
assert contexts(c.option(SET_META, query(TWO.encode()))) == [(ids[TWO], TWO)]
# LIST does not disturb it.
c.option(LIST_META, query(b"qemu:"))
replies = c.option(GO, NO_NAME)
assert replies[-1] == (ACK, b"")
infos = {struct.unpack(">H", p[:2])[0]: p[2:] for k, p in replies[:-1]}
size, flags = struct.unpack(">QH", infos[0])
assert size == 10 << 20
assert flags == 0x0ced | 1 << 8, hex(flags)
minimum, preferred, maximum = struct.unpack(">III", infos[3])
assert minimum == 1 and preferred >= 4096 and maximum == 32 << 20
c.request(7, 0, 1 << 20)
assert c.chunks() == [(5, struct.pack(">III", ids[TWO], 1 << 20, 0))]
c.request(1, 65536, 5, payload=b"hello")
assert c.simple() == 0
c.request(7, 0, 1 << 20, flags=8)               # REQ_ONE
assert c.chunks() == [(5, struct.pack(">III", ids[TWO], 65536, 0))]
c.request(0, 65536, 5)
(kind, payload), = c.chunks()
assert kind == 1 and payload == struct.pack(">Q", 65536) + b"hello"
# Errors, and each leaves the connection in step.
for command, offset, count, flag, errors, structured in (
        (0, 10 << 20, 1, 0, (22,), True),       # READ past the end
        (0, 1 << 63, 1 << 31, 0, (22, 75), True),
        (0, 0, 33 << 20, 0, (22, 75), True),    # more than 32 MiB
        (0, 0, 512, 2, (22,), True),            # an odd flag
        (7, 0, 0, 0, (22,), True),              # BLOCK_STATUS of nothing
        (7, 0, (10 << 20) + 1, 0, (22,), True),
        (7, 0, 512, 2, (22,), True),
        (4, 10 << 20, 1, 0, (22, 28), False),   # TRIM past the end
        (6, 10 << 20, 1, 0, (22, 28), False),
        (5, 10 << 20, 1, 0, (22, 28), False),
        (3, 0, 0, 2, (22,), False),             # FLUSH, odd flag
        (99, 0, 0, 0, (22,), False)):           # no such command
    c.request(command, offset, count, flag)
    error = c.error(structured)
    assert error in errors, "command %d at %d: %d" % (command, offset, error)
c.request(1, 10 << 20, 5, payload=b"hello")     # WRITE past the end
assert c.error() in (28, 22)
c.request(0, 65536, 5)
assert c.chunks()[0][1][8:] == b"hello"
c.request(2)                                    # DISC
assert c.gone()

# A selection for one export is no selection for another.
c = Client()
c.option(STRUCTURED)
assert c.option(INFO, NO_NAME)[-1] == (ACK, b"")
assert contexts(c.option(SET_META, query(ONE.encode())))
assert contexts(c.option(SET_META, query())) == []
assert c.option(GO, NO_NAME)[-1] == (ACK, b"")
c.request(7, 0, 512)
assert c.chunks()[0][0] == 0x8001
c.request(2)

# EXPORT_NAME, with and without the zeroes; simple replies to all.
for flags in (1, 3):
    c = Client(flags)
    c.s.sendall(struct.pack(">QII", OPT, EXPORT_NAME, 0))
    size, export = struct.unpack(">QH", c.read(10))
    assert size == 10 << 20 and export & 0x80 == 0, hex(export)
    if flags == 1:
        assert c.read(124) == bytes(124)
    c.request(0, 65536, 5)
    assert c.simple() == 0 and c.read(5) == b"hello"
    c.request(0, 10 << 20, 1)
    assert c.simple() == 22
    c.request(2)
    assert c.gone()

c = Client()
assert c.option(ABORT) == [(ACK, b"")]
assert c.gone()
c = Client(flags=0xffffffff)
assert c.gone()
server.stop()
