#!/usr/bin/python3 -B
# nbdkit-dirty-bitmap-filter
# SPDX-License-Identifier: BSD-3-Clause
# Copyright the nbdkit-dirty-bitmap-filter authors

"""Strangers who send a byte at a time, take no replies, open a thousand
connections or ask for a thousand options: those who work do not notice,
and the server's memory stays within its bound.
"""

import os
import resource
import select
import socket
import struct
import threading
import time

import harness
from harness import CONTEXT, Server

OPT, REQUEST = 0x49484156454F5054, 0x25609513
MiB = 1 << 20
BOUND = 128 * MiB

# The image's tables, its bitmaps, the program, and room for error.
OTHERS = 64 * MiB


def option(number, payload=b"", length=None):
    return struct.pack(">QII", OPT, number,
                       len(payload) if length is None else length) + payload


def request(command, offset=0, count=0, flags=0):
    return struct.pack(">IHHQQI", REQUEST, flags, command, 7, offset, count)


def query(*queries):
    return struct.pack(">II", 0, len(queries)) + \
        b"".join(struct.pack(">I", len(q)) + q for q in queries)


GO = option(7, struct.pack(">IH", 0, 0))
STRUCTURED = option(8)
BITMAP = CONTEXT.encode() + b"b"


def connect():
    s = socket.socket(socket.AF_UNIX)
    s.settimeout(harness.PATIENCE)
    s.connect(server.socket)
    return s


def converse(*messages):
    """A client that says all this without listening."""
    s = connect()
    s.settimeout(0.3)
    try:
        s.sendall(struct.pack(">I", 3))
        for message in messages:
            s.sendall(message)
    except (TimeoutError, ConnectionError):
        pass                    # The server does not read any more.
    return s


def ended(s, seconds):
    """Does the server end this connection in time?  What was said."""
    said = b""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if not select.select([s], [], [], 0.1)[0]:
            continue
        try:
            data = s.recv(1 << 16)
        except ConnectionError:
            return said
        if not data:
            return said
        said += data
    return None


class Good(threading.Thread):
    """A client that works all the time, and what it waited for most."""

    def __init__(self):
        super().__init__()
        self.h = server.connect("base:allocation", CONTEXT + "b")
        self.longest = 0
        self.error = None
        self.ends = False
        self.rounds = 0

    def run(self):
        try:
            while not self.ends:
                start = time.monotonic()
                offset = (48 * MiB) + self.rounds % 64 * 65536
                data = struct.pack(">Q", self.rounds) * 512
                self.h.pwrite(data, offset)
                assert self.h.pread(4096, offset) == data
                if self.rounds % 16 == 0:
                    self.h.flush()
                    harness.block_status(self.h, CONTEXT + "b", 64 * MiB, 0)
                self.longest = max(self.longest, time.monotonic() - start)
                self.rounds += 1
        except BaseException as e:
            self.error = e

    def stop(self):
        self.ends = True
        self.join()
        if self.error is not None:
            raise self.error
        self.h.shutdown()
        print("%d rounds, the longest took %.2f s" %
              (self.rounds, self.longest))
        assert self.rounds > 0
        assert self.longest < 10, "the good client was held up"


def check_memory():
    with open("/proc/%d/status" % server.pid) as f:
        rss = [line for line in f if line.startswith("VmRSS")][0]
    print(rss.strip())
    if not harness.PRELOAD:
        assert int(rss.split()[1]) << 10 < BOUND + OTHERS, rss


soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
resource.setrlimit(resource.RLIMIT_NOFILE, (min(hard, 4096), hard))
MANY = min(1000, min(hard, 4096) - 200)

harness.create("disk.qcow2", 64 * MiB, ("b", 65536))
server = Server("disk.qcow2", "dirty-bitmap-max-connections=100",
                "dirty-bitmap-handshake-timeout=2",
                "dirty-bitmap-max-memory=128M")
h = server.connect()
h.pwrite(b"x" * 32 * MiB, 0)
h.shutdown()
good = Good()
good.start()

# A thousand options, and long ones.  Either all are answered, or the
# connection is closed because it took too long.
strangers = [
    converse(STRUCTURED, option(9, query()) * 1000),
    converse(STRUCTURED, option(10, query(*[BITMAP] * 5000)) * 20),
    converse(STRUCTURED, *[option(9, query(b"q" * 4096)) * 100] * 30),
    converse(*[option(99, b"x" * MiB)] * 40),
    converse(option(99, b"", 32 * MiB), b"x" * MiB),
    converse(option(6, struct.pack(">IH", 0, 65535) + b"\0\3" * 65535) * 20),
]
# A byte at a time.
slow = connect()
start = time.monotonic()
try:
    for byte in struct.pack(">I", 3) + option(99, b"", 1000) + b"x" * 1000:
        slow.send(bytes([byte]))
        time.sleep(0.1)
        assert time.monotonic() - start < 15, "a slow handshake is not ended"
