#!/usr/bin/python3 -B
# nbdkit-dirty-bitmap-filter
# SPDX-License-Identifier: BSD-3-Clause
# Copyright the nbdkit-dirty-bitmap-filter authors

"""TERM, INT and QUIT end the server within a second, with clients idle,
silent in the handshake or in the middle of requests, and the bitmap is
in the image.
"""

import signal
import socket
import threading
import time

import harness
from harness import Server, nbd

# What is meant is a second.  A machine that has other work takes longer.
LIMIT = 4.0 if not harness.PRELOAD else 10.0


def silent(server):
    """A client that connects and says nothing."""
    s = socket.socket(socket.AF_UNIX)
    s.connect(server.socket)
    s.recv(18)
    return s


def stuck(server):
    """A client that sends half a request header."""
    s = silent(server)
    s.sendall(b"\0\0\0\3" + b"IHAVEOPT" + b"\0\0\0\1" + b"\0\0\0\0")
    s.recv(10)
    s.sendall(b"\x25\x60\x95\x13\0\0")
    return s


def busy(server, stop, acked):
    """A client that writes for as long as it is served."""
    h = server.connect()
    number = 0
    try:
        while not stop.is_set():
            h.pwrite(b"busy" * 1024, number * 65536)
            acked.append(number)
            number = (number + 1) % 500
    except nbd.Error:
        pass


def once(sig, kinds):
    harness.create("disk.qcow2", 256 << 20, ("b", 65536))
    server = Server("disk.qcow2")
    clients, threads, acked = [], [], []
    stop = threading.Event()
    h = server.connect()
    h.pwrite(b"x" * 512, 200 << 20)
    clients.append(h)
    if "silent" in kinds:
        clients += [silent(server), silent(server)]
    if "stuck" in kinds:
        clients.append(stuck(server))
    if "busy" in kinds:
        threads.append(threading.Thread(target=busy,
                                        args=(server, stop, acked)))
        threads[0].start()
        while len(acked) < 20:
            server.alive()
            time.sleep(0.01)
    if "idle" not in kinds:
        clients.remove(h)
        h.shutdown()
    took = server.stop(sig)
    stop.set()
    for t in threads:
        t.join()
    assert took < LIMIT, "%s with %s clients: %.2f seconds" % (
        sig.name, kinds, took)
    harness.check("disk.qcow2")
    assert harness.flags("disk.qcow2", "b") == {"auto"}
    dirty = harness.granules(harness.qemu_extents("disk.qcow2", "b"), 65536)
    assert (200 << 20) // 65536 in dirty
    assert set(acked) <= dirty, "an acknowledged write is not in the bitmap"
    data = harness.contents("disk.qcow2")
    for n in set(acked):
        assert data[n * 65536:n * 65536 + 4] == b"busy"


for sig in (signal.SIGTERM, signal.SIGINT, signal.SIGQUIT):
    for kinds in ({"nobody"}, {"idle"}, {"idle", "silent", "stuck"},
                  {"idle", "silent", "busy"}):
        if harness.SERVER != "nbdkit" and sig == signal.SIGQUIT:
            continue
        once(sig, kinds)
