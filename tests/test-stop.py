#!/usr/bin/python3 -B
# nbdkit-dirty-bitmap-filter
# SPDX-License-Identifier: BSD-3-Clause
# Copyright the nbdkit-dirty-bitmap-filter authors

"""TERM ends the server soon, whatever its clients have asked for: READs
of which they do not take the data, from storage of 100 MB/s, and zeroes
that take a quarter of a minute.  Nothing more is read for them, the
bitmap is in the image, and the exit status is 0.
"""

import json
import os
import signal
import socket
import struct
import time

import harness
from harness import Server, nbd

# What is right takes about half a second on a machine that is idle.  What
# was wrong took from 16 seconds to some minutes.
LIMIT = 10

M = 1 << 20
REQUESTS = 64                   # of each client


def receive(s, count):
    data = b""
    while len(data) < count:
        more = s.recv(count - len(data))
        assert more, "the server closed the connection"
        data += more
    return data


def option(s, number, data=b""):
    s.sendall(struct.pack(">QII", 0x49484156454F5054, number, len(data)) +
              data)
    kind = 0
    while kind != 1:            # NBD_REP_ACK
        _, _, kind, length = struct.unpack(">QIII", receive(s, 20))
        assert kind < 1 << 31, "option %d: error %#x" % (number, kind)
        receive(s, length)


def greedy(path, structured, length):
    """A client that asks for 64 times so much and does not take it."""
    s = socket.socket(socket.AF_UNIX)
    s.settimeout(harness.PATIENCE)
    s.connect(path)
    receive(s, 18)
    s.sendall(struct.pack(">I", 3))
    if structured:
        option(s, 8)            # NBD_OPT_STRUCTURED_REPLY
    option(s, 7, bytes(6))      # NBD_OPT_GO
    s.sendall(b"".join(struct.pack(">IHHQQI", 0x25609513, 0, 0, i,
                                   (i % 30) << 25, length)
                       for i in range(REQUESTS)))
    return s


def bytes_read(server):
    """What a process has read so far, from wherever."""
    with open("/proc/%d/io" % server.pid) as f:
        return int(f.readline().split()[1])


def storage():
    """A server of the image's bytes, 100 MB/s of them."""
    return Server(args=["--filter=rate", "file", "disk.qcow2",
                        "rate=800M", "burstiness=0.1"])


def readers(number, mode, length):
    """mode: dirty-bitmap-server's, or that all are behind listen."""
    harness.create("disk.qcow2", 1 << 30, ("b", 65536),
                   options="preallocation=falloc")
    # Room for what cannot grow.
    os.truncate("disk.qcow2", os.path.getsize("disk.qcow2") + 4 * M)
    below = storage()
    params = ["dirty-bitmap-server=" + ("on" if mode == "on" else "off")]
    if mode == "listen":
        params.append("dirty-bitmap-listen=" + os.path.join(harness.tmp,
                                                            "listening"))
    server = Server(args=["--filter=" + harness.FILTER, "nbd",
                          "socket=" + below.socket, *params])
    path = server.socket if mode != "listen" else params[-1].split("=")[1]
    writer = server.connect()
    writer.pwrite(b"x" * 512, 5 * M)
    clients = [greedy(path, i % 4 != 0, length) for i in range(number)]
    time.sleep(1)
    writer.pwrite(b"y" * 512, 7 * M)

    before = bytes_read(below)
    took = server.stop()
    read = (bytes_read(below) - before) // M
    print("%3d clients, %s: %.2f s, %d MiB read" % (number, mode, took, read),
          flush=True)
    assert took < LIMIT, "%.1f seconds" % took
    # What was asked for are 1.6 to 400 GiB.
    assert read < 600, "%d MiB read for clients that are gone" % read
    below.stop()
    for s in clients:
        s.close()
    stored({5 * M // 65536, 7 * M // 65536})


def stored(granules):
    harness.check("disk.qcow2")
    assert harness.flags("disk.qcow2", "b") == {"auto"}
    dirty = harness.granules(harness.qemu_extents("disk.qcow2", "b"), 65536)
    assert dirty == granules, dirty


def allocated():
    out = harness.run("qemu-img", "map", "--output=json", "disk.qcow2")
    return [e for e in json.loads(out) if e["present"]]


def zeroes(compat, server_mode):
    """Zeroes for 4 GiB, which are to stay allocated, cluster by cluster."""
    harness.create("disk.qcow2", 4 << 30, *(["b"] if compat == "1.1" else []),
                   options="compat=%s,cluster_size=512" % compat)
    server = Server("disk.qcow2", "dirty-bitmap-server=" + server_mode)
    h = server.connect()
    h.pwrite(b"x" * 512, (4 << 30) - 512)
    cookie = h.aio_zero((4 << 30) - 1024, 0, flags=nbd.CMD_FLAG_NO_HOLE)
    deadline = time.monotonic() + 0.3
    while time.monotonic() < deadline:
        h.poll(20)
    server.alive()
    took = server.stop()
    print("zeroes, %s, server %s: %.2f s" % (compat, server_mode, took),
          flush=True)
    assert took < LIMIT, "%.1f seconds" % took
    try:
        while not h.aio_command_completed(cookie):
            h.poll(1000)
        raise AssertionError("zeroes were acknowledged")
    except nbd.Error:
        pass
    harness.check("disk.qcow2")
    if compat == "1.1":
        assert harness.flags("disk.qcow2", "b") == {"auto"}
        runs = harness.qemu_extents("disk.qcow2", "b")
        assert [dirty for _, dirty in runs] == [1, 0, 1], runs
        zeroed = [e["start"] + e["length"] for e in allocated()]
        assert zeroed[-1] == 4 << 30 and zeroed[-2] <= runs[0][0], (
            "what was zeroed is not all dirty", zeroed, runs)
    with open("disk.qcow2", "rb") as f:
        assert f.read(4) == b"QFI\xfb"


if harness.SERVER == "nbdkit":
    # nbdkit has a buffer for each of 16 requests of each client, so what
    # is asked of it is less.
    readers(4, "on", 32 * M)
    readers(4, "listen", 32 * M)
    readers(4, "off", 8 * M)
    readers(50, "on", 32 * M)
    readers(50, "off", M // 2)
    readers(200, "on", 32 * M)
    zeroes("1.1", "on")
    zeroes("0.10", "off")
