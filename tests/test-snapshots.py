#!/usr/bin/python3 -B
# nbdkit-dirty-bitmap-filter
# SPDX-License-Identifier: BSD-3-Clause
# Copyright the nbdkit-dirty-bitmap-filter authors

"""Images with internal snapshots, written by QEMU and by us in turn: the
disk is what was written, each snapshot what it was, qemu-img check finds
nothing, and each snapshot is served as qemu-nbd -l serves it.

SEED=N replays a run; ROUNDS=N makes it longer.
"""

import os

import harness
from harness import CONTEXT, HOLE, ZERO, Server, nbd, run
from qcow2image import Image

harness.requires("qemu-nbd", "qemu-io")
rnd = harness.seeded()
ROUNDS = int(os.environ.get("ROUNDS", "1"))

DISK = "disk.qcow2"
# Options, the cluster size, the disk's.
CONFIGURATIONS = [
    ("", 512, 1 << 20),
    ("", 4096, (9 << 20) + 512),
    ("compat=0.10", 4096, 5 << 20),
    ("", 65536, 12 << 20),
    ("extended_l2=on", 65536, 12 << 20),
]


class Subject:
    """The disk and its snapshots as bytes."""

    def __init__(self, options, cluster, size):
        self.size = size
        self.version = 2 if "0.10" in options else 3
        self.data = bytearray(size)
        self.snapshots = {}
        self.number = 0
        self.unit = cluster
        raw = "source.raw"
        self.data[:size // 3] = rnd.randbytes(4096) * (size // 3 // 4096) + \
            bytes(size // 3 % 4096)
        with open(raw, "wb") as f:
            f.write(self.data)
        run("qemu-img", "convert", "-c", "-O", "qcow2", "-o", options, raw,
            DISK)
        if self.version >= 3:
            run("qemu-img", "bitmap", "--add", "-g", "4k", DISK, "b")

    def any_range(self, most):
        count = rnd.randint(1, min(most, self.size))
        return rnd.randint(0, self.size - count), count

    def qemu(self):
        """QEMU's turn: data and zeroes, then snapshots come and go."""
        commands = []
        for _ in range(3):
            offset, count = self.any_range(1 << 20)
            byte = rnd.randint(0, 255)
            self.data[offset:offset + count] = bytes([byte]) * count
            commands += ["-c", "write -q -P %d %d %d" % (byte, offset, count)]
        offset, count = self.any_range(1 << 19)
        self.data[offset:offset + count] = bytes(count)
        commands += ["-c", "write -q -z %d %d" % (offset, count)]
        run("qemu-io", "-f", "qcow2", *commands, DISK)

    def snapshot(self):
        name = "snap %d" % self.number
        self.number += 1
        run("qemu-img", "snapshot", "-c", name, DISK)
        self.snapshots[name] = bytes(self.data)

    def delete(self):
        name = rnd.choice(sorted(self.snapshots))
        run("qemu-img", "snapshot", "-d", name, DISK)
        del self.snapshots[name]

    def ours(self):
        """Our turn: write, zero, trim, flush, and a clean stop."""
        server = Server(DISK)
        h = server.connect()
        assert not h.is_read_only()
        unit = self.unit
        for _ in range(40):
            offset, count = self.any_range(1 << 19)
            verb = rnd.choice(["write", "write", "part", "zero", "keep",
                               "trim", "flush"])
            if rnd.random() < 0.5:
                offset -= offset % unit
            if verb in ("write", "part"):
                count = count if verb == "write" else min(count, 700)
                data = rnd.randbytes(1000) * (count // 1000 + 1)
                h.pwrite(data[:count], offset)
                self.data[offset:offset + count] = data[:count]
            elif verb in ("zero", "keep"):
                h.zero(count, offset,
                       nbd.CMD_FLAG_NO_HOLE if verb == "keep" else 0)
                self.data[offset:offset + count] = bytes(count)
            elif verb == "trim":
                # Whole clusters, in which there is nothing else to keep.
                offset -= offset % unit
                count = min(-(-count // unit) * unit, self.size - offset)
                h.trim(count, offset)
                self.data[offset:offset + count] = bytes(count)
            else:
                h.flush()
        assert h.pread(self.size, 0) == self.data
        h.shutdown()
        server.stop()

    def check(self, where):
        harness.check(DISK)
        assert harness.contents(DISK) == self.data, where + ": the disk"
        for name, data in self.snapshots.items():
            run("qemu-img", "convert", "-l", "snapshot.name=" + name, "-f",
                "qcow2", "-O", "raw", DISK, "snapshot.raw")
            with open("snapshot.raw", "rb") as f:
                assert f.read() == data, "%s: %s" % (where, name)

    def check_served(self, where):
        """Each snapshot as we serve it, and as QEMU does."""
        before = harness.sha256(DISK)
        for name, data in self.snapshots.items():
            server = Server(DISK, "dirty-bitmap-snapshot=" + name)
            h = server.connect("base:allocation", CONTEXT + "b")
            assert h.is_read_only(), where
            assert not h.can_meta_context(CONTEXT + "b")
            assert h.get_size() == self.size
            assert h.pread(self.size, 0) == data, "%s: %s" % (where, name)
            got = harness.extents(h, "base:allocation")
            h.shutdown()
            server.stop()
            h = nbd.NBD()
            h.add_meta_context("base:allocation")
            h.connect_systemd_socket_activation(
                ["qemu-nbd", "-l", "snapshot.name=" + name, "-f", "qcow2",
                 DISK])
            assert h.pread(self.size, 0) == data, "%s: %s" % (where, name)
            if self.version >= 3:
                wanted = harness.extents(h, "base:allocation")
                # QEMU tells explicit zeroes as a hole, and holes of the
                # image's file, below which we do not always look, as zeroes.
                for ours, qemus in harness.both(got, wanted):
                    assert bool(ours & ZERO) >= bool(qemus & HOLE) and \
                        bool(ours & ZERO) <= bool(qemus), \
                        "%s: %s: %s, not %s" % (where, name, got, wanted)
            h.shutdown()
        assert harness.sha256(DISK) == before, where + ": it was written"


def one_subject(options, cluster, size):
    options = ",".join(filter(None, ["cluster_size=%d" % cluster, options]))
    print(options, flush=True)
    s = Subject(options, cluster, size)
    s.qemu()
    s.snapshot()
    s.ours()
    s.check(options + ", first")
    s.snapshot()
    s.qemu()
    s.snapshot()
    s.ours()
    s.check(options + ", second")
    s.check_served(options)
    s.delete()
    s.qemu()
    s.ours()
    s.check(options + ", third")
    # Back to a snapshot, as QEMU does it, for which the bitmap must go.
    if s.version >= 3:
        run("qemu-img", "bitmap", "--remove", DISK, "b")
    name = rnd.choice(sorted(s.snapshots))
    run("qemu-img", "snapshot", "-a", name, DISK)
    s.data = bytearray(s.snapshots[name])
    s.check(options + ", reverted")
    s.ours()
    s.check(options + ", after that")
    while s.snapshots:
        s.delete()
    s.ours()
    s.check(options + ", at the end")


def refusals():
    harness.create("r.qcow2", 1 << 20, "b", options="cluster_size=4k")
    run("qemu-io", "-f", "qcow2", "-c", "write -q -P 1 0 8k", "r.qcow2")
    run("qemu-img", "snapshot", "-c", "2", "r.qcow2")
    run("qemu-io", "-f", "qcow2", "-c", "write -q -P 2 0 8k", "r.qcow2")
    run("qemu-img", "snapshot", "-c", "two", "r.qcow2")
    run("qemu-io", "-f", "qcow2", "-c", "write -q -P 3 0 8k", "r.qcow2")
    before = harness.sha256("r.qcow2")

    for options in [], ["-r"]:
        for name in "3", "tw", "nothing here":
            out = harness.refused("r.qcow2", "dirty-bitmap-snapshot=" + name,
                                  options=options, pattern="no snapshot")
            assert "'%s'" % name in out, out
    harness.refused("r.qcow2", "dirty-bitmap-snapshot=", pattern="empty")
    for p in "dirty-bitmap=b", "dirty-bitmap-expose=b", "dirty-bitmap=new":
        harness.refused("r.qcow2", "dirty-bitmap-snapshot=two", p,
                        pattern=p.split("=")[0] + ": cannot be used with dirty-bitmap-snapshot")
    # The ID goes before the name, as with qemu-nbd -l.
    for name, byte in ("1", 1), ("2", 2), ("two", 2):
        server = Server("r.qcow2", "dirty-bitmap-snapshot=" + name)
        h = server.connect()
        assert h.pread(8192, 0) == bytes([byte]) * 8192, name
        # Another reader may look at it meanwhile, a writer may not.
        run("qemu-img", "map", "r.qcow2")
        run("qemu-io", "-f", "qcow2", "-c", "write 0 512", "r.qcow2",
            status=1)
        h.set_strict_mode(h.get_strict_mode() & ~nbd.STRICT_COMMANDS)
        for change in (lambda: h.pwrite(b"x", 0), lambda: h.zero(512, 0),
                       lambda: h.trim(512, 0)):
            try:
                change()
                raise AssertionError("a snapshot was changed")
            except nbd.Error as e:
                assert e.errno == "EPERM", e
        h.shutdown()
        server.stop()
        # nbdkit's own server, too.
        server = Server("r.qcow2", "dirty-bitmap-snapshot=" + name,
                        "dirty-bitmap-server=off")
        h = server.connect()
        assert h.is_read_only()
        assert h.pread(8192, 0) == bytes([byte]) * 8192, name
        h.shutdown()
        server.stop()
    assert harness.sha256("r.qcow2") == before, "the image was written"


def damaged():
    image = Image("r.qcow2")
    table = image.get("snapshots_offset")
    good = image.read(0, os.path.getsize("r.qcow2"))
    for offset, data in [(60, b"\xff" * 4), (64, b"\xff" * 8),
                         (64, bytes(6) + b"\x10\x01"), (table, b"\xff" * 8),
                         (table + 8, b"\xff" * 4), (table + 14, b"\xff" * 2),
                         (table + 36, b"\xff" * 4), (table, bytes(8)),
                         (table, image.read(40, 8))]:
        image.write(offset, data)
        before = harness.sha256("r.qcow2")
        out = harness.refused("r.qcow2", pattern="snapshots of the image")
        assert "-r" in out, out
        server = Server("r.qcow2", options=["-r"])
        h = server.connect(CONTEXT + "b")
        assert h.pread(8192, 0) == b"\3" * 8192
        assert h.can_meta_context(CONTEXT + "b")
        h.shutdown()
        server.stop()
        assert harness.sha256("r.qcow2") == before
        image.write(0, good)


for _ in range(ROUNDS):
    for configuration in CONFIGURATIONS:
        one_subject(*configuration)
refusals()
damaged()
