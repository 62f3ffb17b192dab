#!/usr/bin/python3 -B
# nbdkit-dirty-bitmap-filter
# SPDX-License-Identifier: BSD-3-Clause
# Copyright the nbdkit-dirty-bitmap-filter authors

"""dirty-bitmap-backup from servers of all kinds: a disk beside its bitmaps,
qemu-nbd, servers that lack this or that part of the protocol, take small or
only large requests, or go away; disks of odd sizes; bitmaps of all
granularities."""

import os
import shutil
import socket
import struct
import threading

import backups
import harness
from backups import ended, fails, one_error, popen, result, sound, tool
from harness import Server
from qmp import Qmp

harness.requires("qemu-nbd", "qemu-io")
dice = harness.seeded()

MIB = 1 << 20
ctl_sock = os.path.join(harness.tmp, "ctl.sock")


def plain(*args):
    """nbdkit without this filter."""
    return Server(args=list(args))


def random_disk(path, size):
    """Some data, and some holes."""
    with open(path, "wb") as f:
        f.truncate(size)
        for offset in range(0, size, 256 << 10):
            f.seek(offset)
            f.write(dice.randbytes(min(dice.randrange(1, 200 << 10),
                                       size - offset)))
    with open(path, "rb") as f:
        return f.read()


def padded(data):
    """As a qcow2 image has it."""
    return data + bytes(-len(data) % 512)


def restores(data, repository="repo", number=None):
    place = repository + ("@%d" % number if number else "")
    name = "%04d.qcow2" % (number or backups.listed(repository)[-1]["number"])
    tool("--restore", "--force", place, "out.raw")
    with open("out.raw", "rb") as f:
        assert f.read() == data
    assert backups.raw(repository, name) == padded(data)
    tool("--restore", "--force", place, "out.qcow2")
    assert harness.contents("out.qcow2") == padded(data)


def whole(h):
    size = h.get_size()
    return b"".join(bytes(h.pread(min(MIB, size - at), at))
                    for at in range(0, size, MIB))


def full_points():
    """Of servers that know nothing of bitmaps."""
    data = random_disk("disk.raw", 5 * MIB + 512)
    small = ["--filter=blocksize-policy", "file", "disk.raw",
             "blocksize-error-policy=error"]
    servers = {
        "file": ["file", "disk.raw"],
        "no extents": ["--filter=noextents", "file", "disk.raw"],
        "no structured replies": ["--no-sr", "file", "disk.raw"],
        "one connection": ["--filter=noparallel", "file", "disk.raw"],
        "requests of 64 KiB": [*small, "blocksize-maximum=64K"],
        "requests of 4 KiB": [*small, "blocksize-maximum=4K"],
        "requests of 1000000 bytes": [*small, "blocksize-minimum=1",
                                      "blocksize-maximum=1000000"],
    }
    for name, args in servers.items():
        print("   ", name, flush=True)
        server = plain(*args)
        told = result(server.uri, "repo")
        assert told["type"] == "full" and "bitmap" not in told, told
        full = result(server.uri, "repo")
        assert "made with no bitmap" in full["reason"] or \
            "offers no bitmap" in full["reason"], full
        if "extents" in name or "structured" in name:
            assert told["copied-bytes"] == len(data), told
        else:
            assert told["copied-bytes"] < len(data), told
        # Zeroes are not stored in either case.
        assert told["bytes"] < 4.5 * MIB, told
        sound("repo")
        restores(data)
        server.stop()
        shutil.rmtree("repo")

    server = plain("-o", "file", "disk.raw")
    fails("protocol", server.uri, "repo")
    server.stop()
    for export in "", "an export":
        server = plain("-e", export, "file", "disk.raw")
        tool(server.uri.replace("?", export.replace(" ", "%20") + "?"),
             "repo")
        restores(data)
        server.stop()
        shutil.rmtree("repo")


