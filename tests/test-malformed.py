#!/usr/bin/python3 -B
# nbdkit-dirty-bitmap-filter
# SPDX-License-Identifier: BSD-3-Clause
# Copyright the nbdkit-dirty-bitmap-filter authors

"""Whatever bytes a client sends, the others do not notice: they read and
write on, nothing crashes or hangs, and the bitmap is right at the end.
"""

import os
import socket
import struct
import time

import harness
from harness import CONTEXT, Server

rnd = harness.seeded()
ROUNDS = int(os.environ.get("ROUNDS", "150"))
harness.create("disk.qcow2", 64 << 20, ("b", 65536))
server = Server("disk.qcow2")
OPT, REQUEST = 0x49484156454F5054, 0x25609513


def option(number, payload=b"", length=None, magic=OPT):
    return struct.pack(">QII", magic, number,
                       len(payload) if length is None else length) + payload


def request(command, offset=0, count=0, flags=0, payload=b"", magic=REQUEST):
    return struct.pack(">IHHQQI", magic, flags, command, 7, offset,
                       count) + payload


def connect(flags=3):
    s = socket.socket(socket.AF_UNIX)
    s.settimeout(5)
    s.connect(server.socket)
    assert s.recv(18, socket.MSG_WAITALL)[:16] == b"NBDMAGICIHAVEOPT"
    if flags is not None:
        s.sendall(struct.pack(">I", flags))
    return s


def query(name=b"", *queries):
    return struct.pack(">I", len(name)) + name + \
        struct.pack(">I", len(queries)) + \
        b"".join(struct.pack(">I", len(q)) + q for q in queries)


GO = option(7, struct.pack(">IH", 0, 0))
STRUCTURED = option(8)
SET = option(10, query(b"", b"base:allocation", CONTEXT.encode() + b"b"))


def transmission():
    s = connect()
    s.sendall(STRUCTURED + SET + GO)
    return s


def use_up(s, shut=True):
    """Read until the server closes; it must, once we have."""
    try:
        if shut:
            s.shutdown(socket.SHUT_WR)
        while s.recv(1 << 16):
            pass
    except (ConnectionError, BrokenPipeError):
        pass
    finally:
        s.close()


def send(s, data):
    try:
        s.sendall(data)
    except (ConnectionError, BrokenPipeError):
        pass


HANDSHAKE = [
    b"", b"\0", os.urandom(100), b"GET / HTTP/1.0\r\n\r\n",
    option(7, b"", 0xffffffff), option(99, b"x" * 1000),
    option(99, b"", 1 << 30), option(6, b"\xff" * 6),
    option(7, struct.pack(">IH", 5000, 0)), option(8, b"junk"),
    option(10, b""), option(10, b"\xff" * 8), STRUCTURED + option(10, b"\0"),
    STRUCTURED + option(10, struct.pack(">II", 0, 0xffffffff)),
    STRUCTURED + option(10, query(b"", b"a\0b")),
    STRUCTURED + option(10, query(b"", b"q" * 5000)),
    STRUCTURED + option(10, query(b"", *[b"x"] * 5000)) + GO,
    STRUCTURED + option(9, query(b"", *[b"qemu:"] * 5000)) + GO,
    STRUCTURED + SET[:-3], option(1, b"n" * 4097), option(1, b"any name"),
    option(2), option(2, b"junk"), option(3, b"junk"), option(0), option(5),
    option(7, magic=1), STRUCTURED * 1000, option(11), SET + GO,
]
TRANSMISSION = [
    request(0, magic=0), b"\0" * 27, request(77), request(0, 0, 0),
    request(0, 1 << 63, 512), request(0, 0, 0xffffffff),
    request(0, (64 << 20) - 1, 2), request(0, 0, 33 << 20),
    request(0, 0, 512, flags=0xffff), request(1, 64 << 20, 5, payload=b"hello"),
    request(1, 0, 0xffffffff), request(1, 0, 33 << 20, payload=b"x" * 1000),
    request(1, 0, 100, payload=b"short"), request(3, 5, 5), request(3, flags=9),
    request(4, 1 << 62, 1 << 31), request(6, 0xffffffffffffffff, 1),
    request(6, 0, 0xffffffff), request(7, 0, 0), request(7, 0, 1, flags=2),
    request(7, 64 << 20, 1), request(5, 1 << 50, 1), request(2, flags=1),
    request(7, 0, 64 << 20) * 2000, request(0, 0, 1 << 20) * 50,
    b"".join(request(rnd.randrange(10), rnd.getrandbits(64),
                     rnd.getrandbits(32)) for _ in range(50)),
]


def one_round(number):
    kind = rnd.randrange(5)
    if kind == 0:
        s = connect(rnd.choice([None, 0, 1, 2, 3, 0xffffffff]))
        send(s, rnd.choice(HANDSHAKE))
    elif kind == 1:
        s = transmission()
        send(s, TRANSMISSION[number % len(TRANSMISSION)])
    elif kind == 2:                     # A good conversation, cut or bent.
        data = bytearray(STRUCTURED + SET + GO + request(0, 0, 4096) +
                         request(7, 0, 65536) + request(3))
        if rnd.random() < 0.5:
            data = data[:rnd.randrange(len(data))]
        else:
            at = rnd.randrange(len(data))
            data[at] ^= 1 << rnd.randrange(8)
        s = connect()
        send(s, bytes(data))
    elif kind == 3:                     # One that does not read its replies.
        s = transmission()
        send(s, request(0, 0, 1 << 20) * 20)
        s.close()
        return
    else:                               # One that is gone at once.
        s = transmission()
        send(s, request(1, 0, 1 << 20, payload=b"part"))
        s.close()
        return
    use_up(s)


good = server.connect("base:allocation", CONTEXT + "b")
hangers = []
for number in range(max(ROUNDS, len(HANDSHAKE))):
    if number < len(HANDSHAKE):
        s = connect()
        send(s, HANDSHAKE[number])
        use_up(s)
    one_round(number)
    if number % 30 == 0:
        s = transmission()              # Silent from now on.
        s.sendall(request(0, 0, 1 << 20) * 20)
        hangers.append(s)
    start = time.monotonic()
    offset = (32 << 20) + number % 256 * 65536
    good.pwrite(struct.pack(">I", number) * 128, offset)
    assert good.pread(512, offset) == struct.pack(">I", number) * 128
    assert time.monotonic() - start < 5, "the good client was held up"
    server.alive()

# After all that: memory and descriptors are bounded.
deadline = time.monotonic() + harness.PATIENCE
while len(os.listdir("/proc/%d/fd" % server.pid)) > 40:
    assert time.monotonic() < deadline, "descriptors are lost"
    time.sleep(0.05)
with open("/proc/%d/status" % server.pid) as f:
    rss = [line for line in f if line.startswith("VmRSS")][0]
print(rss.strip())
if not harness.PRELOAD:
    assert int(rss.split()[1]) < 400 << 10, rss

dirty = harness.granules(harness.extents(good, CONTEXT + "b"), 65536)
wanted = {512 + n % 256 for n in range(max(ROUNDS, len(HANDSHAKE)))}
assert wanted <= dirty
good.shutdown()
server.stop()
harness.check("disk.qcow2")
got = harness.granules(harness.qemu_extents("disk.qcow2", "b"), 65536)
assert got == dirty, (got - dirty, dirty - got)
