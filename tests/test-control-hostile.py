#!/usr/bin/python3 -B
# nbdkit-dirty-bitmap-filter
# SPDX-License-Identifier: BSD-3-Clause
# Copyright the nbdkit-dirty-bitmap-filter authors

"""Clients of the control socket that do harm: whatever they send or do not
read, others are served, memory is bounded, and nbdkit stops in time."""

import os
import resource
import socket
import time

import harness
from harness import Server, until
from qmp import Qmp, ctl

MIB = 1 << 20
ctl_sock = os.path.join(harness.tmp, "ctl.sock")
QUERY = b'{"execute":"query-block"}'

harness.create("disk.qcow2", 64 * MIB, *("bitmap%d" % i for i in range(40)))
server = Server("disk.qcow2", "dirty-bitmap-control=" + ctl_sock)


def memory():
    """Bytes that are resident."""
    with open("/proc/%d/statm" % server.pid) as f:
        return int(f.read().split()[1]) * resource.getpagesize()


def descriptors():
    return len(os.listdir("/proc/%d/fd" % server.pid))


def error(q, data, text):
    """Just this error, and the client goes on."""
    q.send(data)
    q.send({"execute": "query-name", "id": "next"})
    reply = q.reply()
    assert text in reply["error"]["desc"], reply
    assert q.reply() == {"return": {}, "id": "next"}


def limits():
    """1 MiB, a depth of 32, and no more."""
    q = Qmp(ctl_sock)
    head, tail = b'{"execute":"query-name","id":"', b'"}'
    room = MIB - len(head) - len(tail)
    q.send(head + b"x" * room + tail)
    assert q.reply() == {"return": {}, "id": "x" * room}
    error(q, head + b"x" * (room + 1) + tail, "size limit")
    error(q, head + b"x" * 5 * MIB + tail, "size limit")
    error(q, b'"' + b"x" * 2 * MIB + b'"', "size limit")
    error(q, b"1" * 2 * MIB + b" ", "size limit")

    def nested(depth):
        return b'{"execute":"query-name","id":%s}' % (
            b"[" * (depth - 1) + b"]" * (depth - 1))

    q.send(nested(32))
    assert q.reply()["return"] == {}
    error(q, nested(33), "depth limit")
    error(q, nested(100000), "depth limit")
    error(q, b'{"a":' * 50 + b"1" + b"}" * 50, "depth limit")
    error(q, b"[" + b"[]," * 70000 + b"1]", "token count limit")
    error(q, b"[" + b"1," * 70000 + b"1]", "token count limit")
    q.close()


def garbage():
    q = Qmp(ctl_sock)
    for data, text in (
            (b'{"execute":"a\xc3("}', "invalid UTF-8"),
            (b'{"execute":"\xed\xa0\x80"}', "invalid UTF-8"),
            (b'{"execute":"\xc0\x80"}', "invalid UTF-8"),
            (b"\xff", "stray '\ufffd'"), (b"\0", "stray ''"),
            (b"\x1b", "stray '\x1b'"), (b"\x80", "stray '\ufffd'"),
            (b'{"execute":"que\xff', "stray"), (b'["\\\0', "stray"),
            (b'{"a":1,"b":[2,\x1b', "stray"),
            (b"}", "expecting value"), (b"{]", "expecting value"),
            (b"[}", "expecting value"), (b":", "expecting value"),
            (b'{"execute"}', "expecting value"), (b"{,}", "expecting value"),
            (b"nul ", "expecting value"), (b"{a:1}", "expecting value"),
            (b'"\\x"', "expecting value"), (b'"\\ud800"', "expecting value"),
            (b'{"a":1,"a":2}', "duplicate key"),
            (b'{"\\u0000":1}', "expecting value"),
            (b"9" * 400 + b" ", "too large"),
            (b"1e999 ", "too large"),
            (b"5 ", "must be a JSON object"),
            (b'"\\u0000"', "must be a JSON object"),
            (b'{"execute":"query-name\\u0000"}', "has not been found"),
            (b'{"execute":{}}', "must be a string"),
            (b'{"execute":"query-name","arguments":[]}',
             "must be an object")):
        error(q, data, text)
    q.close()