def large_blocks():
    """A server that takes whole blocks only."""
    size = 2 * MIB
    harness.create("disk.qcow2", size, ("b", 512))
    for block in 4096, 65536:
        server = Server("disk.qcow2", kind="nbdkit")
        h = server.connect()
        h.pwrite(dice.randbytes(512), 5 * 65536)
        behind = plain("--filter=blocksize-policy", "nbd",
                       "socket=" + server.socket,
                       "blocksize-error-policy=error",
                       "blocksize-minimum=%d" % block,
                       "blocksize-preferred=%d" % block)
        tool(behind.uri, "repo")
        restores(whole(h))
        behind.stop()
        h.shutdown()
        server.stop()
        shutil.rmtree("repo")


def odd_sizes():
    for size in 0, 1, 511, 512, 512 * 3, 65536, MIB + 1, 3 * MIB + 70001:
        print("   ", size, flush=True)
        random_disk("disk.raw", size)
        if os.path.exists("tracks.qcow2"):
            os.unlink("tracks.qcow2")
        if size == 0:
            server = plain("null", "size=0")
            tool(server.uri, "repo")
            tool(server.uri, "repo")
        else:
            server = Server("disk.raw", "dirty-bitmap-image=tracks.qcow2",
                            "dirty-bitmap-control=" + ctl_sock)
            for n in range(3):
                h = server.connect()
                h.pwrite(dice.randbytes(1), size - 1)
                h.pwrite(b"x", dice.randrange(size))
                h.shutdown()
                told = result("--control=" + ctl_sock, server.uri, "repo")
                assert told["type"] == ("increment" if n else "full"), told
                assert told["disk-bytes"] == size, told
        server.stop()
        with open("disk.raw", "rb") as f:
            data = f.read()
        sound("repo")
        restores(data)
        tool("--verify", "repo")
        tool("--prune", "--keep=1", "repo")
        restores(data)
        sound("repo")
        shutil.rmtree("repo")


def granularities():
    size = 9 * MIB + 512
    for granularity in 512, 1024, 4096, 32768, 65536, 2 * MIB:
        print("   ", granularity, flush=True)
        harness.create("disk.qcow2", size, ("b", granularity))
        server = Server("disk.qcow2", "dirty-bitmap-control=" + ctl_sock)
        for n in range(3):
            h = server.connect()
            for _ in range(5):
                h.pwrite(dice.randbytes(300), dice.randrange(size - 300))
            data = whole(h)
            h.shutdown()
            told = result("--control=" + ctl_sock, "--bitmap=b", server.uri,
                          "repo")
            assert told["type"] == ("increment" if n else "full"), told
            if n:
                most = 10 * max(granularity, 4096)
                assert told["copied-bytes"] <= min(most, size), told
            restores(data)
        server.stop()
        sound("repo")
        shutil.rmtree("repo")


def qemu_nbd():
    """Bitmaps of QEMU's server, cleared as the user is told to."""
    size = 7 * MIB
    harness.create("disk.qcow2", size, ("b", 4096))
    for n in range(4):
        for _ in range(4):
            offset = dice.randrange(size - 70000) // 512 * 512
            harness.run("qemu-io", "-f", "qcow2", "-c", "write -P %d %d %d" %
                        (dice.randrange(256), offset,
                         dice.randrange(1, 128) * 512), "disk.qcow2")
        data = harness.contents("disk.qcow2")
        server = Server("disk.qcow2", kind="qemu-nbd",
                        options=["-r", "-e", "8"])
        told = result(server.uri, "repo")
        assert told["type"] == ("increment" if n else "full"), told
        server.stop()
        harness.run("qemu-img", "bitmap", "--clear", "disk.qcow2", "b")
        restores(data)
    # Without -B it offers none.
    server = Server(args=None, disk="disk.qcow2", kind="qemu-nbd")
    server.stop()
    sound("repo")
    shutil.rmtree("repo")


