#!/usr/bin/python3 -B
# nbdkit-dirty-bitmap-filter
# SPDX-License-Identifier: BSD-3-Clause
# Copyright the nbdkit-dirty-bitmap-filter authors

"""nbdkit -s: one client on standard input and output, which are a socket,
or two pipes.  It gets the contexts, and when it has gone, however that
was, or a signal has come, nbdkit ends with everything stored.
"""

import os
import signal
import socket
import subprocess
import sys
import threading
import time

import harness
from harness import CONTEXT, FILTER, PATIENCE, nbd

if harness.SERVER != "nbdkit":
    print("skipped: this is about nbdkit")
    sys.exit(77)

LIMIT = 4.0 if not harness.PRELOAD else 10.0
SIZE = 64 << 20
HAS_TLS = "tls=yes" in harness.run("nbdkit", "--dump-config").splitlines()
GO = b"IHAVEOPT\0\0\0\7\0\0\0\6" + bytes(6)

fd = os.open("keys.psk", os.O_WRONLY | os.O_CREAT, 0o600)
os.write(fd, b"alice:" + b"17" * 32 + b"\n")
os.close(fd)


def carry(read, write, sock):
    """What is behind read goes to write; the end of it too, which on a
    socket, of which there are copies, has to be said."""
    try:
        while True:
            # Less than a pipe holds, so that it is never empty and a
            # writer who has more would sleep.
            data = os.read(read, 12345)
            if not data:
                break
            while data:
                data = data[os.write(write, data):]
    except OSError:
        pass
    os.close(read)
    os.close(write)
    if sock:
        sock.shutdown(socket.SHUT_WR)
        sock.close()


class Single:
    """nbdkit -s with our filter; self.sock is the client's end.  With
    pipes that is a socket too, with two threads between."""

    def __init__(self, pipes, *params, options=(), nonblocking=False):
        args = ["nbdkit", "-s", *options, "--filter=" + FILTER, "file",
                "disk.qcow2", *params]
        self.log = "single.log"
        self.sock, ours = socket.socketpair()
        with open(self.log, "wb") as log:
            if pipes:
                self.process = subprocess.Popen(
                    args, stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                    stderr=log, env=harness.environment(), bufsize=0)
                self.bridge(ours)
            else:
                ours.setblocking(not nonblocking)
                self.process = subprocess.Popen(
                    args, stdin=ours, stdout=ours, stderr=log,
                    env=harness.environment())
        ours.close()
        self.sock.settimeout(PATIENCE)
        harness.servers.append(self)

    def bridge(self, ours):
        p = self.process
        for args in ((os.dup(ours.fileno()), os.dup(p.stdin.fileno()), None),
                     (os.dup(p.stdout.fileno()), os.dup(ours.fileno()),
                      ours.dup())):
            threading.Thread(target=carry, args=args, daemon=True).start()
        p.stdin.close()
        p.stdout.close()

    def connect(self, name="", tls=False):
        h = nbd.NBD()
        h.set_export_name(name)
        h.add_meta_context("base:allocation")
        h.add_meta_context(CONTEXT + "b")
        if tls:
            h.set_tls(nbd.TLS_REQUIRE)
            h.set_tls_psk_file("keys.psk")
            h.set_tls_username("alice")
        h.connect_socket(os.dup(self.sock.fileno()))
        self.sock.close()
        return h

    def ends(self, status=0, quiet=True):
        """It ends, in time, and what it said."""
        start = time.monotonic()
        try:
            got = self.process.wait(PATIENCE)
        except subprocess.TimeoutExpired:
            raise AssertionError("nbdkit -s does not end") from None
        took = time.monotonic() - start
        with open(self.log, encoding="utf-8", errors="replace") as f:
            said = f.read()
        assert "Sanitizer" not in said and "runtime error" not in said, said
        assert got == status, "the exit status is %d\n%s" % (got, said)
        assert not quiet or not said, said
        assert took < LIMIT, "it took %.2f seconds" % took
        harness.check("disk.qcow2")
        assert harness.flags("disk.qcow2", "b") == {"auto"}
        return said


def create():
    harness.create("disk.qcow2", SIZE, ("b", 65536))


def dirty():
    return harness.granules(harness.qemu_extents("disk.qcow2", "b"), 65536)


def work(pipes, *params, tls=False, options=(), nonblocking=False):
    """A client that does all there is, and says good-bye."""
    create()
    if tls:
        options = [*options, "--tls=require", "--tls-psk=keys.psk"]
    s = Single(pipes, *params, options=options, nonblocking=nonblocking)
    h = s.connect(tls=tls)
    assert h.can_meta_context(CONTEXT + "b")
    data = os.urandom(8 << 20)
    h.pwrite(data, 65536)
    h.pwrite(b"x" * 100, SIZE - 100)
    h.zero(65536, 32 << 20)
    assert h.pread(8 << 20, 65536) == data
    assert harness.extents(h, CONTEXT + "b") == [
        (65536, 0), (8 << 20, 1), ((24 << 20) - 65536, 0), (65536, 1),
        ((32 << 20) - 2 * 65536, 0), (65536, 1)]
    # Many at once, which are more than pipes and sockets hold.
    buffers = [nbd.Buffer(1 << 20) for _ in range(40)]
    for i, b in enumerate(buffers):
        h.aio_pread(b, i << 18)
    while h.aio_in_flight() > 0:
        h.poll(-1)
    whole = bytes(65536) + data + bytes(4 << 20)
    for i, b in enumerate(buffers):
        assert b.to_bytearray() == whole[i << 18:(i << 18) + (1 << 20)], i
    h.shutdown()
    s.ends()
    assert dirty() == set(range(1, 129)) | {512, 1023}
    assert harness.contents("disk.qcow2")[65536:65536 + (8 << 20)] == data