except ConnectionError:
    pass
assert time.monotonic() - start > 1.5
for s in strangers + [slow]:
    assert ended(s, 15) is not None, "a handshake does not end"
    s.close()
check_memory()

# A thousand connections that say nothing, all at once, and a client that
# comes behind them.
silent = []
for _ in range(MANY):
    s = socket.socket(socket.AF_UNIX)
    s.setblocking(False)
    try:
        s.connect(server.socket)
    except BlockingIOError:
        pass                    # The backlog is full.
    silent.append(s)
start = time.monotonic()
late = server.connect()
print("the late client was let in after %.2f s" % (time.monotonic() - start))
assert time.monotonic() - start < 60
assert late.pread(512, 0) == b"x" * 512
late.shutdown()
check_memory()
for i, s in enumerate(silent):
    if i % 2:
        s.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER,
                     struct.pack("ii", 1, 0))
    s.close()

# Clients that do not take what they ask for, or do not send what they
# announce, with 16 large requests each.
hogs = []
for n in range(6):
    hogs.append(converse(GO, request(0, 0, 32 * MiB) * 16))
    hogs.append(converse(STRUCTURED + GO,
                         request(0, 0, 32 * MiB, flags=4) * 16))
    hogs.append(converse(STRUCTURED + option(10, query(BITMAP)) + GO,
                         request(7, 0, 64 * MiB) * 16 +
                         request(1, 0, 32 * MiB, flags=1) + b"1"))
    check_memory()
good.stop()
good = Good()
good.start()
for n in range(10):
    time.sleep(0.1)
    check_memory()
for s in hogs:
    s.close()
good.stop()

h = server.connect()
assert h.pread(MiB, 0) == b"x" * MiB
h.shutdown()
server.stop()
harness.check("disk.qcow2")

# What cannot be is said.
server = Server("disk.qcow2", "dirty-bitmap-max-connections=10000",
                "dirty-bitmap-max-memory=128M")
server.connect().shutdown()     # It has started then.
assert "connections at most, not 10000" in server.messages()
server.stop()

# Idle connections are closed if that is asked for.
server = Server("disk.qcow2", "dirty-bitmap-idle-timeout=1")
idle = converse(GO)
start = time.monotonic()
assert ended(idle, harness.PATIENCE) is not None
assert time.monotonic() - start > 0.8
server.stop()

# Nobody's errors tell of files, bitmaps or the process.
TLS_REQUIRED = 0x80000005
with open("keys.psk", "w") as f:
    f.write("user:0123456789abcdef0123456789abcdef\n")
secrets = [b"disk.qcow2", harness.tmp.encode(), b"secret", b"nbdkit",
           b"qcow2", b"No such", b"0x"]
CORPUS = [
    option(2), option(3), option(9, query()), option(9, query(b"qemu:")),
    option(8), option(10, query(BITMAP)), option(6, struct.pack(">IH", 0, 0)),
    option(6, struct.pack(">I", 6) + b"secreT" + struct.pack(">H", 0)),
    option(6, b"\xff" * 10), option(7, b""), option(10, b"\0"), option(77),
    option(9, query(b"a\0b")), option(11), option(5, b"x"),
    GO[:-6] + struct.pack(">IH", 4097, 0), option(7, struct.pack(">IH", 0, 0)),
]
harness.create("secret.qcow2", 8 * MiB, ("secret", 65536))
for options in (["--tls=require", "--tls-psk=keys.psk"], ["--tls=off"]):
    server = Server("secret.qcow2", options=options)
    for message in CORPUS:
        s = converse(message, request(0, 1 << 60, 5), request(99))
        s.shutdown(socket.SHUT_WR)
        said = ended(s, 15)
        s.close()
        assert said is not None and len(said) > 18
        # Not in what it asked for by name, and is told.
        names = any(message.startswith(option(n)[:12]) for n in (3, 9, 10))
        for secret in secrets:
            if options == ["--tls=off"] and names and secret == b"secret":
                continue
            assert secret not in said, (options, message, said)
        if options != ["--tls=off"]:
            assert struct.unpack(">I", said[18 + 12:18 + 16])[0] == \
                TLS_REQUIRED or message in (option(2), option(5, b"x")), said
    server.stop()