def nothing():
    """Megabytes of nothing, which take no memory."""
    q = Qmp(ctl_sock)
    before = memory()
    for byte in b" ", b"\n", b"\t":
        for _ in range(16):
            q.send(byte * MIB)
    q.send(b'{"execute":' + b" " * 8 * MIB + b'"query-name"' +
           b"\r\n" * 4 * MIB + b"}")
    assert q.reply() == {"return": {}}
    if not harness.PRELOAD:
        assert memory() < before + 4 * MIB, (before, memory())
    q.close()


def half_close():
    """What was sent is answered, although no more comes."""
    q = Qmp(ctl_sock)
    q.send(QUERY * 500 + b'{"execute":"query-name","id":7}{"exec')
    q.socket.shutdown(socket.SHUT_WR)
    time.sleep(0.05)
    for _ in range(500):
        assert len(q.reply()["return"][0]["inserted"]["dirty-bitmaps"]) == 40
    assert q.reply()["id"] == 7
    assert q.message() is None
    # A word has no end of its own.
    q = Qmp(ctl_sock)
    q.send("12")
    q.socket.shutdown(socket.SHUT_WR)
    assert "JSON object" in q.reply()["error"]["desc"]
    assert q.message() is None


def aborts():
    """Clients that vanish at any point leave nothing behind."""
    before = descriptors()
    session = b'{"execute":"qmp_capabilities"}' + QUERY
    for n in range(len(session) + 1):
        q = Qmp(ctl_sock, negotiate=False)
        q.send(session[:n])
        q.close()
    q = Qmp(ctl_sock)
    q.send(QUERY * 2000)
    q.close()
    until(lambda: descriptors() == before, "the clients to be gone")
    assert Qmp(ctl_sock).ask("query-name") == {}


def four():
    """A fifth client is told so at once."""
    clients = [Qmp(ctl_sock) for _ in range(4)]
    fifth = Qmp(ctl_sock, negotiate=False)
    assert fifth.greeting == {"error": {
        "class": "GenericError",
        "desc": "Too many clients: 4 are connected already"}}
    assert fifth.message() is None
    assert "Too many clients" in ctl(ctl_sock, "query-name", status=1)[1]
    for q in clients:
        assert q.ask("query-name") == {}
    clients.pop().close()
    until(lambda: "QMP" in Qmp(ctl_sock, negotiate=False).greeting,
          "there is room")
    for q in clients:
        q.close()


def deaf_and_slow():
    """Two that never read, one that sends a byte now and then: the fourth is
    served, and so is the disk."""
    before = memory()
    deaf = []
    for _ in range(2):
        q = Qmp(ctl_sock)
        q.socket.setblocking(False)
        sent = 0
        deadline = time.monotonic() + 10
        quiet = time.monotonic()
        # Until nothing has been taken for a while.
        while time.monotonic() - quiet < 0.2:
            assert time.monotonic() < deadline and sent < 64 * MIB, sent
            try:
                sent += q.socket.send(QUERY * 1000)
                quiet = time.monotonic()
            except BlockingIOError:
                time.sleep(0.01)
        deaf.append(q)
    slow = Qmp(ctl_sock)
    fourth = Qmp(ctl_sock)
    began = time.monotonic()
    for byte in QUERY:
        slow.send(bytes([byte]))
        assert fourth.ask("query-name") == {}
    assert time.monotonic() - began < 10
    assert slow.reply()["return"]
    h = server.connect()
    h.pwrite(b"x", 0)
    h.flush()
    # ASan keeps for a while what was freed.
    if not harness.PRELOAD:
        assert memory() < before + 8 * MIB, (before, memory())
    return deaf, slow, fourth


def stops(clients):
    """Within a second, whatever the clients do."""
    deaf, slow, fourth = clients
    slow.send(b'{"execute":')
    assert server.stop() < (1 if not harness.PRELOAD else 10)
    assert fourth.ended()[0]["event"] == "SHUTDOWN"
    assert slow.ended()[0]["event"] == "SHUTDOWN"
    assert not os.path.exists(ctl_sock)
    harness.check("disk.qcow2")
    for q in deaf:
        q.close()


limits()
garbage()
nothing()
half_close()
aborts()
four()
server.alive()
stops(deaf_and_slow())