def vanishes():
    """The server is gone in the middle: one error, and nothing is left."""
    size = 32 * MIB
    harness.create("disk.qcow2", size)
    for control in True, False:
        server = Server(args=["--filter=" + harness.FILTER, "--filter=delay",
                              "file", "disk.qcow2", "rdelay=200ms",
                              "dirty-bitmap-control=" + ctl_sock])
        q = Qmp(ctl_sock)
        h = server.connect()
        h.pwrite(dice.randbytes(size), 0)
        h.flush()
        h.shutdown()
        p = popen(*(["--control=" + ctl_sock] if control else []),
                  server.uri, "repo")
        harness.until(lambda: os.path.exists("repo/0001.qcow2.new"),
                      "the copy")
        server.kill()
        status, out, err = ended(p)
        assert status == 1, err
        one_error("", err)
        assert not os.path.exists("repo"), os.listdir("repo")


def fails_below():
    """A read that fails: where, and why."""
    harness.create("disk.qcow2", 8 * MIB)
    harness.run("qemu-io", "-f", "qcow2", "-c", "write -P 1 0 8M",
                "disk.qcow2")
    server = Server(args=["--filter=" + harness.FILTER, "--filter=error",
                          "file", "disk.qcow2", "error-pread=EIO",
                          "error-pread-rate=100%", "error-file=broken",
                          "dirty-bitmap-control=" + ctl_sock])
    q = Qmp(ctl_sock)           # it answers once the image is open
    with open("broken", "w"):
        pass
    err = fails("Input/output error", "--control=" + ctl_sock, server.uri,
                "repo")
    assert q.ask("backup-list") == []
    assert not os.path.exists("repo")
    os.unlink("broken")
    tool("--control=" + ctl_sock, server.uri, "repo")
    restores(b"\1" * 8 * MIB)
    server.stop()
    shutil.rmtree("repo")


class Omitter:
    """A server of 1 MiB of data that does not send all that a reply has to
    have: the second half of each read is missing."""

    SIZE = MIB

    def __init__(self):
        self.path = os.path.join(harness.tmp, "omitter.sock")
        self.uri = "nbd+unix:///?socket=" + self.path
        self.listener = socket.socket(socket.AF_UNIX)
        self.listener.bind(self.path)
        self.listener.listen()
        threading.Thread(target=self.accept, daemon=True).start()

    def accept(self):
        while True:
            s = self.listener.accept()[0]
            threading.Thread(target=self.serve, args=(s,), daemon=True).start()

    def serve(self, s):
        with s:
            read = s.makefile("rb").read
            s.sendall(b"NBDMAGICIHAVEOPT" + struct.pack(">H", 3))
            read(4)
            while self.negotiate(s, read):
                pass

    def negotiate(self, s, read):
        header = read(16)
        if len(header) < 16:
            return False
        option, length = struct.unpack(">8xII", header)
        read(length)

        def reply(kind, data=b""):
            s.sendall(struct.pack(">QIII", 0x3e889045565a9, option, kind,
                                  len(data)) + data)
        if option == 8:         # structured replies
            reply(1)
        elif option == 7:       # go
            reply(3, struct.pack(">HQH", 0, self.SIZE, 1))
            reply(1)
            self.transmit(s, read)
            return False
        elif option == 2:       # abort
            reply(1)
            return False
        else:
            reply(1 if option in (9, 10) else 0x80000001)
        return True

    @staticmethod
    def transmit(s, read):
        while len(header := read(28)) == 28:
            kind, cookie, offset, count = struct.unpack(">4x2xHQQI", header)
            if kind != 0:
                return
            half = b"x" * (count // 2)
            s.sendall(struct.pack(">IHHQIQ", 0x668e33ef, 1, 1, cookie,
                                  8 + len(half), offset) + half)


def omits():
    """What the server has not sent is not in a point."""
    server = Omitter()
    fails("the server's reply does not have them all", server.uri, "repo")
    assert not os.path.exists("repo")


for test in (full_points, large_blocks, odd_sizes, granularities, qemu_nbd,
             vanishes, fails_below, omits):
    print(test.__name__, flush=True)
    test()