def vanish(pipes):
    """No good-bye: the connection just ends."""
    create()
    s = Single(pipes)
    h = s.connect()
    h.pwrite(b"x" * 512, 1 << 20)
    del h
    s.ends()
    assert dirty() == {16}


def never_begins(pipes):
    """A client that goes before it has said anything."""
    create()
    before = harness.sha256("disk.qcow2")
    s = Single(pipes)
    assert s.sock.recv(18) == b"NBDMAGICIHAVEOPT\0\3"
    s.sock.close()
    s.ends()
    assert harness.sha256("disk.qcow2") == before


def signalled(pipes, sig):
    """With an idle client, and one in the handshake."""
    create()
    s = Single(pipes)
    h = s.connect()
    h.pwrite(b"x" * 512, 2 << 20)
    s.process.send_signal(sig)
    s.ends(quiet=False)
    assert dirty() == {32}

    s = Single(pipes)
    s.sock.recv(18)
    s.process.send_signal(sig)
    s.ends(quiet=False)


def half_closed(pipes):
    """All requests are answered of a client that closes the direction to
    us behind the last of them, without saying DISC."""
    create()
    s = Single(pipes)
    requests = b"".join(
        b"\x25\x60\x95\x13\0\0\0\0" + i.to_bytes(8, "big") + bytes(8) +
        (100000).to_bytes(4, "big") for i in range(200))

    def send():
        s.sock.sendall(b"\0\0\0\3" + GO + requests)
        s.sock.shutdown(socket.SHUT_WR)

    t = threading.Thread(target=send)
    t.start()
    got = 0
    while True:
        data = s.sock.recv(1 << 20)
        if not data:
            break
        got += len(data)
    t.join()
    handshake = 18 + (20 + 14) + (20 + 12) + 20
    assert got == handshake + 200 * (16 + 100000), got
    s.ends()


def does_not_read(pipes):
    """A client that does not take its replies cannot hold nbdkit up."""
    create()
    s = Single(pipes, "dirty-bitmap-crash=mark")
    s.sock.sendall(b"\0\0\0\3" + GO)
    read = b"\x25\x60\x95\x13\0\0\0\0" + bytes(16) + b"\0\x10\0\0"
    write = b"\x25\x60\x95\x13\0\0\0\1" + bytes(8) + \
        (3 << 20).to_bytes(8, "big") + b"\0\0\2\0" + b"w" * 512
    s.sock.sendall(write + read * 40)
    # Until it has come to the write.
    deadline = time.monotonic() + PATIENCE
    while "in-use" not in harness.flags("disk.qcow2", "b"):
        assert time.monotonic() < deadline
        time.sleep(0.02)
    time.sleep(0.5)             # for what is on the way to fill up
    s.process.send_signal(signal.SIGTERM)
    s.ends(quiet=False)
    assert dirty() == {48}


for pipes in (False, True):
    print("pipes" if pipes else "a socket", flush=True)
    work(pipes)
    if HAS_TLS:
        work(pipes, tls=True)
    vanish(pipes)
    never_begins(pipes)
    half_closed(pipes)
    does_not_read(pipes)
    signalled(pipes, signal.SIGINT if pipes else signal.SIGTERM)
work(False, nonblocking=True)

# A delta, and a name; and what is not there is refused.
create()
s = Single(False, "dirty-bitmap-exportname=disk")
h = s.connect("disk")
h.pwrite(b"x" * 512, 1 << 20)
h.shutdown()
s.ends()
s = Single(True)
h = s.connect("delta:b")
assert harness.extents(h, "base:allocation") == [
    (1 << 20, 3), (65536, 0), (SIZE - (1 << 20) - 65536, 3)]
assert h.pread(1024, 1 << 20) == b"x" * 512 + bytes(512)
h.shutdown()
s.ends()

# Nobody is there at all.
s = subprocess.run(["nbdkit", "-s", "--filter=" + FILTER, "file",
                    "disk.qcow2"], stdin=subprocess.DEVNULL,
                   stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                   env=harness.environment(), timeout=PATIENCE)
assert s.returncode == 0 and s.stderr == b"", s
assert s.stdout == b"NBDMAGICIHAVEOPT\0\3", s

# What cannot be stored at the end becomes the exit status.
create()
with open("single.log", "wb") as log:
    ours, theirs = socket.socketpair()
    process = subprocess.Popen(
        ["nbdkit", "-s", "--filter=" + FILTER, "--filter=error", "file",
         "disk.qcow2", "error-pwrite=EIO", "error-pwrite-rate=100%",
         "error-file=" + os.path.join(harness.tmp, "broken"),
         "dirty-bitmap-crash=mark"],
        stdin=theirs, stdout=theirs, stderr=log, env=harness.environment())
    theirs.close()
h = nbd.NBD()
h.connect_socket(ours.detach())
h.pwrite(b"x" * 512, 1 << 20)
with open("broken", "w"):
    pass
h.shutdown()
assert process.wait(PATIENCE) == 1
with open("single.log", encoding="utf-8") as f:
    assert "could not write everything" in f.read()
assert "in-use" in harness.flags("disk.qcow2", "b")
